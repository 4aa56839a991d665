"""Functions of the compression chapters with a model on a device that is not there: a process of its own, one line of
JSON: name of a case → what went wrong, or null.

Each case gives a number or a tensor; it has to be what the CPU computes, on whatever device the text was.
"""

from __future__ import annotations

import copy
import json

import pretend_device
import torch
from archs import build, ids, random_text
from torch import Tensor

from llmcourse.activations import AWQ, DynamicInt8, SmoothQuant, int8_product, to_int8
from llmcourse.adapters import adapter_for
from llmcourse.compression import compress
from llmcourse.distillation import KeepBlocks, Stored, continued, distillation_loss, logits_of, on_policy_loss
from llmcourse.lowbit import NF4, Ternary
from llmcourse.pruning import Depth, Magnitude, RandomMask, SparseGPT, Structured, Wanda
from llmcourse.quantization import GPTQ, RTN
from llmcourse.rotation import CacheFormat, Rotate, RotateInputs, ThroughCache, quantized_cache
from llmcourse.runtime import Runtime

CALIB = dict(n_calib=2, seq_len=16)
ONE = dict(layers="*.0.*")  # of three blocks: each layer takes the same way
FOUR = dict(bits=4, group_size=16, **ONE)
PASSES = {
    "RTN": [RTN(**FOUR)],
    "GPTQ": [GPTQ(**FOUR, **CALIB)],
    "AWQ": [AWQ(**FOUR, **CALIB, n_grid=2)],
    "SmoothQuant": [SmoothQuant(per="tensor", **CALIB, **ONE)],
    "NF4": [NF4(group_size=16, **ONE)],
    "Ternary": [Ternary(group_size=16, **ONE)],
    "Magnitude": [Magnitude(sparsity=0.5, **ONE)],
    "RandomMask": [RandomMask(sparsity=0.5, **ONE)],
    "Wanda": [Wanda(sparsity=0.5, **CALIB, **ONE)],
    "SparseGPT": [SparseGPT(sparsity=0.5, **CALIB, **ONE)],
    "Structured": [Structured(sparsity=0.5, **CALIB)],
    "Depth": [Depth(blocks=1, **CALIB)],
    "KeepBlocks": [KeepBlocks(kept=2)],
    "Rotate": [Rotate()],
    "RotateInputs": [RotateInputs(kind="orthogonal", **ONE), RTN(**FOUR)],
}


def losses_of(make, model, batch) -> Tensor:
    torch.manual_seed(0)
    return make(model)(copy.deepcopy(model), batch)


def int8_logits(model, batch) -> Tensor:
    student, _ = compress(model, [DynamicInt8()], None, None)
    to_int8(student)
    return logits_of(student, batch)


def through_a_cache(model, batch) -> Tensor:
    form = CacheFormat(key_bits=4, value_bits=4, group_size=8, residual=8, rotate=True)
    reader = ThroughCache(model, lambda: quantized_cache(model, form), piece=8)
    return logits_of(reader, batch)


def product(model, batch) -> Tensor:
    """Five rows of 13 columns: nothing that the kernel of a GPU would take as it is."""
    a, b = (torch.randint(-127, 128, s, dtype=torch.int8, generator=dice()) for s in ((5, 13), (13, 7)))
    where = next(model.parameters()).device
    found = int8_product(a.to(where), b.to(where)).cpu()
    assert torch.equal(found.long(), a.long() @ b.long())
    return found


def dice() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


CASES = {
    "logits_of": logits_of,
    "Stored": lambda model, batch: logits_of(Stored(model), batch),
    "distillation_loss": lambda model, batch: losses_of(distillation_loss, model, batch),
    "on_policy_loss": lambda m, batch: losses_of(lambda t: on_policy_loss(t, prompt=4, new=6), m, batch),
    "a teacher on the CPU": lambda m, batch: distillation_loss(copy.deepcopy(m).cpu())(m, batch),
    "continued": lambda m, batch: (torch.manual_seed(0), continued(m, batch[:, :4], 6))[1],
    "int8_product": product,
    "Int8Linear": int8_logits,
    "QuantizedKVCache": through_a_cache,
}


def passed(passes):
    def case(model, batch) -> Tensor:
        where = next(model.parameters()).device
        student, _ = compress(model, passes, random_text(), Runtime(device=where, dtype=torch.float32))
        assert all(p.device == where for p in student.parameters())
        return adapter_for(student).logits(batch.to(where))

    return case


def problems() -> dict[str, str | None]:
    """Every case against the CPU, for a model of transformers; what is no pass also for one of ours."""
    away, found = pretend_device.start(), {}
    cases = CASES | {name: passed(passes) for name, passes in PASSES.items()}
    for name, case in cases.items():
        for arch in ("llama",) if name in PASSES else ("ours", "llama"):
            try:
                with torch.no_grad():
                    here = case(build(arch), ids())
                    there = case(build(arch).to(away), ids())
                # not to the last digit: sums in another order move what is rounded
                apart = float((there.cpu() - here).float().norm() / here.float().norm().clamp_min(1))
                found[f"{name}, {arch}"] = None if apart < 0.05 else f"differs by {apart:.0%} from the CPU"
            except Exception as e:
                found[f"{name}, {arch}"] = f"{type(e).__name__}: {e}"[:300]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(problems()))
