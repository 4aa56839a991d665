"""Objectives: against transformers and PyTorch where they have the same thing, and properties over random texts."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from archs import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llmcourse import objectives as O
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput
from llmcourse.training import hidden_states

TOL = {"rtol": 1e-5, "atol": 1e-6}
few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)
V, MASK = 50, 49


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, **more) -> GPT:
    torch.manual_seed(seed)
    shape = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "context": 64, "init_std": 0.2} | more
    return GPT(GPTConfig(**shape))


def texts(rows: int = 4, length: int = 20, *, seed: int = 0, low: int = 1, high: int = 40) -> torch.Tensor:
    return torch.randint(low, high, (rows, length), generator=gen(seed))


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(loss.mean(), list(model.parameters()))


def within(count: int, n: int, p: float, sigmas: float = 5.0) -> bool:
    """Whether `count` of `n` is a plausible draw with probability p: false alarms about once in a million."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p)) + 1


@pytest.fixture(scope="module")
def llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bert():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.BertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def collator():
    """transformers' masking collator over a vocabulary of 50 words, [MASK] = 49, [PAD] = 0."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[MASK]": MASK, "[UNK]": 48} | {f"w{i}": i for i in range(1, 48)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    )
    return lambda **options: transformers.DataCollatorForLanguageModeling(tokenizer, **options)


# ------------------------------------------------------------------------------------------- causal


class TestCausal:
    def test_equals_transformers(self, llama) -> None:
        ids = texts()
        losses = O.causal_lm_loss(llama, ids)
        assert losses.shape == (4 * 19,)
        assert_close(losses.mean(), llama(ids, labels=ids).loss, **TOL)
        for ours, theirs in zip(gradients(losses, llama), gradients(llama(ids, labels=ids).loss, llama)):
            assert_close(ours, theirs, **TOL)

    def test_is_the_four_lines_that_one_would_write(self, llama) -> None:
        from llmcourse.training import causal_lm_loss

        assert O.causal_lm_loss is causal_lm_loss  # what the trainer uses
        ids = texts()
        for model, logits in ((tiny(), lambda m: m(ids[:, :-1])), (llama, lambda m: m(ids[:, :-1]).logits)):
            plain = F.cross_entropy(logits(model).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            assert_close(O.causal_lm_loss(model, ids), plain, **TOL)

    def test_padding_does_not_count(self, llama) -> None:
        """Right and left: the losses are those of the rows without their padding."""
        ids = texts(3, 20)
        alone = torch.cat([O.causal_lm_loss(llama, row[None, :n]) for row, n in zip(ids, (20, 7, 2))])
        keep = torch.arange(20) < torch.tensor([20, 7, 2])[:, None]
        right = {
            "input_ids": ids.masked_fill(~keep, 0),
            "labels": ids.masked_fill(~keep, -100),
            "attention_mask": keep.long(),
        }
        assert_close(O.causal_lm_loss(llama, right), alone, **TOL)
        assert_close(O.causal_lm_loss(llama, right).mean(), llama(**right).loss, **TOL)
        model = tiny().eval()
        alone = torch.cat([O.causal_lm_loss(model, row[None, :n]) for row, n in zip(ids, (20, 7, 2))])
        assert_close(O.causal_lm_loss(model, right), alone, **TOL)
        left = {k: torch.stack([row.roll(20 - n) for row, n in zip(v, (20, 7, 2))]) for k, v in right.items()}
        # the first real token of a padded row is predicted from padding: it does not count
        for row, n in enumerate((20, 7, 2)):
            left["labels"][row, 20 - n] = -100
        assert_close(O.causal_lm_loss(model, left), alone, **TOL)

    def test_the_collator_of_transformers(self, llama, collator) -> None:
        batch = collator(mlm=False)([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}])
        losses = O.causal_lm_loss(llama, batch)
        assert losses.shape == (3 + 1,)
        assert_close(losses.mean(), llama(**batch).loss, **TOL)

    @pytest.mark.parametrize("name", ["ours", "llama", "gemma2", "gpt2", "opt", "phi3", "mixtral", "falcon"])
    def test_hidden_states_of_every_kind_of_model(self, name: str) -> None:
        """Ours and those of transformers are asked in one way, and without running the head."""
        model, text = build(name), texts()
        with torch.no_grad():
            found = hidden_states(model, text)
            if name == "ours":
                wanted = model.hidden(text)
            else:
                wanted = model(text, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(found, wanted)
        with pytest.raises(BadInput, match="model is"):
            hidden_states(torch.nn.Linear(2, 2), text)

    def test_head_only_where_it_counts(self) -> None:
        """The fast way through a GPT is the slow one."""
        model, ids = tiny(), texts()
        labels = ids.masked_fill(torch.rand(ids.shape, generator=gen()) < 0.5, -100)
        fast = O.losses_at(model, ids, labels)
        assert_close(fast, O.token_losses(model(ids), labels), **TOL)
        for a, b in zip(gradients(fast, model), gradients(O.token_losses(model(ids), labels), model)):
            assert_close(a, b, **TOL)

    @few
    @given(seeds)
    def test_a_sequence_is_the_sum_of_its_tokens(self, seed: int) -> None:
        """The chain rule: the losses of a long row are those of its beginnings."""
        model, ids = tiny(seed % 7).eval(), texts(1, 9, seed=seed)
        whole = O.causal_lm_loss(model, ids)
        for t in range(2, 9):
            assert_close(O.causal_lm_loss(model, ids[:, :t]), whole[: t - 1], **TOL)

    def test_refuses_a_model_that_sees_the_answer(self) -> None:
        with pytest.raises(BadInput, match="causal=False"):
            O.causal_lm_loss(tiny(causal=False), texts())
        with pytest.raises(BadInput, match="causal=False"):
            O.span_corruption_loss(tiny(causal=False), texts(), sentinels=range(40, 48))
        with pytest.raises(BadInput, match="at least 2"):
            O.causal_lm_loss(tiny(), texts(2, 1))
        with pytest.raises(BadInput, match="whole numbers"):
            O.causal_lm_loss(tiny(), texts().float())

    def test_gradient_of_the_logits(self) -> None:
        """softmax - one-hot: sums to zero over the vocabulary, is zero where nothing counts."""
        logits = torch.randn(3, 5, V, generator=gen(), dtype=torch.float64).float().requires_grad_()
        labels = texts(3, 5).masked_fill(torch.eye(3, 5, dtype=torch.bool), -100)
        O.token_losses(logits, labels).sum().backward()
        expected = logits.softmax(-1) - F.one_hot(labels.clamp_min(0), V)
        assert_close(logits.grad, expected * (labels != -100)[..., None], **TOL)
        assert logits.grad.sum(-1).abs().max() < 1e-5

    def test_nothing_counts(self) -> None:
        loss = O.token_losses(torch.randn(2, 3, V, requires_grad=True), torch.full((2, 3), -100))
        assert loss.shape == (0,) and loss.sum().requires_grad


# ------------------------------------------------------------------------------------------- padding

LENGTHS = (9, 5, 2, 9)


def padded(ids: torch.Tensor, sides: str, fill: int) -> dict[str, torch.Tensor]:
    """Rows cut to `LENGTHS` and padded to 9 tokens on the side that `sides` says: l, r, or b for both."""
    rows, mask = torch.full_like(ids, fill), torch.zeros_like(ids)
    for row, (n, side) in enumerate(zip(LENGTHS, sides)):
        first = {"l": 9 - n, "r": 0, "b": (9 - n) // 2}[side]
        rows[row, first : first + n], mask[row, first : first + n] = ids[row, :n], 1
    return {"input_ids": rows, "attention_mask": mask}


SIDES = ["llll", "rrrr", "rlrl", "lrrl", "bbbb", "lbrb"]


class TestPadding:
    """Every loss that takes an attention mask gives a padded row the losses of the row alone, or refuses it."""

    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("fill", [0, 7])
    def test_causal(self, sides: str, fill: int) -> None:
        model, ids = tiny().eval(), texts(4, 9)
        alone = torch.cat([O.causal_lm_loss(model, row[None, :n]) for row, n in zip(ids, LENGTHS)])
        batch = padded(ids, sides, fill)
        found = O.causal_lm_loss(model, batch)
        assert len(found) == sum(LENGTHS) - 4
        assert_close(found, alone, **TOL)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert_close(O.causal_lm_loss(model, batch | {"labels": labels}), alone, **TOL)

    @pytest.mark.parametrize("sides", ["rrrr"])
    def test_causal_of_transformers(self, llama, sides: str) -> None:
        ids = texts(4, 9)
        batch = padded(ids, sides, 0)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert_close(O.causal_lm_loss(llama, batch).mean(), llama(**batch, labels=labels).loss, **TOL)

    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("causal", [True, False])
    def test_our_encoder_and_decoder_at_given_labels(self, sides: str, causal: bool) -> None:
        model, ids = tiny(causal=causal).eval(), texts(4, 9)
        chosen = torch.rand(ids.shape, generator=gen()) < 0.5
        labels = ids.masked_fill(~chosen, -100)
        options = {"mask_id": MASK, "vocab_size": V}
        alone = [
            O.masked_lm_loss(model, {"input_ids": x[None, :n], "labels": y[None, :n]}, **options)
            for x, y, n in zip(ids, labels, LENGTHS)
        ]
        batch = padded(ids, sides, 7) | {"labels": padded(labels, sides, -100)["input_ids"]}
        assert_close(O.masked_lm_loss(model, batch, **options), torch.cat(alone), **TOL)

    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("whole_words", [False, True])
    def test_padding_is_never_chosen(self, sides: str, whole_words: bool) -> None:
        """Also when its id is none of the special ones."""
        model, ids = tiny(causal=False).eval(), texts(4, 9)
        starts = torch.ones(V, dtype=torch.bool) if whole_words else None
        options = {"mask_id": MASK, "vocab_size": V, "rate": 1.0, "starts": starts}
        found = O.masked_lm_loss(model, padded(ids, sides, 7), generator=gen(), **options)
        assert len(found) == sum(LENGTHS)
        batch = padded(ids, sides, 7)
        _, labels = O.mask_tokens(
            batch["input_ids"], mask_id=MASK, vocab_size=V, rate=1.0, attention_mask=batch["attention_mask"]
        )
        assert torch.equal(labels != -100, batch["attention_mask"] == 1)

    def test_word_numbers_of_a_padded_row_are_those_of_the_row(self) -> None:
        starts = torch.zeros(V, dtype=torch.bool)
        row = torch.tensor([[30, 31, 32]])  # goes on with a word that began before
        alone = O.word_numbers(row, starts)
        wide = O.word_numbers(F.pad(row, (2, 1), value=7), starts, attention_mask=F.pad(torch.ones(1, 3), (2, 1)))
        assert wide[0, 2:5].tolist() == alone[0].tolist() and wide[0, [0, 1, 5]].tolist() == [-1, -1, -1]

    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("causal", [True, False])
    def test_texts_as_a_whole(self, sides: str, causal: bool) -> None:
        model, ids = tiny(causal=causal).eval(), texts(4, 9)
        alone = torch.cat([O.embed_text(model, row[None, :n]) for row, n in zip(ids, LENGTHS)])
        batch = padded(ids, sides, 7)
        assert_close(O.embed_text(model, batch["input_ids"], batch["attention_mask"]), alone, **TOL)
        expected = O.info_nce(alone, alone)
        assert_close(O.simcse_loss(model, batch), expected, **TOL)
        assert_close(O.pair_loss(model, (batch, padded(ids, "rlrl", 9))), expected, **TOL)

    def test_texts_as_a_whole_of_transformers(self, bert) -> None:
        ids = texts(4, 9)
        alone = torch.cat([O.embed_text(bert, row[None, :n]) for row, n in zip(ids, LENGTHS)])
        assert_close(O.simcse_loss(bert, padded(ids, "rrrr", 0)), O.info_nce(alone, alone), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("given", ["attention_mask", "labels"])
    @pytest.mark.parametrize(
        "loss",
        [
            lambda model, batch: O.span_corruption_loss(model, batch, sentinels=range(40, 48)),
            lambda model, batch: O.pair_loss(model, batch),
            lambda model, batch: (
                O.simcse_loss(model, {k: v for k, v in batch.items() if k != "attention_mask"})
                if "labels" in batch
                else O.simcse_loss(model, batch | {"attention_mask": 0 * batch["attention_mask"]})
            ),
        ],
        ids=["spans", "halves", "SimCSE"],
    )
    def test_what_cannot_be_honored_is_refused(self, loss, given: str) -> None:
        batch = padded(texts(4, 9), "llrr", 0)
        if given == "labels":
            batch = {"input_ids": texts(4, 9), "labels": texts(4, 9)}
        with pytest.raises(BadInput, match=f"{given} is|batch is"):
            loss(tiny(), batch)

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            ({"attention_mask": torch.ones(2, 3)}, "shape of attention_mask"),
            ({"labels": torch.ones(2, 3, dtype=torch.long)}, "shape of labels"),
            ({"token_type_ids": torch.ones(2, 4, dtype=torch.long)}, "token_type_ids"),
        ],
    )
    def test_a_mask_that_means_nothing_is_refused(self, batch: dict, words: str) -> None:
        with pytest.raises(BadInput, match=words):
            O.causal_lm_loss(tiny(), {"input_ids": texts(2, 4), **batch})

    def test_a_mask_without_padding_is_no_mask(self) -> None:
        model, ids = tiny(), texts(4, 9)
        full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(O.causal_lm_loss(model, full), O.causal_lm_loss(model, ids))
        assert O.span_corruption_loss(model, full, sentinels=range(40, 48)).ndim == 1
        assert_close(O.pair_loss(model, full), O.pair_loss(model, ids), **TOL)

    def test_what_a_model_of_transformers_also_takes_reaches_it(self, bert) -> None:
        ids, kinds = texts(2, 8), torch.tensor([[0] * 4 + [1] * 4] * 2)
        batch = {"input_ids": ids, "labels": ids, "token_type_ids": kinds}
        found = O.masked_lm_loss(bert, batch, mask_id=MASK, vocab_size=V)
        assert_close(found.mean(), bert(**batch).loss, **TOL)
        del batch["token_type_ids"]
        assert not torch.allclose(found, O.masked_lm_loss(bert, batch, mask_id=MASK, vocab_size=V))


# ------------------------------------------------------------------------------------------- masked


class TestMaskTokens:
    options = {"mask_id": MASK, "vocab_size": V}

    def test_rates_agree_with_transformers(self, collator) -> None:
        """Chosen 15 %, of these 80 % masked, 10 % random, 10 % kept: both within the binomial interval."""
        ids = texts(400, 250, high=48)
        batch = collator(mlm=True, seed=1).torch_mask_tokens(ids.clone(), special_tokens_mask=torch.zeros_like(ids))
        for inputs, labels in (O.mask_tokens(ids, generator=gen(), **self.options), batch):
            chosen = labels != -100
            n, k = ids.numel(), int(chosen.sum())
            assert within(k, n, 0.15)
            assert torch.equal(labels[chosen], ids[chosen])
            assert torch.equal(inputs[~chosen], ids[~chosen])
            masked = inputs[chosen] == MASK
            kept = inputs[chosen] == ids[chosen]
            # a random token is the mask or the old one with probability 1 / V each
            assert within(int(masked.sum()), k, 0.8 + 0.1 / V)
            assert within(int(kept.sum()), k, 0.1 + 0.1 / V)
            others = inputs[chosen & (inputs != MASK) & (inputs != ids)]
            counts = torch.bincount(others, minlength=V)[:V].double()
            assert counts[:MASK].min() > 0.5 * counts[:MASK].mean()  # random tokens come from the whole vocabulary

    def test_same_masks_same_loss(self, bert, collator) -> None:
        batch = collator(mlm=True, mlm_probability=0.4, seed=3)([row.tolist() for row in texts()])
        assert_close(O.masked_lm_loss(bert, batch, **self.options).mean(), bert(**batch).loss, **TOL)
        torch.manual_seed(5)
        masked = O.mask_tokens(texts(), rate=0.4, **self.options)
        torch.manual_seed(5)
        ours = O.masked_lm_loss(bert, texts(), rate=0.4, **self.options)
        assert_close(ours.mean(), bert(input_ids=masked.inputs, labels=masked.labels).loss, **TOL)
        assert ours.shape == ((masked.labels != -100).sum(),)

    def test_padding_is_not_seen(self) -> None:
        """A padded row of our encoder has the losses of the row alone, and a model of transformers gets the mask."""
        model = tiny(causal=False).eval()
        row = texts(1, 6)
        labels = row.masked_fill(torch.tensor([[1, 0, 1, 1, 0, 1]]).bool(), -100)
        alone = O.masked_lm_loss(model, {"input_ids": row, "labels": labels}, **self.options)
        padded = {
            "input_ids": F.pad(row, (3, 0)),
            "labels": F.pad(labels, (3, 0), value=-100),
            "attention_mask": F.pad(torch.ones_like(row), (3, 0)),
        }
        assert_close(O.masked_lm_loss(model, padded, **self.options), alone, **TOL)

    @few
    @given(seeds, st.floats(0.05, 1), st.lists(st.integers(0, V - 1), max_size=5))
    def test_properties(self, seed: int, rate: float, special: list[int]) -> None:
        ids = texts(3, 11, seed=seed, low=0, high=V)
        before = ids.clone()
        inputs, labels = O.mask_tokens(ids, rate=rate, special_ids=special, generator=gen(seed), **self.options)
        assert torch.equal(ids, before)
        chosen = labels != -100
        assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
        never = torch.isin(ids, torch.tensor([*special, MASK]))
        assert not (chosen & never).any()
        if rate == 1:
            assert torch.equal(chosen, ~never)
        again = O.mask_tokens(ids, rate=rate, special_ids=special, generator=gen(seed), **self.options)
        assert torch.equal(again.inputs, inputs) and torch.equal(again.labels, labels)

    @few
    @given(seeds, st.floats(0.1, 0.9))
    def test_whole_words(self, seed: int, rate: float) -> None:
        ids, words = texts(4, 30, seed=seed), torch.randint(-1, 9, (4, 30), generator=gen(seed)).sort(-1).values
        _, labels = O.mask_tokens(ids, rate=rate, whole_words=words, generator=gen(seed), **self.options)
        for row in range(4):
            for word in range(9):
                mine = (labels[row] != -100)[words[row] == word]
                assert mine.all() or not mine.any()
            assert not (labels[row] != -100)[words[row] == -1].any()

    def test_whole_words_keep_the_rate(self) -> None:
        """Each word is chosen with the rate, so each token is too; tokens of one word go together."""
        ids = texts(2000, 30)
        words = torch.arange(30)[None].expand(2000, -1) // 3
        inputs, labels = O.mask_tokens(ids, whole_words=words, generator=gen(), **self.options)
        assert within(int((labels != -100)[:, ::3].sum()), 2000 * 10, 0.15)
        chosen = labels != -100
        assert within(
            int((inputs[chosen] == MASK).sum()), int(chosen.sum()), 0.8 + 0.1 / V
        )  # the fate is drawn token by token

    def test_word_numbers(self) -> None:
        starts = torch.zeros(V, dtype=torch.bool)
        starts[10:20] = True  # 10 … 19 begin a word, the others go on
        ids = torch.tensor([[10, 30, 11, 12, 30, 30], [30, 30, 0, 31, 10, 0]])
        assert O.word_numbers(ids, starts, special_ids=[0]).tolist() == [[0, 0, 1, 2, 2, 2], [0, 0, -1, 1, 2, -1]]

    def test_no_gap_with_full_replacement(self) -> None:
        ids = texts()
        assert torch.equal(O.mask_tokens(ids, rate=1.0, replace=(0, 0), generator=gen(), **self.options).inputs, ids)
        assert (O.mask_tokens(ids, rate=1.0, replace=(1, 0), generator=gen(), **self.options).inputs == MASK).all()

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("rate", 0),
            ("rate", 1.1),
            ("rate", math.nan),
            ("replace", (0.8, 0.3)),
            ("replace", (-0.1, 0.3)),
            ("mask_id", V),
            ("whole_words", torch.zeros(4, 3, dtype=torch.long)),
        ],
    )
    def test_bad_input(self, option: str, value) -> None:
        with pytest.raises(BadInput, match=option):
            O.mask_tokens(texts(), **self.options | {option: value})


# -------------------------------------------------------------------------------------------- spans


class TestSpans:
    sentinels = tuple(range(100, 160))

    @few
    @given(st.integers(2, 80), st.floats(0.05, 0.9), st.floats(1, 6), seeds)
    def test_noise(self, length: int, density: float, mean_span: float, seed: int) -> None:
        """Exact counts in every row, shown first, hidden last."""
        hidden, spans = O.span_counts(length, density=density, mean_span=mean_span)
        noise = O.noise_spans(5, length, density=density, mean_span=mean_span, generator=gen(seed))
        assert noise.shape == (5, length) and noise.dtype == torch.bool
        assert (noise.sum(1) == hidden).all() and not noise[:, 0].any() and noise[:, -1].all()
        begins = noise & ~F.pad(noise[:, :-1], (1, 0))
        assert (begins.sum(1) == spans).all()

    def test_counts_of_the_paper(self) -> None:
        """512 tokens, 15 %, spans of 3 on average: 77 hidden tokens in 26 spans; T5's own degenerate cases."""
        assert O.span_counts(512) == (77, 26)
        assert O.span_counts(2) == (1, 1) and O.span_counts(10, density=0.99) == (9, 1)
        noise = O.noise_spans(200, 512, generator=gen())
        assert_close(noise.double().mean().item(), 77 / 512)
        begins = noise & ~F.pad(noise[:, :-1], (1, 0))
        assert_close((noise.sum() / begins.sum()).item(), 77 / 26)

    def test_all_divisions_are_equally_likely(self) -> None:
        """5 items in 3 pieces: six ways, each one sixth of the time."""
        n = 12_000
        lengths = O._cut(5, 3, n, None, gen())
        assert (lengths.sum(1) == 5).all() and lengths.min() == 1
        ways, counts = lengths.unique(dim=0, return_counts=True)
        assert len(ways) == 6 and all(within(int(c), n, 1 / 6) for c in counts)

    @few
    @given(st.integers(2, 60), st.floats(0.05, 0.9), st.floats(1, 6), seeds)
    def test_the_original_comes_back(self, length: int, density: float, mean_span: float, seed: int) -> None:
        ids = texts(3, length, seed=seed)
        noise = O.noise_spans(3, length, density=density, mean_span=mean_span, generator=gen(seed))
        before = ids.clone()
        spans = O.corrupt_spans(ids, noise, sentinels=self.sentinels)
        assert torch.equal(ids, before)
        hidden, runs = O.span_counts(length, density=density, mean_span=mean_span)
        assert spans.inputs.shape == (3, length - hidden + runs) and spans.targets.shape == (3, hidden + runs + 1)
        for row in range(3):
            assert O.restore_spans(spans.inputs[row], spans.targets[row], sentinels=self.sentinels) == ids[row].tolist()

    @few
    @given(st.lists(st.booleans(), min_size=1, max_size=30), seeds)
    def test_any_mask(self, noise: list[bool], seed: int) -> None:
        """Also one that begins hidden, that hides everything, or nothing."""
        ids = texts(1, len(noise), seed=seed)
        spans = O.corrupt_spans(ids, torch.tensor([noise]), sentinels=self.sentinels)
        assert O.restore_spans(spans.inputs[0], spans.targets[0], sentinels=self.sentinels) == ids[0].tolist()

    def test_the_example_of_the_paper(self) -> None:
        """“Thank you for inviting me to your party last week.”: figure 2 of the T5 paper."""
        ids = torch.arange(1, 11)[None]  # Thank you for inviting me to your party last week
        noise = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 1, 0]]).bool()
        spans = O.corrupt_spans(ids, noise, sentinels=(100, 101, 102))
        assert spans.inputs.tolist() == [[1, 2, 100, 5, 6, 7, 8, 101, 10]]
        assert spans.targets.tolist() == [[100, 3, 4, 101, 9, 102]]

    def test_loss_counts_targets_only(self) -> None:
        model, ids = tiny().eval(), texts(4, 40)
        losses = O.span_corruption_loss(model, ids, sentinels=range(40, 48), generator=gen(1))
        hidden, runs = O.span_counts(40)
        assert losses.shape == (4 * (hidden + runs + 1),)
        inputs, targets = O.corrupt_spans(ids, O.noise_spans(4, 40, generator=gen(1)), sentinels=range(40, 48))
        logits = model(torch.cat((inputs, targets), 1))[:, inputs.shape[1] - 1 : -1]
        assert_close(losses, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"), **TOL)

    def test_bad_input(self) -> None:
        ids, noise = texts(2, 10), O.noise_spans(2, 10, density=0.3, generator=gen())
        for wrong, word in (
            (lambda: O.corrupt_spans(ids, noise, sentinels=(100,)), "sentinels"),
            (lambda: O.corrupt_spans(ids, noise, sentinels=(100, 100, 101)), "sentinels"),
            (lambda: O.corrupt_spans(ids, noise, sentinels=(int(ids[0, 0]), 100, 101)), "sentinel in it"),
            (lambda: O.corrupt_spans(ids, noise.long(), sentinels=(100, 101)), "noise"),
            (
                lambda: O.corrupt_spans(
                    ids,
                    torch.eye(2, 10).bool() | (torch.arange(10) > 7) & torch.tensor([[True], [False]]),
                    sentinels=(100, 101, 102),
                ),
                "same number",
            ),
            (lambda: O.noise_spans(1, 1), "length"),
            (lambda: O.noise_spans(1, 9, density=1.0), "density"),
            (lambda: O.noise_spans(1, 9, mean_span=0.5), "mean_span"),
            (lambda: O.restore_spans([1, 2], [3], sentinels=(100,)), "targets"),
        ):
            with pytest.raises(BadInput, match=word):
                wrong()


# -------------------------------------------------------------------------------------- contrastive


class TestContrastive:
    @few
    @given(st.integers(1, 9), st.integers(1, 6), st.floats(0.02, 2), seeds)
    def test_is_the_cross_entropy_of_the_similarities(self, n: int, d: int, temperature: float, seed: int) -> None:
        a, b = torch.randn(2, n, d, generator=gen(seed))
        loss = O.info_nce(a, b, temperature=temperature)
        matrix = F.cosine_similarity(a[:, None], b[None], dim=-1) / temperature
        assert_close(loss, F.cross_entropy(matrix, torch.arange(n), reduction="none"), rtol=1e-4, atol=1e-4)
        assert loss.shape == (n,) and (loss >= -1e-6).all()
        scale = torch.rand(n, 1, generator=gen(seed)) + 0.5
        assert_close(
            O.info_nce(a * scale, b * 3, temperature=temperature), loss, rtol=1e-3, atol=1e-3
        )  # only directions count
        order = torch.randperm(n, generator=gen(seed))
        assert_close(O.info_nce(a[order], b[order], temperature=temperature), loss[order], rtol=1e-4, atol=1e-4)

    def test_worked_example(self) -> None:
        """Two texts at right angles: ln(1 + exp(-1/temperature)) each."""
        a = torch.eye(2)
        for temperature in (1.0, 0.5, 0.05):
            assert_close(
                O.info_nce(a, a, temperature=temperature), torch.full((2,), math.log1p(math.exp(-1 / temperature)))
            )
        assert_close(O.nt_xent(a, a, temperature=1.0), torch.full((4,), math.log(1 + 2 * math.exp(-1))))

    @few
    @given(st.integers(1, 6), seeds)
    def test_nt_xent_is_the_definition(self, n: int, seed: int) -> None:
        a, b = torch.randn(2, n, 4, generator=gen(seed), dtype=torch.float64).float()
        z = F.normalize(torch.cat((a, b)), dim=-1)
        expected = []
        for i in range(2 * n):
            partner = (i + n) % (2 * n)
            others = [torch.exp(z[i] @ z[k] / 0.3) for k in range(2 * n) if k != i]
            expected.append(-torch.log(torch.exp(z[i] @ z[partner] / 0.3) / sum(others)))
        assert_close(O.nt_xent(a, b, temperature=0.3), torch.stack(expected), rtol=1e-4, atol=1e-4)

    def test_gradient(self) -> None:
        """(softmax - identity)/temperature with respect to the cosines; at right angles to the vector itself."""
        a, b = torch.randn(2, 5, 3, generator=gen(), dtype=torch.float64).float().requires_grad_().unbind()
        a.retain_grad()
        O.info_nce(a, b, temperature=0.2).sum().backward()
        s = O.cosine_similarity(a, b).detach().requires_grad_()
        F.cross_entropy(s / 0.2, torch.arange(5), reduction="sum").backward()
        assert_close(s.grad, ((s / 0.2).softmax(-1) - torch.eye(5)).detach() / 0.2, rtol=1e-4, atol=1e-5)
        assert (a.grad * a).sum(-1).abs().max() < 1e-4
        assert a.grad.abs().max() > 1e-3

    def test_a_step_pulls_partners_and_pushes_the_others(self) -> None:
        a = torch.randn(6, 4, generator=gen(1)).requires_grad_()
        b = torch.randn(6, 4, generator=gen(2))
        O.info_nce(a, b, temperature=0.5).sum().backward()
        before, after = O.cosine_similarity(a, b).detach(), O.cosine_similarity(a - 0.05 * a.grad, b).detach()
        off = ~torch.eye(6, dtype=torch.bool)
        assert (after - before).diagonal().mean() > 0 > (after - before)[off].mean()

    def test_simcse_needs_dropout(self) -> None:
        """Two passes differ in training; without dropout each text is its own perfect twin."""
        ids = texts(6, 12)
        noisy, still = tiny(dropout=0.2, causal=False), tiny(causal=False)
        a, b = O.embed_text(noisy, torch.cat((ids, ids))).chunk(2)
        assert (a - b).abs().max() > 1e-3
        a, b = O.embed_text(still, torch.cat((ids, ids))).chunk(2)
        assert_close(a, b, **TOL)
        assert_close(O.cosine_similarity(a, b).diagonal(), torch.ones(6), **TOL)
        torch.manual_seed(0)
        first = O.simcse_loss(noisy, ids)
        torch.manual_seed(1)
        assert first.shape == (6,) and not torch.equal(first, O.simcse_loss(noisy, ids))
        assert_close(O.simcse_loss(noisy.eval(), ids), O.simcse_loss(noisy, ids))  # dropout is off

    def test_pairs(self) -> None:
        model, ids = tiny(causal=False).eval(), texts(5, 13)
        a, b = O.embed_text(model, ids[:, :6]), O.embed_text(model, ids[:, 6:12])
        expected = O.info_nce(a, b, temperature=0.05)
        assert_close(O.pair_loss(model, ids), expected, rtol=1e-4, atol=1e-4)
        assert_close(O.pair_loss(model, (ids[:, :6], ids[:, 6:12])), expected, rtol=1e-4, atol=1e-4)
        assert O.pair_loss(model, (ids[:, :6], ids[:, 6:9])).shape == (5,)

    def test_embedding_of_a_padded_text(self, bert) -> None:
        row = texts(1, 6)
        padded, mask = F.pad(row, (0, 4)), F.pad(torch.ones_like(row), (0, 4))
        assert_close(O.embed_text(bert, padded, mask), O.embed_text(bert, row), **TOL)
        assert_close(O.mean_pool(torch.ones(2, 3, 4), torch.zeros(2, 3)), torch.zeros(2, 4))

    @pytest.mark.parametrize("loss", [O.info_nce, O.nt_xent])
    def test_bad_input(self, loss) -> None:
        a = torch.randn(3, 4)
        for wrong in (
            lambda: loss(a, a, temperature=0),
            lambda: loss(a, a, temperature=math.nan),
            lambda: loss(a, a[:2]),
            lambda: loss(a[0], a[0]),
            lambda: loss(a[:0], a[:0]),
        ):
            with pytest.raises(BadInput):
                wrong()
        with pytest.raises(BadInput, match="model"):
            O.simcse_loss(lambda ids: ids, texts())


# ------------------------------------------------------------------------------------------- mixing


class TestMixing:
    losses = {
        "causal": O.causal_lm_loss,
        "spans": functools.partial(O.span_corruption_loss, sentinels=range(40, 48), generator=None),
    }

    def test_weighted_sum_of_means(self) -> None:
        """Whatever the number of targets; the gradient too."""
        model, ids = tiny().eval(), texts(4, 30)
        few_targets = lambda m, batch: O.causal_lm_loss(m, batch[:1, :3])
        mixed = O.mixed_loss({"all": O.causal_lm_loss, "few": few_targets}, {"all": 3, "few": 1})(model, ids)
        assert mixed.shape == (4 * 29 + 2,)
        expected = 0.75 * O.causal_lm_loss(model, ids).mean() + 0.25 * few_targets(model, ids).mean()
        assert_close(mixed.mean(), expected, **TOL)
        for a, b in zip(gradients(mixed, model), gradients(expected, model)):
            assert_close(a, b, **TOL)

    def test_drawing_is_right_on_average(self) -> None:
        one, two = (lambda m, b: torch.ones(3)), (lambda m, b: torch.full((5,), 2.0))
        loss_fn = O.mixed_loss({"one": one, "two": two}, {"one": 1, "two": 3}, draw=True)
        torch.manual_seed(0)
        drawn = [loss_fn(None, None) for _ in range(2000)]
        assert {len(x) for x in drawn} == {3, 5}
        assert within(sum(len(x) == 5 for x in drawn), 2000, 0.75)

    def test_own_batches_and_zero_weight(self) -> None:
        seen = []
        note = lambda name: lambda m, b: (seen.append((name, b)), torch.zeros(1))[1]
        loss_fn = O.mixed_loss({"a": note("a"), "b": note("b"), "never": note("never")}, {"a": 1, "b": 1, "never": 0})
        loss_fn(None, {"a": 1, "b": 2})
        loss_fn(None, "shared")
        assert seen == [("a", 1), ("b", 2), ("a", "shared"), ("b", "shared")]

    def test_rates(self) -> None:
        rates = O.mixing_rates({"a": 900, "b": 100})
        assert rates == pytest.approx({"a": 0.9, "b": 0.1})
        assert O.mixing_rates({"a": 900, "b": 100}, temperature=2) == pytest.approx({"a": 0.75, "b": 0.25})
        assert O.mixing_rates({"a": 900, "b": 100}, limit=100) == pytest.approx({"a": 0.5, "b": 0.5})
        assert O.mixing_rates({"a": 10**300, "b": 1}, temperature=1e3)["b"] == pytest.approx(
            0.333, abs=0.01
        )  # no overflow

    @few
    @given(st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), min_size=1, max_size=6), st.floats(0.5, 50))
    def test_rates_are_shares(self, sizes: dict[str, int], temperature: float) -> None:
        rates, flatter = (
            O.mixing_rates(sizes, temperature=temperature),
            O.mixing_rates(sizes, temperature=2 * temperature),
        )
        assert sum(rates.values()) == pytest.approx(1) and min(rates.values()) >= 0
        assert max(flatter.values()) <= max(rates.values()) + 1e-12

    def test_bad_input(self) -> None:
        for wrong in (
            lambda: O.mixed_loss({}, {}),
            lambda: O.mixed_loss(self.losses, {"causal": 1}),
            lambda: O.mixed_loss(self.losses, {"causal": 1, "spans": -1}),
            lambda: O.mixed_loss(self.losses, {"causal": 0, "spans": 0}),
            lambda: O.mixing_rates({}),
            lambda: O.mixing_rates({"a": 0}),
            lambda: O.mixing_rates({"a": 1}, temperature=0),
        ):
            with pytest.raises(BadInput):
                wrong()


