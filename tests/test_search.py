"""The searches of chapter 10b: what they pay for, what they may know, and the formulas against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmcourse import search
from llmcourse.search import Ledger, halving_cost, hyperband, lattice, random_search, successive_halving
from llmcourse.settings import BadInput

SHARES = (1 / 9, 1 / 3, 1.0)


def table(n=40, seed=0):
    """Losses that fall along a run, of candidates whose order changes a little."""
    rng = np.random.default_rng(seed)
    end = rng.random(n)
    return np.stack([end + 2 + rng.normal(0, 0.2, n), end + 1 + rng.normal(0, 0.1, n), end], axis=1)


def test_the_lattice_has_every_combination_once():
    settings, places = lattice({"a": [1, 2, 3], "b": ["x", "y"], "c": [0]})
    assert len({tuple(s.values()) for s in settings}) == 6 == len(places)
    for s, place in zip(settings, places):
        assert place.tolist() == [(s["a"] - 1) / 2, float(s["b"] == "y"), 0.0]


def test_a_run_that_goes_on_pays_only_for_what_is_new():
    ledger = Ledger(table(), SHARES)
    for rung in (0, 0, 1, 2, 0):
        ledger(3, rung)
    assert ledger.spent == 1 and ledger.best == 3
    ledger(4, 0)
    assert ledger.spent == pytest.approx(10 / 9) and ledger.best == 3


@pytest.mark.parametrize(
    "n, eta, first", [(1, 3, 0), (2, 2, 0), (9, 3, 0), (10, 3, 1), (27, 3, 0), (7, 2, 1), (5, 4, 2)]
)
def test_a_halving_costs_what_is_said(n, eta, first):
    ledger = Ledger(table(), SHARES)
    successive_halving(ledger, range(n), eta=eta, first=first)
    assert ledger.spent == pytest.approx(halving_cost(n, SHARES, eta=eta, first=first))
    assert ledger.best < n


def test_a_halving_keeps_the_best_of_each_rung_and_knows_nothing_of_later_ones():
    losses = table(27)
    ledger = Ledger(losses, SHARES)
    successive_halving(ledger, range(27))
    nine = set(np.argsort(losses[:, 0])[:9])
    assert {c for c, share in ledger.paid.items() if share > SHARES[0]} == nine
    three = sorted(nine, key=lambda c: losses[c, 1])[:3]
    assert {c for c, share in ledger.paid.items() if share == 1} == set(three)
    other = losses.copy()
    other[:, 2] = -other[:, 2]  # the future changes: the same candidates get there
    again = Ledger(other, SHARES)
    successive_halving(again, range(27))
    assert again.paid == ledger.paid


@pytest.mark.parametrize("budget", [3, 4.5, 9, 20])
@pytest.mark.parametrize("firsts", [(), (0,), (2,), (0, 1)])
def test_hyperband_keeps_to_its_budget(budget, firsts):
    ledger = Ledger(table(), SHARES)
    hyperband(ledger, budget, np.random.default_rng(0), firsts=firsts)
    assert ledger.spent <= budget + 1e-9
    assert ledger.spent > budget / 2 or len(ledger.paid) == len(ledger)


def test_hyperband_whose_every_halving_stops_nobody_is_random_search():
    one, two = Ledger(table(), SHARES), Ledger(table(), SHARES)
    hyperband(one, 7, np.random.default_rng(3), firsts=(2,))
    random_search(two, 7, np.random.default_rng(3))
    assert one.paid == two.paid


def test_a_gaussian_process_is_the_conditional_normal_distribution():
    """Against the block formulas for mean and variance, without the Cholesky factor."""
    rng = np.random.default_rng(0)
    x, new, y = rng.random((6, 2)), rng.random((4, 2)), rng.random(6)
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 0.4**2))
    inverse = np.linalg.inv(kernel(x, x) + 0.2**2 * np.eye(6))
    z = (y - y.mean()) / y.std()
    mean, deviation, likelihood = search.gp_posterior(x, y, new, length=0.4, noise=0.2)
    np.testing.assert_allclose(mean, y.mean() + y.std() * kernel(new, x) @ inverse @ z, rtol=1e-8)
    covariance = kernel(new, new) - kernel(new, x) @ inverse @ kernel(x, new)
    np.testing.assert_allclose(deviation, y.std() * np.sqrt(np.diag(covariance)), rtol=1e-8)
    expected = -0.5 * z @ inverse @ z + 0.5 * np.linalg.slogdet(inverse)[1]
    assert likelihood == pytest.approx(expected)


def test_expected_improvement_by_numerical_integration():
    for mean, deviation, best in ((0.0, 1.0, 0.0), (1.0, 0.5, 0.2), (-2.0, 3.0, 0.0)):
        y = np.linspace(mean - 10 * deviation, mean + 10 * deviation, 200_001)
        density = np.exp(-(((y - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
        by_sum = (np.maximum(0, best - y) * density).sum() * (y[1] - y[0])
        found = search.expected_improvement(np.array([mean]), np.array([deviation]), best)
        assert found == pytest.approx(by_sum, rel=1e-6)


def test_on_a_smooth_valley_a_model_beats_random_search():
    """Where its assumption holds, it has to: otherwise it is broken."""
    _, places = lattice({"a": range(12), "b": range(12)})
    losses = np.exp(((places - [0.3, 0.7]) ** 2).sum(1))[:, None]
    regret = {"gp": [], "random": []}
    for seed in range(12):
        one, two = Ledger(losses, (1.0,)), Ledger(losses, (1.0,))
        regret["gp"].append(losses[search.bayes_search(one, places, 12, np.random.default_rng(seed)), 0])
        regret["random"].append(losses[random_search(two, 12, np.random.default_rng(seed)), 0])
        assert one.spent == two.spent == 12
    assert np.mean(regret["gp"]) - losses.min() < 0.3 * (np.mean(regret["random"]) - losses.min())


@pytest.mark.parametrize("n, exact", [(1, 0.0), (2, -1 / math.sqrt(math.pi)), (3, -1.5 / math.sqrt(math.pi))])
def test_the_best_of_n_normal_numbers(n, exact):
    assert search.expected_best(n, draws=100_000) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: lattice({}), "axes"),
        (lambda: lattice({"a": []}), "axes"),
        (lambda: lattice({"a": [1, 1]}), "axes"),
        (lambda: Ledger(table(), (1.0,)), "losses"),
        (lambda: Ledger(table()[:, 0], (1.0,)), "losses"),
        (lambda: Ledger(table(), (0.5, 0.4, 1.0)), "shares"),
        (lambda: Ledger(table(), (0.0, 0.4, 1.0)), "shares"),
        (lambda: Ledger(table(), (0.1, 0.4, 0.9)), "shares"),
        (lambda: Ledger(table(), SHARES).best, "runs"),
        (lambda: random_search(Ledger(table(), SHARES), 0, np.random.default_rng(0)), "budget"),
        (lambda: successive_halving(Ledger(table(), SHARES), []), "candidates"),
        (lambda: successive_halving(Ledger(table(), SHARES), [1], eta=1), "eta"),
        (lambda: successive_halving(Ledger(table(), SHARES), [1], first=3), "first"),
        (lambda: hyperband(Ledger(table(), SHARES), 2.9, np.random.default_rng(0)), "budget"),
        (lambda: search.expected_best(0), "n"),
        (lambda: search.bayes_search(Ledger(table(), SHARES), np.zeros((3, 2)), 5, np.random.default_rng(0)), "places"),
    ],
)
def test_bad_input_in_one_sentence(wrong, says):
    with pytest.raises(BadInput) as e:
        wrong()
    assert says in str(e.value) and "\n" not in str(e.value)
