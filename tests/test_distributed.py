"""Collectives, data, sharded, tensor and pipeline parallelism: the formulas, and several processes against one."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import socket
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import warm
from conftest import ROOT, clean_env
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from llmcourse import distributed as ds
from llmcourse.model import FFN, Attention, GPTConfig, SwiGLU
from llmcourse.settings import BadInput

WORKER = Path(__file__).with_name("distributed_worker.py")
LINK = {"latency": 1e-5, "bandwidth": 1e10}
few = hypothesis_settings(max_examples=40, deadline=None)


def together(n: int, *command: str | Path, timeout: float = 240):
    """A command in n processes that know of each other, to the end of all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(n)]
    return warm.run(command, env=clean_env(PYTHONPATH=str(ROOT)), copies=ranks, timeout=timeout)


def processes(n: int, *jobs: str, check: bool = True, timeout: float = 240):
    """What each of n processes has found, in the order of their ranks."""
    found = together(n, WORKER, *jobs, timeout=timeout)
    if not check:
        return found
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.strip().splitlines()[-1])


@functools.cache
def everyone(n: int) -> list[dict]:
    return processes(n, "ring", "data", "zero", "tensor", "pipe")


several = pytest.mark.parametrize("n", [2, 3])


# ------------------------------------------------------------------------------------------ collectives


@given(st.integers(1, 7), st.lists(st.integers(0, 5), max_size=2), st.sampled_from([torch.int64, torch.float64]))
@few
def test_imagined_workers_get_the_sum_and_send_what_the_formula_says(workers, shape, dtype):
    parts = [(torch.randn(shape, generator=torch.Generator().manual_seed(r)) * 9).to(dtype) for r in range(workers)]
    before = copy.deepcopy(parts)
    n, total = parts[0].numel(), torch.stack(parts).sum(0)
    ring, tree = ds.simulate_ring(parts), ds.simulate_tree(parts)
    for run in (ring, tree):
        assert all(r.shape == total.shape and r.dtype == dtype for r in run.results)
        torch.testing.assert_close(run.results[0], total)
        assert all(torch.equal(r, run.results[0]) for r in run.results)
        assert sum(run.sent) == 2 * (workers - 1) * n
    assert len(ring.rounds) == 2 * (workers - 1) and max(ring.rounds, default=0) == (workers > 1) * -(-n // workers)
    assert max(ring.sent) - min(ring.sent) <= 2
    assert len(tree.rounds) == 2 * (workers - 1).bit_length()
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
    for run in (ring, tree):
        run.results[0].add_(1)  # nobody's memory is shared
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
        assert workers == 1 or torch.equal(run.results[1], total) or dtype.is_floating_point


@given(st.integers(1, 9), st.integers(0, 6))
@few
def test_the_formula_of_the_time_is_the_simulation(workers, pieces):
    parts = [torch.ones(workers * pieces)] * workers
    for way, run in (("ring", ds.simulate_ring(parts)), ("tree", ds.simulate_tree(parts))):
        formula = ds.all_reduce_seconds(4 * workers * pieces, workers, way=way, **LINK)
        assert run.seconds(**LINK) == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8, 64, 1000])
def test_the_ring_wins_from_a_size_on(workers):
    size = ds.ring_from(workers, **LINK)
    assert (size == 0) == (workers in (2, 3))
    for more, sign in ((0.99, -1), (1.01, 1)):
        times = [ds.all_reduce_seconds(size * more + (workers < 4), workers, way=w, **LINK) for w in ("tree", "ring")]
        assert sign * (times[0] - times[1]) > 0 or workers < 4
    at = [ds.all_reduce_seconds(size, workers, way=w, **LINK) for w in ("tree", "ring")]
    assert at[0] == pytest.approx(at[1], rel=1e-12)


@several
def test_the_ring_of_processes_is_the_librarys_all_reduce(n):
    for rank, found in enumerate(r["ring"] for r in everyone(n)):
        assert found["difference"] < 1e-6
        assert found["scattered"] == [n * (n + 1) / 2] * 3 and found["gathered"] == list(range(n))
        assert found["sent"]["0"] == 0
        for size, sent in ((int(k), v) for k, v in found["sent"].items()):
            pieces = [len(c) for c in torch.empty(size).tensor_split(n)]
            # all but one piece twice: the one it has complete is not sent in the first half
            skipped = pieces[rank] + pieces[(rank + 1) % n]
            assert sent == 4 * (2 * size - skipped)
        for dtype, difference in found["formats"].items():
            eps = torch.finfo(getattr(torch, dtype[6:])).eps if "float" in dtype else 0.0
            assert difference <= n * eps * (found["largest"] + n)


