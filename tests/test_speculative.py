"""Proposals that are checked: the distribution stays the target's, greedy tokens stay the same, and the arithmetic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from archs import CAUSAL, OURS, REFUSED, build, ids
from scipy.stats import chisquare

from llmcourse import speculative
from llmcourse.compression import compress
from llmcourse.model import GPT, GPTConfig, generate
from llmcourse.packed import pack_model
from llmcourse.quantization import RTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.speculative import (
    PromptLookup,
    Reader,
    acceptance,
    ahead,
    break_even,
    expected_steps,
    expected_tokens,
    kept_chances,
    residual,
    speculative_generate,
    speedup,
    token_probabilities,
    verify,
)

RT = Runtime.auto("cpu", "float32")
FAMILIES = [*OURS, "llama", "mistral, window", "gemma2", "gpt2"]


def tiny(seed=0, V=5, context=16) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, d_model=8, n_layers=1, n_heads=2, context=context)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    return model


def greedy(model, start, n):
    """The most probable tokens, each from a pass over the whole text."""
    text = list(start)
    with torch.no_grad():
        for _ in range(n):
            out = model(torch.tensor([text]), use_cache=False)
            text.append(int(getattr(out, "logits", out)[0, -1].argmax()))
    return text[len(start) :]


# ------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize("seed", range(4))
def test_kept_and_replaced_tokens_add_up_to_the_target(seed):
    """min(p, q) + (1 − Σ min(p, q)) · residual = p, for every token, also where one of them is 0."""
    p, q = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p[seed], q[seed + 1] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    keep = torch.stack([acceptance(p[None], q[None], [x])[0] for x in range(7)]).nan_to_num()  # 0 / 0: never proposed
    made = q * keep + (1 - (q * keep).sum()) * residual(p, q)
    assert torch.allclose(made, p, atol=1e-15, rtol=0)
    wrong = q * keep + (1 - (q * keep).sum()) * p
    assert (wrong - p).abs().max() > 0.01


def test_equal_distributions_are_never_rejected():
    p = torch.tensor([[0.1, 0.2, 0.7]]).double()
    assert torch.equal(acceptance(p, p, [0]), torch.ones(1).double()) and torch.equal(residual(p, p), p)
    two = torch.cat((p, p))
    dice = torch.Generator().manual_seed(0)
    assert all(verify(two, p, [x], generator=dice)[0] == 1 for x in [0, 1, 2] * 50)


def test_nothing_proposed_is_a_draw_from_the_target():
    p = torch.tensor([[0.0, 1.0, 0.0]])
    assert verify(p, None, []) == (0, 1)
    assert verify(torch.eye(3)[[1, 2]], None, [1]) == (1, 2)
    assert verify(torch.eye(3)[[1, 2]], None, [0]) == (0, 1)  # not kept: the token it should have been


def exact(model, start, n, **sampling):
    """Probability of each continuation of n tokens by the model alone."""
    found = {}
    for text in itertools.product(range(model.config.vocab_size), repeat=n):
        p = token_probabilities(model, [*start, *text], **sampling)[len(start) - 1 :]
        found[text] = float(p.prod())
    return found


def pvalue(texts, expected):
    """Chi-square test of the texts against their probabilities; rare ones count together."""
    often = [t for t, p in expected.items() if p * len(texts) >= 5]
    count = [texts.count(t) for t in often]
    want = [expected[t] * len(texts) for t in often]
    count, want = [*count, len(texts) - sum(count)], [*want, max(len(texts) - sum(want), 1e-9)]
    return chisquare(count, np.array(want) * len(texts) / sum(want)).pvalue


def sampled(target, draft, start, n=150, **sampling):
    dice = torch.Generator().manual_seed(0)
    how = dict(max_new_tokens=2, draft_tokens=2, stop=[], generator=dice, **sampling)
    return [tuple(speculative_generate(target, draft, start, **how).tokens) for _ in range(n)]


@pytest.mark.parametrize(
    "sampling", [dict(temperature=1.0), dict(temperature=0.7, top_k=2), dict(temperature=2, top_p=0.8)]
)
def test_sampled_texts_have_the_targets_distribution(sampling):
    target, other, start = tiny(0, V=3), tiny(1, V=3), [1, 2]
    texts = sampled(target, other, start, **sampling)
    assert pvalue(texts, exact(target, start, 2, **sampling)) > 1e-3
    assert pvalue(texts, exact(other, start, 2, **sampling)) < 1e-4  # the test can tell the two models apart


def test_the_test_of_the_distribution_finds_a_token_drawn_from_p_again(monkeypatch):
    target, other, start = tiny(0, V=3), tiny(1, V=3), [1, 2]
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    assert (
        pvalue(sampled(target, other, start, n=300, temperature=1.0), exact(target, start, 2, temperature=1.0)) < 1e-4
    )


def test_a_certain_draft_leaves_the_distribution_alone():
    target, start = tiny(0, V=3), [1, 2, 1, 2]
    texts = sampled(target, PromptLookup(), start, temperature=1.0)
    assert pvalue(texts, exact(target, start, 2, temperature=1.0)) > 1e-3


# ------------------------------------------------------------------------------------------ whole texts


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_model_alone(family):
    model, draft = build(family).double(), build(family, seed=1).double()
    start = ids(1, 9)[0].tolist()
    wanted = greedy(model, start, 9)
    cases = [(0, draft), (1, model), (3, model), (20, model), (1, draft), (3, draft), (3, PromptLookup())]
    for k, other in cases:
        made = speculative_generate(model, other, start, max_new_tokens=9, draft_tokens=k, stop=[])
        assert made.tokens == wanted, (k, type(other))
        assert sum(made.accepted) + len(made.accepted) == 9
        assert all(a <= p <= k for a, p in zip(made.accepted, made.proposed))
        if other is model and k:  # its own draft: everything is kept
            assert made.accepted == made.proposed and len(made.proposed) == math.ceil(9 / (k + 1))


def test_target_and_draft_of_two_kinds_and_packed():
    ours = GPT(GPTConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, d_ff=128, context=64)).eval()
    theirs, start = build("llama"), ids(1, 8)[0]
    packed = pack_model(compress(ours, [RTN(bits=4, group_size=32)], None, RT)[0])
    for model, draft in ((ours, theirs), (theirs, ours), (ours, packed), (packed, ours)):
        made = speculative_generate(model, draft, start, max_new_tokens=10, draft_tokens=3, stop=[])
        assert made.tokens == greedy(model, start.tolist(), 10)
    assert generate(ours, start[None], max_new_tokens=10, stop=[])[0] == greedy(ours, start.tolist(), 10)


def test_a_stop_token_ends_the_text_also_inside_what_was_kept():
    model, start = tiny(V=5), [1, 2, 3]
    text = greedy(model, start, 8)
    for stop in set(text):
        wanted = text[: text.index(stop) + 1]
        for k in range(5):
            for draft in (model, tiny(1), PromptLookup()):
                made = speculative_generate(model, draft, start, max_new_tokens=8, draft_tokens=k, stop=[stop])
                assert made.tokens == wanted
    model.stop = (text[2],)
    assert speculative_generate(model, model, start, max_new_tokens=8).tokens == text[: text.index(text[2]) + 1]
    theirs = build("llama")
    theirs.generation_config.eos_token_id = first = greedy(theirs, start, 1)[0]
    assert speculative_generate(theirs, PromptLookup(), start, max_new_tokens=4).tokens == [first]


def test_modes_and_inputs_are_left_as_they_were():
    model, draft, start = tiny().train(), tiny(1).eval(), [1, 2, 3]
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    speculative_generate(model, draft, start, max_new_tokens=5)
    assert model.training and not draft.training and start == [1, 2, 3]
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in weights.items())


@pytest.mark.parametrize("family", ["ours", "llama", "gemma3"])
def test_a_reader_gives_the_logits_of_the_whole_text_whatever_it_read_before(family):
    model, dice = build(family).double(), torch.Generator().manual_seed(0)
    reader = Reader(model)
    with torch.no_grad():
        for _ in range(12):
            kept = int(torch.randint(0, len(reader.known) + 1, (), generator=dice))
            text = reader.known[:kept] + torch.randint(3, 96, (6,), generator=dice).tolist()
            last = int(torch.randint(1, len(text) + 1, (), generator=dice))
            text = text[:40]
            out = model(torch.tensor([text]), use_cache=False)
            wanted = getattr(out, "logits", out)[0, -min(last, len(text)) :]
            assert torch.allclose(reader.read(text, min(last, len(text))), wanted, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ the arithmetic


def test_lookup_takes_the_longest_end_and_its_first_place():
    assert PromptLookup().propose([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3) == ([9, 2, 3], None)
    assert PromptLookup(longest=2).propose([7, 3, 5, 2, 3, 8, 2, 3], 2) == ([8, 2], None)
    assert PromptLookup(longest=1).propose([7, 3, 5, 2, 3, 8, 2, 3], 2) == ([5, 2], None)
    assert PromptLookup(shortest=2).propose([3, 5, 3], 2) == ([], None)
    assert PromptLookup().propose([4], 3) == ([], None)
    assert PromptLookup().propose([4, 4], 0) == ([], None)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7])
def test_expected_steps_are_what_greedy_runs_take(k):
    target, other, start = build("llama").double(), build("llama", seed=1).double(), ids(1, 8)[0].tolist()
    with torch.no_grad():  # a draft that often agrees
        for a, b in zip(other.parameters(), target.parameters()):
            a.lerp_(b, 0.93)
    text = start + greedy(target, start, 30)
    p, q = (token_probabilities(m, text, temperature=0.0)[len(start) - 1 :] for m in (target, other))
    made = speculative_generate(target, other, start, max_new_tokens=30, draft_tokens=k, stop=[])
    assert expected_steps(ahead(kept_chances(p, q), k)) == len(made.proposed)
    assert 0 < float(kept_chances(p, q).mean()) < 1


def test_expected_steps_are_the_mean_of_sampled_runs():
    """Given its text, a sampled run's steps have the mean that the recursion says; over texts the means agree."""
    target, other, dice = tiny(0), tiny(1), torch.Generator().manual_seed(3)
    how = dict(max_new_tokens=5, draft_tokens=2, temperature=1.0, stop=[], generator=dice)
    gaps = []
    for _ in range(70):
        made = speculative_generate(target, other, [1, 2], **how)
        text = [1, 2, *made.tokens]
        p, q = (token_probabilities(m, text, temperature=1.0)[1:] for m in (target, other))
        gaps.append(len(made.proposed) - expected_steps(ahead(kept_chances(p, q), 2)))
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / 70**0.5
    assert np.std(gaps) > 0.1


