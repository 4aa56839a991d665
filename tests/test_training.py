"""Training: accumulation, data parallel, resuming after a kill, checkpoints, early stop, bad input."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import random
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training_worker as worker
import warm
from conftest import ROOT, clean_env
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmcourse import launch
from llmcourse import pretraining as pre
from llmcourse import training as tr
from llmcourse.checkpoints import checkpoints, describe
from llmcourse.data import TokenData
from llmcourse.model import GPT, GPTConfig
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.training import NotFinite, Sequences, TrainConfig, causal_lm_loss, train

WORKER = Path(__file__).with_name("training_worker.py")
SHORT = {"steps": 12, "batch_size": 8, "seq_len": 16, "lr": 3e-3, "warmup": 2}


def stream(n=2000, V=32):
    return (torch.arange(n) * 5 + torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(0))) % V


def token_stream(train=None, val=None):
    train = stream() if train is None else train
    val = train[:500] if val is None else val
    return TokenData(train=train, val=val, test=val, calib=val, bytes={}, name="made", tokenizer="none", separator=0)


def run(job, *, processes=1, check=True):
    """The job's answer from a process of its own, or from several that share its batches."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [together | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)] if processes > 1 else [{}]
    found = warm.run([WORKER, json.dumps(job)], env=clean_env(PYTHONPATH=str(ROOT)), copies=ranks)
    if check:
        assert found.returncode == 0, found.stderr[-3000:]
        return json.loads(found.stdout.strip().splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------ examples and their order


@given(st.integers(1, 40), st.integers(1, 160))
@hypothesis_settings(max_examples=40, deadline=None)
def test_sequences_make_each_token_a_target_once(length, more):
    rows = Sequences(torch.arange(length + more), length)
    targets = torch.cat([rows[i][1:] for i in range(len(rows))])
    assert torch.equal(targets, torch.arange(1, len(targets) + 1)) and length + more - 1 - len(targets) < length
    assert all(len(rows[i]) == length + 1 for i in range(len(rows)))


@given(st.integers(1, 40), st.integers(0, 40))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_stream_that_is_too_short_is_refused(length, n):
    with pytest.raises(BadInput, match="data is 'a stream of"):
        Sequences(torch.arange(min(n, length)), length)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
@hypothesis_settings(max_examples=40, deadline=None)
def test_every_example_once_per_epoch_and_the_order_needs_no_state(n, batch, seed):
    steps = max(4, -(-2 * n // batch))
    seen = [i for step in range(steps) for i in tr.Order(n, batch, seed)[step]]
    assert sorted(seen[:n]) == list(range(n)) and sorted(seen[n : 2 * n]) == list(range(n))
    # a new object, asked for one step only, out of turn
    for step in (3, 0, steps - 1):
        assert tr.Order(n, batch, seed)[step] == seen[step * batch : (step + 1) * batch]


def test_epochs_and_seeds_differ():
    order = tr.Order(100, 100, 0)
    assert order[0] != order[1] and order[0] != tr.Order(100, 100, 1)[0]


@given(st.integers(1, 8), st.integers(0, 32), st.one_of(st.none(), st.integers(1, 9)))
@hypothesis_settings(max_examples=60, deadline=None)
def test_shares_are_a_partition(world, more, micro):
    indices = list(range(world + more))  # at least one for each
    shares = [tr.share(indices, r, world, micro) for r in range(world)]
    assert [i for share in shares for piece in share for i in piece] == indices
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert micro is None or all(len(piece) <= micro for share in shares for piece in share)


# ------------------------------------------------------------------------------------------ the step


def test_one_step_is_the_loop_that_one_would_write():
    """Same losses and weights as a bare loop with the same optimizer, clipping and schedule."""
    from llmcourse.optim import make_optimizer

    cfg = TrainConfig(**SHORT, optimizer="adamw")
    ours, bare, data = worker.model(), worker.model(), worker.Rows()
    result = train(ours, (data, None), cfg)
    optimizer, order = (
        make_optimizer(bare, "adamw", lr=cfg.lr, weight_decay=cfg.weight_decay),
        tr.Order(len(data), 8, 0),
    )
    losses = []
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr_at(step)
        batch = torch.stack([data[i] for i in order[step]])
        loss = F.cross_entropy(bare(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.parameters(), bare.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert result.losses[-1] < result.losses[0] and result.targets == 12 * 8 * 16


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("micro", [1, 3, 5])
def test_accumulation_equals_the_large_batch(micro, uneven):
    loss_fn = worker.uneven_loss if uneven else causal_lm_loss
    large, small = worker.model(), worker.model()
    a = train(large, (worker.Rows(), None), TrainConfig(**SHORT), loss_fn=loss_fn)
    b = train(small, (worker.Rows(), None), TrainConfig(**SHORT, micro_batch=micro), loss_fn=loss_fn)
    torch.testing.assert_close(torch.tensor(b.losses), torch.tensor(a.losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(b.grad_norms), torch.tensor(a.grad_norms), rtol=1e-4, atol=1e-6)
    assert a.targets == b.targets


def test_averaging_micro_batch_means_would_have_been_wrong():
    """The control of the test above: the published bug gives another gradient on the same uneven batch."""
    data, model = worker.Rows(), worker.model()
    batch = torch.stack([data[i] for i in range(8)])
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(model.parameters()))])
    right = gradient(worker.uneven_loss(model, batch).mean())
    wrong = gradient(torch.stack([worker.uneven_loss(model, batch[i : i + 1]).mean() for i in range(8)]).mean())
    assert float((wrong - right).norm() / right.norm()) > 0.05


def test_gradients_are_clipped_to_the_limit():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])))

    model = worker.model()
    result = train(
        model,
        (worker.Rows(), None),
        TrainConfig(**SHORT | {"clip": 0.25}, micro_batch=3),
        loss_fn=worker.uneven_loss,
        optimizer=Spy(model.parameters(), lr=1.0),
    )
    assert (
        seen == pytest.approx([min(norm, 0.25) for norm in result.grad_norms], rel=1e-4)
        and max(result.grad_norms) > 0.25
    )


