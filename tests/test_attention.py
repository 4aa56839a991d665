"""Attention: properties over random shapes, masks and block sizes, and what the chapter promises in words."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmcourse import attention as A
from llmcourse.settings import BadInput

TOL = {"rtol": 1e-5, "atol": 1e-5}
few = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 17)
seeds = st.integers(0, 2**31 - 1)


def tensors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def value_and_gradients(fn, *inputs):
    out = fn(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def same(ours, theirs, *inputs, **tol) -> None:
    for a, b in zip(value_and_gradients(ours, *inputs), value_and_gradients(theirs, *inputs), strict=True):
        assert torch.isfinite(a).all()
        assert_close(a, b, **(tol or TOL))


@st.composite
def problems(draw, square: bool = False):
    """q, k, v and a random mask: grouped heads, fewer queries than keys, rows that see nothing."""
    groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    S = draw(sizes)
    T = S if square else draw(st.integers(1, S))
    B, D, C, seed = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(seeds)
    q, k, v = tensors(seed, (B, groups * shared, T, D), (B, groups, S, D), (B, groups, S, C))
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(seed)) < draw(
        st.sampled_from([0.2, 0.6, 1.0])
    )
    return q, k, v, mask


# ------------------------------------------------------------------------------------- one answer


class TestTiled:
    @few
    @given(problems(), st.integers(1, 20), st.integers(1, 20), st.booleans())
    def test_equals_naive_whatever_the_tiles(self, problem, block_q: int, block_k: int, causal: bool) -> None:
        q, k, v, mask = problem
        both = mask & A.causal_mask(q.shape[2], k.shape[2]) if causal else mask
        same(
            lambda q, k, v: A.tiled_attention(q, k, v, mask=mask, causal=causal, block_q=block_q, block_k=block_k),
            lambda q, k, v: A.naive_attention(q, k, v, mask=both),
            q, k, v,
        )  # fmt: skip

    def test_gradcheck(self) -> None:
        q, k, v = tensors(0, (1, 4, 3, 2), (1, 2, 5, 2), (1, 2, 5, 3), dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *x: A.tiled_attention(*x, causal=True, block_q=2, block_k=2), (q, k, v))

    @pytest.mark.parametrize("offset", [-1e4, 1e4])
    def test_large_scores_do_not_overflow(self, offset: float) -> None:
        q, k, v = tensors(1, (1, 1, 5, 4), (1, 1, 9, 4), (1, 1, 9, 4))
        q, k = q.detach() * 100 + offset, k.detach() * 100
        assert_close(
            A.tiled_attention(q, k, v, block_k=2), F.scaled_dot_product_attention(q, k, v), rtol=1e-3, atol=1e-3
        )

    def test_half_precision_sums_in_float32(self) -> None:
        q, k, v = (x.detach() for x in tensors(2, (1, 2, 64, 16), (1, 2, 64, 16), (1, 2, 64, 16)))
        exact = A.naive_attention(q, k, v)
        out = A.tiled_attention(*(x.bfloat16() for x in (q, k, v)), block_k=8)
        assert out.dtype == torch.bfloat16
        assert_close(out.float(), exact, rtol=0.05, atol=0.02)  # bfloat16 keeps 8 bits of a number

    def test_no_tensor_with_all_pairs_is_made(self) -> None:
        """Every intermediate is recorded: none may have T × T entries or more, forward or backward."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for x in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(x, torch.Tensor):
                        self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
                return out

        T = 256
        q, k, v = tensors(3, *[(1, 1, T, 8)] * 3)
        found = {}
        for name, fn in (
            ("tiled", lambda: A.tiled_attention(q, k, v, causal=True, block_q=32, block_k=32)),
            ("naive", lambda: A.naive_attention(q, k, v)),
        ):
            with Largest() as largest:
                torch.autograd.grad(fn().sum(), (q, k, v))
            found[name] = largest.size
        assert found["naive"] >= T * T  # the recorder sees what it should see
        assert found["tiled"] <= T * 8


