"""How two results differ: a sentence for the learner, and whether two outcomes speak for the same mistake."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmcourse.practice.worker import Other, Rng

if TYPE_CHECKING:
    from llmcourse.practice.exercises import Case

LOOSE_FOR = {"float16": 1e-3, "bfloat16": 1e-2}  # results in half precision cannot be closer than their format


def numbers_in(value: Any) -> int:
    if isinstance(value, dict):
        return sum(numbers_in(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(numbers_in(v) for v in value)
    return int(math.prod(value.shape)) if hasattr(value, "shape") else 1


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def flattened(value: Any) -> Any:
    """A tensor or array as a flat NumPy array (float64 for floating point, so that any two can be compared)."""
    import numpy as np

    if type(value).__module__.startswith("torch"):
        value = value.double() if value.is_floating_point() else value
        value = value.detach().numpy()
    return np.asarray(value, dtype=np.float64 if value.dtype.kind == "f" else None).reshape(-1)


def kind_of(value: Any) -> str:
    if isinstance(value, Other):
        return value.type_name
    if is_array(value):
        return "a tensor" if type(value).__module__.startswith("torch") else "a NumPy array"
    return {
        "NoneType": "None",
        "int": "a whole number",
        "float": "a floating-point number",
        "str": "text",
        "bool": "True or False",
    }.get(type(value).__name__, f"a {type(value).__name__}")


def dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 200 else value[:200] + "…")
    if hasattr(value, "item"):
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:200]


def unequal(want: Any, got: Any, c: Case, times: int = 1) -> Any:
    """Where two arrays of one shape differ by more than the case allows, or by more than `times` as much; flat."""
    return _unequal(flattened(want), flattened(got), c, (dtype_name(want), dtype_name(got)), times)


def _unequal(a: Any, b: Any, c: Case, dtypes: tuple[str, str], times: int) -> Any:
    """`unequal` of arrays that are flat already, and had these dtypes."""
    import numpy as np

    if a.dtype.kind not in "fc" and b.dtype.kind not in "fc":
        return a != b
    rtol = max(c.rtol, *(LOOSE_FOR.get(dtype, 0) for dtype in dtypes))
    atol = max(c.atol, rtol if rtol > c.rtol else 0)
    with np.errstate(invalid="ignore", over="ignore"):  # as np.isclose(b, a), which takes five times as long for a few
        near = np.abs(b - a) <= min(times, 3) * atol + times * rtol * np.abs(a)
    return ~((near & np.isfinite(a)) | (a == b) | (np.isnan(a) & np.isnan(b)))


ROUNDS = 1e-4  # of the largest value: what rounding in float32 may add up to; more is not told apart from a mistake


def _close(difference: float, value: float, c: Case, at: str) -> str:
    """What is said of numbers that are nearly right: rounding, or an answer that is not accurate enough."""
    size = f"at most {difference:.1e}, where the values go up to {value:.3g} and {c.rtol:g} of a value is allowed"
    if difference <= ROUNDS * value:
        return (
            f"This looks like a rounding difference{at}: {size}. The formula seems right; another order of its steps, "
            "or a search that goes on for longer, comes closer."
        )
    return (
        f"This is close, and not close enough{at}: {size}. A search or an approximation may stop too early, a "
        "small part of the formula may be missing, or a part of it may be computed in half precision."
    )


def _names(want: dict, got: dict, at: str) -> str:
    """Which names of two dicts differ. The dict is the answer's own, or what the check has noted about the answer."""
    extra = ", ".join(f"{k} = {short(got[k])[:60]}" for k in got if k not in want)
    missing = ", ".join(str(k) for k in want if k not in got)
    found = [f"Found{at}, but not expected: {extra}."] if extra else []
    return " ".join(found + ([f"Expected{at}, but not found: {missing}."] if missing else []))


def difference_of(want: Any, got: Any, c: Case, where: str = "") -> str:
    """One sentence saying how `got` differs from `want`; empty when they agree."""
    at = f" ({where})" if where else ""
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    if is_array(want):
        import numpy as np

        if not is_array(got) or type(got).__module__.split(".")[0] != type(want).__module__.split(".")[0]:
            return f"The result{at} is {kind_of(got)}; expected {kind_of(want)}."
        if tuple(want.shape) != tuple(got.shape):
            return f"The shape{at} is {tuple(got.shape)}; expected {tuple(want.shape)}."
        if c.same_dtype and dtype_name(want) != dtype_name(got):
            return f"The dtype{at} is {dtype_name(got)}; expected {dtype_name(want)}."
        a, b = flattened(want), flattened(got)
        if (a == b).all():  # most comparisons end here
            return ""
        dtypes = dtype_name(want), dtype_name(got)
        bad = _unequal(a, b, c, dtypes, times=1)
        if not bad.any():
            return ""
        if a.dtype.kind == b.dtype.kind == "f" and not _unequal(a, b, c, dtypes, times=100).any():
            return _close(float(np.abs(a - b).max()), float(np.abs(a).max()), c, at)
        first = np.unravel_index(int(bad.argmax()), tuple(want.shape)) if want.shape else ()
        place = (
            f" First at [{', '.join(map(str, first))}]: {short(b[bad][0])}; expected {short(a[bad][0])}."
            if want.shape
            else ""
        )
        if np.isnan(b[bad]).any() and not np.isnan(a[bad]).any():
            return f"The result{at} holds nan in {int(np.isnan(b).sum())} of {b.size} places.{place}"
        count = (
            f"{int(bad.sum())} of {bad.size} values{at} differ."
            if want.shape
            else f"The value{at} is {short(b[0])}; expected {short(a[0])}."
        )
        return count + place
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or (c.same_dtype and isinstance(want, list) != isinstance(got, list)):
            return f"The result{at} is {kind_of(got)}; expected {kind_of(want)}."
        if len(want) != len(got):
            return f"The result{at} has {len(got)} parts; expected {len(want)}."
        return next(
            (d for i, (w, g) in enumerate(zip(want, got)) if (d := difference_of(w, g, c, f"{where}[{i}]"))), ""
        )
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return f"The result{at} is {kind_of(got)}; expected one with the names {', '.join(map(str, want))}."
        if set(want) != set(got):
            return _names(want, got, at)
        return next((d for k in want if (d := difference_of(want[k], got[k], c, f"{where}[{k!r}]"))), "")
    if number(want) and number(got):
        if isinstance(want, int) and isinstance(got, float) and c.same_dtype:
            return f"The result{at} is {short(got)}, a floating-point number; expected a whole number."
        if isinstance(want, int) and isinstance(got, int):
            same = want == got
        else:
            near = lambda n: math.isclose(want, got, rel_tol=n * c.rtol, abs_tol=min(n, 3) * c.atol)
            same = (math.isnan(want) and math.isnan(got)) or near(1)
            if not same and near(100):
                return _close(abs(want - got), abs(want), c, at)
        return "" if same else f"The value{at} is {short(got)}; expected {short(want)}."
    if type(want) is not type(got):
        return f"The result{at} is {kind_of(got)}; expected {kind_of(want)}."
    if isinstance(want, Rng):
        return ""
    if isinstance(want, Other):
        return "" if want.type_name == got.type_name else f"The result{at} is {got!r}; expected {want!r}."
    return "" if want == got else f"The value{at} is {short(got)}; expected {short(want)}."


