"""Interpretability: lenses, maps, attributions, patches, probes and heads against definitions, on tiny models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from archs import build, ids, logits
from torch import nn

from llmcourse import interpretability as ip
from llmcourse.settings import BadInput

READ = ["llama", "qwen2", "gpt2", "opt", "gpt-neox", "olmo2", "mixtral", "ours", "ours, post-norm",
        "ours, gelu, layer norm, learned positions"]  # fmt: skip
WATCHED = ["llama", "qwen3", "gpt2", "opt", "gpt-neox", "ours", "ours, gelu, layer norm, learned positions"]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


def snapshot(model: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, hooks, [m.training for m in model.modules()]


def same(a: tuple, b: tuple) -> bool:
    return a[1:] == b[1:] and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", READ)
def test_the_last_layer_of_the_lens_is_the_model(name):
    model, text = build(name), ids(2, 9)
    before = snapshot(model)
    seen = ip.logit_lens(model, text)
    own = logits(model, text).log_softmax(-1)
    assert seen.top.shape == (len(seen.layers), 2, 9) and seen.logp.shape[-1] == 8
    assert torch.equal(seen.top[-1], own.argmax(-1)) and seen.kl[-1].abs().max() < 1e-5
    expected = own[:, :-1].gather(-1, text[:, 1:, None])[..., 0]
    assert torch.allclose(seen.logp[-1], expected, atol=1e-4) and seen.kl[:-1].min() > 0
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", ["cohere", "gemma2"])  # the one scales its logits, the other bends them
def test_the_lens_refuses_a_model_that_does_more_to_its_logits(name):
    model = build(name)
    if name == "cohere":
        model.config.logit_scale = model.logit_scale = 0.1
    with pytest.raises(BadInput, match="does more to them"):
        ip.logit_lens(model, ids(1, 6))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_stream_is_what_transformers_returns(name):
    model, text = build(name), ids(2, 7)
    with torch.no_grad():
        theirs = model(text, output_hidden_states=True, use_cache=False).hidden_states
    ours = ip.residual_stream(model, text)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours[:-1], theirs[:-1]))  # theirs ends with a normed one
    assert torch.equal(ip.ends_of(model)[0](ours[-1]), theirs[-1])


def test_the_lens_of_some_layers_is_that_of_all(llama):
    text = ids(2, 6)
    every, some = ip.logit_lens(llama, text), ip.logit_lens(llama, text, layers=[3, 1])
    assert some.layers == (3, 1)
    assert torch.equal(some.kl, every.kl[[3, 1]]) and torch.equal(some.top, every.top[[3, 1]])


def test_settled_is_the_first_layer_of_an_unbroken_end():
    for tops in itertools.product([0, 1], repeat=4):
        expected = next(i for i in range(5) if all(t == 1 for t in tops[i:]))
        assert ip.settled(torch.tensor(tops), torch.tensor(1)) == expected, tops


def test_parts_add_up_to_the_block(llama):
    text = ids(2, 6)
    stream = ip.residual_stream(llama, text)
    added = ip.states(llama, text, "attention") + ip.states(llama, text, "ffn")
    assert torch.allclose(stream[:-1] + added, stream[1:], atol=1e-5)


def test_a_translator_finds_an_affine_map_and_not_a_shuffled_one():
    dice = torch.Generator().manual_seed(0)
    x, A = torch.randn(200, 8, generator=dice), torch.randn(8, 8, generator=dice)
    y = x @ A + 3
    assert torch.allclose(ip.fit_translator(x, y, l2=1e-9)(x), y, atol=1e-4)
    lost = ip.fit_translator(x, y[torch.randperm(200, generator=dice)])(x)
    assert (lost - y).norm() > 0.8 * (y - y.mean(0)).norm()
    assert ip.fit_translator(x, y)(x.view(2, 100, 8)).shape == (2, 100, 8)


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", WATCHED)
def test_maps_are_those_that_the_model_used(name):
    model, text = build(name), ids(2, 8)
    before = snapshot(model)
    maps = ip.attention_maps(model, text)
    assert maps.shape == (3, 2, 4, 8, 8) and torch.allclose(maps.sum(-1), torch.ones(3, 2, 4, 8), atol=1e-5)
    assert maps.triu(1).abs().max() == 0 and same(before, snapshot(model))
    if not name.startswith("ours"):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            theirs = torch.stack(eager(text, output_attentions=True, use_cache=False).attentions)
        assert torch.allclose(maps, theirs, atol=1e-5)


def test_maps_hold_a_window():
    model, text = build("mistral, window"), ids(1, 12)
    far = ip.attention_maps(model, text).tril(-5)  # the window is 5 tokens, the own one among them
    assert far.abs().max() == 0


def test_maps_need_the_fused_attention(llama):
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    with pytest.raises(BadInput, match="calls of the fused attention is 0"):
        ip.attention_maps(model, ids(1, 5))


def test_rollout():
    nobody = torch.eye(4).expand(3, 2, 2, 4, 4)
    assert torch.equal(ip.rollout(nobody), torch.eye(4).expand(2, 4, 4))
    maps = torch.rand(3, 2, 5, 6, 6, generator=torch.Generator().manual_seed(0)).tril()
    maps = maps / maps.sum(-1, keepdim=True)
    flow = ip.rollout(maps)
    assert torch.allclose(flow.sum(-1), torch.ones(2, 6)) and flow.triu(1).abs().max() == 0
    one, two, three = ((torch.eye(6) + m[1].mean(0)) / 2 for m in maps)
    assert torch.allclose(flow[1], three @ two @ one)


def test_without_a_head_is_without_its_columns(llama):
    text, off = ids(2, 7), [(0, 3), (2, 0), (2, 1)]
    cut = copy.deepcopy(llama)
    width = llama.config.hidden_size // 4
    with torch.no_grad():
        for layer, head in off:
            cut.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    before = snapshot(llama)
    with ip.without_heads(llama, off):
        found, again = logits(llama, text), logits(llama, text)  # also the second time
    assert torch.allclose(found, logits(cut, text), atol=1e-5) and torch.equal(found, again)
    assert not torch.allclose(found, logits(llama, text), atol=1e-3) and same(before, snapshot(llama))
    with ip.without_heads(llama, []):
        assert torch.equal(logits(llama, text), logits(llama, text))


def test_without_a_head_of_our_gpt():
    model, text = build("ours"), ids(2, 7)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[1].attn.o.weight[:, 8:16] = 0  # head 1, 8 wide
    with ip.without_heads(model, [(1, 1)]):
        assert torch.allclose(logits(model, text), logits(cut, text), atol=1e-5)


# ------------------------------------------------------------------------------------------------ gradients


def polynomial(x):
    return (x**3).sum(-1) + x[..., 0] * x[..., 1]


@pytest.mark.parametrize(("start", "expected"), [((0.0, 0.0), (3.0, 3.0)), ((1.0, 0.0), (1.5, 4.5))])
def test_the_product_by_hand(start, expected):
    a = ip.integrated_gradients(lambda x: x[..., 0] * x[..., 1], torch.tensor([2.0, 3.0]), torch.tensor(start), steps=1)
    assert torch.allclose(a, torch.tensor(expected))


def test_gauss_is_exact_for_polynomials_and_riemann_sums_are_not():
    x, baseline = torch.tensor([1.5, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, -1.0]).double()
    gap = {}
    for rule, steps in itertools.product(ip.RULES, (2, 20)):
        a = ip.integrated_gradients(polynomial, x, baseline, steps=steps, rule=rule, batch=3)
        gap[rule, steps] = abs(ip.completeness_gap(polynomial, x, baseline, a))
    assert gap["gauss", 2] < 1e-12  # the gradient is of degree 2, and two points are exact up to 3
    assert gap["left", 2] > gap["left", 20] > gap["midpoint", 20] > 1e-4


@pytest.mark.parametrize("rule", ip.RULES)
def test_the_points_of_a_path(rule):
    points, weights = ip.path_points(7, rule)
    assert torch.isclose(weights.sum(), torch.tensor(1.0).double()) and 0 <= points.min() < points.max() < 1
    assert (points[0] == 0) == (rule == "left")


def test_attributions_of_a_linear_function_and_of_nothing():
    w = torch.tensor([1.0, -2.0, 4.0])
    x, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, 1.0])
    for rule in ip.RULES:
        assert torch.allclose(ip.integrated_gradients(lambda v: v @ w, x, b, steps=3, rule=rule), w * (x - b))
    assert not ip.integrated_gradients(polynomial, x, x, steps=3).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "ours"])
def test_the_score_of_the_own_embeddings_is_that_of_the_text(name):
    model, text = build(name).double(), ids(1, 6)[0]
    f, x = ip.score_of(model, text, 5), ip.embedded(model, text)
    expected = logits(model, text[None])[0, -1].log_softmax(-1)[5]
    assert torch.allclose(f(x[None]).double(), expected, atol=1e-5)
    slope = ip.gradient(f, x[None])[0]
    step = torch.zeros_like(x)
    step[2, 3] = 1e-3
    by_hand = (f((x + step)[None]) - f((x - step)[None])).item() / 2e-3
    assert abs(by_hand - slope[2, 3].item()) < 1e-3 * max(1, slope.abs().max().item())
    assert all(p.grad is None for p in model.parameters())


def test_integrated_gradients_of_a_model_are_complete(llama):
    text = ids(1, 6)[0]
    f, x = ip.score_of(llama, text, 7), ip.embedded(llama, text)
    other = ip.embedded(llama, ids(1, 6, seed=1)[0])
    gap = [abs(ip.completeness_gap(f, x, other, ip.integrated_gradients(f, x, other, steps=s))) for s in (1, 64)]
    assert gap[1] < 0.05 < gap[0]


def test_deletion_is_the_text_without_the_token(llama):
    text = ids(1, 6)[0]
    drop = ip.deletion(llama, text, 9)
    full = logits(llama, text[None])[0, -1].log_softmax(-1)[9]
    for i in range(6):
        rest = torch.tensor([t for j, t in enumerate(text.tolist()) if j != i])
        left = logits(llama, rest[None])[0, -1].log_softmax(-1)[9]
        assert torch.isclose(drop[i], full - left, atol=1e-5)


def test_ranks_and_what_is_made_of_them():
    a = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert ip.ranks(a).tolist() == [4, 1, 2.5, 2.5]
    assert ip.rank_correlation(a, 10 * a) == pytest.approx(1) and ip.rank_correlation(a, -a) == pytest.approx(-1)
    assert ip.rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 2])) == pytest.approx(0.5)
    assert ip.rank_correlation(a, torch.ones(4)) == 0
    dice = torch.Generator().manual_seed(0)
    scores, happened = torch.randint(5, (30,), generator=dice).double(), torch.rand(30, generator=dice) < 0.4
    pairs = [(x > y).double() + (x == y) / 2 for x in scores[happened] for y in scores[~happened]]
    assert ip.separation(scores, happened) == pytest.approx(float(sum(pairs)) / len(pairs))


# ------------------------------------------------------------------------------------------------ patching


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "ours"])
def test_everything_is_one_and_nothing_is_zero(name):
    model, clean, other = build(name), ids(1, 7)[0], ids(1, 7, seed=1)[0]
    answers = (4, 8)
    top, base = (ip.logit_difference(model, t[None], answers).item() for t in (clean, other))
    lent = ip.states(model, clean[None])
    for layer, everywhere in itertools.product(range(3), (True, False)):
        where = torch.full((1, 7), everywhere)
        with ip.patching(model, [ip.Change("block", layer, where, lent[layer])]):
            value = ip.logit_difference(model, other[None], answers)
        assert ip.recovered(value, base, top).item() == pytest.approx(float(everywhere), abs=1e-4)


@pytest.mark.parametrize("part", ip.PARTS)
def test_a_grid_is_one_run_for_each_state(llama, part):
    clean, other, answers = ids(1, 5)[0], ids(1, 5, seed=1)[0], (4, 8)
    before = snapshot(llama)
    grid = ip.patch_grid(llama, other, clean, answers, part=part, layers=[2, 0])
    lent = ip.states(llama, clean[None], part)
    for row, layer in enumerate([2, 0]):
        module = ip.parts_of(llama, part)[layer]
        for t in range(5):

            def put(m, i, out, layer=layer, t=t):
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                hidden[:, t] = lent[layer][:, t]
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handle = module.register_forward_hook(put)
            expected = ip.logit_difference(llama, other[None], answers)
            handle.remove()
            assert torch.isclose(grid[row, t], expected[0], atol=1e-4), (layer, t)
    assert same(before, snapshot(llama))


def test_the_last_state_decides_and_the_own_run_changes_nothing(llama):
    clean, other, answers = ids(1, 5)[0], ids(1, 5, seed=1)[0], (4, 8)
    top, base = (ip.logit_difference(llama, t[None], answers).item() for t in (clean, other))
    share = ip.recovered(ip.patch_grid(llama, other, clean, answers), base, top)
    assert share[-1].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-4)
    own = ip.recovered(ip.patch_grid(llama, other, other, answers), base, top)
    assert own.abs().max() < 1e-4
    begins_alike = torch.cat([clean[:2], other[2:]])  # causal: equal tokens in front have equal states
    base = ip.logit_difference(llama, begins_alike[None], answers).item()
    share = ip.recovered(ip.patch_grid(llama, begins_alike, clean, answers), base, top)
    assert share[:, :2].abs().max() < 1e-4 < share[:, 2:].abs().max()


def modes() -> int:
    return len(torch.overrides._get_current_function_mode_stack())


@pytest.mark.parametrize("where", ["patching", "without_heads", "states", "attention_maps", "score"])
def test_nothing_stays_after_an_exception(llama, where):
    """An error inside the context, or inside the model while it runs."""
    model = copy.deepcopy(llama)
    before, text = snapshot(model), ids(1, 5)
    change = ip.Change("ffn", 1, torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, 32))
    contexts = {
        "patching": lambda: ip.patching(model, [change]),
        "without_heads": lambda: ip.without_heads(model, [(0, 0)]),
    }
    with pytest.raises(ZeroDivisionError):
        if where in contexts:
            with contexts[where]():
                raise ZeroDivisionError
        fails = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            if where == "score":
                ip.score_of(model, text[0], 3)(ip.embedded(model, text))
            getattr(ip, where)(model, text)
        finally:
            fails.remove()
    assert same(before, snapshot(model)) and modes() == 0
    assert torch.equal(logits(model, text), logits(llama, text))


def test_the_mode_of_a_model_in_training_comes_back(llama):
    model = copy.deepcopy(llama).train()
    ip.logit_lens(model, ids(1, 5))
    ip.attention_maps(model, ids(1, 5))
    assert all(m.training for m in model.modules())


class Words:
    """A tokenizer for the tests: each word is a token."""

    def __init__(self, words: str):
        self.words = words.split()

    def __call__(self, text, add_special_tokens, return_tensors=None):
        found = [self.words.index(w) for w in text.split()]
        return {"input_ids": torch.tensor([found]) if return_tensors else found}


def test_margins_are_among_the_answers_of_a_relation(llama):
    words = Words("w0 a b c red green blue one two three")
    facts = [ip.Fact("color", "a b", "red"), ip.Fact("color", "b c", "green"), ip.Fact("color", "c a", "red"),
             ip.Fact("number", "a c", "one"), ip.Fact("number", "b b", "three")]  # fmt: skip
    margins = ip.fact_margins(llama, words, facts)
    last = lambda *t: logits(llama, torch.tensor([t]))[0, -1]
    red, number = last(3, 1), last(2, 2)
    assert margins[2] == pytest.approx((red[4] - red[5]).item(), abs=1e-5)  # blue, two are nobody's answer
    assert margins[4] == pytest.approx((number[9] - number[7]).item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ probes, heads


def test_a_probe_of_what_is_there_is_selective_and_one_of_names_is_not():
    dice = torch.Generator().manual_seed(0)
    types = torch.randint(30, (600,), generator=dice)
    labels = types % 2
    there = labels[:, None] + 0.1 * torch.randn(600, 4, generator=dice)  # the property and nothing else
    named = F.one_hot(types, 30).float()  # which type it is: a probe can learn any labels of types
    runs = [[ip.selectivity(x, labels, types, seed=s) for s in range(3)] for x in (there, named)]
    assert all(r.task == 1 and r.control < 0.75 and r.value == r.task - r.control for r in runs[0])
    assert all(r.task == r.control == 1 and r.value == 0 for r in runs[1])


def test_control_labels_belong_to_types():
    dice = torch.Generator().manual_seed(0)
    types, labels = torch.randint(400, (2000,), generator=dice), (torch.rand(2000, generator=dice) < 0.2).long()
    drawn = ip.control_labels(types, labels, seed=1)
    for t in types.unique():
        assert len(drawn[types == t].unique()) == 1
    assert abs(drawn.double().mean() - 0.2) < 0.07
    assert torch.equal(drawn, ip.control_labels(types, labels, seed=1))
    assert not torch.equal(drawn, ip.control_labels(types, labels, seed=2))


def test_induction_scores_by_their_definition():
    maps = torch.rand(2, 3, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    for period in (2, 4, 8):
        found = ip.induction_scores(maps, period)
        expected = torch.stack([maps[..., t, t - period + 1] for t in range(period, 9)]).mean(0).mean(1)
        assert found.shape == (2, 4) and torch.allclose(found, expected, atol=1e-6)


def test_repeated_tokens():
    text = ip.repeated_tokens(3, 5, 50, seed=4)
    assert text.shape == (3, 10) and torch.equal(text[:, :5], text[:, 5:]) and text.max() < 50
    assert torch.equal(text, ip.repeated_tokens(3, 5, 50, seed=4))
    once = ip.repeated_tokens(3, 10, 50, seed=4, copies=1)
    assert once.shape == (3, 10) and not torch.equal(once[:, :5], once[:, 5:])


def test_the_loss_of_the_second_half(llama):
    text = ids(2, 8)
    own = logits(llama, text).log_softmax(-1)
    expected = [-sum(own[b, t - 1, text[b, t]] for t in range(5, 8)) / 3 for b in range(2)]
    assert torch.allclose(ip.second_half_loss(llama, text), torch.stack(expected), atol=1e-5)


# ------------------------------------------------------------------------------------------------ refusals

TEXT = torch.tensor([3, 4, 5])
WHERE = torch.ones(1, 3, dtype=torch.bool)
REFUSED = {
    "ids is": lambda m: ip.states(m, TEXT),
    "ids is (1, 1)": lambda m: ip.logit_lens(m, TEXT[None, :1]),
    "ids is (1, 3)": lambda m: ip.states(m, TEXT[None].float()),
    "part is 'heads'": lambda m: ip.states(m, TEXT[None], "heads"),
    "layers is 4": lambda m: ip.logit_lens(m, TEXT[None], layers=[4]),
    "layers is ()": lambda m: ip.logit_lens(m, TEXT[None], layers=[]),
    "target is (2,)": lambda m: ip.settled(torch.zeros(4, 3), torch.zeros(2)),
    "which has no config": lambda m: ip.logit_lens(nn.Linear(2, 2), TEXT[None]),
    "layer is 3": lambda m: ip.without_heads(m, [(3, 0)]).__enter__(),
    "head is 4": lambda m: ip.without_heads(m, [(0, 4)]).__enter__(),
    "head is -1": lambda m: ip.without_heads(m, [(0, -1)]).__enter__(),
    "shape of weights is (2, 2)": lambda m: ip.rollout(torch.eye(2)),
    "rule is 'trapezoid'": lambda m: ip.path_points(4, "trapezoid"),
    "steps is 0": lambda m: ip.path_points(0),
    "shape of baseline": lambda m: ip.integrated_gradients(polynomial, torch.zeros(3), torch.zeros(2)),
    "shape of f(x)": lambda m: ip.gradient(lambda x: x, torch.zeros(2, 3)),
    "target is 96": lambda m: ip.score_of(m, TEXT, 96),
    "shape of the embeddings": lambda m: ip.score_of(m, TEXT, 5)(torch.zeros(1, 4, 32)),
    "values is": lambda m: ip.ranks(torch.tensor([1.0, float("nan")])),
    "shape of b": lambda m: ip.rank_correlation(torch.zeros(3), torch.zeros(4)),
    "happened is '0 of 3'": lambda m: ip.separation(torch.zeros(3), torch.zeros(3, dtype=torch.bool)),
    "shape of source is (2,)": lambda m: ip.patch_grid(m, TEXT, TEXT[:2], (1, 2)),
    "layer is 7": lambda m: ip.patch_grid(m, TEXT, TEXT, (1, 2), layers=[7]),
    "answer is 96": lambda m: ip.logit_difference(m, TEXT[None], (1, 96)),
    "where is (3,)": lambda m: ip.patching(m, [ip.Change("block", 0, WHERE[0], torch.zeros(1, 3, 32))]).__enter__(),
    "two that differ": lambda m: ip.recovered(torch.zeros(2), 1.0, 1.0),
    "relation is 'r'": lambda m: ip.fact_margins(m, Words("a b"), [ip.Fact("r", "a", "b")]),
    "answer is 'b c'": lambda m: ip.first_tokens(Words("a b c"), ["b c", "b a"]),
    "numbers of features": lambda m: ip.selectivity(torch.zeros(4, 2), TEXT, TEXT, seed=0),
    "share is 1": lambda m: ip.selectivity(torch.zeros(3, 2), TEXT, TEXT, seed=0, share=1),
    "shape of types": lambda m: ip.control_labels(TEXT, TEXT[:2], seed=0),
    "period is 1": lambda m: ip.induction_scores(torch.zeros(1, 1, 1, 4, 4), 1),
    "period is 4": lambda m: ip.induction_scores(torch.zeros(1, 1, 1, 4, 4), 4),
    "vocab_size is 1": lambda m: ip.repeated_tokens(1, 4, 1, seed=0),
    "l2 is 0": lambda m: ip.fit_translator(torch.zeros(3, 2), torch.zeros(3, 2), l2=0),
    "shapes of source and target": lambda m: ip.fit_translator(torch.zeros(3, 2), torch.zeros(2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_means_nothing_is_refused(sentence, llama):
    with pytest.raises(BadInput) as caught:
        REFUSED[sentence](llama)
    assert sentence in str(caught.value) and str(caught.value).endswith(".") and modes() == 0


def test_a_change_for_another_length_is_refused_when_the_model_runs(llama):
    change = ip.Change("block", 1, WHERE, torch.zeros(1, 3, 32))
    said = r"rows and tokens of the run is \(1, 5\); allowed: \(1, 3\)"
    with pytest.raises(BadInput, match=said), ip.patching(llama, [change]):
        logits(llama, ids(1, 5))
    assert torch.isfinite(logits(llama, ids(1, 5))).all()


def test_blocks_without_a_module_for_the_part_are_refused():
    model = build("opt")  # its feed-forward matrices lie loose in the block
    with pytest.raises(BadInput, match="ffn of OPTForCausalLM is 'not found'"):
        ip.states(model, ids(1, 5), "ffn")
