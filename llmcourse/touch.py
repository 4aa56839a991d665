"""Figures that a reader can move: one HTML output with a still picture, its data and a small script.

Hand-written. The rules of the figures are in `llmcourse.touch_figures`; here is what all of them share.

A figure shows itself as

- a still picture: SVG that Python has drawn, in an `<img>`. It needs no script, and it stays where a viewer takes
  scripts and SVG elements out of a page (JupyterLab before a notebook is trusted, GitHub, an e-book);
- its data, as JSON, and a script without global names that fetches nothing. Where it may run it puts a live drawing
  and native controls (sliders, menus, boxes) in the place of the still picture.

What is drawn is a *scene*: axes, marks in the units of the axes, and what it says in words. It is computed twice, by
Python with the functions of the course, and by `templates/touch/KIND.js` in the browser: tests/test_touch.py moves the
controls in a browser and compares.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmcourse.settings import number, one_of, require

__all__ = ["Choice", "Entry", "Slider", "Switch", "Touch", "page", "percent", "pieces", "script", "short"]

SCRIPTS = Path(__file__).parent / "templates" / "touch"
BLUE, RED, INK = "#0072B2", "#D55E00", "currentColor"
STILL, SHOWN = 340, 440
"""pixels that the still picture is drawn for, so that its letters are readable on a telephone, and shown on at most"""
NOTE = "A still picture. Its controls appear in the book, and in JupyterLab once you have run the cell."

Scene = dict[str, Any]


def short(x: float) -> str:
    """Three digits: 1230000 as 1,230,000 and 0.0012345 as 0.00123."""
    text = f"{float(f'{x:.2e}'):,.12f}"
    return text.rstrip("0").rstrip(".")


def percent(x: float) -> str:
    """A share as text: 0.1234 as 12.3 %."""
    return f"{100 * x:.1f} %"


# ---------------------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class Slider:
    """A value from `low` to `high` in steps; its words, if there are any, are said in place of the number."""

    name: str
    label: str
    low: float
    high: float
    start: float
    step: float = 1
    digits: int = 0
    words: Sequence[str] | None = None

    def told(self) -> dict[str, Any]:
        number(f"start of {self.name}", self.start, self.low, self.high)
        n = round((self.high - self.low) / number(f"step of {self.name}", self.step, above=0)) + 1
        if self.words is not None:
            require(len(self.words) == n, f"words of {self.name}", len(self.words), f"one for each of {n} steps")
        more = {"min": self.low, "max": self.high, "step": self.step, "digits": self.digits}
        return more | {"kind": "range"} | ({"words": list(self.words)} if self.words is not None else {})


@dataclass(frozen=True)
class Choice:
    """One of several: value → what the menu says."""

    name: str
    label: str
    options: Mapping[str, str]
    start: str

    def told(self) -> dict[str, Any]:
        one_of(f"start of {self.name}", self.start, self.options)
        return {"kind": "select", "options": [list(pair) for pair in self.options.items()]}


@dataclass(frozen=True)
class Switch:
    """Yes or no."""

    name: str
    label: str
    start: bool = False

    def told(self) -> dict[str, Any]:
        one_of(f"start of {self.name}", self.start, (True, False))
        return {"kind": "checkbox"}


@dataclass(frozen=True)
class Entry:
    """A number that the reader types."""

    name: str
    label: str
    low: float
    high: float
    start: float

    def told(self) -> dict[str, Any]:
        number(f"start of {self.name}", self.start, self.low, self.high)
        return {"kind": "number", "min": self.low, "max": self.high, "step": "any"}


# ----------------------------------------------------------------------------------------- drawing

# Looks of lines, of filled shapes and of points: the same as in touch.js. Blue and red are told apart by dashes and
# by hollow points as well; both have a contrast of 3 or more to a white and to a dark page.
ALONG = {
    "a": {"stroke": BLUE, "stroke-width": 2},
    "b": {"stroke": RED, "stroke-width": 2, "stroke-dasharray": "6 4"},
    "plain": {"stroke": INK, "stroke-width": 1.5},
    "faint": {"stroke": INK, "stroke-width": 1, "opacity": 0.6},
}
FILLED = {
    "a": {"fill": BLUE},
    "hollow": {"fill": "none", "stroke": INK},
    "frame": {"fill": "none", "stroke": RED, "stroke-width": 3},
}
POINT = {
    "a": {"r": 2.5, "fill": BLUE},
    "b": {"r": 3.5, "fill": "none", "stroke": RED, "stroke-width": 1.5},
    "plain": {"r": 6, "fill": INK},
    "faint": {"r": 1.5, "fill": INK, "opacity": 0.6},
}


def _place(axis: Mapping[str, Any], start: float, stop: float) -> Callable[[float], float]:
    f = math.log if axis.get("log") else float
    low, high = f(axis["low"]), f(axis["high"])
    return lambda v: start + (stop - start) * (f(v) - low) / (high - low)


def _frame(scene: Scene, X: Callable, Y: Callable, right: float, top: float, bottom: float) -> list[list]:
    """Grid lines, the words at the ticks, and the names of the axes."""
    left, height, found = scene["left"], scene["height"], []
    line = lambda x1, y1, x2, y2: found.append(
        ["line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": INK, "opacity": 0.25}, ""]
    )
    for v, words in scene["x"]["ticks"]:
        if scene["x"].get("grid"):
            line(X(v), top, X(v), bottom)
        found.append(_text(X(v), bottom + 16, words, "middle"))
    for v, words in scene["y"]["ticks"]:
        if scene["y"].get("grid"):
            line(left, Y(v), right, Y(v))
        found.append(_text(left - 6, Y(v) + 4, words, "end"))
    found.append(_text((left + right) / 2, height - 8, scene["x"]["label"], "middle"))
    return [*found, _text(4, 14, scene["y"]["label"], "start")]


def _text(x: float, y: float, words: str, anchor: str) -> list:
    return ["text", {"x": x, "y": y, "text-anchor": anchor, "fill": INK}, words]


def pieces(scene: Scene, width: float) -> list[list]:
    """The scene as [tag, attributes, text] in pixels of a drawing that is `width` wide; the same as in touch.js."""
    left, right, top, bottom = scene["left"], width - 24, 26, scene["height"] - 42
    X, Y = _place(scene["x"], left, right), _place(scene["y"], bottom, top)
    found = _frame(scene, X, Y, right, top, bottom)
    for kind, *m in scene["marks"]:
        if kind == "line":
            points = " ".join(f"{X(u):.2f},{Y(v):.2f}" for u, v in m[0])
            found.append(["polyline", {"points": points, "fill": "none", **ALONG[m[1]]}, ""])
        elif kind == "dot":
            found.append(["circle", {"cx": X(m[0]), "cy": Y(m[1]), **POINT[m[2]]}, ""])
        elif kind == "text":
            found.append(_text(X(m[0]), Y(m[1]) + 4, m[2], m[3]))
        else:  # bar with a look, or cell with a strength from 0 to 1
            a, b, c, d = X(m[0]), Y(m[1]), X(m[2]), Y(m[3])
            box = {"x": min(a, c), "y": min(b, d), "width": abs(c - a), "height": abs(d - b)}
            look = {"fill": BLUE, "opacity": m[4]} if kind == "cell" else FILLED[m[4]]
            found.append(["rect", {**box, **look}, ""])
    return found


def _svg(scene: Scene, width: int, alt: str) -> str:
    """The still picture: black on white, so that it reads on any page."""
    size = f'width="{width}" height="{scene["height"]}" viewBox="0 0 {width} {scene["height"]}"'
    style = 'style="font: 12px system-ui, sans-serif; color: #000"'
    body = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', f"<title>{html.escape(alt)}</title>"]
    body.append('<rect width="100%" height="100%" fill="#fff"/>')
    for tag, attributes, words in pieces(scene, width):
        given = " ".join(
            f'{k}="{v:.2f}"' if isinstance(v, float) else f'{k}="{html.escape(str(v))}"' for k, v in attributes.items()
        )
        body.append(f"<{tag} {given}>{html.escape(words)}</{tag}>")
    return "".join([*body, "</svg>"])


# ------------------------------------------------------------------------------------- the whole figure


def script(kind: str) -> str:
    """The script of one kind of figure: its rule, and what all share, inside one function that leaves no name."""
    rule, shared = ((SCRIPTS / f"{name}.js").read_text(encoding="utf8") for name in (kind, "touch"))
    return f"(() => {{\nconst figure = {rule.rstrip().rstrip(';')};\n{shared}}})();"


def page(kind: str, told: Mapping[str, Any], scene: Scene) -> str:
    """The HTML of a figure: a still picture of the scene, what is told to the script, and the script."""
    # inside a script element, nothing may look like its end
    data = json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    picture = "data:image/svg+xml," + quote(_svg(scene, STILL, told["alt"]), safe=" =:/,;()")
    words = html.escape(f"{told['alt']} Here: {scene['say']}")
    return (
        f'<div class="llmcourse-touch" data-touch="{kind}">\n'
        f'<img class="touch-still" src="{html.escape(picture)}" width="{SHOWN}" alt="{words}"'
        f' style="max-width: 100%; height: auto"/>\n'
        f'<p class="touch-still"><small>{NOTE}</small></p>\n'
        f'<script type="application/json">{data}</script>\n<script>\n{script(kind)}\n</script>\n</div>'
    )


@dataclass(frozen=True)
class Touch:
    """A figure that can be moved; the last value of a cell shows itself.

    Attributes:
        kind: the name of its rule, `templates/touch/KIND.js`.
        scene: the same rule in Python: (data, settings) → scene.
        alt: what one sees, in one or two sentences, whatever the settings are.
    """

    kind: str
    title: str
    alt: str
    data: Mapping[str, Any]
    controls: Sequence[Slider | Choice | Switch | Entry]
    rule: Callable[[Mapping[str, Any], Mapping[str, Any]], Scene]

    def __post_init__(self) -> None:
        ok = isinstance(self.alt, str) and bool(self.alt.strip())
        require(ok, "alt", self.alt, "one or two sentences that say what one sees")
        one_of("kind", self.kind, sorted(p.stem for p in SCRIPTS.glob("*.js") if p.stem != "touch"))

    @property
    def start(self) -> dict[str, Any]:
        """The settings that the figure begins with."""
        return {c.name: c.start for c in self.controls}

    def scene(self, **settings: Any) -> Scene:
        """What is drawn when these settings differ from those of the start."""
        for name in settings:
            one_of("name of a control", name, self.start)
        return self.rule(self.data, self.start | settings)

    def _repr_html_(self) -> str:
        alt = " ".join(self.alt.split())
        controls = [{"name": c.name, "label": c.label, "start": c.start, **c.told()} for c in self.controls]
        told = {"title": self.title, "alt": alt, "controls": controls, "data": self.data}
        return page(self.kind, told, self.scene())

    def __repr__(self) -> str:
        return f"<Touch {self.kind}: {self.title}>"