def in_format(dtype):
    return Runtime(device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize(("recompute", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_options_change_cost_and_not_the_result(recompute, dtype):
    plain, other, formats = worker.model(0.1), worker.model(0.1), []
    other.blocks[0].ffn.up.register_forward_hook(lambda module, args, result: formats.append(result.dtype))
    a = train(plain, (worker.Rows(), None), TrainConfig(**SHORT))
    b = train(other, (worker.Rows(), None), TrainConfig(**SHORT, recompute=recompute), rt=in_format(dtype))
    tolerance = 1e-6 if recompute else 2e-2
    torch.testing.assert_close(torch.tensor(b.losses), torch.tensor(a.losses), rtol=tolerance, atol=tolerance)
    assert "forward" not in vars(other.blocks[0])  # nothing of the wrapping is left
    assert len(formats) == SHORT["steps"] * (2 if recompute else 1)  # computed once more on the way back
    assert set(formats) == {dtype} and all(p.dtype == torch.float32 for p in other.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not launch.has_compiler(torch.device("cpu")), reason="torch.compile finds no compiler")
def test_a_compiled_run_is_the_same_run():
    def table():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))

    plain, compiled = (
        train(table(), (worker.Rows(), worker.Rows()), TrainConfig(**SHORT, eval_every=6, compile=on))
        for on in (False, True)
    )
    torch.testing.assert_close(torch.tensor(compiled.losses), torch.tensor(plain.losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(compiled.val), torch.tensor(plain.val), rtol=1e-5, atol=1e-6)


def test_a_transformers_model_trains_too():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
    for recompute in (False, True):
        result = train(model, token_stream(), TrainConfig(**SHORT, recompute=recompute))
        assert result.losses[-1] < result.losses[0]


def test_the_model_is_handed_back_in_its_mode_and_trainable():
    model = worker.model(0.2).eval()
    train(model, token_stream(), TrainConfig(**SHORT | {"steps": 2}, eval_every=1))
    assert not model.training
    assert "forward" not in vars(model) and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_frozen_parameter_stays():
    model = worker.model()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    train(model, token_stream(), TrainConfig(**SHORT | {"steps": 3}))
    assert torch.equal(model.embed.weight, before)


def test_validation_uses_the_same_examples_and_draws_at_every_look_and_disturbs_nothing():
    def noisy(model, batch):
        losses = causal_lm_loss(model, batch)
        return losses * torch.rand(len(losses))

    a, b = worker.model(0.1), worker.model(0.1)
    with_looks = train(a, token_stream(), TrainConfig(**SHORT, eval_every=3), loss_fn=noisy)
    without = train(b, token_stream(), TrainConfig(**SHORT), loss_fn=noisy)
    assert with_looks.losses == without.losses and [s for s, _ in with_looks.val] == [3, 6, 9, 12]
    still = TrainConfig(**SHORT | {"lr": 1e-12}, eval_every=4)
    looks = [loss for _, loss in train(worker.model(0.1), token_stream(), still, loss_fn=noisy).val]
    assert max(looks) - min(looks) < 1e-6


def test_early_stop_goes_back_to_the_best_weights():
    """Training on noise makes the validation part worse: the run stops after `patience` looks and restores."""
    g = torch.Generator().manual_seed(0)
    data = token_stream(torch.randint(0, 32, (300,), generator=g), torch.randint(0, 32, (400,), generator=g))
    cfg = TrainConfig(steps=200, batch_size=8, seq_len=16, lr=1e-2, schedule="constant", eval_every=5, patience=3)
    model = worker.model()
    result = train(model, data, cfg)
    assert result.stopped == "patience" and result.steps < 200
    later = [loss for step, loss in result.val if step > result.best[0]]
    assert len(later) == 3 and min(later) > result.best[1]
    rows = Sequences(data.val, 16)
    batch = torch.stack([rows[i] for i in range(len(rows))])  # fewer than eval_sequences: all of them
    with torch.no_grad():
        assert abs(float(causal_lm_loss(model, batch).mean()) - result.best[1]) < 1e-5


# ------------------------------------------------------------------------------------------ checkpoints and resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, optimizer):
    """Losses, validation and weights to the last bit: with dropout, accumulation, a batch across two epochs."""
    cfg = TrainConfig(**SHORT | {"steps": 20}, micro_batch=3, eval_every=7, save_every=5, optimizer=optimizer, keep=9)
    data = (worker.Rows(61), worker.Rows())  # the eighth batch runs across the border of an epoch
    whole, part = worker.model(0.2), worker.model(0.2)
    expected = train(whole, data, cfg, out=tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for late in checkpoints(tmp_path / "b")[2:]:
        shutil.rmtree(late)
    found = train(part, data, cfg, out=tmp_path / "b")
    assert found.resumed == [10] and found.losses == expected.losses and found.val == expected.val
    assert worker.digest(part) == worker.digest(whole)
    again = train(worker.model(0.2), data, cfg, out=tmp_path / "b")  # finished: nothing is done
    assert again.losses == expected.losses


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_the_same(tmp_path):
    job = {"config": SHORT | {"steps": 40, "save_every": 3, "eval_every": 10}, "dropout": 0.1}
    expected = run(job)
    rng, out, said = random.Random(0), tmp_path / "out", tmp_path / "said"
    said.touch()
    slow = [WORKER, json.dumps(job | {"out": str(out), "pause": 0.03})]
    for _ in range(4):
        had, deadline = checkpoints(out)[-1:], time.time() + 120
        process = warm.start(slow, env=clean_env(PYTHONPATH=str(ROOT)), cwd=None, out=str(said), err=str(said))
        while time.time() < deadline and process.exitcode is None and checkpoints(out)[-1:] == had:
            time.sleep(0.01)  # until it has written something new
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    found = run(job | {"out": str(out), "pause": 0.03})
    resumed = found["resumed"]
    assert len(resumed) >= 1 and resumed[-1] > 3
    assert (
        found["losses"] == expected["losses"]
        and found["val"] == expected["val"]
        and found["digest"] == expected["digest"]
    )


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    cfg = TrainConfig(**SHORT, save_every=4, keep=5)
    whole = worker.model()
    train(whole, token_stream(), cfg, out=tmp_path)
    last = checkpoints(tmp_path)[-1]
    shutil.move(last, tmp_path / f".{last.name}.partial-xyz")  # as a kill during the writing leaves it
    model = worker.model()
    result = train(model, token_stream(), cfg, out=tmp_path)
    assert result.resumed == [8] and worker.digest(model) == worker.digest(whole)
    assert not list(tmp_path.glob(".step-*")) and not list(tmp_path.glob("*partial*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"missing": Path.unlink, "cut": cut, "empty": lambda path: path.write_bytes(b""), "one bit": flip}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints of steps 4, 8 and 12, and the digest of the weights at the end."""
    out, model = tmp_path_factory.mktemp("run"), worker.model()
    train(model, token_stream(), TrainConfig(**SHORT, save_every=4, keep=5), out=out)
    return out, worker.digest(model)


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "train.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_is_used(tmp_path, finished, name, damage):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    if (name, damage) == ("MANIFEST.json", "one bit"):  # in a digest, not in the words around it
        path = out / "step-00000012" / name
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    else:
        DAMAGE[damage](out / "step-00000012" / name)
    lines, model = [], worker.model()
    result = train(model, token_stream(), TrainConfig(**SHORT, save_every=4, keep=5), out=out, say=lines.append)
    assert result.resumed == [8] and worker.digest(model) == finished[1]
    (line,) = (line for line in lines if line.startswith("damaged"))
    assert "step-00000012" in line and "going back to step-00000008" in line
    assert [p.name for p in checkpoints(out)] == ["step-00000004", "step-00000008", "step-00000012"]
    assert (out / "step-00000012.damaged").is_dir()  # nothing is thrown away


def test_copies_files_and_other_names_are_no_checkpoints(tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "step-00000012")
    shutil.copytree(out / "step-00000004", out / "step-00000004 (copy)")
    (out / "step-00000099").write_text("a file")
    (out / "step-latest").mkdir()
    model = worker.model()
    result = train(model, token_stream(), TrainConfig(**SHORT, save_every=4, keep=5), out=out)
    assert result.resumed == [8] and worker.digest(model) == finished[1]
    assert (out / "step-00000004 (copy)").is_dir() and (out / "step-00000099").is_file()


def test_without_any_whole_checkpoint_nothing_begins_anew(tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for folder in checkpoints(out):
        (folder / "state.pt").unlink()
    with pytest.raises(BadInput, match=r"no checkpoint is whole: step-00000012 lacks state.pt"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT, save_every=4, keep=5), out=out)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(worker.model(), token_stream(), TrainConfig(**SHORT, save_every=2, keep=2), out=tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010", "step-00000012"]


def test_a_checkpoint_of_another_configuration_is_refused_field_by_field(tmp_path):
    train(worker.model(), token_stream(), TrainConfig(**SHORT), out=tmp_path)
    with pytest.raises(BadInput) as e:
        train(worker.model(), token_stream(), TrainConfig(**SHORT | {"lr": 1e-2, "steps": 13}), out=tmp_path)
    for words in ("lr 0.003 (now 0.01)", "steps 12 (now 13)", "empty folder"):
        assert words in str(e.value)
    assert "batch_size" not in str(e.value)
    with pytest.raises(BadInput, match=r"n_layers 2 .now 1"):
        train(
            GPT(GPTConfig(vocab_size=32, d_model=32, n_layers=1, n_heads=2, context=32)),
            token_stream(),
            TrainConfig(**SHORT),
            out=tmp_path,
        )
    with pytest.raises(BadInput, match="sha256 of the training data"):
        train(worker.model(), token_stream(stream().flip(0)), TrainConfig(**SHORT), out=tmp_path)
    with pytest.raises(BadInput, match="uneven_loss"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT), loss_fn=worker.uneven_loss, out=tmp_path)
    train(
        worker.model(), token_stream(), TrainConfig(**SHORT, save_every=3, keep=1), out=tmp_path
    )  # these two may differ


def scaled(model, batch, *, by=1.0):
    return causal_lm_loss(model, batch) * by


def inside(by):
    def loss(model, batch):
        return causal_lm_loss(model, batch) * by

    return loss


class Configured:
    def __init__(self, by):
        self.config = {"by": by}

    def __call__(self, model, batch):
        return causal_lm_loss(model, batch) * self.config["by"]


class Weighted(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(by))

    def forward(self, model, batch):
        return causal_lm_loss(model, batch) * self.by.detach()


MAKERS = {
    "keyword of a partial": lambda by: functools.partial(scaled, by=by),
    "tensor in a partial": lambda by: functools.partial(scaled, by=torch.tensor(by)),
    "partial of a partial": lambda by: functools.partial(functools.partial(scaled, by=by)),
    "variable around a function": inside,
    "variable around a lambda": lambda by: lambda model, batch: causal_lm_loss(model, batch) * by,
    "config": Configured,
    "weights of a module": Weighted,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_loss_with_another_setting_is_another_run(tmp_path, kind):
    make, model = MAKERS[kind], worker.model()
    train(model, token_stream(), TrainConfig(**SHORT), loss_fn=make(0.5), out=tmp_path)
    same = train(worker.model(), token_stream(), TrainConfig(**SHORT), loss_fn=make(0.5), out=tmp_path)
    assert same.steps == 12 and not same.resumed
    with pytest.raises(BadInput, match="another configuration: loss_fn"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT), loss_fn=make(0.25), out=tmp_path)


def test_the_description_of_a_loss_is_plain_data_without_addresses():
    made = {kind: describe(make(0.5)) for kind, make in MAKERS.items()}
    assert json.loads(json.dumps(made)) == made and " at 0x" not in json.dumps(made)
    assert made == {kind: describe(make(0.5)) for kind, make in MAKERS.items()}


def other_weights():
    model = worker.model()
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    return model


def other_row():
    rows = worker.Rows()
    rows.rows[41, 5] += 1  # no example that a sample of sixteen would look at
    return rows


CHANGES = {
    "a weight": ({"model": other_weights}, "weights before training"),
    "an example": ({"data": lambda: (other_row(), worker.Rows())}, "training data"),
    "a validation example": ({"data": lambda: (worker.Rows(), other_row())}, "validation data"),
    "the number format": ({"rt": lambda: in_format(torch.bfloat16)}, "number format"),
    "a setting of the optimizer": ({"betas": (0.9, 0.98)}, "settings of its groups"),
    "a rate": ({"rate": 2e-3}, "peak rates"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_its_contents_and_not_their_names(tmp_path, change):
    changed, words = CHANGES[change]

    def start(model=worker.model, data=lambda: (worker.Rows(), worker.Rows()), rt=None, rate=1e-3, betas=(0.9, 0.95)):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=betas)
        cfg, rt = TrainConfig(**SHORT, eval_every=6), rt and rt()
        return train(net, data(), cfg, rt=rt, optimizer=optimizer, out=tmp_path)

    assert start().losses == start().losses
    with pytest.raises(BadInput, match=words):
        start(**changed)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """The system refuses to write more than some bytes per file: one sentence, and the run goes on later."""
    script = f"""
import json, resource, signal, sys
sys.path.insert(0, {str(WORKER.parent)!r})
import training_worker as w
from llmcourse import launch
from llmcourse import pretraining as pre
from llmcourse import training as tr
from llmcourse.checkpoints import checkpoints, describe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real, calls = tr.save_checkpoint, []
def limited(*a, **k):
    calls.append(1)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    return real(*a, **k)
tr.save_checkpoint = limited
try:
    w.main({{"config": {SHORT | {"save_every": 4}!r}, "out": {str(tmp_path / "out")!r}}})
except OSError as e:
    print("stopped:", e)
"""
    found = warm.run(["-c", script], env=clean_env(PYTHONPATH=str(ROOT)))
    assert (
        found.stdout.startswith("stopped:")
        and "step 8 could not be written" in found.stdout
        and "step-00000004" in found.stdout
    ), found.stdout + found.stderr[-2000:]
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-00000004"]
    assert not [p for p in (tmp_path / "out").iterdir() if "partial" in p.name]
    expected = run({"config": SHORT})
    later = run({"config": SHORT | {"save_every": 4}, "out": str(tmp_path / "out")})
    assert later["resumed"] == [4] and later["digest"] == expected["digest"]


# ------------------------------------------------------------------------------------------ several processes


def same_as_one(one, two, tmp_path):
    """The answers of a process and of two that did its work together, and the weights that they have written."""
    assert (one["world_size"], two["world_size"]) == (1, 2)
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(two["val"]), torch.tensor(one["val"]), rtol=1e-5, atol=1e-5)
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    for name in a:  # Adam divides by the root of tiny squares: rounding shows in a few weights
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Data parallel over gloo: the same global batch, unequal shares and target counts."""
    job = {"uneven": True, "config": SHORT | {"micro_batch": 3, "batch_size": 7, "eval_every": 6}}
    one = run(job | {"weights": str(tmp_path / "one.pt")})
    two = run(job | {"weights": str(tmp_path / "two.pt")}, processes=2)
    same_as_one(one, two, tmp_path)


@pytest.mark.slow
def test_two_launchers_whose_worker_dies_end_as_one_process(tmp_path):
    """`torchrun` twice over loopback, as on two machines: a worker is killed, all start again, the job goes on."""
    config = SHORT | {"save_every": 4}
    one = run({"config": config, "weights": str(tmp_path / "one.pt")})
    job = {"config": config, "out": str(tmp_path / "out"), "weights": str(tmp_path / "two.pt"), "dies_at": 7}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    where += ["--local-addr", "127.0.0.1", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command = ["-m", "torch.distributed.run", *where, WORKER, json.dumps(job)]
    env = clean_env(PYTHONPATH=str(ROOT), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # else the new processes may wait
    found = warm.run(command, env=env, copies=[{}, {}], timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    two = json.loads(found.stdout.strip().splitlines()[-1])
    assert two["resumed"] == [4]  # the checkpoint before the step in which it died
    same_as_one(one, two, tmp_path)


@pytest.mark.slow
def test_sharded_weights_are_one_process(tmp_path):
    """FSDP2 over two CPU processes, half of every tensor each: losses, best weights, resuming as in one process."""
    config = SHORT | {"micro_batch": 3, "eval_every": 6, "patience": 5, "save_every": 6, "keep": 5}
    one = run({"config": config, "weights": str(tmp_path / "one.pt")})
    job = {"config": config, "out": str(tmp_path / "shards"), "shard": True, "weights": str(tmp_path / "two.pt")}
    whole = run(job, processes=2)
    torch.testing.assert_close(torch.tensor(whole["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-5)
    shutil.rmtree(checkpoints(tmp_path / "shards")[-1])
    part = run(job, processes=2)
    assert part["resumed"] == [6] and part["losses"] == whole["losses"] and part["digest"] == whole["digest"]


@pytest.mark.slow
def test_sharded_weights_need_equal_shares():
    found = run({"config": SHORT | {"batch_size": 7}, "shard": True}, processes=2, check=False)
    assert found.returncode and "batch_size is 7; allowed: a multiple of 2" in found.stderr


@pytest.mark.slow
def test_a_loss_may_leave_parts_of_the_model_out():
    job = {"config": SHORT, "partial": True}
    one, two = run(job), run(job, processes=2)
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_take_up_their_run_again(tmp_path):
    config = SHORT | {"save_every": 4, "keep": 9, "world_size": 2}
    whole = run({"config": config, "out": str(tmp_path / "a"), "dropout": 0.1}, processes=2)
    for late in checkpoints(tmp_path / "a")[1:]:
        shutil.rmtree(late)
    part = run({"config": config, "out": str(tmp_path / "a"), "dropout": 0.1}, processes=2)
    assert part["resumed"] == [4] and part["losses"] == whole["losses"] and part["digest"] == whole["digest"]


def test_the_number_of_processes_is_checked():
    """`accelerate launch --cpu --num_processes 2` starts one process without a word."""
    with pytest.raises(BadInput, match=r"world_size is 2, but 1 process takes part"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT, world_size=2))
    lines = []
    train(worker.model(), token_stream(), TrainConfig(**SHORT | {"steps": 1, "warmup": 0}), say=lines.append)
    assert any(line.startswith("1 process on cpu") for line in lines)


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_is_found_out():
    launch = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        str(WORKER),
        json.dumps({"config": SHORT | {"world_size": 2}}),
    ]
    found = subprocess.run(
        launch, env=clean_env(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=240
    )
    both = found.stdout + found.stderr
    assert (
        found.returncode and "world_size is 2, but 1 process takes part" in both and "torchrun" in both
    ) or '"world_size": 2' in both, both[-2000:]


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0}, "lr is 0"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"clip": 0}, "clip is 0"),
        ({"recompute": 1}, "recompute is 1"),
        ({"steps": True}, "steps is True"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"schedule": "zigzag"}, "constant, linear, cosine, wsd"),
        ({"patience": 2}, "eval_every"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"warmup": 100}, "warmup is 100"),
        ({"optimizer": "adamx"}, "optimizer is 'adamx'"),
        ({"schedule": "zigzag"}, "schedule is 'zigzag'"),
        ({"final_lr": 2}, "final_lr is 2"),
        ({"compile": "no"}, "compile is 'no'"),
    ],
)
def test_a_bad_configuration_is_refused_at_once(change, words):
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        TrainConfig(**SHORT | change)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: token_stream(torch.arange(16)), "a stream of 16 tokens"),
        (lambda: ([], None), "0 examples"),
        (lambda: 3, "int"),
        (lambda: (worker.Rows(), None), "eval_every is 3"),
        (lambda: (worker.Rows(), []), "eval_every is 3"),
        (lambda: token_stream(val=torch.arange(5)), "data.val is 'a stream of 5 tokens'"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(data, words):
    with pytest.raises(BadInput, match=words):
        train(
            worker.model(),
            data(),
            TrainConfig(**SHORT, eval_every=3),
            loss_fn=lambda model, batch: pytest.fail("a step was made"),
        )


def test_sequences_end():
    with pytest.raises(IndexError):
        Sequences(torch.arange(10), 3)[3]
    assert len(list(Sequences(torch.arange(10), 3))) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_format_that_cannot_work_is_refused(dtype):
    with pytest.raises(BadInput, match=f"dtype of the runtime is '{str(dtype).removeprefix('torch.')}'"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT), rt=in_format(dtype))


def test_compiling_is_refused_where_nothing_compiles(monkeypatch):
    monkeypatch.setattr(launch, "has_compiler", lambda device: False)
    with pytest.raises(BadInput, match="compile is True"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT, compile=True))


def test_an_unknown_option_of_the_optimizer_is_refused():
    with pytest.raises(BadInput, match="betaz"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT, optimizer_options={"betaz": (0, 1)}))


def test_a_loss_of_a_wrong_shape_is_refused():
    for wrong in (
        lambda model, batch: model(batch[:, :-1]),
        lambda model, batch: causal_lm_loss(model, batch).mean(),
        lambda model, batch: 1.0,
    ):
        with pytest.raises(BadInput, match="the result of loss_fn"):
            train(worker.model(), token_stream(), TrainConfig(**SHORT), loss_fn=wrong)
    with pytest.raises(BadInput, match="no target in a whole step"):
        train(
            worker.model(),
            token_stream(),
            TrainConfig(**SHORT),
            loss_fn=lambda model, batch: causal_lm_loss(model, batch)[:0],
        )


def test_a_piece_without_targets_counts_as_nothing():
    def few(model, batch):
        return causal_lm_loss(model, batch)[
            (batch[:, 1:] > 24).flatten() & (batch[:, :1] > 16).expand(-1, batch.shape[1] - 1).flatten()
        ]

    whole = train(worker.model(), (worker.Rows(), None), TrainConfig(**SHORT), loss_fn=few)
    cut = train(worker.model(), (worker.Rows(), None), TrainConfig(**SHORT, micro_batch=1), loss_fn=few)
    torch.testing.assert_close(torch.tensor(cut.losses), torch.tensor(whole.losses), rtol=1e-5, atol=1e-6)


def test_gradients_of_an_earlier_loop_are_not_part_of_the_run():
    clean, dirty = worker.model(), worker.model()
    for p in dirty.parameters():
        p.grad = torch.full_like(p, 100.0)
    a, b = (train(m, token_stream(), TrainConfig(**SHORT)) for m in (clean, dirty))
    assert a.grad_norms == b.grad_norms and all(p.grad is None for p in dirty.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_run_held_is_gone_without_a_search_for_garbage(monkeypatch, dtype):
    """The collector is off: the optimizer's moments and the wrapped model go with the last reference."""
    held, model, rt = [], worker.model(), Runtime(device=torch.device("cpu"), dtype=dtype)
    begin = tr.Report.begin

    def look(self, run):
        held.extend(weakref.ref(x) for x in (run.accelerator, run.optimizer, run.optimizer.optimizer, run.losses))
        begin(self, run)

    monkeypatch.setattr(tr.Report, "begin", look)
    train(model, token_stream(), TrainConfig(**SHORT), rt=rt)  # what is imported and cached comes with the first
    held.clear()
    gc.disable()
    try:
        train(model, token_stream(), TrainConfig(**SHORT), rt=rt)
        assert len(held) == 4 and [ref() for ref in held] == [None] * 4
    finally:
        gc.enable()


def test_after_a_loss_that_was_not_finite_the_model_trains_on():
    model = worker.model()
    with pytest.raises(NotFinite):
        train(model, token_stream(), TrainConfig(**SHORT), loss_fn=lambda m, b: causal_lm_loss(m, b) * math.nan)
    assert (
        train(model, token_stream(), TrainConfig(**SHORT)).losses
        == train(worker.model(), token_stream(), TrainConfig(**SHORT)).losses
    )


def test_an_optimizer_over_a_part_of_the_model_clips_that_part_only():
    model = worker.model()
    part = list(model.blocks[0].parameters())
    result = train(model, token_stream(), TrainConfig(**SHORT), optimizer=torch.optim.SGD(part, lr=1e-9))
    # the weights hardly move, so the last norm is that of the first model on the last batch
    first = torch.stack([Sequences(stream(), 16)[i] for i in tr.Order(len(Sequences(stream(), 16)), 8, 0)[11]])
    again = worker.model()
    causal_lm_loss(again, first).mean().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in again.blocks[0].parameters()])
    assert abs(result.grad_norms[11] / float(expected) - 1) < 1e-3


def test_a_loss_that_is_a_module_is_not_trained():
    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = worker.model()

        def forward(self, model, batch):
            return causal_lm_loss(model, batch) + 0 * causal_lm_loss(self.net, batch)

    teacher = Teacher()
    result = train(worker.model(), token_stream(), TrainConfig(**SHORT), loss_fn=teacher)
    assert result.grad_norms == pytest.approx(
        train(worker.model(), token_stream(), TrainConfig(**SHORT)).grad_norms, rel=1e-5
    )
    assert not any(k.startswith("_loss") for k in dict(tr._Losses(worker.model(), teacher).named_parameters()))


def test_the_caller_s_random_numbers_modes_and_rates_are_left_alone():
    import numpy as np

    model = worker.model(0.1)
    model.blocks[0].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    np.random.randn()
    expected = torch.rand(3), random.random(), np.random.randn()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    np.random.randn()
    train(model, token_stream(), TrainConfig(**SHORT, eval_every=5), optimizer=optimizer)
    found = torch.rand(3), random.random(), np.random.randn()
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
    assert not model.blocks[0].training and model.blocks[1].training and optimizer.param_groups[0]["lr"] == 0.005


def test_an_environment_variable_of_accelerate_does_not_change_the_gradient(monkeypatch):
    expected = train(worker.model(), token_stream(), TrainConfig(**SHORT)).grad_norms
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(worker.model(), token_stream(), TrainConfig(**SHORT)).grad_norms == expected


def test_a_validation_loss_that_is_not_finite_stops():
    with pytest.raises(NotFinite, match="validation loss is nan at step 2"):
        train(
            worker.model(),
            token_stream(),
            TrainConfig(**SHORT, eval_every=3, patience=2),
            loss_fn=lambda m, b: causal_lm_loss(m, b) * (1.0 if m.training else math.nan),
        )


def test_float16_gives_up_after_twenty_steps_that_were_skipped(monkeypatch):
    """A scaler that finds every gradient too large, as float16 does when the gradient is really NaN."""
    real = tr.accelerator

    def skipping(cfg, rt):
        accelerator = real(cfg, rt)
        accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
        return accelerator

    from accelerate import Accelerator

    monkeypatch.setattr(tr, "accelerator", skipping)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    with pytest.raises(NotFinite, match="twentieth time in a row"):
        train(worker.model(), token_stream(), TrainConfig(**SHORT | {"steps": 40}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, bad):
    model, calls, before = worker.model(), [], {}

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 7:
            before.update({k: v.clone() for k, v in model.state_dict().items()})
            return causal_lm_loss(model, batch) * bad
        return causal_lm_loss(model, batch)

    with pytest.raises(NotFinite) as e:
        train(model, token_stream(), TrainConfig(**SHORT, save_every=2), loss_fn=loss_fn, out=tmp_path)
    order = tr.Order(len(Sequences(stream(), 16)), 8, 0)
    assert e.value.step == 6 and e.value.examples == order[6] and e.value.checkpoint == checkpoints(tmp_path)[-1]
    assert "step 6" in str(e.value) and str(order[6][0]) in str(e.value) and "step-00000006" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too():
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(NotFinite, match=r"norm of the gradient is (nan|inf) at step 0"):
        train(
            Root(),
            ([torch.ones(1)] * 8, None),
            TrainConfig(**SHORT),
            loss_fn=lambda m, b: m.w.abs().sum().sqrt().reshape(1),
            optimizer=None,
        )


# ------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_training_on_a_gpu(dtype):
    here = train(worker.model(), token_stream(), TrainConfig(**SHORT))
    there = train(worker.model(), token_stream(), TrainConfig(**SHORT), rt=Runtime.auto("cuda", dtype))
    tolerance = 1e-3 if dtype == "float32" else 5e-2
    torch.testing.assert_close(torch.tensor(there.losses), torch.tensor(here.losses), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ the whole way


RECIPE = """
data = [{corpus!r}]
license = "none"
limits = "Made of syllables."
[test]
name = "tiny"
vocab_size = 300
model = {{ d_model = 16, n_layers = 1, n_heads = 2, context = 32 }}
train = {{ steps = 8, batch_size = 4, seq_len = 32, lr = 0.01, eval_every = 4, eval_sequences = 4, save_every = 4 }}
"""


def test_a_model_from_nothing_with_its_card(tmp_path, corpus, small_settings):
    import hashlib

    from llmcourse.data import load_model

    (tmp_path / "r.toml").write_text(RECIPE.format(corpus=str(corpus)), encoding="utf8")
    recipe = pre.load_pretrain_recipe(tmp_path / "r.toml", "test")
    lines = []
    folder = pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=lines.append, command="the command")
    model, tokenizer, _ = load_model(folder, settings=small_settings)
    ours = GPT.from_pretrained(folder, settings=small_settings)
    ids = tokenizer("ka lo mi", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids), rtol=1e-5, atol=1e-6)
    card = (folder / "README.md").read_text(encoding="utf8")
    for words in (
        "tokens seen",
        "seed 0",
        "`the command`",
        "Kneser–Ney 5-gram",
        "loss.svg",
        "Limits",
        "sha256",
        "bits per byte",
    ):
        assert words in card, words
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf8"))
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "loss.svg", "history.json"} <= set(
        manifest["files"]
    )
    history = json.loads((folder / "history.json").read_text(encoding="utf8"))
    assert len(history["losses"]) == 8 and [s for s, _ in history["val"]] == [4, 8]
    again = pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=lines.append)
    assert again == folder and "is there" in lines[-1]
    with pytest.raises(BadInput, match="a folder of this recipe at scale test"):
        pre.pretrain(dataclasses.replace(recipe, vocab_size=299), tmp_path / "out", settings=small_settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="out is"):
        pre.pretrain(recipe, tmp_path / "full", settings=small_settings)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


CHANGED = {  # what is replaced in the recipe, by what, and words of the refusal
    "unknown key": ("vocab_size = 300", "vocab = 300", "key in r.toml is 'vocab'"),
    "unknown key of the model": ("d_model = 16", "d_modl = 16", "d_modl"),
    "negative rate": ("lr = 0.01", "lr = -1.0", "lr is -1.0"),
    "longer than the context": ("seq_len = 32", "seq_len = 64", "seq_len is 64"),
    "another scale": ("[test]", "[cpu]", "scale is 'test'"),
    "unknown scale": ("[test]", "[huge]", "part of r.toml is 'huge'"),
    "no TOML": ("license", "= license", "TOML"),
    "a missing key of the training": ("steps = 8, ", "", "steps (missing)"),
    "an unknown table": ("train = {", "extra = {", "key in r.toml is 'extra'"),
    "a missing key of the model": ("d_model = 16, ", "", "d_model (missing)"),
    "data that are no names": ("['sotu']", "[1]", "data.0 in r.toml is 1"),
    "the same data twice": ("['sotu']", "['sotu', 'sotu']", "each data set once"),
    "a vocabulary smaller than the bytes": ("vocab_size = 300", "vocab_size = 200", "vocab_size is 200"),
    "a vocabulary in words": ("vocab_size = 300", "vocab_size = '300'", "vocab_size in r.toml is '300'"),
    "a rate in words": ("lr = 0.01", "lr = '0.01'", "lr in [test.train] is '0.01'"),
    "a rate that is none": ("lr = 0.01", "lr = nan", "lr in [test.train] is nan"),
    "a switch in words": ("lr = 0.01", "lr = 0.01, compile = 'no'", "compile in [test.train] is 'no'"),
    "half a layer": ("n_layers = 1", "n_layers = 1.5", "n_layers in [test.model] is 1.5"),
    "a name that is markup": ('name = "', 'name = "<script>', "name is '<script>"),
    "a name that steers": ('name = "', 'name = "\\u001b[31m', "control characters"),
    "unknown format": ('license = "none"', 'license = "none"\ndtype = "int8"', "dtype is 'int8'"),
    "no Llama: ffn": ("n_layers = 1", "n_layers = 1, ffn = 'gelu'", "ffn is 'gelu'"),
    "no Llama: norm": ("n_layers = 1", "n_layers = 1, norm = 'layer'", "norm is 'layer'"),
    "no Llama: place of the norm": ("n_layers = 1", "n_layers = 1, norm_position = 'post'", "norm_position is 'post'"),
    "no Llama: learned positions": ("n_layers = 1", "n_layers = 1, position = 'learned'", "position is 'learned'"),
    "no Llama: sees both sides": ("n_layers = 1", "n_layers = 1, causal = false", "causal is False"),
    "no Llama: experts": ("n_layers = 1", "n_layers = 1, n_experts = 4", "n_experts is 4"),
    "an option the optimizer lacks": ("lr = 0.01", "lr = 0.01, optimizer_options = {betaz = 1}", "betaz"),
    "a bad option of the optimizer": ("lr = 0.01", "lr = 0.01, optimizer_options = {eps = -1.0}", "eps is -1.0"),
    "two processes": ("lr = 0.01", "lr = 0.01, world_size = 2", "world_size is 2"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_bad_pretraining_recipe_is_refused(tmp_path, change):
    old, new, words = CHANGED[change]
    text = RECIPE.format(corpus="sotu")
    assert old in text
    (tmp_path / "r.toml").write_text(text.replace(old, new, 1), encoding="utf8")
    with pytest.raises(BadInput) as e:
        pre.load_pretrain_recipe(tmp_path / "r.toml", "test")
    assert words in str(e.value)


def jsonl(folder, parts):
    """A data set whose documents say in which part they are wanted; asserted by the caller."""
    from llmcourse.data import load_records

    folder.mkdir()
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in parts), encoding="utf8")
    return path, [r["split"] for r in load_records(str(path))]


@pytest.mark.parametrize("what", ["one document", "no test part", "float16 on a CPU", "no compiler"])
def test_what_cannot_end_well_is_refused_before_anything_is_written(tmp_path, small_settings, monkeypatch, what):
    """Conditions of the last step are checked before the costly ones, and a second try says the same."""
    count = {"one document": 1, "no test part": 3}.get(what, 30)
    path, splits = jsonl(tmp_path / "data", [f"document {i} " + "ka lo mi " * 40 for i in range(count)])
    assert ("test" in splits) == (count == 30)
    text = RECIPE.format(corpus=str(path))
    if what == "float16 on a CPU":
        text = text.replace('license = "none"', 'license = "none"\ndtype = "float16"')
    if what == "no compiler":
        monkeypatch.setattr(launch, "has_compiler", lambda device: False)
        text = text.replace("lr = 0.01", "lr = 0.01, compile = true")
    (tmp_path / "r.toml").write_text(text, encoding="utf8")
    words = {"float16 on a CPU": "dtype of the runtime is 'float16'", "no compiler": "compile is True"}
    for _ in range(2):
        with pytest.raises(BadInput, match=words.get(what, "data is")):
            recipe = pre.load_pretrain_recipe(tmp_path / "r.toml", "test")
            pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=pytest.fail)
    assert not (tmp_path / "out").exists()


