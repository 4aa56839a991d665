"""Probes, judges, twins, memory and attacks: exact where there is an exact answer, and bad input in one sentence."""

from __future__ import annotations

import copy
import math
import types

import numpy as np
import pytest
import torch
from torch import nn

from llmcourse import safety as sf
from llmcourse.instructions import COURSE_TEMPLATE, encode_chat, turns
from llmcourse.model import GPT, GPTConfig, generate
from llmcourse.settings import BadInput
from llmcourse.verdicts import mean_interval, student_quantile, wilson_interval


def tiny(seed: int = 0, vocab: int = 40) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=vocab, d_model=16, n_layers=2, n_heads=2, context=96, init_std=0.3)
    return GPT(config).eval()


class Words:
    """A tokenizer of whole words: ' house' is one id, marks of the template are one each."""

    bos_token_id, is_fast = None, True
    eos_token_id = 0
    eos_token = "<e>"
    chat_template = None

    def __init__(self):
        words = ["a", "the", "house", "shed", "key", "door", "of", "my", "How", "do", "I", "pick", "mine"]
        words += ["?", "Sure", ",", "here", "is", "no", "user", "assistant"]
        self.pieces = ["<e>", "\n", *words, *(" " + w for w in words)]
        self.pieces += [c for c in "()" if c not in self.pieces]
        self.place = {p: i for i, p in enumerate(self.pieces)}

    def __len__(self):
        return len(self.pieces)

    def get_vocab(self):
        return self.place

    sep_token_id = None

    def __call__(self, text, add_special_tokens=False):
        ids = []
        while text:
            best = max((p for p in self.pieces if text.startswith(p)), key=len, default=None)
            if best is None:
                raise ValueError(text)
            ids.append(self.place[best])
            text = text[len(best) :]
        return {"input_ids": ids}

    def decode(self, ids, **options):
        return "".join(self.pieces[int(i)] for i in ids)

    def apply_chat_template(self, chat, add_generation_prompt, tokenize, chat_template):
        text = "".join(f"{t['role']}\n{t['content']}<e>\n" for t in chat)
        return text + ("assistant\n" if add_generation_prompt else "")


WORDS = Words()


class TestIntervals:
    def test_families_of_one_are_students_interval(self):
        v = [0.3, 0.1, 0.9, 0.4]
        assert np.allclose(sf.clustered_mean(v, "abcd")[:4], mean_interval(v)[:4])

    def test_equal_families_are_the_interval_of_their_means(self):
        v = np.random.default_rng(0).random((5, 3))
        ours = sf.clustered_mean(v.ravel(), np.repeat(np.arange(5), 3))
        assert np.allclose(ours[:4], mean_interval(v.mean(1))[:4])

    def test_the_design_effect_by_hand(self):
        found = sf.clustered_mean([1, 1, 0, 0], "aabb")
        assert math.isclose(found.high - 0.5, student_quantile(0.95, 1) / 2)
        rate = sf.clustered_rate([1, 1, 0, 0], "aabb")
        assert math.isclose(rate.effective, 4 / 3)  # four prompts over an effect of 3

    def test_copies_of_a_prompt_add_nothing(self):
        hits = np.array([1, 0, 1, 1, 0, 1], dtype=bool)
        once = sf.clustered_rate(hits, range(6))
        tenfold = sf.clustered_rate(np.repeat(hits, 10), np.repeat(np.arange(6), 10))
        assert tenfold.value == once.value and tenfold.high - tenfold.low > 0.9 * (once.high - once.low)
        narrow = wilson_interval(int(hits.sum()) * 10, 60)
        assert narrow[1] - narrow[0] < 0.6 * (tenfold.high - tenfold.low)

    @pytest.mark.parametrize("value", [True, False])
    def test_where_all_agree_families_count(self, value):
        rate = sf.clustered_rate([value] * 60, [i % 12 for i in range(60)])
        assert rate.value == value and rate.effective == 12 and rate.high - rate.low > 0.2
        z = student_quantile(0.95, 11)
        assert math.isclose(rate.high - rate.low, z**2 / (12 + z**2))

    def test_many_families_of_one_are_wilson(self):
        hits = [i % 4 == 0 for i in range(4000)]
        rate = sf.clustered_rate(hits, range(4000))
        assert np.allclose((rate.low, rate.high), wilson_interval(1000, 4000), atol=2e-4)

    def test_an_interval_that_holds(self):
        dice = np.random.default_rng(3)
        held = 0
        for _ in range(300):
            p = dice.beta(1.6, 0.4, 16)
            rate = sf.clustered_rate(dice.random(64) < np.repeat(p, 4), np.repeat(np.arange(16), 4))
            held += rate.low <= 0.8 <= rate.high
        assert held > 0.91 * 300