# ------------------------------------------------------------------------------------------ data parallelism


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
@few
def test_buckets_are_runs_that_are_as_long_as_they_can_be(sizes, limit):
    buckets = ds.into_buckets(sizes, limit)
    assert [i for b in buckets for i in b] == list(range(len(sizes))) and all(buckets)
    total = [sum(sizes[i] for i in b) for b in buckets]
    assert all(t <= limit or len([i for i in b if sizes[i]]) == 1 for b, t in zip(buckets, total, strict=True))
    for left, right in itertools.pairwise(buckets):
        assert sum(sizes[i] for i in left) + sizes[right[0]] > limit


@given(st.integers(1, 30), st.floats(0, 2), st.floats(0, 3), st.floats(0, 1))
@few
def test_the_end_of_the_last_bucket_is_the_formula(n, seconds, latency, per_byte):
    cost = lambda size: latency + size * per_byte
    for k in (k for k in range(1, n + 1) if n % k == 0):
        line = ds.bucket_timeline([(seconds, 3)] * n, 3 * k, cost)
        assert len(line) == n // k
        assert line[-1][2] == pytest.approx(ds.overlapped_seconds(n, seconds, 3, k, cost), abs=1e-9)
        assert all(ready <= start <= end for ready, start, end in line)
        assert all(a[2] <= b[1] for a, b in itertools.pairwise(line))
    assert ds.bucket_timeline([], 1, cost) == []


@several
def test_gradients_of_processes_are_those_of_one(n):
    for found in (r["data"] for r in everyone(n)):
        for name in ("one bucket", "many"):
            assert found[name]["difference"] < 3e-6
            assert found[name]["early"] == found[name]["n"]  # sent before the backward pass was over
        assert found["one bucket"]["n"] == 1 < found["many"]["n"]
        assert found["mean of means"] > 0.01  # the bug is visible
        assert found["branches"] and found["untouched"] and found["frozen"] < 3e-6
        assert found["one-sided"] < 3e-6
        assert found["nobody"] == "targets of all processes is 0; allowed: at least one."
        formats, still, twice = found["refused"]
        assert "torch.float16 on cpu, torch.float32 on cpu" in formats
        assert still == "trained weights is 0; allowed: at least one."
        assert "there twice" in twice


