"""The optimizers chapter: lock-step with torch.optim, independent references, schedules, groups, bad input."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse import optim
from llmcourse.model import GPT, GPTConfig
from llmcourse.optim import (
    SGD,
    Adam,
    AdamW,
    Lion,
    Muon,
    MuonWithAdamW,
    RMSprop,
    adam_update,
    adamw_update,
    clip_by_norm,
    decay_groups,
    lion_update,
    lr_factor,
    make_optimizer,
    muon_update,
    orthogonalize,
    rmsprop_update,
    sgd_update,
)
from llmcourse.settings import BadInput

few = settings(max_examples=40, deadline=None)
SHAPES = [(), (1,), (7,), (3, 5), (5, 3), (2, 3, 4), (16, 16)]
MATRICES = [(4, 4), (3, 8), (8, 3), (32, 20), (1, 5)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}

# class, its options; with these torch.optim has a class of the same name
PAIRS = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (SGD, {"momentum": 0.9, "dampening": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (RMSprop, {}),
    (RMSprop, {"alpha": 0.9, "weight_decay": 0.1, "eps": 1e-4}),
    (RMSprop, {"momentum": 0.9}),
    (RMSprop, {"centered": True}),
    (RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (Adam, {}),
    (Adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, {"betas": (0.0, 0.0)}),
    (AdamW, {}),
    (AdamW, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.0}),
]
ids = [f"{c.__name__}-{'-'.join(o) or 'default'}" for c, o in PAIRS]


def parameters(shapes, dtype, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def noisy_gradients(params, generator) -> list[torch.Tensor]:
    """Gradients of very different sizes, that depend on the parameters: an error would feed on itself."""
    scale = [10.0 ** (i % 5 - 2) for i in range(len(params))]
    return [
        s * (p.detach().double() + torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for s, p in zip(scale, params)
    ]


def together(first, second, params1, params2, *, steps=100, schedule=lambda t: 1.0, seed=1) -> float:
    """Largest difference between the parameters of two optimizers that are fed the same noise."""
    lr, worst = [g["lr"] for g in first.param_groups], 0.0
    for t in range(steps):
        for params in (params1, params2):
            generator = torch.Generator().manual_seed(seed + t)
            for p, g in zip(params, noisy_gradients(params, generator)):
                p.grad = g
        for o in (first, second):
            for group, peak in zip(o.param_groups, lr):
                group["lr"] = peak * schedule(t)
            o.step()
        worst = max(
            [worst]
            + [
                float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1))
                for a, b in zip(params1, params2)
            ]
        )
    return worst


# ----------------------------------------------------------------------- lock-step with torch.optim


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("ours", "options"), PAIRS, ids=ids)
def test_lock_step_with_torch(ours, options, dtype):
    a, b = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    theirs = getattr(torch.optim, ours.__name__)
    assert together(ours(a, lr=3e-3, **options), theirs(b, lr=3e-3, **options), a, b) <= TOLERANCE[dtype]
    assert not any(torch.equal(p, q) for p, q in zip(a, parameters(SHAPES, dtype)))  # and they did move


@pytest.mark.parametrize(("ours", "options"), PAIRS, ids=ids)
def test_lock_step_under_a_schedule(ours, options):
    a, b = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    theirs = getattr(torch.optim, ours.__name__)
    schedule = lambda t: lr_factor(t, total=100, warmup=10, final=0.0)
    assert together(ours(a, lr=1e-2, **options), theirs(b, lr=1e-2, **options), a, b, schedule=schedule) <= 1e-10


@pytest.mark.parametrize(
    ("ours", "options"),
    [*PAIRS, (Lion, {"weight_decay": 0.1}), (Muon, {"ns_dtype": torch.float64})],
    ids=[*ids, "Lion", "Muon"],
)
def test_pieces_change_nothing(ours, options, monkeypatch):
    """Tensors that are cut, joined, not contiguous: the same numbers."""
    shapes = [(40, 30), (7, 3), (5, 5), (64, 10)]
    a, b = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    b[0] = nn.Parameter(b[0].detach().t().contiguous().t())
    assert not b[0].is_contiguous()
    first, second = ours(a, lr=1e-2, **options), ours(b, lr=1e-2, **options)
    step = first.step

    def small_pieces():
        with monkeypatch.context() as m:
            m.setattr(optim, "_PIECE", 37)
            step()

    first.step = small_pieces
    assert together(first, second, a, b, steps=12) <= 1e-12


def test_muon_is_torchs_muon_bit_for_bit():
    """The same bfloat16 products in the same order: no difference at all, in any option."""
    for options in (
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
        {"adjust_lr_fn": "original", "ns_steps": 3},
    ):
        a, b = parameters(MATRICES, torch.float32), parameters(MATRICES, torch.float32)
        assert together(Muon(a, lr=0.02, **options), torch.optim.Muon(b, lr=0.02, **options), a, b) == 0.0


def test_stacked_muon_is_torchs_muon_to_bfloat16():
    """Matrices of one shape are multiplied as a stack, whose sums may run in another order.

    So a bit of bfloat16 differs now and then.
    """
    shapes = [(4, 4), (8, 3), (4, 4), (4, 4), (8, 3), (16, 64)]
    a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    assert together(Muon(a, lr=0.02), torch.optim.Muon(b, lr=0.02), a, b) <= 1e-2  # half of one step after a hundred


def test_a_torch_optimizer_goes_on_from_our_state_and_back():
    for ours, options in (
        (SGD, {"momentum": 0.9}),
        (RMSprop, {"momentum": 0.9, "centered": True}),
        (AdamW, {}),
        (Muon, {}),
    ):
        shapes, theirs = MATRICES if ours is Muon else SHAPES, getattr(torch.optim, ours.__name__)
        a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
        first, second = ours(a, lr=1e-2, **options), theirs(b, lr=1e-2, **options)
        together(first, second, a, b, steps=5)
        swapped1, swapped2 = theirs(a, lr=1e-2, **options), ours(b, lr=1e-2, **options)
        swapped1.load_state_dict(copy.deepcopy(first.state_dict()))
        swapped2.load_state_dict(copy.deepcopy(second.state_dict()))
        assert together(swapped1, swapped2, a, b, steps=20, seed=50) <= 1e-6
    a = parameters(SHAPES, torch.float32)
    with pytest.raises(BadInput, match="amsgrad"):
        AdamW(a).load_state_dict(torch.optim.AdamW(a, amsgrad=True).state_dict())


# ------------------------------------------------------------- the pure functions are the reference


@pytest.mark.parametrize("seed", range(3))
def test_classes_do_what_the_functions_say(seed):
    p0 = parameters([(6, 4)], torch.float64, seed)[0].detach()
    gs = [
        torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + t))
        for t in range(20)
    ]
    zero = torch.zeros_like(p0)
    rules = {
        SGD(nn_ := [nn.Parameter(p0.clone())], lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1): (
            nn_,
            lambda p, g, s, t: sgd_update(p, g, *s, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
            (None,),
        ),
        RMSprop(nn_ := [nn.Parameter(p0.clone())], lr=0.1, momentum=0.9, centered=True): (
            nn_, lambda p, g, s, t: rmsprop_update(p, g, *s, lr=0.1, momentum=0.9, centered=True), (zero, None, None),
        ),
        Adam(nn_ := [nn.Parameter(p0.clone())], lr=0.1, weight_decay=0.1): (
            nn_, lambda p, g, s, t: adam_update(p, g, *s, t, lr=0.1, weight_decay=0.1), (zero, zero),
        ),
        AdamW(nn_ := [nn.Parameter(p0.clone())], lr=0.1, weight_decay=0.1): (
            nn_, lambda p, g, s, t: adamw_update(p, g, *s, t, lr=0.1, weight_decay=0.1), (zero, zero),
        ),
        Lion(nn_ := [nn.Parameter(p0.clone())], lr=0.1, weight_decay=0.1): (
            nn_, lambda p, g, s, t: lion_update(p, g, *s, lr=0.1, weight_decay=0.1), (zero,),
        ),
        Muon(nn_ := [nn.Parameter(p0.clone())], lr=0.1, ns_dtype=None): (
            nn_, lambda p, g, s, t: muon_update(p, g, *s, lr=0.1, ns_dtype=None), (zero,),
        ),
    }  # fmt: skip
    for optimizer, ((param,), function, memory) in rules.items():
        p = p0
        for t, g in enumerate(gs, 1):
            before = [x.clone() for x in (p, g)]
            new, *memory = function(p, g, memory, t)
            assert torch.equal(p, before[0]) and torch.equal(g, before[1])  # inputs are left alone
            p, param.grad = new, g.clone()
            optimizer.step()
            assert torch.equal(param.grad, g)  # and so are gradients
            assert torch.allclose(param, p, rtol=1e-12, atol=1e-12), (type(optimizer).__name__, t)


def test_worked_example():
    """One first step on a 2 × 2 matrix, by hand."""
    W, G = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, -0.2], [4.0, 0.0]])
    zero, new = torch.zeros(2, 2), lambda *rows: torch.tensor(rows)
    assert torch.allclose(sgd_update(W, G, lr=0.5)[0], new([1.0, 2.1], [1.0, 4.0]))
    assert torch.allclose(adam_update(W, G, zero, zero, 1, lr=0.5)[0], new([1.0, 2.5], [2.5, 4.0]))
    assert torch.allclose(adamw_update(W, G, zero, zero, 1, lr=0.5, weight_decay=0.2)[0], new([0.9, 2.3], [2.2, 3.6]))
    assert torch.allclose(lion_update(W, G, zero, lr=0.5)[0], new([1.0, 2.5], [2.5, 4.0]))
    assert torch.allclose(rmsprop_update(W, G, zero, lr=0.5, alpha=0.75)[0], new([1.0, 3.0], [2.0, 4.0]))
    exact = muon_update(
        W,
        G,
        zero,
        lr=0.5,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        ns_coefficients=(1.5, -0.5, 0.0),
        ns_steps=60,
        ns_dtype=torch.float64,
    )[0]
    assert torch.allclose(
        exact.float(), new([1.0, 2.5], [2.5, 4.0]), atol=1e-6
    )  # the cubic iteration converges to U Vᵀ


def lion_paper(w, g, m, eta, beta1, beta2, lam):
    """Algorithm 2 of Chen et al. (2023), number by number, in Python's own floats."""
    c = beta1 * m + (1 - beta1) * g
    w = w - eta * ((c > 0) - (c < 0) + lam * w)
    m = beta2 * m + (1 - beta2) * g
    return w, m


