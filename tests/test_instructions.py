"""Chats as tokens and masks, losses on answers, DPO against its formula, and what is refused."""

from __future__ import annotations

import copy
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
import transformers

from llmcourse.data import locate_model
from llmcourse.finetuning import add_lora
from llmcourse.instructions import (
    COURSE_TEMPLATE,
    Chats,
    Example,
    Pair,
    Pairs,
    answer_kl,
    answer_log_p,
    chat_batch,
    dpo_losses,
    encode_chat,
    encode_last,
    example_loss,
    grounded,
    mean_rouge,
    nearest,
    pair_batch,
    pair_scores,
    prefer,
    preference_loss,
    reply,
    summaries,
    translations,
    tune,
    turns,
    with_reference,
    written,
)
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput, load_settings
from llmcourse.training import IGNORE, TrainConfig, causal_lm_loss

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "red",
    "house",
    "of",
    "a",
    "small",
    "town",
    "is",
    "old",
    "and",
    "its",
    "name",
    "was",
    "never",
    "written",
    "down",
]


@functools.cache
def tokenizer():
    """That of the house model, which comes with the package."""
    return transformers.AutoTokenizer.from_pretrained(locate_model("course-3m", load_settings()))


def gpt(seed: int = 0, **more) -> GPT:
    torch.manual_seed(seed)
    shape = dict(vocab_size=4096, d_model=32, n_layers=1, n_heads=2, context=128) | more
    model = GPT(GPTConfig(**shape)).eval()
    model.stop = (0,)
    return model


def saying(dice: random.Random, longest: int = 6) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(1, longest)))


def some_chats(n: int = 5, seed: int = 0) -> list:
    dice = random.Random(seed)
    return [turns(*(saying(dice) for _ in range(2 * dice.randint(1, 2)))) for _ in range(n)]


def config(steps: int, lr: float = 1e-2, **more) -> TrainConfig:
    how = dict(batch_size=4, seq_len=1, weight_decay=0.0, schedule="constant", seed=0) | more
    return TrainConfig(steps=steps, lr=lr, **how)


# ------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("template", [COURSE_TEMPLATE, CHATML], ids=["course", "chatml"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_tokens_are_those_of_transformers(template, system):
    dice = random.Random(1)
    for _ in range(8):
        chat = turns(*(saying(dice) for _ in range(dice.randint(1, 5))), system=system)
        theirs = tokenizer().apply_chat_template(chat, chat_template=template, tokenize=True)["input_ids"]
        assert encode_chat(tokenizer(), chat, template=template).ids.tolist() == theirs
        ask = tokenizer().apply_chat_template(
            chat, chat_template=template, tokenize=True, add_generation_prompt=True
        )["input_ids"]  # fmt: skip
        assert encode_chat(tokenizer(), chat, template=template, ask=True).ids.tolist() == ask