def test_one_process_has_the_plain_mean():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mean = ds.global_mean(losses)
    mean.backward()
    assert mean.item() == 3 and torch.equal(losses.grad, torch.full((3,), 1 / 3))
    with pytest.raises(BadInput, match="process group is None"):
        ds.Buckets(nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------ sharding


def test_bytes_are_those_of_the_paper():
    """Rajbhandari et al. (2020), figure 1: 7.5 billion parameters, 64 processes."""
    held = [sum(ds.zero_bytes(7_500_000_000, 64, stage).values()) / 1e9 for stage in range(4)]
    assert [round(x, 1) for x in held] == [120, 31.4, 16.6, 1.9]


@given(st.integers(0, 10**6), st.integers(1, 64))
@few
def test_one_process_holds_all_and_sends_nothing(n, workers):
    for stage in range(4):
        assert sum(ds.zero_bytes(n, 1, stage).values()) == 16 * n and ds.zero_traffic(n, 1, stage) == 0
        parts, alone = ds.zero_bytes(n, workers, stage), ds.zero_bytes(n, 1, stage)
        cut = [k for i, k in enumerate(("optimizer", "gradients", "weights")) if stage > i]
        for part, size in alone.items():
            assert parts[part] == (size / workers if part in cut else size)
    moved = [ds.zero_traffic(n, workers, stage) for stage in range(4)]
    assert moved[0] == moved[1] == moved[2] and moved[3] == pytest.approx(1.5 * moved[0])
    assert ds.zero_traffic(n, workers, 1, weight=2, gradient=4) == pytest.approx(1.5 * moved[0])


@several
def test_sharded_processes_make_the_steps_of_one_with_the_bytes_of_the_arithmetic(n):
    model = worker.layers()
    size = sum(p.numel() for p in model.parameters())
    more = 4 * (2 * n * len(model) + len(list(model.parameters())))  # padding of the layers; who used which weight
    for found in (r["zero"] for r in everyone(n)):
        for stage in range(4):
            run = found[str(stage)]
            assert run["difference"] < 1e-5
            formula = ds.zero_bytes(size, n, stage, weight=4, gradient=4, master=0, moments=8)
            for part, value in formula.items():
                assert -1 <= run["held"][part] - value <= more, (stage, part)
            traffic = ds.zero_traffic(size, n, stage, weight=4, gradient=4)
            assert stage == 0 or abs(run["sent"] - traffic) <= 4 * more


def little(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(dropout), nn.Sequential(nn.Linear(5, 2), nn.Dropout(dropout)))


def test_a_sharded_layer_knows_training_from_evaluation():
    x, ring = torch.randn(64, 3), ds.Ring()
    plain, model = little(0.5), ds.shard(little(0.5), ring)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), plain(x))
    torch.manual_seed(1)
    wanted = plain.train()(x)
    torch.manual_seed(1)
    got = model(x)
    assert torch.equal(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    own = torch.cat([p.grad for p in model.parameters()])
    torch.testing.assert_close(own, torch.cat([p.grad.flatten() for p in plain.parameters()]))
    with torch.no_grad():
        assert model(x).shape == (64, 2)


def test_sharding_leaves_the_model_as_it_is():
    model = little()
    before = copy.deepcopy(model.state_dict())
    ring = ds.Ring()
    sharded = ds.shard(model, ring)
    for p in sharded.parameters():
        p.data.zero_()
    ds.cut_layer(FFN(4, 4), 0, 2)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(list(sharded.parameters())) == 2


def test_stage_1_adds_up_backward_passes_and_stage_2_refuses_them():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    plain, model = little(), little()
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1)
    sharded = ds.ShardedAdamW(model, ds.Ring(), lr=0.1)
    for half in x.split(4):
        for m in (plain, model):
            m(half).square().sum().backward()
    adam.step()
    sharded.step()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert b.grad is None
    model = little()
    sharded = ds.ShardedAdamW(model, ds.Ring(), stage=2, lr=0.1)
    model(x).sum().backward()
    with pytest.raises(BadInput, match="there twice"):
        model(x).sum().backward()


def test_held_bytes_counts_memory_once_and_leaves_out_the_counter():
    model = nn.Linear(3, 2)
    adam = torch.optim.AdamW(model.parameters())
    assert ds.held_bytes(model, adam) == {"weights": 32, "gradients": 0, "optimizer": 0}
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    assert ds.held_bytes(model, adam) == {"weights": 32, "gradients": 32, "optimizer": 64}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)  # keeps nothing
    sgd.step()
    assert ds.held_bytes(model, sgd)["optimizer"] == 0


# ------------------------------------------------------------------------------------------ tensor parallelism


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["attention", "multi-query", "swiglu", "ffn"])
def test_shares_of_a_layer_add_up(kind, workers):
    torch.manual_seed(0)
    keys = workers if kind == "multi-query" else 8
    config = GPTConfig(vocab_size=2, d_model=16, n_layers=1, n_heads=8, n_kv_heads=keys)
    layer = {"swiglu": SwiGLU(16, 12), "ffn": FFN(16, 12)}.get(kind) or Attention(config)
    before = copy.deepcopy(layer.state_dict())
    x, dy = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    shares = [ds.cut_layer(layer, rank, workers) for rank in range(workers)]
    whole, summed = layer(x), sum(share(x) for share in shares)
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(y, x, dy)[0] for y in (summed, whole))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert sum(p.numel() for s in shares for p in s.parameters()) == sum(p.numel() for p in layer.parameters())


def test_a_share_keeps_what_is_frozen():
    layer = FFN(4, 4)
    layer.up.weight.requires_grad_(False)
    part = ds.cut_layer(layer, 1, 2)
    assert not part.up.weight.requires_grad and part.down.weight.requires_grad
    assert torch.equal(part.up.weight, layer.up.weight[2:]) and torch.equal(part.down.weight, layer.down.weight[:, 2:])


@several
def test_a_model_that_is_cut_has_its_part_of_the_gradients(n):
    for found in (r["tensor"] for r in everyone(n)):
        assert set(found) == {"swiglu", "grouped", "gelu"} and max(found.values()) < 1e-5


