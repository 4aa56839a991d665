"""What decoding costs on a GPU: the kernels for packed weights alone, and whole answers with and without a recording.

    python benchmarks/gpu.py                    # all, some minutes on one GPU
    python benchmarks/gpu.py --part kernels     # or decode
    python benchmarks/gpu.py --quick            # a smoke run: its numbers mean nothing

Kernels: x (M, I) times a weight (O, I) in bfloat16, by our two kernels on 4 bits in groups of 64 (8 bits for the
output layer), and by the int4 kernel of PyTorch. Each is recorded in a CUDA graph that runs through enough copies of
the weight that no cache of the GPU holds them; the graphs are replayed in turn. Decoding: models with the shapes of
SmolLM2 135M, Llama 3.2 1B and Llama 3.1 8B and random weights (the time does not depend on their values), a prompt of
32 tokens and 64 new ones, end to end, in turn with transformers, which stands in the list a second time as the null
control. Results: nbs/_results/gpu.json,
which the chapter `nbs/15f_gpu.ipynb` reads.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared import machine, save
from torch import Tensor, nn

from llmcourse import kernels
from llmcourse.deployment import _norms_in_place, cache_bytes, faster, faster_, kernel_grid, step_cost
from llmcourse.graphs import GraphDecoder, graph_generate
from llmcourse.model import GPT, GPTConfig, generate
from llmcourse.packed import PackedEmbedding, PackedHead, PackedLinear
from llmcourse.quantization import rtn
from llmcourse.runtime import Comparison, Runtime, compare

ROOT = Path(__file__).resolve().parent.parent
# (O, I, bits): two of SmolLM2 135M, four of Llama 3.1 8B
SHAPES = ((576, 576, 4), (1536, 576, 4), (4096, 4096, 4), (14336, 4096, 4), (4096, 14336, 4), (128256, 4096, 8))
ROWS = (1, 2, 4, 8, 16, 64)
GROUP = 64
MODELS = {
    "SmolLM2 135M": dict(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536),
    "Llama 3.2 1B": dict(vocab_size=128256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192),
    "Llama 3.1 8B": dict(
        vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336, tied=False
    ),
}
TINY = {"tiny": dict(vocab_size=512, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=256)}
BASE, DENSE, JOINED = "transformers", "bfloat16", "norms in one call"
INT4 = "4 bits, PyTorch's kernel"
NINE = 9  # the prompt and eight steps: what the profiler looks at
DEVICE = "cuda"


def ceilings(quick: bool) -> dict[str, float]:
    """Bytes that a copy reads and writes in a second, and operations of a bfloat16 product, the best of ten."""
    n, side = (1 << 24, 1024) if quick else (1 << 32, 8192)
    x, A = torch.randint(255, (n,), dtype=torch.uint8, device="cuda"), torch.randn(side, side, device="cuda").bfloat16()
    y = torch.empty_like(x)
    best = {}
    for name, fn, work in (("copy", lambda: y.copy_(x), 2 * n), ("product", lambda: A @ A, 2 * side**3)):
        times = []
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        best[name] = work / min(times[3:])
    return {"bandwidth": best["copy"], "peak": best["product"]}


def recorded(fns: list[Callable[[], Any]]) -> Callable[[], None]:
    """One CUDA graph of all of them, as a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for fn in fns[:2]:
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept += [fn() for fn in fns]
    replay = graph.replay
    return lambda: (replay(), kept)[0]


def rows_of(results: dict[str, Comparison], work: int) -> dict[str, dict]:
    """Speed over the baseline with its interval, and the time of one piece of `work`."""
    return {
        name: {
            "us": c.timing.median / work * 1e6,
            "speed": 1 / c.ratio,
            "low": 1 / c.high,
            "high": 1 / c.low,
            "n": c.timing.n,
        }
        for name, c in results.items()
    }