@pytest.mark.parametrize(("template", "end"), [(COURSE_TEMPLATE, "<|endoftext|>"), (CHATML, "<|im_end|>")])
def test_the_mask_holds_the_answers_with_their_ends_and_nothing_else(template, end):
    chat = turns("a red house", "old", "and the town", "small, too", "its name?", system="Be brief.")
    ids, answer = encode_chat(tokenizer(), chat, template=template)
    runs = torch.diff(answer.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    pieces = [tokenizer().decode(ids[a:b]) for a, b in zip((runs == 1).nonzero(), (runs == -1).nonzero(), strict=True)]
    assert pieces == [f"old{end}", f"small, too{end}"]
    text, spans = written(tokenizer(), chat, template=template)
    assert [text[a:b] for a, b in spans] == pieces


@pytest.mark.parametrize("answer", ["old", " old", "  old", "\nold", "    return x", "\n\n old ", "old\n"])
def test_what_is_asked_is_what_was_trained_behind(answer):
    for template in (COURSE_TEMPLATE, CHATML):
        chat = turns("a red house", answer, "and?", answer)
        whole = encode_chat(tokenizer(), chat, template=template)
        for n in (1, 3):
            asked = encode_chat(tokenizer(), chat[:n], template=template, ask=True).ids
            assert torch.equal(whole.ids[: len(asked)], asked)
            assert bool(whole.answer[len(asked)]) and not bool(whole.answer[len(asked) - 1])


def test_the_prefix_of_the_text_is_not_the_prefix_of_the_tokens():
    """The case that the cut is for: it must be one in which cutting makes a difference."""
    colon = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    colon += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = turns("a red house", "old")
    how = dict(chat_template=colon, tokenize=True)
    together = tokenizer().apply_chat_template(chat, **how)["input_ids"]
    asked = tokenizer().apply_chat_template(chat[:1], add_generation_prompt=True, **how)["input_ids"]
    assert together[: len(asked)] != asked
    assert encode_chat(tokenizer(), chat, template=colon).ids[: len(asked)].tolist() == asked


def test_the_template_of_a_tokenizer_is_used_and_the_tokenizer_stays_as_it_was():
    own = copy.deepcopy(tokenizer())
    own.chat_template = CHATML
    chat = turns("a house", "old")
    assert encode_chat(own, chat).ids.tolist() == encode_chat(tokenizer(), chat, template=CHATML).ids.tolist()
    assert encode_chat(own, chat, template=COURSE_TEMPLATE).ids.tolist() != encode_chat(own, chat).ids.tolist()
    assert own.chat_template == CHATML and tokenizer().chat_template is None
    assert chat == [{"role": "user", "content": "a house"}, {"role": "assistant", "content": "old"}]


FORGETS = "{% for m in messages %}{% if loop.last %}{{ m.content }}.{% endif %}{% endfor %}"
NO_END = COURSE_TEMPLATE.replace("{{ eos_token }}", "")
SHOUTS = COURSE_TEMPLATE.replace("turn['content']", "turn['content'] | upper")


@pytest.mark.parametrize(
    ("chat", "template", "sentence"),
    [
        (turns("a", "b"), None, "template is None; allowed: a text where the tokenizer has none"),
        (turns("a", "b"), FORGETS, "template is 'one that rewrites earlier turns'"),
        (turns("a", "b"), NO_END, "template is 'one without an end of the turn'"),
        (turns("a", "b"), SHOUTS, "template is 'one that changes an answer'"),
        ("a", COURSE_TEMPLATE, "chat is 'str'; allowed: a list"),
        ([], COURSE_TEMPLATE, "chat is 'list'; allowed: a list of at least one turn"),
        ([{"role": "bot", "content": "a"}], COURSE_TEMPLATE, "role of turn 0 is 'bot'; allowed: system, user"),
        ([{"role": "user"}], COURSE_TEMPLATE, "turn 0 is"),
        (turns("a", " "), COURSE_TEMPLATE, "content of turn 1 is ' '"),
        (turns("a", "b")[1:], COURSE_TEMPLATE, "turn 0 is 'an answer after nothing'"),
        ([*turns("a", "b"), *turns("c", "d")[1:]], COURSE_TEMPLATE, "turn 2 is 'an answer after assistant'"),
    ],
)
def test_what_is_no_chat_is_refused(chat, template, sentence):
    with pytest.raises(BadInput) as e:
        encode_chat(tokenizer(), chat, template=template)
    assert str(e.value).startswith(sentence)


# --------------------------------------------------------------------------------------- losses


def data_of(chats, **more) -> Chats:
    return Chats(tokenizer(), chats, template=COURSE_TEMPLATE, **more)


def test_the_loss_is_that_of_transformers():
    torch.manual_seed(0)
    shape = dict(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    batch = chat_batch(data_of(some_chats()).examples)
    with torch.no_grad():
        theirs = model(**batch).loss  # labels are not shifted: transformers does that, and so do we, once
        ours = causal_lm_loss(model, batch)
    torch.testing.assert_close(ours.mean(), theirs)
    assert len(ours) == int((batch["labels"] != IGNORE).sum())


def test_each_chat_has_its_own_loss_alone_and_in_a_batch():
    model, data = gpt(), data_of(some_chats())
    sums, counts = answer_log_p(model, chat_batch(data.examples))
    for i, (ids, answer) in enumerate(data.examples):
        log_p = model(ids[None])[0, :-1].log_softmax(-1)  # (T - 1, V)
        each = log_p.gather(1, ids[1:, None])[:, 0][answer[1:]]
        torch.testing.assert_close(sums[i], each.sum())
        assert int(counts[i]) == int(answer.sum()) == len(each)
        alone, one = answer_log_p(model, chat_batch([Example(ids, answer)]))
        torch.testing.assert_close(alone[0], sums[i])
        assert one[0] == counts[i]
    torch.testing.assert_close(example_loss(model, chat_batch(data.examples)), -sums / counts)


def test_the_two_means_by_hand():
    """An answer of one token with loss 1, and one of three with loss 3: 2.5 over tokens, 2 over examples."""

    def model(ids, attention_mask=None):
        logits = torch.full((*ids.shape, 3), -1e4)
        loss = torch.tensor([[1.0, 1, 1, 1], [3, 3, 3, 3]])[:, : ids.shape[1]]
        return logits.scatter(2, torch.ones_like(ids)[..., None], -loss[..., None]).scatter(
            2, torch.full_like(ids, 2)[..., None], torch.log1p(-torch.exp(-loss))[..., None]
        )  # token 1 has probability e^-loss

    short = Example(torch.tensor([0, 0, 1]), torch.tensor([False, False, True]))
    long = Example(torch.tensor([0, 1, 1, 1]), torch.tensor([False, True, True, True]))
    batch = chat_batch([short, long])
    assert causal_lm_loss(model, batch).mean().item() == pytest.approx(2.5)
    assert example_loss(model, batch).mean().item() == pytest.approx(2.0)
    assert example_loss(model, batch).tolist() == pytest.approx([1.0, 3.0])


def test_a_batch_hides_questions_and_padding_and_changes_nothing():
    data = data_of(some_chats())
    before = [(ids.clone(), answer.clone()) for ids, answer in data.examples]
    batch = chat_batch(data.examples)
    for row, (ids, answer) in enumerate(before):
        n = len(ids)
        assert torch.equal(batch["input_ids"][row, :n], ids) and batch["attention_mask"][row].sum() == n
        assert torch.equal(batch["labels"][row, :n] != IGNORE, answer)
        assert (batch["labels"][row, n:] == IGNORE).all()
        assert torch.equal(data.examples[row].ids, ids) and torch.equal(data.examples[row].answer, answer)


def test_loss_on_everything_counts_every_token_but_the_first():
    chats = some_chats()
    all_of, answers = data_of(chats, learn="everything"), data_of(chats)
    counts = answer_log_p(gpt(), chat_batch(all_of.examples))[1].tolist()
    assert counts == [len(ids) - 1 for ids, _ in answers.examples]


def test_pieces_of_a_batch_weigh_what_the_whole_does():
    """The mean is over all answer tokens of the step, however the batch is cut."""
    found = []
    for micro in (None, 1):
        model = gpt()
        tune(model, data_of(some_chats(4)), config(2, micro_batch=micro, optimizer="sgd"))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_a_model_learns_to_answer_and_to_stop():
    chats = [turns("the red house", "old"), turns("the small town", "its name"), turns("the name", "was red")]
    model = gpt(d_model=48)
    run = tune(model, data_of(chats), config(60, batch_size=3))
    assert run.losses[-1] < 0.05 < run.losses[0]
    found = reply(model, tokenizer(), [c[:1] for c in chats], max_new_tokens=12, template=COURSE_TEMPLATE)
    assert [r.text for r in found] == [c[1]["content"] for c in chats]
    assert all(r.ended for r in found)
    cut = reply(model, tokenizer(), [chats[1][:1]], max_new_tokens=1, template=COURSE_TEMPLATE)[0]
    assert not cut.ended and chats[1][1]["content"].startswith(cut.text)


def test_without_the_end_in_the_labels_a_model_does_not_stop():
    def without_end(examples):
        batch = chat_batch(examples)
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == 0, IGNORE)}

    chats = [turns("the red house", "old"), turns("the small town", "its name")]
    model = gpt(d_model=48)
    tune(model, data_of(chats), config(40, batch_size=2), collate=without_end)
    found = reply(model, tokenizer(), [c[:1] for c in chats], max_new_tokens=12, template=COURSE_TEMPLATE)
    assert not any(r.ended for r in found) and found[0].text.startswith("old")


