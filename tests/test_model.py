"""The model chapter: properties of its parts, equality with references, the real checkpoint where it is prepared."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmcourse.data import load_model
from llmcourse.model import (
    GPT,
    Attention,
    Block,
    GPTConfig,
    KVCache,
    LayerCache,
    MoE,
    Output,
    RMSNorm,
    generate,
    layer_norm,
    left_pad,
    load_balance_loss,
    next_probabilities,
    rms_norm,
    route,
    watch_routing,
)
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput, load_settings
from llmcourse.store import is_prepared

HOME = load_settings().home
needs_model = [
    pytest.mark.model,
    pytest.mark.skipif(
        not is_prepared("smollm2-135m", HOME),
        reason="smollm2-135m is not prepared: run llmcourse data --fetch smollm2-135m",
    ),
]
few = settings(max_examples=25, deadline=None)


def config(**options) -> GPTConfig:
    return GPTConfig(
        **(
            {
                "vocab_size": 50,
                "d_model": 24,
                "n_layers": 2,
                "n_heads": 6,
                "n_kv_heads": 2,
                "context": 40,
                "init_std": 0.3,
            }
            | options
        )
    )


KINDS = {
    "llama": {},
    "untied": {"tied": False},
    "table": {"position": "learned", "norm": "layer", "ffn": "gelu", "n_kv_heads": 6},
    "post": {"norm_position": "post", "ffn": "relu", "position": "none"},
    "one kv head": {"n_kv_heads": 1},
    "experts": {"n_experts": 4},
    "one expert": {"n_experts": 3, "experts_per_token": 1},
}


@pytest.fixture(params=KINDS, ids=lambda k: k.replace(" ", "-"))
def model(request) -> GPT:
    torch.manual_seed(0)
    return GPT(config(**KINDS[request.param])).eval()


# ------------------------------------------------------------------------------------------- norms


@few
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 10**6))
def test_norms_equal_the_reference(rows, width, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(rows, width, generator=g) * 3 + 1,
        torch.rand(width, generator=g),
        torch.randn(width, generator=g),
    )
    torch.testing.assert_close(layer_norm(x, w, b), F.layer_norm(x, (width,), w, b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rms_norm(x, w), F.rms_norm(x, (width,), w, 1e-5))


@few
@given(st.floats(0.1, 1000), st.integers(0, 10**6))
def test_norms_forget_the_length_and_layer_norm_the_mean(factor, seed):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one = torch.ones(16, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(factor * x, one, eps=0), rms_norm(x, one, eps=0))
    torch.testing.assert_close(layer_norm(x + factor, one, eps=0), layer_norm(x, one, eps=0))
    assert not torch.allclose(rms_norm(x + factor, one, eps=0), rms_norm(x, one, eps=0))


def test_rms_norm_in_bfloat16_sums_in_float32():
    norm, x = RMSNorm(576), torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm.bfloat16()(x), rms_norm(x.float(), torch.ones(576)).bfloat16())


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(2, 40), st.integers(0, 10**6))
def test_the_gradient_of_the_norm_is_that_of_the_formula(rows, width, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, dy = torch.randn(*rows, width, generator=g), torch.rand(width, generator=g), torch.randn(*rows, width)
    norm, results = RMSNorm(width, eps=1e-3), []
    norm.weight.data = weight
    for f in (lambda x: rms_norm(x, norm.weight, eps=1e-3), norm):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, norm.weight), dy)))
    assert torch.equal(results[0][0], results[1][0])  # the value: to the last bit
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "wish",
    [
        {"vocab_size": 0},
        {"d_model": 25},
        {"n_layers": True},
        {"n_kv_heads": 4},
        {"norm": "batch"},
        {"norm_position": "mid"},
        {"ffn": "tanh"},
        {"position": "alibi"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"norm_eps": -1e-5},
        {"rope_theta": 0},
        {"init_std": 0},
        {"n_experts": 1},
        {"n_experts": 4, "experts_per_token": 5},
        {"n_experts": 4, "capacity_factor": 0},
        {"n_heads": 8, "n_kv_heads": 8},
        {"context": 0},
        {"d_ff": 0},
        {"norm_eps": "small"},
        {"norm_eps": math.nan},
        {"init_std": math.inf},
        {"tied": "yes"},
        {"causal": 1},
        {"context": 40.0},
        {"n_experts": 4, "experts_per_token": 2.0},
        {"n_experts": 4, "capacity_factor": math.nan},
    ],
)
def test_impossible_configurations_are_refused_in_one_sentence(wish):
    with pytest.raises(BadInput) as e:
        config(**wish)
    assert str(e.value).count("allowed:") == 1 and next(iter(wish)).split("_")[0] in str(e.value)


@few
@given(
    st.sampled_from(["swiglu", "gelu", "relu"]),
    st.sampled_from(["rms", "layer"]),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["rope", "learned", "none"]),
    st.booleans(),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(1, 3),
    st.sampled_from([0, 2, 3]),
)
def test_parameters_by_formula(ffn, norm, norm_position, position, tied, kv, layers, experts):
    c = config(
        ffn=ffn,
        norm=norm,
        norm_position=norm_position,
        position=position,
        tied=tied,
        n_kv_heads=kv,
        n_layers=layers,
        n_experts=experts,
    )
    assert sum(c.parameters().values()) == sum(p.numel() for p in GPT(c).parameters())


def test_flops_by_formula(model):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        model(ids)
    assert counter.get_total_flops() == model.config.flops(7)
    cache = KVCache(model.config.n_layers)
    model(ids, past_key_values=cache)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        model(ids[:, :3], past_key_values=cache)
    assert counter.get_total_flops() == model.config.flops(3, past=7)


# --------------------------------------------------------------------------------- attention and model


def test_attention_equals_the_written_out_one():
    from llmcourse.attention import naive_attention

    torch.manual_seed(0)
    layer, x = Attention(config(position="none")), torch.randn(2, 5, 24)
    q, k, v = (f(x).view(2, 5, n, 4).transpose(1, 2) for f, n in ((layer.q, 6), (layer.k, 2), (layer.v, 2)))
    y = naive_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask=torch.ones(5, 5).tril().bool())
    torch.testing.assert_close(layer(x), layer.o(y.transpose(1, 2).reshape(2, 5, 24)))


def test_a_token_sees_no_later_token(model):
    torch.manual_seed(1)
    a = torch.randint(50, (1, 9))
    b = a.clone()
    b[:, 5:] = (b[:, 5:] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(model(a)[:, :5], model(b)[:, :5])
        assert not torch.allclose(model(a)[:, 5:], model(b)[:, 5:])


def test_without_causality_it_does():
    torch.manual_seed(0)
    m, a = GPT(config(causal=False)).eval(), torch.randint(50, (1, 6))
    b = a.clone()
    b[:, -1] = (b[:, -1] + 1) % 50
    with torch.no_grad():
        assert not torch.allclose(m(a)[:, 0], m(b)[:, 0])


@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 5), (8, 1), (3, 1, 5)])
def test_reading_in_pieces_with_a_cache(model, pieces):
    torch.manual_seed(2)
    ids, cache, out = torch.randint(50, (2, 9)), KVCache(2, capacity=2), []
    with torch.no_grad():
        for part in ids.split(pieces, 1):
            out.append(model(part, past_key_values=cache))
        torch.testing.assert_close(torch.cat(out, 1), model(ids), rtol=1e-4, atol=1e-5)
    assert cache.length == 9


def test_cropping_a_cache_takes_tokens_back(model):
    torch.manual_seed(3)
    ids, cache = torch.randint(50, (1, 8)), KVCache(2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(4)
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache), model(ids)[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="length"):
        cache.crop(99)


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5))
def test_layer_cache_is_concatenation(parts, capacity):
    cache, seen = LayerCache(capacity), []
    for i, n in enumerate(parts):
        seen.append(torch.full((1, 2, n, 3), float(i)))
        k, v = cache.append(seen[-1], -seen[-1])
    assert torch.equal(k, torch.cat(seen, 2)) and torch.equal(v, -k)


def test_cache_bytes():
    cache = KVCache(2, capacity=30)
    GPT(config())(torch.zeros(3, 5, dtype=torch.long), past_key_values=cache)
    assert cache.bytes == 2 * 2 * 3 * 2 * 5 * 4 * 4  # keys and values, layers, rows, heads, tokens, columns, bytes


def alone(model, tokens):
    """Logits of one text without any padding."""
    return model(torch.tensor([tokens]))[0]


def test_left_padding_changes_nothing(model):
    torch.manual_seed(4)
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 7, 1)]
    ids, real = left_pad(prompts)
    assert real.sum(1).tolist() == [3, 7, 1] and left_pad([[1, 2], [3, 4]])[1] is None
    with torch.no_grad():
        together, cache = model(ids, attention_mask=real), KVCache(2)
        torch.testing.assert_close(model(ids, attention_mask=real, past_key_values=cache), together)
        more = torch.randint(50, (3, 1))
        step = model(more, past_key_values=cache)
        for i, p in enumerate(prompts):
            torch.testing.assert_close(together[i, -1], alone(model, p)[-1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step[i, 0], alone(model, [*p, int(more[i])])[-1], rtol=1e-4, atol=1e-5)
        cache.crop(7)  # the padding is remembered, and that of forgotten tokens is forgotten
        torch.testing.assert_close(model(more, past_key_values=cache), step)
    assert torch.isfinite(together).all()


PADDED = {  # 1 where a token is real: one row each
    "left beside right": ["0011111", "1111100"],
    "right": ["1111000", "1111111"],
    "both sides of one row": ["0111110", "1111111"],
    "left, right, both, none": ["0000011", "1100000", "0011100", "1111111"],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", PADDED.values(), ids=PADDED)
def test_padding_on_any_side_changes_nothing(rows, causal):
    for position in ("rope", "learned", "none"):
        torch.manual_seed(0)
        m = GPT(config(position=position, causal=causal)).eval()
        real = torch.tensor([[c == "1" for c in row] for row in rows])
        ids = torch.randint(50, real.shape)
        with torch.no_grad():
            for mask in (real, real.long()):
                together = m(ids, attention_mask=mask)
                for row, kept, got in zip(ids, real, together):
                    torch.testing.assert_close(got[kept], alone(m, row[kept].tolist()), rtol=1e-4, atol=1e-5)
            other = ids.where(real, (ids + 1) % 50)  # what stands in the padding does not matter
            torch.testing.assert_close(m(other, attention_mask=real)[real], together[real], rtol=1e-4, atol=1e-5)


def test_padding_that_comes_later_than_the_cache():
    torch.manual_seed(0)
    m, ids, cache = GPT(config()).eval(), torch.randint(50, (2, 7)), KVCache(2)
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        m(ids[:, :3], past_key_values=cache)
        got = m(ids[:, 3:], attention_mask=real[:, 3:], past_key_values=cache)
        torch.testing.assert_close(got[0], alone(m, ids[0].tolist())[3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1, :1], alone(m, ids[1, :4].tolist())[3:], rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="shape of attention_mask"):
        m(ids[:, :2], attention_mask=torch.ones(2, 9), past_key_values=cache)


def test_names_that_transformers_uses():
    m = GPT(config())
    ids = torch.zeros(1, 4, dtype=torch.long)
    first = m(ids, use_cache=True)
    assert isinstance(first, Output) and first.past_key_values.length == 4
    second = m(ids, past_key_values=first.past_key_values, use_cache=True)
    assert second.past_key_values.length == 8 and second.logits.shape == (1, 4, 50)
    assert isinstance(m(ids, use_cache=False), torch.Tensor) and m.get_input_embeddings() is m.embed
    assert m(ids, last_only=True).shape == (1, 1, 50)


def test_tied_matrix_is_one_parameter_also_in_a_copy():
    m = copy.deepcopy(GPT(config()))
    assert m.head.weight is m.embed.weight and "head.weight" not in dict(m.named_parameters())
    assert GPT(config(tied=False)).head.weight is not GPT(config(tied=False)).embed.weight


def test_every_parameter_gets_a_gradient(model):
    model(torch.arange(40).view(1, 40)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_training_after_inference_mode():
    m = GPT(config())
    with torch.inference_mode():
        m(torch.zeros(1, 3, dtype=torch.long))
    m(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert any(p.grad.abs().sum() > 0 for p in m.blocks.parameters())


def test_initial_weights_that_write_to_the_stream_are_smaller():
    torch.manual_seed(0)
    m = GPT(config(d_model=96, n_layers=8))
    assert abs(float(m.blocks[0].attn.q.weight.detach().std()) / 0.3 - 1) < 0.05
    assert (
        abs(float(m.blocks[0].attn.o.weight.detach().std()) / 0.3 * 4 - 1) < 0.05
        and abs(float(m.blocks[3].ffn.down.weight.detach().std()) / 0.3 * 4 - 1) < 0.05
    )


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(4, dtype=torch.long),
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(1, 4),
        torch.zeros(1, 41, dtype=torch.long),
    ],
)
def test_bad_ids(ids):
    with pytest.raises(BadInput):
        GPT(config())(ids)


def test_bfloat16_model_runs_with_and_without_cache():
    torch.manual_seed(0)
    m = GPT(config()).bfloat16().eval()
    assert generate(m, [[1, 2, 3]], max_new_tokens=4) and m(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------- experts


@few
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6), st.one_of(st.none(), st.integers(1, 6)))
def test_routing(N, E, seed, capacity):
    logits = torch.randn(N, E, generator=torch.Generator().manual_seed(seed))
    for k in range(1, E + 1):
        r = route(logits, k, capacity=capacity)
        assert r.experts.shape == r.weights.shape == (N, k) and all(len(set(row)) == k for row in r.experts.tolist())
        used = torch.bincount(r.experts[r.kept], minlength=E)
        assert capacity is None or int(used.max()) <= capacity
        assert bool((r.weights[~r.kept] == 0).all())
        if capacity is None:
            want = torch.ones(N) if k > 1 else logits.softmax(-1).amax(-1)
            torch.testing.assert_close(r.weights.sum(-1), want)
        else:  # nobody is dropped while there is room
            wanted = torch.bincount(r.experts.flatten(), minlength=E)
            assert used.tolist() == wanted.clamp_max(capacity).tolist()


def test_balance_loss_bounds_and_gradient():
    one = route(torch.tensor([[50.0, 0, 0, 0]] * 8), 1)
    assert math.isclose(float(load_balance_loss(one)), 4.0, rel_tol=1e-5)
    even = route(50 * torch.eye(4).repeat(2, 1), 1)
    assert math.isclose(float(load_balance_loss(even)), 1.0, rel_tol=1e-5)
    logits = (
        torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        .add(torch.tensor([1.0, 0, 0, 0]))
        .requires_grad_()
    )
    load_balance_loss(route(logits, 1)).backward()
    assert float(logits.grad[:, 0].sum()) > 0  # a step against the gradient makes the busy expert less probable


def test_mixture_equals_the_written_out_sum():
    torch.manual_seed(0)
    layer = MoE(8, [torch.nn.Linear(8, 8) for _ in range(4)], top_k=2)
    x = torch.randn(3, 5, 8)
    p = layer.router(x).softmax(-1)
    want = torch.zeros_like(x)
    for b in range(3):
        for t in range(5):
            w, e = p[b, t].topk(2)
            want[b, t] = sum(w[i] / w.sum() * layer.experts[e[i]](x[b, t]) for i in range(2))
    torch.testing.assert_close(layer(x), want)
    with watch_routing(layer) as seen:
        layer(x)
    assert len(seen) == 1 and layer._seen is None


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_capacity_drops_in_training_and_never_in_evaluation(top_k):
    """With a limit, what a token gets depends on the other rows and even on later tokens of its own."""
    torch.manual_seed(0)
    m = GPT(config(n_experts=4, experts_per_token=top_k, capacity_factor=0.3)).eval()
    ids = torch.randint(50, (6, 9))
    with torch.no_grad():
        together = m(ids)
        for row, got in zip(ids, together):
            torch.testing.assert_close(got, m(row[None])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m(ids[:, :4]), together[:, :4], rtol=1e-4, atol=1e-5)
        prompts = ids.tolist()
        assert generate(m, prompts, max_new_tokens=6) == [generate(m, [p], max_new_tokens=6)[0] for p in prompts]
        with watch_routing(m) as seen:
            m.train()(ids)
        assert not all(bool(r.kept.all()) for r in seen)


def test_the_balance_loss_can_be_below_one():
    """Each token's choice wins narrowly, and the probability that is left goes to the expert that nobody chooses."""
    probabilities = torch.tensor([[0.4, 0.25, 0.35], [0.25, 0.4, 0.35]])
    assert float(load_balance_loss(route(probabilities.log(), 1))) < 1


