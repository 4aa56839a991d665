"""Decoding with a recorded step: equal to `generate`, on a CPU without the recording and on a GPU with it."""

from __future__ import annotations

import pytest
import torch

from llmcourse.compression import compress
from llmcourse.graphs import GraphDecoder, Tape, graph_generate
from llmcourse.launch import has_compiler
from llmcourse.model import GPT, GPTConfig, KVCache, generate
from llmcourse.packed import pack_model
from llmcourse.quantization import RTN, EmbeddingRTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

SHAPES = {
    "plain": {},
    "shared keys": {"n_kv_heads": 2},
    "one key head, wide": {"n_kv_heads": 1, "d_model": 96},
    "learned positions": {"position": "learned"},
    "no positions": {"position": "none", "norm": "layer", "ffn": "relu"},
    "norms after": {"norm_position": "post", "tied": False},
}
PROMPTS = {
    "equal lengths": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    "padded": [[1], [2, 3, 4, 5], [6, 7]],
    "longest first": [[9] * 12, [8], [7, 6, 5]],
}


def model_of(device="cpu", **more):
    torch.manual_seed(sum(map(ord, str(more))))
    config = dict(vocab_size=101, d_model=64, n_layers=3, n_heads=4, context=64, init_std=0.2) | more
    return GPT(GPTConfig(**config)).to(device).eval()


def compare(model, recorder="none", **how):
    """One decoder for all prompts: what an earlier text left behind must not be seen."""
    decoder = GraphDecoder(model, batch=3, capacity=40, recorder=recorder, **how)
    for prompts in PROMPTS.values():
        want = generate(model, prompts, max_new_tokens=20, stop=[])
        assert len({t for row in want for t in row}) > 5, "a model that says one thing tests nothing"
        assert graph_generate(decoder, prompts, max_new_tokens=20, stop=[]) == want
        stop = [want[0][5], want[1][7], want[2][2]]
        for look in (1, 16):
            got = graph_generate(decoder, prompts, max_new_tokens=20, stop=stop, look=look)
            assert got == generate(model, prompts, max_new_tokens=20, stop=stop)
    return decoder


# a tape repeats every operation from Python: on it, two shapes with all that differs in the cache
@pytest.mark.parametrize(
    ("shape", "recorder"),
    [*((shape, "none") for shape in SHAPES), ("shared keys", "tape"), ("learned positions", "tape")],
)
def test_it_writes_what_generate_writes(shape, recorder):
    compare(model_of(**SHAPES[shape]), recorder)


def test_experts_work_where_nothing_is_recorded():
    compare(model_of(n_experts=4))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="torch.compile finds no compiler")
def test_compiled_blocks_write_the_same_and_one_is_compiled_for_all():
    model = model_of(n_kv_heads=2)
    prompts = [[1, 2, 3], [4]]
    want = generate(model, prompts, max_new_tokens=12, stop=[])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    decoder = GraphDecoder(model, batch=2, capacity=24, compiled=True)
    assert graph_generate(decoder, prompts, max_new_tokens=12, stop=[]) == want
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert not any("OptimizedModule" in type(m).__name__ for m in model.modules())  # the model itself is as it was


def test_a_packed_model():
    model = model_of(d_ff=192)
    student, _ = compress(model, [RTN(bits=4, group_size=32), EmbeddingRTN()], None, Runtime.auto("cpu", "float32"))
    compare(pack_model(student))


def test_the_last_place_is_used_and_no_more():
    model = model_of()
    decoder = GraphDecoder(model, capacity=64)
    prompt = [[3, 1, 4, 1, 5]]
    want = generate(model, prompt, max_new_tokens=59, stop=[])
    assert graph_generate(decoder, prompt, max_new_tokens=59, stop=[]) == want
    with pytest.raises(BadInput, match="max_new_tokens is 60; allowed: at most 59"):
        graph_generate(decoder, prompt, max_new_tokens=60)
    assert graph_generate(decoder, prompt, max_new_tokens=1, stop=[]) == [want[0][:1]]


