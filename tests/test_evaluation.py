"""Evaluation: token NLL against the definition, exact-once windows, bootstrap, pairing, bad input."""

import copy
import dataclasses
import math
import pickle
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse import evaluation as ev
from llmcourse.data import TokenData, windows
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.verdicts import held_level

V = 11


class Recurrent(nn.Module):
    """A tiny causal model whose logits depend on every earlier token of the window and on its position."""

    def __init__(self, dropout=0.0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(V, 8, generator=g))
        self.head = nn.Parameter(torch.randn(8, V, generator=g))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        x = self.embed[ids]
        decay = 0.8 ** (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).clamp(min=0)
        return self.dropout(torch.tanh(torch.tril(decay).to(x.dtype) @ x)) @ self.head


def brute_force(model, tokens, context, stride):
    """One forward per token, float64; the window of a token is the first one that ends after it."""
    n, out = len(tokens), []
    with torch.no_grad():
        for t in range(1, n):
            stop = context
            while stop <= t:
                stop = min(stop + stride, n)
            logits = model(tokens[None, stop - context : t])
            last = (logits if torch.is_tensor(logits) else logits.logits)[0, -1].double()
            out.append(torch.logsumexp(last, -1) - last[tokens[t]])
    return torch.stack(out)


def text(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


shapes = st.integers(2, 9).flatmap(lambda c: st.tuples(st.integers(c, 40), st.just(c), st.integers(1, c - 1)))


def test_by_hand():
    """Two symbols: p(b|a) = 1/2, p(a|b) = 1/4, so the perplexity of 'a b a' is sqrt(8)."""
    table = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    text = ev.Text(tokens=torch.tensor([0, 1, 0]), token_bytes=torch.tensor([9, 1, 1]))
    p = ev.perplexity(lambda ids: table[ids], text, context=3, stride=2)
    assert p.value == pytest.approx(math.sqrt(8), rel=1e-6)
    assert p.bits_per_byte == pytest.approx(1.5, rel=1e-6)  # (1 + 2) bits for two bytes; the first token's do not count


@given(shapes)
def test_windows_score_every_target_once(shape):
    n, context, stride = shape
    found = windows(n, context, stride)
    assert sorted(t for w in found for t in range(w.first, w.stop)) == list(range(1, n))
    assert all(0 <= w.start < w.first < w.stop <= n and w.stop - w.start == context for w in found)


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(1, 4))
def test_agrees_with_one_forward_per_token(shape, batch_size):
    n, context, stride = shape
    model, tokens = Recurrent(), text(n)
    got = ev.token_nll(model, tokens, context=context, stride=stride, batch_size=batch_size)
    assert got.shape == (n - 1,) and got.dtype == torch.float64
    torch.testing.assert_close(got, brute_force(model, tokens, context, stride), rtol=1e-5, atol=1e-5)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_agrees_with_the_loss_of_transformers():
    model, tokens = llama(), text(30)
    theirs = model(tokens[None], labels=tokens[None]).loss.item()
    assert ev.token_nll(model, tokens, context=30, stride=29).mean().item() == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(
        ev.token_nll(model, tokens, context=9, stride=4, batch_size=3),
        brute_force(model, tokens, 9, 4),
        rtol=1e-5,
        atol=1e-5,
    )


def test_softmax_of_a_bf16_model_is_float32():
    model, tokens = Recurrent().bfloat16(), text(40)
    got = ev.token_nll(model, tokens, context=40, stride=1)
    with torch.no_grad():
        logits = model(tokens[None])[0, :-1]
    assert logits.dtype == torch.bfloat16
    exact = -logits.double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    rough = -logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0].double()
    assert (got - exact).abs().max() < 1e-5 < (rough - exact).abs().max()


def test_long_rows_are_split(monkeypatch):
    """A vocabulary so large that one row is a chunk of its own."""
    big = 2**24 // 3
    model = lambda ids: torch.zeros(1, 1, big).expand(*ids.shape, big)
    got = ev.token_nll(model, torch.tensor([0, 5, big - 1, 7, 2]), context=5, stride=1)
    assert torch.allclose(got, torch.full((4,), math.log(big), dtype=torch.float64))


def test_logits_of_earlier_windows_are_dropped():
    kept = []

    def model(ids):
        assert all(r() is None for r in kept), "logits of an earlier batch are still in memory"
        logits = torch.zeros(*ids.shape, V)
        kept.append(weakref.ref(logits))
        return logits

    # without the look at later tokens, which compares the logits of two short texts
    ev.token_nll(model, text(50), context=10, stride=5, batch_size=2, bidirectional=True)
    assert len(kept) > 3


