"""Distillation: divergences against float64 formulas and torch, limits, refusals, the trainer and the pass."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from archs import build, ids, logits

from llmcourse.compression import compress, mask_of
from llmcourse.data import TokenData
from llmcourse.distillation import (
    DIVERGENCES,
    Distill,
    KeepBlocks,
    Shuffled,
    Stored,
    attention_losses,
    continued,
    distillation_loss,
    hidden_losses,
    keep_top,
    on_policy_loss,
    soft_losses,
    spread,
    states_of,
    student_of,
)
from llmcourse.model import GPT, GPTConfig
from llmcourse.pruning import Magnitude, Structured
from llmcourse.runtime import Runtime
from llmcourse.schema import parse
from llmcourse.settings import BadInput
from llmcourse.training import IGNORE, Observer, TrainConfig, causal_lm_loss, train

RT = Runtime.auto("cpu", "float32")
CFG = TrainConfig(steps=3, batch_size=4, seq_len=16, lr=1e-2)


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(seed: int = 0, **more) -> GPT:
    torch.manual_seed(seed)
    shape = dict(vocab_size=32, d_model=16, n_layers=4, n_heads=2, context=32) | more
    return GPT(GPTConfig(**shape)).eval()


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def data() -> TokenData:
    dice = torch.Generator().manual_seed(1)
    parts = {part: torch.randint(32, (400,), generator=dice) for part in ("train", "val", "test", "calib")}
    sizes = {part: torch.ones_like(x) for part, x in parts.items()}
    return TokenData(**parts, bytes=sizes, separator=0, name="random", tokenizer="none")


class TestSoftLosses:
    def by_hand(self, z, u, t, kind, beta):
        """One number at a time, in Python's floats."""
        from math import exp, log

        def soft(x):
            e = [exp(float(v) / t) for v in x]
            return [v / sum(e) for v in e]

        kl = lambda a, b: sum(x * log(x / y) for x, y in zip(a, b))
        p, q = soft(u), soft(z)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
        ways = {
            "forward": lambda: kl(p, q),
            "reverse": lambda: kl(q, p),
            "jensen-shannon": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        }
        return t * t * ways[kind]()

    @pytest.mark.parametrize("kind", DIVERGENCES)
    @pytest.mark.parametrize("t", [0.5, 1, 3])
    def test_by_hand(self, kind, t):
        z, u = draw(4, 7), draw(4, 7, seed=1)
        expected = [self.by_hand(a, b, t, kind, 0.3) for a, b in zip(z, u)]
        found = soft_losses(z, u, temperature=t, kind=kind, beta=0.3)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)

    def test_torch(self):
        z, u = draw(4, 7), draw(4, 7, seed=1)
        log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
        theirs = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(soft_losses(z, u), theirs)

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_gradient_reaches_the_student_only(self, kind):
        z, u = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: soft_losses(x, u, temperature=2.0, kind=kind), (z,))
        soft_losses(z, u, kind=kind).sum().backward()
        assert u.grad is None and z.grad.abs().sum() > 0

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_zero_for_equal_and_blind_to_a_constant(self, kind):
        z = draw(3, 5)
        assert soft_losses(z, z + 4, temperature=2.0, kind=kind).abs().max() < 1e-12
        assert (soft_losses(z, draw(3, 5, seed=1), kind=kind) > 0).all()

    def test_a_hot_student_matches_logits(self):
        """τ² KL → the mean squared difference of centered logits, divided by 2."""
        z, u = draw(6, 9), draw(6, 9, seed=1)
        gap = (z - z.mean(-1, keepdim=True)) - (u - u.mean(-1, keepdim=True))
        limit = gap.square().mean(-1) / 2
        torch.testing.assert_close(soft_losses(z, u, temperature=1e4), limit, rtol=1e-3, atol=0)

    @pytest.mark.parametrize(("beta", "kind"), [(1e-5, "forward"), (1 - 1e-5, "reverse")])
    def test_jensen_shannon_ends_at_both(self, beta, kind):
        z, u = draw(6, 9, scale=1), draw(6, 9, seed=1, scale=1)
        mixed = soft_losses(z, u, kind="jensen-shannon", beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(mixed, soft_losses(z, u, kind=kind), rtol=1e-2, atol=0)

    def test_top_k(self):
        u = draw(5, 8)
        kept = keep_top(u.log_softmax(-1), 3).exp()
        assert ((kept > 0).sum(-1) == 3).all() and torch.allclose(kept.sum(-1), torch.ones(5).double())
        z = draw(5, 8, seed=1).requires_grad_()
        loss = soft_losses(z, u, top_k=3)
        loss.sum().backward()
        assert loss.isfinite().all() and z.grad.isfinite().all()
        torch.testing.assert_close(soft_losses(z, u, top_k=8), soft_losses(z, u))

    def test_half_precision_is_computed_in_float32(self):
        z, u = draw(4, 7).bfloat16(), draw(4, 7, seed=1).bfloat16()
        torch.testing.assert_close(soft_losses(z, u), soft_losses(z.float(), u.float()))

    REFUSED = [
        (dict(temperature=0), "temperature"),
        (dict(temperature=-1), "temperature"),
        (dict(kind="kl"), "kind"),
        (dict(beta=0), "beta"),
        (dict(beta=1), "beta"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=6), "top_k"),
        (dict(top_k=2, kind="reverse"), "top_k"),
    ]

    @pytest.mark.parametrize(("more", "name"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
    def test_refused(self, more, name):
        with pytest.raises(BadInput, match=name):
            soft_losses(draw(2, 5), draw(2, 5), **more)

    def test_another_vocabulary(self):
        with pytest.raises(BadInput, match="shape of the teacher's logits"):
            soft_losses(draw(2, 5), draw(2, 6))


class TestStates:
    def test_hidden(self):
        s, t, wide = draw(2, 3, 4), draw(2, 3, 6, seed=1), torch.nn.Linear(4, 6).double()
        expected = ((wide(s) - t) ** 2).mean(-1)
        torch.testing.assert_close(hidden_losses(s, t, wide), expected)
        with pytest.raises(BadInput, match="student's states"):
            hidden_losses(s, t)

    def test_attention(self):
        hidden = torch.ones(5, 5).triu(1).bool()
        s, t = (draw(2, 3, 5, 5, seed=k).masked_fill(hidden, -torch.inf).softmax(-1) for k in (0, 1))
        expected = torch.where(t > 0, t * (t.clamp_min(1e-300) / s.clamp_min(1e-300)).log(), 0).sum(-1).mean(1)
        torch.testing.assert_close(attention_losses(s, t), expected)
        with pytest.raises(BadInput, match="attention"):
            attention_losses(s, t[:, :2])


class TestLoss:
    def test_alpha_zero_is_the_text(self):
        model, teacher = small(), small(1)
        torch.testing.assert_close(distillation_loss(teacher, alpha=0)(model, rows()), causal_lm_loss(model, rows()))

    def test_alpha_mixes(self):
        model, teacher = small(), small(1)
        at = lambda alpha: distillation_loss(teacher, alpha=alpha)(model, rows())
        torch.testing.assert_close(at(0.3), 0.3 * at(1) + 0.7 * at(0))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_count(self, side):
        model, teacher = small(), small(1)
        text, pad = rows()[:1], torch.full((1, 4), 7)
        ones, zeros = torch.ones_like(text), torch.zeros_like(pad)
        order = (lambda a, b: torch.cat((b, a), 1)) if side == "left" else (lambda a, b: torch.cat((a, b), 1))
        batch = {"input_ids": order(text, pad), "attention_mask": order(ones, zeros)}
        loss = distillation_loss(teacher)
        torch.testing.assert_close(loss(model, batch), loss(model, text))

    def test_labels_that_do_not_count(self):
        model, loss = small(), distillation_loss(small(1))
        labels = rows().masked_fill(torch.arange(9) < 4, IGNORE)
        found = loss(model, {"input_ids": rows(), "labels": labels})
        torch.testing.assert_close(found, loss(model, rows()).view(3, 8)[:, 3:].flatten())

    def test_teacher_without_dropout_graph_or_change(self):
        model, teacher = small(), small(1, dropout=0.5).train()
        loss = distillation_loss(teacher, alpha=1)
        first = loss(model, rows())
        assert torch.equal(first, loss(model, rows())) and teacher.training
        first.sum().backward()
        assert all(p.grad is None for p in teacher.parameters())

    @pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
    def test_alpha_refused(self, alpha):
        with pytest.raises(BadInput, match="alpha"):
            distillation_loss(small(), alpha=alpha)

    def test_a_teacher_that_sees_both_sides(self):
        with pytest.raises(BadInput, match="causal"):
            distillation_loss(small(causal=False))

    def test_hidden_states(self):
        model, teacher = small(), small(1)
        pairs = [(0, 1), (3, 2)]
        found = distillation_loss(teacher, alpha=0, hidden=0.7, pairs=pairs)(model, rows())
        _, mine = states_of(model, [0, 3], rows()[:, :-1])
        _, theirs = states_of(teacher, [1, 2], rows()[:, :-1])
        extra = sum((s - t).square().mean(-1) / t.square().mean() for s, t in zip(mine, theirs)).flatten() / 2
        torch.testing.assert_close(found, causal_lm_loss(model, rows()) + 0.7 * extra)

    @pytest.mark.parametrize(
        "more", [dict(hidden=1.0), dict(pairs=[(0, 0)]), dict(hidden=1.0, pairs=[(0, 4)]), dict(hidden=-1.0)], ids=str
    )
    def test_pairs_refused(self, more):
        with pytest.raises(BadInput, match=r"pairs|hidden"):
            distillation_loss(small(), **more)

    def test_a_block_that_the_student_does_not_have(self):
        with pytest.raises(BadInput, match="block is 4; allowed: a whole number from 0 to 3"):
            distillation_loss(small(1, n_layers=6), hidden=1.0, pairs=[(4, 5)])(small(), rows())

    def test_resumes_to_the_same_bits_and_knows_its_teacher(self, data, tmp_path):
        whole, parts = small(), small()
        train(whole, data, CFG, loss_fn=distillation_loss(small(1)))

        class Stop(Exception): ...

        def stop(*_):
            raise Stop

        cfg = TrainConfig(steps=3, batch_size=4, seq_len=16, lr=1e-2, save_every=1)
        watcher = Observer()
        watcher.after_step = lambda run: stop() if run.result.steps == 2 else None
        with pytest.raises(Stop):
            train(parts, data, cfg, loss_fn=distillation_loss(small(1)), out=tmp_path, observers=[watcher])
        again = small()
        train(again, data, cfg, loss_fn=distillation_loss(small(1)), out=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
        with pytest.raises(BadInput):
            train(small(), data, cfg, loss_fn=distillation_loss(small(2)), out=tmp_path)


class TestTeachers:
    def test_stored_is_asked_once(self):
        teacher, calls = small(1), []
        teacher.register_forward_hook(lambda *_: calls.append(1))
        stored, model = Stored(teacher), small()
        first = distillation_loss(stored)(model, rows())
        assert torch.equal(first, distillation_loss(stored)(model, rows())) and len(calls) == 1
        torch.testing.assert_close(first, distillation_loss(teacher)(model, rows()))
        more = torch.cat((rows(5), rows()))  # three rows are new
        torch.testing.assert_close(stored(more), teacher(more))

    def test_shuffled_keeps_the_distributions(self):
        teacher = small(1)
        torch.manual_seed(0)
        mixed, right = Shuffled(teacher)(rows()).flatten(0, 1), teacher(rows()).flatten(0, 1)
        assert not torch.equal(mixed, right)
        order = torch.cdist(mixed, right).argmin(1)
        assert sorted(order.tolist()) == list(range(len(right))) and torch.equal(mixed, right[order])

    @pytest.mark.parametrize("arch", ["gpt", "llama"])
    def test_continued(self, arch):
        model, prompt = (small(), rows()) if arch == "gpt" else (build("llama"), ids()[:, :5])
        torch.manual_seed(0)
        found = continued(model, prompt, 6)
        assert found.shape == (len(prompt), prompt.shape[1] + 6)
        assert torch.equal(found[:, : prompt.shape[1]], prompt)

    def test_continued_draws_from_the_model(self):
        """The first new token has the model's probabilities: five standard errors."""
        model = build("llama")
        prompt = ids()[:1, :5].expand(2000, 5)
        p = logits(model, prompt[:1])[0, -1].softmax(-1)
        torch.manual_seed(0)
        share = continued(model, prompt, 1)[:, -1].bincount(minlength=len(p)) / 2000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-3).all()

    def test_on_policy_counts_the_students_tokens_only(self):
        model, teacher = small(), small(1)
        loss = on_policy_loss(teacher, prompt=3, new=4, kind="reverse")
        torch.manual_seed(0)
        found = loss(model, rows())
        torch.manual_seed(0)
        text = continued(model, rows()[:, :3], 4)
        q, p = model(text[:, :-1]), teacher(text[:, :-1])
        assert found.shape == (3 * 4,) and found.requires_grad
        torch.testing.assert_close(found, soft_losses(q, p, kind="reverse")[:, 2:].flatten())


class TestStudent:
    @pytest.mark.parametrize(
        ("blocks", "kept", "expected"),
        [(4, 4, [0, 1, 2, 3]), (4, 2, [0, 3]), (30, 3, [0, 14, 29]), (5, 1, [0])],
        ids=str,
    )
    def test_spread(self, blocks, kept, expected):
        assert spread(blocks, kept) == expected

    def test_blocks_are_the_teachers(self):
        teacher = small()
        before = copy.deepcopy(teacher.state_dict())
        student = student_of(teacher, [0, 2])
        for mine, theirs in ((0, 0), (1, 2)):
            for a, b in zip(student.blocks[mine].parameters(), teacher.blocks[theirs].parameters()):
                assert torch.equal(a, b) and a is not b
        assert student.config.n_layers == 2 and teacher.config.n_layers == 4
        assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
        torch.testing.assert_close(student_of(teacher, range(4))(rows()), teacher(rows()), rtol=0, atol=0)

    @pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma2"])
    def test_models_of_transformers(self, arch):
        teacher = build(arch)
        student = student_of(teacher, [0, 2])
        assert logits(student, ids()).isfinite().all()
        assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers > 2
        new = student.generate(ids()[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert new.shape == (1, 7)
        assert torch.equal(logits(student_of(teacher, [0, 1, 2]), ids()), logits(teacher, ids()))

    @pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 4], [-1, 2]], ids=str)
    def test_refused(self, kept):
        with pytest.raises(BadInput, match="kept"):
            student_of(small(), kept)


class TestPass:
    def test_after_pruning_the_zeros_stay(self, data):
        dense = small()
        before = copy.deepcopy(dense.state_dict())
        passes = [Magnitude(sparsity=0.5), Distill(teacher=dense, train=CFG)]
        student, reports = compress(dense, passes, data, RT)
        layer = student.blocks[0].ffn
        linear = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
        assert (linear.weight[mask_of(linear) == 0] == 0).all()
        only, _ = compress(dense, passes[:1], data, RT)
        moved = lambda m: next(x for x in m.blocks[0].ffn.modules() if isinstance(x, torch.nn.Linear)).weight
        assert not torch.equal(moved(student), moved(only))
        assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
        assert [r.name for r in reports] == ["magnitude", "distill"]

    def test_the_config_holds_everything(self, data):
        config = Distill(teacher=small(1), train=CFG).config
        assert config["teacher"] == "GPT" and config["train"]["steps"] == 3 and config["alpha"] == 0.5
        same, other = (Distill(teacher=small(k), train=CFG).config for k in (1, 2))
        assert same == config and other["sha256 of the teacher"] != config["sha256 of the teacher"]

    def test_a_folder_is_the_same_as_its_module(self, data, tmp_path):
        teacher = build("llama")
        teacher.save_pretrained(tmp_path)
        tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}}}
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(tokenizer | {"model": tokenizer["model"] | {"unk_token": "a"}})
        )
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        made = [Distill(teacher=t, train=CFG) for t in (str(tmp_path), teacher)]
        a, b = (compress(student_of(teacher, [0, 2]), [p], data, RT) for p in made)
        assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters()))
        key = "sha256 of the teacher"
        assert a[1][0].config[key] == b[1][0].config[key] and a[1][0].config["teacher"] == str(tmp_path)

    def test_a_recipe(self, data):
        table = {"teacher": "course-3m", "train": {"steps": 2, "batch_size": 1, "lr": 0.1}, "alpha": 1.0}
        assert parse(Distill, table, "arm").train == TrainConfig(steps=2, batch_size=1, lr=0.1)
        assert parse(KeepBlocks, {"kept": [0, 2]}, "arm") == KeepBlocks(kept=(0, 2))

    BAD = [
        ({"train": {"steps": 0, "batch_size": 1, "lr": 0.1}}, "train in arm: steps is 0"),
        ({"train": {"steps": 2, "batch_size": 1}}, "key in train of arm is 'lr (missing)'"),
        ({"train": {"steps": 2, "batch_size": 1, "lr": 0.1, "x": 1}}, "train.x in arm is 1; allowed: no key"),
        ({"train": 3}, "train in arm is 3; allowed: a table"),
        ({"teacher": 3}, "teacher in arm is 3; allowed: a text"),
        ({"alpha": 2.0}, "arm: alpha is 2.0"),
        ({"epochs": 0}, "arm: epochs is 0"),
    ]

    @pytest.mark.parametrize(("bad", "words"), BAD, ids=lambda x: x if isinstance(x, str) else "")
    def test_a_bad_recipe_gets_one_sentence(self, bad, words):
        good = {"teacher": "course-3m", "train": {"steps": 2, "batch_size": 1, "lr": 0.1}}
        with pytest.raises(BadInput) as e:
            parse(Distill, good | bad, "arm")
        assert words in str(e.value)

    @pytest.mark.parametrize(("kept", "expected"), [(2, [0, 3]), ((0, 1, 3), [0, 1, 3])], ids=str)
    def test_keep_blocks(self, data, kept, expected):
        dense = small()
        student, _ = compress(dense, [KeepBlocks(kept=kept)], data, RT)
        torch.testing.assert_close(student(rows()), student_of(dense, expected)(rows()), rtol=0, atol=0)

    @pytest.mark.parametrize("kept", [0, 5, (), (0, 0), (1, 4), (2, 1), (-1, 0)], ids=str)
    def test_keep_blocks_refused(self, data, kept):
        with pytest.raises(BadInput, match="kept"):
            compress(small(), [KeepBlocks(kept=kept)], data, RT)

    def test_epochs_read_less_text(self, data):
        once, twice = (Distill(teacher=small(), train=CFG, epochs=n).needs["train"] for n in (1, 2))
        assert (once, twice) == (12 * 16 + 1, 6 * 16 + 1)

    def test_too_little_text_is_refused_before_any_work(self, data):
        much = TrainConfig(steps=100, batch_size=4, seq_len=16, lr=1e-2)
        with pytest.raises(BadInput, match=r"tokens of data\.train"):
            compress(small(), [Distill(teacher=small(1), train=much)], data, RT)

    def test_longer_rows_than_the_positions(self, data):
        cfg = TrainConfig(steps=1, batch_size=1, seq_len=64, lr=1e-2)
        with pytest.raises(BadInput, match="seq_len is 64; allowed: at most 32, the positions of the student"):
            compress(small(), [Distill(teacher=small(1), train=cfg)], data, RT)

    def test_a_checkpoint_of_another_text_is_not_taken_up(self, data, tmp_path):
        """The folder's name holds the training text, too."""
        p = Distill(teacher=small(1), train=CFG)
        other = replace(data, train=data.train.flip(0))
        a, _ = compress(small(), [p], data, RT, checkpoint=tmp_path)
        b, _ = compress(small(), [p], other, RT, checkpoint=tmp_path)
        again, _ = compress(small(), [p], data, RT, checkpoint=tmp_path)
        same = lambda x, y: all(torch.equal(s, t) for s, t in zip(x.parameters(), y.parameters()))
        assert same(a, again) and not same(a, b) and len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        "before", [[], [KeepBlocks(kept=2)], [Structured(choose="random")]], ids=["", "keep", "cut"]
    )
    def test_another_vocabulary_is_refused_before_any_work(self, data, before, monkeypatch):
        for kind in (KeepBlocks, Structured):
            monkeypatch.setattr(kind, "run", lambda *_: pytest.fail("the pass before it has run"))
        with pytest.raises(BadInput, match="vocabulary of the teacher is 31; allowed: 32 tokens"):
            compress(small(), [*before, Distill(teacher=small(vocab_size=31), train=CFG)], data, RT)