def test_texts_without_enough_pairs_are_refused_before_the_tokenizer_is_kept(tmp_path, small_settings):
    path, _ = jsonl(tmp_path / "data", [f"ab {i} " * 60 for i in range(60)])
    text = RECIPE.format(corpus=str(path)).replace("vocab_size = 300", "vocab_size = 5000")
    (tmp_path / "r.toml").write_text(text, encoding="utf8")
    recipe = pre.load_pretrain_recipe(tmp_path / "r.toml", "test")
    with pytest.raises(BadInput, match="vocab_size is 5000; allowed: at most"):
        pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=lambda line: None)
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_other_texts_under_the_same_name_are_another_run(tmp_path, small_settings):
    rng = random.Random(0)
    words = ["".join(rng.choices(["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi"], k=3)) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=60)) for _ in range(60)]
    path, _ = jsonl(tmp_path / "data", documents)
    (tmp_path / "r.toml").write_text(RECIPE.format(corpus=str(path)), encoding="utf8")
    recipe = pre.load_pretrain_recipe(tmp_path / "r.toml", "test")
    pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=lambda line: None)
    path.write_text("".join(json.dumps({"text": d.replace("ka", "ko")}) + "\n" for d in documents), encoding="utf8")
    with pytest.raises(BadInput, match="of these texts"):
        pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=lambda line: None)


