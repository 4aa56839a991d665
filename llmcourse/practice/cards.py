"""What a learner reads: a verdict, a hint or a value, as a card in a notebook and as text in a terminal."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcourse.practice.comparing import dtype_name, flattened, is_array, kind_of, unequal

if TYPE_CHECKING:
    from llmcourse.practice.exercises import Case

IN_SHELL = False  # set by the command line: help is then named by its commands, and nothing prints itself


def how_to_ask(word: str, id: str) -> str:
    """How a learner asks for more, here."""
    return f"llmcourse {word} {id}" if IN_SHELL else f'{word}("{id}")'


def _in_a_script() -> bool:
    """Whether nothing shows the value of an expression: no notebook, no interactive Python, not the command line."""
    shell = sys.modules.get("IPython")
    return not (IN_SHELL or hasattr(sys, "ps1") or (shell is not None and shell.get_ipython() is not None))


def shown_in_scripts(thing: Any) -> Any:
    """In a plain script a result prints itself."""
    if _in_a_script():
        print(thing)
    return thing


# What a terminal or a page would act on: control characters, the direction of writing, halves of characters.
_UNSAFE = re.compile(
    r"[^\t\n\x20-\x7e\xa0-\u200d\u2010-\u2027\u2030-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
MAX_TEXT = 4000


def clean(text: Any, limit: int = MAX_TEXT) -> str:
    """A text of a learner's for somebody else's screen: no escape sequences, not too long."""
    return _UNSAFE.sub("\ufffd", str(text)[:limit])


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on one answer. Shows itself as a card in a notebook and as text in a terminal."""

    id: str
    title: str
    status: str
    """`passed`, `failed` or `not started`"""
    points: int
    max_points: int
    cases_passed: int = 0
    cases: int = 0
    sentence: str = ""
    """what to read: the wrong answer's sentence, or how the smallest failing case differs"""
    detail: str = ""
    """how the smallest failing case differs"""
    wrong_answer: str = ""
    """name of the wrong answer that gives the same results"""
    case: str = ""
    """name of the smallest failing case"""
    given: tuple[tuple[str, str], ...] = ()
    """the arguments of that case: name and text"""
    expected: str = ""
    got: str = ""
    line: str = ""
    """the learner's own line in which an exception was raised"""
    printed: str = ""
    seconds: float = 0.0

    def __post_init__(self):
        for name in ("sentence", "detail", "expected", "got", "line", "printed"):
            object.__setattr__(self, name, clean(getattr(self, name)))

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def verdict(self) -> str:
        if self.passed:
            return f"Passed: all {self.cases} cases" if self.cases > 1 else "Passed"
        if self.status == "not started":
            return "Not started"
        return f"Not yet: {self.cases_passed} of {self.cases} cases pass" if self.cases > 1 else "Not yet"

    def to_dict(self) -> dict:
        return {
            k: getattr(self, k)
            for k in (
                "id",
                "title",
                "status",
                "points",
                "max_points",
                "cases_passed",
                "cases",
                "sentence",
                "detail",
                "wrong_answer",
            )
        } | {
            "case": self.case,
            "expected": self.expected,
            "got": self.got,
            "line": self.line,
            "seconds": round(self.seconds, 3),
        }

    def __repr__(self) -> str:
        mark = {"passed": "[passed]", "failed": "[not yet]"}.get(self.status, "[not started]")
        lines = [f"{mark} {self.id} – {self.title}", self.verdict + f" ({self.points} of {self.max_points} points)."]
        if self.sentence:
            lines += ["", self.sentence]
        if self.case:
            lines += ["", f"Smallest failing case: {self.case}"]
            if self.detail != self.sentence:
                lines.append(f"  {self.detail}")
            beside = _beside(self.expected, self.got)
            both = [] if beside else [("expected", self.expected), ("got", self.got)]
            rows = [*self.given, *both, ("your line", self.line)]
            wide = max(len(name) for name, _ in rows)
            for name, text in rows:
                if text:
                    lines.append(f"  {name:<{wide}}  " + text.replace("\n", "\n  " + " " * (wide + 2)))
            lines += [f"  {line}" for line in beside]
        elif self.line:
            lines.append(f"  your line: {self.line}")
        if self.printed and not self.passed:
            lines += ["", "Your code printed: " + self.printed.strip()[:500]]
        if not self.passed:
            lines += ["", f"A hint: {how_to_ask('hint', self.id)}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        e = html.escape
        marked = lambda text: re.sub("▸([^◂]*)◂", r"<mark>\1</mark>", e(text))
        symbol, color = {"passed": ("✓", "#0a7d4f"), "failed": ("✗", "#b3400a")}.get(self.status, ("○", "#5a6270"))
        cell = "text-align:left;vertical-align:top;padding:.25em .9em .25em 0;border:0;"
        pre = lambda text: f'<pre style="margin:0;background:none;white-space:pre-wrap">{marked(text)}</pre>'
        rows = "".join(
            f'<tr style="background:none"><th scope="row" style="{cell}font-weight:600">{e(name)}</th>'
            f'<td style="{cell}">{pre(text)}</td></tr>'
            for name, text in [*self.given, ("your line", self.line)]
            if text
        )
        both = [(name, text) for name, text in (("expected", self.expected), ("got", self.got)) if text]
        beside = "".join(
            f'<div style="margin:0 2em 0 0"><div style="font-weight:600">{name}</div>{pre(text)}</div>'
            for name, text in both
        )
        parts = [
            f'<p style="margin:0"><span aria-hidden="true" style="color:{color};font-weight:600">{symbol}</span> '
            f"{e(self.verdict)} – {e(self.title)}, {self.points} of {self.max_points} points</p>"
        ]
        if self.sentence:
            parts.append(f'<p style="margin:.6em 0 0;font-weight:600">{e(self.sentence)}</p>')
        if self.case:
            more = f"<br>{e(self.detail)}" if self.detail != self.sentence else ""
            parts.append(f'<p style="margin:.6em 0 0">Smallest failing case: <em>{e(self.case)}</em>{more}</p>')
            parts.append(
                f'<table aria-label="Smallest failing case: {e(self.case)}" '
                'style="margin:.3em 0 0;border-collapse:collapse;font-size:inherit">'
                f"<tbody>{rows}</tbody></table>"
                f'<div style="display:flex;flex-wrap:wrap">{beside}</div>'
            )
        if self.printed and not self.passed:
            parts.append(
                f'<p style="margin:.6em 0 0">Your code printed: <code>{e(self.printed.strip()[:500])}</code></p>'
            )
        if not self.passed:
            parts.append(f'<p style="margin:.6em 0 0">A hint: <code>hint("{e(self.id)}")</code></p>')
        return (
            f'<div role="status" class="llmcourse-check" data-status="{e(self.status)}" '
            'style="border:1px solid currentColor;'
            f'border-left:.4em solid {color};padding:.7em 1em;margin:.3em 0;max-width:60em">{"".join(parts)}</div>'
        )


class Note:
    """A text with a title that shows itself in a notebook and in a terminal."""

    def __init__(self, title: str, text: str, code: str = ""):
        self.title, self.text, self.code = title, text, code

    def __repr__(self) -> str:
        return "\n\n".join(p for p in (self.title + "\n" + self.text, self.code) if p)

    def _repr_html_(self) -> str:
        code = f'<pre style="margin:.6em 0 0"><code>{html.escape(self.code)}</code></pre>' if self.code else ""
        return (
            '<div role="status" class="llmcourse-note" style="border:1px solid currentColor;'
            'border-left:.4em solid #3d6fb4;padding:.7em 1em;margin:.3em 0;max-width:60em">'
            f'<p style="margin:0;font-weight:600">{html.escape(self.title)}</p>'
            f'<p style="margin:.4em 0 0">{html.escape(self.text)}</p>{code}</div>'
        )


def _beside(expected: str, got: str) -> list[str]:
    """The lines of two texts side by side, as far as they fit into 78 columns."""
    if not expected or not got:
        return []
    left, right = ["expected", *expected.split("\n")], ["got", *got.split("\n")]
    wide = max(map(len, left)) + 3
    if wide + max(map(len, right)) > 76:
        return []
    rows = max(len(left), len(right))
    left, right = left + [""] * (rows - len(left)), right + [""] * (rows - len(right))
    return [f"{a:<{wide}}{b}".rstrip() for a, b in zip(left, right)]


SHOWN = 64  # numbers of a value that are printed; larger ones are known by their shape
MARK = ("▸", "◂")  # around the first difference


def _grid(texts: list[str], shape: tuple[int, ...]) -> str:
    """Texts in nested brackets, one row a line."""
    if not shape:
        return texts[0]
    if len(shape) == 1:
        return f"[{', '.join(texts)}]"
    step = len(texts) // shape[0]
    rows = [_grid(texts[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
    return "[" + (",\n" + "\n" * (len(shape) - 2)).join(rows).replace("\n", "\n ") + "]"


def _numbers(value: Any, digits: int) -> tuple[list[str], tuple[int, ...]] | None:
    """The entries of an array or of a list of plain values as texts, and the shape; None for anything else or large."""
    if is_array(value):
        flat, shape = flattened(value).tolist(), tuple(value.shape)
    elif isinstance(value, (list, tuple)) and all(isinstance(v, (int, float, str, type(None))) for v in value):
        flat, shape = list(value), (len(value),)
    else:
        return None
    if not 0 < len(flat) <= SHOWN:
        return None
    texts = [f"{v:.{digits}g}" if isinstance(v, float) else repr(v) for v in flat]
    if is_array(value) and dtype_name(value).startswith(("float", "bfloat")):
        texts = [t if set(t) & set(".en") else t + "." for t in texts]
    wide = max(map(len, texts)) if len(shape) > 1 else 0
    return [t.rjust(wide) for t in texts], shape


def show(value: Any, first: int | None = None, digits: int = 5) -> str:
    """A value as text that a learner reads: small ones whole, with a mark at entry `first`; large ones by shape."""
    if found := _numbers(value, digits):
        texts, shape = found
        if first is not None:
            texts[first] = f"{MARK[0]}{texts[first].strip()}{MARK[1]}"
        text = _grid(texts, shape)
        if isinstance(value, tuple):
            return f"({text[1:-1]}{',' if len(value) == 1 else ''})"
        return text if shape else f"{text} (a single number)"
    if is_array(value):
        return f"{kind_of(value)[2:]} of shape {tuple(value.shape)}, {dtype_name(value)}"
    if isinstance(value, (list, tuple)) and any(is_array(v) for v in value):
        return "\n".join(f"[{i}] {show(v)}" for i, v in enumerate(value))
    if isinstance(value, dict):
        return "\n".join(f"{k}: {show(v)}" for k, v in value.items())
    text = repr(value)
    return text if len(text) <= 400 else text[:400] + " …"


def show_pair(want: Any, got: Any, c: Case) -> tuple[str, str]:
    """Two values as text; the first entry in which they differ is marked, with digits enough to see it."""
    several = lambda v: isinstance(v, (list, tuple)) and any(is_array(part) for part in v)
    if several(want) and several(got) and len(want) == len(got):
        pairs = [show_pair(w, g, c) for w, g in zip(want, got)]
        return tuple("\n".join(f"[{i}] {p[side]}" for i, p in enumerate(pairs)) for side in (0, 1))
    if isinstance(want, dict) and isinstance(got, dict) and set(want) == set(got):
        pairs = {k: show_pair(want[k], got[k], c) for k in want}
        return tuple("\n".join(f"{k}: {p[side]}" for k, p in pairs.items()) for side in (0, 1))
    for digits in (5, 7, 9, 17):
        a, b = _numbers(want, digits), _numbers(got, digits)
        if not a or not b or a[1] != b[1]:
            break
        if is_array(want) and is_array(got):
            bad = unequal(want, got, c)
            first = int(bad.argmax()) if bad.any() else None
        else:
            first = next((i for i, (w, g) in enumerate(zip(a[0], b[0])) if w != g), None)
        if first is not None and (a[0][first].strip() != b[0][first].strip() or digits == 17):
            return show(want, first, digits), show(got, first, digits)
    return show(want), show(got)


def show_both(want: dict, got: dict, c: Case) -> tuple[str, str]:
    """What was expected and what came, as two texts."""
    if want["kind"] != "value" or got["kind"] != "value":
        return _show_outcome(want, c), _show_outcome(got, c)
    texts = list(show_pair(want["value"], got["value"], c))
    for asked, w, g in zip(c.grads, want.get("gradients") or [], got.get("gradients") or []):
        both = show_pair(w, g, c) if w is not None and g is not None else (_show_gradient(w), _show_gradient(g))
        texts = [f"{t}\ngradient of {c.called(asked)}: {s}" for t, s in zip(texts, both)]
    return tuple(texts)


def _show_gradient(value: Any) -> str:
    return "none" if value is None else show(value)


def _show_outcome(outcome: dict, c: Case) -> str:
    if outcome["kind"] == "error":
        return f"{outcome['type']}: {outcome['message']}" if outcome["message"] else outcome["type"]
    if outcome["kind"] != "value":
        return "nothing: it was stopped"
    return show_pair(outcome["value"], outcome["value"], c)[0]