def test_dropout_is_off_and_every_mode_is_restored():
    model, tokens = Recurrent(dropout=0.5).train(), text(20)
    model.dropout.eval()
    want = ev.token_nll(Recurrent(), tokens, context=10, stride=5)
    assert torch.equal(ev.token_nll(model, tokens, context=10, stride=5), want)
    assert model.training and not model.dropout.training
    model.dropout.train()
    with pytest.raises(BadInput):  # also when something goes wrong on the way
        model.embed.data[3] = math.nan
        ev.token_nll(model, tokens, context=10, stride=5)
    assert model.training and model.dropout.training


def test_parametrized_weights_are_computed_once():
    class Count(nn.Module):
        calls = 0

        def forward(self, w):
            Count.calls += 1
            return w * 2

    model = Recurrent()
    nn.utils.parametrize.register_parametrization(model, "head", Count())
    Count.calls = 0
    ev.token_nll(model, text(40), context=10, stride=2)
    assert Count.calls == 1


def test_inputs_are_not_changed():
    model, tokens = Recurrent(), text(30)
    before, weights = tokens.clone(), copy.deepcopy(model.state_dict())
    ev.perplexity(model, ev.Text(tokens=tokens, token_bytes=torch.ones_like(tokens), separator=3), context=10, stride=3)
    assert torch.equal(tokens, before) and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_small_integer_types_and_runtime():
    rt = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
    model, tokens = Recurrent(), text(30)
    want = ev.token_nll(model, tokens, context=10, stride=5)
    assert torch.equal(ev.token_nll(model, tokens.to(torch.int32), context=10, stride=5), want)
    p = ev.perplexity(model, tokens, context=10, stride=5, rt=rt)
    assert "float32 under autocast to bfloat16" in str(p.protocol) and (p.nll - want).abs().max() < 0.2


# --------------------------------------------------------------------------------------------- bootstrap


@settings(deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 99))
def test_bootstrap_is_the_written_out_one(shape, seed):
    n, block = shape
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=n), rng.integers(1, 9, n)
    starts, _ = ev._block_starts(n, block, 20, seed)
    index = (starts[:, :, None] + np.arange(block)).reshape(20, -1)[:, :n] % n
    got = ev.block_bootstrap(values, weights, block=block, n_boot=20, seed=seed).numpy()
    np.testing.assert_allclose(got, values[index].sum(1) / weights[index].sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        ev.block_bootstrap(values, block=block, n_boot=20, seed=seed).numpy(),
        values[index].mean(1),
        rtol=1e-9,
        atol=1e-12,
    )


def test_one_block_of_everything_has_no_spread():
    x = torch.rand(50, dtype=torch.float64)
    assert ev.block_bootstrap(x, block=50, n_boot=20).std() < 1e-12


def test_blocks_see_correlation_and_single_tokens_do_not():
    """Eight equal values in a row: the true standard error is sqrt(8) times that of independent values."""
    x = np.random.default_rng(0).normal(size=512).repeat(8)
    single, blocks = (ev.block_bootstrap(x, block=b, n_boot=2000).std().item() for b in (1, 64))
    assert 2.3 < blocks / single < 3.2
    y = np.random.default_rng(0).permutation(x)
    assert 0.85 < ev.block_bootstrap(y, block=64, n_boot=2000).std().item() / single < 1.15


def test_autocorrelation():
    assert ev.autocorrelation([1.0, -1.0, 1.0, -1.0], [0, 1, 2]) == [1.0, -0.75, 0.5]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 99))
def test_document_bootstrap_is_the_written_out_one(lengths, seed):
    rng = np.random.default_rng(seed)
    n, k = sum(lengths), len(lengths)
    values, weights = rng.normal(size=n), rng.integers(1, 9, n)
    edges = np.cumsum(lengths)[:-1]
    want = []
    for counts in np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=20):
        pick = lambda x, counts=counts: np.concatenate([np.tile(d, c) for d, c in zip(np.split(x, edges), counts)])
        want.append(pick(values).sum() / pick(weights).sum())
    got = ev.document_bootstrap(values, lengths, weights, n_boot=20, seed=seed).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_documents_of_one_token_are_the_ordinary_bootstrap():
    x = np.random.default_rng(0).normal(size=400)
    one, other = ev.document_bootstrap(x, [1] * 400, n_boot=4000), ev.block_bootstrap(x, block=1, n_boot=4000)
    assert abs(float(one.std() / other.std()) - 1) < 0.08


def test_documents_see_what_is_shared_by_a_whole_document_and_blocks_that_cut_it_see_less():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 200)
    x = np.repeat(rng.normal(size=200), lengths) + rng.normal(size=lengths.sum())
    exact = math.sqrt((lengths**2).sum() + lengths.sum()) / lengths.sum()  # of the mean, the lengths given
    documents, blocks = (
        ev.document_bootstrap(x, lengths, n_boot=2000).std().item(),
        ev.block_bootstrap(x, block=8, n_boot=2000).std().item(),
    )
    assert abs(documents / exact - 1) < 0.15 and blocks < 0.75 * exact