class Weights:
    """A weight packed with 4 or 8 bits, so many times that no cache holds all copies, and dense in bfloat16."""

    def __init__(self, O: int, I: int, bits: int, quick: bool):
        dice = torch.Generator("cuda").manual_seed(O + I)
        W = torch.randn(O, I, device="cuda", generator=dice)
        update = rtn(W, bits=bits, group_size=GROUP, scale_dtype=torch.float16)
        self.layer = layer = PackedLinear.from_weight(update.weight, update.qparams)
        n = 2 if quick else max(2, min(64, -(-(256 << 20) // layer.codes.nbytes)))
        self.codes = [layer.codes.clone() for _ in range(n)]
        self.dense = [update.weight.bfloat16() for _ in range(n)]
        self.nbytes = layer.nbytes
        self.theirs: list[Tensor] = []
        if bits == 4 and I % 128 == 0:
            grid = kernel_grid(layer)
            pairs = (grid.codes[:, ::2] << 4 | grid.codes[:, 1::2]).to(torch.uint8)
            self.group = grid.group
            self.scales = torch.stack((grid.scale, grid.offset), -1).transpose(0, 1).contiguous()  # (G, O, 2)
            self.theirs = [torch.ops.aten._convert_weight_to_int4pack(pairs, 8) for _ in range(n)]

    def candidates(self, x: Tensor) -> dict[str, list[Callable[[], Tensor]]]:
        """Name -> one function for each copy of the weight."""
        layer, bits = self.layer, self.layer.bits
        how = dict(group_size=layer.group_size)
        found = {name: [lambda W=W: F.linear(x, W) for W in self.dense] for name in (DENSE, f"{DENSE}, again")}
        if len(x) <= kernels.FEW_ROWS:
            few = lambda c: kernels.few_rows(x, c, layer.scale, layer.zero, bits=bits, **how)
            found["few rows"] = [lambda c=c: few(c) for c in self.codes]
        if bits == 4:
            tiles = lambda c: kernels.w4a16(x, c, layer.scale, layer.zero, **how)
            found["tiles"] = [lambda c=c: tiles(c) for c in self.codes]
        if self.theirs:
            theirs = lambda c: torch.ops.aten._weight_int4pack_mm(x, c, self.group, self.scales)
            found["PyTorch int4"] = [lambda c=c: theirs(c) for c in self.theirs]
        return found


def measure_kernels(rt: Runtime, quick: bool, roof: dict[str, float]) -> list[dict]:
    shapes = ((256, 128, 4), (512, 128, 8)) if quick else SHAPES
    table = []
    for O, I, bits in shapes:
        weights = Weights(O, I, bits, quick)
        for M in ROWS if not quick else (1, 16):
            x = torch.randn(M, I, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).bfloat16()
            exact = kernels.packed_reference(
                x.float(), weights.layer.codes, weights.layer.scale, weights.layer.zero, bits=bits, group_size=GROUP
            )
            found = weights.candidates(x)
            error = {n: float((fs[0]().float() - exact).norm() / exact.norm()) for n, fs in found.items()}
            runs = {n: recorded(fs) for n, fs in found.items()}
            results = compare(runs, rt, baseline=DENSE, warmup=2, repeats=5 if quick else 15)
            rows = rows_of(results, len(weights.codes))
            for name, row in rows.items():
                nbytes = weights.dense[0].nbytes if name.startswith(DENSE) else weights.nbytes
                row |= {"error": error[name], "bandwidth_share": nbytes / (row["us"] / 1e6) / roof["bandwidth"]}
            table.append({"O": O, "I": I, "bits": bits, "M": M, "copies": len(weights.codes), "rows": rows})
            line = "  ".join(
                f"{n} {r['us']:.1f} µs {r['speed']:.2f}× {r['bandwidth_share']:.0%}" for n, r in rows.items()
            )
            print(f"({O}, {I}) {bits} bits, {M} rows: {line}", flush=True)
        del weights, found, runs
        gc.collect()
        torch.cuda.empty_cache()
    return table


@torch.no_grad()
def packed_copy(model: GPT) -> GPT:
    """The model with 4 bits in groups of 64 and 8 bits for embedding and head; made in place, layer by layer."""

    def grid(W: Tensor, bits: int) -> Any:
        return rtn(W.float(), bits=bits, group_size=GROUP, scale_dtype=torch.float16)

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is model.head:
            continue
        update, (parent, _, child) = grid(layer.weight, 4), name.rpartition(".")
        new = PackedLinear.from_weight(update.weight, update.qparams)
        new.like = torch.empty(0, dtype=layer.weight.dtype, device=layer.weight.device)
        setattr(model.get_submodule(parent), child, new)
    update, dtype = grid(model.head.weight, 8), model.head.weight.dtype
    if model.config.tied:
        model.embed = PackedEmbedding.from_weight(update.weight, update.qparams)
        model.embed.like = torch.empty(0, dtype=dtype, device=DEVICE)
        model.head = PackedHead(model.embed)
    else:
        model.head = PackedLinear.from_weight(update.weight, update.qparams)
        model.head.like = torch.empty(0, dtype=dtype, device=DEVICE)
    return model


def dense_model(shape: dict[str, Any], context: int = 2048) -> GPT:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            torch.manual_seed(0)
            return GPT(GPTConfig(context=context, **shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def their_model(ours: GPT) -> Any:
    """The same shape in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = ours.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.d_ff, max_position_embeddings=c.context,
        tie_word_embeddings=c.tied, eos_token_id=None, bos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def by_transformers(model: Any, ids: Tensor, new: int, **how: Any) -> list[list[int]]:
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return out[:, ids.shape[1] :].tolist()


def launches(fn: Callable[[], Any]) -> dict[str, float]:
    """How many kernels `fn` starts, how long the GPU works on them, and how long all takes, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        fn()
        torch.cuda.synchronize()
    on_gpu = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in on_gpu) / 1e6
    return {"kernels": len(on_gpu), "busy_s": busy, "seconds": seconds}


def forms_of(shape: dict[str, Any], rt: Runtime) -> tuple[Any, dict[str, GPT]]:
    """The model of transformers, and ours in every form that is compared, by name."""
    plain, packed = dense_model(shape), packed_copy(dense_model(shape))
    _norms_in_place(packed)
    int4, said = faster(packed, rt, kernels="int4")
    print(said, flush=True)
    forms = {"our GPT": plain, JOINED: faster_(dense_model(shape), rt)[0]}
    return their_model(plain), forms | {"4 bits, Triton": packed, INT4: int4}


def recordings(forms: dict[str, GPT], ids: Tensor, new: int, compiled: bool) -> dict[str, tuple[GPT, Any, float]]:
    """By name: the model, a decoder that has recorded its step, and the seconds that this took."""
    wanted = {f"{name}, recorded": (model, False) for name, model in forms.items() if name != "our GPT"}
    if compiled:
        wanted["recorded and compiled"] = (forms[JOINED], True)
        wanted[f"{INT4}, recorded and compiled"] = (forms[INT4], True)
    made = {}
    for name, (model, joined) in wanted.items():
        start = time.perf_counter()
        try:
            decoder = GraphDecoder(model, batch=len(ids), capacity=ids.shape[1] + new, compiled=joined)
            graph_generate(decoder, ids, max_new_tokens=2, stop=[])
        except Exception as e:  # one that cannot be recorded is said, and the others go on
            print(f"   {name}: {type(e).__name__}: {str(e)[:600]}", flush=True)
            continue
        torch.cuda.synchronize()
        made[name] = (model, decoder, time.perf_counter() - start)
    return made


def answers_of(theirs: Any, forms: dict[str, GPT], made: dict, ids: Tensor, new: int) -> dict[str, Callable[[], Any]]:
    """By name: a function that continues the prompts by `new` tokens."""
    ours = {
        name: lambda model=model: generate(model, ids, max_new_tokens=new, stop=[]) for name, model in forms.items()
    }
    again = {
        name: lambda d=decoder: graph_generate(d, ids, max_new_tokens=new, stop=[])
        for name, (_, decoder, _) in made.items()
    }
    transformers = {name: lambda: by_transformers(theirs, ids, new) for name in (BASE, f"{BASE}, again")}
    return transformers | ours | again


def same_tokens(first: list[list[int]], second: list[list[int]]) -> float:
    pairs = [(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(x == y for x, y in pairs) / len(pairs)


def measure_answers(
    rt: Runtime, theirs: Any, forms: dict[str, GPT], ids: Tensor, new: int, options: Any, bandwidth: float
) -> dict[str, Any]:
    """All ways to continue these prompts, in turn; for one prompt also what a pass starts on the GPU."""
    torch._dynamo.reset()  # what was compiled for another number of texts counts towards its limit of variants
    made = recordings(forms, ids, new, options.compile)
    runs = answers_of(theirs, forms, made, ids, new)
    if options.peer_compiled:
        runs["transformers, compiled"] = lambda: by_transformers(theirs, ids, new, cache_implementation="static")
    rows = rows_of(compare(runs, rt, baseline=BASE, warmup=1, repeats=options.rounds), new)
    for name, row in rows.items():
        model = forms["4 bits, Triton" if "4 bits" in name else "our GPT"]
        past = cache_bytes(model.config, tokens=ids.shape[1] + new // 2, batch=len(ids), element=2)
        row["tokens_per_s"], row["bytes"] = len(ids) / row["us"] * 1e6, step_cost(model).weight_bytes + past
        row["bandwidth_share"] = row["bytes"] / (row["us"] / 1e6) / bandwidth
        if name in made:
            model, _, row["seconds_to_record"] = made[name]
            row["same_tokens"] = same_tokens(generate(model, ids, max_new_tokens=new, stop=[]), runs[name]())
        ends = f"({row['low']:.2f}–{row['high']:.2f})"
        print(
            f"   {name:<36}{row['us']:>9.0f} µs a step {row['tokens_per_s']:>9.0f} tokens/s {row['speed']:.2f}× {ends} "
            f"{row['bandwidth_share']:.0%} {row.get('same_tokens', '')} {row.get('seconds_to_record', '')}",
            flush=True,
        )
    found: dict[str, Any] = {"batch": len(ids), "prompt": ids.shape[1], "new": new, "rounds": options.rounds}
    found |= {"bandwidth": bandwidth, "rows": rows}
    if len(ids) == 1:
        nine = answers_of(theirs, forms, made, ids, NINE)
        found["nine_tokens"] = {name: launches(fn) for name, fn in nine.items() if name != f"{BASE}, again"}
        for name, f in found["nine_tokens"].items():
            print(f"   9 passes, {name}: {f['kernels']} kernels, busy {f['busy_s']:.4f} of {f['seconds']:.4f} s")
    return found


def measure_decode(rt: Runtime, options: Any, bandwidth: float) -> Iterator[dict]:
    prompt, new = (8, NINE) if options.quick else (32, 64)
    for name, shape in (TINY if options.quick else MODELS).items():
        if options.models and not any(word in name for word in options.models):
            continue
        theirs, forms = forms_of(shape, rt)
        for batch in options.batches:
            print(f"{name}, {batch} texts", flush=True)
            ids = torch.randint(shape["vocab_size"], (batch, prompt), device=DEVICE)
            yield {"model": name} | measure_answers(rt, theirs, forms, ids, new, options, bandwidth)
        del theirs, forms
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "kernels", "decode"), default="all")
    parser.add_argument("--models", nargs="*", default=[], help="words in the names of the models; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="texts at a time")
    parser.add_argument("--peer-compiled", action="store_true", help="also transformers, compiled: minutes")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "gpu.json", help="where the JSON goes")
    options = parser.parse_args()
    if options.quick and options.out.parent == ROOT / "nbs" / "_results":
        parser.error("--quick needs --out: what the chapter reads is not a smoke run")
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, and PyTorch sees none here.")
        return 2
    rt = Runtime.auto("cuda", "bfloat16")
    roof = ceilings(options.quick)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__,
        "quick": options.quick,
        "roof": roof,
        "machine": machine(),
    }
    print(f"{report['gpu']}: {roof['bandwidth'] / 1e12:.2f} TB/s, {roof['peak'] / 1e12:.0f} TFLOP/s", flush=True)
    parts = {"kernels": lambda: measure_kernels(rt, options.quick, roof)}
    parts["decode"] = lambda: measure_decode(rt, options, roof["bandwidth"])
    for part, measure in parts.items():
        if options.part in ("all", part):
            report[part] = []
            for row in measure():
                report[part].append(row)
                save(report, options.out)  # a run that is cut off keeps what it has
    print(f"written to {options.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
