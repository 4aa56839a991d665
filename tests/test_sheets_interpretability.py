"""Right answers of other kinds pass the sheet of 17; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers("interpretability")


@right("settled_layer")
def settled_by_trying(tops, token):
    if len(tops) == 0:
        raise ValueError("empty")
    return next((i for i in range(len(tops)) if set(tops[i:]) == {token}), None)


@right("settled_layer")
def settled_by_the_last_other(tops, token):
    if not tops:
        raise ValueError
    last_other = max((i for i, t in enumerate(tops) if t != token), default=-1)
    return None if last_other == len(tops) - 1 else last_other + 1


@right("quadratic_attribution")
def attribution_by_gauss(A, b, x, start):
    f = lambda v: v @ A @ v / 2 + b @ v
    total = torch.zeros_like(x)
    for t, w in zip(*np.polynomial.legendre.leggauss(2)):
        point = (start + (t + 1) / 2 * (x - start)).requires_grad_()
        total += w / 2 * torch.autograd.grad(f(point), point)[0]
    return (x - start) * total


@right("quadratic_attribution")
def attribution_by_two_ends(A, b, x, start):
    """The mean of a linear function is the mean of its ends."""
    slope = lambda v: (A @ v + A.T @ v) / 2 + b
    return (x - start) * (slope(x) + slope(start)) / 2


@right("flow_back")
def flow_of_the_last_row(maps):
    """From above: one row at a time, from the last layer down."""
    row = torch.zeros(maps.shape[-1], dtype=maps.dtype)
    row[-1] = 1
    for layer in reversed(maps.mean(1)):
        row = row / 2 + row @ layer / 2
    return row


@right("flow_back")
def flow_of_columns(maps):
    same = torch.eye(maps.shape[-1], dtype=maps.dtype)
    steps = [(same + layer.sum(0) / len(layer)).mul(0.5) for layer in maps]
    return torch.linalg.multi_dot([*reversed(steps), same])[-1]


@right("recovered_share")
def share_by_differences(patched, clean, corrupted, right, wrong):
    p, c, k = (torch.stack([patched, clean, corrupted])[:, [right, wrong]] @ patched.new_tensor([1.0, -1.0])).tolist()
    if c <= 0 or k >= 0:
        raise ValueError("pair")
    return (k - p) / (k - c)


@right("recovered_share")
def share_from_the_other_end(patched, clean, corrupted, right, wrong):
    m = [r[right].item() - r[wrong].item() for r in (patched, clean, corrupted)]
    if m[1] <= 0 or m[2] >= 0:
        raise ValueError
    return 1 - (m[1] - m[0]) / (m[1] - m[2])


@right("lookup_selectivity")
def lookup_by_counters(train, test, control):
    if not (train and test):
        raise ValueError("empty")
    scores, say = [], lambda c: sorted(c, key=lambda label: (-c[label], label))[0]
    for relabel in (lambda k, y: y, lambda k, y: control[k]):
        tables, every = defaultdict(Counter), Counter()
        for k, y in train:
            tables[k][relabel(k, y)] += 1
            every[relabel(k, y)] += 1
        hits = [say(tables.get(k, every)) == relabel(k, y) for k, y in test]
        scores.append(sum(hits) / len(hits))
    return scores[0], scores[1], scores[0] - scores[1]


@right("lookup_selectivity")
def lookup_by_numpy(train, test, control):
    if min(len(train), len(test)) == 0:
        raise ValueError
    kinds, tested = (np.array([k for k, _ in part]) for part in (train, test))

    def accuracy(labels, wanted):
        most = lambda y: int(np.unique(y)[np.unique(y, return_counts=True)[1].argmax()])
        said = [most(labels[kinds == k]) if (kinds == k).any() else most(labels) for k in tested]
        return float(np.mean(np.array(said) == wanted))

    own = accuracy(np.array([y for _, y in train]), np.array([y for _, y in test]))
    drawn = accuracy(np.array([control[k] for k in kinds]), np.array([control[k] for k in tested]))
    return own, drawn, own - drawn


@right("copy_score")
def copies_by_looking_back(weights, tokens):
    found = []
    for t in range(len(tokens)):
        for j in reversed(range(t)):
            if tokens[j] == tokens[t]:
                found.append(weights[t][j + 1].item())
                break
    if not found:
        raise ValueError("new tokens only")
    return float(np.mean(found))


@right("copy_score")
def copies_by_a_mask(weights, tokens):
    T = len(tokens)
    same = torch.tensor([[j < t and tokens[j] == tokens[t] for j in range(T)] for t in range(T)], dtype=torch.bool)
    same = same.view(T, T)
    has = same.any(1) if T else same
    if not has.any():
        raise ValueError
    last = T - 1 - same.flip(1).int().argmax(1)
    return weights[has, last[has] + 1].double().mean().item()


@right("goes_first")
def first_by_ranks(margins, lost):
    away = np.array(lost, dtype=bool)
    if away.all() or not away.any():
        raise ValueError("no pair")
    m = np.array(margins)
    ranks = np.array([(m < v).sum() + ((m == v).sum() + 1) / 2 for v in m])
    k, n = int(away.sum()), len(m)
    return float(1 - (ranks[away].sum() - k * (k + 1) / 2) / (k * (n - k)))


@right("goes_first")
def first_by_signs(margins, lost):
    pairs = [(a, b) for (a, x), (b, y) in itertools.product(zip(margins, lost), repeat=2) if x and not y]
    if not pairs:
        raise ValueError
    return 0.5 + sum(np.sign(b - a) for a, b in pairs) / 2 / len(pairs)


@pytest.mark.parametrize("id, answer", RIGHT, ids=names(RIGHT))
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    expected = {id: 2 for id in (e.id for e in checking.load_sheet("interpretability").values())}
    assert Counter(id for id, _ in RIGHT) == expected


@pytest.mark.parametrize(
    "id, code", broken_code("interpretability"), ids=[i for i, _ in broken_code("interpretability")]
)
def test_the_broken_code_of_a_statement_runs_and_fails(id, code):
    assert_as_it_was(id, code)


def test_half_of_the_sheet_begins_with_broken_code():
    assert len(broken_code("interpretability")) >= len(checking.load_sheet("interpretability")) / 2


def test_the_exercises_agree_with_the_chapter():
    """The same quantities by the chapter's functions."""
    from llmcourse import interpretability as ip

    answer = lambda name: checking.find(f"interpretability.{name}").solution
    dice = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, 5, 5, generator=dice, dtype=torch.float64).tril()
    maps = maps / maps.sum(-1, keepdim=True)
    assert torch.allclose(answer("flow_back")(maps), ip.rollout(maps[:, None])[0, -1])
    tops = torch.randint(2, (20, 6), generator=dice)
    for row in tops:
        found = answer("settled_layer")(row.tolist(), 1)
        assert ip.settled(row, torch.tensor(1)) == (6 if found is None else found)
    A, b, x, start = (torch.randn(*n, generator=dice, dtype=torch.float64) for n in ((4, 4), (4,), (4,), (4,)))
    f = lambda v: ((v @ A) * v).sum(-1) / 2 + v @ b
    assert torch.allclose(
        answer("quadratic_attribution")(A, b, x, start), ip.integrated_gradients(f, x, start, steps=1)
    )
    text = [*"abcde", *"abcde"]
    w = torch.rand(10, 10, generator=dice, dtype=torch.float64).tril()
    assert answer("copy_score")(w, text) == pytest.approx(ip.induction_scores(w[None, None, None], 5).item())
    margins, lost = torch.randint(5, (30,), generator=dice), torch.rand(30, generator=dice) < 0.4
    assert answer("goes_first")(margins.tolist(), lost.tolist()) == pytest.approx(ip.separation(-margins, lost))