class TestNaive:
    @few
    @given(problems())
    def test_equals_pytorch(self, problem) -> None:
        q, k, v, mask = problem
        n = q.shape[1] // k.shape[1]
        same(
            lambda q, k, v: A.naive_attention(q, k, v, mask=mask),
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), attn_mask=mask
            ),
            q, k, v,
        )  # fmt: skip

    @few
    @given(problems())
    def test_rows_are_shares_or_zero(self, problem) -> None:
        q, k, _, mask = problem
        w = A.attention_weights(q, k, mask=mask)
        sees = mask.any(-1).expand(w.shape[:-1])
        assert_close(w.sum(-1), sees.float(), **TOL)
        assert not w[~mask.expand_as(w)].any()

    @few
    @given(problems(square=True), seeds)
    def test_permutation_equivariant_without_a_mask(self, problem, seed: int) -> None:
        q, k, v, _ = problem
        order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
        out = A.naive_attention(q, k, v)
        assert_close(A.naive_attention(q, k[:, :, order], v[:, :, order]), out, **TOL)
        assert_close(A.naive_attention(q[:, :, order], k[:, :, order], v[:, :, order]), out[:, :, order], **TOL)

    @few
    @given(problems(square=True))
    def test_causal_answers_do_not_depend_on_the_future(self, problem) -> None:
        q, k, v, _ = problem
        T = q.shape[2]
        short = T // 2 + 1
        for attend in (
            lambda q, k, v: A.naive_attention(q, k, v, mask=A.causal_mask(q.shape[2])),
            lambda q, k, v: A.tiled_attention(q, k, v, causal=True, block_q=4, block_k=3),
            lambda q, k, v: A.windowed_attention(q, k, v, window=3),
            lambda q, k, v: A.linear_attention(q, k, v, chunk=4),
        ):
            assert_close(
                attend(q, k, v)[:, :, :short], attend(q[:, :, :short], k[:, :, :short], v[:, :, :short]), **TOL
            )

    def test_cached_keys_give_the_same_as_all_at_once(self) -> None:
        q, k, v = tensors(4, *[(2, 2, 9, 4)] * 3)
        everything = A.naive_attention(q, k, v, mask=A.causal_mask(9))
        assert_close(A.naive_attention(q[:, :, 6:], k, v, mask=A.causal_mask(3, 9)), everything[:, :, 6:], **TOL)
        assert_close(A.tiled_attention(q[:, :, 6:], k, v, causal=True, block_k=4), everything[:, :, 6:], **TOL)


class TestRowsThatSeeNothing:
    @pytest.mark.parametrize("attend", [A.naive_attention, A.tiled_attention])
    def test_zeros_and_zero_gradient(self, attend) -> None:
        q, k, v = tensors(5, *[(1, 2, 4, 3)] * 3)
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[2] = False
        out, dq, _dk, _dv = value_and_gradients(lambda *x: attend(*x, mask=mask), q, k, v)
        assert not out[:, :, 2].any() and out[:, :, 1].any()
        assert not dq[:, :, 2].any() and dq[:, :, 1].any()

    def test_softmax_of_nothing(self) -> None:
        assert A.stable_softmax(torch.full((2, 3), -math.inf)).tolist() == [[0.0] * 3] * 2
        assert torch.isnan(A.stable_softmax(torch.tensor([math.nan, 0.0]))).all()  # a real nan is not hidden


# ---------------------------------------------------------------------------------- online softmax


class TestOnlineSoftmax:
    @few
    @given(sizes, st.lists(st.integers(1, 6), min_size=1, max_size=5), seeds)
    def test_pieces_give_the_whole(self, rows: int, pieces: list[int], seed: int) -> None:
        scores, v = (x.detach() for x in tensors(seed, (rows, sum(pieces)), (sum(pieces), 3)))
        scores = (scores * 30).masked_fill(scores < -0.5, -math.inf)  # some rows begin with nothing
        state = A.online_softmax_start((rows,), 3)
        for s, values in zip(scores.split(pieces, 1), v.split(pieces, 0), strict=True):
            state = A.online_softmax_step(state, s, values)
        m, l, a = state
        assert_close(m[:, 0], scores.amax(1))
        assert_close(a / l.masked_fill(l == 0, 1.0), A.stable_softmax(scores) @ v, **TOL)