def test_lion_against_the_paper():
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((3, 4), (5,))]
    numbers = [[(float(x), 0.0) for x in p.detach().flatten()] for p in params]
    optimizer = Lion(params, lr=0.01, betas=(0.95, 0.98), weight_decay=0.3)
    for _ in range(100):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            numbers[i] = [
                lion_paper(w, float(g), m, 0.01, 0.95, 0.98, 0.3) for (w, m), g in zip(numbers[i], p.grad.flatten())
            ]
        optimizer.step()
        for p, row in zip(params, numbers):
            assert torch.allclose(
                p.detach().flatten(), torch.tensor([w for w, _ in row], dtype=torch.float64), rtol=0, atol=1e-10
            )


def newton_schulz_by_svd(G, coefficients, steps):
    """U p(…p(S)) Vᵀ in float64, the polynomial applied to numbers: no matrix products of the iteration."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    x = S / S.norm()
    a, b, c = coefficients
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return (U * x) @ Vh


@pytest.mark.parametrize("shape", [*MATRICES, (64, 64), (64, 256), (200, 50)], ids=str)
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_orthogonalize_against_the_svd(shape, steps):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * 1e3
    want = newton_schulz_by_svd(G, optim.NS_COEFFICIENTS, steps)
    assert torch.allclose(orthogonalize(G, steps=steps), want, rtol=0, atol=1e-10)
    assert torch.allclose(orthogonalize(G.float(), steps=steps).double(), want, rtol=0, atol=2e-4)
    if steps == 5:
        # bfloat16 has eight bits: products of norm about 1 are off by about a hundredth
        assert float((orthogonalize(G, dtype=torch.bfloat16).double() - want).norm() / want.norm()) < 0.05


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.floats(-6, 6))
@few
def test_orthogonalize_singular_values(m, n, seed, power):
    """Every singular value above 0.005 of the norm ends in the stated band, at any size; shape and sign survive."""
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**power
    O, S = orthogonalize(G), torch.linalg.svdvals(G)
    assert O.shape == G.shape
    ends = torch.linalg.svdvals(O)
    if float((S / S.norm()).min()) > 0.005:
        assert float(ends.min()) > 0.68 and float(ends.max()) < 1.16
    assert float((O * G).sum()) > 0  # points where G points
    assert torch.allclose(orthogonalize(-G), -O) and torch.allclose(orthogonalize(G.T), O.T, atol=1e-9)


def test_the_cubic_iteration_converges_to_the_exact_factor():
    G = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert torch.allclose(orthogonalize(G, coefficients=(1.5, -0.5, 0.0), steps=40), U @ Vh, atol=1e-12)


def test_muon_class_against_the_svd():
    """100 steps of the class in float64 against momentum by hand and the polynomial on the singular values."""
    params = parameters(MATRICES[:4], torch.float64)
    mirror, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = Muon(params, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", ns_dtype=None)
    for t in range(100):
        for p, g in zip(params, noisy_gradients(params, torch.Generator().manual_seed(t))):
            p.grad = g
        for i, p in enumerate(params):
            buffers[i] = 0.9 * buffers[i] + 0.1 * p.grad
            step = newton_schulz_by_svd(0.9 * buffers[i] + 0.1 * p.grad, optim.NS_COEFFICIENTS, 5)
            mirror[i] = (1 - 0.02 * 0.1) * mirror[i] - 0.02 * 0.2 * math.sqrt(max(p.shape)) * step
        optimizer.step()
    for p, m in zip(params, mirror):
        assert torch.allclose(p, m, rtol=0, atol=1e-8)


def test_a_stack_is_its_matrices():
    G = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (None, torch.bfloat16, torch.float64):
        assert torch.allclose(
            orthogonalize(G, dtype=dtype), torch.stack([orthogonalize(g, dtype=dtype) for g in G]), atol=1e-6
        )


def test_zero_gradient():
    for optimizer in (Lion, Muon, AdamW, RMSprop):
        p = nn.Parameter(torch.ones(3, 3))
        p.grad = torch.zeros(3, 3)
        optimizer([p], lr=0.1, weight_decay=0.0).step()
        assert torch.equal(p, torch.ones(3, 3)), optimizer


def test_centered_rmsprop_with_a_constant_gradient_stays_finite():
    """The running variance of a constant is zero, and in float32 it comes out below zero now and then."""
    p = nn.Parameter(torch.zeros(64))
    optimizer = RMSprop([p], lr=1e-3, centered=True, alpha=0.9)
    g = torch.rand(64, generator=torch.Generator().manual_seed(0))
    for _ in range(400):
        p.grad = g.clone()
        optimizer.step()
    assert torch.isfinite(p).all()


# ------------------------------------------------------------------------ decay, L2, the state


def test_decoupled_decay_and_l2_differ_for_adam_and_agree_for_sgd():
    shapes = [(5, 4)]
    a, b = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    assert together(Adam(a, lr=1e-2, weight_decay=0.1), AdamW(b, lr=1e-2, weight_decay=0.1), a, b) > 1e-2
    # plain SGD: θ - η(g + λθ) = (1 - ηλ)θ - ηg
    c, d = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    coupled = SGD(c, lr=1e-2, weight_decay=0.1)

    class Decoupled(SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in d:
                    p.mul_(1 - 1e-2 * 0.1)
            return super().step(closure)

    gs = [torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t)) for t in range(50)]
    decoupled = Decoupled(d, lr=1e-2)
    for g in gs:
        c[0].grad, d[0].grad = g.clone(), g.clone()
        coupled.step()
        decoupled.step()
    assert torch.allclose(c[0], d[0], rtol=0, atol=1e-13)


EVERY = [
    ("sgd", {"momentum": 0.9}),
    ("rmsprop", {"centered": True, "momentum": 0.9}),
    ("adam", {}),
    ("adamw", {"betas": (0.9, 0.95)}),
    ("lion", {}),
    ("muon", {}),
]


def small_model(seed=0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, context=16, norm="layer", ffn="gelu"))


def train(model, optimizer, start, stop) -> None:
    for t in range(start, stop):
        ids = torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(t))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_by_norm(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(t, total=20, warmup=3)
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[n for n, _ in EVERY])
def test_state_round_trips_in_the_middle_of_training(name, options):
    """Stop after 7 steps, through a file that runs no code when it is read, and go on: bit for bit the same."""
    straight = small_model()
    train(straight, make_optimizer(straight, name, lr=1e-3, weight_decay=0.1, **options), 0, 14)

    model = small_model()
    optimizer = make_optimizer(model, name, lr=1e-3, weight_decay=0.1, **options)
    train(model, optimizer, 0, 7)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = small_model(seed=99)
    model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model, name, lr=1e-3, weight_decay=0.1, **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 7, 14)
    for (key, a), b in zip(straight.state_dict().items(), model.state_dict().values()):
        assert torch.equal(a, b), key


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[n for n, _ in EVERY])
def test_every_optimizer_learns(name, options):
    model = small_model()
    optimizer = make_optimizer(model, name, lr=0.1 if name == "sgd" else 3e-3, **options)
    ids = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_parameters_without_gradient_and_late_parameters():
    """A parameter that joins late has its own count of steps, so its bias correction is that of a first step."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adam([a, b], lr=0.1)
    for _ in range(5):
        a.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(b, torch.ones(3)) and b not in optimizer.state
    b.grad = torch.full((3,), 5.0)
    optimizer.step()
    assert (
        torch.allclose(b, torch.full((3,), 0.9))
        and int(optimizer.state[b]["step"]) == 1
        and int(optimizer.state[a]["step"]) == 6
    )


