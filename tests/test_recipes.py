"""The recipes of the course: every pass is in one, every setting is accepted, every student is read back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import ROOT, SMALL

from llmcourse import compress, load_model, passes, token_data
from llmcourse.packed import dequantize_model, load_student, save_student
from llmcourse.recipes import find_recipe, load_recipe
from llmcourse.runtime import Runtime
from llmcourse.settings import load_settings

RECIPES = {path.stem: load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.toml"))}
ARMS = [(name, arm) for name, recipe in RECIPES.items() for arm in recipe.arms]
# training as short as it can be: here it has to run, not to help
SHORT = {"steps": 2, "ramp": 1, "every": 1, "batch_size": 1, "n_train": 2, "seq_len": 16}


def test_every_pass_of_the_package_has_a_recipe():
    used = {table["method"] for _, arm in ARMS for table in arm.passes}
    own = {name for name, cls in passes().items() if cls.__module__.startswith("llmcourse.")}
    assert own - used == set(), "add recipes/NAME.toml for these"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_does_and_what_it_costs(name):
    text, recipe = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf8"), RECIPES[name]
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert recipe.name == name and recipe.description and len(comments) >= 2
    assert text.startswith("#") and max(map(len, text.splitlines())) <= 120
    assert find_recipe(name, "compress") == ROOT / "recipes" / f"{name}.toml"
    settings = load_settings(ROOT / "settings.ini", env={})
    for arm in recipe.arms:
        assert len(arm.build(settings)) == len(arm.passes)


@pytest.fixture(scope="module")
def small(tmp_path_factory, corpus):
    """A folder with a random Llama of four blocks, the model itself, and text for it."""
    import json

    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, bpe = tmp_path_factory.mktemp("recipes") / "four", ByteLevelBPETokenizer()
    texts = (json.loads(line)["text"] for line in corpus.read_text(encoding="utf8").splitlines())
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    home = {"LLMCOURSE_DATA": str(corpus), "LLMCOURSE_HOME": str(folder.parent / "home")}
    settings = load_settings(ROOT / "settings.ini", env=SMALL | home | {"LLMCOURSE_CALIB_SEQUENCES": "2"})
    rt = Runtime.auto("cpu", "float32")
    model, tokenizer, _ = load_model(str(folder), rt=rt, settings=settings)
    data = token_data(tokenizer, corpus, limits={"calib": 256, "train": 256}, settings=settings)
    return folder, model, data, rt, settings


def shortened(table: dict, folder) -> dict:
    """A pass as the recipe has it, but with next to no training, and the model at hand as the teacher."""
    new = {k: min(v, SHORT[k]) if k in SHORT else v for k, v in table.items()}
    if "train" in new:
        new["train"] = {k: min(v, SHORT.get(k, v)) for k, v in new["train"].items()}
    return new | ({"teacher": str(folder)} if "teacher" in new else {})


@pytest.mark.parametrize(("name", "arm"), ARMS, ids=[f"{name}-{arm.slug}" for name, arm in ARMS])
def test_a_recipe_runs_and_its_model_is_read_back(small, tmp_path, name, arm):
    folder, model, data, rt, settings = small
    short = dataclasses.replace(arm, passes=tuple(shortened(dict(table), folder) for table in arm.passes))
    student, reports = compress(model, short.build(settings), data, rt)
    assert len(reports) == len(arm.passes)
    stored = save_student(student, None, tmp_path / "out", rest_dtype=torch.float32)
    again = dequantize_model(load_student(tmp_path / "out", dtype=torch.float32).model)
    ids = data.calib[None, :16]
    with torch.no_grad():
        dense, ours, theirs = (m(ids).logits for m in (model, student, again))
    assert sum(stored.values()) > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(ours).all() and not torch.allclose(ours, dense, rtol=1e-4, atol=1e-5)
    if name in ("nf4", "binary", "ternary"):  # nothing of what was rounded is stored dense
        assert stored["dense linears"] == 0 < stored["codes"], stored
