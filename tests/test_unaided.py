"""Where an exercise asks for a thing to be written, the ready function is refused, however it is reached."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, clean_env

from llmcourse import attention, cleaning, data, model, runtime, tokenizer
from llmcourse.attention import naive_attention as by_another_name
from llmcourse.practice import checking
from llmcourse.practice.unaided import ReadyMade, unaided
from llmcourse.practice.worker import TimeLimit, time_limit

X = torch.arange(12.0).view(3, 4)
NO_SOFTMAX = {"chapter": "attention", "torch_functions": ("*softm*", "scaled_dot_product*", "*multi_head_attention*")}
NO_AUTOGRAD = {"chapter": "model", "torch_functions": ("backward", "grad")}


def in_vain(x):
    """Catches the refusal, and goes on with the answer of its own."""
    try:
        return attention.stable_softmax(x)
    except Exception:
        return x


def backward(x):
    x = x.clone().requires_grad_()
    (x * x).sum().backward()
    return x.grad


REFUSED = [
    (lambda x: attention.stable_softmax(x), NO_SOFTMAX, "llmcourse.attention.stable_softmax"),
    (attention.stable_softmax, NO_SOFTMAX, "llmcourse.attention.stable_softmax"),
    (lambda x: by_another_name(*3 * [x[None, None]]), NO_SOFTMAX, "llmcourse.attention.naive_attention"),
    (in_vain, NO_SOFTMAX, "llmcourse.attention.stable_softmax"),
    (lambda x: model.RMSNorm(4)(x), NO_SOFTMAX, "llmcourse.model.RMSNorm,"),
    (lambda x: x.softmax(-1), NO_SOFTMAX, "softmax"),
    (lambda x: torch.softmax(x, -1), NO_SOFTMAX, "softmax"),
    (lambda x: F.log_softmax(x, -1).exp(), NO_SOFTMAX, "log_softmax"),
    (lambda x: torch.nn.Softmax(-1)(x), NO_SOFTMAX, "softmax"),
    (lambda x: torch.special.softmax(x, -1), NO_SOFTMAX, "softmax"),
    (lambda x: F.scaled_dot_product_attention(x, x, x), NO_SOFTMAX, "scaled_dot_product_attention"),
    (lambda x: torch.nn.MultiheadAttention(4, 2).eval()(x, x, x)[0], NO_SOFTMAX, "multi_head_attention_forward"),
    (backward, NO_AUTOGRAD, "backward"),
    (lambda x: torch.autograd.grad(x.requires_grad_().sum(), x)[0], NO_AUTOGRAD, "grad"),
    (lambda x: torch.autograd.functional.jacobian(torch.sum, x), NO_AUTOGRAD, "grad"),
]


@pytest.mark.parametrize(("answer", "rule", "name"), REFUSED, ids=range(len(REFUSED)))
def test_a_ready_function_is_refused_by_name(answer, rule: dict, name: str) -> None:
    with pytest.raises(ReadyMade, match="write that part yourself") as e:
        unaided(answer, X.clone(), **rule)
    assert name in str(e.value)
    assert attention.stable_softmax(X).shape == X.shape, "outside, everything is as it was"


def test_what_is_written_by_hand_passes() -> None:
    written = lambda x, dim: x.exp() / x.exp().sum(dim, keepdim=True)
    torch.testing.assert_close(unaided(written, X, dim=0, **NO_SOFTMAX), X.softmax(0))
    with pytest.raises(ZeroDivisionError):
        unaided(lambda: 1 // 0, **NO_SOFTMAX)


def test_a_module_that_the_answer_loads_is_refused_too() -> None:
    code = (
        "from llmcourse.practice.unaided import unaided\n"
        "def answer():\n    from llmcourse.cleaning import jaccard\n    return jaccard\n"
        "unaided(lambda: answer()({1}, {2}), chapter='cleaning')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), capture_output=True, text=True)
    assert "ReadyMade: You called llmcourse.cleaning.jaccard" in run.stderr


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.11])
def test_an_endless_answer_is_stopped_and_everything_put_back(seconds: float) -> None:
    def endless(x):
        while True:
            x = max(x, 0)

    was = {f: f.__code__ for f in vars(attention).values() if hasattr(f, "__code__")}
    for _ in range(5):
        started = time.thread_time()
        with pytest.raises(TimeLimit), time_limit(seconds):
            unaided(endless, 1, chapter="attention")
        assert time.thread_time() - started < 5
    assert {f: f.__code__ for f in was} == was


def within(model, fn):
    with runtime.evaluating(model):
        return fn(model)


class Bell:
    """Stands for a function of the chapters; something rings when its code is put back, before or after that."""

    def __init__(self, error: type[BaseException], times: int, after: bool):
        self.error, self.times, self.after, self.rung, self.code = error, times, after, 0, "its own"

    @property
    def __code__(self) -> str:
        return self.code

    @__code__.setter
    def __code__(self, code: str) -> None:
        rings = code == "its own" and self.rung < self.times
        if self.after or not rings:
            self.code = code
        if rings:
            self.rung += 1
            raise self.error


@pytest.mark.parametrize("error", [TimeLimit, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_bell_while_the_functions_are_put_back(after: bool, error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm of a time limit, or a learner's Stop: nothing stays refused, and a Stop is still a Stop."""
    module, bells = sys.modules[unaided.__module__], [Bell(error, times, after) for times in (3, 0, 1)]
    functions = module._functions
    monkeypatch.setattr(module, "_functions", lambda m: [(b, "refused") for b in bells] + functions(m))
    was = {f: f.__code__ for f in vars(attention).values() if hasattr(f, "__code__")}
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            unaided(lambda: 1, chapter="attention")
    else:
        assert unaided(lambda: 1, chapter="attention") == 1
    assert [b.rung for b in bells] == [3, 0, 1] and {b.code for b in bells} == {"its own"}
    assert {f: f.__code__ for f in was} == was


DELEGATES = [
    ("attention.softmax_stable", attention.stable_softmax),
    ("attention.softmax_stable", lambda x, dim=-1: x.softmax(dim).nan_to_num(0.0)),
    ("attention.scaled_dot_product", attention.naive_attention),
    ("attention.scaled_dot_product", F.scaled_dot_product_attention),
    ("attention.online_attention", lambda q, k, v, block: attention.naive_attention(q, k, v)),
    ("model.rms_norm", lambda x, w, eps: model.rms_norm(x, w, eps=eps)),
    ("model.rms_norm", lambda x, w, eps: F.rms_norm(x, w.shape, w.to(x.dtype), eps)),
    ("data.context_seen", lambda n, context, stride: data.windows(n, context, stride)),
    ("cleaning.minhash_similarity", lambda x, y, a, b, p: cleaning.jaccard(set(x), set(y))),
    ("runtime.in_evaluation", within),
    ("tokenization.merge_pair", lambda ids, pair, new: tokenizer.merge_word(ids, {pair: (0, new)})),
]


@pytest.mark.parametrize(("id", "answer"), DELEGATES, ids=range(len(DELEGATES)))
def test_a_call_of_the_ready_function_is_no_answer(id: str, answer) -> None:
    ex = checking.find(id)
    result = checking.judge(ex, checking._run_here(ex, answer))
    assert not result.passed and result.sentence.startswith("You called "), repr(result)
    assert "write that part yourself" in result.sentence