def test_answers_are_in_order_whatever_the_batch():
    chats = [c[:1] for c in some_chats(7, seed=3)]
    model, how = gpt(2), dict(max_new_tokens=5, template=COURSE_TEMPLATE)
    together = reply(model, tokenizer(), chats, **how)
    assert together == [reply(model, tokenizer(), [c], **how)[0] for c in chats]
    assert together == reply(model, tokenizer(), chats, batch_size=2, **how)
    draw = lambda seed: reply(
        model, tokenizer(), chats, temperature=1.0, generator=torch.Generator().manual_seed(seed), **how
    )
    assert draw(0) == draw(0) != draw(1)


def test_only_adapters_move_where_there_are_adapters():
    model = add_lora(gpt(), rank=2, alpha=4, layers="blocks.*", seed=0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    tune(model, data_of(some_chats()), config(2))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)


def test_training_data_that_means_nothing_is_refused():
    for chats, more, sentence in (
        ([], {}, "chats is 0; allowed: at least one."),
        ([turns("a")], {}, "chat 0 is 'one without an answer'"),
        ([turns("a", "b")], {"longest": 5}, "tokens of chat 0 is"),
        ([turns("a", "b")], {"learn": "all"}, "learn is 'all'; allowed: answers, everything."),
    ):
        with pytest.raises(BadInput) as e:
            data_of(chats, **more)
        assert str(e.value).startswith(sentence)
    with pytest.raises(BadInput, match="frozen as a whole"):
        tune(gpt().requires_grad_(False), data_of(some_chats()), config(1))
    with pytest.raises(BadInput, match="at most 16, the positions"):
        tune(gpt(context=16), data_of([turns("a house " * 9, "b")]), config(1))