# ------------------------------------------------------------------------------- the text and its documents

SEP = 0


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        ([0, 5, 6, 0, 7], (2, 2)),
        ([5, 6, 0, 7], (1, 2)),  # the text begins in the middle of a document
        ([0, 0, 7], (2,)),  # the first document is one separator, which is not scored
        ([0, 7, 0], (1, 1)),
        ([5, 6, 7], (2,)),
    ],
)
def test_scored_tokens_of_each_document(tokens, want):
    text = ev.Text(tokens=torch.tensor(tokens), separator=SEP)
    assert text.documents() == want and sum(want) == len(tokens) - 1
    assert dataclasses.replace(text, separator=None).documents() is None


def test_documents_are_drawn_where_enough_are_known():
    tokens = torch.cat([torch.tensor([SEP, *range(1, 4 + i % 5)]) for i in range(30)])
    known = measure(Recurrent(), tokens=tokens, separator=SEP)
    assert known.protocol.block is None and known.protocol.n_units == 30 == len(known.documents)
    assert "bootstrap of 30 documents," in str(known.protocol)
    few = measure(Recurrent(), tokens=tokens[:90], separator=SEP)
    assert len(few.documents) < ev.Bootstrap.FEW and few.protocol.block == 89 // 8
    by_hand = ev.document_bootstrap(known.nll, known.documents, n_boot=200).exp()
    ends = torch.quantile(by_hand, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [known.low, known.high] == pytest.approx(ends)
    assert measure(Recurrent(), tokens=tokens, separator=SEP, bootstrap={"block": 5}).protocol.block == 5
    other = copy.deepcopy(Recurrent())
    other.head.data += 0.1
    ratio = ev.compare_perplexity(known, measure(other, tokens=tokens, separator=SEP))
    assert ratio.low < ratio.value < ratio.high


def test_a_token_data_is_its_test_part():
    stream = torch.cat([torch.tensor([SEP, *range(1, 9)]) for _ in range(25)])
    sizes = torch.ones_like(stream)
    data = TokenData(
        train=stream[:0], val=stream[:0], test=stream, calib=stream[:0], bytes={"test": sizes}, name="counting",
        tokenizer="digits", separator=SEP,
    )  # fmt: skip
    go = {"context": 20, "stride": 10}
    p = ev.perplexity(Recurrent(), data, **go)
    assert p == ev.perplexity(Recurrent(), ev.Text.of(data), **go) and p.protocol.block is None
    assert p.value == ev.perplexity(Recurrent(), stream, **go).value
    for words in ("counting, part test", "digits", "token 0) before each", "25 documents"):
        assert words in str(p.protocol), words
    assert ev.perplexity(Recurrent(), ev.Text.of(data, limit=50), **go).protocol.n_tokens == 50
    without = dataclasses.replace(data, bytes={})
    assert ev.perplexity(Recurrent(), without, **go).bits_per_byte is None


# --------------------------------------------------------------------------------- models that see the answer


def shifted(ids):  # reads off the next token
    return 9.0 * torch.nn.functional.one_hot(ids.roll(-1, 1), V).float()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=V, **shape)).eval()


def gpt(**options):
    from llmcourse.model import GPT, GPTConfig

    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, context=64, **options)).eval()


SEES = {
    "the next token itself": lambda: shifted,
    "an encoder": bert,
    "our model without its mask": lambda: gpt(causal=False),
    "in half precision": lambda: gpt(causal=False, init_std=0.3).bfloat16(),
}
DOES_NOT = {
    "a table": lambda: lambda ids: torch.eye(V)[ids],
    "our model": gpt,
    "our model in half precision": lambda: gpt(init_std=0.3).bfloat16(),
    "experts with a capacity": lambda: gpt(n_experts=4, capacity_factor=0.5, init_std=0.3),
    "a Llama": lambda: llama(),
    "counting": lambda: ev.KneserNey(text(200), V, order=3),
    "dropout, which is off": lambda: Recurrent(dropout=0.5).train(),
    "the same for every text": lambda: lambda ids: torch.zeros(*ids.shape, V),
}


@pytest.mark.parametrize("make", SEES.values(), ids=SEES)
def test_a_model_that_sees_the_answer_is_refused(make):
    model, go = make(), {"context": 20, "stride": 10}
    for measure in (ev.token_nll, ev.perplexity):
        with pytest.raises(BadInput, match="sees later tokens"):
            measure(model, text(50), **go)
    p = ev.perplexity(model, text(50), **go, bidirectional=True)
    assert "SEES THE ANSWER" in str(p.protocol)