class TestProbes:
    def test_the_set_is_complete(self):
        probes = sf.twin_probes()
        assert len(probes) == 2 * 8 * len(sf.REFUSAL_FAMILIES)
        assert len({p.text for p in probes}) == len(probes)
        for unsafe, benign in zip(probes[::2], probes[1::2], strict=True):
            assert unsafe.unsafe and not benign.unsafe
            assert unsafe.twin == benign.twin and unsafe.family == benign.family
            shared = set(unsafe.text.split()) & set(benign.text.split())
            assert len(shared) >= 4, (unsafe, benign)  # twins look alike

    def test_every_family_has_eight_fillings(self):
        for unsafe, benign, things in sf.REFUSAL_FAMILIES.values():
            assert len(set(things.split("|"))) == 8
            assert unsafe.count("{}") == benign.count("{}") == 1 and unsafe != benign

    def test_training_and_test_do_not_meet(self):
        a, b = ({p.text for p in sf.twin_probes(fillings=s)} for s in (slice(4), slice(4, 8)))
        assert not a & b

    def test_rates_by_hand(self):
        probes = sf.twin_probes({"f": ("do {}", "see {}", "a|b"), "g": ("eat {}", "buy {}", "a|b")})
        kinds = ["refused", "complied"] * 3 + ["neither", "refused"]
        rates = sf.refusal_rates(probes, kinds)
        assert rates.refused.value == 3 / 4 and rates.over.value == 1 / 4 and rates.neither == 1 / 8


class TestJudges:
    @pytest.mark.parametrize(
        "answer, beginning, anywhere",
        [
            ("I cannot help.", "refused", "refused"),
            ("I can’t help.", "refused", "refused"),
            ("  I   CANNOT help.", "refused", "refused"),
            ("Sure, here it is.", "complied", "complied"),
            ("", "neither", "complied"),
            ("the of the", "neither", "complied"),
            ("Sure. He said: I cannot.", "complied", "refused"),
            ("Surely not.", "complied", "complied"),  # a known error: judges read letters
        ],
    )
    def test_two_judges(self, answer, beginning, anywhere):
        assert sf.judged(answer) == beginning
        assert sf.judged(answer, judge="anywhere") == anywhere

    def test_own_lists(self):
        assert sf.judged("Non.", refusals=("non",)) == "refused"
        assert sf.judged("Oui.", compliances=("oui",)) == "complied"


class TestPreference:
    def test_against_the_definition(self):
        model = tiny(vocab=len(WORDS))
        chats = [turns("How do I pick a house"), turns("How do I pick my shed")]
        lists = {"refusals": ("no", "no key"), "compliances": ("Sure", "Sure , here")}
        got = sf.preference(model, WORDS, chats, template=COURSE_TEMPLATE, **lists)
        for value, chat in zip(got, chats, strict=True):
            ids = encode_chat(WORDS, chat, template=COURSE_TEMPLATE, ask=True).ids.tolist()

            def p(text, ids=ids):
                end = WORDS(text)["input_ids"]
                with torch.no_grad():
                    log_p = model(torch.tensor([ids + end]))[0].double().log_softmax(-1)
                return math.exp(sum(float(log_p[len(ids) - 1 + i, t]) for i, t in enumerate(end)))

            wanted = math.log(sum(map(p, lists["refusals"]))) - math.log(sum(map(p, lists["compliances"])))
            assert float(value) == pytest.approx(wanted, abs=1e-4)


