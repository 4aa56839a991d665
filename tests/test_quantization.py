"""Properties of llmcourse.quantization that hold for any weight, and folders that are damaged on purpose."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.adapters import Site
from llmcourse.compression import FakeQuant, Hessian, Mask, QParams, check_passes, layer_error, write_back
from llmcourse.packed import (
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    dequantize_model,
    load_student,
    pack_model,
    save_student,
    stored_bytes,
)
from llmcourse.quantization import (
    GPTQ,
    RTN,
    EmbeddingRTN,
    choose_qparams,
    gptq,
    gptq_reference,
    inverse_factor,
    pack,
    pack_bits,
    rtn,
    unpack,
    unpack_bits,
)
from llmcourse.settings import BadInput
from llmcourse.store import write_manifest

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def weights(draw, max_rows=5):
    """Weights (O, I) of very different sizes, with zero and constant rows among them, and a group size that fits."""
    rows, groups, width = draw(st.integers(1, max_rows)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    W = torch.randn(rows, groups * width, generator=g) * 10.0 ** draw(st.integers(-6, 3)) + draw(
        st.sampled_from([0.0, 0.0, 1.0, -3.0])
    )
    kind = draw(st.sampled_from(["plain", "zero row", "constant row", "positive", "negative"]))
    if kind == "zero row":
        W[0] = 0
    elif kind == "constant row":
        W[0] = W[0, 0]
    elif kind != "plain":
        W = W.abs() if kind == "positive" else -W.abs()
    return W, draw(st.sampled_from(["tensor", "channel", width]))


def spread(qparams: QParams, W):
    """Scale of every single weight (O, I)."""
    return qparams.columns(0, W.shape[1])[0].expand_as(W)


def random_problem(seed, rows=8, columns=48, tokens=200, dead=True):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    X = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=g, dtype=torch.float64
    )
    if dead:
        X[:, 3] = 0
    return W, 2 / tokens * X.T @ X


# ---------------------------------------------------------------- round to nearest


@quick
@given(weights(), st.integers(2, 8), st.booleans())
def test_rtn_error_is_at_most_half_a_step(case, bits, symmetric):
    W, group_size = case
    solved = rtn(W, bits=bits, group_size=group_size, symmetric=symmetric)
    assert ((solved.weight - W).abs() <= spread(solved.qparams, W) * 0.5 * (1 + 1e-4) + 1e-30).all()


@quick
@given(weights(), st.integers(2, 8), st.booleans())
def test_grid_is_storable_and_idempotent(case, bits, symmetric):
    W, group_size = case
    qparams = choose_qparams(W, bits=bits, group_size=group_size, symmetric=symmetric)
    assert (
        torch.equal(qparams.scale.half().float(), qparams.scale) and (qparams.scale > 0).all()
    )  # what is evaluated is what is stored
    assert (
        torch.equal(qparams.zero.round(), qparams.zero)
        and (qparams.zero >= 0).all()
        and (qparams.zero <= 2**bits - 1).all()
    )
    assert (qparams.dequantize(qparams.quantize(torch.zeros_like(W))) == 0).all()  # 0 is exactly on the grid
    once = qparams.fake_quantize(W)
    assert torch.equal(qparams.fake_quantize(once), once)
    assert once.isfinite().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_zero_and_constant_rows(bits):
    W = torch.stack([torch.zeros(6), torch.full((6,), 0.25), torch.full((6,), -3.0)])
    affine = rtn(W, bits=bits).weight
    assert (affine[0] == 0).all() and torch.allclose(affine, W, rtol=2**-9)
    assert (rtn(W, bits=bits, symmetric=True).weight[0] == 0).all()


@pytest.mark.parametrize("bits", [0, 1, 9, 1.5, True, "4", None, 4.0])
def test_bits_are_refused(bits):
    W = torch.ones(2, 4)
    for call in (
        lambda: rtn(W, bits=bits),
        lambda: gptq(W, torch.eye(4), bits=bits),
        lambda: RTN(bits=bits),
        lambda: GPTQ(bits=bits),
        lambda: EmbeddingRTN(bits=bits),
    ):
        with pytest.raises(BadInput, match=r"bits is .*2 to 8"):
            call()


@pytest.mark.parametrize("group_size", [0, -4, 3, 5, 8, 2.0, True, "row", None])
def test_group_size_that_does_not_divide_is_refused(group_size):
    with (
        pytest.raises(BadInput, match=r"group_size is .*4 columns")
        if group_size is not True
        else pytest.raises(BadInput)
    ):
        rtn(torch.ones(2, 4), bits=4, group_size=group_size)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RTN(symmetric="false"), "symmetric is 'false'"),
        (lambda: GPTQ(act_order="no"), "act_order is 'no'"),
        (lambda: GPTQ(damping=float("nan")), "damping is nan"),
        (lambda: GPTQ(damping=-1), "damping is -1"),
        (lambda: GPTQ(block_size=0), "block_size is 0"),
        (lambda: GPTQ(n_calib="16"), "n_calib is '16'"),
        (lambda: EmbeddingRTN(symmetric=1), "symmetric is 1"),
    ],
)
def test_options_of_another_type_are_refused(make, sentence):
    with pytest.raises(BadInput) as caught:
        make()
    assert sentence in str(caught.value)


def test_passes_refuse_before_they_change_anything(student):
    for method in (RTN(group_size=3), GPTQ(group_size=3, seq_len=16)):
        with pytest.raises(BadInput, match=r"layers.0.*group_size is 3"):
            check_passes(student, [method])
    with pytest.raises(BadInput, match="input embedding"):
        check_passes(student, [EmbeddingRTN()])


def test_an_embedding_that_does_more_than_look_up_is_refused():
    from archs import build

    with pytest.raises(BadInput, match="ScaledWordEmbedding"):
        check_passes(build("gemma3"), [EmbeddingRTN()])


def test_tiny_weights_are_refused_rather_than_lost():
    tiny = torch.full((2, 4), 1e-9)
    with pytest.raises(BadInput, match="largest weight is 9"):
        rtn(tiny, bits=4)
    assert rtn(tiny, bits=4, scale_dtype=torch.float32).weight.all()
    assert not rtn(torch.zeros(2, 4), bits=4).weight.any()


def test_an_expert_that_no_token_visits_is_rounded_and_named():
    from archs import build

    from llmcourse.compression import compress
    from llmcourse.data import TokenData
    from llmcourse.runtime import Runtime

    stream = torch.full((64,), 7)  # one token only: few experts are visited
    data = TokenData(
        train=stream, val=stream, test=stream, calib=stream, bytes={}, name="one", tokenizer="none", separator=0
    )
    rt = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    model = build("ours, experts")
    student, (report,) = compress(model, [GPTQ(bits=4, group_size=16, n_calib=2, seq_len=16)], data, rt)
    unseen = [layer for layer in report.layers if layer.tokens == 0]
    assert unseen and all(layer.output_error is None for layer in unseen)
    assert f"{len(unseen)} layers saw no calibration token" in str(report)
    name = unseen[0].name
    W = model.get_submodule(name).weight.detach()
    assert torch.equal(student.get_submodule(name).weight, rtn(W, bits=4, group_size=16).weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(bad):
    W = torch.ones(3, 4)
    W[1, 2] = bad
    for call in (
        lambda: rtn(W, bits=4),
        lambda: gptq(W, torch.eye(4), bits=4),
        lambda: gptq_reference(W, torch.eye(4), bits=4),
    ):
        with pytest.raises(BadInput, match=r"W\[1, 2\] is"):
            call()


@pytest.mark.parametrize(
    "W", [torch.ones(4), torch.ones(2, 4, dtype=torch.int64), torch.ones(1, 2, 3), torch.ones(0, 4)]
)
def test_what_is_no_weight_matrix_is_refused(W):
    with pytest.raises(BadInput, match="W is"):
        rtn(W, bits=4)


def test_scale_beyond_float16_is_refused():
    with pytest.raises(BadInput, match="largest scale"):
        rtn(torch.tensor([[0.0, 1e8]]), bits=4)
    assert rtn(torch.tensor([[0.0, 1e8]]), bits=4, scale_dtype=torch.float32).weight.isfinite().all()


def test_rtn_leaves_its_input_alone_and_keeps_dtype_and_mask():
    W = torch.randn(4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    before, mask = W.clone(), torch.arange(32).view(4, 8) % 3 != 0
    solved = rtn(W, bits=3, group_size=4, mask=mask)
    assert torch.equal(W, before) and solved.weight.dtype == torch.bfloat16 and (solved.weight[~mask] == 0).all()
    with pytest.raises(BadInput, match="mask shape"):
        rtn(W, bits=3, mask=mask[:2])


def test_rtn_matches_torch():
    W = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    for bits in range(2, 9):
        qparams = choose_qparams(W, bits=bits)
        theirs = torch.fake_quantize_per_channel_affine(
            W, qparams.scale[:, 0], qparams.zero[:, 0].int(), 0, 0, 2**bits - 1
        )
        tie = ((W / qparams.scale) % 1 - 0.5).abs() < 1e-4
        assert ((theirs == qparams.fake_quantize(W)) | tie).all()


# ---------------------------------------------------------------- GPTQ


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["tensor", "channel", 4, 16, 24]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 60),
    st.booleans(),
)
def test_gptq_codes_equal_the_reference(seed, bits, group_size, symmetric, act_order, block_size, masked):
    W, H = random_problem(seed)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": act_order, "mask": mask}
    slow, fast = gptq_reference(W, H, **options), gptq(W, H, block_size=block_size, **options)
    assert torch.equal(slow.qparams.scale, fast.qparams.scale) and torch.equal(slow.qparams.zero, fast.qparams.zero)
    assert torch.equal(slow.qparams.quantize(slow.weight), fast.qparams.quantize(fast.weight))
    assert torch.equal(
        fast.qparams.fake_quantize(fast.weight), fast.weight
    )  # it lies on the grid that is handed back, so it packs
    if masked:
        assert (fast.weight[~mask] == 0).all()


@pytest.mark.parametrize("group_size", ["channel", 16])
def test_float32_layer_error_within_one_percent(group_size):
    for seed in range(20):
        W, H = random_problem(seed, rows=16, columns=96, tokens=400)
        double = gptq(W, H, bits=3, group_size=group_size)
        single = gptq(W.float(), H.float(), bits=3, group_size=group_size)
        assert single.weight.dtype == torch.float32
        assert layer_error(single.weight.double() - W, H) == pytest.approx(layer_error(double.weight - W, H), rel=0.01)


@pytest.mark.parametrize("group_size", ["tensor", "channel", 8])
def test_identity_hessian_gives_rtn(group_size):
    W, _ = random_problem(1)
    mask = W > -0.5
    for m in (None, mask):
        a, b = (
            gptq(W, torch.eye(48), bits=3, group_size=group_size, mask=m),
            rtn(W, bits=3, group_size=group_size, mask=m),
        )
        assert torch.equal(a.weight, b.weight) and torch.equal(a.qparams.scale, b.qparams.scale)
    zero = gptq(W, torch.zeros(48, 48), bits=3, group_size=group_size)  # no input was ever seen
    assert torch.equal(zero.weight, rtn(W, bits=3, group_size=group_size).weight)


def test_gptq_beats_rtn_on_correlated_inputs():
    exceptions = []
    for seed in range(100):
        W, H = random_problem(seed)
        ratio = layer_error(gptq(W, H, bits=3, group_size=16).weight - W, H) / layer_error(
            rtn(W, bits=3, group_size=16).weight - W, H
        )
        if ratio >= 1:
            exceptions.append((seed, ratio))
    print("exceptions:", exceptions or "none")
    assert len(exceptions) <= 5


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_gptq_solves_the_layers_of_a_site_as_one(group_size, act_order, masked):
    """Rows do not meet: together or one by one, each layer gets the same values, in tensors of its own."""
    dice = torch.Generator().manual_seed(1)
    X = torch.randn(200, 16, generator=dice) @ torch.randn(16, 16, generator=dice)
    weights = {name: torch.randn(rows, 16, generator=dice) for name, rows in (("q", 6), ("k", 3), ("v", 1))}
    given = {"none": (), "some": ("k",), "all": tuple(weights)}[masked]
    masks = {n: (torch.rand(W.shape, generator=dice) > 0.4 if n in given else None) for n, W in weights.items()}
    before = {n: W.clone() for n, W in weights.items()}
    seen = Hessian()
    seen.add(X)
    method = GPTQ(bits=3, group_size=group_size, act_order=act_order)
    found = method.solve_site(Site("s", {}), weights, {Hessian: seen}, masks)
    assert found.scale is None and list(found.layers) == list(weights)
    for name, W in weights.items():
        alone, new = method.solve(W, {Hessian: seen}, masks[name]), found.layers[name]
        assert torch.allclose(new.weight, alone.weight, rtol=1e-5, atol=1e-6) and new.mask is masks[name]
        for key in ("scale", "zero"):
            assert torch.allclose(getattr(new.qparams, key), getattr(alone.qparams, key), rtol=1e-3)
        own = (new.weight, new.qparams.scale, new.qparams.zero)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in own)
        assert torch.equal(W, before[name])


def test_the_error_of_masked_weights_is_passed_on():
    ratios = []
    for seed in range(20):
        W, H = random_problem(seed, dead=False)
        mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
        solved = gptq(W, H, bits=8, mask=mask)
        assert (solved.weight[~mask] == 0).all()
        # 8 bits round next to nothing: what is repaired here is the pruning
        ratios.append(layer_error(solved.weight - W, H) / layer_error(rtn(W, bits=8, mask=mask).weight - W, H))
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.9


def test_hessian_that_cannot_be_used_is_refused():
    W = torch.ones(2, 3)
    with pytest.raises(BadInput, match=r"positive definite.*damping"):
        gptq(W, torch.ones(3, 3), bits=4, damping=0)
    with pytest.raises(BadInput, match="shape of H"):
        gptq(W, torch.eye(4), bits=4)
    with pytest.raises(BadInput, match="finite"):
        gptq(W, torch.full((3, 3), torch.nan), bits=4)
    with pytest.raises(BadInput, match="diagonal"):
        gptq(W, -torch.eye(3), bits=4)
    with pytest.raises(BadInput, match="damping"):
        gptq(W, torch.eye(3), bits=4, damping=-1)
    with pytest.raises(BadInput, match="block_size"):
        gptq(W, torch.eye(3), bits=4, block_size=0)


def test_inverse_factor():
    _, H = random_problem(0, dead=False)
    U = inverse_factor(H)
    assert torch.equal(U, U.triu()) and torch.allclose(U.T @ U @ H, torch.eye(48, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 128, 129, 301])
def test_inverse_factor_is_triangular_and_exact_at_any_width(width):
    dice = torch.Generator().manual_seed(width)
    X = torch.randn(2 * width + 4, width, generator=dice, dtype=torch.float64)
    H = X.T @ X / width
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ H, torch.eye(width, dtype=torch.float64), atol=1e-9)


# ---------------------------------------------------------------- packing


@quick
@given(st.integers(2, 8), st.integers(0, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_pack_round_trip(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, math.ceil(n * bits / 8))
    assert torch.equal(packed, pack_bits(codes, bits))
    assert torch.equal(unpack(packed, bits, n), codes) and torch.equal(unpack_bits(packed, bits, n), codes)


def test_pack_refuses():
    with pytest.raises(BadInput, match="largest code is 16"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(BadInput, match="dtype of codes"):
        pack(torch.tensor([1]), 4)
    with pytest.raises(BadInput, match="packed"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)


@quick
@given(weights(), st.integers(2, 8), st.booleans(), st.booleans())
def test_packed_layers_hold_the_same_weights(case, bits, symmetric, bias):
    W, group_size = case
    solved = rtn(W, bits=bits, group_size=group_size, symmetric=symmetric)
    b = torch.ones(len(W)) if bias else None
    layer = PackedLinear.from_weight(solved.weight, solved.qparams, b)
    assert torch.equal(layer.dequantized(), solved.weight)
    x = torch.randn(3, W.shape[1])
    assert torch.equal(layer(x), nn.functional.linear(x, solved.weight, b))
    O, I = W.shape
    R, G = solved.qparams.scale.shape
    assert (
        layer.nbytes
        == O * math.ceil(I * bits / 8) + 2 * R * G + (0 if symmetric else R * math.ceil(G * bits / 8)) + 4 * O * bias
    )
    ids = torch.arange(O).flip(0)[None]
    assert torch.equal(PackedEmbedding.from_weight(solved.weight, solved.qparams)(ids), solved.weight[ids])


def test_a_change_of_format_keeps_what_is_stored():
    solved = rtn(torch.randn(8, 16), bits=4)
    layer = PackedLinear.from_weight(solved.weight, solved.qparams).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.dequantized(), solved.weight)
    assert layer(torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (
        PackedEmbedding.from_weight(solved.weight, solved.qparams).to(torch.bfloat16)(torch.tensor([0])).dtype
        == torch.bfloat16
    )


# ---------------------------------------------------------------- whole models and folders


@pytest.fixture(scope="module")
def student():
    """A tiny Llama with tied embeddings: 3-bit linears (one of them pruned first), 8-bit embedding."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, module in model.model.named_modules():
        if type(module) is nn.Linear:
            mask = (
                torch.arange(module.weight.numel()).view_as(module.weight) % 2 == 0 if name.endswith("q_proj") else None
            )
            write_back(module, rtn(module.weight.detach().clone(), bits=3, group_size=16, mask=mask))
    EmbeddingRTN().run(model)
    return model


IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def folder(student, tmp_path):
    save_student(student, None, tmp_path / "m")
    return tmp_path / "m"


def test_pack_model_changes_nothing_but_the_bytes(student):
    expected = student(IDS).logits
    packed = pack_model(student)
    assert torch.equal(packed(IDS).logits, expected)
    assert isinstance(packed.model.embed_tokens, PackedEmbedding) and isinstance(packed.lm_head, PackedHead)
    assert packed.lm_head.source[0] is packed.model.embed_tokens  # tied stays tied
    assert (
        student.lm_head.weight is student.model.embed_tokens.parametrizations.weight.original
    )  # the input is as it was
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    assert not any(isinstance(m, (FakeQuant, Mask)) for m in packed.modules())
    sizes = stored_bytes(packed)
    assert (
        sizes["total"]
        == sum(t.nbytes for t in packed.state_dict().values())
        == sum(v for k, v in sizes.items() if k != "total")
    )
    dense = dequantize_model(packed)
    assert torch.equal(dense(IDS).logits, expected) and dense.lm_head.weight is dense.model.embed_tokens.weight
    with pytest.raises(BadInput, match="fake-quantized"):
        pack_model(nn.Linear(2, 2))


def test_bytes_on_disk_are_those_of_the_report(student, tmp_path):
    report = save_student(student, None, tmp_path)
    raw = (tmp_path / "packed.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    about = json.loads(raw[8 : 8 + header])
    tensors = sum(
        end - start for key, entry in about.items() if key != "__metadata__" for start, end in [entry["data_offsets"]]
    )
    assert len(raw) - 8 - header == tensors == report["total"]
    assert report["embedding"] == 96 * 32 + 96 * 2
    assert report["codes"] == 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64) * 3 // 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "MANIFEST.json",
        "config.json",
        "generation_config.json",
        "packed.safetensors",
    ]  # no temporary file is left