def test_equation_one_and_break_even():
    assert expected_tokens(0.5, 2) == 1.75 and expected_tokens(1.0, 4) == 5 and expected_tokens(0.9, 0) == 1
    alike = torch.full((4000,), 0.8, dtype=torch.float64)  # independent and alike: the formula holds
    assert abs(4000 / expected_steps(ahead(alike, 4)) / expected_tokens(0.8, 4) - 1) < 1e-3
    assert speedup(3.0, 4, cost=0.25) == 1.5 and speedup(3.0, 4, cost=0.25, verify=2.0) == 1.0
    assert break_even(3.0, 4, verify=2.0) == 0.25
    made = expected_tokens(0.7, 3)
    assert abs(speedup(made, 3, cost=break_even(made, 3, verify=1.4), verify=1.4) - 1) < 1e-12


# ------------------------------------------------------------------------------------------ bad input

CASES = {
    "prompt": (dict(prompt=[]), "at least one token"),
    "token of the prompt": (dict(prompt=[1, 5]), "from 0 to 4"),
    "a token that is no whole number": (dict(prompt=[1.0]), "from 0 to 4"),
    "vocabulary": (dict(draft=tiny(V=6)), "vocabulary of the draft is 6"),
    "draft": (dict(draft="a model"), "draft is 'str'"),
    "max_new_tokens": (dict(max_new_tokens=0), "max_new_tokens is 0"),
    "too long": (dict(max_new_tokens=15), "at most 14: the context of the model is 16"),
    "draft's context": (dict(draft=tiny(context=8), max_new_tokens=9), "the context of the draft is 8"),
    "draft_tokens": (dict(draft_tokens=-1), "draft_tokens is -1"),
    "draft_tokens, no whole number": (dict(draft_tokens=2.0), "draft_tokens is 2.0"),
    "temperature": (dict(temperature=-1.0), "temperature is -1.0"),
    "top_k": (dict(top_k=0), "top_k is 0"),
    "top_p": (dict(top_p=0.0), "top_p is 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case):
    changes, says = CASES[case]
    args = dict(model=tiny(), draft=tiny(1), prompt=[1, 2], max_new_tokens=4) | changes
    with pytest.raises(BadInput, match=says) as error:
        speculative_generate(args.pop("model"), args.pop("draft"), args.pop("prompt"), **args)
    assert str(error.value).count(";") == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "recurrent gemma", "t5"])
def test_a_model_whose_cache_cannot_forget_is_refused(family):
    assert family in REFUSED
    with pytest.raises(BadInput, match="a causal model whose cache can forget"):
        speculative_generate(build(family), PromptLookup(), [1, 2], max_new_tokens=4)


def test_all_families_of_the_table_are_named_right():
    assert set(FAMILIES) <= {*OURS, *CAUSAL}


@pytest.mark.parametrize(
    "settings", [dict(longest=0), dict(shortest=0), dict(longest=1, shortest=2), dict(longest=2.5)]
)
def test_lookup_settings(settings):
    with pytest.raises(BadInput):
        PromptLookup(**settings)