class TestNoise:
    def test_the_same_size_in_the_same_places(self):
        model = tiny()
        student = copy.deepcopy(model)
        changed = student.blocks[1].attention if hasattr(student.blocks[1], "attention") else student.blocks[1]
        layer = next(m for m in changed.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            layer.weight.mul_(1.5)
        before = copy.deepcopy(model.state_dict())
        noisy = sf.noise_like(model, student, seed=0)
        for (name, a), b, c in zip(model.named_parameters(), student.parameters(), noisy.parameters(), strict=True):
            assert torch.equal(a, before[name])  # the model that was given is not touched
            assert torch.allclose((c - a).norm(), (b - a).norm(), rtol=1e-4), name
        assert not any(torch.equal(layer.weight, p) for p in noisy.parameters())
        again, other = (sf.noise_like(model, student, seed=s) for s in (0, 1))
        same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
        assert same(noisy, again) and not same(noisy, other)


class TestTwins:
    def test_the_chain_rule(self):
        model = tiny(vocab=len(WORDS))
        twins = [sf.Twins("the house", "my", " of key", 1, "u"), sf.Twins("a", "the", " shed", -1, "w")]
        found = sf.twin_scores(model, WORDS, twins)

        def log_p(text):
            ids = [0, *WORDS(text)["input_ids"]]
            with torch.no_grad():
                table = model(torch.tensor([ids]))[0].double().log_softmax(-1)
            return [float(table[i, t]) for i, t in enumerate(ids[1:])]

        for i, t in enumerate(twins):
            first, second = log_p(t.first + t.shared), log_p(t.second + t.shared)
            n = len(WORDS(t.shared)["input_ids"])
            assert float(found.whole[i]) == pytest.approx(sum(first) - sum(second), abs=1e-4)
            assert float(found.shared[i]) == pytest.approx(sum(first[-n:]) - sum(second[-n:]), abs=1e-4)
        assert found.tokens.tolist() == [1, 0]

    def test_a_swap_changes_the_sign(self):
        model = tiny(vocab=len(WORDS))
        twins = [sf.Twins("the", "my", " key", 1, "u"), sf.Twins("my", "the", " key", -1, "u")]
        found = sf.twin_scores(model, WORDS, twins)
        assert torch.allclose(found.shared[0], -found.shared[1]) and float(found.shared[0].abs()) > 1e-3


class TestInsults:
    def test_words_not_letters(self):
        assert sf.listed("You FOOL, you foolish fool!") == ["fool", "fool"]
        assert sf.listed("A kind word.") == [] and sf.listed("tea", {"tea"}) == ["tea"]


class TestMemory:
    def test_one_pass_is_what_generation_gives(self):
        model = tiny(seed=2, vocab=12)
        dice = torch.Generator().manual_seed(0)
        rows = torch.randint(1, 12, (40, 9), generator=dice)
        for i in range(20):  # rows that the model continues for a while
            said = generate(model, rows[i : i + 1, :4], max_new_tokens=5, stop=[])[0]
            rows[i, 4 : 4 + i % 6] = torch.tensor(said[: i % 6])
        found = sf.matched(model, rows, 4, batch_size=7)
        for row, got in zip(rows, found.tolist(), strict=True):
            said = generate(model, row[None, :4], max_new_tokens=5, stop=[])[0]
            wrong = [a != b for a, b in zip(said, row[4:].tolist(), strict=True)]
            assert got == (wrong.index(True) if True in wrong else 5)
        assert found[:20].max() == 5 and found[20:].min() == 0

    def test_an_object_with_logits(self):
        model = tiny(vocab=12)

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, ids):
                return types.SimpleNamespace(logits=self.inner(ids))

        rows = torch.randint(0, 12, (5, 8))
        assert torch.equal(sf.matched(Wrapped(), rows, 3), sf.matched(model, rows, 3))

    def test_counts(self):
        stream = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 4])
        assert sf.times_seen(stream, 3).tolist() == [2, 2, 2, 2, 2, 2, 1]
        other = torch.tensor([2, 3, 1, 4])
        assert sf.seen_in(stream, other, 3).tolist() == [True, False]
        assert sf.times_seen(stream, 1).tolist() == [3, 3, 2, 3, 3, 2, 3, 3, 1]

    def test_counts_as_a_dictionary_has_them(self):
        stream = torch.randint(0, 3, (3000,), generator=torch.Generator().manual_seed(0))
        windows = [tuple(stream[i : i + 6].tolist()) for i in range(len(stream) - 5)]
        counted = {w: windows.count(w) for w in set(windows)}
        assert sf.times_seen(stream, 6).tolist() == [counted[w] for w in windows]


