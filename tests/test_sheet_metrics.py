"""Right answers of other kinds pass the sheet on scores for generated text: loops, NumPy, recursion, other formulas."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from sheet_rules import assert_passes, right_answers

from llmcourse.practice import checking

RIGHT, right = right_answers()


def grams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@right("metrics.clipped")
def clipped_by_crossing_out(hypothesis, references, n, *, verbose=False):
    found, correct = grams(hypothesis, n), 0
    for gram in set(found):
        correct += min(found.count(gram), max(grams(r, n).count(gram) for r in references))
    return correct, len(found)


@right("metrics.clipped")
def clipped_by_strings(hypothesis, references, n):
    joined = lambda words: Counter("\0".join(words[i : i + n]) for i in range(max(0, len(words) - n + 1)))
    found = joined(hypothesis)
    most = {g: max(joined(r)[g] for r in references) for g in found}
    return sum(min(c, most[g]) for g, c in found.items()), max(0, len(hypothesis) - n + 1)


@right("metrics.brevity_penalty")
def penalty_sorted(lengths, reference_lengths):
    r = 0
    for length, choices in zip(lengths, reference_lengths):
        if not choices:
            raise ValueError("no reference")
        r += sorted(sorted(choices), key=lambda n: abs(n - length))[0]
    c = sum(lengths)
    if c == 0:
        return 0.0 if r else 1.0
    return min(1.0, math.exp(1 - r / c))


@right("metrics.brevity_penalty")
def penalty_numpy(lengths, reference_lengths):
    r = 0
    for length, choices in zip(lengths, reference_lengths):
        ordered = np.sort(np.asarray(choices, dtype=int))
        if ordered.size == 0:
            raise ValueError("empty")
        r += int(ordered[np.abs(ordered - length).argmin()])
    c = sum(lengths)
    return 1.0 if c >= r else float(np.exp(1 - r / c)) if c else 0.0


@right("metrics.bleu2")
def bleu2_by_logarithms(hypotheses, references):
    logs = 0.0
    for n in (1, 2):
        correct = sum((Counter(grams(h, n)) & Counter(grams(r, n))).total() for h, r in zip(hypotheses, references))
        total = sum(max(0, len(h) - n + 1) for h in hypotheses)
        if not correct:
            return 0.0
        logs += math.log(correct / total) / 2
    c, r = (sum(len(t) for t in texts) for texts in (hypotheses, references))
    return 100 * math.exp(logs + min(0, 1 - r / c))


@right("metrics.bleu2")
def bleu2_by_sacrebleu(hypotheses, references):
    sacrebleu = pytest.importorskip("sacrebleu")
    if not any(hypotheses):
        return 0.0
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=2)
    return bleu.corpus_score([" ".join(h) for h in hypotheses], [[" ".join(r) for r in references]]).score


@right("metrics.rouge_l")
def rouge_l_recursive(hypothesis, reference, beta=1.0):
    @functools.cache
    def longest(i, j):
        if i == 0 or j == 0:
            return 0
        if hypothesis[i - 1] == reference[j - 1]:
            return 1 + longest(i - 1, j - 1)
        return max(longest(i - 1, j), longest(i, j - 1))

    common = longest(len(hypothesis), len(reference))
    if not common:
        return (0.0, 0.0, 0.0)
    return common / len(hypothesis), common / len(reference), 2 * common / (len(hypothesis) + len(reference))


@right("metrics.rouge_l")
def rouge_l_by_bits(hypothesis, reference):
    from llmcourse.metrics import FScore, lcs_length

    return tuple(FScore.of(lcs_length(hypothesis, reference), len(hypothesis), len(reference)))


@right("metrics.mean_f1")
def f1_by_precision_and_recall(items):
    def f1(common, a, b):
        if not a and not b:
            return 1.0
        p, r = common / max(a, 1), common / max(b, 1)
        return 2 * p * r / (p + r) if common else 0.0

    rows = []
    for a, b in items:
        left, common = list(b), 0
        for word in a:
            if word in left:
                left.remove(word)
                common += 1
        rows.append((common, len(a), len(b)))
    return f1(*map(sum, zip(*rows))), sum(f1(*row) for row in rows) / len(rows)


@right("metrics.mean_f1")
def f1_by_fractions(items):
    rows = [(sum((Counter(a) & Counter(b)).values()), len(a) + len(b)) for a, b in items]
    f1 = lambda c, n: Fraction(2 * c, n) if n else Fraction(1)
    macro = sum((f1(*row) for row in rows), Fraction(0)) / len(rows)
    return float(f1(sum(c for c, _ in rows), sum(n for _, n in rows))), float(macro)


@right("metrics.shortest_prefix")
def prefix_solved(r, goal):
    if r < 4 or math.isnan(goal) or goal <= 0 or goal > 100:
        raise ValueError
    return max(4, math.ceil(r / (1 - math.log(goal / 100)) - 1e-12))


@right("metrics.shortest_prefix")
def prefix_from_above(r, goal):
    if not (r >= 4 and 0 < goal <= 100):
        raise ValueError("range")
    k = r
    while k > 4 and math.exp(1 - r / (k - 1)) >= goal / 100:
        k -= 1
    return k


@right("metrics.perfect_nonsense")
def nonsense_by_backtracking(reference):
    pairs = set(itertools.pairwise(reference))

    def extend(order, left):
        if not left:
            return order
        for i, word in enumerate(left):
            if not order or (order[-1], word) not in pairs:
                found = extend([*order, word], left[:i] + left[i + 1 :])
                if found is not None:
                    return found
        return None

    return extend([], list(reference))


@right("metrics.perfect_nonsense")
def nonsense_backwards_first(reference):
    pairs = set(itertools.pairwise(reference))
    orders = itertools.chain([tuple(reversed(reference))], itertools.permutations(reference))
    good = (list(o) for o in orders if not pairs & {*itertools.pairwise(o)})
    return next(good, None)


@right("metrics.swap_p")
def p_by_bits(a, b):
    if len(a) != len(b) or not a or len(a) > 12:
        raise ValueError("lengths")
    n, d = len(a), [y - x for x, y in zip(a, b)]
    count = 0
    for bits in range(2**n):
        count += abs(sum(-x if bits >> i & 1 else x for i, x in enumerate(d))) >= abs(sum(d))
    return count / 2**n


@right("metrics.swap_p")
def p_by_counting_sums(a, b):
    if len(a) != len(b) or not 0 < len(a) < 13:
        raise ValueError("lengths")
    ways = Counter({0: 1})
    for x, y in zip(a, b):
        step = Counter()
        for total, count in ways.items():
            step[total + x - y] += count
            step[total - x + y] += count
        ways = step
    real = abs(sum(a) - sum(b))
    return sum(count for total, count in ways.items() if abs(total) >= real) / 2 ** len(a)


@pytest.mark.parametrize("id, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_a_right_answer_passes(id, answer):
    assert_passes(id, answer)


def test_every_exercise_has_two_other_right_answers():
    assert Counter(id for id, _ in RIGHT) == {id: 2 for id in checking.load_sheet("metrics")}