def test_two_pretrain_in_one_folder(tmp_path, corpus, small_settings):
    """The second one is refused while the first is at work, and touches nothing."""
    (tmp_path / "r.toml").write_text(RECIPE.format(corpus=str(corpus)), encoding="utf8")
    recipe, refused = pre.load_pretrain_recipe(tmp_path / "r.toml", "test"), []

    def meanwhile(line):
        if line.startswith("step"):
            with pytest.raises(BadInput, match="where another pretrain is at work"):
                pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=pytest.fail)
            refused.append(line)

    pre.pretrain(recipe, tmp_path / "out", settings=small_settings, say=meanwhile)
    assert refused


def test_the_recipe_of_the_course_is_valid_at_every_scale():
    sizes = {}
    for scale in ("test", "cpu", "gpu"):
        recipe = pre.load_pretrain_recipe(ROOT / "recipes" / "pretrain" / "course.toml", scale)
        sizes[recipe.name] = sum(recipe.model.parameters().values())
    assert 2.7e6 < sizes["course-3m"] < 3.3e6 and 27e6 < sizes["course-30m"] < 33e6


def test_a_result_is_plain_data():
    result = train(worker.model(), token_stream(), TrainConfig(**SHORT | {"steps": 3}, eval_every=1))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["losses"] == result.losses


@pytest.mark.slow
def test_the_curve_is_redrawn_in_a_notebook():
    import nbformat
    from nbclient import NotebookClient

    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(WORKER.parent)!r}]
import training_worker as worker
from llmcourse import training as tr
tr.Curve.every = 0.0
tr.train(worker.model(), (worker.Rows(), None), tr.TrainConfig(**{SHORT!r}), live=True);
"""
    seen = []

    class Listener(NotebookClient):
        def process_message(self, msg, cell, index):
            seen.append((msg["msg_type"], "image/png" in msg["content"].get("data", {})))
            return super().process_message(msg, cell, index)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    Listener(notebook, timeout=200, kernel_name="python3").execute()
    assert seen.count(("display_data", True)) == 1 and seen.count(("update_display_data", True)) >= 5