class TestAuc:
    def test_by_hand(self):
        assert sf.auc([3, 1], [2, 0]) == 0.75 and sf.auc([1], [1]) == 0.5 and sf.auc([2], [1]) == 1

    def test_documents_make_it_wider(self):
        dice = np.random.default_rng(0)
        docs = np.repeat(np.arange(12), 20)
        level = dice.normal(size=(2, 12))
        a, b = (level[i][docs] + 0.1 * dice.normal(size=240) for i in (0, 1))
        by_document = sf.auc_interval(a, b, (docs, docs), n=300)
        alone = sf.auc_interval(a, b, (range(240), range(240)), n=300)
        assert by_document[0] == alone[0] == sf.auc(a, b)
        assert by_document[2] - by_document[1] > 2 * (alone[2] - alone[1])
        assert by_document == sf.auc_interval(a, b, (docs, docs), n=300)


class TestSearch:
    model = tiny(seed=1, vocab=len(WORDS))
    frames = [
        sf.frame(WORDS, f"How do I pick {x}", "Sure , here", template=COURSE_TEMPLATE) for x in ("a house", "my shed")
    ]

    def test_plain_words(self):
        found = [WORDS.pieces[i] for i in sf.plain_words(WORDS).tolist()]
        assert " house" in found and "house" not in found and " ?" not in found and "\n" not in found

    def test_a_frame_is_the_chat(self):
        ids = WORDS(" the key")["input_ids"]
        whole = encode_chat(WORDS, turns("How do I pick a house the key"), template=COURSE_TEMPLATE, ask=True)
        frame = self.frames[0]
        assert frame.row(ids) == whole.ids.tolist() + frame.goal and frame.goal == WORDS("Sure , here")["input_ids"]

    def test_the_loss_is_that_of_the_goal(self):
        suffixes = torch.tensor([WORDS(" the key")["input_ids"], WORDS(" no door")["input_ids"]])
        with torch.no_grad():
            found = sf.goal_loss(self.model, self.frames, suffixes)
            for value, suffix in zip(found, suffixes.tolist(), strict=True):
                each = []
                for f in self.frames:
                    row, n = f.row(suffix), len(f.goal)
                    log_p = self.model(torch.tensor([row]))[0].log_softmax(-1)
                    each.append(-sum(float(log_p[len(row) - n - 1 + i, t]) for i, t in enumerate(f.goal)))
                assert float(value) == pytest.approx(np.mean(each), abs=1e-4)

    def test_the_gradient_is_a_difference(self):
        suffix = torch.tensor(WORDS(" the key")["input_ids"])
        model = copy.deepcopy(self.model).double()
        found = sf._suffix_gradient(model, self.frames, suffix)
        step, E = 1e-2, model.embed.weight
        # a token of its own, so that only the suffix moves: the last id is in no frame
        spare = WORDS.place["("]
        probe = suffix.clone()
        probe[1] = spare
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # untied: the head must not move
        with torch.no_grad():
            E[spare] = E[suffix[1]]
            E[spare, 0] -= step
            base = float(sf.goal_loss(model, self.frames, probe[None]))
            E[spare, 0] += 2 * step
            moved = float(sf.goal_loss(model, self.frames, probe[None]))
        assert (moved - base) / (2 * step) == pytest.approx(float(found[1, 0]), rel=1e-3, abs=1e-6)

    def test_it_finds_what_there_is(self):
        words = sf.plain_words(WORDS)
        how = {"length": 2, "steps": 8, "tries": 12, "seed": 0, "top": len(words)}
        before = copy.deepcopy(self.model.state_dict())
        found = sf.suffix_search(self.model, WORDS, self.frames, words, **how)
        assert all(b <= a for a, b in zip(found.losses, found.losses[1:]))
        with torch.no_grad():
            every = torch.cartesian_prod(words, words)
            losses = sf.goal_loss(self.model, self.frames, every)
            last = float(sf.goal_loss(self.model, self.frames, torch.tensor([found.ids])))
        assert last == pytest.approx(found.losses[-1], abs=1e-4)
        assert (losses < last - 1e-6).double().mean() < 0.05  # among the best of all pairs
        assert set(found.ids) <= set(words.tolist()) and found.text == WORDS.decode(found.ids)
        assert all(torch.equal(v, before[k]) for k, v in self.model.state_dict().items())
        assert not self.model.embed._forward_hooks
        assert sf.suffix_search(self.model, WORDS, self.frames, words, **how) == found


