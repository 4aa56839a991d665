"""Below four bits: training with rounding, codebooks, two and three values, bits under a budget."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from archs import CAUSAL, OURS, build, ids, logits, random_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from llmcourse.compression import Codebook, compress, mask_of, qparams_of
from llmcourse.evaluation import perplexity
from llmcourse.lowbit import (
    NF4,
    QAT,
    Binary,
    Shown,
    Ternary,
    allocate,
    allocate_greedy,
    binary,
    from_codebook,
    layer_bytes,
    mixed,
    normal_float,
    pack_trits,
    sensitivity,
    ternary_absmean,
    ternary_best,
    ternary_twn,
    to_codebook,
    to_levels,
    uniform_values,
    unpack_trits,
)
from llmcourse.packed import load_student, pack_model, save_student
from llmcourse.pruning import Magnitude
from llmcourse.quantization import RTN, rtn
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.training import train

RT = Runtime.auto("cpu", "float32")
TRAIN = dict(steps=3, batch_size=4, seq_len=16, lr=3e-3, n_train=20)
LONGER = TRAIN | dict(steps=20)
HOW = dict(bits=2, group_size=8, **LONGER)
# Appendix E of the paper on QLoRA
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return random_text()


@pytest.fixture(scope="module")
def dense():
    return build("llama")


@pytest.fixture(scope="module")
def student(dense, data):
    return compress(dense, [QAT(**HOW)], data, RT)[0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and qparams_of(m) is not None]


# ---------------------------------------------------------------- training with rounded weights


def test_every_layer_lies_on_its_grid_and_the_raw_weights_have_learned(dense, student):
    layers = quantized(student)
    assert len(layers) == len(quantized(compress(dense, [RTN(bits=2, group_size=8)], None, None)[0])) > 5
    names = {m: n for n, m in student.named_modules()}
    for layer in layers:
        q, raw = qparams_of(layer), layer.parametrizations.weight.original
        assert torch.equal(q.fake_quantize(layer.weight), layer.weight) and not torch.equal(layer.weight, raw)
        assert not torch.equal(raw, dense.get_submodule(names[layer]).weight)


def on_its_training_text(model, data):
    """Perplexity on the text of the training: a test of the training, not of a language model."""
    again = copy.copy(data)
    object.__setattr__(again, "test", data.train)
    return perplexity(model, again, context=16, stride=15, batch_size=8, rt=RT).value


@pytest.mark.parametrize(
    "trained, as_they_are",
    [
        (QAT(**HOW), RTN(bits=2, group_size=8)),
        (Ternary(**LONGER), Ternary()),
        (Ternary(rule="absmean", **LONGER), Ternary(rule="absmean")),
        (Binary(**LONGER), Binary()),
    ],
    ids=["qat", "twn", "absmean", "binary"],
)
def test_it_learns_what_rounding_has_cost(dense, data, trained, as_they_are):
    rounded, learned = (compress(dense, [p], data, RT)[0] for p in (as_they_are, trained))
    assert on_its_training_text(learned, data) < on_its_training_text(rounded, data)


def test_the_gradient_passes_straight_through():
    W, G = normal(4, 8).requires_grad_(), normal(4, 8, seed=1)
    q = rtn(W.detach(), bits=2).qparams
    naive = W + (q.fake_quantize(W) - W).detach()
    (naive * G).sum().backward()
    assert torch.equal(W.grad, G)
    (torch.round(W) * G).sum().backward()
    assert torch.equal(W.grad, G), "the derivative of rounding is 0"
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data = W.detach().clone()
    parametrize.register_parametrization(layer, "weight", Shown(q.fake_quantize))
    (layer.weight * G).sum().backward()
    torch.testing.assert_close(layer.weight, q.fake_quantize(W))
    assert torch.equal(layer.parametrizations.weight.original.grad, G)


def test_a_clipped_weight_stays_where_it_is(data, student):
    model = copy.deepcopy(student)
    layer = quantized(model)[0]
    raw, q = layer.parametrizations.weight.original, qparams_of(layer)
    far = 100 * q.columns(0, raw.shape[1])[0][0, 0].item()
    with torch.no_grad():
        raw[0, 0], raw[0, 1] = far, -far
    before = raw.detach().clone()
    train(model, data, QAT(**HOW | dict(steps=3)).training, rt=RT)
    moved = raw.detach() != before
    inside = q.inside(before)
    assert not inside[0, :2].any() and not moved[~inside].any() and moved[inside].float().mean() > 0.9


@pytest.mark.parametrize("method", [QAT(bits=2, group_size=8, **TRAIN), Ternary(**TRAIN), Ternary(), NF4(group_size=8)])
def test_masks_stay(dense, data, method):
    found = compress(dense, [Magnitude(sparsity=0.5), method], data, RT)[0]
    masked = [m for m in found.modules() if isinstance(m, nn.Linear) and mask_of(m) is not None]
    assert len(masked) > 5
    for layer in masked:
        assert (layer.weight[~mask_of(layer)] == 0).all() and 0.4 < mask_of(layer).float().mean() < 0.6


@pytest.mark.parametrize("method", [QAT(bits=2, group_size=8, **TRAIN), Ternary(**TRAIN), Binary(), NF4(group_size=8)])
def test_the_folder_holds_what_was_made(dense, data, method, tmp_path):
    made = compress(dense, [method], data, RT)[0]
    save_student(made, None, tmp_path / "s", rest_dtype=torch.float32)
    torch.testing.assert_close(
        logits(load_student(tmp_path / "s")[0], ids()), logits(made, ids()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", [QAT(bits=2, group_size=8, **TRAIN), Ternary(**TRAIN)])
def test_the_same_seed_gives_the_same_bits(dense, data, method):
    runs = (copy.copy(method) for _ in range(2))
    one, two = (compress(dense, [p], data, RT)[0].state_dict() for p in runs)
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = type(method)(**method.config | {"seed": 1})
    three = compress(dense, [other], data, RT)[0].state_dict()
    assert any(not torch.equal(one[k], three[k]) for k in one)


def test_no_text_to_train_on_is_refused_before_the_work(dense, data):
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    for method in (QAT(**HOW), Ternary(**TRAIN)):
        for text, n in ((None, 20), (data, 100)):  # data has 400 tokens in each part
            with pytest.raises(BadInput, match=r"data\.train"):
                compress(dense, [type(method)(**method.config | dict(n_train=n))], text, RT)
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in before.items())


# ---------------------------------------------------------------- codebooks


def test_the_sixteen_values_are_the_published_ones():
    torch.testing.assert_close(normal_float(), torch.tensor(PUBLISHED), rtol=0, atol=3e-7)
    for bits in (2, 3, 5, 8):
        for values in (normal_float(bits), uniform_values(bits)):
            assert len(values) == 2**bits and values[0] == -1 and values[-1] == 1 and (values == 0).sum() == 1
            assert (values.diff() > 0).all() and (values > 0).sum() == (values < 0).sum() + 1


@given(seed=st.integers(0, 999), width=st.sampled_from([4, 8, 16, "channel"]), uniform=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_code_is_the_nearest_value(seed, width, uniform):
    W = normal(3, 16, seed=seed) * 10 ** normal(1, seed=seed + 1).item()
    values = uniform_values() if uniform else normal_float()
    codes, scale = to_codebook(W, values, group_size=width)
    n = 16 if width == "channel" else width
    for i, j in itertools.product(range(3), range(16)):
        s = W[i, j // n * n : j // n * n + n].abs().max().half().float()
        assert scale[i, j // n] == s
        distance = (values.double() * s.double() - W[i, j].double()).abs()
        assert distance[codes[i, j].item()] <= distance.min() * (1 + 1e-5) + 1e-12
    shown = from_codebook(codes, scale, values)
    again = from_codebook(*to_codebook(shown, values, group_size=width), values)
    torch.testing.assert_close(again, shown, rtol=2e-3, atol=1e-6)


def test_codes_and_values_of_torchao():
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    W = normal(64, 256) * 0.02
    theirs = ao.to_nf4(W, 64, 256)
    packed = theirs.quantized_data
    codes = torch.stack((packed >> 4, packed & 15), -1).view(64, 256)
    table = theirs.nf4  # the published values with four digits
    torch.testing.assert_close(normal_float(), table, rtol=0, atol=5.1e-5)
    ours, _ = to_codebook(W, table, group_size=64, scale_dtype=torch.float32)
    assert torch.equal(ours, codes)
    exact, _ = to_codebook(W, normal_float(), group_size=64, scale_dtype=torch.float32)
    assert (exact != codes).float().mean() < 2e-3
    # they store the scales in 8 bits: with their scales, our values are theirs
    s = theirs.dequantize_scalers(theirs.quantized_scalers, theirs.quantization_factor, theirs.scaler_block_size)
    torch.testing.assert_close(from_codebook(ours, s.view(64, 4), table), theirs.get_original_weight())


def test_a_group_of_zeros_and_numbers_that_do_not_fit():
    W = torch.zeros(2, 8)
    codes, scale = to_codebook(W, normal_float(), group_size=4)
    assert (scale == 1).all() and torch.equal(from_codebook(codes, scale, normal_float()), W)
    with pytest.raises(BadInput, match="65504"):
        to_codebook(W + 1e6, normal_float(), group_size=4)
    with pytest.raises(BadInput, match="ascending"):
        to_codebook(W, normal_float().flip(0), group_size=4)
    with pytest.raises(BadInput, match="group_size"):
        to_codebook(W, normal_float(), group_size=3)


def test_nf4_treats_every_layer_and_nothing_may_move_it_afterwards(dense):
    found, (report,) = compress(dense, [NF4(group_size=8)], None, None)
    assert len(report.layers) == len(quantized(compress(dense, [RTN(group_size=8)], None, None)[0]))
    for layer in report.layers:
        groups = found.get_submodule(layer.name).weight.unflatten(1, (-1, 8))
        assert max(len(g.unique()) for g in groups.flatten(0, 1)) <= 16 and 0 < layer.weight_error < 0.02
    for wrong in (
        lambda: compress(dense, [NF4(group_size=8), Magnitude(sparsity=0.5)], None, None),
        lambda: compress(found, [Magnitude(sparsity=0.5)], None, None),
    ):
        with pytest.raises(BadInput, match="prune first"):
            wrong()
    with pytest.raises(BadInput, match="one rounding for each layer"):
        compress(found, [NF4(group_size=8)], None, None)


# ---------------------------------------------------------------- two and three values


def error(w, levels, scale):
    return (w - levels * scale).square().sum(-1)


@given(seed=st.integers(0, 9999), n=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_closed_forms_against_all_possibilities(seed, n):
    w = normal(n, seed=seed).double()

    def brute(allowed):
        found = []
        for levels in itertools.product(allowed, repeat=n):
            t = torch.tensor(levels, dtype=torch.float64)
            scale = (w @ t) / (t @ t).clamp_min(1)  # least squares, for these levels
            found.append(error(w, t, scale).item())
        return min(found)

    two, three = brute((-1, 1)), brute((-1, 0, 1))
    assert error(w, *binary(w)).item() == pytest.approx(two, rel=1e-9, abs=1e-12)
    assert error(w, *ternary_best(w)).item() == pytest.approx(three, rel=1e-9, abs=1e-12)
    assert error(w, *ternary_twn(w)).item() >= three - 1e-12
    assert error(w, *ternary_absmean(w)).item() >= three - 1e-12


def test_the_rules_by_hand():
    w = torch.tensor([[0.1, -0.5, 1.0, -2.0]])  # mean |w| is 0.9: below 0.63 is 0
    levels, scale = ternary_twn(w)
    assert levels.tolist() == [[0, 0, 1, -1]] and scale.item() == pytest.approx(1.5)
    levels, scale = ternary_absmean(w)  # 0.1 and 0.5 of 0.9 are 0.11 and 0.56
    assert levels.tolist() == [[0, -1, 1, -1]] and scale.item() == pytest.approx(0.9)
    levels, scale = binary(torch.tensor([[0.0, -0.5, 1.0, -2.5]]))
    assert levels.tolist() == [[1, -1, 1, -1]] and scale.item() == 1


def test_on_normal_weights_the_threshold_is_nearly_the_best():
    w = normal(200, 500)
    share = {f.__name__: (error(w, *f(w)).sum() / w.square().sum()).item() for f in (binary, ternary_twn, ternary_best)}
    assert share["binary"] == pytest.approx(1 - 2 / torch.pi, abs=0.005)  # 1 - (E|w|)² of a normal
    assert share["ternary_best"] <= share["ternary_twn"] < share["ternary_best"] + 0.01 and share["ternary_twn"] < 0.2


@pytest.mark.parametrize("group_size", ["tensor", "channel", 8])
@pytest.mark.parametrize("rule", ["twn", "absmean", "best", "binary"])
def test_levels_are_codes_of_a_table(rule, group_size):
    W = normal(6, 16)
    W[2] = 0
    shown, q = to_levels(W, rule=rule, group_size=group_size)
    assert isinstance(q, Codebook) and torch.equal(q.dequantize(q.quantize(shown)), shown)
    assert torch.equal(q.fake_quantize(shown), shown) and len(q.values) == (2 if rule == "binary" else 3)
    assert torch.equal(q.scale.half().float(), q.scale)
    if group_size != "tensor":
        assert (shown[2] == 0).all()


def test_a_layer_of_each_family_gets_few_values(data):
    for name in (n for n in [*OURS, *CAUSAL] if n in ("ours", "gpt2", "mixtral")):
        model = build(name)
        for method, most in ((Ternary(), 3), (Binary(), 2), (Ternary(**TRAIN), 3)):
            found, (report,) = compress(model, [method], data, RT)
            for layer in report.layers:
                rows = found.get_submodule(layer.name).weight
                assert max(len(row.unique()) for row in rows) <= most, (name, layer.name)


def test_two_values_have_no_place_for_a_mask(dense):
    with pytest.raises(BadInput, match="mask"):
        compress(dense, [Magnitude(sparsity=0.5), Binary()], None, None)


@given(n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_five_levels_in_a_byte(n, seed):
    levels = torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(seed))
    packed = pack_trits(levels)
    assert packed.dtype == torch.uint8 and len(packed) == -(-n // 5)
    assert torch.equal(unpack_trits(packed, n).long(), levels)


# ---------------------------------------------------------------- bits under a budget


def total(table, chosen):
    return sum(row[k] for row, k in zip(table, chosen))


@given(
    tables=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    share=st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_the_allocation_is_the_best_of_all(tables, share):
    costs, errors = ([[t[i] for t in row] for row in tables] for i in (0, 1))
    least, most = (sum(map(f, costs)) for f in (min, max))
    budget = least + int(share * (most - least))
    choices = itertools.product(*(range(len(row)) for row in costs))
    best = min(total(errors, c) for c in choices if total(costs, c) <= budget)
    for method in (allocate, allocate_greedy):
        chosen = method(costs, errors, budget)
        assert len(chosen) == len(costs) and total(costs, chosen) <= budget
        found = total(errors, chosen)
        assert found >= best - 1e-12 and (method is allocate_greedy or found == pytest.approx(best, abs=1e-12))


def test_greedy_can_be_wrong():
    # the best step per byte uses up what the other layer needed
    costs, errors = [[0, 1], [0, 3]], [[2.0, 0.0], [5.0, 0.0]]
    assert allocate(costs, errors, 3) == [0, 1] and allocate_greedy(costs, errors, 3) == [1, 0]


@pytest.mark.parametrize("how", [dict(bits=3), dict(bits=4, symmetric=True), dict(bits=2, group_size="channel"),
                                 dict(bits=8, group_size="tensor")])  # fmt: skip
def test_bytes_are_those_of_the_packed_layer(dense, how):
    how = dict(group_size=8) | how
    packed = pack_model(compress(dense, [RTN(**how)], None, None)[0])
    layers = [m for m in packed.modules() if type(m).__name__ == "PackedLinear"]
    assert layers and all(m.nbytes == layer_bytes((m.rows, m.columns), **how) for m in layers)


def test_sensitivity_changes_nothing_and_finds_the_layer_that_matters(dense):
    model = copy.deepcopy(dense)
    block = model.model.layers[0]
    layers = {"up": block.mlp.up_proj, "down": block.mlp.down_proj}
    before, x = logits(model, ids()), normal(20, 48)
    W = block.mlp.down_proj.weight.clone()
    loss = lambda: ((block.mlp.down_proj.weight - W) @ x.T).square().mean().item()  # only "down" matters
    found = sensitivity(layers, loss, (2, 4, 8), group_size=8)
    assert found["up"] == [0, 0, 0] and found["down"][0] > found["down"][1] > found["down"][2] > 0
    assert torch.equal(logits(model, ids()), before)

    def breaks():
        raise KeyboardInterrupt

    calls = iter((lambda: 0.0, breaks))
    with pytest.raises(KeyboardInterrupt):
        sensitivity(layers, lambda: next(calls)(), (2,), group_size=8)
    assert torch.equal(logits(model, ids()), before)


def test_an_allocation_is_a_list_of_passes(dense):
    names = [r.name for r in compress(dense, [RTN(group_size=8)], None, None)[1][0].layers]
    bits = [2 + i % 3 for i in range(len(names))]
    found, _ = compress(dense, mixed(names, bits, lambda **how: RTN(group_size=8, **how)), None, None)
    for name, b in zip(names, bits):
        assert qparams_of(found.get_submodule(name)).bits == b


@pytest.mark.parametrize(
    "costs, errors, budget, word",
    [
        ([[1, 2]], [[1.0]], 5, "errors"),
        ([], [], 5, "errors"),
        ([[]], [[]], 5, "errors"),
        ([[1, 2]], [[1.0, float("nan")]], 5, "finite"),
        ([[2, 3], [2, 3]], [[1.0, 0.0], [1.0, 0.0]], 3, "at least 4"),
    ],
)
def test_tables_that_make_no_sense(costs, errors, budget, word):
    for method in (allocate, allocate_greedy):
        with pytest.raises(BadInput, match=word):
            method(costs, errors, budget)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "method, options, word",
    [
        *((QAT, o, w) for o, w in [
            (dict(steps=0), "steps"), (dict(steps=1.5), "steps"), (dict(batch_size=0), "batch_size"),
            (dict(lr=-1.0), "lr"), (dict(lr=float("nan")), "lr"), (dict(bits=9), "bits"),
            (dict(seq_len=0), "seq_len"), (dict(n_train=0), "n_train"),
        ]),
        (NF4, dict(values="fp4"), "values"),
        (NF4, dict(group_size="tensor"), "group_size"),
        (Ternary, dict(rule="binary"), "rule"),
        (Ternary, dict(steps=-1), "steps"),
        (Binary, dict(rule="twn"), "rule"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(method, options, word):
    with pytest.raises(BadInput, match=word):
        method(**options)


@pytest.mark.parametrize("method", [NF4(group_size=7), Ternary(group_size=7), Binary(group_size=7)])
def test_groups_that_do_not_divide_are_refused_before_the_work(dense, method):
    with pytest.raises(BadInput, match="group_size"):
        compress(dense, [method], None, None)


def test_a_weight_that_is_no_number_is_refused(dense):
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    for method in (NF4(group_size=8), Ternary(), Binary(), QAT(**HOW)):
        with pytest.raises(BadInput, match="finite"):
            compress(model, [method], random_text(), RT)
