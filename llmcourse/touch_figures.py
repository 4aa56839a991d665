"""Six figures that a reader can move, each with its rule in Python: the functions of the course, on real numbers.

Hand-written. A rule takes the data and the settings of a figure and returns its scene (`llmcourse.touch`). The same
rule stands in `templates/touch/KIND.js`, written out with nothing but arithmetic, and has to come to the same scene.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmcourse.settings import number, require, whole
from llmcourse.touch import Choice, Entry, Scene, Slider, Switch, Touch, page, percent, short

__all__ = [
    "attention_masks", "interval_width", "next_token", "quantization_grid", "redrawn", "roofline", "schedules",
]  # fmt: skip

Data = Mapping[str, Any]


def _ticks(values: Sequence[float], words: Any) -> list[list]:
    return [[v, words(v)] for v in values]


def _finite(name: str, values: Sequence[float], least: int) -> list[float]:
    found = [float(v) for v in values]
    good = len(found) >= least and all(map(math.isfinite, found))
    require(good, name, f"{len(found)} numbers", f"at least {least}, all finite")
    return found


# --------------------------------------------------------------------- which token is drawn (nbs/04_model.ipynb)


def next_token(logits: Any, names: Sequence[str], *, alt: str, more: int = 30) -> Touch:
    """Temperature, top-k and top-p on the logits (V,) of one next token.

    Args:
        names: what the likeliest tokens are called, the likeliest first; each gets a bar.
        more: so many tokens after them get one bar together, and all others another.
    """
    found = sorted(_finite("logits", logits, len(names) + whole("more", more, 1) + 1), reverse=True)
    thousandths = [round(1000 * l) for l in found]  # three decimals, written as differences: short
    steps = [thousandths[0], *(b - a for a, b in itertools.pairwise(thousandths))]
    controls = (
        Slider("temperature", "Temperature", 0.1, 2, 1.0, 0.05, 2),
        Slider("top_p", "Top-p", 0.05, 1, 0.9, 0.05, 2),
        Choice("top_k", "Top-k", {"off": "off", "1": "1", "5": "5", "40": "40"}, "off"),
    )
    data = {"tokens": list(names), "next": more, "steps": steps}
    return Touch("sampling", "Which token is drawn", alt, data, controls, _sampling)


NEVER = 1e-30
"""a probability below this is none: in float32 the smallest ones vanish"""


def _sampling(data: Data, now: Data) -> Scene:
    import torch

    from llmcourse.model import next_probabilities

    logits = torch.tensor(data["steps"], dtype=torch.float64).cumsum(0) / 1000
    before = next_probabilities(logits, temperature=now["temperature"]).double()
    top_k = None if now["top_k"] == "off" else int(now["top_k"])
    after = next_probabilities(logits, temperature=now["temperature"], top_k=top_k, top_p=now["top_p"]).double()
    shown, more, kept = len(data["tokens"]), data["next"], int((after > NEVER).sum())
    grouped = lambda p: [*p[:shown].tolist(), p[shown : shown + more].sum().item(), p[shown + more :].sum().item()]
    names = [*(f"“{t}”" for t in data["tokens"]), f"the next {more}", f"the other {len(logits) - shown - more}"]
    marks = []
    for i, (was, is_) in enumerate(zip(grouped(before), grouped(after), strict=True)):
        marks += [["bar", 0, i + 0.12, is_, i + 0.88, "a"], ["bar", 0, i + 0.12, was, i + 0.88, "hollow"]]
    left, first, drawn = before[:kept].sum().item(), after[0].item(), after[after > 0]
    open_ = math.exp(-(drawn * drawn.log()).sum().item())
    words = (
        f"{kept} of {len(logits)} tokens can be drawn; without the cut they have {percent(left)} of the probability. "
        f"{names[0]} comes first with {percent(first)}. The draw is as open as one among {open_:.1f} tokens of equal "
        "probability."
    )
    quarters = _ticks((0, 0.25, 0.5, 0.75, 1), lambda v: f"{100 * v:g} %")
    return {
        "width": 560, "height": 68 + 20 * len(names), "left": 104, "marks": marks, "say": words,
        "x": {"low": 0, "high": 1, "grid": True, "label": "probability", "ticks": quarters},
        "y": {"low": len(names), "high": 0, "label": "next token",
              "ticks": [[i + 0.5, name] for i, name in enumerate(names)]},
        "values": {"kept": kept, "left": left, "first": first, "open": open_},
    }  # fmt: skip


# ---------------------------------------------------------------------- the grid (nbs/14_quantization.ipynb)


def quantization_grid(weights: Any, *, alt: str) -> Touch:
    """Bits, groups and symmetry on 64 weights of one row."""
    found = [round(w, 5) for w in _finite("weights", weights, 64)]
    require(len(found) == 64 and any(found), "weights", f"{len(found)} numbers", "64, not all of them 0")
    groups = {"64": "all 64 weights", "16": "16 weights", "8": "8 weights"}
    controls = (
        Slider("bits", "Bits", 2, 8, 3),
        Choice("group", "One grid for", groups, "64"),
        Switch("symmetric", "Symmetric"),
    )
    data = {"weights": found, "most": max(abs(w) for w in found)}
    return Touch("grid", "A grid for weights", alt, data, controls, _grid)


def _grid(data: Data, now: Data) -> Scene:
    import torch

    from llmcourse.quantization import rtn

    W, size, bits, symmetric = torch.tensor([data["weights"]]), int(now["group"]), now["bits"], now["symmetric"]
    solved = rtn(W, bits=bits, group_size=size, symmetric=symmetric)
    q, n, rounded, marks = solved.qparams, W.shape[1], solved.weight[0].tolist(), []
    for g in range(n // size) if bits <= 4 else ():
        for code in range(q.top + 1):
            v = (code - q.zero[0, g].item()) * q.scale[0, g].item()
            if abs(v) <= data["most"]:
                marks.append(["line", [[g * size - 0.4, v], [(g + 1) * size - 0.6, v]], "faint"])
    pairs = list(enumerate(zip(W[0].tolist(), rounded, strict=True)))
    marks += [["line", [[i, w], [i, r]], "plain"] for i, (w, r) in pairs]
    marks += [m for i, (w, r) in pairs for m in (["dot", i, r, "b"], ["dot", i, w, "a"])]
    error = ((W - solved.weight).double().norm() / W.double().norm()).item()
    zeros, own = rounded.count(0.0), (16 if symmetric else 16 + bits) / size
    edge, groups = math.ceil(data["most"] * 10) / 10, n // size
    words = (
        f"{bits} bits, {groups} {'grid' if groups == 1 else 'grids'} of {2**bits} values, "
        f"{'symmetric' if symmetric else 'affine'}. The rounding error is {percent(error)} of the weights' own size; "
        f"{zeros} of {n} weights become 0. With its share of the scales{'' if symmetric else ' and zero points'} a "
        f"weight takes {short(bits + own)} bits."
    )
    return {
        "width": 640, "height": 300, "left": 48, "marks": marks, "say": words,
        "x": {"low": -1, "high": n, "label": "number of the weight", "ticks": _ticks((0, 16, 32, 48), str)},
        "y": {"low": -edge, "high": edge, "grid": True, "label": "weight: solid; rounded: hollow",
              "ticks": _ticks((-edge, 0, edge), lambda v: f"{v:.1f}")},
        "values": {"error": error, "zeros": zeros, "rounded": rounded, "bits": bits + own},
    }  # fmt: skip


# -------------------------------------------------------------------- masks (nbs/03_attention.ipynb)


def attention_masks(scores: Mapping[str, Any], tokens: Sequence[str], *, alt: str) -> Touch:
    """What each token looks at under a mask, for the divided scores (T, T) of some heads, by name."""
    T, heads = len(tokens), {}
    require(T >= 2 and len(scores) > 0, "tokens", T, "at least two, and the scores of at least one head")
    for name, S in scores.items():
        rows = [[round(s, 3) for s in _finite(f"scores[{name!r}]", row, T)] for row in S]
        require(len(rows) == T and {*map(len, rows)} == {T}, f"scores[{name!r}]", len(rows), f"shape ({T}, {T})")
        heads[name] = rows
    masks = {"causal": "causal", "window": "causal, a window", "none": "no mask"}
    controls = (
        Choice("head", "Head", {name: name for name in heads}, next(iter(heads))),
        Choice("mask", "Mask", masks, "causal"),
        Slider("window", "Window", 1, T, 3),
        Slider("row", "Token that looks", 1, T, T, words=[f"{i + 1}: {t}" for i, t in enumerate(tokens)]),
    )
    return Touch("attention", "Who looks at whom", alt, {"tokens": list(tokens), "heads": heads}, controls, _attention)


def _attention(data: Data, now: Data) -> Scene:
    import torch

    from llmcourse.attention import causal_mask, sliding_window_mask, stable_softmax

    tokens, T, row = data["tokens"], len(data["tokens"]), now["row"] - 1
    may = {
        "causal": causal_mask(T), "window": sliding_window_mask(T, now["window"]),
        "none": torch.ones(T, T, dtype=torch.bool),
    }[now["mask"]]  # fmt: skip
    scores = torch.tensor(data["heads"][now["head"]], dtype=torch.float64)
    weights = stable_softmax(scores.masked_fill(~may, -math.inf))
    marks = []
    for i in range(T):
        for j in range(T):
            if may[i, j]:
                strength = math.floor(weights[i, j].item() * 1e4 + 0.5) / 1e4
                marks.append(["cell", j + 0.04, i + 0.04, j + 0.96, i + 0.96, strength])
            else:
                marks.append(["dot", j + 0.5, i + 0.5, "faint"])
    marks.append(["bar", 0, row, T, row + 1, "frame"])
    order = sorted(enumerate(weights[row].tolist()), key=lambda pair: (-pair[1], pair[0]))[:3]
    told = ", ".join(f"“{tokens[j]}” ({j + 1}) with {percent(w)}" for j, w in order if w > 0.0005)
    seen = int(may[row].sum())
    words = f"“{tokens[row]}” ({row + 1}) may look at {seen} of {T} tokens. It looks most at {told}."
    return {
        "width": 460, "height": 68 + 24 * T, "left": 84, "marks": marks, "say": words,
        "x": {"low": 0, "high": T, "label": "token that is looked at",
              "ticks": [[j + 0.5, f"{j + 1}"] for j in range(T)]},
        "y": {"low": T, "high": 0, "label": "token that looks",
              "ticks": [[i + 0.5, f"{t} {i + 1}"] for i, t in enumerate(tokens)]},
        "values": {"weights": weights.tolist(), "seen": seen},
    }  # fmt: skip


# ------------------------------------------------------------ learning rates (nbs/06_optimizers.ipynb)


def schedules(*, alt: str, total: int = 100) -> Touch:
    """The factor on the peak learning rate over a run of `total` steps."""
    whole("total", total, 100, 100)
    kinds = ("constant", "linear", "cosine", "wsd")
    controls = (
        Choice("kind", "Schedule", {k: k for k in kinds}, "cosine"),
        Slider("warmup", "Warm-up steps", 0, 50, 10),
        Slider("final", "Final factor", 0, 0.5, 0.1, 0.05, 2),
        Slider("decay", "Last part of wsd, in %", 5, 90, 20, 5),
        Slider("step", "Look at step", 1, total, 40),
    )
    return Touch("schedule", "A learning rate over a run", alt, {"total": total, "kinds": kinds}, controls, _schedule)


def _schedule(data: Data, now: Data) -> Scene:
    from llmcourse.optim import lr_factor

    total, kind, step = data["total"], now["kind"], now["step"]
    how = {"total": total, "warmup": now["warmup"], "final": now["final"], "decay": now["decay"] / 100}
    line = lambda name: [[s + 1, lr_factor(s, kind=name, **how)] for s in range(total)]
    chosen = line(kind)
    here = chosen[step - 1][1]
    marks = [["line", line(name), "faint"] for name in data["kinds"] if name != kind]
    marks += [["line", chosen, "a"], ["line", [[step, 0], [step, here]], "b"], ["dot", step, here, "plain"]]
    mean, high = sum(v for _, v in chosen) / total, sum(v > 0.5 for _, v in chosen)
    words = (
        f"{kind}: step {step} of {total} has {here:.3f} of the peak rate. Over the run the mean is {mean:.3f}, and "
        f"{high} steps are above half of the peak."
    )
    return {
        "width": 640, "height": 260, "left": 40, "marks": marks, "say": words,
        "x": {"low": 0, "high": total, "label": "step", "ticks": _ticks((1, 25, 50, 75, 100), str)},
        "y": {"low": 0, "high": 1.05, "grid": True, "label": "factor on the peak rate",
              "ticks": _ticks((0, 0.5, 1), lambda v: f"{v:.1f}")},
        "values": {"here": here, "mean": mean, "factors": [v for _, v in chosen]},
    }  # fmt: skip


# ------------------------------------------------------------------- the roof (nbs/15_deployment.ipynb)


def roofline(bandwidth: float, peak: float, parameters: float, *, alt: str) -> Touch:
    """The least time of one pass, on the reader's own machine.

    Args:
        bandwidth, peak: bytes and operations a second to begin with.
        parameters: weights that a token is multiplied with.
    """
    for name, value in (("bandwidth", bandwidth), ("peak", peak), ("parameters", parameters)):
        number(name, value, above=0)
    near = lambda value: float(f"{value:.4g}")
    formats = {"4": "4 bytes (float32)", "2": "2 bytes (bfloat16)", "1": "1 byte (int8)", "0.5": "half a byte (int4)"}
    controls = (
        Entry("bandwidth", "Bandwidth, GB/s", 0.1, 100_000, near(bandwidth / 1e9)),
        Entry("peak", "Peak, GFLOP/s", 0.1, 10_000_000, near(peak / 1e9)),
        Entry("parameters", "Weights, millions", 0.1, 10_000_000, near(parameters / 1e6)),
        Choice("element", "A weight has", formats, "4"),
        Slider("tokens", "Tokens at once", 0, 10, 0, words=[str(2**i) for i in range(11)]),
    )
    return Touch("roofline", "Your own roofline", alt, {}, controls, _roofline)


def _roofline(data: Data, now: Data) -> Scene:
    from llmcourse.deployment import Machine

    machine = Machine(bandwidth=now["bandwidth"] * 1e9, peak=now["peak"] * 1e9)
    tokens, nbytes = 2 ** now["tokens"], now["parameters"] * 1e6 * float(now["element"])
    flops = 2 * now["parameters"] * 1e6 * tokens
    intensity, seconds = flops / nbytes, machine.seconds(flops, nbytes)
    low, high = 0.25, 4096
    roof = lambda x: 1 / machine.seconds(1, 1 / x)
    floor = roof(low) / 2
    corner, reached = min(max(machine.ridge, low), high), flops / seconds
    limit = "memory" if intensity < machine.ridge else "arithmetic"
    words = (
        f"{short(intensity)} operations a byte, and the ridge is at {short(machine.ridge)}: {limit} is the limit. "
        f"A pass over {tokens} {'token' if tokens == 1 else 'tokens'} takes at least {short(seconds * 1e3)} ms, which "
        f"is at most {short(tokens / seconds)} tokens a second and {percent(reached / machine.peak)} of the peak."
    )
    return {
        "width": 640, "height": 300, "left": 64, "say": words,
        "x": {"low": low, "high": high, "log": True, "grid": True, "label": "operations a byte",
              "ticks": _ticks((1, 10, 100, 1000), short)},
        "y": {"low": floor, "high": machine.peak * 3, "log": True, "grid": True,
              "label": "operations a second, in GFLOP/s",
              "ticks": [[v, short(v / 1e9)] for d in range(5) if (v := machine.peak / 10**d) >= floor]},
        "marks": [["line", [[x, roof(x)] for x in (low, corner, high)], "a"],
                  ["line", [[corner, floor], [corner, roof(corner)]], "b"],
                  ["dot", intensity, reached, "plain"]],
        "values": {"intensity": intensity, "ridge": machine.ridge, "seconds": seconds, "rate": tokens / seconds},
    }  # fmt: skip


# ------------------------------------------------------------------- intervals (nbs/05_evaluation.ipynb)


def interval_width(nll: Any, lengths: Sequence[int], *, alt: str) -> Touch:
    """Student's interval of a perplexity against the number of documents that were scored.

    Args:
        nll: losses of all scored tokens, in nats.
        lengths: scored tokens of each document, in order; they add up to the number of losses.
    """
    losses, documents, at = _finite("nll", nll, 8), [], 0
    fits = len(lengths) >= 4 and min(lengths) >= 1 and sum(lengths) == len(losses)
    require(fits, "lengths", f"{len(lengths)} documents", f"at least 4 with {len(losses)} tokens together")
    for n in lengths:
        own = losses[at : at + n]
        documents.append([int(n), round(sum(own), 4), round(sum(x * x for x in own), 4)])
        at += n
    # about a dozen lengths, each longer than the one before by the same factor
    k, least = len(documents), min(4, len(documents))
    stops = sorted({round(least * (k / least) ** (i / 11)) for i in range(12)})
    mean = sum(losses) / len(losses)
    low, high = round(math.exp(mean) * 0.6, 1), round(math.exp(mean) * 1.7, 1)
    levels = {level: f"{level} %" for level in ("80", "90", "95", "99")}
    units = {"documents": "documents", "tokens": "tokens, as if independent"}
    controls = (
        Slider("stop", "Documents scored", 1, len(stops), len(stops), words=[str(s) for s in stops]),
        Choice("unit", "Units", units, "documents"),
        Choice("level", "Level", levels, "95"),
        Slider("goal", "Wanted precision, in %", 1, 10, 2),
    )
    ticks = sorted({math.ceil(low), round(math.exp(mean)), math.floor(high)})
    data = {"documents": documents, "stops": stops, "low": low, "high": high, "ticks": ticks}
    return Touch("interval", "How sure a perplexity is", alt, data, controls, _interval)


def _after(data: Data, now: Data, k: int) -> dict[str, float]:
    """Perplexity and interval after the first k documents."""
    from llmcourse.verdicts import student_interval

    docs = data["documents"][:k]
    n, total = sum(d[0] for d in docs), sum(d[1] for d in docs)
    mean = total / n
    if now["unit"] == "tokens":
        units, spread = n, sum(d[2] for d in docs) - n * mean**2
    else:  # a mean of a ratio: how far each document moves it
        units, spread = k, sum((d[1] - mean * d[0]) ** 2 for d in docs)
    error = math.sqrt(units / (units - 1) * spread) / n
    found = student_interval(mean, error, units - 1, int(now["level"]) / 100)
    ends = {"value": math.exp(mean), "low": math.exp(found.low), "high": math.exp(found.high)}
    return ends | {"n": n, "reach": found.high - mean}


def _interval(data: Data, now: Data) -> Scene:
    found, k = [_after(data, now, s) for s in data["stops"]], data["stops"][now["stop"] - 1]
    here, low, high = _after(data, now, k), data["low"], data["high"]
    cut = lambda v: min(max(v, low), high)
    line = lambda key: [[f["n"], cut(f[key])] for f in found]
    need = here["n"] * (here["reach"] / math.log(1 + now["goal"] / 100)) ** 2
    words = (
        f"After {k} documents ({here['n']} tokens) the perplexity is {here['value']:.2f}, {now['level']} % interval "
        f"{here['low']:.2f} to {here['high']:.2f}: it reaches {percent(math.exp(here['reach']) - 1)} upward. "
        f"For {now['goal']} % it takes about {short(need)} tokens like these."
    )
    some = [found[math.floor(v * (len(found) - 1) + 0.5)]["n"] for v in (0, 0.5, 1)]
    return {
        "width": 640, "height": 300, "left": 44, "say": words,
        "x": {"low": found[0]["n"], "high": found[-1]["n"], "log": True, "label": "scored tokens",
              "ticks": _ticks(some, str)},
        "y": {"low": low, "high": high, "log": True, "grid": True,
              "label": "perplexity (line), and its interval (dashed)", "ticks": _ticks(data["ticks"], str)},
        "marks": [["line", line("low"), "b"], ["line", line("high"), "b"], ["line", line("value"), "a"],
                  ["line", [[here["n"], cut(here["low"])], [here["n"], cut(here["high"])]], "plain"],
                  ["dot", here["n"], cut(here["value"]), "plain"]],
        "values": {"value": here["value"], "low": here["low"], "high": here["high"], "need": need},
    }  # fmt: skip


RULES = {
    "attention": _attention, "grid": _grid, "interval": _interval, "roofline": _roofline, "sampling": _sampling,
    "schedule": _schedule,
}  # fmt: skip


def redrawn(html: str) -> str:
    """A stored figure, made anew from its own data: after a change of the script or of the drawing."""
    kind = re.match(r'<div class="llmcourse-touch" data-touch="(\w+)">', html)
    told = re.search(r'<script type="application/json">([^<]*)</script>', html)
    require(kind is not None and told is not None, "html", html[:60], "what a figure of llmcourse.touch showed")
    found = json.loads(told[1])
    return page(kind[1], found, RULES[kind[1]](found["data"], {c["name"]: c["start"] for c in found["controls"]}))
