"""Right answers of other kinds to the sheets of chapters 02 to 04: each has to pass.

Loops in place of tensor operations, NumPy, einsum, float64 inside, extra optional arguments, helpers, work in place on
copies: whatever gives the right result is right. And a call of the chapter's own function is not an answer.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sheet_rules import assert_passes
from torch import nn

from llmcourse.practice import checking

INF = math.inf


def fraction(text):
    from hashlib import sha256

    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


# ------------------------------------------------------------------------------------- attention


def softmax_numpy_style(x, dim=-1, eps=0.0):
    shift = torch.where(torch.isinf(m := x.amax(dim=dim, keepdim=True)), torch.zeros_like(m), m)
    e = torch.exp(x - shift)
    return e / (e.sum(dim=dim, keepdim=True) + eps).clamp(min=torch.finfo(x.dtype).tiny)


def softmax_double(x, dim=-1):
    hidden = torch.isneginf(x).all(dim, keepdim=True)
    y = x.double().masked_fill(hidden, 0.0)
    out = torch.exp(y - torch.logsumexp(y, dim, keepdim=True))
    return out.masked_fill(hidden, 0.0).to(x.dtype)


def sdpa_einsum(q, k, v, scale=None):
    if q.size(-1) != k.size(-1):
        raise ValueError
    s = torch.einsum("...td,...sd->...ts", q, k) * (scale or q.size(-1) ** -0.5)
    return torch.einsum("...ts,...sc->...tc", F.softmax(s, dim=-1), v)


def sdpa_scaled_query(q, k, v):
    d = q.shape[-1]
    if k.shape[-1] != d:
        raise ValueError("width")
    w = nn.Softmax(dim=-1)(torch.matmul(q / d**0.5, k.transpose(-2, -1)))
    return torch.matmul(w, v)


def causal_bias_loop(T, S):
    if T > S:
        raise ValueError(T)
    m = torch.zeros(T, S)
    for i in range(T):
        for j in range(S):
            if j > i + S - T:
                m[i, j] = float("-inf")
    return m


def causal_bias_where(T, S, device=None):
    if not T <= S:
        raise ValueError
    rows, columns = torch.arange(S - T, S, device=device), torch.arange(S, device=device)
    return torch.where(columns[None] <= rows[:, None], 0.0, float("-inf")).float()


def decoder_mask_loop(ids, pad_id):
    B, T = ids.shape
    rows = [[[[j <= i and ids[b, j].item() != pad_id for j in range(T)] for i in range(T)]] for b in range(B)]
    return torch.tensor(rows, dtype=torch.bool)


def decoder_mask_numbers(ids, pad_id=0):
    B, T = ids.shape
    future = torch.ones(T, T).triu(diagonal=1).eq(1)
    return ~(future[None, None] | ids.eq(pad_id).view(B, 1, 1, T))


def exposing_input_orthogonal(T, D):
    q, k = torch.zeros(T, D), torch.zeros(T, D)
    q[:, 0], k[:, 1] = 2.0, 3.0
    k[0, 0] = 1.0
    return [q, k, 10 * torch.arange(T * D).float().view(T, D)]


def exposing_input_own_key(T, D):
    q, k, v = (torch.zeros(T, D) for _ in range(3))
    q[:, 0] = k[:, 0] = 1
    k[T - 1] = 0
    v[T - 1] = 5
    return q, k, v


def split_qkv_view(x, n_heads):
    if n_heads <= 0 or x.shape[-1] % (3 * n_heads) != 0:
        raise ValueError
    B, T, W = x.size()
    q, k, v = x.contiguous().view(B, T, 3, n_heads, W // 3 // n_heads).permute(2, 0, 3, 1, 4)
    return q, k, v


def split_qkv_loops(x, n_heads):
    if n_heads < 1 or x.shape[-1] % (3 * n_heads):
        raise ValueError
    D = x.shape[-1] // (3 * n_heads)
    head = lambda part, h: x[:, :, (part * n_heads + h) * D : (part * n_heads + h + 1) * D]
    return tuple(torch.stack([head(part, h) for h in range(n_heads)], dim=1) for part in range(3))


def grouped_query_views(q, k, v):
    B, H, T, D = q.shape
    Hk = k.shape[1]
    if H % Hk != 0:
        raise ValueError
    g = q.reshape(B, Hk, H // Hk, T, D)
    w = torch.softmax(torch.einsum("bhgtd,bhsd->bhgts", g, k) / D**0.5, -1)
    return torch.einsum("bhgts,bhsd->bhgtd", w, v).reshape(B, H, T, D)


def grouped_query_loop(q, k, v):
    if q.shape[1] % k.shape[1]:
        raise ValueError
    n = q.shape[1] // k.shape[1]
    heads = [sdpa_einsum(q[:, h], k[:, h // n], v[:, h // n]) for h in range(q.shape[1])]
    return torch.stack(heads, dim=1)


def rope_complex(x, positions, base=10000.0):
    D = x.shape[-1]
    if D % 2:
        raise ValueError
    theta = 1.0 / (base ** (torch.arange(0, D, 2).double() / D))
    turn = torch.polar(torch.ones(len(positions), D // 2).double(), torch.outer(positions.double(), theta))
    z = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double()) * turn
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def rope_rotate_half(x, positions, base=10000.0):
    d = x.shape[-1]
    if d % 2 != 0:
        raise ValueError
    inv = 1.0 / (base ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))
    freqs = torch.outer(positions.float(), inv)
    emb = torch.cat((freqs, freqs), dim=-1)
    rotated = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), dim=-1)
    return ((x * emb.cos()) + (rotated * emb.sin())).to(x.dtype)


def rotated_by_loop(x, y, base, limit):
    h = len(x) // 2
    for n in range(limit):
        if all(
            math.hypot(
                float(x[i]) * math.cos(a) - float(x[i + h]) * math.sin(a) - float(y[i]),
                float(x[i]) * math.sin(a) + float(x[i + h]) * math.cos(a) - float(y[i + h]),
            )
            < 1.4e-3
            for i in range(h)
            for a in [n * base ** (-2 * i / len(x))]
        ):
            return n
    raise ValueError("none")


def rotated_by_blocks(x, y, base, limit):
    if limit <= 0:
        raise ValueError
    best = min(
        (float((rope_complex(x.double()[None], torch.tensor([n]), base)[0] - y).abs().max()), n)
        for n in range(min(limit, 300))
    )
    if limit <= 300:
        if best[0] > 1e-3:
            raise ValueError
        return best[1]
    table = rope_complex(x.double().expand(limit, -1), torch.arange(limit), base)
    off = (table - y.double()).abs().max(-1).values
    if off.min() > 1e-3:
        raise ValueError
    return off.argmin().item()


def alibi_loop(n_heads, T):
    if n_heads <= 0 or not math.log2(n_heads).is_integer():
        raise ValueError
    m = torch.full((n_heads, T, T), -INF)
    for h in range(n_heads):
        for i in range(T):
            for j in range(i + 1):
                m[h, i, j] = -((2 ** (-8 / n_heads)) ** (h + 1)) * (i - j)
    return m


def alibi_powers(n_heads, T):
    if n_heads not in [2**k for k in range(20)]:
        raise ValueError
    start = 2 ** (-8 / n_heads)
    slopes = torch.tensor([start * start**i for i in range(n_heads)]).view(-1, 1, 1)
    at = torch.arange(T)
    return slopes * (at[None, :] - at[:, None]) + torch.full((T, T), -INF).triu(1)


def merge_partial_logs(m1, l1, a1, m2, l2, a2):
    m = torch.max(m1, m2)
    weight = lambda x: torch.where(x == -INF, torch.zeros_like(x), torch.exp(x - m))
    return m, weight(m1) * l1 + weight(m2) * l2, weight(m1) * a1 + weight(m2) * a2


def merge_partial_nan_to_num(m1, l1, a1, m2, l2, a2):
    m = torch.maximum(m1, m2)
    c1, c2 = torch.exp(m1 - m).nan_to_num(0), torch.exp(m2 - m).nan_to_num(0)
    return m, c1 * l1 + c2 * l2, c1 * a1 + c2 * a2


def online_by_logsumexp(q, k, v, block):
    if block < 1:
        raise ValueError
    D = q.shape[-1]
    lse, out = None, None
    for kb, vb in zip(k.split(block, dim=-2), v.split(block, dim=-2)):
        s = torch.einsum("...td,...sd->...ts", q, kb) / math.sqrt(D)
        one = s.logsumexp(-1, keepdim=True)
        part = torch.softmax(s, -1) @ vb
        if lse is None:
            lse, out = one, part
        else:
            both = torch.logaddexp(lse, one)
            out, lse = out * (lse - both).exp() + part * (one - both).exp(), both
    return out


def online_in_double(q, k, v, block):
    if not block >= 1:
        raise ValueError
    dtype = v.dtype
    q, k, v = q.double(), k.double(), v.double()
    m = torch.full(q.shape[:-1], -INF, dtype=torch.float64)
    l, a = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    i = 0
    while i < k.shape[-2]:
        s = q @ k[..., i : i + block, :].transpose(-1, -2) * q.shape[-1] ** -0.5
        new = torch.maximum(m, s.max(-1).values)
        p, c = torch.exp(s - new[..., None]), torch.exp(m - new)
        l, a, m = l * c + p.sum(-1), a * c[..., None] + p @ v[..., i : i + block, :], new
        i += block
    return (a / l[..., None]).to(dtype)


def longformer_loop(T, radius, global_positions):
    if radius < 0 or not set(global_positions) <= set(range(T)):
        raise ValueError
    g = set(global_positions)
    return torch.tensor([[abs(i - j) <= radius or i in g or j in g for j in range(T)] for i in range(T)])


def longformer_numpy(T, radius, global_positions):
    p = np.array(global_positions, dtype=int)
    if radius < 0 or (p < 0).any() or (p >= T).any():
        raise ValueError
    at = np.arange(T)
    m = np.abs(at[:, None] - at[None]) <= radius
    m[p], m[:, p] = True, True
    return torch.from_numpy(m)


def longest_text_bisect(budget, window):
    if budget < 1 or window < 1:
        raise ValueError

    def pairs(t):
        w = min(t, window)
        return w * (w + 1) // 2 + (t - w) * window

    low, high = 1, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pairs(middle) <= budget else (low, middle)
    return low


def longest_text_range(budget, window):
    if min(budget, window) < 1:
        raise ValueError
    t = lambda n: n * (n + 1) // 2 if n <= window else t(window) + (n - window) * window
    high = 1
    while t(high) <= budget:
        high *= 2
    return bisect.bisect_right(range(1, high + 1), budget, key=t)


def linear_step_outer(state, norm, q, k, v, eps=0.0):
    phi = lambda x: torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))
    new_state = (
        state.clone().add_(torch.outer(phi(k), v)) if not state.requires_grad else state + torch.outer(phi(k), v)
    )
    new_norm = norm + phi(k)
    return torch.einsum("d,dc->c", phi(q), new_state) / (torch.dot(phi(q), new_norm) + eps), new_state, new_norm


def linear_step_functional(state, norm, q, k, v):
    fq, fk = nn.ELU()(q).add(1), nn.ELU()(k).add(1)
    s, n = torch.addr(state, fk, v), norm.add(fk)
    return (fq.unsqueeze(0) @ s).squeeze(0) / (fq * n).sum(), s, n


def previous_token_keys(codes):
    T, D = codes.shape
    w_k = torch.zeros(D, D)
    for i in range(1, T):
        w_k += torch.outer(codes[i], codes[i - 1])
    return 30 * math.sqrt(D) * torch.eye(D), w_k


def previous_token_pinv(codes):
    D = codes.shape[1]
    target = torch.cat([torch.zeros(1, D), codes[:-1]])
    w = (torch.linalg.pinv(codes) @ target).T
    return 5 * D**0.25 * w, 5 * D**0.25 * torch.eye(D)


ATTENTION = {
    "softmax_stable": (softmax_numpy_style, softmax_double),
    "scaled_dot_product": (sdpa_einsum, sdpa_scaled_query),
    "causal_bias": (causal_bias_loop, causal_bias_where),
    "decoder_mask": (decoder_mask_loop, decoder_mask_numbers),
    "exposing_input": (exposing_input_orthogonal, exposing_input_own_key),
    "split_qkv": (split_qkv_view, split_qkv_loops),
    "grouped_query": (grouped_query_views, grouped_query_loop),
    "rope_half": (rope_complex, rope_rotate_half),
    "rotated_by": (rotated_by_blocks,),
    "alibi": (alibi_loop, alibi_powers),
    "merge_partial": (merge_partial_logs, merge_partial_nan_to_num),
    "online_attention": (online_by_logsumexp, online_in_double),
    "longformer_mask": (longformer_loop, longformer_numpy),
    "longest_text": (longest_text_bisect, longest_text_range),
    "linear_step": (linear_step_outer, linear_step_functional),
    "previous_token": (previous_token_keys, previous_token_pinv),
}

# ----------------------------------------------------------------------------------------- model


def rms_norm_llama(x, weight, eps=1e-6):
    h = x.float() if x.dtype != torch.float64 else x
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + eps)
    return (weight * h).type_as(x)


def rms_norm_norm(x, weight, eps):
    y = x.double()
    return (
        y / torch.sqrt(torch.linalg.vector_norm(y, dim=-1, keepdim=True) ** 2 / x.size(-1) + eps) * weight.double()
    ).to(x.dtype)


def backward_sums(x, weight, grad, eps):
    D = x.shape[-1]
    mu = x.mean(-1, keepdim=True)
    std = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    h = (x - mu) / std
    dh = grad * weight
    dx = (D * dh - dh.sum(-1, keepdim=True) - h * (dh * h).sum(-1, keepdim=True)) / (D * std)
    axes = tuple(range(x.dim() - 1))
    return dx, (grad * h).sum(axes), grad.sum(axes)


def backward_jacobian(x, weight, grad, eps):
    D = x.shape[-1]
    dx = torch.zeros_like(x)
    flat, g, out = x.reshape(-1, D).double(), (grad * weight).reshape(-1, D).double(), dx.view(-1, D)
    dw, db = torch.zeros(D).double(), torch.zeros(D).double()
    for n, row in enumerate(flat):
        c = row - row.mean()
        s = 1 / torch.sqrt((c * c).mean() + eps)
        J = s * (torch.eye(D) - 1 / D - torch.outer(c, c) * s * s / D)
        out[n] = (J.T @ g[n]).to(x.dtype)
        dw += grad.reshape(-1, D)[n] * c * s
        db += grad.reshape(-1, D)[n]
    return dx, dw.to(x.dtype), db.to(x.dtype)


def scale_hidden_diag(w_gate, w_up, w_down, s):
    if torch.count_nonzero(s) < len(s):
        raise ValueError
    S, inverse = torch.diag(s.double()), torch.diag(1 / s.double())
    return w_gate.clone(), (S @ w_up.double()).to(w_up.dtype), (w_down.double() @ inverse).to(w_down.dtype)


def scale_hidden_loop(w_gate, w_up, w_down, s):
    up, down = w_up.clone(), w_down.clone()
    for i, f in enumerate(s.tolist()):
        if f == 0:
            raise ValueError
        up[i] *= f
        down[:, i] /= f
    return w_gate, up, down


def most_layers_loop(budget, vocab_size, d_model, n_heads, n_kv_heads, d_ff, tied):
    head = d_model // n_heads
    layer = sum(
        (
            d_model,
            n_heads * head * d_model,
            2 * n_kv_heads * head * d_model,
            d_model * d_model,
            d_model,
            3 * d_ff * d_model,
        )
    )
    rest = budget - d_model - vocab_size * d_model * (2 - bool(tied))
    n = 0
    while rest >= layer:
        rest, n = rest - layer, n + 1
    if not n:
        raise ValueError
    return n


def most_layers_divmod(budget, vocab_size, d_model, n_heads, n_kv_heads, d_ff, tied):
    kv = d_model * n_kv_heads // n_heads
    n, _ = divmod(
        budget - vocab_size * d_model * (1 + (not tied)) - d_model,
        2 * d_model**2 + 2 * d_model * kv + 3 * d_model * d_ff + 2 * d_model,
    )
    if n <= 0:
        raise ValueError
    return n


def cached_used_only(q, k, v, keys, values, length):
    end = length + q.shape[2]
    if end > keys.shape[2]:
        raise ValueError
    keys = torch.cat([keys[:, :, :length], k, keys[:, :, end:]], dim=2)
    values = torch.cat([values[:, :, :length], v, values[:, :, end:]], dim=2)
    mask = torch.arange(end)[None] > torch.arange(length, end)[:, None]
    s = torch.einsum("bhtd,bhsd->bhts", q, keys[:, :, :end]) / q.shape[-1] ** 0.5
    return s.masked_fill(mask, -INF).softmax(-1) @ values[:, :, :end], keys, values, end


def cached_token_by_token(q, k, v, keys, values, length):
    if keys.shape[2] - length < q.shape[2]:
        raise ValueError
    keys, values, rows = keys.clone(), values.clone(), []
    for t in range(q.shape[2]):
        keys[:, :, length], values[:, :, length] = k[:, :, t], v[:, :, t]
        length += 1
        w = torch.softmax(q[:, :, t : t + 1] @ keys[:, :, :length].transpose(2, 3) / math.sqrt(q.shape[3]), -1)
        rows.append(w @ values[:, :, :length])
    return torch.cat(rows, 2), keys, values, length


def top_k_sorted(logits, k, filter_value=-INF):
    if k < 1:
        raise ValueError
    k = min(k, logits.size(-1))
    kth = torch.sort(logits, dim=-1, descending=True).values[..., k - 1, None]
    return torch.where(logits >= kth, logits, torch.tensor(filter_value, dtype=logits.dtype))


def top_k_in_place_on_copy(logits, k):
    if not k > 0:
        raise ValueError
    out = logits.clone()
    out[out < torch.topk(out, min(k, out.size(-1)))[0][..., -1, None]] = -float("inf")
    return out


def top_p_shifted(probabilities, p):
    if p <= 0 or p > 1:
        raise ValueError
    sorted_p, index = torch.sort(probabilities, descending=True, dim=-1)
    remove = torch.cumsum(sorted_p, dim=-1) >= p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    mask = remove.scatter(-1, index, remove)
    kept = probabilities.masked_fill(mask, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def top_p_ascending(probabilities, p):
    if not 0 < p <= 1:
        raise ValueError
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    out = torch.zeros_like(rows)
    for row, new in zip(rows, out):
        total = 0.0
        for i in row.argsort(descending=True).tolist():
            new[i] = row[i]
            total += row[i].item()
            if total >= p:
                break
        new /= new.sum()
    return out.view_as(probabilities)


def temperature_shifted(logits, temperature):
    if temperature < 0:
        raise ValueError
    x = logits.float()
    if not temperature:
        return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
    e = ((x - x.max(-1, keepdim=True).values) / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def temperature_double(logits, temperature, dtype=torch.float32):
    if temperature < 0:
        raise ValueError
    x = logits.to(torch.float64)
    p = (
        torch.nn.functional.softmax(x / temperature, dim=-1)
        if temperature > 0
        else F.one_hot(x.argmax(-1), x.shape[-1])
    )
    return p.to(dtype)


def temperature_for_newton(logits, entropy):
    x = logits.double().numpy()
    if entropy <= 0 or entropy >= np.log(len(x)):
        raise ValueError

    def H(t):
        p = np.exp((x - x.max()) / t)
        p = p / p.sum()
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    low = high = 1.0
    while H(low) > entropy:
        low /= 2
    while H(high) < entropy:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if H(middle) < entropy else (low, middle)
    return high


def temperature_for_grid(logits, entropy):
    if not 0 < entropy < math.log(logits.shape[0]):
        raise ValueError
    low, high = math.log(1e-5), math.log(1e6)
    for _ in range(12):
        grid = torch.linspace(low, high, 41, dtype=torch.float64)
        p = torch.softmax(logits.double()[None] / grid.exp()[:, None], -1)
        h = -torch.xlogy(p, p).sum(-1)
        i = int((h < entropy).sum())
        low, high = float(grid[max(i - 1, 0)]), float(grid[min(i, 40)])
    return float(np.exp((low + high) / 2))


def positions_loop(real):
    out = torch.zeros(real.shape, dtype=torch.int64)
    for row, new in zip(real.tolist(), out):
        n = 0
        for t, is_real in enumerate(row):
            if is_real:
                new[t], n = n, n + 1
    return out


def positions_argmax(real):
    T = real.shape[1]
    start = T - real.sum(-1, keepdim=True)
    return torch.relu(torch.arange(T)[None] - start)


def route_sorted(logits, k):
    if k not in range(1, logits.shape[1] + 1):
        raise ValueError
    p = torch.softmax(logits, dim=-1)
    e = torch.argsort(p, dim=-1, descending=True)[:, :k]
    w = torch.gather(p, 1, e)
    return e, w / w.sum(1, keepdim=True) if k > 1 else w


def route_mixtral(logits, k):
    if not 0 < k <= logits.size(1):
        raise ValueError
    top, e = torch.topk(logits, k)
    return e, torch.softmax(top, -1) if k > 1 else (top - logits.logsumexp(-1, keepdim=True)).exp()


def balance_bincount(probabilities, experts):
    E = probabilities.size(1)
    f = torch.bincount(experts.reshape(-1), minlength=E) / experts.numel()
    return E * torch.dot(f.to(probabilities.dtype), probabilities.mean(dim=0))


def balance_loop(probabilities, experts):
    E = probabilities.shape[1]
    total = 0
    for e in range(E):
        total = total + (experts == e).sum().item() / experts.numel() * probabilities[:, e].mean()
    return total * E


def below_one_numpy(n_tokens, n_experts):
    p = np.zeros((n_tokens, n_experts))
    p[0, 0] = 1.0
    delta = 0.1 / (n_experts * n_tokens**2)
    p[1:] = (1 - delta) / n_experts
    p[1:, n_experts - 1] += delta
    return torch.tensor(p, dtype=torch.float32)


MODEL = {
    "rms_norm": (rms_norm_llama, rms_norm_norm),
    "layer_norm_backward": (backward_sums, backward_jacobian),
    "scale_hidden": (scale_hidden_diag, scale_hidden_loop),
    "most_layers": (most_layers_loop, most_layers_divmod),
    "cached_attention": (cached_used_only, cached_token_by_token),
    "keep_top_k": (top_k_sorted, top_k_in_place_on_copy),
    "keep_top_p": (top_p_shifted, top_p_ascending),
    "with_temperature": (temperature_shifted, temperature_double),
    "temperature_for": (temperature_for_newton, temperature_for_grid),
    "positions_of": (positions_loop, positions_argmax),
    "route_top_k": (route_sorted, route_mixtral),
    "balance_loss": (balance_bincount, balance_loop),
    "below_one": (below_one_numpy,),
}

# ------------------------------------------------------------------ data, tokenization, cleaning


def context_seen_definition(n_tokens, context, stride):
    if stride < 1 or stride >= context:
        raise ValueError
    ends = [min(context, n_tokens)]
    while ends[-1] < n_tokens:
        ends.append(min(n_tokens, ends[-1] + stride))
    first = lambda t: next(e for e in ends if e > t)
    return torch.as_tensor([t - max(0, first(t) - context) for t in range(1, n_tokens)], dtype=torch.int64)


def context_seen_formula(n_tokens, context, stride):
    if not (0 < stride < context):
        raise ValueError
    t = np.arange(1, n_tokens)
    windows = np.maximum(0, np.ceil((t + 1 - context) / stride))
    end = np.minimum(n_tokens, context + windows * stride)
    return torch.from_numpy((t - np.maximum(0, end - context)).astype(np.int64))


def stride_for_bisect(n_tokens, context, least):
    mean = lambda s: context_seen_definition(n_tokens, context, s).double().mean().item()
    good = [s for s in range(1, context) if mean(s) >= least]
    if len(good) == 0:
        raise ValueError
    return max(good)


def assign_parts_bisect(texts, shares):
    names, bounds = list(shares), list(itertools.accumulate(shares.values()))
    if not math.isclose(bounds[-1], 1.0, rel_tol=0, abs_tol=1e-9):
        raise ValueError
    place = lambda t: bisect.bisect_right(bounds, fraction(" ".join(w.group() for w in re.finditer(r"\w+", t.lower()))))
    return [names[min(place(t), len(names) - 1)] for t in texts]


def assign_parts_split(texts, shares):
    if abs(1 - math.fsum(shares.values())) > 1e-9:
        raise ValueError
    out = []
    for t in texts:
        words = " ".join(filter(None, re.split(r"\W+", t.lower())))
        x, chosen = fraction(words), None
        for name, share in shares.items():
            chosen = name
            if x < share:
                break
            x -= share
        out.append(chosen)
    return out


def leak_share_sets(train, test, n):
    if len(test) == 0:
        raise ValueError

    def grams(text):
        w = text.lower().split()
        return set(zip(*(w[i:] for i in range(n))))

    seen = set()
    for text in train:
        seen |= grams(text)
    return np.mean([bool(seen & grams(t)) for t in test])


def leak_share_joined(train, test, n):
    if not test:
        raise ValueError
    line = lambda text: "\x00" + "\x00".join(text.lower().split()) + "\x00"
    found = 0
    for text in test:
        w = text.lower().split()
        found += any(line(" ".join(w[i : i + n])) in line(t) for i in range(len(w) - n + 1) for t in train)
    return found / len(test)


def hidden_copy_numbers(text, n):
    words = text.split()
    taken, number = {w.lower() for w in words}, 0
    for i in range(len(words)):
        if (i + 1) % n == 0:
            while str(number) in taken:
                number += 1
            words[i] = str(number)
            taken.add(words[i])
    return " ".join(words)


def group_offset_sets(row, group, levels):
    values = row.tolist()
    for offset in range(group):
        starts = range(offset, len(values) - group + 1, group)
        if max(len(set(values[s : s + group])) for s in starts) <= levels:
            return offset
    raise ValueError


def group_offset_unfold(row, group, levels):
    for offset in range(group):
        groups = row[offset:].unfold(0, group, group).sort(-1).values
        if ((groups[:, 1:] != groups[:, :-1]).sum(-1) + 1 <= levels).all():
            return offset
    raise ValueError


DATA = {
    "context_seen": (context_seen_definition, context_seen_formula),
    "stride_for": (stride_for_bisect,),
    "assign_parts": (assign_parts_bisect, assign_parts_split),
    "leak_share": (leak_share_sets, leak_share_joined),
    "hidden_copy": (hidden_copy_numbers,),
    "group_offset": (group_offset_sets, group_offset_unfold),
}


def merge_pair_stack(ids, pair, new):
    out, used = [], False
    for t in ids:
        if out and not used and (out[-1], t) == tuple(pair):
            out[-1], used = new, True
        else:
            out.append(t)
            used = False
    return out


def merge_pair_iterator(ids, pair, new):
    rest, out = list(ids), []
    while rest:
        if len(rest) > 1 and rest[0] == pair[0] and rest[1] == pair[1]:
            out.append(new)
            rest = rest[2:]
        else:
            out.append(rest.pop(0))
    return out


def best_pair_dict(words):
    counts = defaultdict(int)
    for word, n in words.items():
        s = word.split(" ")
        for i in range(len(s) - 1):
            counts[s[i], s[i + 1]] += n
    if not counts:
        raise ValueError
    top = max(counts.values())
    left, right = sorted(p for p, n in counts.items() if n == top)[0]
    return left, right, top


def best_pair_heap(words):
    counts = Counter()
    for word, n in words.items():
        s = word.split()
        counts.update({p: n * m for p, m in Counter(itertools.pairwise(s)).items()})
    heap = [(-n, *p) for p, n in counts.items()]
    if not heap:
        raise ValueError
    heapq.heapify(heap)
    return heap[0][1], heap[0][2], -heap[0][0]


def encode_word_replay(word, merges):
    tokens = list(word)
    for a, b in merges:
        i, new = 0, []
        while i < len(tokens):
            if tokens[i : i + 2] == [a, b]:
                new.append(a + b)
                i += 2
            else:
                new.append(tokens[i])
                i += 1
        tokens = new
    return tokens


def encode_word_ranks(word, merges):
    ranks = dict(zip(merges, range(len(merges))))
    parts = [c for c in word]
    while len(parts) > 1:
        pair = min(set(itertools.pairwise(parts)), key=lambda p: ranks.get(p, INF))
        if pair not in ranks:
            break
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
            i += 1
    return parts


def exposing_word_recursive(merges, limit):
    letters = sorted(set("".join(a + b for a, b in merges)))
    known = set(letters) | {"".join(p) for p in merges}

    def longest(w):
        if not w:
            return []
        n = max(i for i in range(1, len(w) + 1) if w[:i] in known)
        return [w[:n], *longest(w[n:])]

    level = [""]
    for _ in range(limit):
        level = [w + c for w in level for c in letters]
        for w in level:
            if longest(w) != encode_word_replay(w, merges):
                return w
    return None


def bytes_per_token_loop(texts, tokens):
    b = t = 0
    for text, ids in zip(texts, tokens):
        b += len(bytes(text, "utf-8"))
        t += len(ids)
    if not t:
        raise ValueError
    return b / t


def pack_stream_loop(documents, separator, length):
    if length <= 0:
        raise ValueError
    chunks, now = [], []
    for d in documents:
        for token in [separator, *list(d)]:
            now.append(token)
            if len(now) == length:
                chunks.append(now)
                now = []
    return torch.tensor(chunks, dtype=torch.int64).reshape(-1, length), len(now)


def pack_stream_numpy(documents, separator, length):
    if length < 1:
        raise ValueError
    flat = np.fromiter(itertools.chain.from_iterable([separator, *d] for d in documents), dtype=np.int64)
    keep = len(flat) - len(flat) % length
    return torch.from_numpy(flat[:keep].reshape(-1, length).copy()), len(flat) % length


def unpack_stream_indices(chunks, separator):
    flat = chunks.reshape(-1)
    at = (flat == separator).nonzero().flatten().tolist()
    if len(flat) and (not at or at[0] != 0):
        raise ValueError
    return [flat[i + 1 : j].tolist() for i, j in zip(at, [*at[1:], len(flat)])]


def best_fit_loop(lengths, capacity):
    if any(n > capacity for n in lengths):
        raise ValueError
    chunks = []
    for n, i in sorted(((n, i) for i, n in enumerate(lengths)), key=lambda p: (-p[0], p[1])):
        best = None
        for c in chunks:
            if c[0] >= n and (best is None or c[0] < best[0]):
                best = c
        if best is None:
            best = [capacity, []]
            chunks.append(best)
        best[0] -= n
        best[1].append(i)
    return [c[1] for c in chunks]


TOKENIZATION = {
    "merge_pair": (merge_pair_stack, merge_pair_iterator),
    "best_pair": (best_pair_dict, best_pair_heap),
    "encode_word": (encode_word_replay, encode_word_ranks),
    "exposing_word": (exposing_word_recursive,),
    "bytes_per_token": (bytes_per_token_loop,),
    "pack_stream": (pack_stream_loop, pack_stream_numpy),
    "unpack_stream": (unpack_stream_indices,),
    "best_fit": (best_fit_loop,),
}


def minhash_objects(x, y, a, b, p):
    if len(x) == 0 or len(y) == 0:
        raise ValueError
    x, y = np.array(sorted(set(x)), dtype=object), np.array(y, dtype=object)
    return float(np.mean([((ak * x + bk) % p).min() == ((ak * y + bk) % p).min() for ak, bk in zip(a, b)]))


def similarity_search(bands, rows, recall):
    if bands < 1 or rows < 1 or recall <= 0 or recall >= 1:
        raise ValueError
    low, high = 0.0, 1.0
    for _ in range(200):
        s = (low + high) / 2
        low, high = (s, high) if 1 - (1 - s**rows) ** bands < recall else (low, s)
    return low


def make_rules_partial(limits):
    from functools import partial

    def rule(text, *, least, most):
        n = len(text.split())
        return n >= least and n <= most

    return {name: partial(rule, least=a, most=b) for name, (a, b) in limits.items()}


def make_rules_defaults(limits):
    rules = {}
    for name, (least, most) in limits.items():
        rules[name] = lambda text, least=least, most=most: len(text.split()) in range(least, most + 1)
    return rules


def drop_letters_mask(text, rate, generator):
    if rate < 0 or rate > 1:
        raise ValueError
    gone = torch.rand(len(text), generator=generator) < rate
    return "".join([c for i, c in enumerate(text) if not (gone[i] and c.isalpha())])


CLEANING = {
    "minhash_similarity": (minhash_objects,),
    "similarity_caught": (similarity_search,),
    "make_rules": (make_rules_partial, make_rules_defaults),
    "drop_letters": (drop_letters_mask,),
}

SHEETS = {"data": DATA, "tokenization": TOKENIZATION, "cleaning": CLEANING, "attention": ATTENTION, "model": MODEL}
TABLE = [(f"{s}.{name}", f) for s, table in SHEETS.items() for name, fs in table.items() for f in fs]


@pytest.mark.parametrize(("id", "answer"), TABLE, ids=[f"{i}-{f.__name__}" for i, f in TABLE])
def test_a_right_answer_of_another_kind_passes(id: str, answer) -> None:
    assert_passes(id, answer)


def test_every_exercise_has_an_answer_of_another_kind() -> None:
    for sheet, table in SHEETS.items():
        assert {ex.name for ex in checking.load_sheet(sheet).values()} == set(table)