def test_the_stops_of_the_model_are_kept():
    model = model_of()
    want = generate(model, [[5, 6]], max_new_tokens=30, stop=[])[0]
    model.stop = (want[8],)
    short = generate(model, [[5, 6]], max_new_tokens=30)
    assert len(short[0]) < 30
    assert graph_generate(GraphDecoder(model, capacity=40), [[5, 6]], max_new_tokens=30) == short


def test_a_tape_repeats_operations_and_no_python():
    x, total, count = torch.tensor([1.0, 2.0]), torch.zeros(2), 0
    with (tape := Tape()):
        count += 1
        total += x[:1] * count  # a view, a product, a sum in place
    assert total.tolist() == [1, 1]
    x.fill_(5)
    tape.replay()
    tape.replay()
    assert total.tolist() == [11, 11] and count == 1
    assert tape.kernels == 2
    with pytest.raises(BadInput, match="asks the device for no number"), Tape():
        float(x.sum())


def test_a_tape_over_a_cache_that_grows_repeats_one_place():
    model = model_of()
    cache = KVCache(3)
    with torch.no_grad():
        token = model(torch.tensor([[1, 2, 3]]), past_key_values=cache)[:, -1:].argmax(-1)
        with (tape := Tape()):
            token.copy_(model(token, past_key_values=cache)[:, -1:].argmax(-1))
    for _ in range(5):
        tape.replay()
    assert cache.length == 4  # and not 9


BAD = {
    "a module": (lambda: GraphDecoder(torch.nn.Linear(2, 2), capacity=4), "model is 'Linear'"),
    "no text": (lambda: GraphDecoder(model_of(), capacity=4, batch=0), "batch is 0"),
    "too long": (lambda: GraphDecoder(model_of(), capacity=65), "capacity is 65; allowed: .*64"),
    "too short": (lambda: GraphDecoder(model_of(), capacity=1), "capacity is 1"),
    "no GPU": (
        lambda: GraphDecoder(model_of(), capacity=9, recorder="graph"),
        "recorder is 'graph'; allowed: auto, tape",
    ),
    "a recorder": (lambda: GraphDecoder(model_of(), capacity=9, recorder="no"), "recorder is 'no'; allowed: auto"),
    "experts": (
        lambda: GraphDecoder(model_of(n_experts=4), capacity=9, recorder="tape"),
        "n_experts is 4; allowed: 0 for a model whose steps are recorded",
    ),
    "texts": (
        lambda: graph_generate(GraphDecoder(model_of(), capacity=9), [[1], [2]], max_new_tokens=2),
        "prompts is 2; allowed: 1, as many as batch",
    ),
    "no prompt": (lambda: graph_generate(GraphDecoder(model_of(), capacity=9), [[]], max_new_tokens=2), "prompts is"),
    "a token": (
        lambda: graph_generate(GraphDecoder(model_of(), capacity=9), [[101]], max_new_tokens=2),
        "prompts is 'tokens from 101 to 101'",
    ),
    "look": (
        lambda: graph_generate(GraphDecoder(model_of(), capacity=9), [[1]], max_new_tokens=2, look=0),
        "look is 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, sentence = BAD[case]
    with pytest.raises(BadInput, match=sentence):
        make()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_recorded(shape):
    compare(model_of("cuda", **SHAPES[shape]), recorder="graph")


@pytest.mark.gpu
@needs_gpu
def test_recorded_and_packed():
    model = model_of("cuda", d_ff=192)
    student, _ = compress(model, [RTN(bits=4, group_size=32), EmbeddingRTN()], None, Runtime.auto("cuda", "float32"))
    compare(pack_model(student), recorder="graph")


@pytest.mark.gpu
@needs_gpu
def test_new_weights_in_the_same_place_are_seen():
    model = model_of("cuda")
    decoder = GraphDecoder(model, capacity=40)
    first = graph_generate(decoder, [[1, 2]], max_new_tokens=20, stop=[])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    want = generate(model, [[1, 2]], max_new_tokens=20, stop=[])
    assert graph_generate(decoder, [[1, 2]], max_new_tokens=20, stop=[]) == want != first
