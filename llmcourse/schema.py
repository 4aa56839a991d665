"""Tables that a person wrote (recipes, configurations) read into dataclasses.

Hand-written: this is plumbing, not a lesson. pydantic checks names and types, strictly: "4", 4.0 and true are no whole
number. Ranges are checked by the dataclass itself. pydantic is imported when a table is read, not with the package.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmcourse.settings import BadInput, read_text, require

__all__ = ["parse", "read_toml"]

T = TypeVar("T")
_ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "missing": "a list with more entries",
    "too_long": "a list with fewer entries",
    "dataclass_type": "a table",
    "unexpected_keyword_argument": "no key of this name",
}


def read_toml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        BadInput: no such file, not UTF-8, or not TOML.
    """
    path = Path(path)
    require(path.is_file(), what, str(path), "the path of a .toml file")
    try:
        return tomllib.loads(read_text(path, what))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{what} is {str(path)!r}; allowed: TOML ({str(e) or 'nested too deep'}).") from None


def parse(cls: type[T], table: Any, where: str, *, given: Mapping[str, Any] | None = None) -> T:
    """`cls(**table, **given)` for a dataclass, after a strict check of every name and type.

    Args:
        cls: a dataclass; the fields that a table may have are its fields with an `init`.
        table: what the person wrote.
        where: how a complaint calls the table, e.g. "recipe" or "arm 'a'".
        given: fields that the person does not choose.
    Raises:
        BadInput: one sentence with the key, the value and what is allowed.
    """
    import pydantic

    require(isinstance(table, Mapping), where, table, "a table")
    given = dict(given or {})
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in given}
    needed = lambda f: f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    model = pydantic.create_model(
        cls.__name__,
        __config__=pydantic.ConfigDict(
            strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
        ),
        # keys of their own (k0, k1 …) with the name as alias: a field called "schema" or "copy" is nothing special
        **{
            f"k{i}": (types[name], pydantic.Field(... if needed(f) else None, alias=name))
            for i, (name, f) in enumerate(fields.items())
        },
    )
    try:
        # read as JSON, where a list may stand for a tuple; what JSON does not know (a date) becomes text
        checked = model.model_validate_json(json.dumps(table, default=str))
    except pydantic.ValidationError as e:
        raise BadInput(_sentence(e.errors(), table, where, list(fields))) from None
    values = {name: getattr(checked, f"k{i}") for i, name in enumerate(fields) if name in table}
    try:
        return cls(**values, **given)
    except BadInput as e:  # a range, checked by the class itself
        raise BadInput(f"{where}: {e}") from e


def _sentence(errors: list[dict], table: Any, where: str, names: list[str]) -> str:
    """One sentence for pydantic's first complaint (a field that may be of two types gets one for each)."""

    def found(location: tuple) -> tuple[tuple, Any]:
        path, value = (), table
        for step in location:  # the steps that lead into what was written; the rest are names of types
            inside = (
                step in value if isinstance(value, Mapping) else isinstance(value, list) and step in range(len(value))
            )
            path, value = ((*path, step), value[step]) if inside else (path, value)
        return path, value

    # what only a program can give (a module) is not offered to somebody who writes a table
    errors = [e for e in errors if e["type"] != "needs_python_object"] or errors
    errors = sorted(errors, key=lambda e: e["type"] != "extra_forbidden")  # a slip in a key also makes one missing
    first = errors[0]
    path, value = found(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"key in {where} is {str(first['loc'][-1])!r}; allowed: {', '.join(names)}."
    if first["type"] == "value_error":  # a range inside a table within the table
        return f"{'.'.join(map(str, path))} in {where}: {first['ctx']['error']}"
    if first["type"] == "missing" and (not path or isinstance(value, Mapping)):
        name, inside = first["loc"][-1], "".join(f"{step} of " for step in path)
        return f"key in {inside}{where} is '{name} (missing)'; allowed: a table with {name}."
    here = [e for e in errors if found(e["loc"])[0] == path]
    allowed = dict.fromkeys(
        e["ctx"]["expected"] if e["type"] == "literal_error" else _ALLOWED.get(e["type"], e["msg"].lower())
        for e in here
    )
    return f"{'.'.join(map(str, path))} in {where} is {value!r}; allowed: {' or '.join(allowed)}."