def test_folder_loads_back(student, folder):
    expected = student(IDS).logits
    model, tokenizer = load_student(folder)
    assert tokenizer is None and not model.training
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)  # the norms are 1, exact in bfloat16
    dense, _ = load_student(folder, dequantize=True)
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert load_student(folder, dtype=torch.bfloat16).model(IDS).logits.dtype == torch.bfloat16
    again = folder.parent / "again"
    save_student(model, None, again)
    assert (again / "packed.safetensors").read_bytes() == (folder / "packed.safetensors").read_bytes()


def test_an_embedding_that_is_left_alone_stays_tied(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    write_back(
        model.model.layers[0].mlp.up_proj, rtn(model.model.layers[0].mlp.up_proj.weight.detach().clone(), bits=4)
    )
    report = save_student(model, None, tmp_path, rest_dtype=torch.float32)
    assert report["embedding"] == 4 * 96 * 32
    loaded, _ = load_student(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)


def test_transformers_stops_instead_of_guessing(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(folder)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def rewrite(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "packed.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
        (lambda f: (f / "packed.safetensors").unlink(), "packed.safetensors, which is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json, which is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "quantization_config is None"),
        (lambda f: edit(f, lambda q: q.update(quant_method="gptq")), "quant_method is 'gptq'"),
        (lambda f: edit(f, lambda q: q.update(version=99)), "version is 99"),
        (lambda f: edit(f, lambda q: q["layers"].pop(UP)), "has no partner"),
        (lambda f: edit(f, lambda q: q["layers"][UP].update(bits=5)), f"shape of {UP}.codes"),
        (lambda f: edit(f, lambda q: q["layers"][UP].update(kind="Surprise")), f"kind of {UP}"),
        (lambda f: rewrite(f, "packed.safetensors", lambda b: b[:-100]), "cannot be read"),
        (lambda f: rewrite(f, "packed.safetensors", lambda b: b""), "cannot be read"),
        (lambda f: rewrite(f, "config.json", lambda b: b.replace(b"LlamaForCausalLM", b"os")), "architectures is 'os'"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True], ids=["as found", "with a manifest that agrees"])
def test_damaged_folders_are_refused_in_one_sentence(folder, damage, sentence, hidden):
    damage(folder)
    if hidden:
        write_manifest(folder)
    with pytest.raises(BadInput) as caught:
        load_student(folder)
    missing = "missing" in sentence or "pickle" in sentence
    expected = sentence if hidden or missing else "manifest says" if "cannot be read" in sentence else "manifest"
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(folder):
    rewrite(folder, "packed.safetensors", lambda b: b[:-50] + bytes([b[-50] ^ 1]) + b[-49:])
    with pytest.raises(BadInput, match=r"packed\.safetensors whose sha256 is not the one in the manifest"):
        load_student(folder)


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(BadInput, match="folder is"):
        load_student(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="pickle"):
        load_student(tmp_path / "model.pt")


def test_a_failed_write_leaves_the_old_folder(student, folder, monkeypatch):
    import safetensors.torch

    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def disk_full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_student(student, None, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing half-written beside it


def test_save_refuses_what_it_cannot_store(student, tmp_path):
    with pytest.raises(BadInput, match="a GPT, or a model of transformers"):
        save_student(nn.Linear(2, 2), None, tmp_path / "a")
    with pytest.raises(BadInput, match="rest_dtype"):
        save_student(student, None, tmp_path / "a", rest_dtype=torch.int8)
    assert not (tmp_path / "a").exists()


def test_embedding_is_quantized_once(student):
    with pytest.raises(BadInput, match="input embedding"):
        EmbeddingRTN().check(student)


def test_counts_of_packed_layers(student):
    from llmcourse.compression import count_parameters, flops_per_token

    packed = pack_model(student)
    assert count_parameters(packed)[0] == sum(p.numel() for p in dequantize_model(packed).parameters())
    assert flops_per_token(packed) == flops_per_token(dequantize_model(packed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(student):
    W, H = random_problem(0)
    here, there = gptq(W, H, bits=3, group_size=16), gptq(W.cuda(), H.cuda(), bits=3, group_size=16)
    assert (here.weight == there.weight.cpu()).float().mean() > 0.99
    packed = pack_model(student).cuda()
    torch.testing.assert_close(packed(IDS.cuda()).logits.cpu(), student(IDS).logits, rtol=1e-3, atol=1e-4)
    assert packed.lm_head.source[0] is packed.model.embed_tokens


def test_quick_benchmark(home, tmp_path):
    """One candidate beside the dense model, in processes of their own; the time means nothing here."""
    out = tmp_path / "compression.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "compression.py"), "--quick", "--out", str(out)]
    command += ["--methods", "llmcourse: RTN"]
    subprocess.run(command, env=clean_env(), check=True, capture_output=True, timeout=300)
    (found,) = json.loads(out.read_text())["models"].values()
    dense, row = found["rows"].pop("dense"), found["rows"].pop("llmcourse: RTN")
    assert not found["rows"] and dense["to_dense"] == [1, 1, 1]
    assert row["perplexity"] / dense["perplexity"] == pytest.approx(row["to_dense"][0], rel=1e-3)
    assert row["to_dense"][1] < row["to_dense"][0] < row["to_dense"][2] and row["seconds"][0] > 0