def test_the_router_of_a_single_expert_gets_a_gradient():
    torch.manual_seed(0)
    layer = MoE(8, [torch.nn.Linear(8, 8) for _ in range(3)], top_k=1)
    layer(torch.randn(6, 8)).square().sum().backward()
    assert float(layer.router.weight.grad.abs().sum()) > 0


# --------------------------------------------------------------------------------------- generation


@few
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(1, 30), st.floats(0.05, 1))
def test_probabilities_equal_transformers(seed, temperature, k, p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(4, 25, generator=torch.Generator().manual_seed(seed))
    want = logits
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        want = warper(None, want)
    got = next_probabilities(logits, temperature=temperature, top_k=k, top_p=p)
    torch.testing.assert_close(got.sum(-1), torch.ones(4))
    differs = (got > 0) != (want.softmax(-1) > 0)
    assert int(differs.sum()) <= 1  # a sum that equals p up to rounding may fall on either side
    if not differs.any():
        torch.testing.assert_close(got, want.softmax(-1))


def test_greedy_is_the_cold_limit():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(next_probabilities(logits, temperature=0), next_probabilities(logits, temperature=1e-3))


def test_cache_batch_and_greedy_agree(model):
    torch.manual_seed(5)
    prompts = [torch.randint(50, (n,)).tolist() for n in (2, 6, 4)]
    cached = generate(model, prompts, max_new_tokens=12)
    assert (
        cached
        == generate(model, prompts, max_new_tokens=12, use_cache=False)
        == [generate(model, [p], max_new_tokens=12)[0] for p in prompts]
    )
    one = prompts[0]
    for token in cached[0]:
        assert token == int(model(torch.tensor([one]))[0, -1].argmax())
        one = [*one, token]


def test_stop_tokens_end_a_row_and_no_other():
    torch.manual_seed(0)
    m = GPT(config()).eval()
    free = generate(m, [[1, 2], [3]], max_new_tokens=10)
    stop = free[0][3]
    for row, new in zip(free, generate(m, [[1, 2], [3]], max_new_tokens=10, stop=[stop])):
        cut = row.index(stop) + 1 if stop in row else 10
        assert new == row[:cut]


def test_a_model_stops_at_its_own_end_unless_told_otherwise():
    torch.manual_seed(0)
    m = GPT(config()).eval()
    free = generate(m, [[1, 2]], max_new_tokens=10)[0]
    m.stop = (free[3],)
    assert generate(m, [[1, 2]], max_new_tokens=10)[0] == free[: free.index(free[3]) + 1]
    assert generate(m, [[1, 2]], max_new_tokens=10, stop=[])[0] == free


def test_sampling_repeats_with_the_generator_and_follows_the_distribution():
    torch.manual_seed(0)
    m = GPT(config()).eval()
    draw = lambda seed, **kw: generate(
        m, [[1, 2]] * 400, max_new_tokens=1, generator=torch.Generator().manual_seed(seed), temperature=1.0, **kw
    )
    assert draw(0) == draw(0) != draw(1)
    with torch.no_grad():
        p = next_probabilities(m(torch.tensor([[1, 2]]))[0, -1], top_k=3)
    share = torch.bincount(torch.tensor(draw(2, top_k=3)).flatten(), minlength=50) / 400
    assert bool((share[p == 0] == 0).all()) and float((share - p).abs().max()) < 0.12  # four standard deviations


def test_generate_leaves_the_model_as_it_was():
    m = GPT(config(dropout=0.5)).train()
    assert generate(m, [[1, 2, 3]], max_new_tokens=5) == generate(m, [[1, 2, 3]], max_new_tokens=5) and m.training


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 99},
        {"max_new_tokens": 2, "temperature": -1},
        {"max_new_tokens": 2, "top_k": 0},
        {"max_new_tokens": 2, "top_p": 0.0},
        {"max_new_tokens": 2, "top_p": math.nan},
        {"max_new_tokens": 2, "top_k": 1.0},
        {"max_new_tokens": 2, "temperature": math.nan},
        {"max_new_tokens": True},
    ],
)
def test_generate_refuses(options):
    with pytest.raises(BadInput):
        generate(GPT(config()), [[1]], **options)
    for prompts in ([[1], []], [], [[50]], [[-1, 3]], [[1.5]], [[True]]):
        with pytest.raises(BadInput, match="prompts"):
            generate(GPT(config()), prompts, max_new_tokens=2)