@pytest.mark.parametrize("make", DOES_NOT.values(), ids=DOES_NOT)
def test_a_causal_model_is_not_accused(make):
    for context, stride in ((20, 10), (2, 1), (3, 1)):
        p = ev.perplexity(make(), text(50), context=context, stride=stride)
        assert "SEES" not in str(p.protocol)


# -------------------------------------------------------------------------------------------- perplexity


def measure(lm, /, n=300, *, bootstrap=None, **text_or_options):
    """Perplexity on `n` random tokens; `Text`'s fields and `perplexity`'s options by name."""
    about = {f.name for f in dataclasses.fields(ev.Text)}
    of_text = {k: v for k, v in text_or_options.items() if k in about}
    options = {k: v for k, v in text_or_options.items() if k not in about}
    bootstrap = ev.Bootstrap(**{"n_boot": 200, **(bootstrap or {})})
    options = {"context": 20, "stride": 10, "bootstrap": bootstrap, **options}
    return ev.perplexity(lm, ev.Text(**{"tokens": text(n), **of_text}), **options)


def test_perplexity_and_its_card():
    sizes = torch.arange(300) % 3
    p = measure(
        Recurrent(), token_bytes=sizes, model="toy", data="dice", split="test", tokenizer="digits", joining="as thrown"
    )
    assert p.value == pytest.approx(p.nll.mean().exp().item()) and p.low < p.value < p.high
    assert p.bits_per_byte == pytest.approx(p.nll.sum().item() / math.log(2) / sizes[1:].sum().item())
    assert p.bits_per_byte_low < p.bits_per_byte < p.bits_per_byte_high
    card = str(p.protocol)
    for words in (
        "toy",
        "dice",
        "test",
        "digits",
        "context 20",
        "stride 10",
        "300 tokens",
        "299 scored",
        "float32",
        "9 blocks of 37 tokens,",
        "as thrown",
        "made for 95 %",
        "200 replicates",
    ):
        assert words in card, words
    assert 0.85 < p.held < 0.94 and f"({100 * p.held:.3g} % interval {p.low:.2f} to {p.high:.2f})" in str(p)
    assert str(dataclasses.replace(p, nll=torch.ones(299))).endswith("(no interval: few or skewed units)")
    half = measure(Recurrent(), bootstrap={"level": 0.5})
    assert half.high - half.low < p.high - p.low
    assert measure(Recurrent()).bits_per_byte is None


def test_uniform_model_has_the_vocabulary_as_its_perplexity():
    p = measure(lambda ids: torch.zeros(*ids.shape, V))
    assert p.value == pytest.approx(V, rel=1e-6) and p.low == pytest.approx(V, rel=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 7))
def test_batch_size_does_not_change_the_result(batch_size):
    one, many = measure(Recurrent()), measure(Recurrent(), batch_size=batch_size)
    assert (one.nll - many.nll).abs().max() < 1e-5 and one.protocol == many.protocol


def test_a_model_against_itself_is_exactly_one():
    a = measure(Recurrent())
    same = ev.compare_perplexity(a, measure(Recurrent()))
    assert same == (1.0, 1.0, 1.0) and same.level is None and str(same) == "1.0000× (in every replicate)"


def test_a_ratio_says_its_level_or_that_it_has_none():
    a, seeded = measure(Recurrent(), bootstrap={"block": 13}), torch.Generator().manual_seed(0)
    change = 0.1 * torch.randn(len(a.nll), generator=seeded, dtype=torch.float64)
    ratio = ev.compare_perplexity(a, dataclasses.replace(a, nll=a.nll + change))
    moved = [float(x.sum() - change.mean() * len(x)) for x in change.split(13)]  # how far each block moves the sum
    assert ratio.level == pytest.approx(held_level(moved, neighbors=True)) and 0.85 < ratio.level < 0.95
    assert str(ratio) == f"{ratio.value:.4f}× ({ratio.low:.4f} to {ratio.high:.4f}, {100 * ratio.level:.3g} %)"
    value, low, high = ratio
    assert (value, low, high) == (ratio.value, ratio.low, ratio.high) and len(ratio) == 3
    again = pickle.loads(pickle.dumps(ratio)), copy.deepcopy(ratio)
    assert all(r == ratio and r.level == ratio.level and type(r) is ev.Ratio for r in again)
    change[:] = 0
    change[40] = 1.0  # a single block carries the whole difference
    alone = ev.compare_perplexity(a, dataclasses.replace(a, nll=a.nll + change))
    assert alone.level is None and alone.low < alone.high
    assert str(alone) == f"{alone.value:.4f}× (no interval: few or skewed units)"
    half = measure(Recurrent(), bootstrap={"block": 13, "level": 0.5})
    narrow = ev.compare_perplexity(half, dataclasses.replace(half, nll=half.nll + 0.1 * a.nll))
    assert 0.35 < narrow.level < 0.5


