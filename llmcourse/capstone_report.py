"""What a capstone says: its numbers judged, a sentence of conclusion, the front, and the page.

Hand-written. Nothing here computes with a model: it reads what the steps of `llmcourse.capstone` have kept.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse import __version__
from llmcourse.settings import BadInput

if TYPE_CHECKING:
    from llmcourse.capstone import _Capstone
    from llmcourse.evaluation import Perplexity
    from llmcourse.plotting import Plot

__all__ = ["conclusion", "front", "judged", "print_capstone", "render"]

BLOCK = 128
"""tokens, as `llmcourse.evaluation.Bootstrap` takes them where documents are not known"""


def judged(job: _Capstone, kept: dict[str, dict], speed: dict, adapting: dict | None) -> dict[str, Any]:
    """All numbers of the report, the choice on the validation part, and what the test part says of it.

    Args:
        kept: model -> what its step has measured, dense ones first.
        adapting: what the step before them has told; None: the model was not adapted.
    """
    import torch
    import transformers

    from llmcourse.capstone import ORIGINAL, choose
    from llmcourse.jobs import perplexity_from_json

    recipe, ref = job.recipe, job.recipe.reference
    candidates = {c.arm.name: c for c in recipe.candidates}
    read = {name: {text: perplexity_from_json(p) for text, p in r["read"].items()} for name, r in kept.items()}
    rows = []
    for name, found in kept.items():
        c, card = candidates.get(name), found["passport"]
        row = {
            "name": name,
            "compressed": c is not None,
            "of": c.of if c else None,
            "calib": c and c.calib and Path(c.calib).name,
        }
        row |= {key: card[key] for key in ("parameters", "nonzeros", "bytes_disk", "bytes_memory")}
        if c is None:  # a dense model is compared as one that nobody would ship in 32 bits
            row["bytes_disk"] = 2 * card["parameters"]
        row["perplexity"] = {text: _told(read[name][f"test of {text}"]) for text in job.records}
        row["accuracy"], row["change"] = _accuracies(job, kept, name)
        row["rouge"], row["rouge_change"], row["rouge_other"] = _rouges(job, kept, name)
        row |= {what: speed[what][name] for what in ("read", "write")}
        row["kernels"] = speed["kernels"][name]
        row["reports"] = found.get("made", {}).get("reports", [])
        for part in ("val", "test"):
            row[part] = {text: _bound(job, read, name, text, part) for text in job.records}
        rows.append(row)
    chosen = choose([r for r in rows if r["compressed"]], recipe.choose)
    for row in rows:  # two models are compared with each other, not by their distances from a third
        pair = lambda text, name=row["name"]: [read[n][f"test of {text}"] for n in (chosen or ref, name)]
        row["against"] = {text: _ratio(*pair(text)) for text in job.records}
    told = {
        "name": recipe.name,
        "description": recipe.description,
        "model": job.card.name,
        "note": job.card.note,
        "data": job.data,
        "origin": job.origin,
        "beside": job.beside,
        "original": ORIGINAL,
        "reference": ref,
        "bounds": dataclasses.asdict(recipe.choose),
        "license": recipe.license,
        "limits": recipe.limits,
        "command": job.command or "llmcourse.capstone.capstone",
        "rows": rows,
        "speed": speed,
        "chosen": chosen,
        "delivered": chosen or ref,
        "adapting": adapting,
        "told": told_levels(rows, ref, job.data),
        "sizes": {text: len(items) for text, items in job.items.items()},
        "answers": [{"prompt": o.prompt, "reference": o.reference} for o in job.openings],
        "written": {name: found["written"] for name, found in kept.items()},
        "shared": _shared(job),
        "needed": _needed(read, chosen or ref, ref, job.data),
        "protocol": str(read[ref][f"test of {job.data}"].protocol),
        "device": job.rt.describe(),
        "scale": dataclasses.asdict(job.settings.scale),
        "seed": job.settings.seed,
        "versions": {"llmcourse": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "recipe": recipe.text,
    }
    return told | {"conclusion": conclusion(told)}


def told_levels(rows: list[dict], ref: str, text: str) -> str:
    """How often the intervals of the ratios on a text hold the truth."""
    from llmcourse.report import levels

    return levels(*(r["test"][text]["level"] for r in rows if r["name"] != ref))


def _told(p: Perplexity) -> dict[str, Any]:
    return {"value": p.value, "low": p.low, "high": p.high, "level": p.held, "tokens": p.protocol.n_tokens}


def _bound(job: _Capstone, read: dict, name: str, text: str, part: str) -> dict[str, Any]:
    """What a model costs on a text beside what it may cost there: on its own text against the model before
    compression, on the others against the original one."""
    from llmcourse.capstone import ORIGINAL

    key = "own" if text == job.data else "beside"
    base = job.recipe.reference if key == "own" else ORIGINAL
    found = _ratio(*(read[n][f"{part} of {text}"] for n in (base, name)))
    limit, word = getattr(job.recipe.choose, key), "not decided"
    if found["level"] is not None and (found["high"] <= limit or found["low"] > limit):
        word = "within" if found["high"] <= limit else "above"
    return found | {"text": text, "base": base, "bound": key, "limit": limit, "word": word}


def _ratio(a: Perplexity, b: Perplexity) -> dict[str, Any]:
    """What `b` costs against `a`, in pairs. Where the documents are too few or too skewed to say how often such an
    interval holds, blocks of tokens are drawn in their place."""
    from llmcourse.evaluation import compare_perplexity

    found, units = compare_perplexity(a, b), "documents"
    same = found.low == found.high  # of a model and itself nothing is to be told
    if not same and (found.level is None or a.protocol.block):
        block = a.protocol.block or max(1, min(BLOCK, len(a.nll) // 8))
        units = f"blocks of {block} tokens"
        found = compare_perplexity(
            *(dataclasses.replace(p, protocol=dataclasses.replace(p.protocol, block=block)) for p in (a, b))
        )
    return {"value": found.value, "low": found.low, "high": found.high, "level": found.level, "units": units}


def _accuracies(job: _Capstone, kept: dict, name: str) -> tuple[dict, dict]:
    """Accuracy on each text, and its difference from the model before compression; None: too few items to say."""
    import numpy as np

    from llmcourse.accuracy import FEWEST, Accuracy, compare_accuracy

    values, changes = {}, {}
    for text, items in job.items.items():
        chance = statistics.fmean(1 / len(i.choices) for i in items)
        own, base = (
            Accuracy(hits=np.array(kept[n]["right"][text]), chance=chance) for n in (name, job.recipe.reference)
        )
        low, high = own.interval or (None, None)
        values[text] = {"value": own.value, "low": low, "high": high, "n": len(items), "chance": chance}
        changes[text] = None
        if len(items) >= FEWEST:
            d = compare_accuracy(base, {name: own})[name].difference
            changes[text] = {"value": d.value, "low": d.low, "high": d.high, "p": d.p}
    return values, changes


def _rouges(job: _Capstone, kept: dict, name: str) -> tuple[dict, dict, float]:
    """ROUGE-L of continuations with Student's interval, its paired difference, and its control: against the
    continuation of the next document."""
    from llmcourse.metrics import rouge
    from llmcourse.verdicts import mean_interval, paired

    right = [o.reference for o in job.openings]
    score = lambda h, r: rouge(h, r, types=("rougeL",), tokenize="intl")["rougeL"].f1
    own, base = ([score(h, r) for h, r in zip(kept[n]["written"], right)] for n in (name, job.recipe.reference))
    other = [score(h, r) for h, r in zip(kept[name]["written"], [*right[1:], right[0]])]
    as_dict = lambda d: {"value": d.value, "low": d.low, "high": d.high, "p": d.p}
    return as_dict(mean_interval(own)), as_dict(paired(base, own)), statistics.fmean(other)


def _shared(job: _Capstone) -> str:
    """How much of the test part stands word by word in the training part."""
    from llmcourse.data import leak_test

    records = job.records[job.data]
    test, seen = ([r["text"] for r in records if r["split"] == part] for part in ("test", "train"))
    found = leak_test(test, seen)
    n = len(found.flagged)
    return f"{n} of {found.tested} test documents share {found.n} words in a row with the training part"


def _needed(read: dict, name: str, ref: str, data: str, ratio: float = 1.01) -> dict[str, Any] | None:
    """Documents that would show a change of the perplexity by 1 %, from how much documents differ here."""
    from llmcourse.accuracy import documents_needed

    a, b = (read[n][f"test of {data}"] for n in (ref, name))
    if name == ref or a.documents is None or len(a.documents) < 4:
        return None
    moves = [part.mean().item() for part in (b.nll - a.nll).split(list(a.documents))]
    return {"documents": documents_needed(ratio, statistics.stdev(moves)), "here": len(moves), "ratio": ratio}


def conclusion(job: dict) -> str:
    """What the intervals allow to be said, in a few sentences."""
    k, bounds = sum(r["compressed"] for r in job["rows"]), job["bounds"]
    rule = f"× {bounds['own']:g} of {job['reference']} on {job['data']}"
    if job["beside"]:
        rule += f" and × {bounds['beside']:g} of {job['original']} on {', '.join(job['beside'])}"
    if job["chosen"] is None:
        return (
            f"None of {k} compressed models is shown to stay within {rule} on the validation part, so the model before "
            f"compression ({job['reference']}) is delivered. That a model is not shown to be within is not that it is "
            "outside: more text narrows the intervals."
        )
    row = next(r for r in job["rows"] if r["name"] == job["chosen"])
    base = next(r for r in job["rows"] if r["name"] == job["reference"])
    words = {"within": "holds", "above": "does not hold", "not decided": "is not decided"}
    tested = "; ".join(
        f"on {t['text']} it costs × {t['value']:.3f} ({t['low']:.3f} to {t['high']:.3f}), so the bound of "
        f"{t['limit']:g} {words[t['word']]}"
        for t in row["test"].values()
    )
    return (
        f"{job['chosen']} is the smallest of {k} compressed models that is shown to stay within {rule} on the "
        f"validation part: {row['bytes_disk'] / 1e6:.1f} MB, {base['bytes_disk'] / row['bytes_disk']:.1f} times "
        f"smaller than {job['reference']} in 16 bits. On the test part, which had no say in the choice, {tested}."
    )


def front(job: dict) -> Plot:
    """Bytes on disk against perplexity on the test part of the text."""
    from llmcourse import plotting

    points = []
    for r in job["rows"]:
        p, group = r["perplexity"][job["data"]], "compressed" if r["compressed"] else "dense"
        points.append(plotting.Point(r["name"], r["bytes_disk"] / 1e6, p["value"], p["low"], p["high"], group))
    best, small = min(points, key=lambda p: p.y), min(points, key=lambda p: p.x)
    alt = (
        f"Perplexity on {job['data']} against megabytes on disk for {len(points)} models. The lowest perplexity has "
        f"{best.name}, {best.y:.2f} at {best.x:.0f} MB; the smallest is {small.name}, {small.y:.2f} at {small.x:.0f} "
        f"MB. Delivered: {job['delivered']}."
    )
    xlabel, ylabel = "size on disk, MB", f"perplexity on {job['data']}"
    return plotting.pareto(points, alt=alt, xlabel=xlabel, ylabel=ylabel)


def print_capstone(job: dict) -> None:
    """The table for a terminal, and the conclusion."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    data, beside = job["data"], job["beside"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{job['model']}: {job['name']}", title_justify="left")
    heads = ["model", "MB", f"perplexity on {data}", f"× {job['reference']}"]
    heads += [f"× {job['original']} on {name}" for name in beside]
    for i, head in enumerate([*heads, "right", "× time"]):
        table.add_column(head, justify="right" if i else "left", overflow="fold", min_width=17 * (2 < i < len(heads)))
    for r in job["rows"]:
        p, right = r["perplexity"][data], r["accuracy"][data]
        cells = [r["name"], f"{r['bytes_disk'] / 1e6:.1f}", f"{p['value']:.2f}", *map(_ends, r["test"].values())]
        table.add_row(*cells, f"{right['value']:.2f}", f"{r['write']['ratio']:.2f}")
    width = None if sys.stdout.isatty() else 120
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)  # names are only names
    console.print(table)
    console.print(f"right: of four continuations on {data}; × time: of writing a token, against {job['reference']}")
    console.print(job["conclusion"])


def _ends(r: dict) -> str:
    return "1" if r["low"] == r["high"] else f"{r['value']:.3f} ({r['low']:.2f}–{r['high']:.2f})"


def render(job: dict, figure_svg: str) -> str:
    """One HTML file without outside references."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if "<svg" not in figure_svg:
        raise BadInput("figure is no SVG; allowed: the text of an .svg file.")
    env = Environment(
        loader=PackageLoader("llmcourse", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    svg = figure_svg[figure_svg.index("<svg") :]
    return env.get_template("capstone.html.j2").render(job=job, figure=svg)