# ------------------------------------------------------------------------------------------ heads


class TestHeads:
    @few
    @given(st.integers(1, 3), sizes, st.integers(1, 4), st.integers(1, 5), seeds)
    def test_split_and_merge(self, B: int, T: int, H: int, D: int, seed: int) -> None:
        (x,) = tensors(seed, (B, T, H * D))
        heads = A.split_heads(x, H)
        assert torch.equal(A.merge_heads(heads), x)
        for h in range(H):
            assert torch.equal(heads[:, h], x[:, :, h * D : (h + 1) * D])

    @pytest.mark.parametrize(("width", "heads"), [(6, 1), (6, 3), (20, 5)])
    def test_multi_head_equals_pytorch(self, width: int, heads: int) -> None:
        torch.manual_seed(0)
        theirs = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        torch.nn.init.normal_(theirs.in_proj_bias)
        (q, k, v), (qb, kb, vb) = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
        w = A.Projections(
            q=q, k=k, v=v, o=theirs.out_proj.weight, q_bias=qb, k_bias=kb, v_bias=vb, o_bias=theirs.out_proj.bias
        )
        x, memory = tensors(6, (2, 5, width), (2, 7, width))
        seen = A.causal_mask(5, 7)
        for attend, options in ((A.naive_attention, {"mask": seen}), (A.tiled_attention, {"causal": True})):
            same(
                lambda x, m, attend=attend, options=options: A.multi_head_attention(
                    x, w, n_heads=heads, memory=m, attend=attend, **options
                ),
                lambda x, m: theirs(x, m, m, attn_mask=~seen, need_weights=False)[0],
                x, memory,
            )  # fmt: skip

    def test_multi_query_is_grouped_query_with_one_head(self) -> None:
        x, q, k, v, o = tensors(7, (2, 5, 12), (12, 12), (3, 12), (3, 12), (12, 12))
        w = A.Projections(q=q, k=k, v=v, o=o)
        copied = A.Projections(q=q, k=k.repeat(4, 1), v=v.repeat(4, 1), o=o)
        assert_close(
            A.multi_head_attention(x, w, n_heads=4, n_kv_heads=1), A.multi_head_attention(x, copied, n_heads=4), **TOL
        )


# -------------------------------------------------------------------------------------- positions


