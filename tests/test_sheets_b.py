"""Right answers of other kinds pass the sheets 06–08: loops, NumPy, float64 inside, other formulas, optional arguments.

And the broken code that a statement shows runs, fails, and gets a sentence.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmcourse.practice import checking

ROOT = Path(__file__).resolve().parent.parent
RIGHT: list[tuple[str, object]] = []


def right(id: str):
    """Decorator: one more right answer to an exercise."""

    def keep(answer):
        RIGHT.append((id, answer))
        return answer

    return keep


# ------------------------------------------------------------------------------------ optimizers


@right("optimizers.momentum_path")
def velocity(param, grads, lr, momentum, dampening=0.0, nesterov=False, *, verbose=False):
    """Sutskever's form: the learning rate inside the velocity, in float64, one tensor filled in place."""
    theta, out, v = param.double().clone(), torch.empty_like(grads), None
    for t in range(grads.shape[0]):
        g = grads[t].double()
        v = -lr * g if v is None else momentum * v - lr * (1 - dampening) * g
        theta += momentum * v - lr * g if nesterov else v
        out[t] = theta
    return out


@right("optimizers.momentum_path")
def momentum_foreach(param, grads, lr, momentum, dampening=0.0, nesterov=False):
    p, buffers, path = [param.clone()], [], []
    for g in torch.unbind(grads):
        if buffers:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, [g], alpha=1 - dampening)
        else:
            buffers = [g.clone()]
        step = torch._foreach_add([g], buffers, alpha=momentum) if nesterov else buffers
        torch._foreach_add_(p, step, alpha=-lr)
        path.append(p[0].clone())
    return torch.stack(path)


@right("optimizers.adam_path")
def adam_by_sums(param, grads, lr, betas, eps):
    """The averages written out as weighted sums, in NumPy."""
    g, theta, out = grads.double().numpy(), param.double().numpy().copy(), []
    for t in range(1, len(g) + 1):
        w1 = np.array([betas[0] ** (t - i) for i in range(1, t + 1)])
        w2 = np.array([betas[1] ** (t - i) for i in range(1, t + 1)])
        m = np.tensordot(w1, g[:t], 1) / w1.sum()
        v = np.tensordot(w2, g[:t] ** 2, 1) / w2.sum()
        theta = theta - lr * m / (np.sqrt(v) + eps)
        out.append(theta)
    return torch.tensor(np.stack(out)).to(param.dtype)


@right("optimizers.adam_path")
def adam_kingma(param, grads, lr, betas, eps, amsgrad=False):
    """The order of section 2 of the paper: one step size, and ε scaled with it."""
    p, m, v, path = param.clone(), torch.zeros_like(param), torch.zeros_like(param), []
    for t, g in enumerate(grads, 1):
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        p.addcdiv_(m, v.sqrt() / math.sqrt(c2) + eps, value=-lr / c1)
        path.append(p.clone())
    return torch.stack(path)


@right("optimizers.adam_path")
def adam_library(param, grads, lr, betas, eps):
    p = nn.Parameter(param.clone())
    opt, path = torch.optim.Adam([p], lr=lr, betas=betas, eps=eps, foreach=False), []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return torch.stack(path)


@right("optimizers.adam_test")
def four_numbers():
    grads = torch.tensor([[2.0, 0.1, -3.0, 9.0], [-1.0, 5.0, 0.2, 0.0]])
    return torch.ones(4), grads, 0.1, (0.6, 0.95), 2.0


@right("optimizers.adam_test")
def a_list():
    return [torch.zeros(1), torch.tensor([[10.0], [-1.0], [-7.0]]), 0.1, [0.9, 0.5], 1.0]


@right("optimizers.first_step")
def first_step_sides(param, grad, lr, eps, weight_decay, decoupled):
    g = grad if decoupled else grad.add(param, alpha=weight_decay)
    step = torch.where(g == 0, torch.zeros_like(g), g / (g.abs() + eps))
    return param - lr * (step + weight_decay * param if decoupled else step)


@right("optimizers.first_step")
def first_step_library(param, grad, lr, eps, weight_decay, decoupled):
    p = nn.Parameter(param.clone())
    p.grad = grad.clone()
    rule = torch.optim.AdamW if decoupled else torch.optim.Adam
    rule([p], lr=lr, eps=eps, weight_decay=weight_decay, foreach=False).step()
    return p.detach()


@right("optimizers.resting_weight")
def resting_sign(grad, weight_decay, decoupled):
    if weight_decay <= 0:
        raise ValueError
    sign = (grad > 0) - (grad < 0)
    return float(-(sign if decoupled else grad) / weight_decay)