def test_copy_of_an_optimizer():
    model = small_model()
    optimizer = make_optimizer(model, "muon", lr=1e-3)
    train(model, optimizer, 0, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, 4)
    train(twin_model, twin, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))
    assert all(
        s["step"].device.type == "cpu" and s["step"].dtype == torch.float32 for s in twin.state.values() if "step" in s
    )


def test_closure_and_torchs_schedulers():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([p], lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_factor(t, total=4, kind="linear", final=0.0))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and p.item() == 1.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * 2 / 3)


# ------------------------------------------------------------------------------------- schedules


def test_lr_factor_by_hand():
    at = lambda **o: [round(lr_factor(t, **o), 6) for t in range(o["total"])]
    assert at(total=4, kind="constant") == [1, 1, 1, 1]
    assert at(total=6, warmup=2, kind="constant") == [0.5, 1, 1, 1, 1, 1]
    assert at(total=5, kind="linear", final=0.0) == [1, 0.75, 0.5, 0.25, 0]
    assert at(total=7, warmup=2, kind="linear", final=0.2) == [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert at(total=5, kind="cosine", final=0.0) == [
        1,
        round((1 + math.sqrt(0.5)) / 2, 6),
        0.5,
        round((1 - math.sqrt(0.5)) / 2, 6),
        0,
    ]
    assert at(total=10, warmup=2, kind="wsd", final=0.0, decay=0.4) == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert at(total=1) == [1] and at(total=2, warmup=2) == [0.5, 1] and at(total=3, warmup=2) == [0.5, 1, 1]
    assert lr_factor(10**6, total=5, final=0.3) == pytest.approx(0.3)


@given(st.integers(1, 300), st.data())
@few
def test_lr_factor_properties(total, data):
    warmup = data.draw(st.integers(0, total))
    kind = data.draw(st.sampled_from(["constant", "linear", "cosine", "wsd"]))
    final, decay = data.draw(st.floats(0, 1)), data.draw(st.floats(0.01, 1))
    f = [lr_factor(t, total=total, warmup=warmup, kind=kind, final=final, decay=decay) for t in range(total + 3)]
    assert all(0 <= x <= 1 for x in f)
    if warmup:
        assert f[0] == 1 / warmup and f[warmup - 1] == 1.0
    assert all(b >= a for a, b in itertools.pairwise(f[:warmup])) and all(
        b <= a + 1e-12 for a, b in itertools.pairwise(f[warmup:])
    )
    if kind == "constant":
        assert set(f[warmup:]) == {1.0}
    elif total > warmup + 1:
        assert f[total - 1] == pytest.approx(final) and f[total + 2] == pytest.approx(final)


@pytest.mark.parametrize(
    ("name", "change"),
    [("step", {"step": -1}), ("step", {"step": 1.5}), ("total", {"total": 0}),
     ("warmup", {"warmup": 11}), ("warmup", {"warmup": -1}), ("kind", {"kind": "cosinus"}),
     ("final", {"final": 1.5}), ("final", {"final": math.nan}), ("decay", {"decay": 0})],
)  # fmt: skip
def test_lr_factor_refuses(name, change):
    options = {"step": 0, "total": 10, "kind": "wsd"} | change
    with pytest.raises(BadInput, match=rf"^{name} is "):
        lr_factor(options.pop("step"), **options)


# -------------------------------------------------------------------------------------- clipping


@given(
    st.lists(st.sampled_from([(), (3,), (4, 5), (2, 2, 2)]), min_size=1, max_size=5),
    st.floats(-3, 3),
    st.floats(0.01, 100),
    st.integers(0, 1000),
)
@few
def test_clip_is_torchs(shapes, power, max_norm, seed):
    a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    for params in (a, b):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10**power
    norm, want = clip_by_norm(a, max_norm), torch.nn.utils.clip_grad_norm_(b, max_norm)
    assert torch.equal(norm, want) and all(torch.equal(p.grad, q.grad) for p, q in zip(a, b))
    assert float(torch.cat([p.grad.flatten() for p in a]).norm()) <= max_norm * (1 + 1e-5)


def test_clip_special_cases():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert clip_by_norm([p, q], 1.0).item() == 0  # no gradient anywhere
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_by_norm(p, math.inf).item() == 5 and p.grad.tolist() == [3, 4]
    assert clip_by_norm(iter([p, q]), 1.0).item() == 5 and torch.allclose(p.grad, torch.tensor([0.6, 0.8]))
    for bad in (math.nan, math.inf):
        p.grad, q.grad = torch.tensor([3.0, bad]), torch.tensor([1.0, 2.0])
        assert not math.isfinite(clip_by_norm([p, q], 1.0))
        assert p.grad[0] == 3 and q.grad.tolist() == [1, 2]  # untouched: torch's would have made them all NaN or 0
    half = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    half.grad = torch.full((4,), 2.0, dtype=torch.bfloat16)
    assert (
        clip_by_norm([half], 1.0).dtype == torch.float32 and half.grad.dtype == torch.bfloat16 and half.grad[0] == 0.5
    )
    for bad in (0, -1, math.nan, "1", True):
        with pytest.raises(BadInput, match=r"^max_norm is "):
            clip_by_norm([p], bad)


# ---------------------------------------------------------------------------------------- groups


def test_decay_groups():
    model = small_model()
    decays, rest = decay_groups(model, 0.1)
    assert decays["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decays["params"]) and all(p.ndim == 1 for p in rest["params"])
    assert model.head.weight is model.embed.weight
    assert sum(p is model.embed.weight for p in decays["params"]) == 1
    found = [p for g in (decays, rest) for p in g["params"]]
    assert len(found) == len(set(map(id, found))) == len(list(model.parameters()))
    for p in rest["params"]:
        p.requires_grad_(False)
    assert [g["weight_decay"] for g in decay_groups(model, 0.1)] == [0.1]
    for p in decays["params"]:
        p.requires_grad_(False)
    with pytest.raises(BadInput, match="trainable"):
        decay_groups(model, 0.1)
    with pytest.raises(BadInput, match="weight_decay"):
        decay_groups(small_model(), -0.1)


def test_make_optimizer_muon():
    model = small_model()
    optimizer = make_optimizer(model, "muon", lr=0.01, weight_decay=0.1, adamw_lr=0.002, momentum=0.9)
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw, rest = optimizer.param_groups
    assert (
        muon["use_muon"]
        and muon["lr"] == 0.01
        and muon["momentum"] == 0.9
        and muon["adjust_lr_fn"] == "match_rms_adamw"
    )
    assert (
        not adamw["use_muon"] and adamw["lr"] == 0.002 and adamw["betas"] == (0.9, 0.95) and rest["weight_decay"] == 0
    )
    assert {id(p) for p in muon["params"]} == {id(p) for b in model.blocks for p in b.parameters() if p.ndim == 2}
    assert [id(p) for p in adamw["params"]] == [id(model.embed.weight)]
    # the joined object is the two parts, step by step
    other = small_model()
    matrices = [p for b in other.blocks for p in b.parameters() if p.ndim == 2]
    parts = [Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
             AdamW([other.embed.weight], lr=0.002, betas=(0.9, 0.95), weight_decay=0.1),
             AdamW([p for p in other.parameters() if p.ndim == 1],
                   lr=0.002, betas=(0.9, 0.95), weight_decay=0.0)]  # fmt: skip
    for t in range(5):
        for m, optimizers in ((model, [optimizer]), (other, parts)):
            m.zero_grad()
            ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(t))
            nn.functional.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            for o in optimizers:
                o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_make_optimizer_untied_head_is_not_muons():
    model = GPT(GPTConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, context=16, tied=False))
    muon = make_optimizer(model, "muon", lr=0.01).param_groups[0]
    assert muon["use_muon"] and not {id(model.head.weight), id(model.embed.weight)} & {id(p) for p in muon["params"]}