# --------------------------------------------------------------------- with the other chapters' tools


def test_layer_pass_walks_our_blocks():
    compression = pytest.importorskip("llmcourse.compression")
    from llmcourse.data import TokenData

    torch.manual_seed(0)
    m = GPT(config()).eval()
    before = {n: p.clone() for n, p in m.named_parameters()}
    stream = torch.randint(50, (200,))
    data = TokenData(
        train=stream, val=stream, test=stream, calib=stream, bytes={}, name="random", tokenizer="none", separator=0
    )
    rt = Runtime(device=torch.device("cpu"), dtype=torch.float32)

    class Halve(compression.LayerPass):
        stats = (compression.Hessian,)

        def solve(self, W, stats, mask):
            assert stats[compression.Hessian].n == 4 * 10
            return compression.LayerUpdate(W / 2)

    student, (report,) = compression.compress(m, [Halve(n_calib=4, seq_len=10)], data, rt)
    assert len(report.layers) == 2 * 7 and report.coverage.share_of_blocks == 1
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
    torch.testing.assert_close(student.blocks[1].ffn.up.weight, before["blocks.1.ffn.up.weight"] / 2)
    prefill, decode = compression.latency(student, rt, tokens=6, repeats=1)
    assert prefill.n and decode.n


def test_evaluation_reads_our_logits(model):
    evaluation = pytest.importorskip("llmcourse.evaluation")
    tokens = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:], reduction="none")
    got = evaluation.token_nll(model, tokens, context=30, stride=29)
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)