def test_pairing_separates_what_separate_intervals_do_not():
    model = Recurrent()
    base, worse = measure(model, n=2000), None
    for size, seed in ((1e-6, 1), (0.1, 2)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.head += size * torch.randn(other.head.shape, generator=torch.Generator().manual_seed(seed))
        worse = measure(other, n=2000)
        ratio = ev.compare_perplexity(base, worse)
        assert ratio.value == pytest.approx(worse.value / base.value) and ratio.low <= ratio.value <= ratio.high
        if size == 1e-6:  # strictly another model, so the interval need not contain 1, but all of it is next to 1
            assert 1 - 1e-5 < ratio.low <= ratio.high < 1 + 1e-5
    assert ratio.high - ratio.low < (worse.high - worse.low) / worse.value
    back = ev.compare_perplexity(worse, base)
    assert back.value == pytest.approx(1 / ratio.value) and back.low == pytest.approx(1 / ratio.high)


def test_paired_interval_contains_one_when_the_true_ratio_is_one():
    """Null control: differences of mean 0, correlated over runs of 8 tokens; 95 % of the intervals should contain 1."""
    a, hits, levels = measure(Recurrent(), n=1601, bootstrap={"block": 64}), 0, []
    for seed in range(100):
        noise = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).repeat_interleave(
            8
        )
        ratio = ev.compare_perplexity(a, dataclasses.replace(a, nll=a.nll + noise))
        hits += ratio.low <= 1 <= ratio.high
        levels.append(ratio.level)
    assert 85 <= hits <= 99 and 0.88 < np.mean(levels) < 0.95  # 25 blocks: less than the 95 % it was made for


# ---------------------------------------------------------------------------------------------- bad input

m, t = Recurrent(), text(30)
go = {"context": 10, "stride": 5}


def sized(token_bytes):
    return ev.Text(tokens=t, token_bytes=token_bytes)