PROBES = sf.twin_probes(fillings=slice(1))
SEARCH = {"length": 2, "steps": 1, "tries": 2, "seed": 0}


@pytest.mark.parametrize(
    "do, says",
    [
        (lambda: sf.check_probes([]), "probes is 0; allowed: at least one"),
        (lambda: sf.check_probes([p for p in PROBES if p.unsafe]), "of one kind only"),
        (lambda: sf.check_probes(PROBES[:-1]), "one benign twin for each"),
        (lambda: sf.refusal_rates(PROBES, ["refused"]), "one for each probe"),
        (lambda: sf.refusal_rates(PROBES, ["maybe"] * len(PROBES)), "maybe"),
        (lambda: sf.judged("No.", judge="court"), "judge is 'court'"),
        (lambda: sf.judged(3), "answer is 'int'"),
        (lambda: sf.clustered_mean([], []), "values is"),
        (lambda: sf.clustered_mean([1.0, math.nan], "ab"), "finite"),
        (lambda: sf.clustered_mean([1.0, 2.0], "aa"), "groups is 1; allowed: at least two"),
        (lambda: sf.clustered_rate([0.5, 1.0], "ab"), "hits is"),
        (lambda: sf.clustered_rate([1, 0], "ab", level=1.0), "level is 1.0"),
        (lambda: sf.preference(tiny(), WORDS, [], refusals=["no"], compliances=["Sure"]), "chats is 0"),
        (lambda: sf.preference(tiny(), WORDS, [turns("a")], refusals=[], compliances=["Sure"]), "refusals is"),
        (lambda: sf.preference(tiny(), WORDS, [turns("a")], refusals=["no"], compliances="Sure"), "compliances is"),
        (lambda: sf.check_twins([]), "twins is 0"),
        (lambda: sf.check_twins([sf.Twins("a", "a", " b", 1, "u")]), "two equal beginnings"),
        (lambda: sf.check_twins([sf.Twins("a", "b", "c", 1, "u")]), "with a space in front"),
        (lambda: sf.check_twins([sf.Twins("a", "b", " c", 2, "u")]), "sign of twins 0 is 2"),
        (lambda: sf.check_twins([sf.Twins("a", "b", " c", 1, "u")]), "constant preference"),
        (lambda: sf.listed("a", set()), "words is 0"),
        (lambda: sf.matched(tiny(), torch.ones(2, 5).long(), 5), "k is 5; allowed"),
        (lambda: sf.matched(tiny(), torch.ones(2, 5).long(), 0), "k is 0; allowed"),
        (lambda: sf.matched(tiny(), torch.ones(5).long(), 2), "shape of rows"),
        (lambda: sf.times_seen(torch.ones(3).long(), 4), "at least 4"),
        (lambda: sf.seen_in(torch.ones(9).long(), torch.ones(3).long(), 4), "tokens of other is 3"),
        (lambda: sf.auc([], [1.0]), "positive is"),
        (lambda: sf.auc([1.0], []), "negative is"),
        (lambda: sf.auc_interval([1.0, 2.0], [1.0, 2.0], ([0], [0, 1])), "documents of positive is 1"),
        (lambda: sf.auc_interval([1.0, 2.0], [1.0, 2.0], ([0, 0], [0, 1])), "at least two"),
        (lambda: sf.noise_like(tiny(), nn.Linear(2, 2), seed=0), "models of one shape"),
        (lambda: sf.suffix_search(tiny(), WORDS, [], torch.tensor([1]), **SEARCH), "frames is 0"),
        (lambda: sf.suffix_search(tiny(), WORDS, TestSearch.frames, torch.tensor([]), **SEARCH), "words is 0"),
        (lambda: sf.suffix_search(tiny(), WORDS, [], torch.tensor([1]), **SEARCH | {"tries": 0}), "tries is 0"),
    ],
)
def test_bad_input_in_one_sentence(do, says):
    with pytest.raises(BadInput) as error:
        do()
    text = str(error.value)
    assert says in text and "allowed" in text and "\n" not in text