# ------------------------------------------------------------------------------------------ pipelines


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([(1.0, 2.0), (1.0, 1.0), (3.0, 0.5)]))
@few
def test_bubble_and_memory_are_the_formulas(p, m, times):
    forward, backward = times
    for kind in ("gpipe", "1f1b"):
        run = ds.simulate_pipeline(kind, p, m, forward=forward, backward=backward)
        assert run.seconds == pytest.approx((m + p - 1) * (forward + backward))
        assert run.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert run.held == [m if kind == "gpipe" else min(m, p - s) for s in range(p)]
        ends = {(what, s, i): end for s in range(p) for what, i, _, end in run.work[s]}
        assert len(ends) == 2 * p * m
        for s in range(p):
            clock = 0.0
            for what, i, start, end in run.work[s]:
                assert start >= clock  # one thing at a time
                clock = end
                if what == "forward" and s:
                    assert start >= ends["forward", s - 1, i]
                if what == "backward":
                    assert start >= ends["backward", s + 1, i] if s < p - 1 else start >= ends["forward", s, i]


def test_without_work_there_is_no_bubble():
    assert ds.simulate_pipeline("gpipe", 3, 2, forward=0, backward=0).bubble == 0


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_pipeline_in_one_process_has_the_gradients_of_the_model(kind, p):
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    plain, model = little(), little()
    loss = plain(x).square().sum()
    loss.backward()
    pieces = ds.stages_of(model, p)
    stages = [ds.Stage(s) for s in pieces[:-1]] + [ds.Stage(pieces[-1], lambda i, y: y.square().sum())]
    total = ds.run_pipeline(stages, x.split(3), kind=kind)  # 3, 3 and 1 rows
    assert total == pytest.approx(float(loss.detach()), rel=1e-6)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    assert [s.most for s in stages] == ds.simulate_pipeline(kind, p, 3).held
    assert all(not s.held for s in stages)


@given(st.integers(1, 12), st.integers(1, 12))
@few
def test_stages_are_runs_of_layers(n, p):
    model = nn.Sequential(*(nn.Identity() for _ in range(n)))
    if p > n:
        with pytest.raises(BadInput, match=f"p is {p}; allowed: a whole number from 1 to {n}"):
            ds.stages_of(model, p)
        return
    pieces = ds.stages_of(model, p)
    assert [id(x) for s in pieces for x in s] == [id(x) for x in model] and len(pieces) == p
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@several
def test_stages_in_processes_have_the_gradients_of_one(n):
    for rank, found in enumerate(r["pipe"] for r in everyone(n)):
        for kind, held in (("gpipe", 7), ("1f1b", n - rank)):
            assert found[kind]["difference"] < 1e-5 and found[kind]["held"] == held
            assert found[kind]["loss"] == (pytest.approx(found["loss"], rel=1e-5) if rank == n - 1 else 0)


# ------------------------------------------------------------------------------------------ what goes wrong


def test_the_others_end_when_a_process_is_gone():
    found = processes(2, "dies", check=False, timeout=120)
    assert found.returncode not in (0, None)
    assert "RuntimeError" in found.stderr and "all_reduce" in found.stderr  # the one that waited says where


FAILS = """
import datetime
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    if dist.get_rank() == 1:
        raise ValueError("shard 7 of the data is damaged")
    dist.barrier()
    print("went on")

main()
"""