def nan_at(position):
    def model(ids):
        logits = torch.zeros(*ids.shape, V)
        logits[:, position] = math.nan
        return logits

    return model


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: ev.token_nll(m, t[:0], **go), "empty"),
        (lambda: ev.token_nll(m, t[:9], **go), "n_tokens is 9"),
        (lambda: ev.token_nll(m, t, context=10, stride=10), "stride is 10"),
        (lambda: ev.token_nll(m, t, context=10, stride=11), "stride is 11"),
        (lambda: ev.token_nll(m, t, context=10, stride=0), "stride is 0"),
        (lambda: ev.token_nll(m, t, context=10, stride=-1), "stride is -1"),
        (lambda: ev.token_nll(m, t, context=10, stride=2.5), "stride is 2.5"),
        (lambda: ev.token_nll(m, t, context=1, stride=1), "context is 1"),
        (lambda: ev.token_nll(llama(), text(60), context=33, stride=5), "context is 33"),
        (lambda: ev.token_nll(llama(), t + 1, **go), "largest token is 11"),
        (lambda: ev.token_nll(m, t - 5, **go), "smallest token is -5"),
        (lambda: ev.token_nll(m, t.float(), **go), "dtype of tokens is 'torch.float32'"),
        (lambda: ev.token_nll(m, t > 3, **go), "dtype of tokens is 'torch.bool'"),
        (lambda: ev.token_nll(m, t[None], **go), "shape of tokens is (1, 30)"),
        (lambda: ev.token_nll(m, t.tolist(), **go), "tokens is 'list'"),
        (lambda: ev.token_nll(m, t, batch_size=0, **go), "batch_size is 0"),
        (lambda: ev.token_nll(lambda ids: torch.zeros(len(ids), V), t, **go), "shape of the model's logits"),
        (lambda: ev.token_nll(nan_at(4), t, **go), "token 5 is nan"),
        (lambda: ev.token_nll(nan_at(7), t, **go), "token 8 is nan"),
        (
            lambda: ev.token_nll(
                lambda ids: torch.full((*ids.shape, V), -math.inf).scatter(-1, torch.zeros_like(ids)[..., None], 0.0),
                t,
                **go,
            ),
            "is inf",
        ),
        (lambda: ev.perplexity(m, sized(torch.ones(29, dtype=torch.long)), **go), "shape of token_bytes is (29,)"),
        (lambda: ev.perplexity(m, sized([1] * 30), **go), "shape of token_bytes is 'list'"),
        (lambda: ev.perplexity(m, sized(torch.zeros(30, dtype=torch.long)), **go), "token_bytes"),
        (lambda: ev.perplexity(m, sized(-torch.ones(30, dtype=torch.long)), **go), "token_bytes"),
        (lambda: ev.perplexity(m, sized(torch.full((30,), math.nan)), **go), "dtype of token_bytes is 'torch.float32'"),
        (lambda: ev.perplexity(m, t[:1], **go), "tokens is 1"),
        (lambda: ev.perplexity(m, "some text", **go), "tokens is 'str'"),
        (lambda: ev.Bootstrap(level=0.0), "level is 0.0"),
        (lambda: ev.Bootstrap(level=1.0), "level is 1.0"),
        (lambda: ev.Bootstrap(level=95), "level is 95"),
        (lambda: ev.Bootstrap(level=math.nan), "level is nan"),
        (lambda: ev.Bootstrap(seed=-1), "seed is -1"),
        (lambda: ev.Bootstrap(seed=1.0), "seed is 1.0"),
        (lambda: ev.Bootstrap(n_boot=0), "n_boot is 0"),
        (lambda: ev.perplexity(m, t, bootstrap=ev.Bootstrap(block=30), **go), "block is 30"),
        (lambda: ev.perplexity(m, t, bootstrap=ev.Bootstrap(block=2.0), **go), "block is 2.0"),
        (lambda: ev.token_nll(m, t, batch_size=1.5, **go), "batch_size is 1.5"),
        (lambda: ev.block_bootstrap([1.0], block=1, seed=-1), "seed is -1"),
        (lambda: ev.block_bootstrap([1.0], block=True), "block is True"),
        (lambda: ev.block_bootstrap([1.0, 2.0], [1.0, math.nan], block=1), "denominators"),
        (lambda: ev.document_bootstrap([1.0, 2.0], [1]), "lengths is '1 documents'"),
        (lambda: ev.document_bootstrap([1.0, 2.0], [2, 0]), "lengths"),
        (lambda: ev.document_bootstrap([1.0, 2.0], []), "lengths"),
        (lambda: ev.document_bootstrap([1.0, 2.0], [1, 1], seed=-1), "seed is -1"),
        (lambda: ev.document_bootstrap([1.0, 2.0], [1, 1], n_boot=2.0), "n_boot is 2.0"),
        (lambda: ev.block_bootstrap([], block=1), "shape of values is (0,)"),
        (lambda: ev.block_bootstrap([1.0, math.nan], block=1), "values is"),
        (lambda: ev.block_bootstrap([1.0, 2.0], block=3), "block is 3"),
        (lambda: ev.block_bootstrap([1.0, 2.0], [1.0], block=1), "shape of denominators is (1,)"),
        (lambda: ev.block_bootstrap([1.0, 2.0], [0.0, 0.0], block=1), "denominators"),
        (lambda: ev.autocorrelation([1.0, 2.0], [2]), "lag is 2"),
        (lambda: ev.autocorrelation([1.0, 2.0], [0.5]), "lag is 0.5"),
        (lambda: ev.autocorrelation([1.0, 1.0], [1]), "all equal"),
        (
            lambda: ev.compare_perplexity(ev.perplexity(m, t, **go), ev.perplexity(m, t.flip(0), **go)),
            "tokens_sha256 of b",
        ),
        (
            lambda: ev.compare_perplexity(ev.perplexity(m, t, **go), ev.perplexity(m, t, context=10, stride=4)),
            "stride of b is 4",
        ),
    ],
)
def test_bad_input_is_one_sentence(wrong, words):
    with pytest.raises(BadInput) as e:
        wrong()
    assert words in str(e.value) and "allowed" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_same_losses():
    model, tokens = llama(), text(30)
    want = ev.token_nll(model, tokens, context=10, stride=5)
    got = ev.token_nll(model.cuda(), tokens.cuda(), context=10, stride=5, batch_size=2)
    assert got.device.type == "cpu" and (got - want).abs().max() < 1e-3  # another order of the sums, perhaps TF32


def kneser_ney_by_definition(text, V, order, discounts):
    """p(w | context) from the formulas, with dictionaries of tuples and no codes."""
    occurs = [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]
    longest = {g: occurs.count(g) for g in set(occurs)}
    tables, grams = {order: longest}, set(longest)
    for k in range(order - 1, 0, -1):
        tables[k] = {}
        for g in grams:
            tables[k][g[1:]] = tables[k].get(g[1:], 0) + 1
        grams = set(tables[k])

    def p(w, context, k):
        if k == 0:
            return 1 / V
        c = tuple(context[len(context) - (k - 1) :])
        after = {g[-1]: n for g, n in tables[k].items() if g[:-1] == c}
        if not after:
            return p(w, context, k - 1)
        off = {v: discounts[min(n, 3) - 1] for v, n in after.items()}
        total = sum(after.values())
        return max(after.get(w, 0) - off.get(w, 0), 0) / total + sum(off.values()) / total * p(w, context, k - 1)

    return p


