"""The chapter on serving: the same tokens whatever the schedule, no block lost, and what is refused."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
import transformers
from archs import REFUSED, build
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse import serving
from llmcourse.compression import compress
from llmcourse.model import GPT, GPTConfig, generate
from llmcourse.packed import pack_model
from llmcourse.quantization import RTN
from llmcourse.runtime import Runtime
from llmcourse.serving import (
    BlockPool,
    BlockStore,
    Engine,
    PagedCache,
    Request,
    Sampling,
    Scheduler,
    Text,
    block_name,
    open_loop,
    run_all,
)
from llmcourse.settings import BadInput

transformers.logging.set_verbosity_error()
RT = Runtime.auto("cpu", "float32")
V = 96


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=V, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=16, context=64)
    model = GPT(GPTConfig(**(shape | more))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


MODEL = gpt()


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests(*lengths: int, new: int = 9, **more) -> list[Request]:
    return [Request(prompt=prompt(n, n), max_new_tokens=new, **({"stop": ()} | more)) for n in lengths]


def alone(model, request: Request) -> list[int]:
    """The most probable continuation, with the whole text read again for each token and no cache at all."""
    ids = list(request.prompt)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        ids.append(int(getattr(out, "logits", out)[0, -1].argmax()))
    return ids[len(request.prompt) :]


# ------------------------------------------------------------------------------- the same tokens

FAMILIES = [
    "ours", "ours, gelu, layer norm, learned positions", "ours, experts", "llama", "qwen2", "mistral, window",
    "gemma2", "gemma3", "gpt2", "bloom", "deepseek-v3", "gpt-oss", "llama4",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gets_the_tokens_that_it_gets_alone(name):
    """Windows of 5 and chunks of 8 tokens are shorter than the texts; the cache is too small for all of them."""
    model = build(name)
    asked = requests(1, 6, 5, 14, new=12)
    engine = Engine(model, max_batch=3, cache_tokens=36, block_size=4, prefill_tokens=5)
    assert run_all(engine, asked) == [alone(model, r) for r in asked]
    assert engine.stats.preempted > 0


@pytest.mark.parametrize("family", ["ours", "llama"])
def test_a_packed_model_is_served(family):
    packed = pack_model(compress(build(family), [RTN(bits=4, group_size=16)], None, RT)[0])
    asked = requests(3, 17, 8)
    assert run_all(Engine(packed, cache_tokens=96, block_size=8), asked) == [alone(packed, r) for r in asked]


@pytest.mark.parametrize("sizes", [dict(), dict(block_size=1, cache_tokens=45), dict(block_size=45, cache_tokens=90),
                                   dict(max_batch=1), dict(prefill_tokens=1), dict(share_prefixes=False)])  # fmt: skip
def test_the_sizes_of_an_engine_change_no_token(sizes):
    asked = requests(30, 2, 11, 36, 1, 19)
    assert run_all(Engine(MODEL, **sizes), asked) == [alone(MODEL, r) for r in asked]


def test_draws_are_those_of_generate_and_the_neighbors_change_nothing():
    how = [Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=s) for s in range(5)]
    asked = [Request(prompt=prompt(5 + 3 * i), max_new_tokens=8, stop=(), sampling=s) for i, s in enumerate(how)]
    want = [
        generate(
            MODEL, [list(r.prompt)], max_new_tokens=8, stop=(), temperature=0.8, top_k=20, top_p=0.9,
            generator=torch.Generator().manual_seed(r.sampling.seed),
        )[0]
        for r in asked
    ]  # fmt: skip
    assert run_all(Engine(MODEL), asked) == want
    assert run_all(Engine(MODEL, cache_tokens=40, block_size=4), asked[::-1]) == want[::-1]
    free = Request(prompt=prompt(5), max_new_tokens=20, stop=(), sampling=Sampling(temperature=1.0))
    a, b = run_all(Engine(MODEL), [free, free])
    assert a != b  # without a seed


def test_the_texts_of_a_store_are_read_where_they_lie():
    """The cache of a pass returns the keys of each text, in order, aligned on the right, with zeros before them."""
    store = BlockStore(1, blocks=5, block_size=2)
    tables, lengths = [[4, 0], [2, 3, 1]], [1, 4]
    keys = [torch.randn(1, 2, n + 1, 3) for n in lengths]  # (1, H_k, S, d_h)
    for table, n, k in zip(tables, lengths, keys, strict=True):
        PagedCache(store, [table], [0], n).layers[0].append(k[:, :, :n], 2 * k[:, :, :n])
    cache = PagedCache(store, tables, lengths, 1)
    last = torch.cat([k[:, :, -1:] for k in keys])  # (2, H_k, 1, d_h)
    k, v = cache.layers[0].append(last, 2 * last)
    assert k.shape == (2, 2, 5, 3) and torch.equal(v, 2 * k)
    assert torch.equal(k[0, :, 3:], keys[0][0]) and torch.equal(k[1], keys[1][0])
    assert not k[0, :, :3].any() and cache.real.tolist() == [[False] * 3 + [True] * 2, [True] * 5]
    assert cache.position.tolist() == [[1], [4]]


# --------------------------------------------------------------------------------- whose is a block


def check_blocks(scheduler: Scheduler) -> None:
    """Each block is blank, idle or used, and one of these; its users are the texts that list it; names are true."""
    pool, size = scheduler.pool, scheduler.size
    used = [b for text in scheduler.running for b in text.blocks]
    assert pool.users == [used.count(b) for b in range(len(pool.users))]
    free = [*pool._blank, *pool._idle]
    assert sorted([*free, *set(used)]) == list(range(len(pool.users))) and pool.free == len(free)
    assert pool._known == {name: b for b, name in pool._names.items()}
    assert set(pool._idle) <= set(pool._names) and not set(pool._blank) & set(pool._names)
    for text in scheduler.running:
        assert len(text.blocks) * size >= text.cached and text.cached <= len(text.tokens)
        for i, block in enumerate(text.blocks[: text.cached // size]):
            name = b""
            for at in range(0, (i + 1) * size, size):
                raw = b"".join(t.to_bytes(8, "little") for t in text.tokens[at : at + size])
                name = hashlib.blake2b(name + raw, digest_size=16).digest()
            assert pool._names.get(block, name) == name
        partial = text.blocks[text.cached // size :]
        assert all(pool.users[b] == 1 and b not in pool._names for b in partial)  # what is written has one reader
    assert not any(text.blocks for text in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_batch
    for texts in (scheduler.waiting, scheduler.running):
        assert [t.id for t in texts] == sorted({t.id for t in texts})


SCHEDULE = dict(
    texts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=7),
    does=st.lists(st.sampled_from(["submit", "step", "step", "cancel"]), max_size=25),
    size=st.sampled_from([1, 2, 3, 5, 8]),
    spare=st.integers(0, 25),
    batch=st.integers(1, 5),
    piece=st.integers(1, 12),
    share=st.booleans(),
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(**SCHEDULE)
def test_any_schedule_gives_the_same_tokens_and_loses_no_block(texts, does, size, spare, batch, piece, share):
    """Random requests (some with a common beginning), submitted, cancelled and stepped in random order."""
    slots = -(-max(28, spare) // size) * size
    sizes = dict(max_batch=batch, cache_tokens=slots, block_size=size, prefill_tokens=piece, share_prefixes=share)
    engine, new, cancelled = Engine(MODEL, **sizes), {}, set()
    asked = {}
    todo = [Request(prompt=prompt(n, kind), max_new_tokens=m, stop=()) for n, m, kind in texts]

    def do(what: str) -> None:
        if what == "submit" and todo:
            request = todo.pop()
            id = engine.submit(request)
            asked[id], new[id] = request, []
        elif what == "cancel" and asked:
            id = min(asked) + len(todo) % len(asked)
            engine.cancel(id)
        else:
            before = engine.read_tokens, len(engine.scheduler.running)
            for event in engine.step():
                new[event.id] += [] if event.token is None else [event.token]
                if event.finished == "cancelled":
                    cancelled.add(event.id)
            assert engine.read_tokens - before[0] <= piece + batch
            assert engine.read_tokens > before[0] or not engine.scheduler.running  # always gets on
        check_blocks(engine.scheduler)

    for what in [*does, *["submit"] * len(todo)]:
        do(what)
    for _ in range(2000):
        if engine.idle:
            break
        do("step")
    assert engine.idle and engine.stats.free_blocks == engine.stats.blocks
    for id, request in asked.items():
        want = WANT.setdefault(request.prompt, alone(MODEL, Request(prompt=request.prompt, max_new_tokens=9)))
        assert new[id] == want[: len(new[id])]
        assert id in cancelled or len(new[id]) == request.max_new_tokens


WANT: dict[tuple[int, ...], list[int]] = {}


def test_a_name_without_what_came_before_would_be_found_out(monkeypatch):
    """A block that follows itself, asked for twice: the second time its keys are found for both."""
    asked = [Request(prompt=2 * prompt(4) + (5,), max_new_tokens=9, stop=())] * 2
    want = [alone(MODEL, asked[0])] * 2
    assert run_all(Engine(MODEL, block_size=4), asked) == want
    monkeypatch.setattr(serving, "block_name", lambda before, tokens: block_name(b"", tokens))
    assert run_all(Engine(MODEL, block_size=4), asked) != want


def test_equal_beginnings_are_read_once_and_others_are_not():
    start = prompt(32)
    asked = [Request(prompt=(*start, 7 + i), max_new_tokens=3, stop=()) for i in range(4)]
    engine = Engine(MODEL, block_size=8)
    run_all(engine, asked)
    assert engine.stats.shared_tokens == 3 * 32 and engine.stats.read_tokens == 33 + 3 + 4 * 2
    off = Engine(MODEL, block_size=8, share_prefixes=False)
    assert run_all(off, asked) == run_all(Engine(MODEL, block_size=8), asked)
    assert off.stats.shared_tokens == 0 and off.stats.read_tokens == 4 * 33 + 4 * 2
    different = Engine(MODEL, block_size=8)
    run_all(different, [Request(prompt=(7 + i, *start), max_new_tokens=3, stop=()) for i in range(4)])
    assert different.stats.shared_tokens == 0


def test_a_whole_prompt_that_is_known_leaves_one_token_to_read():
    engine = Engine(MODEL, block_size=8)
    [first] = run_all(engine, [Request(prompt=prompt(32), max_new_tokens=4, stop=())])
    before = engine.stats.read_tokens
    assert run_all(engine, [Request(prompt=prompt(32), max_new_tokens=4, stop=())]) == [first]
    assert engine.stats.shared_tokens == 24 and engine.stats.read_tokens - before == 8 + 3


def test_idle_blocks_are_emptied_oldest_first_and_the_end_of_a_text_before_its_beginning():
    pool = BlockPool(4)
    names = [block_name(b"", (i,)) for i in range(4)]
    for name in names:
        pool.publish(pool.take(), name)
    for block in (2, 0, 1, 3):
        pool.release(block)
    assert pool.share(names[0]) == 0  # used again: no longer to be emptied
    assert [pool.take() for _ in range(4)] == [2, 1, 3, None]
    assert [pool.share(name) for name in names] == [0, None, None, None]
    scheduler = Scheduler(3, block_size=2, max_batch=1, share_prefixes=True)
    scheduler.waiting.append(Text(0, requests(6)[0], frozenset(), torch.Generator(), list(prompt(6))))
    text = scheduler.admit()
    scheduler.was_read(text, 6)
    blocks = list(text.blocks)
    scheduler.remove(text)
    assert [scheduler.pool.take() for _ in range(3)] == blocks[::-1]


def test_a_block_is_not_released_twice():
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(BadInput, match="a block that is used"):
        pool.release(block)


def test_the_youngest_gives_way_and_the_order_of_arrival_is_kept():
    engine = Engine(MODEL, cache_tokens=40, block_size=4)
    ids = [engine.submit(r) for r in requests(10, 10, 10, new=14)]
    ended = []
    while not engine.idle:
        ended += [e.id for e in engine.step() if e.finished]
        running, waiting = ([t.id for t in texts] for texts in (engine.scheduler.running, engine.scheduler.waiting))
        assert not (running and waiting) or max(running) < min(waiting)
    assert ended == ids and engine.stats.preempted > 0


# ------------------------------------------------------------------------------------- one request


def test_a_request_ends_where_it_should():
    [free] = run_all(Engine(MODEL), requests(7))
    stop = free[3]
    engine = Engine(MODEL)
    id = engine.submit(requests(7, stop=(stop,))[0])
    events = [e for _ in range(12) for e in engine.step()]
    n = free.index(stop) + 1
    assert [e.token for e in events] == free[:n] and all(e.id == id for e in events)
    assert [e.finished for e in events] == [None] * (n - 1) + ["stop"]
    engine.submit(requests(7, new=2)[0])
    assert [e.finished for _ in range(3) for e in engine.step()] == [None, "length"]


def test_the_models_own_end_tokens_are_used_unless_others_are_given():
    own = copy.deepcopy(MODEL)
    [free] = run_all(Engine(own), requests(7))
    own.stop = (free[2],)
    n = free.index(free[2]) + 1
    assert run_all(Engine(own), requests(7, stop=None)) == [free[:n]]
    assert run_all(Engine(own), requests(7)) == [free]
    theirs = build("llama")
    [free] = run_all(Engine(theirs), requests(7))
    theirs.generation_config.eos_token_id = [free[1], 95]
    assert run_all(Engine(theirs), requests(7, stop=None))[0] == free[: free.index(free[1]) + 1]


def test_cancelling():
    engine = Engine(MODEL, max_batch=1)
    first, second, third = (engine.submit(r) for r in requests(5, 5, 5))
    engine.step()
    engine.cancel(second)  # waits
    engine.cancel(first)  # runs
    engine.cancel(first)
    engine.cancel(99)
    assert engine.stats.free_blocks == engine.stats.blocks and not engine.idle
    events = engine.step()
    assert [(e.id, e.token, e.finished) for e in events[:2]] == [
        (second, None, "cancelled"),
        (first, None, "cancelled"),
    ]
    while not engine.idle:
        events += engine.step()
    assert [e.id for e in events if e.finished == "length"] == [third] and engine.step() == []
    engine.cancel(third)  # has ended
    assert engine.idle


def test_a_mask_is_kept_to_and_sees_the_new_tokens():
    seen = []

    def allowed(new):
        seen.append(tuple(new))
        return torch.arange(V) % 7 == len(new) if len(new) < 4 else None

    masked = Request(prompt=prompt(6), max_new_tokens=6, stop=(), allowed=allowed)
    drawn = Request(prompt=prompt(6), max_new_tokens=6, stop=(), allowed=allowed, sampling=Sampling(temperature=2.0))
    for request in (masked, drawn):
        seen.clear()
        [new] = run_all(Engine(MODEL), [request])
        assert [t % 7 for t in new[:4]] == [0, 1, 2, 3] and seen == [tuple(new[:i]) for i in range(6)]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (lambda new: 1 / 0, "ZeroDivisionError: division by zero"),
        (
            lambda new: torch.zeros(V, dtype=torch.bool),
            "what allowed returns is 'no token'; allowed: at least one token.",
        ),
        (lambda new: torch.ones(V), f"bool of shape ({V},)"),
        (lambda new: torch.ones(3, dtype=torch.bool), f"bool of shape ({V},)"),
        (lambda new: "all", "what allowed returns is 'all'"),
    ],
)
def test_a_mask_that_breaks_ends_its_own_request_and_no_other(mask, says):
    engine = Engine(MODEL)
    broken = engine.submit(Request(prompt=prompt(4), max_new_tokens=5, allowed=mask))
    good = requests(9)[0]
    other, events = engine.submit(good), []
    while not engine.idle:
        events += engine.step()
    [end] = [e for e in events if e.id == broken]
    assert (end.token, end.finished) == (None, "failed") and says in end.reason
    assert [e.token for e in events if e.id == other] == alone(MODEL, good)
    assert engine.stats.free_blocks == engine.stats.blocks


def test_a_text_whose_numbers_break_does_not_reach_the_others():
    """One token is no number: its keys lie in blocks beside, and later under, those of others."""
    good = requests(9, 20, 3)
    want = [alone(MODEL, r) for r in good]
    broken = next(t for t in range(V) if not any(t in (*r.prompt, *new) for r, new in zip(good, want, strict=True)))
    bad = copy.deepcopy(MODEL)
    bad.head.weight = torch.nn.Parameter(MODEL.head.weight.clone())
    bad.embed.weight.data[broken] = torch.nan
    ill = Request(prompt=(*prompt(12), broken, *prompt(4)), max_new_tokens=5)
    engine, failed = Engine(bad, cache_tokens=64, block_size=4), []
    for order in ([good[0], ill, good[1]], [ill, good[2], good[0]]):
        new = {engine.submit(r): [] for r in order}
        while not engine.idle:
            for e in engine.step():
                new[e.id] += [] if e.token is None else [e.token]
                failed += [e.reason] if e.finished == "failed" else []
        found = [tokens for tokens, r in zip(new.values(), order, strict=True) if r is not ill]
        assert found == [want[good.index(r)] for r in order if r is not ill]
    assert failed == ["logits is 'not all numbers'; allowed: numbers."] * 2


def test_a_pass_that_raises_loses_nothing(monkeypatch):
    """Out of memory, say: the events so far are reported by the next step, and the text goes on."""
    asked = requests(4, 12)
    engine, real, calls = Engine(MODEL), serving.next_logits, []

    def shaky(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no memory")
        return real(*args)

    monkeypatch.setattr(serving, "next_logits", shaky)
    first = engine.submit(asked[0])
    events = engine.step() + engine.step()
    second = engine.submit(asked[1])
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()  # the first text gets its token, the prompt of the second breaks
    check_blocks(engine.scheduler)
    while not engine.idle:
        events += engine.step()
    for id, r in ((first, asked[0]), (second, asked[1])):
        assert [e.token for e in events if e.id == id] == alone(MODEL, r)


def test_the_model_is_left_as_it_was():
    model = copy.deepcopy(MODEL).train()
    model.blocks[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run_all(Engine(model), requests(5, 9))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_keeps_something_else_is_refused_by_name(name):
    with pytest.raises(BadInput, match=f"model is '{REFUSED[name][1]}'") as e:
        Engine(build(name))
    assert str(e.value).count("\n") == 0 and "allowed: a causal" in str(e.value)


def test_a_layer_that_keeps_nothing_or_looks_ahead_is_refused():
    def forward(self, ids, past_key_values=None, **more):
        return GPT.forward(self, ids, **more)

    forgetful = type("GPT", (GPT,), {"forward": forward})(MODEL.config)
    with pytest.raises(BadInput, match=r"^model is 'GPT'; allowed: .* \(layers \[0, 1\] put none into the cache\)\.$"):
        Engine(forgetful)
    with pytest.raises(BadInput, match="read in pieces, its logits are other ones"):
        Engine(gpt(causal=False))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (dict(max_batch=0), "max_batch is 0; allowed: a whole number of at least 1."),
        (dict(block_size=0), "block_size is 0; allowed: a whole number of at least 1."),
        (dict(prefill_tokens=2.0), "prefill_tokens is 2.0; allowed: a whole number of at least 1."),
        (dict(cache_tokens=8), "cache_tokens is 8; allowed: a whole number of at least 16."),
        (dict(cache_tokens=40), "cache_tokens is 40; allowed: a multiple of block_size = 16."),
        (dict(share_prefixes=1), "share_prefixes is 1; allowed: True, False."),
    ],
)
def test_absurd_sizes(sizes, says):
    with pytest.raises(BadInput) as e:
        Engine(MODEL, **sizes)
    assert str(e.value) == says


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Request(prompt=(), max_new_tokens=1), "prompt is (); allowed: at least one token."),
        (lambda: Request(prompt="text", max_new_tokens=1), "prompt is 'text'; allowed: a sequence of token ids."),
        (lambda: Request(prompt=(1, -2), max_new_tokens=1), "a token of prompt is -2; allowed: a whole number of"),
        (lambda: Request(prompt=(1.5,), max_new_tokens=1), "a token of prompt is 1.5"),
        (lambda: Request(prompt=(1,), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: Request(prompt=(1,), max_new_tokens=1, stop=5), "stop is 5; allowed: a sequence of token ids."),
        (lambda: Request(prompt=(1,), max_new_tokens=1, allowed=5), "allowed is 5; allowed: a function"),
        (lambda: Request(prompt=(1,), max_new_tokens=1, sampling=0.5), "sampling is 0.5; allowed: a Sampling."),
        (lambda: Sampling(temperature=-1), "temperature is -1"),
        (lambda: Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda: Sampling(top_k=0), "top_k is 0"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0"),
        (lambda: Sampling(top_p=1.1), "top_p is 1.1"),
        (lambda: Sampling(seed=-1), "seed is -1"),
    ],
)
def test_absurd_requests(make, says):
    with pytest.raises(BadInput) as e:
        make()
    assert str(e.value).startswith(says)


def test_a_prompt_may_be_a_tensor_or_a_list():
    want = Request(prompt=(3, 4), max_new_tokens=1)
    assert Request(prompt=torch.tensor([3, 4]), max_new_tokens=1).prompt == want.prompt
    assert Request(prompt=[3, 4], max_new_tokens=1, stop=[5]).stop == (5,)


def test_what_can_never_be_served_is_refused_at_once():
    wide, narrow = Engine(MODEL), Engine(MODEL, cache_tokens=32)
    cases = [
        (wide, (*prompt(3), V), 1, f"a token of prompt is {V}; allowed: 0 to {V - 1}."),
        (wide, prompt(60), 5, "max_new_tokens is 5; allowed: at most 4 after 60 tokens of prompt: the context is 64 "
         "tokens."),
        (wide, prompt(64), 1, "tokens of prompt is 64; allowed: at most 63: the context is 64 tokens."),
        (narrow, prompt(30), 4, "max_new_tokens is 4; allowed: at most 3 after 30 tokens of prompt: the cache holds 32 "
         "tokens."),
        (narrow, prompt(33), 1, "tokens of prompt is 33; allowed: at most 32: the cache holds 32 tokens."),
    ]  # fmt: skip
    for engine, ids, new, says in cases:
        with pytest.raises(BadInput) as e:
            engine.submit(Request(prompt=ids, max_new_tokens=new))
        assert str(e.value) == says and engine.idle
    with pytest.raises(BadInput, match="request is 'hello'; allowed: a Request"):
        wide.submit("hello")
    for engine, n, new in ((wide, 60, 4), (wide, 63, 1), (narrow, 30, 3), (narrow, 32, 1)):  # as much as fits
        request = Request(prompt=prompt(n), max_new_tokens=new, stop=())
        assert run_all(engine, [request]) == [alone(MODEL, request)]


# -------------------------------------------------------------------------------------- under load


def test_a_modeled_clock_says_when_tokens_are_there():
    """A second for each step, and a hundredth for each token of a prompt: everything can be counted by hand."""
    cost = lambda rows, tokens: 1 + 0.01 * tokens
    asked = [Request(prompt=prompt(10, i), max_new_tokens=n, stop=()) for i, n in enumerate((3, 2, 1))]
    load = open_loop(Engine(MODEL, max_batch=2), asked, [0.0, 0.5, 20.0], cost=cost)
    first, second, third = load.served
    assert first == pytest.approx((0.0, 0.0, 1.1, 3.2))  # the second step also reads the second prompt
    assert second == pytest.approx((0.5, 1.1, 2.2, 3.2))  # came in the middle of a step
    assert third == pytest.approx((20.0, 20.0, 21.1, 21.1))
    assert load.seconds == pytest.approx(21.1) and load.busy == pytest.approx(4.3 / 21.1)
    assert load.present == pytest.approx((3.2 + 2.1 + 1.1) / 21.1)


@pytest.mark.parametrize("rate", [0.2, 1.0, 5.0])
def test_littles_law_holds_between_the_engines_count_and_the_clients_times(rate):
    dice = torch.Generator().manual_seed(3)
    asked = [Request(prompt=prompt(5 + i % 7, i), max_new_tokens=2 + i % 9, stop=()) for i in range(20)]
    arrivals = (torch.empty(20).exponential_(rate, generator=dice)).cumsum(0).tolist()
    load = open_loop(Engine(MODEL, max_batch=3), asked, arrivals, cost=lambda rows, tokens: 0.1 + 0.02 * tokens)
    stay = sum(r.ended - r.submitted for r in load.served)
    assert load.present * load.seconds == pytest.approx(stay, rel=1e-12)
    assert all(r.arrived <= r.submitted < r.first <= r.ended <= load.seconds for r in load.served)
    assert [r.arrived for r in load.served] == arrivals


def test_the_measured_clock_and_real_waiting():
    asked, arrivals = requests(4, 5, 6, new=3), [0.0, 0.05, 0.1]
    for sleep in (False, True):
        load = open_loop(Engine(MODEL), asked, arrivals, sleep=sleep)
        assert load.seconds >= 0.1 and 0 < load.busy <= 1 and len(load.served) == 3
        assert load.present * load.seconds == pytest.approx(sum(r.ended - r.submitted for r in load.served))
    with pytest.raises(BadInput, match="cost is 'given'; allowed: None with real waiting"):
        open_loop(Engine(MODEL), asked, arrivals, sleep=True, cost=lambda rows, tokens: 1.0)


@pytest.mark.parametrize("context", [1, 4])
def test_a_context_too_short_to_try_the_cache_is_named(context):
    model = GPT(GPTConfig(vocab_size=16, d_model=8, n_layers=1, n_heads=2, context=context)).eval()
    with pytest.raises(BadInput, match=f"context of the model is {context}; allowed: at least 5"):
        serving.try_out(model, serving.limits_of(model))
    longer = GPT(GPTConfig(vocab_size=16, d_model=8, n_layers=1, n_heads=2, context=5)).eval()
    serving.try_out(longer, serving.limits_of(longer))
