"""Tasks in turn: the matrix and its sums, Fisher information against loops and formulas, springs, replay."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from llmcourse import continual
from llmcourse.continual import (
    EWC,
    InTurn,
    Replay,
    Reservoir,
    Springs,
    drawn_classes,
    fisher,
    in_turn,
    joined,
    mixed_up,
    own_scores,
    relabeled,
    squared_gradients,
    summary,
    task_loss,
    task_score,
    tasks_of,
    with_penalty,
    with_replay,
)
from llmcourse.finetuning import Classifier, Labeled, add_lora, finetune, pad_batch
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig


def tokens(texts, **_):
    """A tokenizer: each letter is a token."""
    return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


def llama(**more) -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=32, **more)
    return transformers.LlamaForCausalLM(config).eval()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, context=32)).eval()


MODELS = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt": gpt,
}

TEXTS = ["abc", "bcdefgh", "a", "hgfe", "zyx", "xyzxyzxy"]


def some_tasks(n: int = 8):
    """Three tasks: begins with a or b; ends with y or z; has c, d or e in the middle."""
    dice = torch.Generator().manual_seed(0)
    letter = lambda: chr(ord("f") + int(torch.randint(15, (1,), generator=dice)))
    word = lambda: "".join(letter() for _ in range(1 + int(torch.randint(3, (1,), generator=dice))))
    begin = [("ab"[i % 2] + word(), i % 2) for i in range(2 * n)]
    end = [(word() + "yz"[i % 2], i % 2) for i in range(2 * n)]
    middle = [(word() + "cde"[i % 3] + word(), i % 3) for i in range(3 * n)]
    return tasks_of(tokens, {"begin": (begin, begin), "end": (end, end), "middle": (middle, middle)})


TASKS = some_tasks()
LOSS = task_loss(TASKS)


def config(steps: int = 3, **more) -> TrainConfig:
    how = dict(steps=steps, batch_size=6, seq_len=1, lr=1e-2, weight_decay=0.0, seed=0)
    return TrainConfig(**how | more)


def classifier(make=llama, seed: int = 0, **more) -> Classifier:
    return Classifier(make(), 7, pool="mean", seed=seed, **more)


def loop(model: nn.Module, data: Labeled, loss_fn, classes=None) -> dict[str, torch.Tensor]:
    """One backward pass a text, in float64."""
    model = copy.deepcopy(model).double()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(len(data)):
        ids, c = data[i]
        loss = loss_fn(model, pad_batch([(ids, c if classes is None else classes[i])])).sum()
        found = torch.autograd.grad(loss, named.values(), allow_unused=True)
        for n, g in zip(named, found):
            sums[n] += 0 if g is None else g.square() / len(data)
    return sums


def by_hand(model, data, cfg, *, loss_fn=LOSS, **_):
    """A quick trainer: plain Adam on random batches, in place of `finetune` where training is not the subject."""
    dice, optimizer = torch.Generator().manual_seed(cfg.seed), torch.optim.Adam(model.parameters(), lr=cfg.lr)
    for _ in range(cfg.steps):
        picks = torch.randint(len(data), (cfg.batch_size,), generator=dice).tolist()
        optimizer.zero_grad()
        loss_fn(model, pad_batch([data[i] for i in picks])).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(continual, "finetune", by_hand)


# ------------------------------------------------------------------------------------------------ the matrix


def test_the_matrix_worked_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.3], [0.7, 0.8, 0.4], [0.6, 0.7, 0.9]], dtype=torch.float64)
    found = summary(scores, torch.tensor([0.5, 0.5, 0.3]))
    assert found.average == pytest.approx(2.2 / 3) and found.backward == pytest.approx(-0.2)
    assert found.forward == pytest.approx(0.05) and found.forgetting == pytest.approx(0.2)
    assert summary(scores).forward is None


def test_two_tasks_and_a_best_score_that_came_later():
    found = summary([[0.5, 0.2], [0.3, 0.8]], [0.1, 0.1])
    assert found == pytest.approx((0.55, -0.2, 0.1, 0.2))
    later = summary([[0.5, 0.0, 0.0], [0.8, 0.6, 0.0], [0.4, 0.6, 0.9]])
    assert later.backward == pytest.approx(-0.05)  # against its own turn: -0.1 and 0
    assert later.forgetting == pytest.approx(0.2)  # against the best it ever was: 0.4 and 0
    assert summary([[0.5, 0.2], [0.7, 0.8]]).forgetting == pytest.approx(-0.2)  # a task can gain


# ------------------------------------------------------------------------------------------- tasks in one head


def test_tasks_share_a_head_and_not_a_row():
    assert [t.classes for t in TASKS] == [range(0, 2), range(2, 4), range(4, 7)]
    assert {t.train.n_classes for t in TASKS} == {7}
    assert [sorted(set(t.train.classes)) for t in TASKS] == [[0, 1], [2, 3], [4, 5, 6]]


def test_the_loss_is_that_of_a_softmax_over_the_own_rows():
    model = classifier()
    for task in TASKS:
        batch = pad_batch([task.train[i] for i in range(5)])
        logits, first = model(batch), task.classes.start
        own = F.cross_entropy(logits[:, first : task.classes.stop], batch["classes"] - first, reduction="none")
        torch.testing.assert_close(LOSS(model, batch), own)
    mixed = [task.train[i] for task in TASKS for i in range(2)]
    alone = torch.cat([LOSS(model, pad_batch([one])) for one in mixed])
    torch.testing.assert_close(LOSS(model, pad_batch(mixed)), alone)


def test_rows_of_other_tasks_get_no_gradient_and_stay_bit_for_bit():
    model = classifier()
    LOSS(model, pad_batch([TASKS[1].train[i] for i in range(4)])).sum().backward()
    grad = model.score.weight.grad
    assert not grad[[0, 1, 4, 5, 6]].any() and bool(grad[[2, 3]].any(1).all())
    before = model.score.weight.detach().clone()
    finetune(model, TASKS[1].train, config(), loss_fn=LOSS)
    after = model.score.weight.detach()
    assert torch.equal(after[[0, 1, 4, 5, 6]], before[[0, 1, 4, 5, 6]]) and not torch.equal(after[2], before[2])


def test_a_known_task_has_only_its_own_classes():
    model = classifier()
    with torch.no_grad():
        model.score.bias[:] = torch.tensor([0.0, 0, 0, 0, 9, 9, 9])  # the last task drowns the others
    scores = own_scores(model, TASKS[0].test, TASKS[0].classes)
    assert bool((scores[:, 2:] == -math.inf).all())
    torch.testing.assert_close(scores[:, :2].exp().sum(1), torch.ones(len(scores)))
    assert task_score(model, TASKS[0]) >= 0.25 and task_score(model, TASKS[0], known=False) == 0


def test_joined_and_relabeled_leave_what_they_get_as_it_was():
    a, b = TASKS[0].train, TASKS[1].train
    sizes, classes = (len(a), len(b)), list(a.classes)
    both = joined(a, b)
    assert len(both) == sum(sizes) and both.classes == a.classes + b.classes
    assert all(torch.equal(x, y) for x, y in zip(both.ids, [*a.ids, *b.ids]))
    assert relabeled(a, [1] * len(a)).classes == [1] * len(a)
    assert (len(a), len(b)) == sizes and a.classes == classes


# ------------------------------------------------------------------------------------------ Fisher information


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("name", MODELS)
def test_squared_gradients_are_those_of_a_loop_in_float64(name, batch_size):
    model, data = classifier(MODELS[name]), Labeled(tokens, TEXTS, [0, 1, 2, 3, 4, 5], n_classes=7)
    model.train()
    found = squared_gradients(model, data, LOSS, batch_size=batch_size)
    wanted = loop(model, data, LOSS)
    assert found.keys() == wanted.keys() == {n for n, _ in model.named_parameters()}
    for n, f in found.items():
        torch.testing.assert_close(f.double(), wanted[n], rtol=1e-4, atol=1e-9, msg=n)  # float32 against float64
    assert sum(float(f.sum()) for f in found.values()) > 0
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_squared_gradients_in_float64_and_with_a_norm_that_has_a_bias():
    class Small(nn.Module):
        """Reads tokens, uses one layer twice."""

        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(31, 6), nn.LayerNorm(6)
            self.twice, self.score = nn.Linear(6, 6), nn.Linear(6, 7)

        def forward(self, batch):
            h, mask = self.embed(batch["input_ids"]), batch["attention_mask"][..., None]
            h = self.twice(torch.tanh(self.twice(self.norm(h))))
            return self.score((h * mask).sum(1))

    torch.manual_seed(0)
    model, data = Small().double(), Labeled(tokens, TEXTS, [0, 1, 2, 3, 4, 5], n_classes=7)
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 2)
        model.norm.weight[0] = 0  # no division by a weight
        model.norm.bias.normal_()
    exact = lambda m, b: F.cross_entropy(m(b), b["classes"], reduction="none")
    found, wanted = squared_gradients(model, data, exact, batch_size=4), loop(model, data, exact)
    for n, f in found.items():
        torch.testing.assert_close(f, wanted[n], rtol=1e-10, atol=1e-14, msg=n)


def test_what_is_frozen_is_left_out_and_adapters_are_measured():
    model = add_lora(classifier(), rank=2, alpha=4, layers="model.*_proj", also="score", seed=0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    data = Labeled(tokens, TEXTS, [0, 1, 2, 3, 4, 5], n_classes=7)
    found, wanted = squared_gradients(model, data, LOSS), loop(model, data, LOSS)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for n, f in found.items():
        torch.testing.assert_close(f.double(), wanted[n], rtol=1e-4, atol=1e-9, msg=n)


def test_the_information_of_a_linear_head_is_a_formula():
    """Of a softmax on features h: the mean of p (1 - p) h² for a weight, of p (1 - p) for a bias."""
    model = classifier()
    model.model.requires_grad_(False)
    with torch.no_grad():
        model.score.weight.mul_(50)
    task = TASKS[2]
    found = fisher(model, task.train, LOSS, task.classes, labels="all")
    p = own_scores(model, task.train, task.classes).exp()  # (n, 7)
    with torch.no_grad():
        h = torch.cat([model.features(pad_batch([task.train[i]])) for i in range(len(task.train))])  # (n, 16)
    spread = p * (1 - p)
    torch.testing.assert_close(found["score.bias"], spread.mean(0), rtol=1e-4, atol=1e-8)
    wanted = torch.einsum("nc,nd->cd", spread, h.square()) / len(h)
    torch.testing.assert_close(found["score.weight"], wanted, rtol=1e-4, atol=1e-8)


def test_drawn_labels_have_the_exact_information_as_their_mean():
    model = classifier()
    model.model.requires_grad_(False)
    with torch.no_grad():
        model.score.weight.mul_(20)
    task = TASKS[2]
    exact = fisher(model, task.train, LOSS, task.classes, labels="all")["score.weight"][4:]
    draws = [fisher(model, task.train, LOSS, task.classes, seed=s)["score.weight"][4:] for s in range(25)]
    drawn = torch.stack(draws).double()
    error = drawn.std(0) / math.sqrt(len(draws))
    assert float(((drawn.mean(0) - exact).abs() / error.clamp_min(1e-12)).max()) < 4.5  # of 48 numbers
    again = fisher(model, task.train, LOSS, task.classes, seed=3)["score.weight"][4:]
    assert torch.equal(draws[3], again) and not torch.equal(draws[3], draws[4])


def test_the_square_of_a_mean_is_no_mean_of_squares():
    """With labels from the model the gradient of a text is 0 in the mean: n texts leave an n-th."""
    model, task = classifier(), TASKS[2]
    right = wrong = 0.0
    for seed in range(15):
        own = relabeled(task.train, drawn_classes(model, task.train, task.classes, seed=seed))
        right += sum(float(f.sum()) for f in squared_gradients(model, own, LOSS).values())
        losses = LOSS(model, pad_batch([own[i] for i in range(len(own))]))
        grads = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
        wrong += sum(float(g.square().sum()) for g in grads if g is not None)
    assert 0.4 < len(task.train) * wrong / right < 2.5


def test_true_labels_of_a_sure_model_say_nothing_and_drawn_ones_do_not_either():
    model, task = classifier(), TASKS[0]
    by_hand(model, task.train, config(40, lr=2e-2))
    mid = copy.deepcopy(model)
    with torch.no_grad():
        mid.score.weight.mul_(0.1)  # the same answers, less sure
        mid.score.bias.mul_(0.1)
    assert task_score(model, task) == task_score(mid, task) == 1
    total = lambda m, **how: sum(float(f.sum()) for f in fisher(m, task.train, LOSS, task.classes, **how).values())
    exact, empirical = total(mid, labels="all"), total(mid, labels="true")
    assert empirical < 0.8 * exact  # right answers: their gradients are smaller than the model's own would be


# ------------------------------------------------------------------------------------------------------ springs


def test_one_spring_pulls_as_all_of_them():
    model, dice = classifier().double(), torch.Generator().manual_seed(0)
    names = [n for n, _ in model.named_parameters() if n.startswith("model.model")]
    springs, kept = Springs(), []
    for _ in range(3):
        own = dict(model.named_parameters())
        with torch.no_grad():
            for n in names:
                own[n].add_(torch.randn(own[n].shape, generator=dice))
        stiff = {n: torch.rand(own[n].shape, generator=dice, dtype=torch.float64).round(decimals=1) for n in names}
        for f in stiff.values():
            f.view(-1)[0] = 0  # a weight that nobody needs
        springs.add(model, stiff)
        kept.append((stiff, {n: own[n].detach().clone() for n in names}))
    with torch.no_grad():
        for n in names:
            own[n].add_(torch.randn(own[n].shape, generator=dice))
    one = torch.autograd.grad(springs(model), [own[n] for n in names])
    every = sum((f[n] * (own[n] - at[n]).square()).sum() / 2 for f, at in kept for n in names)
    for a, b in zip(one, torch.autograd.grad(every, [own[n] for n in names])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_place_of_the_last_task():
    model = classifier()
    name = "model.model.norm.weight"
    weight, ones = dict(model.named_parameters())[name], {name: torch.ones(16)}
    springs, last = Springs(), Springs(place="last")
    for value in (1.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        springs.add(model, ones)
        last.add(model, ones)
    assert springs.center[name].tolist() == [2.0] * 16 and last.center[name].tolist() == [3.0] * 16
    assert springs.stiffness[name].tolist() == last.stiffness[name].tolist() == [2.0] * 16
    assert last(model).item() == 0 and springs(model).item() == pytest.approx(16)  # 2 / 2 · 1², 16 times


def test_the_penalty_is_added_once_to_the_mean_in_any_micro_batch():
    model = classifier()
    springs = Springs()
    springs.add(model, {n: torch.ones_like(p) for n, p in model.named_parameters() if n.startswith("model.")})
    penalized = with_penalty(LOSS, springs, 0.5)
    with torch.no_grad():
        model.model.model.norm.weight.add_(1)
    for n in (1, 4):
        batch = pad_batch([TASKS[0].train[i] for i in range(n)])
        extra = (penalized(model, batch).mean() - LOSS(model, batch).mean()).item()
        assert extra == pytest.approx(0.5 * 16 / 2, rel=1e-5)
    results = []
    for micro in (None, 2):
        new = copy.deepcopy(model)
        finetune(new, TASKS[0].train, config(2, micro_batch=micro, optimizer="sgd"), loss_fn=penalized)
        results.append(new.state_dict())
    moved = {n: p for n, p in model.named_parameters()}
    for n in moved:
        torch.testing.assert_close(results[0][n], results[1][n], rtol=1e-4, atol=1e-6, msg=n)
    assert any(not torch.equal(results[0][n], moved[n]) for n in moved)


def test_two_penalties_are_two_configurations():
    model = classifier()
    stiff = {"score.bias": torch.ones(7)}
    a, b = Springs(), Springs()
    a.add(model, stiff)
    b.add(model, {"score.bias": 2 * torch.ones(7)})
    configs = [with_penalty(LOSS, s, x).config for s, x in ((a, 1.0), (a, 2.0), (b, 1.0))]
    assert configs[0] != configs[1] and configs[0] != configs[2] and configs[0] == with_penalty(LOSS, a, 1.0).config


# ------------------------------------------------------------------------------------------------------- replay


def test_a_reservoir_keeps_each_item_with_the_same_probability():
    counts, runs = collections.Counter(), 3000
    for seed in range(runs):
        few = Reservoir(3, seed=seed)
        few.add(range(5))
        few.add(range(5, 10))  # in two pieces: the border does not matter
        assert len(few.kept) == 3 and few.seen == 10 and len(set(few.kept)) == 3
        counts.update(few.kept)
    expected = runs * 0.3
    chi = sum((counts[i] - expected) ** 2 for i in range(10)) / (expected * 0.7) * 0.9
    assert chi < 27.9  # 9 degrees of freedom, above it once in a thousand


def test_a_reservoir_that_is_not_full_keeps_all():
    few = Reservoir(5, seed=0)
    few.add("abc")
    assert few.kept == ["a", "b", "c"]
    few.add("de")
    assert few.kept == list("abcde")


@pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.25, 5), (0.5, 16)])
def test_the_share_of_old_texts(share, n):
    new, old = TASKS[0].train, TASKS[1].train
    mixed = with_replay(new, old, share, seed=0)
    assert len(new) == 16 and len(mixed) == 16 + n
    assert sum(c in TASKS[1].classes for c in mixed.classes) == n
    assert mixed.classes[:16] == new.classes
    assert mixed.classes == with_replay(new, old, share, seed=0).classes


def test_replay_draws_from_all_tasks_before_and_the_control_has_other_labels():
    model = classifier()
    real, null = Replay(12, 0.5, seed=0), Replay(12, 0.5, random_labels=True, seed=0)
    for method in (real, null):
        assert method.data(TASKS[0], 0) is TASKS[0].train
        for i, task in enumerate(TASKS[:2]):
            method.after(model, task, LOSS, i)
        assert len(method.buffer.kept) == 12 and method.buffer.seen == 32
        assert {c in TASKS[1].classes for _, c in method.buffer.kept} == {True, False}
        assert all(c not in TASKS[2].classes for _, c in method.buffer.kept)
    true_of = {tuple(t.train.ids[i].tolist()): t.train.classes[i] for t in TASKS for i in range(len(t.train))}
    wrong = lambda method: sum(true_of[tuple(ids.tolist())] != c for ids, c in method.buffer.kept)
    assert wrong(real) == 0 and wrong(null) > 0
    same = lambda ids, c: any(true_of[tuple(ids.tolist())] in t.classes and c in t.classes for t in TASKS)
    assert all(same(ids, c) for ids, c in null.buffer.kept)  # a class of its own task


# ---------------------------------------------------------------------------------------------------- in turn


def test_stages_are_those_of_separate_trainings():
    one, two, some = classifier(), classifier(), TASKS[:2]
    rows = in_turn(one, some, config(2), loss_fn=LOSS)
    for i, task in enumerate(some):
        finetune(two, task.train, config(2, seed=i), loss_fn=LOSS)
        assert rows[i].tolist() == [task_score(two, t) for t in some]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert rows.shape == (2, 2) and rows.dtype == torch.float64


def test_a_plain_run_learns_each_task_and_replay_keeps_the_first(quick):
    plain, mended = (in_turn(classifier(), TASKS, config(25, lr=2e-2), how) for how in (None, Replay(48, 0.5, seed=0)))
    assert plain.diagonal().min() > 0.8 and mended[-1, 0] > plain[-1, 0]
    assert summary(plain).backward < 0 < summary(mended).backward


@pytest.mark.parametrize("method", [lambda: None, lambda: EWC(10.0, texts=4), lambda: Replay(4, 0.5, seed=0)])
def test_a_first_stage_that_is_done_need_not_be_done_again(method, quick):
    one, two = classifier(), classifier()
    rows = in_turn(one, TASKS, config(), method())
    by_hand(two, TASKS[0].train, config())
    again = in_turn(two, TASKS, config(), method(), done=1)
    assert torch.equal(rows, again)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_stiff_springs_hold_the_body_and_weak_ones_do_nothing(quick):
    def moved(method) -> float:
        model = classifier()
        by_hand(model, TASKS[0].train, config(10))
        start = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("model.model.")}
        in_turn(model, TASKS[:2], config(10), method, loss_fn=LOSS, done=1)
        now = dict(model.named_parameters())
        return math.sqrt(sum(float((now[n].detach() - p).square().sum()) for n, p in start.items()))

    class Everywhere(EWC):
        def after(self, model, task, loss_fn, i):
            named = model.named_parameters()
            self.springs.add(model, {n: torch.ones_like(p) for n, p in named if n.startswith("model.model.")})

    free, none, stiff = moved(InTurn()), moved(Everywhere(0.0)), moved(Everywhere(1e4))
    assert none == free and stiff < 0.3 * free


def test_the_control_has_the_same_numbers_at_other_places():
    model, task = classifier(), TASKS[0]
    real, null = EWC(1.0, texts=4), EWC(1.0, texts=4, shuffled=True)
    for method in (real, null):
        method.after(model, task, LOSS, 0)
    flat = [torch.cat([f.flatten() for f in m.springs.stiffness.values()]) for m in (real, null)]
    assert torch.equal(flat[0].sort().values, flat[1].sort().values) and not torch.equal(*flat)
    assert all(n.startswith("model.") for n in real.springs.stiffness)
    parts = mixed_up({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0, 9)}, torch.Generator().manual_seed(0))
    assert parts["a"].shape == (2, 3) and sorted([*parts["a"].flatten().tolist(), *parts["b"].tolist()]) == [*range(9)]


def test_a_lower_rate_later_is_used_later_only():
    rates = []
    seen = lambda model, data, cfg, **more: rates.append((cfg.lr, cfg.seed))
    patched = pytest.MonkeyPatch()
    patched.setattr(continual, "finetune", seen)
    try:
        in_turn(classifier(), TASKS, config(seed=4), later=config(lr=1e-4, seed=4))
    finally:
        patched.undo()
    assert rates == [(1e-2, 4), (1e-4, 5), (1e-4, 6)]


# --------------------------------------------------------------------------------------------------- bad input


def conv() -> Classifier:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return Classifier(transformers.GPT2LMHeadModel(config), 7)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda: summary([[0.5]]), "shape of scores is (1, 1); allowed: (k, k) with at least two tasks."),
        (lambda: summary([[0.5, 0.1]]), "shape of scores is (1, 2)"),
        (lambda: summary([[0.5, math.nan], [0, 0]]), "scores is 'not all finite'"),
        (lambda: summary([[0.5, 0.1], [0, 0]], [0.1]), "shape of before is (1,); allowed: (2,)."),
        (lambda: tasks_of(tokens, {}), "parts is {}"),
        (lambda: tasks_of(tokens, {"x": ([("a", 0)], [("a", 0)])}), "classes of x is 1; allowed: a whole number"),
        (lambda: tasks_of(tokens, {"x": ([("a", 0), ("b", 1)], [("a", 2)])}), "class is 2"),
        (lambda: own_scores(classifier(), TASKS[0].test, range(5, 9)), "classes is range(5, 9)"),
        (lambda: own_scores(classifier(), TASKS[0].test, range(3, 3)), "classes is range(3, 3)"),
        (lambda: task_score(classifier(), TASKS[0], known=1), "known is 1; allowed: True, False."),
        (lambda: joined(), "parts is 'none'"),
        (lambda: joined(TASKS[0].train, Labeled(tokens, ["a"], [0], n_classes=2)), "classes of the parts is [2, 7]"),
        (lambda: relabeled(TASKS[0].train, [0]), "classes is 1; allowed: 16, one a text."),
        (lambda: squared_gradients(classifier(), TASKS[0].train, LOSS, batch_size=0), "batch_size is 0"),
        (lambda: squared_gradients(conv(), TASKS[0].train, LOSS), "layer is 'Conv1D'; allowed: linear layers"),
        (lambda: fisher(classifier(), TASKS[0].train, LOSS, range(2), labels="own"), "labels is 'own'"),
        (lambda: Springs(place="first"), "place is 'first'; allowed: sum, last."),
        (lambda: Springs().add(classifier(), {"no": torch.ones(1)}), "parameter is 'no'"),
        (lambda: Springs().add(classifier(), {"score.bias": -torch.ones(7)}), "stiffness of score.bias"),
        (lambda: with_penalty(LOSS, Springs(), -1.0), "strength is -1.0"),
        (lambda: EWC(math.nan), "strength is nan"),
        (lambda: EWC(1.0, texts=0), "texts is 0"),
        (lambda: Reservoir(0, seed=0), "size is 0"),
        (lambda: with_replay(TASKS[0].train, TASKS[1].train, 1.0, seed=0), "share is 1.0"),
        (lambda: in_turn(classifier(), TASKS, config(), done=2), "done is 2; allowed: a whole number from 0 to 1."),
    ],
)
def test_bad_input_gets_one_sentence(do, says):
    with pytest.raises(BadInput) as e:
        do()
    assert says in str(e.value) and "\n" not in str(e.value)
