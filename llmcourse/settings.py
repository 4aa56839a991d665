"""The course's settings: one file, overridden by the environment, checked key by key.

Hand-written and free of torch: the command line reads settings before anything heavy is imported.
"""

from __future__ import annotations

import configparser
import math
import numbers
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = [
    "BadInput", "Scale", "Settings", "course_root", "environment_whole", "expanded", "load_settings", "number",
    "one_of", "plain",
    "read_text", "require", "whole",
]  # fmt: skip

ENV_PREFIX = "LLMCOURSE_"
LARGEST = 2**40
"""bound of every size in the settings: beyond it a value is a slip of the finger"""
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class BadInput(ValueError):
    """A value from outside that cannot be used; its text is one sentence for the person who gave it."""


def plain(text: object) -> str:
    """Text for a terminal: characters that would steer it (escape sequences, lone surrogates) are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise `BadInput` with one sentence naming argument, value and what is allowed, unless `ok`."""
    if not ok:
        raise BadInput(f"{name} is {value!r}; allowed: {allowed}.")


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`value` as a plain int, if it is a whole number from `low` to `high` (both included). 3.0, True and "3" are not.

    Raises:
        BadInput: one sentence with the name, the value and the range.
    """
    ok = hasattr(value, "__index__") and type(value).__name__ not in ("bool", "bool_")
    try:
        n = operator.index(value) if ok else 0
    except TypeError:  # an array or tensor that is no single whole number
        ok = False
    ok = ok and (low is None or n >= low) and (high is None or n <= high)
    require(ok, name, value, f"a whole number{_range(low, high)}")
    return n


def number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """`value` as a float, if it is finite, from `low` to `high` (included), greater than `above` and less than `below`.

    Raises:
        BadInput: one sentence with the name, the value and the range. NaN, infinities, True and text are refused.
    """
    limits = [_range(low, high).strip()]
    limits += [f"above {above}"] if above is not None else []
    limits += [f"below {below}"] if below is not None else []
    allowed = " and ".join(filter(None, limits))
    allowed = f"a finite number {allowed}".rstrip()
    ok = isinstance(value, numbers.Real) and type(value).__name__ not in ("bool", "bool_") and math.isfinite(value)
    ok = ok and (low is None or value >= low) and (high is None or value <= high)
    require(ok and (above is None or value > above) and (below is None or value < below), name, value, allowed)
    return float(value)


def one_of(name: str, value: object, allowed: Iterable[object]) -> object:
    """`value`, if it equals one of `allowed` (of the same type: 1 is not True).

    Raises:
        BadInput: one sentence with the name, the value and the choices.
    """
    allowed = tuple(allowed)
    ok = any(type(value) is type(a) and value == a for a in allowed)
    require(ok, name, value, ", ".join(str(a) for a in allowed))
    return value


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work an experiment does (one `[scale.NAME]` section)."""

    name: str
    eval_tokens: int
    """tokens of held-out text in a perplexity"""
    context: int
    """tokens in one evaluation window"""
    stride: int
    """tokens that each further window scores"""
    batch_size: int
    """windows in one forward pass"""
    calib_sequences: int
    """calibration sequences"""
    calib_length: int
    """tokens in a calibration sequence"""
    train_steps: int
    """optimizer steps of one small training run"""
    seeds: int
    """repetitions where randomness matters"""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "name":
                whole(f.name, value, 1, LARGEST)
        require(self.context >= 2, "context", self.context, "a whole number of at least 2")
        require(self.stride < self.context, "stride", self.stride, f"1 to {self.context - 1}, one less than context")
        require(
            self.eval_tokens >= self.context,
            "eval_tokens",
            self.eval_tokens,
            f"at least one window of {self.context} tokens",
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything in `settings.ini`, after the environment had its say."""

    model: str
    data: str
    scale: Scale
    seed: int
    home: Path
    offline: bool
    device: str
    dtype: str
    kernels: str
    """how a packed model computes: auto, int4 or portable"""
    source: Path
    """the file that was read"""

    def __post_init__(self):
        for name in ("model", "data", "home"):
            value = str(getattr(self, name))
            require(value.isprintable(), name, value, "text without control characters")
        require(bool(self.model), "model", self.model, "a name from `llmcourse data`, a folder, or a hub id")
        require(bool(self.data), "data", self.data, "a name from `llmcourse data`, a folder, a file, or a hub id")
        whole("seed", self.seed, 0, 2**32 - 1)
        require(
            bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device)),
            "device",
            self.device,
            "auto, cpu, mps, cuda or cuda:N",
        )
        require(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            "dtype",
            self.dtype,
            "auto, float32, bfloat16, float16",
        )


def course_root() -> Path:
    """The folder with `nbs/`, `recipes/` and `settings.ini`: the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    packed = package / "_course"
    return packed if packed.is_dir() else package.parent


def _find_settings(env: Mapping[str, str]) -> Path:
    if named := env.get(ENV_PREFIX + "SETTINGS"):
        path = Path(named).expanduser()
        require(path.is_file(), "LLMCOURSE_SETTINGS", named, "the path of a settings file")
        return path
    here = Path.cwd()
    for folder in (here, *here.parents):
        path = folder / "settings.ini"
        try:  # other tools also have a settings.ini: only one with our section is ours
            if path.is_file() and re.search(rb"^(\xef\xbb\xbf)?\[llmcourse\]", path.read_bytes(), re.M):
                return path
        except PermissionError:  # a folder above that is not ours to read
            continue
    return course_root() / "settings.ini"


def _whole(name: str, text: str, low: int, high: int) -> int:
    """The whole number that a text stands for: digits only, so "1_000", "1e3" and "" are refused."""
    require(bool(re.fullmatch(r"[+-]?[0-9]{1,30}", text)), name, text, f"a whole number from {low} to {high}")
    return whole(name, int(text), low, high)


def environment_whole(name: str, default: int, env: Mapping[str, str] | None = None) -> int:
    """A whole number of at least 0 from an environment variable that other programs set; empty means not set.

    Raises:
        BadInput: anything else, e.g. RANK=first.
    """
    text = (os.environ if env is None else env).get(name, "").strip()
    return _whole(name, text, 0, 2**31 - 1) if text else default


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of a file that a person wrote, with or without a byte-order mark.

    Raises:
        BadInput: not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(
            f"{what} is {str(path)!r}; allowed: UTF-8 text (byte {e.start} is none: save it as UTF-8)."
        ) from None
    except OSError as e:
        raise BadInput(f"{what} is {str(path)!r}; allowed: a file that can be read ({e.strerror}).") from None


def expanded(name: str, path: str | Path) -> Path:
    """The path with ~ replaced; refuses what is no path at all."""
    require("\0" not in str(path), name, str(path), "a path")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody who has no home here
        raise BadInput(f"{name} is {str(path)!r}; allowed: a path; there is no such user.") from None


def load_settings(
    path: str | Path | None = None, env: Mapping[str, str] | None = None, *, overrides: Mapping[str, str | None] = {}
) -> Settings:
    """Read the settings.

    Args:
        path: the file to read; by default `LLMCOURSE_SETTINGS`, else the nearest `settings.ini` with an `[llmcourse]`
            section in this folder or above, else the course's own.
        env: the environment; every `LLMCOURSE_<KEY>` in it overrides the file.
        overrides: values by key, e.g. `{"scale": "gpu"}`, which go over both; None means not given.
    Raises:
        BadInput: an unknown key, section or variable, or a value that is not allowed.
    """
    env = os.environ if env is None else env
    source = Path(path) if path is not None else _find_settings(env)
    require(source.is_file(), "settings file", str(source), "an existing file")
    # no section of defaults: [DEFAULT] is as unknown as any other
    parser = configparser.ConfigParser(interpolation=None, default_section="no such section")
    try:
        parser.read_string(read_text(source, "settings file"))
    except configparser.Error as e:
        raise BadInput(f"settings file is {str(source)!r}; allowed: INI syntax ({str(e).splitlines()[0]}).") from None
    require("llmcourse" in parser, "settings file", str(source), "a file with an [llmcourse] section")

    top_keys = [f.name for f in fields(Settings) if f.name != "source"]
    scale_keys = [f.name for f in fields(Scale) if f.name != "name"]
    scales = [s.removeprefix("scale.") for s in parser.sections() if s.startswith("scale.")]
    for section in parser.sections():
        known = top_keys if section == "llmcourse" else scale_keys if section.startswith("scale.") else None
        require(known is not None, "settings section", section, "llmcourse, scale.NAME")
        for key in parser[section]:
            require(key in known, f"settings key in [{section}]", key, ", ".join(known))

    given = {k.removeprefix(ENV_PREFIX).lower(): v for k, v in env.items() if k.startswith(ENV_PREFIX)}
    # the file that is read here; what clients of `llmcourse serve` have to show; the seed of a class's exercise sheets
    for name in ("settings", "api_key", "sheet_seed"):
        given.pop(name, None)
    for key in given:
        require(
            key in (*top_keys, *scale_keys),
            "environment variable",
            ENV_PREFIX + key.upper(),
            ", ".join(ENV_PREFIX + k.upper() for k in ("settings", *top_keys, *scale_keys)),
        )

    given |= {key: str(value) for key, value in overrides.items() if value is not None}

    def value(section: str, key: str) -> str:
        if key in given:
            return given[key].strip()
        require(
            key in parser[section],
            f"settings key in [{section}]",
            f"{key} (missing)",
            "every key of the shipped settings.ini",
        )
        return parser[section][key].strip()

    chosen = value("llmcourse", "scale")
    require(chosen in scales, "scale", chosen, ", ".join(scales))
    home = value("llmcourse", "home")
    if not home:
        from platformdirs import user_cache_path  # only needed for the default

        home = user_cache_path("llmcourse", appauthor=False)
    offline = value("llmcourse", "offline").lower()
    require(offline in _TRUE | _FALSE, "offline", offline, "true, false")
    return Settings(
        model=value("llmcourse", "model"),
        data=value("llmcourse", "data"),
        scale=Scale(name=chosen, **{k: _whole(k, value(f"scale.{chosen}", k), 1, LARGEST) for k in scale_keys}),
        seed=_whole("seed", value("llmcourse", "seed"), 0, 2**32 - 1),
        home=expanded("home", home).absolute(),
        offline=offline in _TRUE,
        device=value("llmcourse", "device"),
        dtype=value("llmcourse", "dtype"),
        kernels=str(one_of("kernels", value("llmcourse", "kernels"), ("auto", "int4", "portable"))),
        source=source,
    )