class TestPositions:
    @few
    @given(
        st.integers(0, 2000),
        st.integers(0, 2000),
        st.integers(0, 3000),
        st.integers(1, 6),
        st.sampled_from(["half", "interleaved"]),
        seeds,
    )
    def test_rope_scores_depend_on_the_distance_only(
        self, m: int, n: int, shift: int, pairs: int, layout: str, seed: int
    ) -> None:
        q, k = (x.detach() for x in tensors(seed, (1, 2 * pairs), (1, 2 * pairs)))

        def score(m: int, n: int) -> torch.Tensor:
            a, b = (
                A.apply_rope(x, *A.rope_angles(torch.tensor([at]), 2 * pairs), layout=layout)
                for x, at in ((q, m), (k, n))
            )
            return (a * b).sum()

        assert_close(score(m, n), score(m + shift, n + shift), rtol=1e-4, atol=2e-5)

    @few
    @given(st.integers(1, 6), sizes, seeds)
    def test_rope_keeps_lengths_and_the_two_layouts_are_one(self, pairs: int, T: int, seed: int) -> None:
        (x,) = tensors(seed, (2, T, 2 * pairs))
        angles = A.rope_angles(torch.arange(T), 2 * pairs)
        half = A.apply_rope(x, *angles)
        assert_close(half.norm(dim=-1), x.norm(dim=-1), **TOL)
        assert torch.equal(half[:, 0], x[:, 0])  # position 0 is not turned
        index = A.rope_permutation(2 * pairs)
        assert sorted(index.tolist()) == list(range(2 * pairs))
        assert_close(A.apply_rope(x[..., index], *angles, layout="interleaved"), half[..., index], **TOL)

    def test_alibi(self) -> None:
        assert A.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
        for n in range(1, 40):
            slopes = A.alibi_slopes(n)
            assert len(slopes) == n and (slopes > 0).all() and len(set(slopes.tolist())) == n
        assert torch.equal(A.alibi_bias(4, 2, 5), A.alibi_bias(4, 5)[:, 3:])

    def test_sinusoids(self) -> None:
        table = A.sinusoidal_positions(50, 16)
        assert table.shape == (50, 16) and torch.equal(table[0, 1::2], torch.ones(8))
        # the inner product of two rows depends on their distance only
        products = table.double() @ table.double().T
        assert_close(products[10, 3], products[40, 33], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- sparse, linear


class TestSparse:
    @few
    @given(st.integers(1, 150), st.integers(1, 160), st.integers(1, 2), seeds)
    def test_chunked_window_equals_the_dense_mask(self, T: int, window: int, groups: int, seed: int) -> None:
        q, k, v = tensors(seed, (1, 2 * groups, T, 4), (1, groups, T, 4), (1, groups, T, 3))
        mask = A.sliding_window_mask(T, window)
        same(lambda *x: A.windowed_attention(*x, window=window), lambda *x: A.naive_attention(*x, mask=mask), q, k, v)

    @few
    @given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
    def test_masks_by_their_definition(self, T: int, W: int, n_global: int) -> None:
        window, block = A.sliding_window_mask(T, W, n_global=n_global), A.block_mask(T, W)
        for i in range(T):
            for j in range(T):
                assert window[i, j] == (j <= i and (i - j < W or j < n_global))
                assert block[i, j] == (j <= i and i // W == j // W)

    @few
    @given(st.integers(1, 40), st.integers(1, 50), st.booleans(), seeds)
    def test_linear_equals_its_definition(self, T: int, chunk: int, causal: bool, seed: int) -> None:
        q, k, v = tensors(seed, (1, 4, T, 3), (1, 2, T, 3), (1, 2, T, 2))

        def definition(q, k, v):
            w = (F.elu(q) + 1) @ A.repeat_heads(F.elu(k) + 1, 2).mT
            w = w.tril() if causal else w
            return w / w.sum(-1, keepdim=True) @ A.repeat_heads(v, 2)

        same(lambda *x: A.linear_attention(*x, causal=causal, chunk=chunk), definition, q, k, v, rtol=1e-4, atol=2e-5)


# -------------------------------------------------------------------------------------- bad input


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


REFUSED = {
    "heads that do not divide": lambda: A.naive_attention(zeros(1, 3, 2, 4), zeros(1, 2, 2, 4), zeros(1, 2, 2, 4)),
    "three axes": lambda: A.naive_attention(zeros(3, 2, 4), zeros(3, 2, 4), zeros(3, 2, 4)),
    "no keys": lambda: A.naive_attention(zeros(1, 1, 2, 4), zeros(1, 1, 0, 4), zeros(1, 1, 0, 4)),
    "another width": lambda: A.tiled_attention(zeros(1, 1, 2, 4), zeros(1, 1, 2, 3), zeros(1, 1, 2, 3)),
    "values of another length": lambda: A.tiled_attention(zeros(1, 1, 2, 4), zeros(1, 1, 2, 4), zeros(1, 1, 3, 4)),
    "another dtype": lambda: A.naive_attention(zeros(1, 1, 2, 4), zeros(1, 1, 2, 4).double(), zeros(1, 1, 2, 4)),
    "a mask of numbers": lambda: A.naive_attention(*[zeros(1, 1, 2, 4)] * 3, mask=zeros(2, 2)),
    "a mask of another shape": lambda: A.tiled_attention(*[zeros(1, 1, 2, 4)] * 3, mask=A.causal_mask(3)),
    "a tile of nothing": lambda: A.tiled_attention(*[zeros(1, 1, 2, 4)] * 3, block_q=0),
    "more queries than keys, causal": lambda: A.tiled_attention(
        zeros(1, 1, 3, 4), zeros(1, 1, 2, 4), zeros(1, 1, 2, 4), causal=True
    ),
    "a window of nothing": lambda: A.windowed_attention(*[zeros(1, 1, 2, 4)] * 3, window=0),
    "a window over a cache": lambda: A.windowed_attention(
        zeros(1, 1, 1, 4), zeros(1, 1, 2, 4), zeros(1, 1, 2, 4), window=2
    ),
    "linear over a cache": lambda: A.linear_attention(zeros(1, 1, 1, 4), zeros(1, 1, 2, 4), zeros(1, 1, 2, 4)),
    "heads that do not fit the width": lambda: A.split_heads(zeros(1, 2, 10), 3),
    "no heads": lambda: A.split_heads(zeros(1, 2, 10), 0),
    "key-value heads that do not divide": lambda: A.multi_head_attention(
        zeros(1, 2, 4),
        A.Projections(q=zeros(4, 4), k=zeros(3, 4), v=zeros(3, 4), o=zeros(4, 4)),
        n_heads=4,
        n_kv_heads=3,
    ),
    "an odd rotation": lambda: A.rope_angles(torch.arange(3), 7),
    "an unknown layout": lambda: A.apply_rope(zeros(2, 4), *A.rope_angles(torch.arange(2), 4), layout="neox"),
    "angles for another width": lambda: A.apply_rope(zeros(2, 6), *A.rope_angles(torch.arange(2), 4)),
    "odd sinusoids": lambda: A.sinusoidal_positions(3, 5),
    "padding longer than the text": lambda: A.padding_mask(torch.tensor([4]), 3),
    "padding in the middle": lambda: A.padding_mask(torch.tensor([2]), 3, side="middle"),
    "queries before the keys": lambda: A.causal_mask(4, 3),
    "no slopes": lambda: A.alibi_slopes(0),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_sentence(call) -> None:
    with pytest.raises(BadInput) as e:
        call()
    message = str(e.value)
    assert "; allowed: " in message and message.endswith(".") and "\n" not in message


WHOLE = {  # argument -> a call with it, for which 2 is fine and 0 is not
    "T of causal_mask": lambda n: A.causal_mask(n),
    "S of causal_mask": lambda n: A.causal_mask(1, n),
    "n_heads of split_heads": lambda n: A.split_heads(zeros(1, 2, 12), n),
    "n_heads of alibi_slopes": lambda n: A.alibi_slopes(n),
    "T of alibi_bias": lambda n: A.alibi_bias(2, n),
    "dim of rope_angles": lambda n: A.rope_angles(torch.arange(3), n),
    "dim of rope_permutation": lambda n: A.rope_permutation(n),
    "dim of sinusoidal_positions": lambda n: A.sinusoidal_positions(3, n),
    "T of sliding_window_mask": lambda n: A.sliding_window_mask(n, 2),
    "window of sliding_window_mask": lambda n: A.sliding_window_mask(5, n),
    "block of block_mask": lambda n: A.block_mask(5, n),
    "window of windowed_attention": lambda n: A.windowed_attention(*[zeros(1, 1, 5, 4)] * 3, window=n),
    "chunk of linear_attention": lambda n: A.linear_attention(*[zeros(1, 1, 5, 4)] * 3, chunk=n),
    "block_q of tiled_attention": lambda n: A.tiled_attention(*[zeros(1, 1, 5, 4)] * 3, block_q=n),
    "block_k of tiled_attention": lambda n: A.tiled_attention(*[zeros(1, 1, 5, 4)] * 3, block_k=n),
}


@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_a_whole_number_is_whole(call) -> None:
    call(2)
    for value in (0, -2, 2.0, 2.5, math.nan, math.inf, True, "2", None, [2]):
        if value is None and call in (WHOLE["S of causal_mask"],):
            continue  # the default
        with pytest.raises(BadInput) as e:
            call(value)
        assert str(e.value).count("allowed:") == 1


FINITE = {
    "scale of naive_attention": lambda x: A.naive_attention(*[zeros(1, 1, 2, 4)] * 3, scale=x),
    "scale of tiled_attention": lambda x: A.tiled_attention(*[zeros(1, 1, 2, 4)] * 3, scale=x),
    "scale of windowed_attention": lambda x: A.windowed_attention(*[zeros(1, 1, 2, 4)] * 3, window=1, scale=x),
    "base of rope_angles": lambda x: A.rope_angles(torch.arange(3), 4, base=x),
    "base of sinusoidal_positions": lambda x: A.sinusoidal_positions(3, 4, base=x),
}


@pytest.mark.parametrize("call", FINITE.values(), ids=FINITE)
def test_a_number_is_finite(call) -> None:
    call(2.5)
    for value in (math.nan, math.inf, True, "2"):
        with pytest.raises(BadInput):
            call(value)


def test_inputs_are_not_changed() -> None:
    q, k, v = (x.detach() for x in tensors(8, *[(1, 2, 9, 4)] * 3))
    before = [x.clone() for x in (q, k, v)]
    A.naive_attention(q, k, v, mask=A.causal_mask(9))
    A.tiled_attention(q, k, v, causal=True, block_q=2)
    A.windowed_attention(q, k, v, window=2)
    A.linear_attention(q, k, v)
    A.apply_rope(q, *A.rope_angles(torch.arange(9), 4))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


# ------------------------------------------------------------------------------------- the benchmark


def test_quick_benchmark(tmp_path) -> None:
    import json
    import os
    import platform
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parent.parent / "benchmarks" / "attention.py"
    out = tmp_path / "attention.json"
    job = subprocess.run(
        [sys.executable, script, "--quick", "--device", "cpu", "--out", out],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert job.returncode == 0, job.stderr
    result = json.loads(out.read_text(encoding="utf8"))
    assert {row["name"] for row in result["rows"]} == {"PyTorch", "naive", "tiled", "windowed"}
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["seconds"] > 0 for row in result["rows"])
    assert [row["name"] for row in result["rows"] if row["bytes"] is not None] == ["tiled"]
    assert "tokens" in job.stdout and platform.node() not in out.read_text(encoding="utf8")


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def test_everything_agrees(self) -> None:
        q, k, v = (
            x.detach().cuda().requires_grad_() for x in tensors(9, (2, 4, 200, 32), (2, 2, 200, 32), (2, 2, 200, 32))
        )
        reference = lambda q, k, v: F.scaled_dot_product_attention(
            q, A.repeat_heads(k, 2), A.repeat_heads(v, 2), is_causal=True
        )
        loose = {"rtol": 1e-4, "atol": 1e-4}  # a GPU sums in another order, and its kernels choose their own
        same(lambda *x: A.naive_attention(*x, mask=A.causal_mask(200, device="cuda")), reference, q, k, v, **loose)
        same(lambda *x: A.tiled_attention(*x, causal=True, block_q=64, block_k=32), reference, q, k, v, **loose)
        same(
            lambda *x: A.windowed_attention(*x, window=50),
            lambda *x: A.naive_attention(*x, mask=A.sliding_window_mask(200, 50, device="cuda")),
            q,
            k,
            v,
            **loose,
        )
        same(
            lambda *x: A.linear_attention(*x, chunk=64), lambda *x: A.linear_attention(*x, chunk=200), q, k, v, **loose
        )
        out = A.apply_rope(q, *A.rope_angles(torch.arange(200, device="cuda"), 32))
        assert (
            out.is_cuda
            and A.alibi_bias(4, 3, device="cuda").is_cuda
            and A.padding_mask(torch.tensor([2, 3], device="cuda"), 3).is_cuda
        )

    def test_memory_grows_with_the_length_not_with_its_square(self) -> None:
        from llmcourse.runtime import Runtime, peak_memory

        rt = Runtime.auto("cuda", "float32")

        def peak(T: int) -> int:
            q, k, v = (rt.move(x.detach()).requires_grad_() for x in tensors(10, *[(1, 4, T, 64)] * 3))
            return peak_memory(
                lambda: torch.autograd.grad(A.tiled_attention(q, k, v, causal=True).sum(), (q, k, v)), rt
            )

        peak(256)
        assert peak(8192) < 2.5 * peak(4096)
