"""The course's models in lm-evaluation-harness: the same item has the same log-likelihood there and here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_env

from llmcourse import accuracy as ac
from llmcourse import lmeval
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput, load_settings
from llmcourse.store import is_prepared

RT = Runtime(device=torch.device("cpu"), dtype=torch.float32)
needs_model = [
    pytest.mark.model,
    pytest.mark.skipif(
        not is_prepared("smollm2-135m", load_settings().home),
        reason="smollm2-135m is not prepared: run llmcourse data --fetch smollm2-135m",
    ),
]
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'llmcourse[eval]'")


@pytest.fixture(scope="module")
def subject(tiny_model):
    from llmcourse.data import load_model

    model, tokenizer, _ = load_model(tiny_model)
    with torch.no_grad():  # as initialized, all tokens are nearly equally probable
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model, tokenizer


@pytest.fixture(scope="module")
def gpt(subject):
    from llmcourse.model import GPT, GPTConfig

    torch.manual_seed(1)
    return GPT(GPTConfig(vocab_size=len(subject[1]), d_model=16, n_layers=1, n_heads=2, context=128)).eval()


ITEMS = [
    ac.Item(context=f"kalo mi{'ne' * i}:", choices=("ru sa", "to", "vi que zemi"), answer=i % 3) for i in range(6)
] + [ac.Item(context="ka lo ", choices=("mi", "ne ne"), answer=1)]


def requests(*args):
    return [SimpleNamespace(args=a) for a in args]


@pytest.mark.parametrize("kind", ["transformers", "ours", "a function"])
def test_the_same_log_likelihood_there_and_here(subject, gpt, kind):
    model, tokenizer = subject
    model = {"transformers": model, "ours": gpt, "a function": lambda ids: gpt(ids)}[kind]
    pairs = [(item.context, d + c) for item in ITEMS for c in item.choices for d in (" ", "")]
    pairs = [p for p in pairs if p[1]]
    there = lmeval.course_lm(model, tokenizer).loglikelihood(requests(*pairs), disable_tqdm=True)
    here = ac.loglikelihood(model, tokenizer, pairs)
    assert [v for v, _ in there] == pytest.approx([x.value for x in here], abs=1e-4)
    assert [g for _, g in there] == [x.greedy for x in here]


def test_the_same_as_lm_evals_own_reading_of_transformers(subject):
    model, tokenizer = subject
    try:
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    except ImportError as e:
        pytest.skip(f"lm-eval's own models cannot be imported: {e}")
    pairs = [(item.context, " " + c) for item in ITEMS for c in item.choices] + [("", "kalo mine")]
    a = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    b = lmeval.course_lm(model, tokenizer).loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-4)
    rolling = requests(("ka lo mi ne ru sa to vi " * 30,), ("ka",))
    a = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert a == pytest.approx(lmeval.course_lm(model, tokenizer).loglikelihood_rolling(rolling), rel=1e-5)


def test_a_task_without_files_or_network(subject, no_network):
    model, tokenizer = subject
    items = ITEMS  # the last one has two choices, the others three
    found = lmeval.run(model, tokenizer, items)
    ours = ac.score_choices(model, tokenizer, items)
    assert found["acc,none"] == pytest.approx(ours.accuracy().value)
    assert found["acc_norm,none"] == pytest.approx(ours.accuracy("characters").value)
    for sample in found["samples"]:
        got = [float(r[0][0]) for r in sample["resps"]]
        assert got == pytest.approx(ours.log_p[sample["doc_id"]][: len(got)].tolist(), abs=1e-4)


def test_rolling_scores_every_token_once(gpt, subject):
    _, tokenizer = subject
    text = "ka lo mi ne ru sa to vi " * 12
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    seen = []

    def model(x):  # the next token is the same with every context: a sum over windows is a sum over tokens
        seen.append(x.shape[1])
        return torch.linspace(0, 3, len(tokenizer)).expand(*x.shape, -1)

    lm = lmeval.course_lm(model, tokenizer, context=16)
    expected = torch.linspace(0, 3, len(tokenizer)).log_softmax(0)[ids].sum()
    assert lm.loglikelihood_rolling(requests((text,))) == pytest.approx([float(expected)], rel=1e-5)
    assert max(seen) <= 16 and lm.loglikelihood_rolling(requests(("",))) == [0.0]


def test_greedy_text_ends_where_it_is_told(gpt, subject):
    _, tokenizer = subject
    lm = lmeval.course_lm(gpt, tokenizer)
    until = lambda **o: lm.generate_until(requests(("ka lo", {"max_gen_toks": 6} | o)))[0]
    text = until(until=[])
    ids = tokenizer("ka lo")["input_ids"]
    for _ in range(6):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
    assert text == tokenizer.decode(ids[-6:]) and len(text) > 1
    assert until(until=text[1]) == text[: text.index(text[1])]
    with pytest.raises(BadInput, match="do_sample is True"):
        until(do_sample=True)


def test_bad_input(subject, monkeypatch):
    model, tokenizer = subject
    with pytest.raises(BadInput, match="context is 1;"):
        lmeval.course_lm(model, tokenizer, context=1)
    with pytest.raises(BadInput, match="items is"):
        lmeval.items_task([])
    assert math.isfinite(np.mean(lmeval.course_lm(model, tokenizer).loglikelihood_rolling(requests(("ka",)))))
    monkeypatch.setattr(lmeval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="lm-eval is not installed"):
        lmeval.items_task(ITEMS)


def test_quick_benchmark(tiny_model, tmp_path):
    """The script compares the log-likelihoods of all candidates; here its times mean nothing."""
    out = tmp_path / "evaluate.json"
    script = ROOT / "benchmarks" / "evaluate.py"
    command = [sys.executable, str(script), "--quick", "--model", str(tiny_model), "--out", str(out)]
    subprocess.run(command, env=clean_env(), check=True, capture_output=True, timeout=300)
    (found,) = json.loads(out.read_text())["models"].values()
    assert found["items"] == 12 and found["largest difference"] < 1e-4
    assert set(found["rows"]) == {"lm-eval", "lm-eval again", "lm-eval, our adapter", "llmcourse"}
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["ms"] > 0 for row in found["rows"].values())


# ------------------------------------------------------------------------------------- packed, and the real model


def packed_and_dense(model, vocabulary):
    """A packed copy in 4 bits, and the dense model with the same rounded weights."""
    from llmcourse import RTN, compress
    from llmcourse.data import TokenData
    from llmcourse.packed import dequantize_model, pack_model

    stream = torch.randint(vocabulary, (64,), generator=torch.Generator().manual_seed(0))
    parts = dict.fromkeys(("train", "val", "test", "calib"), stream)
    data = TokenData(**parts, bytes={}, name="random", tokenizer="none", separator=0)
    student, _ = compress(model, [RTN(bits=4, group_size=32, n_calib=1, seq_len=16)], data, RT)
    packed = pack_model(student)
    return packed, dequantize_model(packed)


def agrees(models, tokenizer, items):
    """The same log-likelihoods of the same items through lm-eval and through the course, for every model."""
    pairs = [(item.context, " " + c) for item in items for c in item.choices]
    ours = ac.score_choices(models[0], tokenizer, items).log_p
    ours = [x for row, item in zip(ours, items) for x in row[: len(item.choices)]]
    for model in models:
        there = lmeval.course_lm(model, tokenizer).loglikelihood(requests(*pairs), disable_tqdm=True)
        assert [v for v, _ in there] == pytest.approx(ours, abs=1e-4)
    assert len({round(v, 3) for v in ours}) == len(set(pairs))  # a model that says the same of all would agree too
    return ours


def test_a_packed_model_there_and_here(subject):
    model, tokenizer = subject
    small = agrees(packed_and_dense(model, len(tokenizer)), tokenizer, ITEMS[:6])
    dense = agrees([model], tokenizer, ITEMS[:6])
    assert max(abs(a - b) for a, b in zip(small, dense)) > 1e-2  # the packed one is another model


class TestRealModel:
    pytestmark = needs_model

    def test_dense_and_packed(self):
        from llmcourse.data import load_model

        model, tokenizer, _ = load_model("smollm2-135m", rt=RT)
        items = [
            ac.Item(context="The capital of France is", choices=("Paris", "Rome", "a small river"), answer=0),
            ac.Item(context="Two and two make", choices=("five", "four"), answer=1),
        ]
        assert agrees([model], tokenizer, items)[0] > -2
        model.model.layers = model.model.layers[:3]  # all thirty take most of a minute to pack
        model.config.num_hidden_layers = 3
        agrees(packed_and_dense(model, len(tokenizer)), tokenizer, items)