def test_make_optimizer_refuses():
    model = small_model()
    with pytest.raises(BadInput, match=r"^name is 'adamax'"):
        make_optimizer(model, "adamax", lr=0.1)
    with pytest.raises(BadInput, match=r"^option of the optimizer is 'beta'; allowed: betas, eps"):
        make_optimizer(model, "adamw", lr=0.1, beta=0.9)
    with pytest.raises(BadInput, match=r"^option of the optimizer is 'betas'"):
        make_optimizer(model, "muon", lr=0.1, betas=(0.9, 0.95))
    with pytest.raises(BadInput, match="numbered blocks"):
        make_optimizer(nn.Linear(3, 3), "muon", lr=0.1)
    with pytest.raises(BadInput, match=r"^lr is "):
        make_optimizer(model, "muon", lr=0.1, adamw_lr=-1)


BAD = [({"lr": lr}, "lr") for lr in (0, 0.0, -1e-3, math.nan, math.inf, "0.1", True, None)]
SPECIAL = [
    (SGD, {"momentum": 1.0}, "momentum"), (SGD, {"momentum": -0.1}, "momentum"),
    (SGD, {"dampening": 1.5}, "dampening"), (SGD, {"weight_decay": -1}, "weight_decay"),
    (SGD, {"nesterov": True}, "nesterov"), (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
    (RMSprop, {"alpha": 1.0}, "alpha"), (RMSprop, {"eps": -1e-8}, "eps"), (RMSprop, {"eps": math.nan}, "eps"),
    (Adam, {"betas": (1.0, 0.9)}, "betas"), (Adam, {"betas": (0.9, 1.0)}, "betas"), (Adam, {"betas": (0.9,)}, "betas"),
    (Adam, {"betas": 0.9}, "betas"), (Adam, {"betas": (math.nan, 0.9)}, "betas"),
    (AdamW, {"weight_decay": math.inf}, "weight_decay"), (Lion, {"betas": (-0.1, 0.9)}, "betas"),
    (Muon, {"momentum": 1.0}, "momentum"), (Muon, {"ns_steps": 0}, "ns_steps"), (Muon, {"ns_steps": 2.5}, "ns_steps"),
    (Muon, {"ns_coefficients": (1, 2)}, "ns_coefficients"), (Muon, {"adjust_lr_fn": "rms"}, "adjust_lr_fn"),
    (Muon, {"ns_dtype": "bfloat16"}, "ns_dtype"), (Muon, {"ns_dtype": torch.int8}, "ns_dtype"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "options", "name"), [(r, o, n) for r in (SGD, RMSprop, Adam, AdamW, Lion, Muon) for o, n in BAD] + SPECIAL
)
def test_bad_settings_are_refused(rule, options, name):
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(BadInput, match=rf"^{name}(\[\d\])? is "):
        rule([p], **options)
    # a group may have settings of its own, and they are looked at too; the group is not kept
    good = rule([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(BadInput, match=rf"^{name}(\[\d\])? is "):
        good.add_param_group({"params": [p], **options})
    assert len(good.param_groups) == 1


def test_bad_parameters_are_refused():
    for shape in ((3,), (2, 2, 2)):
        with pytest.raises(BadInput, match="two dimensions"):
            Muon([nn.Parameter(torch.ones(shape))])
    with pytest.raises(BadInput, match="dtype of a parameter"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="empty"):
        AdamW([])
    with pytest.raises(BadInput, match="use_muon"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.ones(2, 2))]}])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(BadInput, match="sparse"):
        SGD(table.parameters(), lr=0.1).step()
    with pytest.raises(BadInput, match="shape of matrix"):
        orthogonalize(torch.ones(3))