def test_blocks_take_hidden_states_and_keywords():
    c = config()
    block, x = Block(c), torch.randn(2, 4, 24)
    assert block(x, rotation=None, mask=None, cache=None).shape == x.shape


# -------------------------------------------------------------------------------- reading checkpoints


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, folder


def test_a_small_llama_computes_the_same(tiny_llama):
    theirs, folder = tiny_llama
    ours = GPT.from_pretrained(folder, rt=Runtime(device=torch.device("cpu"), dtype=torch.float32))
    ids = torch.randint(60, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert not ours.config.tied and not ours.training


def test_a_loaded_model_can_be_trained_and_its_file_stays_as_it_was(tiny_llama):
    _, folder = tiny_llama
    before = (folder / "model.safetensors").read_bytes()
    rt = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    ours = GPT.from_pretrained(folder, rt=rt)
    ours(torch.zeros(1, 3, dtype=torch.long)).square().mean().backward()
    with torch.no_grad():
        for p in ours.parameters():
            assert p.grad is not None
            p.sub_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(GPT.from_pretrained(folder, rt=rt).embed.weight, ours.embed.weight)


def changed(folder, target, change=(), drop=(), weights=None):
    """A copy of a model folder with other entries in its config.json, or with other weights."""
    shutil.copytree(folder, target)
    c = json.loads((target / "config.json").read_text())
    c = {k: v for k, v in (c | dict(change)).items() if k not in drop}
    (target / "config.json").write_text(json.dumps(c))
    if weights is not None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


NOT_UNDERSTOOD = {
    "another architecture": {"model_type": "gpt2"},
    "another activation": {"hidden_act": "gelu"},
    "biases": {"attention_bias": True},
    "biases in the mlp": {"mlp_bias": True},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "scaling by the old name": {"rope_scaling": {"type": "linear", "factor": 4}},
    "scaling by the new name": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "scaling beside plain parameters": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "a factor and no type": {"rope_scaling": {"factor": 4.0}},
    "a part of the columns": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "a part of the columns, old": {"partial_rotary_factor": 0.5},
    "rotations by kind of layer": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    "not a mapping": {"rope_scaling": 4},
    "layers without positions": {"no_rope_layers": [1, 0, 1]},
    "a sliding window": {"sliding_window": 8},
    "scaled logits": {"logits_scaling": 8.0},
    "capped logits": {"final_logit_softcapping": 30.0},
    "a scaled embedding": {"embedding_multiplier": 12.0},
    "a key nobody knows": {"attention_magic": "on"},
    "more layers than weights": {"num_hidden_layers": 4},
    "fewer layers than weights": {"num_hidden_layers": 2},
    "another vocabulary": {"vocab_size": 61},
    "wider heads": {"head_dim": 16},
    "quantized": {"quantization_config": {"quant_method": "gptq"}},
    "text for a number": {"hidden_size": "32"},
    "half a layer": {"num_hidden_layers": 2.5},
    "no epsilon in words": {"rms_norm_eps": "1e-5"},
    "an end that is no token": {"eos_token_id": "</s>"},
}


@pytest.mark.parametrize("change", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_a_configuration_that_is_not_understood_is_refused(change, tiny_llama, tmp_path):
    with pytest.raises(BadInput) as e:
        GPT.from_pretrained(changed(tiny_llama[1], tmp_path / "m", change))
    assert str(e.value).count("allowed:") == 1 and "\n" not in str(e.value)


UNDERSTOOD = {
    "as saved": ({}, ()),
    "a feature that is off": ({"sliding_window": None, "rope_interleaved": False, "quantization_config": None}, ()),
    "who made it": ({"_name_or_path": "somebody/else", "transformers_version": "4.0.0", "is_llama_config": True}, ()),
    "no epsilon": ({}, ("rms_norm_eps",)),
    "no longest text": ({}, ("max_position_embeddings",)),
    "neither": ({}, ("rms_norm_eps", "max_position_embeddings")),
    "the base outside": ({"rope_theta": 500.0}, ("rope_parameters",)),
    "a scaling of the default kind": ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, ("rope_parameters",)),
    "no rotation": ({}, ("rope_parameters", "rope_theta")),
    "no key-value heads, which says as many": ({"num_attention_heads": 2}, ("num_key_value_heads", "head_dim")),
    "several ends": ({"eos_token_id": [2, 7]}, ()),
    "no end": ({"eos_token_id": None}, ()),
}


@pytest.mark.parametrize(("change", "drop"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_a_configuration_that_is_understood_computes_what_transformers_computes(change, drop, tiny_llama, tmp_path):
    from transformers import LlamaForCausalLM

    theirs, folder = tiny_llama
    weights = {k: v.clone().contiguous() for k, v in theirs.state_dict().items()}
    if "num_attention_heads" in change:  # keys and values as wide as the queries
        for key in [k for k in weights if ".k_proj." in k or ".v_proj." in k]:
            weights[key] = torch.cat((weights[key], weights[key].flip(0)))
    # tables of frequencies, as old files have them
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    copied = changed(folder, tmp_path / "m", change, drop, weights)
    ours = GPT.from_pretrained(copied, rt=Runtime(device=torch.device("cpu"), dtype=torch.float32))
    theirs = LlamaForCausalLM.from_pretrained(copied).eval()
    ids = torch.randint(60, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    ends = json.loads((copied / "config.json").read_text()).get("eos_token_id")
    assert list(ours.stop) == ([] if ends is None else ends if isinstance(ends, list) else [ends])


def without(weights, end):
    return {k: v for k, v in weights.items() if not k.endswith(end)}


@pytest.mark.parametrize(
    "broken",
    [
        lambda w: {},
        lambda w: without(w, "layers.1.mlp.up_proj.weight"),
        lambda w: without(w, "embed_tokens.weight"),
        lambda w: without(w, "lm_head.weight"),
        lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        lambda w: w | {"model.norm.weight": torch.ones(31)},
    ],
    ids=["nothing", "a matrix missing", "no embedding", "no head", "a bias too many", "a wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(broken, tiny_llama, tmp_path):
    theirs, folder = tiny_llama
    weights = broken({k: v.clone() for k, v in theirs.state_dict().items()})
    with pytest.raises(BadInput, match="allowed: a plain Llama checkpoint"):
        GPT.from_pretrained(changed(folder, tmp_path / "m", weights=weights))


def test_a_folder_that_cannot_be_read_is_refused(tiny_llama, tmp_path):
    cut = changed(tiny_llama[1], tmp_path / "m")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:200])
    for name in (cut, tmp_path / "nowhere", "gpt-5", "wikipedia"):
        with pytest.raises(BadInput):
            GPT.from_pretrained(name)


@pytest.fixture(scope="module")
def pair():
    rt = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    theirs, tokenizer, _ = load_model("smollm2-135m", rt=rt)
    return theirs, GPT.from_pretrained("smollm2-135m", rt=rt), tokenizer


class TestRealCheckpoint:
    pytestmark = needs_model

    def test_logits(self, pair):
        theirs, ours, tokenizer = pair
        ids = tokenizer(
            "The three laws of motion were first stated by Isaac Newton in 1687. " * 12, return_tensors="pt"
        ).input_ids[:, :128]
        with torch.inference_mode():
            assert float((theirs(ids).logits - ours(ids)).abs().max()) <= 1e-4

    def test_greedy_text_and_counts(self, pair):
        theirs, ours, tokenizer = pair
        ids = tokenizer("Water boils at", return_tensors="pt").input_ids
        theirs.generation_config.eos_token_id = None
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert generate(ours, ids, max_new_tokens=12) == [want]
        assert sum(ours.config.parameters().values()) == sum(p.numel() for p in ours.parameters()) == 134_515_008


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnAGpu:
    def test_same_logits_and_text_as_on_the_cpu(self, model):
        ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            want, text = model(ids), generate(model, ids, max_new_tokens=8)
            on_gpu = copy.deepcopy(model).cuda()
            torch.testing.assert_close(on_gpu(ids.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
        assert generate(on_gpu, ids, max_new_tokens=8) == text

    def test_bfloat16_with_padding_and_cache(self):
        torch.manual_seed(0)
        m = GPT(config()).cuda().bfloat16().eval()
        assert all(len(r) == 6 for r in generate(m, [[1, 2, 3], [4]], max_new_tokens=6))
        g = torch.Generator(device="cuda").manual_seed(0)
        assert generate(m, [[1, 2, 3]], max_new_tokens=6, temperature=0.8, top_p=0.9, generator=g)


@pytest.mark.parametrize(("tied", "stop"), [(True, ()), (False, (7,)), (True, (0, 3))])
def test_a_model_of_ours_is_saved_as_a_plain_llama(tied, stop, tmp_path):
    """transformers and `from_pretrained` read what `save_pretrained` wrote, and give the same logits."""
    import transformers

    torch.manual_seed(0)
    ours = GPT(
        GPTConfig(
            vocab_size=101, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, context=64, rope_theta=5000.0, tied=tied
        )
    ).eval()
    ours.stop = stop
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = GPT.from_pretrained(tmp_path / "saved")
    ids = torch.randint(101, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-5, atol=1e-6)
        assert torch.equal(again(ids), ours(ids))
    assert again.config == ours.config and again.stop == ours.stop == stop
    assert theirs.config.eos_token_id == (None if not stop else stop[0] if len(stop) == 1 else list(stop))
    assert {k: v.shape for k, v in theirs.state_dict().items()}.keys() == transformers.LlamaForCausalLM(
        theirs.config
    ).state_dict().keys()


def test_a_shape_that_llama_lacks_is_not_saved(tmp_path):
    with pytest.raises(BadInput, match="norm is 'layer'"):
        GPT(GPTConfig(vocab_size=16, d_model=16, n_layers=1, n_heads=2, norm="layer")).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
