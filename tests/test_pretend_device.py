"""The device that is not there says no where CUDA says no, and computes what the CPU computes."""

from __future__ import annotations

import json

import pytest
import warm
from conftest import ROOT, clean_env

# the device stays for the rest of a process, so all of this runs in one of its own
CASES = r"""
import copy, io, json, sys, threading
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

there = torch.device("pretend", 0)
away = lambda *shape: torch.ones(shape, device=there)
here = lambda *shape: torch.ones(shape)
at = torch.tensor([1, 0])
cpu_dice = lambda: torch.Generator().manual_seed(0)
dice = lambda: torch.Generator(there).manual_seed(0)
def put(x, i, value):
    x[i] = value
    return x

raises = {
    "sum of two devices": lambda: away(3) + here(3),
    "a number of the device in a tensor of the CPU": lambda: here(3) + away(),
    "in place, into a number of the CPU": lambda: here().add_(away()),
    "matrix product": lambda: away(2, 2) @ here(2, 2),
    "embedding": lambda: F.embedding(at, away(2, 2)),
    "the table on the CPU": lambda: F.embedding(at.to(there), here(2, 2)),
    "linear": lambda: nn.Linear(2, 2)(away(1, 2)),
    "numbers side by side": lambda: torch.stack([here(), away()]),
    "cat": lambda: torch.cat([here(1), away(1)]),
    "gather": lambda: away(2, 2).gather(1, at[:, None]),
    "mask": lambda: away(3).masked_fill(here(3).bool(), 0),
    "an index of the device": lambda: here(2)[at.to(there)],
    "values of the CPU at an index": lambda: put(away(2), at, here(2)),
    "numpy": lambda: away(3).numpy(),
    "a generator of the CPU": lambda: torch.rand(3, device=there, generator=cpu_dice()),
    "draws of the CPU": lambda: torch.multinomial(away(3), 1, generator=cpu_dice()),
    "data of the CPU": lambda: setattr(nn.Linear(2, 2).to(there).weight, "data", here(2, 2)),
}
works = {
    "a number of the CPU": lambda: away(3) + here(),
    "an index of the CPU": lambda: away(2)[at],
    "a mask of the CPU": lambda: away(2)[here(2).bool()],
    "a list of places": lambda: put(away(3), [0], 2.0)[[0, 2], None],
    "the identity": lambda: torch.eye(2, device=there) @ away(2, 2),
    "copied into a part": lambda: put(away(2, 2), 0, here(2)),
    "copied to the CPU": lambda: here(3).copy_(away(3)),
    "a list": lambda: torch.tensor([1, 2], device=there).tolist() + torch.as_tensor([1], device=there).tolist(),
    "like another": lambda: away(3).new_tensor([1]) + torch.zeros_like(away(1)) + away(3).new_zeros(1),
    "printed": lambda: f"{away().sum():.1f} {away(2)} {away(2).cpu().numpy()}",
    "inference": lambda: torch.inference_mode()(lambda x: x[None] + x.to(there))(away(2)),
    "moved in inference mode": lambda: torch.inference_mode()(lambda x: x.to(there, torch.float64) * 2)(away(2)),
    "attention": lambda: F.scaled_dot_product_attention(away(1, 1, 2, 2), away(1, 1, 2, 2), away(1, 1, 2, 2)),
    "in a thread": lambda: in_a_thread(),
    "draws": lambda: torch.rand(3, device=there, generator=dice()) + torch.randperm(3, device=there),
    "autocast": lambda: [torch.autocast("pretend", dtype=torch.bfloat16).__enter__().__exit__(None, None, None)],
}

def in_a_thread():
    found = []
    one = threading.Thread(target=lambda: found.append(away(2) + 1))
    one.start()
    one.join()
    assert found[0].device == there

def net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 5, bias=False))
    m[3].weight = m[0].weight
    return m

def trained(device):
    m = net()
    tied, optimizer = m[0].weight, torch.optim.AdamW(m.parameters(), lr=0.1)
    m.to(device)  # after the optimizer was made
    for _ in range(3):
        torch.manual_seed(1)
        logits = checkpoint(m, torch.tensor([1, 2, 4], device=device), use_reentrant=False)
        F.cross_entropy(logits, torch.tensor([2, 4, 0], device=device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tied is m[0].weight and m[0].weight is m[3].weight and tied.device == device
    return m

def attended(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 4, 3).to(device) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool, device=device).tril()
    sums = [torch.zeros(4, 4, device=device).masked_fill(~mask, -torch.inf)]
    ways = [F.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (None, mask, *sums)]
    return torch.stack([*ways, F.scaled_dot_product_attention(q, k, v, is_causal=True)]).cpu()

def copies():
    m = trained(there)
    m(torch.tensor([1], device=there)).sum().backward()
    other = copy.deepcopy(m)
    assert other[0].weight is other[3].weight is not m[0].weight and isinstance(other[0].weight, nn.Parameter)
    assert other[0].weight.device == there and torch.equal(other[0].weight.grad, m[0].weight.grad)
    with torch.no_grad():
        other[0].weight.zero_()
    assert m[0].weight.abs().sum() > 0
    tied = m[0].weight
    m.bfloat16().cpu()
    assert tied is m[0].weight is m[3].weight and (tied.device.type, tied.dtype) == ("cpu", torch.bfloat16)

def saved():
    from safetensors.torch import load, save
    m, file = trained(there), io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert all(torch.equal(back[k], v) and back[k].device == there for k, v in m.state_dict().items())
    apart = {k: v.clone() for k, v in m.state_dict().items()}
    assert all(torch.equal(v, apart[k].cpu()) for k, v in load(save(apart)).items())

def exchanged():
    m = net().to(there)
    m[1].weight.data = torch.zeros(2, 4, device=there)
    assert m[1].weight.shape == (2, 4) and isinstance(m[1].weight, nn.Parameter) and m[1].weight.requires_grad

def loaded():
    with torch.device("meta"):
        assert torch.tensor([1.0]).device.type == "meta"

def same_numbers():
    for x, y in zip(trained(torch.device("cpu")).parameters(), trained(there).parameters()):
        torch.testing.assert_close(x, y.cpu())
    torch.testing.assert_close(attended(torch.device("cpu")), attended(there))
    g = lambda d: torch.Generator(d).manual_seed(3)
    assert torch.equal(torch.rand(4, generator=g("cpu")), torch.rand(4, generator=g(there), device=there).cpu())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        a = torch.rand(2, device=there).cpu()
        torch.manual_seed(5)
        assert torch.equal(a, torch.rand(2))

def found_by_the_course():
    from llmcourse.runtime import Runtime, device_of
    rt = Runtime.auto()
    assert rt.device == there == device_of(rt.move(net())) and rt.dtype == torch.float32
    assert Runtime.auto("cpu", "bfloat16").device.type == "cpu"

done = {}
def tried(name, case, want):
    try:
        case()
        done[name] = want is None
    except Exception as e:
        done[name] = want is not None and isinstance(e, want) or f"{type(e).__name__}: {e}"
for name, case in raises.items():
    tried(name, case, (RuntimeError, TypeError))
for name, case in works.items():
    tried(name, case, None)
for case in (copies, saved, exchanged, loaded, same_numbers, found_by_the_course):
    tried(case.__name__, case, None)
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    start = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import pretend_device; pretend_device.start()\n"
    env = clean_env(PYTHONPATH=str(ROOT), LLMCOURSE_DTYPE="float32")
    result = warm.run(["-c", start + CASES], cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_it_says_no_where_cuda_does_and_computes_what_the_cpu_computes(found):
    assert len(found) == 39
    assert {name: said for name, said in found.items() if said is not True} == {}