# ------------------------------------------------------------------------------------------ DPO


def some_pairs(n: int = 6, seed: int = 0) -> list[Pair]:
    dice = random.Random(seed)
    return [Pair(turns(saying(dice)), "old " + saying(dice), "new " + saying(dice)) for _ in range(n)]


def pairs_of(pairs) -> Pairs:
    return Pairs(tokenizer(), pairs, template=COURSE_TEMPLATE)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
def test_dpo_is_equation_7(beta):
    dice = torch.Generator().manual_seed(0)
    policy, reference = (-30 * torch.rand(40, 2, generator=dice, dtype=torch.float64) for _ in range(2))
    wanted = [
        -math.log(1 / (1 + math.exp(-(beta * (w - rw) - beta * (l - rl)))))
        for (w, l), (rw, rl) in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    torch.testing.assert_close(dpo_losses(policy, reference, beta=beta), torch.tensor(wanted, dtype=torch.float64))
    assert torch.allclose(dpo_losses(policy, policy, beta=beta), torch.full((40,), math.log(2), dtype=torch.float64))


def test_the_gradient_of_dpo_is_that_of_the_paper():
    """-β sigmoid(-margin) for the chosen answer, the opposite for the rejected one (below equation 7)."""
    dice = torch.Generator().manual_seed(1)
    policy, reference = (-5 * torch.rand(20, 2, generator=dice, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    dpo_losses(policy, reference, beta=0.3).sum().backward()
    gain = (policy - reference).detach()
    push = 0.3 * torch.sigmoid(-0.3 * (gain[:, 0] - gain[:, 1]))
    torch.testing.assert_close(policy.grad, torch.stack((-push, push), 1))
    far = torch.tensor([[-1e4, 0.0], [0.0, -1e4]])
    losses = dpo_losses(far, torch.zeros(2, 2), beta=1.0)
    assert losses.tolist() == [1e4, 0.0]  # no infinity, and no nan


def test_at_the_start_the_loss_of_every_pair_is_ln_2():
    model, data = gpt(), pairs_of(some_pairs())
    scored = with_reference(model, data, batch_size=4)
    assert data.reference.isnan().all() and not scored.reference.isnan().any()
    for more in ({}, {"beta": 3.0}, {"per_token": True}):
        losses = preference_loss(model, pair_batch([scored[i] for i in range(6)]), **more)
        torch.testing.assert_close(losses, torch.full((6,), math.log(2)), atol=1e-5, rtol=0)
    other = preference_loss(gpt(1), pair_batch([scored[i] for i in range(6)]))
    assert (other - math.log(2)).abs().min() > 1e-4


def test_the_forms_of_the_loss_from_single_log_probabilities():
    model, base = gpt(1), gpt(0)
    data = with_reference(base, pairs_of(some_pairs()))
    batch = pair_batch([data[i] for i in range(6)])
    rows = []
    for side in (data.chosen, data.rejected):
        for m in (model, base):
            found = [answer_log_p(m, chat_batch([e])) for e in side]
            rows.append(torch.stack([s[0] for s, _ in found]))
    w, w0, l, l0 = (row.detach().double() for row in rows)
    n, k = (torch.tensor([int(e.answer.sum()) for e in side]).double() for side in (data.chosen, data.rejected))
    sigmoid = lambda margin: -F.logsigmoid(margin).float()
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(preference_loss(model, batch, beta=0.2), sigmoid(0.2 * (w - w0 - l + l0)))
    per = 0.2 * ((w - w0) / n - (l - l0) / k)
    close(preference_loss(model, batch, beta=0.2, per_token=True), sigmoid(per))
    both = sigmoid(0.2 * (w - w0 - l + l0)) + 0.5 * (-w / n).float()
    close(preference_loss(model, batch, beta=0.2, keep=0.5), both)


def test_a_constant_on_all_logits_changes_nothing():
    class Shifted(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, ids, attention_mask=None):
            return self.inner(ids, attention_mask=attention_mask) + 7 * ids[..., None] % 5

    model = gpt()
    data = with_reference(gpt(1), pairs_of(some_pairs()))
    batch = pair_batch([data[i] for i in range(6)])
    torch.testing.assert_close(preference_loss(Shifted(model), batch), preference_loss(model, batch))


def test_swapped_answers_have_the_opposite_margin():
    model, base, pairs = gpt(1), gpt(0), some_pairs()
    turned = [Pair(c, b, a) for c, a, b in pairs]
    one, two = (
        preference_loss(model, pair_batch([d[i] for i in range(6)]), beta=0.5)
        for d in (with_reference(base, pairs_of(pairs)), with_reference(base, pairs_of(turned)))
    )
    torch.testing.assert_close((-one).exp() + (-two).exp(), torch.ones(6))  # sigmoid(m) + sigmoid(-m)


def test_training_on_preferences_orders_the_pairs():
    model = gpt()
    data = with_reference(model, pairs_of(some_pairs()))
    kept = copy.deepcopy(model)
    run = prefer(model, data, config(15, lr=3e-3))
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-4) and run.losses[-1] < 0.3
    change = pair_scores(model, data)[0] - data.reference
    assert (change[:, 0] > change[:, 1]).all()
    assert torch.equal(pair_scores(kept, data, batch_size=2)[0].round(decimals=3), data.reference.round(decimals=3))


def test_only_the_last_answer_of_a_chat_is_preferred():
    chat = turns("a house", "old", "and the town", "small")
    ids, answer = encode_last(tokenizer(), chat, template=COURSE_TEMPLATE)
    assert tokenizer().decode(ids[answer]) == "small<|endoftext|>"
    assert torch.equal(ids, encode_chat(tokenizer(), chat, template=COURSE_TEMPLATE).ids)
    data = pairs_of([Pair(chat[:3], "small", "large")])
    assert tokenizer().decode(data.rejected[0].ids[data.rejected[0].answer]) == "large<|endoftext|>"


def test_preferences_that_mean_nothing_are_refused():
    data = pairs_of(some_pairs(2))
    batch = pair_batch([data[0], data[1]])
    with pytest.raises(BadInput, match="call with_reference first"):
        preference_loss(gpt(), batch)
    with pytest.raises(BadInput, match="call with_reference first"):
        prefer(gpt(), data, config(1))
    with pytest.raises(BadInput, match="two equal answers"):
        pairs_of([Pair(turns("a"), "b", "b")])
    with pytest.raises(BadInput, match="pairs is 0"):
        pairs_of([])
    with pytest.raises(BadInput, match="shapes of policy and reference"):
        dpo_losses(torch.zeros(2), torch.zeros(2), beta=1)
    for beta in (0, -1, math.nan):
        with pytest.raises(BadInput, match="beta is"):
            dpo_losses(torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)
    scored = with_reference(gpt(), data)
    for more in ({"keep": -1}, {"per_token": "no"}):
        with pytest.raises(BadInput):
            preference_loss(gpt(), pair_batch([scored[0]]), **more)


def test_the_divergence_of_answers():
    model, base = gpt(1), gpt(0)
    data = data_of(some_chats())
    batch = chat_batch(data.examples)
    assert answer_kl(base, base, batch).abs().max() == 0
    found = answer_kl(model, base, batch)
    for i, (ids, answer) in enumerate(data.examples):
        p, q = (m(ids[None])[0, :-1].double().log_softmax(-1) for m in (model, base))
        each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).detach()  # KL(p ‖ q)
        assert float(found[i]) == pytest.approx(float(each[answer[1:]].sum()), rel=1e-4)
    assert (found > 0).all()


# ---------------------------------------------------------------------------------------- tasks


def test_scores_and_baselines():
    assert grounded("Red house, new", "The red house.") == pytest.approx(2 / 3)
    assert grounded("", "a house") == 0 and grounded("ROME", "rome") == 1
    assert mean_rouge(["a b", ""], ["a b", "c"]).value == 0.5
    with pytest.raises(BadInput, match="2 references"):
        mean_rouge(["a"], ["a", "b"])
    assert nearest(["a red house", "an old town", "the name"], ["old towns: a town", "red, red"]) == [1, 0]


def test_the_parts_of_the_tasks():
    article = lambda text, says, split: {"text": text, "description": says, "split": split}
    records = [article("a b c d", "x", "train"), article("e f", " y ", "test"), article("g", " ", "train")]
    assert summaries(records, words=3) == {"train": [("a b c", "x")], "test": [("e f", "y")]}
    with pytest.raises(BadInput, match="records"):
        summaries(records[2:])
    text = lambda source, target, split: {"text": source, "translation": target, "split": split}
    records = [
        text("Open a file", "Ouvrir un fichier", "train"), text("menu\x04Open a file.", "Ouvrir un fichier", "test"),
        text("Close", "Fermer", "train"), text("Close all tabs", "Fermer les onglets", "test"),
        text("one two three four", "un deux trois quatre", "test"),
    ]  # fmt: skip
    found = translations(records, longest=3)
    assert found == {
        "train": [("Open a file", "Ouvrir un fichier")],
        "test": [("Close all tabs", "Fermer les onglets")],
    }
