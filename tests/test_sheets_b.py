"""Right answers of other kinds pass the sheets 05–08: loops, NumPy, float64 inside, other formulas, optional arguments.

And the broken code that a statement shows runs, fails, and gets a sentence.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sheet_rules import assert_known, assert_passes, broken_code, names, right_answers
from torch import nn

from llmcourse.practice import checking

ROOT = Path(__file__).resolve().parent.parent
RIGHT, right = right_answers()


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


# -------------------------------------------------------------------------------------- training


@right("training.plan")
def plan_ceil(tokens, seq_len, batch_size, micro_batch, processes, *, verbose=False):
    rounds, rest = divmod(batch_size, micro_batch * processes)
    if rest or not rounds:
        raise ValueError("batch")
    return rounds, math.ceil(tokens / seq_len / batch_size)


@right("training.plan")
def plan_loop(tokens, seq_len, batch_size, micro_batch, processes):
    rounds, steps = 0, 0
    while rounds * micro_batch * processes < batch_size:
        rounds += 1
    if rounds * micro_batch * processes != batch_size:
        raise ValueError("batch")
    while steps * batch_size * seq_len < tokens:
        steps += 1
    return rounds, steps


@right("training.train_step")
def step_by_hand(model, optimizer, micro_batches, loss_fn):
    """torch.autograd.grad in place of backward, sums in float64."""
    params = list(model.parameters())
    sums, n, total = [torch.zeros_like(p, dtype=torch.float64) for p in params], 0, 0.0
    for mb in micro_batches:
        losses = loss_fn(model, mb)
        if losses.numel() == 0:
            continue
        for s, g in zip(sums, torch.autograd.grad(losses.sum(), params)):
            s += g
        n += losses.shape[0]
        total += float(losses.detach().sum())
    optimizer.zero_grad()
    for p, s in zip(params, sums):
        p.grad = (s / n).to(p.dtype)
    optimizer.step()
    return total / n


@right("training.train_step")
def step_means(model, optimizer, micro_batches, loss_fn):
    """A running mean: earlier gradients are scaled down as targets arrive."""
    model.zero_grad()
    n, mean = 0, 0.0
    for mb in micro_batches:
        losses = loss_fn(model, mb)
        k = len(losses)
        if not k:
            continue
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(n / (n + k))
        (losses.mean() * k / (n + k)).backward()
        mean = mean * n / (n + k) + losses.mean().item() * k / (n + k)
        n += k
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean


@right("training.local_loss")
def share_of_all(losses, counts):
    return losses.div(sum(counts) / len(counts)).sum()


@right("training.local_loss")
def mean_or_nothing(losses, counts):
    if len(losses) == 0:
        return losses.sum() * 0.0
    return losses.mean() * (losses.numel() / (sum(counts) / len(counts)))


@right("training.batch_of_step")
def batch_by_walking(step, n_items, batch_size, seed):
    per_epoch = n_items // batch_size
    if not per_epoch:
        raise ValueError("too few")
    epoch = 0
    while step >= per_epoch:
        step, epoch = step - per_epoch, epoch + 1
    g = torch.Generator()
    g.manual_seed(seed + epoch)
    return torch.randperm(n_items, generator=g).split(batch_size)[step].clone()


@right("training.batch_of_step")
def batch_by_fork(step, n_items, batch_size, seed):
    if n_items < batch_size:
        raise ValueError
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + step // (n_items // batch_size))
        order = torch.randperm(n_items)
    return order[: n_items - n_items % batch_size].view(-1, batch_size)[step % (n_items // batch_size)]


@right("training.fp16_step")
def fp16_flat(weights, grads, scale, lr, max_norm):
    flat = torch.cat([g.reshape(-1) for g in grads]).double()
    if not torch.isfinite(flat).all():
        return [w + 0 for w in weights], scale * 0.5
    norm = float((flat / scale).norm())
    clip = 1.0 if norm <= max_norm else max_norm / norm
    return [torch.add(w, g, alpha=-lr * clip / scale) for w, g in zip(weights, grads)], scale


@right("training.fp16_step")
def fp16_foreach(weights, grads, scale, lr, max_norm):
    if any((g != g).any() or g.abs().max() == math.inf for g in grads):
        return [w.clone() for w in weights], scale / 2
    g = torch._foreach_div(grads, scale)
    norm = torch.stack(torch._foreach_norm(g)).norm()
    torch._foreach_mul_(g, torch.clamp(max_norm / (norm + 1e-12), max=1.0).item())
    return list(torch._foreach_add(weights, g, alpha=-lr)), float(scale)


@right("training.Snapshot")
class InBytes:
    """Everything through torch.save, into memory."""

    def __init__(self, model, optimizer, scheduler, generator, step):
        import io

        kept = [model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), generator.get_state(), step]
        stream = io.BytesIO()
        torch.save(kept, stream)
        self.data = stream.getvalue()

    def restore(self, model, optimizer, scheduler, generator):
        import io

        model_state, optimizer_state, scheduler_state, random, step = torch.load(io.BytesIO(self.data))
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)
        generator.set_state(random)
        return step


@right("training.Snapshot")
class ClonesAndPickle:
    def __init__(self, model, optimizer, scheduler, generator, step=0):
        import pickle

        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.rest = pickle.dumps((optimizer.state_dict(), scheduler.state_dict(), step))
        self.random = generator.get_state().clone()

    def restore(self, model, optimizer, scheduler, generator):
        import pickle

        optimizer_state, scheduler_state, step = pickle.loads(self.rest)
        scheduler.load_state_dict(scheduler_state)
        optimizer.load_state_dict(optimizer_state)
        model.load_state_dict(self.weights, strict=True)
        generator.set_state(self.random)
        return step


@right("training.save_atomically")
def save_pathlib(path, write):
    new = Path(path).with_name(Path(path).name + f".{os.getpid()}.tmp")
    try:
        write(str(new))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@right("training.save_atomically")
def save_mkstemp(path, write):
    import tempfile

    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=os.path.dirname(path) or ".")
    os.close(handle)
    try:
        write(name)
        with open(name, "rb") as f:
            os.fsync(f.fileno())
        os.rename(name, path)
    except BaseException as e:
        if os.path.lexists(name):
            os.unlink(name)
        raise e


@right("training.differing_fields")
def differing_by_stack(saved, current, *, prefix=""):
    found, todo = set(), [("", saved, current)]
    while todo:
        at, a, b = todo.pop()
        for key in {*a, *b}:
            name = f"{at}.{key}" if at else key
            if (key in a) != (key in b):
                found.add(name)
            elif type(a[key]) is dict and type(b[key]) is dict:
                todo.append((name, a[key], b[key]))
            else:
                x, y = a[key], b[key]
                x = list(x) if isinstance(x, tuple) else x
                y = list(y) if isinstance(y, tuple) else y
                if x != y:
                    found.add(name)
    return sorted(found)


@right("training.differing_fields")
def differing_generator(saved, current):
    nothing = object()

    def walk(a, b, at):
        for key in sorted(set(a).union(b)):
            x, y = a.get(key, nothing), b.get(key, nothing)
            if isinstance(x, dict) and isinstance(y, dict):
                yield from walk(x, y, (*at, key))
                continue
            x, y = (tuple(v) if isinstance(v, list) else v for v in (x, y))
            if x != y:
                yield ".".join((*at, key))

    return sorted(walk(saved, current, ()))


@right("training.early_stop")
def stop_by_prefix(losses, patience, min_delta=0.0):
    if patience <= 0:
        raise ValueError("patience")
    bests, best = [], None
    for i, loss in enumerate(losses):
        if loss == loss and (best is None or losses[best] - loss > min_delta):
            best = i
        bests.append(best)
        last = -1 if best is None else best
        if i - last >= patience:
            return i, best
    return None, best


@right("training.early_stop")
def stop_while(losses, patience, min_delta=0.0, verbose=False):
    if not patience >= 1:
        raise ValueError("patience")
    left, best, index, i = patience, float("inf"), None, 0
    while i < len(losses) and left:
        if not math.isnan(losses[i]) and losses[i] + min_delta < best:
            best, index, left = losses[i], i, patience
        else:
            left -= 1
        i += 1
    return (None if left else i - 1), index


@right("training.mfu")
def mfu_six_n(tokens_per_second, n_params, n_layers, d_model, seq_len, peak_flops):
    return (6 * n_params + 12 * n_layers * d_model * seq_len) / peak_flops * tokens_per_second


@right("training.mfu")
def mfu_numpy(tokens_per_second, n_params, n_layers, d_model, seq_len, peak_flops):
    per_layer = np.float64(2 * seq_len * d_model) + 2 * seq_len * d_model
    forward = 2 * np.float64(n_params) + n_layers * per_layer
    return (forward + 2 * forward) * tokens_per_second / peak_flops


@right("training.peak_activations")
def peak_simulated(n_layers, inside, boundary, segment):
    if segment < 0:
        raise ValueError
    if not segment:
        return sum(inside for _ in range(n_layers))
    sizes = [len(range(n_layers)[i : i + segment]) for i in range(0, n_layers, segment)]
    return max(len(sizes) * boundary + size * inside for size in sizes)


@right("training.peak_activations")
def peak_divmod(n_layers, inside, boundary, segment):
    if segment == 0:
        return inside * n_layers
    if segment < 0:
        raise ValueError(segment)
    whole, rest = divmod(n_layers, segment)
    return (whole + bool(rest)) * boundary + (segment if whole else rest) * inside


@right("training.deepest")
def deepest_by_trying(budget, inside, boundary):
    n = 0
    while True:
        peaks = [(n + 1) * inside] + [-(-(n + 1) // s) * boundary + s * inside for s in range(1, n + 2)]
        if min(peaks) > budget:
            return n
        n += 1


@right("training.deepest")
def deepest_root(budget, inside, boundary):
    """Near the continuous optimum, half of the budget inside."""
    middle = budget // (2 * inside)
    near = range(max(1, middle - 60), middle + 60)
    fits = [s * ((budget - s * inside) // boundary) for s in near if s * inside <= budget]
    return max([budget // inside, *fits])


@right("training.gradient_and_noise")
def two_equations(b_small, sq_small, b_big, sq_big):
    if b_small == b_big:
        raise ValueError
    signal, noise = np.linalg.solve([[1, 1 / b_small], [1, 1 / b_big]], [sq_small, sq_big])
    return float(signal), float(noise)


@right("training.gradient_and_noise")
def mccandlish(b_small, sq_small, b_big, sq_big):
    try:
        signal = (b_big * sq_big - b_small * sq_small) / (b_big - b_small)
        return signal, (sq_small - sq_big) / (1 / b_small - 1 / b_big)
    except ZeroDivisionError:
        raise ValueError("equal batch sizes") from None


# ------------------------------------------------------------------------------------ objectives


@right("objectives.next_token_losses")
def by_cross_entropy(logits, ids, pad_id):
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat[ids[:, 1:].flatten().ne(pad_id)]


@right("objectives.next_token_losses")
def by_loop(logits, ids, pad_id, *, reduce=False):
    losses = [
        torch.logsumexp(logits[b, i].double(), 0) - logits[b, i, ids[b, i + 1]].double()
        for b in range(ids.shape[0])
        for i in range(ids.shape[1] - 1)
        if ids[b, i + 1].item() != pad_id
    ]
    return torch.stack(losses).to(logits.dtype) if losses else logits.new_zeros(0)


@right("objectives.mean_counted")
def sum_over_count(logits, labels):
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    return total / max(1, int((labels != -100).sum()))


@right("objectives.mean_counted")
def only_kept(logits, labels):
    kept = labels.ne(-100)
    if not kept.any():
        return (logits * 0).sum()
    rows = logits[kept]
    return (rows.logsumexp(-1) - rows[torch.arange(len(rows)), labels[kept]]).mean()


@right("objectives.mask_for_mlm")
def mlm_by_index(ids, special, chosen, action, random_ids, mask_id, rate=0.15):
    target = (chosen < rate).logical_and(special.logical_not())
    inputs, labels = ids.clone(), torch.full_like(ids, -100)
    labels[target] = ids[target]
    masked = target & (action < 0.8)
    inputs[masked] = mask_id
    swap = target & ~masked & (action < 0.9)
    inputs[swap] = random_ids[swap]
    return inputs, labels


@right("objectives.mask_for_mlm")
def mlm_by_loop(ids, special, chosen, action, random_ids, mask_id, rate=0.15, ignore=-100):
    inputs, labels = ids.tolist(), (ids * 0 + ignore).tolist()
    for b in range(len(inputs)):
        for t, token in enumerate(inputs[b]):
            if special[b, t] or chosen[b, t] >= rate:
                continue
            labels[b][t] = token
            if action[b, t] < 0.8:
                inputs[b][t] = mask_id
            elif action[b, t] < 0.9:
                inputs[b][t] = int(random_ids[b, t])
    return torch.tensor(inputs), torch.tensor(labels)


@right("objectives.copying")
def copying_by_parts(rate, vocab_size):
    kept, random = 0.1, 0.1
    return kept + random * 1 / vocab_size, 0.8 * rate + 0.1 * rate * (vocab_size - 1) / vocab_size


@right("objectives.copying")
def copying_fraction(rate, vocab_size):
    from fractions import Fraction

    right = Fraction(1, 10) * (1 + Fraction(1, vocab_size))
    return float(right), float(1 - right) * rate


@right("objectives.choose_words")
def words_loop(starts, draws, rate):
    out, on = [], False
    for i, (s, d) in enumerate(zip(starts.tolist(), draws.tolist())):
        on = d < rate if i == 0 or s else on
        out.append(on)
    return torch.tensor(out)


@right("objectives.choose_words")
def words_cummax(starts, draws, rate):
    first = torch.where(starts, torch.arange(len(starts)), 0).cummax(0).values
    return draws[first] < rate


@right("objectives.corrupt_spans")
def spans_backwards(ids, spans, sentinel):
    inputs, targets, end = list(ids), [sentinel - len(spans)], len(ids)
    for i in reversed(range(len(spans))):
        start, length = spans[i]
        if start < 0 or start + length > end:
            raise ValueError("span")
        targets[:0] = [sentinel - i, *ids[start : start + length]]
        inputs[start : start + length] = [sentinel - i]
        end = start
    return inputs, targets


@right("objectives.corrupt_spans")
def spans_by_token(ids, spans, sentinel):
    owner = [None] * len(ids)
    for i, (start, length) in enumerate(spans):
        for at in range(start, start + length):
            if not 0 <= at < len(ids) or owner[at] is not None:
                raise ValueError(f"position {at}")
            owner[at] = i
    inputs, targets, before = [], [], None
    for token, i in zip(ids, owner):
        if i is not None and i != before:
            inputs.append(sentinel - i)
            targets.append(sentinel - i)
        (inputs if i is None else targets).append(token)
        before = i
    return inputs, [*targets, sentinel - len(spans)]


@right("objectives.noise_plan")
def plan_half_up(length, density, mean_span):
    if length <= 1:
        raise ValueError("length")
    noise = int(max(1, min(math.floor(length * density + 0.5), length - 1)))
    spans = int(np.clip(np.round(noise / mean_span), 1, length - noise))
    return noise, spans, length - noise + spans, noise + spans + 1


@right("objectives.noise_plan")
def plan_sorted(length, density, mean_span):
    if length < 2:
        raise ValueError
    noise = sorted([1, round(density * length), length - 1])[1]
    kept = length - noise
    spans = sorted([1, round(noise / mean_span), kept])[1] if kept > 1 else 1
    return (noise, spans, kept + spans, noise + (spans + 1))


@right("objectives.contrastive_losses")
def by_cosine_similarity(a, b, temperature):
    scores = F.cosine_similarity(a[:, None], b[None], dim=-1) / temperature
    return F.cross_entropy(scores, torch.arange(len(a)), reduction="none")


@right("objectives.contrastive_losses")
def by_rows(a, b, temperature, symmetric=False):
    losses = []
    for i in range(len(a)):
        cos = (b @ a[i]) / (b.norm(dim=1) * a[i].norm())
        losses.append(torch.logsumexp(cos / temperature, 0) - cos[i] / temperature)
    return torch.stack(losses)


@right("objectives.extreme_losses")
def extremes_measured(n, temperature):
    x = torch.eye(n, dtype=torch.float64) - 1 / n
    same = torch.ones(n, 3, dtype=torch.float64)
    loss = lambda v: by_cosine_similarity(v, v, temperature)[0].item()
    return loss(same), loss(x)


@right("objectives.extreme_losses")
def extremes_log1p(n, temperature):
    return math.log(n), math.log1p((n - 1) * math.exp(-n / (n - 1) / temperature))


@right("objectives.losses_without_twins")
def twins_by_where(scores, keys):
    out = (keys.unsqueeze(1) != keys) | torch.eye(len(keys)).bool()
    kept = torch.where(out, scores, torch.full_like(scores, -torch.inf))
    return kept.logsumexp(1) - scores.diag()


@right("objectives.losses_without_twins")
def twins_by_rows(scores, keys):
    rows = []
    for i, row in enumerate(scores):
        keep = [j for j in range(len(row)) if j == i or keys[j] != keys[i]]
        rows.append(-row[keep].log_softmax(0)[keep.index(i)])
    return torch.stack(rows)


@right("objectives.two_views")
def views_in_one_batch(encoder, x):
    was = encoder.training
    try:
        both = encoder.train()(torch.cat([x, x]))
    finally:
        encoder.train(was)
    return both[: len(x)], both[len(x) :]


@right("objectives.two_views")
def views_by_part(encoder, x):
    modes = {m: m.training for m in encoder.modules()}
    for m in modes:
        m.training = True
    try:
        first = encoder(x)
        second = encoder(x)
    except BaseException:
        raise
    finally:
        for m, mode in modes.items():
            m.training = mode
    return first, second


@right("objectives.mean_pool")
def pool_where(hidden, mask):
    clean = torch.where(mask.bool().unsqueeze(-1), hidden, torch.zeros((), dtype=hidden.dtype))
    n = mask.sum(1, keepdim=True).clamp(min=1)
    return (clean.double().sum(1) / n).to(hidden.dtype)


@right("objectives.mean_pool")
def pool_loop(hidden, mask):
    out = [h[m == 1].mean(0) if m.any() else torch.zeros_like(h[0]) for h, m in zip(hidden, mask)]
    return torch.stack(out)


@right("objectives.mixing_rates")
def rates_by_logs(sizes, limit, temperature=1.0):
    if not (temperature > 0):
        raise ValueError
    logs = np.log(np.minimum(np.asarray(sizes, dtype=float), limit)) / temperature
    weights = np.exp(logs - logs.max())
    return (weights / weights.sum()).tolist()


@right("objectives.mixing_rates")
def rates_math(sizes, limit, temperature=1.0, minimum=0):
    if temperature <= 0 or math.isnan(temperature):
        raise ValueError("temperature")
    cut = [n if n < limit else limit for n in sizes]
    powered = [math.pow(n / max(cut), 1 / temperature) for n in cut]
    total = math.fsum(powered)
    return [p / total for p in powered]


@right("objectives.temperature_for")
def by_bisection_of_logs(sizes, share):
    if share <= 0 or share * len(sizes) >= 1:
        raise ValueError("share")
    x = torch.tensor(sizes, dtype=torch.float64).log()
    low, high = math.log(1e-3), math.log(1e6)
    while high - low > 1e-9:
        middle = (low + high) / 2
        got = (x / math.exp(middle)).softmax(0)[int(x.argmin())].item()
        low, high = (middle, high) if got < share else (low, middle)
    return math.exp(low)


@right("objectives.temperature_for")
def by_newton(sizes, share):
    n, small = len(sizes), min(sizes)
    if not 0 < share < 1 / n:
        raise ValueError("share")
    r = np.log(np.array(sizes, dtype=float) / small)
    p = 0.0  # f(p) = log Σ exp(p r) is convex and rises: Newton from the right end of a step stays there
    for _ in range(200):
        top = (p * r).max()
        w = np.exp(p * r - top)
        p -= (top + math.log(w.sum()) + math.log(share)) / (w @ r / w.sum())
    return float(1 / p)


@right("objectives.sees_the_future")
def by_beginnings(model, length, vocab_size):
    """All texts at once, grouped by what stands in front."""
    import itertools

    texts = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))
    logits = model(texts)
    for end in range(1, length):
        group = (texts[:, :end] * vocab_size ** torch.arange(end)).sum(1)
        order = group.argsort(stable=True)
        same = group[order][1:] == group[order][:-1]
        front = logits[order, :end]
        if ((front[1:] - front[:-1])[same].abs() > 1e-5).any():
            return True
    return False


@right("objectives.sees_the_future")
def by_other_endings(model, length, vocab_size, tolerance=1e-5):
    """Each text beside the one that begins alike and goes on with zeros."""
    texts = torch.stack(torch.meshgrid(*[torch.arange(vocab_size)] * length, indexing="ij"), -1).flatten(0, -2)
    here = model(texts)
    for end in range(1, length):
        other = texts.clone()
        other[:, end:] = 0
        if not torch.allclose(model(other)[:, :end], here[:, :end], rtol=0, atol=tolerance):
            return True
    return False


# ------------------------------------------------------------------------------------ evaluation


@right("evaluation.window_faults")
def faults_by_counts(windows, n, *, verbose=False):
    counts, blind = np.zeros(n, dtype=int), set()
    for start, stop, first in windows:
        counts[first:stop] += 1
        if first == start and start:
            blind.add(start)
    counts[:1] = 1
    return np.flatnonzero(counts == 0).tolist(), np.flatnonzero(counts > 1).tolist(), sorted(blind)


@right("evaluation.window_faults")
def faults_by_counter(windows, n):
    from collections import Counter

    seen = Counter(t for _, stop, first in windows for t in range(max(1, first), stop))
    blind = sorted({s for s, _, f in windows if s == f and s > 0})
    return sorted(set(range(1, n)) - set(seen)), sorted(t for t in seen if seen[t] >= 2), blind


@right("evaluation.corpus_perplexity")
def perplexity_numpy(losses):
    flat = np.concatenate([np.asarray(d, dtype=float) for d in losses]) if losses else np.zeros(0)
    if flat.size == 0:
        raise ValueError("no targets")
    with np.errstate(over="ignore"):
        return float(np.exp(flat.mean()))


@right("evaluation.corpus_perplexity")
def perplexity_running(losses):
    total = sum(sum(d) for d in losses)
    n = sum(map(len, losses))
    if n == 0:
        raise ValueError
    return torch.tensor(total / n, dtype=torch.float64).exp().item()


@right("evaluation.bits_per_byte")
def bits_from_nats(ppl, n_tokens, text, encoding="utf-8"):
    if text == "":
        raise ValueError("empty")
    return math.log(ppl) * n_tokens / math.log(2) / len(bytes(text, encoding))


@right("evaluation.bits_per_byte")
def bits_by_characters(ppl, n_tokens, text):
    size = sum(1 + (ord(c) > 0x7F) + (ord(c) > 0x7FF) + (ord(c) > 0xFFFF) for c in text)
    if size == 0:
        raise ValueError
    return float(np.log2(ppl)) / size * n_tokens


@right("evaluation.one_bad_token")
def bad_by_power(ppl, n, p):
    if math.isnan(p) or p < 0 or p > 1:
        raise ValueError("p")
    return math.inf if p == 0 else p ** (-1 / n) * ppl ** (-1 / n)


@right("evaluation.one_bad_token")
def bad_by_means(ppl, n, p):
    if not (p >= 0 and p <= 1):
        raise ValueError("p")
    with np.errstate(divide="ignore"):
        return float(np.exp(((n - 1) * np.log(ppl) - np.log(p)) / n) / ppl)


@right("evaluation.paired_ratio")
def paired_numpy(a, b, z=1.96):
    if a.size() != b.size():
        raise ValueError("shape")
    d = b.to(torch.float64).numpy() - a.to(torch.float64).numpy()
    m, s = d.mean(), d.std(ddof=1) / np.sqrt(d.size)
    return tuple(float(np.exp(x)) for x in (m, m - z * s, m + z * s))


@right("evaluation.paired_ratio")
def paired_lists(a, b):
    import statistics

    x, y = a.tolist(), b.tolist()
    if len(x) != len(y):
        raise ValueError("length")
    d = [v - u for u, v in zip(x, y)]
    ratio, factor = math.exp(statistics.fmean(d)), math.exp(1.96 * statistics.stdev(d) / len(d) ** 0.5)
    return ratio, ratio / factor, ratio * factor


@right("evaluation.document_interval")
def interval_numpy(sums, counts, draws):
    index = np.array(draws)
    values = np.exp(np.array(sums)[index].sum(1) / np.array(counts)[index].sum(1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@right("evaluation.document_interval")
def interval_by_hand(sums, counts, draws):
    values = []
    for draw in draws:
        total = n = 0
        for i in draw:
            total, n = total + sums[i], n + counts[i]
        values.append(math.exp(total / n))
    values.sort()

    def at(q):
        place = q * (len(values) - 1)
        k = min(int(place), len(values) - 2)
        return values[k] + (place - k) * (values[k + 1] - values[k]) if len(values) > 1 else values[0]

    return at(0.025), at(0.975)


@right("evaluation.documents_needed")
def needed_by_trying(ratio, deviation):
    if not ratio > 0 or ratio == 1 or not deviation >= 0:
        raise ValueError
    n = 2
    while 1.96 * deviation / n**0.5 > abs(math.log(ratio)) / 2:
        n += 1
    return n


@right("evaluation.documents_needed")
def needed_numpy(ratio, deviation):
    if math.isnan(ratio) or math.isnan(deviation) or ratio <= 0 or ratio == 1.0 or deviation < 0:
        raise ValueError("no effect")
    return int(max(2, np.ceil((3.92 * deviation / np.log(ratio)) ** 2)))


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_the_solutions_run_catches_all_six():
    (outcome,) = checking.find("optimizers.adam_test").expected()
    assert len(outcome["value"]) == 6 and all(outcome["value"].values())


SHEETS = ("evaluation", "metrics", "optimizers", "training", "objectives")
BROKEN = [pair for sheet in SHEETS for pair in broken_code(sheet)]


@pytest.mark.parametrize("id, code", BROKEN, ids=[id for id, _ in BROKEN])
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    """It is no typing error: nothing is undefined, and the check knows what is wrong with it."""
    assert_known(id, code)