@right("optimizers.resting_weight")
def resting_measured(grad, weight_decay, decoupled):
    if weight_decay <= 0:
        raise ValueError
    theta, lr = 0.0, 0.5  # AdamW: geometric; L2: bisection on the effective gradient
    if decoupled:
        for _ in range(200_000):
            theta = (1 - lr * weight_decay) * theta - lr * float(np.sign(grad))
        return theta
    low, high = -1e5, 1e5
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if grad + weight_decay * middle > 0 else (middle, high)
    return low


@right("optimizers.lion_change")
def lion_lerp(param, grad, memory, lr, betas, weight_decay, cautious=False):
    update = torch.lerp(grad, memory, betas[0]).sign_()
    return (update + param * weight_decay) * -lr, torch.lerp(grad, memory, betas[1])


@right("optimizers.lion_change")
def lion_numpy(param, grad, memory, lr, betas, weight_decay):
    p, g, m = (x.double().numpy() for x in (param, grad, memory))
    change = -lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * p)
    new = betas[1] * m + (1 - betas[1]) * g
    return torch.from_numpy(change).to(param.dtype), torch.from_numpy(new).to(param.dtype)


@right("optimizers.polar")
def polar_short_side(matrix, steps):
    X = matrix.clone()
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    X = X / max(X.square().sum().sqrt().item(), 1e-7)
    for _ in range(steps):
        X = (1.5 * torch.eye(len(X), dtype=X.dtype) - 0.5 * X @ X.T) @ X
    return X.T if tall else X


@right("optimizers.polar")
def polar_by_svd(matrix, steps):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / S.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        S = 1.5 * S - 0.5 * S**3
    return (U @ S.diag() @ Vh).to(matrix.dtype)


@right("optimizers.muon_step")
def muon_lerp(param, grad, buffer, lr, momentum, weight_decay, nesterov=True):
    new = buffer.clone().lerp_(grad, 1 - momentum)
    U, _, Vh = torch.linalg.svd(grad.lerp(new, momentum), full_matrices=False)
    out = param.clone().mul_(1 - lr * weight_decay)
    return out.add_(U @ Vh, alpha=-lr * max(1, grad.size(-2) / grad.size(-1)) ** 0.5), new


@right("optimizers.muon_step")
def muon_eigen(param, grad, buffer, lr, momentum, weight_decay):
    b = momentum * buffer.double() + (1 - momentum) * grad.double()
    d = momentum * b + (1 - momentum) * grad.double()
    flip = d.shape[0] < d.shape[1]
    d = d.T if flip else d
    values, Q = torch.linalg.eigh(d.T @ d)
    d = d @ Q @ values.rsqrt().diag() @ Q.T
    d = d.T if flip else d
    new = param - lr * weight_decay * param - lr * max(1.0, param.shape[0] / param.shape[1]) ** 0.5 * d
    return new.float(), b.float()


@right("optimizers.learning_rates")
def rates_numpy(total, warmup, peak, final):
    if warmup < 0 or total - warmup < 2:
        raise ValueError("warmup")
    up = peak * np.arange(1, warmup + 1) / max(1, warmup)
    p = np.linspace(0, 1, total - warmup)
    return [*up.tolist(), *(peak * final + (peak - peak * final) * np.cos(np.pi * p / 2) ** 2).tolist()]


@right("optimizers.learning_rates")
def rates_one_loop(total, warmup, peak, final):
    assert_room = warmup >= 0 and warmup + 2 <= total
    if not assert_room:
        raise ValueError(warmup)
    out = []
    for s in range(total):
        if s + 1 <= warmup:
            out.append(peak / warmup * (s + 1))
        else:
            wave = 0.5 + 0.5 * math.cos(math.pi / (total - warmup - 1) * (s - warmup))
            out.append(peak * wave + peak * final * (1 - wave))
    return out


@right("optimizers.clip_together")
def clip_by_stack(grads, max_norm):
    if max_norm != max_norm or max_norm <= 0:
        raise ValueError("max_norm")
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads if g is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
    if not math.isfinite(norm) or norm <= max_norm:
        return [g.clone() if g is not None else g for g in grads], norm
    return [g / (norm / max_norm) if g is not None else g for g in grads], norm


@right("optimizers.clip_together")
def clip_flat(grads, max_norm, eps=0.0):
    if not max_norm > 0:
        raise ValueError
    flat = torch.cat([torch.zeros(0), *(g.float().flatten() for g in grads if g is not None)])
    norm = float(flat.norm())
    small = not norm > max_norm or norm == math.inf
    return [None if g is None else g if small else (g.float() * max_norm / norm).to(g.dtype) for g in grads], norm


@right("optimizers.decayed")
def decayed_by_sets(model):
    table = set()
    for m in model.modules():
        if isinstance(m, nn.Embedding):
            table.add(m.weight)
    out = []
    for name, p in model.named_parameters():
        if not p.requires_grad or p.dim() < 2 or p in table:
            continue
        out.append(name)
    return out


