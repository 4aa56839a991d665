"""The model that the course trained: it loads in both forms, is better than counting, and was never quantized."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, run_cli

from llmcourse.data import load_model, token_data
from llmcourse.evaluation import KneserNey, compare_perplexity, perplexity
from llmcourse.model import GPT
from llmcourse.pretraining import load_pretrain_recipe
from llmcourse.store import asset_folder

RECIPE = ROOT / "recipes" / "pretrain" / "course.toml"


@pytest.fixture(scope="module")
def house():
    return load_model("course-3m")


def test_ours_and_transformers_agree(house):
    ours = GPT.from_pretrained("course-3m")
    ids = house.tokenizer("Fellow citizens of the Senate", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), house.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert ours.config == load_pretrain_recipe(RECIPE, "cpu").model
    assert sum(p.numel() for p in ours.parameters()) == sum(ours.config.parameters().values())


def test_the_end_of_a_text_is_the_tokenizer_s(house):
    """transformers would take Llama's 2 where the config is silent: an ordinary token of this vocabulary."""
    end = house.tokenizer.eos_token_id
    assert house.tokenizer.decode([end]) == "<|endoftext|>"
    assert house.model.config.eos_token_id == house.model.generation_config.eos_token_id == end
    ids = house.tokenizer("The end.", return_tensors="pt").input_ids
    hook = house.model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([end]), 1e4)
    )
    with torch.no_grad():
        out = house.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=end)
    hook.remove()  # the model is that of the next tests too
    assert out[0, len(ids[0]) :].tolist() == [end]


def test_it_is_float32_and_was_never_on_a_grid(house):
    for name, p in house.model.named_parameters():
        assert p.dtype == torch.float32
        if p.ndim == 2:
            groups = p.detach()[:64, :32]
            assert min(len(row.unique()) for row in groups) >= 30, name
            assert not torch.equal(p.bfloat16().float(), p)


def test_it_beats_the_five_gram_on_text_that_neither_has_seen(house, home):
    data = token_data(house.tokenizer, "sotu", limits={"train": None, "test": 4096})
    counted = KneserNey(data.train, len(house.tokenizer))
    protocol = {"context": 256, "stride": 192, "batch_size": 4}
    ratio = compare_perplexity(perplexity(counted, data, **protocol), perplexity(house.model, data, **protocol))
    assert ratio.high < 1


def test_the_card_says_what_it_is(home):
    folder = asset_folder("course-3m", home)
    card = (folder / "README.md").read_text(encoding="utf8")
    for words in (
        "never quantized",
        "tokens seen",
        "seed 0",
        "llmcourse pretrain course --out build/course",
        "loss.svg",
        "public domain",
        "Limits",
        "Kneser–Ney 5-gram",
        "bits per byte",
        RECIPE.read_text(encoding="utf8").strip(),
    ):
        assert words in card, words
    history = json.loads((folder / "history.json").read_text(encoding="utf8"))
    assert (
        len(history["losses"]) == load_pretrain_recipe(RECIPE, "cpu").train.steps
        and history["val"][-1][1] < history["val"][0][1]
    )
    assert (folder / "loss.svg").read_text(encoding="utf8").lstrip().startswith("<?xml")


def test_pretrain_on_the_command_line_refuses_a_typing_error(tmp_path):
    result = run_cli("pretrain", "corse", "--out", str(tmp_path / "x"))
    assert (
        result.returncode == 2
        and "recipe is 'corse'; allowed: the path of a .toml file, or one of course." in result.stderr
        and "Traceback" not in result.stderr
    )
    recipe = tmp_path / "bad.toml"
    recipe.write_text(RECIPE.read_text(encoding="utf8").replace("lr = 0.01", "lr = -0.01"), encoding="utf8")
    result = run_cli("pretrain", str(recipe), "--out", str(tmp_path / "x"), LLMCOURSE_SCALE="cpu")
    assert result.returncode == 2 and "lr is -0.01" in result.stderr and not (tmp_path / "x").exists()