def test_quick_benchmark(tmp_path) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "optim.py"
    out = tmp_path / "optim.json"
    job = subprocess.run(
        [sys.executable, script, "--quick", "--device", "cpu", "--out", out],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    result = json.loads(out.read_text(encoding="utf8"))
    assert {"AdamW", "SGD", "Lion"} <= set(result["rules"])
    for rule in result["rules"].values():
        assert all(row["low"] <= row["ratio"] <= row["high"] and row["ms"] > 0 for row in rule["rows"].values())
    assert set(result["rules"]["AdamW"]["rows"]) == {
        "torch default",
        "torch default again",
        "torch foreach",
        "torch fused",
        "llmcourse",
    }
    assert platform.node() not in out.read_text(encoding="utf8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("ours", "options"), PAIRS, ids=ids)
def test_lock_step_on_a_gpu(ours, options):
    a, b = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    a, b = [nn.Parameter(p.detach().cuda()) for p in a], [nn.Parameter(p.detach().cuda()) for p in b]
    first, second = ours(a, lr=3e-3, **options), getattr(torch.optim, ours.__name__)(b, lr=3e-3, **options)
    for t in range(100):
        for params in (a, b):
            generator = torch.Generator().manual_seed(t)
            for p in params:
                p.grad = p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64).cuda()
        first.step()
        second.step()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(a, b))