@right("optimizers.decayed")
def decayed_by_pointer(model):
    tables = [m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)]
    own = filter(lambda item: item[1].requires_grad and len(item[1].shape) > 1, model.named_parameters())
    return [n for n, p in own if p.data_ptr() not in tables]


@right("optimizers.which_rule")
def by_scale_and_memory(run):
    base, scaled = run([1.0, 0.5, 2.0]), run([8.0, 4.0, 16.0])
    grows = not math.isclose(base[-1], scaled[-1], rel_tol=1e-3)
    after = run([4.0, 0.0])
    remembers = abs(after[1] - after[0]) > 1e-3 * abs(after[0])
    if grows:
        return "momentum" if remembers else "sgd"
    if not remembers:
        return "sign"
    return "lion" if math.isclose(after[1], 2 * after[0], rel_tol=1e-9) else "adam"


@right("optimizers.which_rule")
def by_many_runs(run):
    a, b, c = run([1.0])[0], run([2.0])[0], run([1.0, 0.0])
    if abs(b / a - 2) < 1e-6:
        return "sgd" if c[1] == c[0] else "momentum"
    if c[0] == c[1]:
        return "sign"
    d = run([1.0, 1.0, 5.0, 5.0])
    steps = np.diff([0.0, *d])
    return "lion" if np.ptp(np.abs(steps)) < 1e-9 * abs(steps[0]) * len(steps) else "adam"


@right("optimizers.smoothed_loss")
def smoothed_by_target(logits, targets, epsilon):
    keep = targets.ne(-100).nonzero()[:, 0]
    V = logits.size(1)
    t = F.one_hot(targets[keep], V).to(logits.dtype) * (1 - epsilon) + epsilon / V
    return -(t * F.log_softmax(logits[keep], 1)).sum(1).mean()


@right("optimizers.smoothed_loss")
def smoothed_fairseq(logits, targets, epsilon, ignore_index=-100):
    lprobs = logits.log_softmax(-1)
    pad = targets.eq(ignore_index)
    nll = -lprobs.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(pad, 0)
    smooth = -lprobs.sum(1).masked_fill(pad, 0)
    return ((1 - epsilon) * nll + epsilon / logits.shape[-1] * smooth).sum() / (~pad).sum()


@right("optimizers.smoothed_loss")
def smoothed_loop(logits, targets, epsilon):
    losses = [
        -(1 - epsilon) * row.log_softmax(0)[t] - epsilon * row.log_softmax(0).mean()
        for row, t in zip(logits, targets.tolist())
        if t != -100
    ]
    return sum(losses) / len(losses)


@right("optimizers.lowest_loss")
def lowest_closed(V, epsilon):
    a, b = 1 - epsilon + epsilon / V, epsilon / V
    return -a * math.log(a) - ((V - 1) * b * math.log(b) if b > 0 else 0.0)


@right("optimizers.lowest_loss")
def lowest_torch(V, epsilon):
    t = torch.full((V,), epsilon / V, dtype=torch.float64)
    t[0] += 1 - epsilon
    return torch.special.entr(t).sum().item()


RIGHT.append(("optimizers.state_bytes", 134_515_008 * 8))


# ------------------------------------------------------------------------------------------ tests


def names(answers):
    return [f"{id.split('.')[1]}-{getattr(a, '__name__', a)}" for id, a in answers]


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    ex = checking.find(id)
    result = checking.judge(ex, checking._run_here(ex, answer))
    assert result.passed, repr(result)


def test_the_solutions_run_catches_all_six():
    (outcome,) = checking.find("optimizers.adam_test").expected()
    assert len(outcome["value"]) == 6 and all(outcome["value"].values())


BROKEN = re.compile(r"```python\n((?:def|class) (\w+).*?)```", re.S)


def broken():
    """(exercise, code) of every piece of broken code in the statements of our sheets."""
    import nbformat

    for sheet in ("optimizers", "training", "objectives"):
        ((master),) = (ROOT / "solutions").glob(f"*/{sheet}.ipynb")
        for cell in nbformat.read(master, 4).cells:
            for code, name in BROKEN.findall(cell.source if cell.cell_type == "markdown" else ""):
                yield f"{sheet}.{name}", code


@pytest.mark.parametrize("id, code", broken(), ids=[id for id, _ in broken()])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    """It is no typing error: nothing is undefined, and the check knows what is wrong with it."""
    ex = checking.find(id)
    space = dict(vars(checking.sys.modules[ex.module]))
    exec(code, space)
    outcomes = checking._run_here(ex, space[ex.name])
    result = checking.judge(ex, outcomes)
    assert not result.passed and result.wrong_answer, repr(result)
    assert not [o for o in outcomes if o["kind"] == "error" and o["type"] in ("NameError", "SyntaxError")]
