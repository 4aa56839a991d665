"""Right answers of other kinds pass the sheet of 13; the broken code of its statements runs and fails by its name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sheet_rules import assert_as_it_was, assert_passes, broken_code, names, right_answers

RIGHT, right = right_answers("distillation")
BROKEN = broken_code("distillation")


@right("soft_loss")
def soft_by_kl_div(student, teacher, tau):
    if not tau > 0:
        raise ValueError
    q, p = F.log_softmax(student / tau, 1), F.log_softmax(teacher.detach() / tau, 1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * tau * tau


@right("soft_loss")
def soft_by_cross_entropy(student, teacher, tau):
    if math.isnan(tau) or tau <= 0:
        raise ValueError("tau")
    with torch.no_grad():
        p = (teacher / tau).softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
    return (F.cross_entropy(student / tau, p, reduction="none") - entropy).mean() * tau**2


@right("mixed_loss")
def mixed_by_weights(student, teacher, labels, alpha):
    weight = (labels != -100).to(student)
    if not (0 <= alpha <= 1) or weight.sum() == 0:
        raise ValueError
    kl = F.kl_div(student.log_softmax(1), teacher.detach().softmax(1), reduction="none").sum(1)
    return alpha * (kl * weight).sum() / weight.sum() + (1 - alpha) * F.cross_entropy(student, labels)


@right("mixed_loss")
def mixed_by_loop(student, teacher, labels, alpha):
    losses = []
    for s, t, y in zip(student, teacher.detach(), labels.tolist()):
        if y != -100:
            q, p = s.log_softmax(0), t.log_softmax(0)
            losses.append(alpha * (p.exp() * (p - q)).sum() - (1 - alpha) * q[y])
    if not losses or not 0 <= alpha <= 1:
        raise ValueError
    return torch.stack(losses).mean()


@right("best_students")
def best_by_loop(p, students):
    def kl(a, b):
        if any(x > 0 and y == 0 for x, y in zip(a, b)):
            return math.inf
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    rows, p = students.double().tolist(), p.double().tolist()
    forward, reverse = ([kl(p, q) for q in rows], [kl(q, p) for q in rows])
    return forward.index(min(forward)), reverse.index(min(reverse))


@right("best_students")
def best_by_xlogy(p, students):
    p, q = np.broadcast_arrays(p.double().numpy(), students.double().numpy())
    with np.errstate(all="ignore"):
        kl = lambda a, b: np.nan_to_num(a * np.log(a / b), nan=0.0, posinf=np.inf).sum(-1)
        return int(np.argmin(kl(p, q))), int(np.argmin(kl(q, p)))


@right("keep_top")
def top_by_division(logits, k, tau):
    if k not in range(1, logits.shape[-1] + 1) or not tau > 0:
        raise ValueError
    p = (logits / tau).softmax(-1)
    p = p * (logits >= logits.sort(-1, descending=True).values[:, int(k) - 1 : int(k)])
    return p / p.sum(-1, keepdim=True)


@right("keep_top")
def top_by_infinity(logits, k, tau):
    if k != round(k) or k < 1 or k > logits.shape[-1] or math.isnan(tau) or tau <= 0:
        raise ValueError
    k = int(k)
    rest = logits.argsort(-1)[:, : logits.shape[-1] - k]
    return F.softmax(logits.scatter(-1, rest, -math.inf) / tau, dim=-1)


@right("layer_pairs")
def pairs_by_range(n_student, n_teacher):
    if n_student <= 0 or n_teacher <= 0 or n_teacher % n_student:
        raise ValueError
    return list(zip(range(1, n_student + 1), range(n_teacher // n_student, n_teacher + 1, n_teacher // n_student)))


@right("hidden_loss")
def hidden_by_weights(student, teacher, P, mask):
    D, d = P.shape
    if student.shape[-1] != d or teacher.shape[-1] != D or mask.sum() == 0:
        raise ValueError
    squares = (F.linear(student, P) - teacher.detach()) ** 2
    return (squares.mean(-1) * mask).sum() / mask.sum()


@right("smoothing_for")
def smoothing_by_newton(entropy, V):
    if V < 2 or math.isnan(entropy) or entropy < 0 or entropy > math.log(V):
        raise ValueError
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        e = (low + high) / 2
        p = np.full(V, e / V)
        p[0] += 1 - e
        if -(p[p > 0] * np.log(p[p > 0])).sum() > entropy:
            high = e
        else:
            low = e
    return (low + high) / 2


@right("fair_steps")
def steps_by_fractions(steps, student, teacher, epochs, stored):
    from fractions import Fraction

    share = Fraction(teacher, 3 * student) / (epochs if stored else 1)
    return math.floor(steps * (1 + share))


@right("own_labels")
def labels_by_loop(ids, prompt, end):
    if prompt < 1 or prompt >= ids.shape[1]:
        raise ValueError
    labels = torch.full_like(ids, -100)
    for row, label in zip(ids, labels):
        for i in range(prompt, len(row)):
            label[i] = row[i]
            if row[i] == end:
                break
    return labels


@pytest.mark.parametrize(("id", "answer"), RIGHT, ids=names(RIGHT))
def test_other_right_answers_pass(id, answer):
    assert_passes(id, answer)


def test_three_statements_show_broken_code():
    assert [id for id, _ in BROKEN] == [f"distillation.{n}" for n in ("soft_loss", "mixed_loss", "layer_pairs")]


@pytest.mark.parametrize(("id", "code"), BROKEN, ids=[id for id, _ in BROKEN])
def test_the_code_of_the_statement_is_as_it_was(id, code):
    assert_as_it_was(id, code)