# --------------------------------------------------------------------------------------- measures


class TestMeasures:
    def test_ranks(self) -> None:
        a = torch.eye(4)
        assert O.retrieval_ranks(a, a).tolist() == [1, 1, 1, 1]
        assert O.retrieval_ranks(a, a.roll(1, 0)).tolist() == [
            3,
            3,
            3,
            3,
        ]  # one is better, three tie at zero: 1 + 1 + 2/2
        assert (
            O.retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3)).tolist() == [3.0] * 5
        )  # a collapsed model is not perfect

    def test_ranks_of_noise_are_chance(self) -> None:
        a, b = torch.randn(2, 400, 8, generator=gen())
        ranks = O.retrieval_ranks(a, b)
        assert abs(ranks.mean().item() - 200.5) < 5 * 400 / math.sqrt(12 * 400)

    def test_probe_learns_what_is_linear(self) -> None:
        x = torch.randn(400, 5, generator=gen())
        y = (x[:, :3] * torch.tensor([1.0, 2.0, 3.0])).argmax(-1)
        predicted = O.linear_probe(x[:300] * 7 + 3, y[:300], x[300:] * 7 + 3)  # shift and scale do not matter
        assert (predicted == y[300:]).float().mean() > 0.9
        assert torch.equal(predicted, O.linear_probe(x[:300], y[:300], x[300:]))

    def test_probe_is_at_the_minimum(self) -> None:
        """The gradient of the objective vanishes there: against plain Newton steps for two classes."""
        g = gen(3)
        x = torch.randn(200, 3, generator=g, dtype=torch.float64)
        x = (x - x.mean(0)) / x.std(0)
        y = (x[:, 0] + torch.randn(200, generator=g, dtype=torch.float64) > 0).long()
        l2, X = 1e-2, torch.cat((x, torch.ones(200, 1, dtype=torch.float64)), 1)
        w = torch.zeros(
            4, dtype=torch.float64
        )  # difference of the two classes' coefficients; their norms add up to |w|²/2
        penalty = torch.diag(torch.tensor([l2 / 2] * 3 + [0.0], dtype=torch.float64))
        for _ in range(30):
            p = torch.sigmoid(X @ w)
            w = w - torch.linalg.solve(
                (X * (p * (1 - p))[:, None]).T @ X / 200 + penalty, X.T @ (p - y) / 200 + penalty @ w
            )
        probes = torch.randn(500, 3, generator=g, dtype=torch.float64)
        expected = (probes @ w[:3] + w[3] > 0).long()
        agree = (O.linear_probe(x, y, probes, l2=l2) == expected).double().mean()
        assert agree >= 0.996

    def test_probe_of_shuffled_labels_is_chance(self) -> None:
        x, y = torch.randn(600, 10, generator=gen()), torch.arange(600) % 3
        predicted = O.linear_probe(x[:500], y[:500], x[500:])
        assert within(int((predicted == y[500:]).sum()), 100, 1 / 3)


@pytest.mark.slow
def test_each_objective_can_be_learned() -> None:
    """A text with a simple rule (each token is the one before plus one): every loss falls well below its start."""
    base = torch.arange(16)
    batch = lambda g: (base[None] + torch.randint(0, 20, (16, 1), generator=g)) % 30 + 1
    causal, masked = {"causal": True}, {"causal": False}
    for name, shape, loss_fn, share in (
        ("causal", causal, O.causal_lm_loss, 0.5),
        ("masked", masked, functools.partial(O.masked_lm_loss, mask_id=MASK, vocab_size=V), 0.7),
        ("spans", causal, functools.partial(O.span_corruption_loss, sentinels=range(40, 44)), 0.5),
        ("pairs", masked, functools.partial(O.pair_loss, temperature=0.2), 0.9),
    ):
        torch.manual_seed(0)
        model, g = tiny(d_model=32, norm="layer", init_std=0.05, **shape), gen()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(150):
            loss = loss_fn(model, batch(g)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < share * sum(losses[:5]) * 2, (name, losses[0], losses[-1])