@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=40),
    st.integers(1, 4),
    st.tuples(st.floats(0.1, 1), st.floats(0.1, 2), st.floats(0.1, 3)),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_kneser_ney_is_the_definition(text, order, discounts, data):
    model = ev.KneserNey(torch.tensor(text), 5, order=order, discounts=discounts)
    expected = kneser_ney_by_definition(text, 5, order, discounts)
    context = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=5))
    found = model.probabilities(np.array(context, dtype=np.int64))
    k = min(order, len(context) + 1)
    np.testing.assert_allclose(found, [expected(w, context, k) for w in range(5)], rtol=1e-10)
    assert abs(found.sum() - 1) < 1e-12 and found.min() > 0
    if context:
        logits = model(torch.tensor([context]))
        np.testing.assert_allclose(logits[0, -1].exp(), found, rtol=1e-5)


def test_kneser_ney_discounts_are_estimated_per_order():
    text = torch.randint(0, 30, (3000,), generator=torch.Generator().manual_seed(0))
    model = ev.KneserNey(text, 30, order=3)
    for context in ([1], [3, 7], [29, 29]):
        p = model.probabilities(np.array(context))
        assert abs(p.sum() - 1) < 1e-12 and p.min() > 0
    assert model.n_grams[0] == 30 and model.n_grams[1] <= 900
    # the estimate, written out for the highest order, gives the same model as the discounts given by hand
    counts = list(Counter(zip(text.tolist(), text[1:].tolist())).values())
    n = [counts.count(c) for c in range(5)]
    y = n[1] / (n[1] + 2 * n[2])
    by_hand = tuple(c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
    estimated, given = ev.KneserNey(text, 30, order=2), ev.KneserNey(text, 30, order=2, discounts=by_hand)
    np.testing.assert_allclose(estimated._tables[1]["p"], given._tables[1]["p"], rtol=1e-12)
    with pytest.raises(BadInput, match="ids is '0 to 30'"):
        model(torch.tensor([[0, 30]]))


def test_kneser_ney_fits_every_vocabulary():
    for V in (2, 400, 4096, 8192, 50_000):
        order = ev.KneserNey.longest(V, 5)
        assert 1 <= order <= 5 and order * (V - 1).bit_length() <= 63
        ev.KneserNey(torch.arange(2).repeat(10), V, order=order)


def test_counting_learns_what_can_be_counted():
    """On a text with a fixed successor for every token, the model is nearly certain; on noise it is near uniform."""
    cycle = torch.arange(600) % 7
    noise = torch.randint(0, 7, (600,), generator=torch.Generator().manual_seed(0))
    sure = ev.perplexity(ev.KneserNey(cycle, 7, order=3), cycle, context=32, stride=24).value
    unsure = ev.perplexity(ev.KneserNey(noise[:300], 7, order=3), noise[300:], context=32, stride=24).value
    assert sure < 1.2 and unsure > 6


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"order": 0}, "order is 0"),
        ({"order": 40}, "order is 40"),
        ({"discounts": (2, 1, 1)}, "discounts"),
        ({"discounts": (0, 1, 1)}, "discounts"),
        ({"vocab_size": 3}, "tokens is '0 to 4'"),
    ],
)
def test_bad_input_for_counting(kwargs, text):
    with pytest.raises(BadInput, match=text):
        ev.KneserNey(torch.arange(5), **({"vocab_size": 5} | kwargs))


# ------------------------------------------------------------------------------------------- levels that are kept

UNITS = {  # each with mean 0
    "normal": lambda rng, k: rng.standard_normal(k),
    "uniform": lambda rng, k: rng.random(k) - 0.5,
    "heavy tails": lambda rng, k: rng.standard_t(5, k),
    "mildly skewed": lambda rng, k: 3 - rng.gamma(3, size=k),
    "exponential": lambda rng, k: rng.exponential(size=k) - 1,
    "gamma": lambda rng, k: rng.gamma(0.5, size=k) - 0.5,
    "lognormal": lambda rng, k: np.exp(0.5 * rng.standard_normal(k)) - math.exp(0.125),
    "few give all": lambda rng, k: (rng.random(k) < 0.05) * rng.standard_normal(k),
}


