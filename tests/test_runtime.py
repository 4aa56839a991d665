"""Runtime: what `rt=None` means, moving, timing, memory, and what is refused."""

from __future__ import annotations

import math
import platform
from collections import namedtuple

import numpy as np
import pytest
import torch

from llmcourse import runtime
from llmcourse.runtime import Runtime, Timing, compare, level_of_rounds, median_ratio
from llmcourse.settings import BadInput, load_settings

CPU = Runtime(device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_runtime_means_where_the_model_is(dtype):
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2)).to(dtype)
    assert Runtime.of(None, model) == Runtime(device=torch.device("cpu"), dtype=dtype)
    assert Runtime.of(CPU, model) is CPU


def test_no_runtime_and_no_model_means_the_settings():
    settings = load_settings(env={"LLMCOURSE_DTYPE": "bfloat16", "LLMCOURSE_DEVICE": "cpu"})
    assert Runtime.of(settings=settings).dtype == torch.bfloat16
    assert Runtime.of(None, torch.nn.Identity()).dtype == torch.float32  # a model without weights


def test_moving_keeps_every_container():
    Pair = namedtuple("Pair", "a b")
    x = {"a": torch.ones(1), "b": [Pair(torch.zeros(2), "text"), (1, None)], "c": torch.nn.Linear(1, 1)}
    moved = CPU.move(x)
    assert type(moved["b"][0]) is Pair and moved["b"][0].b == "text" and moved["b"][1] == (1, None)
    assert moved["c"] is x["c"] and torch.equal(moved["a"], x["a"])


def test_evaluating_ends_in_the_modes_of_before():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError), runtime.evaluating(model, len):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise RuntimeError
    assert [m.training for m in model.modules()] == [True, True, False] and torch.is_grad_enabled()


def test_a_comparison_is_a_ratio_of_medians():
    found = runtime.compare({"a": lambda: None, "b": lambda: sum(range(2000))}, CPU, repeats=5, baseline="b")
    assert found["b"].ratio == 1 and found["a"].timing.n == 5 and found["a"].low <= found["a"].ratio
    assert Timing((1.0, 2.0, 30.0)).median == 2.0 and Timing((1.0, 2.0, 3.0)).quartiles == (1.5, 2.5)


def test_the_peak_and_its_control():
    wanted = 40 * 10**6
    assert 0.9 * wanted < runtime.peak_memory(lambda: torch.ones(wanted // 4), CPU) < 1.5 * wanted


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can give freed pages back")
def test_the_peak_counts_memory_that_was_freed_before_and_is_used_again():
    torch.ones(5 * 10**6)  # once so much is freed, glibc takes what is smaller from its heap
    freed = [torch.ones(10**6) for _ in range(20)]
    above = torch.ones(10**6)  # keeps the heap from shrinking when what lies below it is freed
    del freed
    wanted = 40 * 10**6
    assert 0.9 * wanted < runtime.peak_memory(lambda: torch.ones(wanted // 4), CPU) < 1.5 * wanted
    del above


@pytest.mark.parametrize(
    "call",
    [
        lambda: Runtime.auto("gpu"),
        lambda: Runtime.auto("cuda:99"),
        lambda: Runtime.auto(7),
        lambda: Runtime.auto(dtype="int8"),
        lambda: Runtime.auto(dtype=torch.float32),
        lambda: Runtime(device=torch.device("cpu"), dtype=torch.int64),
        lambda: Runtime(device=torch.device("cpu"), dtype=torch.float32, rank=1),
        lambda: Runtime(device=torch.device("cpu"), dtype=torch.float32, world_size=0),
        lambda: Runtime(device=torch.device("cpu"), dtype=torch.float32, rank=0.0),
        lambda: runtime.machine_epsilon(torch.int8),
        lambda: runtime.machine_epsilon("float32"),
        lambda: runtime.seed_everything(-1),
        lambda: runtime.seed_everything(2**32),
        lambda: runtime.seed_everything(True),
        lambda: runtime.seed_everything(1.0),
        lambda: Timing(()),
        lambda: runtime.benchmark(len, CPU, repeats=0),
        lambda: runtime.benchmark(len, CPU, repeats=2.5),
        lambda: runtime.benchmark(len, CPU, warmup=-1),
        lambda: runtime.compare({}, CPU),
        lambda: runtime.compare({"a": len}, CPU, baseline="b"),
        lambda: runtime.compare({"a": len}, CPU, repeats=1),
        lambda: runtime.compare({"a": len}, CPU, seed=-1),
        lambda: runtime.peak_memory(len, CPU, every=0),
        lambda: runtime.peak_memory(len, CPU, every=math.nan),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.$") as e:
        call()
    assert "\n" not in str(e.value)


def test_where_a_model_is():
    """The first parameter or buffer says it; a packed layer has buffers only, and a function has neither."""
    buffers = torch.nn.Module()
    buffers.register_buffer("codes", torch.zeros(2, dtype=torch.uint8, device="meta"))
    assert runtime.device_of(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert runtime.device_of(buffers) == torch.device("meta")
    for model in (torch.nn.ReLU(), lambda ids: ids, None):
        assert runtime.device_of(model) == torch.device("cpu")


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 20])
def test_an_interval_of_times_holds_as_often_as_it_says(n):
    dice = np.random.default_rng(n)
    noises = (
        lambda: np.exp(0.2 * dice.standard_normal(n)),
        lambda: 1 + 0.02 * dice.random(n) + 0.3 * (dice.random(n) < 0.15),
    )
    for noise in noises:
        trials = [median_ratio(noise(), noise(), dice.integers(n, size=(400, n))) for _ in range(800)]
        held = sum(low <= 1 <= high for _, low, high in trials) / len(trials)
        assert abs(held - level_of_rounds(n)) < 0.04, (n, held)


def test_a_comparison_says_its_level():
    rt = Runtime.auto("cpu", "float32")
    for n, level in ((3, "74%"), (5, "95%")):
        found = compare({"a": lambda: None, "b": lambda: None}, rt, repeats=n)["b"]
        assert found.timing.n == n and f"({level} interval" in str(found)
    with pytest.raises(BadInput, match="n is 0"):
        level_of_rounds(0)
