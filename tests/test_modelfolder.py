"""Folders that other people wrote: what cannot be loaded as it stands is refused in a sentence, and nothing is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcourse.data import load_model
from llmcourse.model import GPT
from llmcourse.modelfolder import weight_files
from llmcourse.settings import BadInput
from llmcourse.store import write_manifest

WEIGHTS, INDEX, LAYER = "model.safetensors", "model.safetensors.index.json", "model.layers.1.mlp.up_proj.weight"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def shard(folder: Path, index=None) -> None:
    """The same weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    content = {"metadata": {}, "weight_map": where} if index is None else index(where)
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


def outside(folder: Path, where: dict) -> dict:
    """An index that leads to a file beside the folder, which exists."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "elsewhere.safetensors")
    return {"weight_map": {n: "../elsewhere.safetensors" if "00001" in f else f for n, f in where.items()}}


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def code_of_its_own(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w').write('ran')\nclass A: pass\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"})


def manifest_then_flip(folder: Path) -> None:
    write_manifest(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1  # loads without a complaint, with another weight
    (folder / WEIGHTS).write_bytes(content)


BROKEN = {  # what is done to a good folder, and words of the refusal
    "a missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(LAYER)), ("lacks the tensor", LAYER)),
    "a missing layer": (
        lambda f: change_tensors(f, lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n]),
        ("lacks the tensor", "more"),
    ),
    "an unknown tensor": (
        lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(2))),
        ("unknown tensor", "extra"),
    ),
    "another shape": (lambda f: change_tensors(f, lambda t: t.update({LAYER: t[LAYER][:-1].clone()})), (LAYER,)),
    "no tensor at all": (lambda f: save_file({}, f / WEIGHTS, metadata={"format": "pt"}), ("lacks the tensor",)),
    "one layer more in the configuration": (lambda f: change_config(f, num_hidden_layers=3), ("lacks", "layers.2")),
    "one layer less in the configuration": (lambda f: change_config(f, num_hidden_layers=1), ("unknown", "layers.1")),
    "an empty index": (lambda f: shard(f, lambda where: {}), ("weight_map",)),
    "an index without files": (lambda f: shard(f, lambda where: {"weight_map": {}}), ("weight_map",)),
    "an index that is a list": (lambda f: shard(f, lambda where: []), (INDEX, "JSON object")),
    "an index that is cut": (lambda f: shard(f, lambda where: json.dumps({"weight_map": where})[:-9]), (INDEX,)),
    "an index of numbers": (lambda f: shard(f, lambda where: {"weight_map": dict.fromkeys(where, 3)}), ("weight_map",)),
    "an index that leads out": (lambda f: shard(f, lambda where: outside(f, where)), ("../elsewhere", "same folder")),
    "an index with a root": (
        lambda f: shard(f, lambda where: {"weight_map": dict.fromkeys(where, "/etc/x.safetensors")}),
        ("/etc/x", "same folder"),
    ),
    "an index of a pickle": (
        lambda f: shard(f, lambda where: {"weight_map": dict.fromkeys(where, "pytorch_model.bin")}),
        ("pytorch_model.bin",),
    ),
    "an index with a missing file": (
        lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()),
        ("model-00002-of-00002",),
    ),
    "an index without metadata": (
        lambda f: shard(f, lambda where: {"weight_map": where}),
        ("could not be loaded", "'metadata' is missing"),
    ),
    "a pickle": (pickled, ("pytorch_model.bin", "run any code")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("no weights",)),
    "weights that are cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        ("damaged safetensors",),
    ),
    "weights that are text": (lambda f: (f / WEIGHTS).write_text("hello"), ("safetensors",)),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), ("safetensors",)),
    "no configuration": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "a configuration that is cut": (lambda f: (f / "config.json").write_text("{"), ("config.json", "JSON")),
    "a configuration of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ("config.json", "JSON")),
    "a configuration nested deep": (lambda f: (f / "config.json").write_text("[" * 100_000), ("config.json",)),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object")),
    "an empty configuration": (lambda f: (f / "config.json").write_text("{}"), ("could not be loaded",)),
    "an unknown model type": (lambda f: change_config(f, model_type="nobody"), ("could not be loaded",)),
    "a size that is text": (lambda f: change_config(f, hidden_size="64"), ("could not be loaded",)),
    "heads that do not divide": (lambda f: change_config(f, num_attention_heads=0), ("could not be loaded",)),
    "code of its own": (code_of_its_own, ("could not be loaded",)),
    "weights elsewhere": (
        lambda f: change_config(f, transformers_weights="../x.safetensors"),
        ("transformers_weights",),
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter",)),
    "a flipped bit under a manifest": (manifest_then_flip, (WEIGHTS, "sha256")),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ("could not be loaded",)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_cannot_be_loaded_as_it_stands(tiny_model, tmp_path, how, capfd):
    break_it, words = BROKEN[how]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    break_it(folder)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(BadInput) as e:
        load_model(folder)
    said = str(e.value)
    assert "\n" not in said and len(said) < 700
    for word in words:
        assert word in said, said
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before  # nothing written, no canary
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["single", "shards", "manifest"])
def test_a_good_folder_is_loaded(tiny_model, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if how == "shards":
        shard(folder)
    if how == "manifest":
        write_manifest(folder)
    (folder / "backup.safetensors").write_bytes(b"a second copy that nothing reads")
    model, _, _ = load_model(folder)
    whole, _, _ = load_model(tiny_model)
    for (name, a), (_, b) in zip(model.state_dict().items(), whole.state_dict().items()):
        assert torch.equal(a, b), name
    assert [p.name for p in weight_files(folder)] == (
        [WEIGHTS] if how != "shards" else ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    )
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.allclose(GPT.from_pretrained(folder)(ids), whole(ids).logits, atol=1e-4)


@pytest.mark.model
def test_the_models_of_the_catalog_have_exactly_their_tensors(home):
    for name in ("bert-tiny", "minilm", "course-3m"):
        model, _, card = load_model(name)
        assert card.name == name and all(p.isfinite().all() for p in model.parameters())
