"""Several processes that compute what one does, for tests: the first one prints one line of JSON.

python distributed_worker.py JOB …
"""

from __future__ import annotations

import copy
import datetime
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from llmcourse import distributed as ds
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput

SHAPE = {"vocab_size": 13, "d_model": 24, "n_layers": 2, "n_heads": 12, "d_ff": 36, "context": 8}
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}  # far above the rounding of a gradient


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | more))


def layers() -> nn.Sequential:
    model = gpt(position="none", tied=False, ffn="gelu", norm="layer")
    return nn.Sequential(model.embed, *model.blocks, model.norm, model.head)


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven texts; the targets that count differ from one to the next."""
    ids = torch.randint(13, (7, 9), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[torch.arange(8) > torch.arange(7)[:, None]] = -100
    return ids[:, :-1], targets


def losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100)
    return each[y.flatten() >= 0]


def worst(a, b) -> float:
    """The largest difference, in parts of the largest number of each tensor."""
    pairs = [(x.detach(), y.detach()) for x, y in zip(a, b, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in pairs)


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def alone(model: nn.Module, step: int = 0) -> nn.Module:
    model = copy.deepcopy(model)
    losses(model, *batch(step)).mean().backward()
    return model


def own_rows(x: torch.Tensor) -> torch.Tensor:
    return x.tensor_split(dist.get_world_size())[dist.get_rank()]


def ring() -> dict:
    circle, found = ds.Ring(), {"sent": {}, "difference": 0.0}
    for shape in ((), (0, 3), (1,), (2,), (5,), (3, 4), (1000,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(circle.rank))
        expected, before = x.clone(), circle.sent
        dist.all_reduce(expected)
        circle.all_reduce(x)
        found["sent"][x.numel()] = circle.sent - before
        if x.numel():
            found["difference"] = max(found["difference"], worst([x], [expected]))
    found["formats"] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64):
        every = [
            (torch.randn(11, generator=torch.Generator().manual_seed(r)) * 9).to(dtype) for r in range(circle.size)
        ]
        got, wanted = circle.all_reduce(every[circle.rank].clone()), torch.stack(every).double().sum(0)
        assert got.dtype == dtype
        found["formats"][str(dtype)] = float((got.double() - wanted).abs().max())
    found["largest"] = float(torch.stack(every).abs().sum(0).max())
    own = torch.full((circle.size, 3), float(circle.rank + 1))
    part = circle.reduce_scatter(list(own))
    found["scattered"] = part.tolist()
    all_parts = torch.zeros(circle.size, 2)
    all_parts[circle.rank] = circle.rank
    circle.all_gather(list(all_parts))
    found["gathered"] = all_parts[:, 0].tolist()
    return found


def data() -> dict:
    one, found = alone(gpt()), {}
    for name, size in (("one bucket", 2**20), ("many", 256)):
        model = gpt()
        buckets = ds.Buckets(model, bucket_bytes=size)
        x, y = (own_rows(t) for t in batch())
        ds.global_mean(losses(model, x, y)).backward()
        early = len(buckets.sent)
        buckets.finish()
        found[name] = {"n": len(buckets.buckets), "early": early, "difference": worst(grads(model), grads(one))}
    model = gpt()
    buckets = ds.Buckets(model)
    losses(model, x, y).mean().backward()
    buckets.finish()
    means = [g / dist.get_world_size() for g in grads(model)]
    found["mean of means"] = worst(means, grads(one))
    return found | unused() | frozen() | one_sided() | {"refused": refused()}


def frozen() -> dict:
    """A weight that is not trained is left out, and keeps None as its gradient."""
    model, one = gpt(), gpt()
    for m in (model, one):
        m.norm.weight.requires_grad_(False)
    losses(one, *batch()).mean().backward()
    buckets = ds.Buckets(model, bucket_bytes=1000)
    x, y = (own_rows(t) for t in batch())
    ds.global_mean(losses(model, x, y)).backward()
    buckets.finish()
    return {"frozen": worst(grads(model), grads(one)), "untouched": model.norm.weight.grad is None}


def one_sided() -> dict:
    """Only the first process has targets."""
    model, one = gpt(), alone(gpt())
    buckets, (x, y) = ds.Buckets(model), batch()
    if dist.get_rank():
        y = torch.full_like(y, -100)
    ds.global_mean(losses(model, x, y)).backward()
    buckets.finish()
    nobody = None
    try:
        ds.global_mean(torch.zeros(0))
    except BadInput as e:
        nobody = str(e)
    return {"one-sided": worst(grads(model), grads(one)), "nobody": nobody}


def refused() -> list[str]:
    """What `Buckets` says to several formats, to a frozen model, and to two backward passes."""
    mixed, still, twice = gpt(), gpt().requires_grad_(False), gpt()
    mixed.norm.half()
    said = []
    for model in (mixed, still):
        try:
            ds.Buckets(model)
        except BadInput as e:
            said.append(str(e))
    buckets = ds.Buckets(twice)
    losses(twice, *batch()).sum().backward()
    try:
        losses(twice, *batch()).sum().backward()
    except BadInput as e:
        said.append(str(e))
    buckets.finish()
    buckets.remove()
    losses(twice, *batch()).sum().backward()  # no hook any more
    return said


def unused() -> dict:
    """Each process uses another branch, one branch nobody; the last one comes in another order."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    buckets = ds.Buckets(model, bucket_bytes=1)
    x = torch.ones(1, 3)
    mine = model[dist.get_rank() % 2](x) + model[2](x)
    mine.sum().backward()
    buckets.finish()
    n = dist.get_world_size()
    expected = [(n + 1) // 2, n // 2, n]
    good = all(torch.equal(model[i].weight.grad, torch.full((3, 3), float(k))) for i, k in enumerate(expected))
    return {"branches": good and model[3].weight.grad is None}


def zero() -> dict:
    one = layers()
    adam = torch.optim.AdamW(one.parameters(), **ADAM)
    for step in range(3):
        adam.zero_grad()
        losses(one, *batch(step)).mean().backward()
        adam.step()
    found = {}
    for stage in (0, 1, 2, 3):
        model, circle = layers(), ds.Ring()
        if stage == 3:
            model = ds.shard(model, circle)
        buckets = ds.Buckets(model) if stage == 0 else None
        opt = (
            ds.ShardedAdamW(model, circle, stage=stage, **ADAM)
            if stage in (1, 2)
            else torch.optim.AdamW(model.parameters(), **ADAM)
        )
        for step in range(3):
            x, y = (own_rows(t) for t in batch(step))
            opt.zero_grad() if stage in (0, 3) else None
            before = circle.sent
            ds.global_mean(losses(model, x, y)).backward()
            if stage == 0:
                buckets.finish()
            held = ds.held_bytes(model, opt)
            opt.step()
        if stage == 3:
            wanted = ds.shard(one, circle).parameters()
        else:
            wanted = one.parameters()
        found[stage] = {"difference": worst(list(model.parameters()), list(wanted)), "held": held,
                        "sent": circle.sent - before}  # fmt: skip
    return found


def tensor() -> dict:
    found, circle = {}, ds.Ring()
    for name, more in (("swiglu", {}), ("grouped", {"n_kv_heads": circle.size}), ("gelu", {"ffn": "gelu"})):
        whole_model = alone(gpt(**more))
        model = ds.tensor_parallel(gpt(**more), circle)
        losses(model, *batch()).mean().backward()
        mine = {n.replace(".share", ""): p for n, p in model.named_parameters()}
        wanted = {}
        for n, p in whole_model.named_parameters():
            axis = 1 if n.endswith(("o.weight", "down.weight")) else 0
            cut = mine[n].shape != p.shape
            wanted[n] = p.grad.chunk(circle.size, axis)[circle.rank] if cut else p.grad
        found[name] = worst([mine[n].grad for n in wanted], list(wanted.values()))
    return found


def pipe() -> dict:
    found, rank, p = {}, dist.get_rank(), dist.get_world_size()
    one, whole_model = alone(layers()), layers()
    x, y = batch()
    n = int((y >= 0).sum())
    for kind in ("gpipe", "1f1b"):
        module = copy.deepcopy(ds.stages_of(whole_model, p)[rank])
        targets = y.split(1)

        def loss(i, out, targets=targets):
            return F.cross_entropy(out.flatten(0, 1), targets[i].flatten(), reduction="sum", ignore_index=-100) / n

        stage = ds.Stage(module, loss if rank == p - 1 else None)
        total = ds.run_stage(stage, x.split(1), (1, 8, 24), kind=kind)
        wanted = ds.stages_of(one, p)[rank]
        found[kind] = {"difference": worst(grads(module), grads(wanted)), "held": stage.most, "loss": total}
    found["loss"] = float(losses(whole_model, x, y).mean())
    return found


def dies() -> dict:
    """The last process is gone before the collective that the others wait in."""
    import os

    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(3)
    ds.Ring().all_reduce(torch.ones(4))
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    mine = {job: globals()[job]() for job in sys.argv[1:]}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.destroy_process_group()