def test_torchrun_ends_the_others_and_says_whose_error_it_was(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS, encoding="utf8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "fails.py"]
    found = warm.run(command, env=clean_env(), cwd=tmp_path, timeout=120)
    assert found.returncode == 1 and "went on" not in found.stdout
    cause = found.stderr[found.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", cause) and "shard 7 of the data is damaged" in cause


def frozen() -> nn.Sequential:
    model = little()
    model[0].bias.requires_grad_(False)
    return model


TIED = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
TIED[1].weight = TIED[0].weight
MIXED = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
RING = ds.Ring()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ds.simulate_ring([]), "parts is 'an empty list'"),
        (lambda: ds.simulate_tree([torch.ones(1), torch.ones(1, 1)]), "shapes of parts is [(1,), (1, 1)]"),
        (lambda: ds.all_reduce_seconds(-1, 2, **LINK), "size is -1"),
        (lambda: ds.all_reduce_seconds(1, 0, **LINK), "R is 0"),
        (lambda: ds.all_reduce_seconds(1, 2, latency=0, bandwidth=0), "bandwidth is 0"),
        (lambda: ds.all_reduce_seconds(1, 2, way="star", **LINK), "way is 'star'; allowed: ring, tree"),
        (lambda: ds.ring_from(1, **LINK), "R is 1"),
        (lambda: RING.all_reduce(torch.ones(2, 3).T), "x is 'a tensor that is not contiguous'"),
        (lambda: ds.global_mean(torch.zeros(0)), "targets of all processes is 0"),
        (lambda: ds.into_buckets([1], 0), "bucket_bytes is 0"),
        (lambda: ds.overlapped_seconds(6, 1, 1, 4, float), "per_bucket is 4; allowed: a divisor of n = 6"),
        (lambda: ds.zero_bytes(10, 2, 4), "stage is 4; allowed: 0, 1, 2, 3"),
        (lambda: ds.zero_bytes(10, 2, True), "stage is True"),
        (lambda: ds.zero_bytes(1.5, 2, 1), "N is 1.5"),
        (lambda: ds.zero_bytes(10, 2, 1, master=-4), "master is -4"),
        (lambda: ds.zero_traffic(10, 0, 1), "R is 0"),
        (lambda: ds.ShardedAdamW(nn.Linear(1, 1), RING), "model is 'Linear'; allowed: an nn.Sequential"),
        (lambda: ds.ShardedAdamW(little(), RING, stage=3), "stage is 3; allowed: 1, 2"),
        (lambda: ds.ShardedAdamW(TIED, RING), "shared weights"),
        (lambda: ds.shard(TIED, RING), "shared weights"),
        (lambda: ds.Sharded(TIED, RING), "shared weights"),
        (lambda: ds.ShardedAdamW(frozen(), RING), "weights is 'partly frozen'"),
        (lambda: ds.shard(frozen(), RING), "weights is 'partly frozen'"),
        (lambda: ds.FlatUnit(MIXED, RING), "torch.float16 on cpu, torch.float32 on cpu"),
        (lambda: ds.Sharded(MIXED, RING), "torch.float16 on cpu, torch.float32 on cpu"),
        (lambda: ds.Sharded(nn.ReLU(), RING), "trained weights is 0"),
        (lambda: ds.Sharded(nn.BatchNorm1d(2), RING), "layer is 'one with buffers'"),
        (lambda: ds.cut_layer(nn.Linear(2, 2), 0, 2), "layer is 'Linear'"),
        (lambda: ds.cut_layer(FFN(4, 6), 0, 4), "R is 4; allowed: a divisor of the inner channels, 6"),
        (lambda: ds.cut_layer(FFN(4, 6), 2, 2), "rank is 2"),
        (lambda: ds.pipeline_order("async", 2, 2, 0), "kind is 'async'; allowed: gpipe, 1f1b"),
        (lambda: ds.pipeline_order("gpipe", 2, 0, 0), "m is 0"),
        (lambda: ds.pipeline_order("gpipe", 2, 2, 2), "stage is 2"),
        (lambda: ds.simulate_pipeline("gpipe", 0, 2), "p is 0"),
        (lambda: ds.simulate_pipeline("gpipe", 2, 2, forward=-1), "forward is -1"),
        (lambda: ds.stages_of(nn.Linear(1, 1), 1), "model is 'Linear'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, says):
    with pytest.raises(BadInput) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("heads", "keys", "workers", "what"), [(6, 6, 4, "n_heads = 6"), (8, 2, 4, "n_kv_heads = 2")])
def test_heads_that_do_not_divide_are_refused(heads, keys, workers, what):
    config = GPTConfig(vocab_size=2, d_model=48, n_layers=1, n_heads=heads, n_kv_heads=keys)
    with pytest.raises(BadInput, match=f"R is {workers}; allowed: a divisor of {what}"):
        ds.cut_layer(Attention(config), 0, workers)


def test_matrices_that_are_not_plain_are_not_cut():
    layer = FFN(4, 4)
    layer.up = nn.Linear(4, 4)  # with a bias, which every worker would add
    with pytest.raises(BadInput, match="without bias"):
        ds.cut_layer(layer, 0, 2)


# ------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_quick_benchmark(tmp_path):
    out = tmp_path / "found.json"
    done = together(2, ROOT / "benchmarks" / "distributed.py", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf8"))
    seconds, ratios = found["seconds_per_step"].values(), found["ratios"].values()
    assert found["quick"] and found["processes"] == 2 and all(len(s) == 2 for s in seconds)
    assert all(low <= middle <= high for middle, low, high in ratios)
    one, bare, _, ours = (sum(s) / 2 for s in seconds)  # two rounds: the median is the mean
    efficiency, speed, _ = (middle for middle, _, _ in ratios)
    assert efficiency == pytest.approx(one / bare / 2) and speed == pytest.approx(bare / ours)