def kept_and_said(kind, k, trials):
    """Of the simulated samples with a level: how often the interval holds 0, and what is said; how many they are."""
    rng, held, said = np.random.default_rng(k), [], []
    for _ in range(trials):
        x = UNITS[kind](rng, k)
        level = held_level(x)
        if level is not None:
            means = x[rng.integers(k, size=(300, k))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            held.append(low <= 0 <= high), said.append(level)
    return np.array(held), np.array(said)


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("k", [20, 40, 100])
def test_a_level_is_kept_as_often_as_it_says_or_refused(kind, k):
    """Where a level is given, intervals of that kind hold about as often, skewed units or not."""
    held, said = kept_and_said(kind, k, 1000 if k < 100 else 600)
    if kind == "few give all":
        assert len(said) < 0.3 * 1000 if k < 100 else len(said) < 0.7 * 600
        return
    assert len(said) > 0.4 * 1000 if k < 100 else len(said) > 0.9 * 600
    noise = 3 * math.sqrt(0.09 * 0.91 / len(held))
    assert np.mean(said) - noise - 0.015 < np.mean(held) < np.mean(said) + noise + 0.015
    assert k > 20 or np.mean(said) < 0.935  # and it is not simply the 95 % that were asked for


def test_skewness_takes_from_a_level_what_it_should(monkeypatch):
    """Without the term for skewness the level of twenty exponential units is said too high, far beyond chance."""
    monkeypatch.setattr("llmcourse.verdicts.UNSEEN", -20)  # 1 + UNSEEN / k is 0
    held, said = kept_and_said("exponential", 20, 2000)
    assert np.mean(held) < np.mean(said) - 3 * math.sqrt(0.09 * 0.91 / len(held)) - 0.01
    monkeypatch.undo()
    u = np.array([*[-1.0] * 30, *[2.0] * 15])  # by hand: mean 0, mean square 2, mean cube 2
    z = 1.959964
    lost = (z**5 + 20 * z**3 - 27 * z) / 36 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (1 / 2) / 45 * (95 / 45)
    monkeypatch.setattr("llmcourse.verdicts.UNSEEN", -45)
    symmetric = held_level(u)
    monkeypatch.undo()
    assert held_level(u) == pytest.approx(symmetric - lost, abs=1e-6) and held_level(-u) == pytest.approx(held_level(u))
    assert held_level(10 * u - 3) == pytest.approx(held_level(u))
    assert held_level([*[0.0] * 17, *[1.0] * 3]) is None  # carried by more than four, and too skewed to say


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05])
def test_blocks_that_cut_documents_say_what_they_keep(share):
    """Blocks of 128 of a text whose documents are easy or hard as a whole: said, and kept, 200 times."""
    model, held, said, apart = measure(Recurrent(), n=65), [], [], []
    protocol = dataclasses.replace(model.protocol, block=128)
    for trial in range(200):
        rng = np.random.default_rng([trial, 4])
        lengths = rng.integers(53, 160, 80)
        x = math.sqrt(share) * np.repeat(rng.standard_normal(80), lengths)
        x = (x + math.sqrt(1 - share) * rng.standard_normal(len(x)))[:4096]
        low, high = np.quantile(ev.block_bootstrap(x, block=128, n_boot=300, seed=trial), [0.025, 0.975])
        sums = x.reshape(32, 128).sum(1)
        found = dataclasses.replace(model, nll=torch.from_numpy(x), protocol=protocol, documents=None)
        if found.held is not None:
            held.append(low <= 0 <= high), said.append(found.held), apart.append(held_level(sums))
    noise = 3 * math.sqrt(0.09 * 0.91 / len(held))
    assert abs(np.mean(held) - np.mean(said)) < noise + 0.015
    if share == 0.05:  # as if blocks were independent, it would be said too high
        assert np.mean(apart) > np.mean(held) + 0.02 and np.mean(said) < np.mean(apart) - 0.02


def test_the_ends_of_a_perplexity_say_their_level():
    p = measure(Recurrent(), bootstrap={"block": 8})
    assert p.ends() == f"{p.low:.2f} to {p.high:.2f}, {100 * p.held:.3g} %"
    few = dataclasses.replace(p, protocol=dataclasses.replace(p.protocol, block=100))
    assert few.held is None and few.ends() == "no interval: few or skewed units"


def test_a_level_by_hand():
    assert held_level([1, -1, 1, -1]) == pytest.approx(0.8118, abs=0.01) and held_level([1.0] * 9) is None
    assert held_level([3, -1, -1, -1]) is None and held_level([1, -1, 1]) is None
    x = np.random.default_rng(0).standard_normal(5000)
    assert held_level(x) == pytest.approx(0.95, abs=1e-3) and held_level(x, 0.8) == pytest.approx(0.8, abs=1e-3)
    assert held_level(x * 1e-200) == pytest.approx(held_level(x)) == pytest.approx(held_level(7 - x))


@pytest.mark.parametrize(
    ("moves", "level", "words"),
    [([], 0.95, "moves"), ([[1.0]], 0.95, "moves"), ([1.0, math.nan], 0.95, "moves"), ([1.0, 2.0], 95, "level is 95")],
)
def test_no_level_of_what_is_none(moves, level, words):
    with pytest.raises(BadInput, match=words):
        held_level(moves, level)
