"""What a job says: the table for the terminal and the page `report.html`. Hand-written."""

from __future__ import annotations

import sys

__all__ = ["print_table", "render_report", "speed_verdict"]

DENSE, CONTROL = "dense", "dense, again"


def render_report(job: dict, figure_svg: str) -> str:
    """One HTML file without outside references."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("llmcourse", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    svg = figure_svg[figure_svg.index("<svg") :]  # without the XML head, which HTML does not know
    verdict = {what: speed_verdict(job, what) for what in ("read", "write")}
    about = {"verdict": verdict, "control": CONTROL, "told": told_levels(job)}
    about |= {"levels": levels, "pair_verdict": pair_verdict}
    return env.get_template("report.html.j2").render(job=job, figure=svg, **about)


def speed_verdict(job: dict, what: str) -> str:
    """yes, no or unclear: whether the delivered model is faster at "read" or "write" than the dense one.

    A difference counts when its interval leaves out 1 and lies outside what the dense model shows against itself.
    """
    times = job["speed"][what]
    own, control = times[job["deliver"]], times[CONTROL]
    if own["high"] < min(1, control["low"]):
        return "yes"
    return "no" if own["low"] > max(1, control["high"]) else "unclear"


def levels(*held: float | None) -> str:
    """The levels that intervals hold, as one text: the lowest and the highest, or that none can be said."""
    if None in held:
        return "unknown: few or skewed units"
    low, high = (f"{100 * end:.3g}" for end in (min(held), max(held)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def told_levels(job: dict) -> str:
    """How often intervals like those of the table hold the truth (`llmcourse.verdicts.held_level`)."""
    own = levels(*(r["level"] for r in job["rows"]))
    ratios = levels(*(r["ratio_level"] for r in job["rows"] if r["name"] != DENSE))
    return f"How often such intervals hold the truth: perplexity {own}, × dense {ratios}."


def pair_verdict(pair: dict) -> str:
    """What the interval of two arms' ratio says: a sentence."""
    if pair["level"] is None:
        return "Too few documents carry the difference: they cannot be told apart."
    if pair["low"] <= 1 <= pair["high"]:
        return "The interval contains 1: on these tokens they cannot be told apart."
    return f"{pair['a']} is {'better' if pair['high'] < 1 else 'worse'} on these tokens."


def print_table(job: dict) -> None:
    """The job's table for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{job['model']}: {job['recipe']}", title_justify="left")
    for head, how in (
        ("model", "left"),
        ("perplexity (interval)", "right"),
        ("× dense, paired (interval)", "right"),
        ("on disk", "right"),
        ("× float32", "right"),
        ("× bfloat16", "right"),
    ):
        table.add_column(head, justify=how, no_wrap=True)
    for r in job["rows"]:
        disk = r["bytes_disk"]
        table.add_row(
            r["name"],
            f"{r['perplexity']:.2f} ({r['low']:.2f}–{r['high']:.2f})",
            "1" if r["name"] == DENSE else f"{r['ratio']:.3f} ({r['ratio_low']:.3f}–{r['ratio_high']:.3f})",
            f"{disk / 1e6:.1f} MB" if disk else "?",
            f"{1 / r['smaller_than_float32']:.3f}" if disk else "?",
            f"{1 / r['smaller_than_bfloat16']:.3f}" if disk else "?",
        )
    width = None if sys.stdout.isatty() else 120
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)  # names are only names
    console.print(table)
    console.print(told_levels(job))
    for r in job["rows"]:
        if r["name"] == job["deliver"]:
            left = ", ".join(f"{name} ({why})" for name, why in r["left"].items())
            console.print(
                f"{r['name']}: {r['treated']:.1%} of the parameters treated" + (f"; left: {left}" if left else "")
            )
    for p in job["pairs"]:
        console.print(
            f"{p['a']} against {p['b']}: perplexity × {p['ratio']:.3f} (interval {p['low']:.3f} to "
            f"{p['high']:.3f}, level {levels(p['level'])}). {pair_verdict(p)}"
        )