def compare(want: dict, got: dict, c: Case) -> str:
    """How the outcome `got` differs from the outcome `want`, as a sentence for the learner; empty when it is right."""
    if got["kind"] == "error" and got["type"] == "ReadyMade":
        return got["message"]
    if c.error:
        allowed = " or ".join(c.error)
        if got["kind"] == "value":
            return f"No error was raised; expected {with_article(allowed)}."
        if got["kind"] == "error" and not set(c.error) & set(got["types"]):
            return f"Your code raised {with_article(got['type'])}; expected {with_article(allowed)}."
        return "" if got["kind"] == "error" else got["message"]
    if got["kind"] == "error":
        if "driver" in got:
            return _misused(got)
        if got["type"] == "ValueError" and "raise " in got.get("line", ""):
            said = f" ({got['message']})" if got["message"] else ""
            return f"Your code refuses these arguments with a ValueError{said}; they are allowed: a result is expected."
        return f"Your code stopped with {got['type']}{': ' if got['message'] else ''}{got['message']}"
    if got["kind"] != "value":
        return got["message"]
    if d := difference_of(want["value"], got["value"], c):
        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
        alike = type(want["value"]) is type(got["value"]) or (number(want["value"]) and number(got["value"]))
        return f"Your answer is {short(got['value'])}, and that is not right." if c.secret and alike else d
    for asked, w, g in zip(c.grads, want.get("gradients") or [], got.get("gradients") or [None] * len(c.grads)):
        which = c.called(asked)
        if w is None and g is not None:
            return f"There is a gradient with respect to {which}; expected none."
        if w is not None and g is None:
            return f"No gradient reaches {which}: the result is cut off from it."
        if w is not None and (d := difference_of(w, g, c, f"the gradient with respect to {which}")):
            return d
    changed = [n for n in got["changed"] if n not in want["changed"]]
    if changed:
        return f"Your code changed its input {', '.join(map(str, changed))}; inputs must stay as they are."
    return ""


# What PyTorch says when a driver uses a result that is not what the statement asks for -> what it means.
_MISUSES = (
    ("does not require grad and does not have a grad_fn",
     "Your result carries no gradient: it was detached, was computed without gradients, or is a new constant that "
     "nothing was computed into."),
    ("not have been used in the graph",
     "Your result does not depend on what it should: it was computed from a copy, or from nothing at all."),
    ("modified by an inplace operation",
     "Something that the gradient still needs was changed in place after it was used."),
    ("backward through the graph a second time",
     "The gradient was already computed from this result, and its graph is gone: call backward once."),
    ("a leaf Variable that requires grad",
     "A parameter was changed in place where gradients are recorded: wrap the change in torch.no_grad()."),
)  # fmt: skip


def _misused(got: dict) -> str:
    """The sentence about an error that was raised where the checker used the answer, not in the learner's lines."""
    said, at = f"{got['type']}: {got['message']}", got["driver"]
    for part, meaning in _MISUSES:
        if part in got["message"]:
            return meaning
    if ".grad" in at and "NoneType" in got["message"]:
        return (
            "No gradient reaches one of the tensors: the result was computed from a copy, a constant or a detached one."
        )
    if "argument" in got["message"] and got["type"] == "TypeError":
        return f"Your answer cannot be called as the statement says: {got['message']}."
    if "object has no attribute" in got["message"]:
        return f"Something that the statement asks for is missing: {got['message']}."
    return f"The check used your result as the statement describes it, and that raised {said}."


def with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def likeness(a: dict, b: dict, c: Case, asked: frozenset[str] = frozenset()) -> float:
    """How much two outcomes speak for the same mistake: 1 yes, 0 no, a little when only the kind of error agrees.

    `asked` are the errors that the exercise asks for in some case. Their text is the learner's own and says nothing.
    """
    if a["kind"] != b["kind"]:
        return 0.0
    if a["kind"] == "error":
        return 0.0 if a["type"] != b["type"] else 1.0 if a["message"] == b["message"] or a["type"] in asked else 0.25
    if a["kind"] != "value":
        return 1.0
    plain = replace(c, error=()) if c.error else c
    return float(not compare(a, b, plain) and not compare(b, a, plain))
