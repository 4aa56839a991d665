"""The book without Quarto: `python tools/book.py`, from the same `_quarto.yml` and the same notebooks.

Nothing is run: the outputs saved in the notebooks are shown. Pandoc does the conversion; it comes with the Python
package pypandoc_binary (the extra `book`), so nothing has to be installed beside Python. The pages lie where Quarto
puts them and need no server, no network and no script: opened as a file they are whole, and where scripts run the
search works there, too. The look stands in tools/book/; its colors and fonts are those of nbs/_theme, as in Quarto's
edition.
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
import json
import os
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote, unquote

import jinja2
import yaml
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parent.parent
LOOK = Path(__file__).resolve().parent / "book"
# What Quarto reads, less what has a meaning only there: all citations are links already (tools/form.py).
READER = "markdown-citations-example_lists"
# A pipe table with a line longer than this gets columns of equal width; a browser divides them better.
COLUMNS = "--columns=1000000"
# Pandoc takes four times as long to color code as to do all the rest of a page: `colored` does it.
PLAIN_CODE = "--syntax-highlighting=none"
# A formula in a sentence that has more letters of TeX than this may be wider than a telephone: there it scrolls.
LONG = 34
EPUB = "llmcourse.epub"

WORDS = {
    "en": {
        "skip": "Skip to the text",
        "chapters": "Chapters",
        "toc": "On this page",
        "search": "Search",
        "search_label": "Search the book",
        "code": "Code",
        "previous": "Previous",
        "next": "Next",
        "around": "Previous and next chapter",
        "notebook": "This page as a notebook",
        "other": "中文",
        "table": "Table",
    },
    "zh": {
        "skip": "跳到正文",
        "chapters": "章节",
        "toc": "本页内容",
        "search": "搜索",
        "search_label": "搜索全书",
        "code": "代码",
        "previous": "上一章",
        "next": "下一章",
        "around": "上一章与下一章",
        "notebook": "本页的笔记本",
        "other": "English",
        "table": "表格",
    },
}


class BookError(Exception):
    """What is wrong, in one sentence, for the person who called the program."""


# ------------------------------------------------------------------------------------- the sources


# the loader in C is many times faster, where PyYAML was built with it; the notebooks have thousands of options
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(words: str):
    return yaml.load(words, LOADER)


def text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def options(source: str) -> tuple[dict, str]:
    """The `#| key: value` lines at the head of a code cell, and the code below them."""
    lines = source.split("\n")
    n = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    given = read_yaml("\n".join(line[2:].removeprefix(" ") for line in lines[:n])) if n else {}
    return given or {}, "\n".join(lines[n:]).strip("\n")


@dataclass(frozen=True)
class Chapter:
    """One page: where it comes from, where it goes, and what the lists of chapters say of it."""

    source: str  # nbs/03_attention.ipynb
    page: str  # nbs/attention.html
    title: str
    subtitle: str
    lang: str
    part: str  # "" before the first one
    in_list: str  # what the list of chapters calls it

    @property
    def number(self) -> str:
        match = re.match(r"(\d+[a-z]?)_", posixpath.basename(self.source))
        return match[1] if match else ""

    @property
    def key(self) -> str:
        """Begins every anchor of the chapter in the EPUB, where all anchors have to differ."""
        return self.page.removeprefix("nbs/").removesuffix(".html").replace("/", "-")


def source_text(root: Path, source: str) -> str:
    path = root / source
    if not path.is_file():
        raise BookError(f"_quarto.yml lists {source}, which is not there.")
    return path.read_text(encoding="utf8")


def front_matter(root: Path, source: str) -> tuple[dict, str]:
    """The YAML at the head of a chapter, read, and as it stands there."""
    whole = source_text(root, source)
    if source.endswith(".ipynb"):
        cells = json.loads(whole)["cells"]
        whole = text(cells[0]["source"]) if cells and cells[0]["cell_type"] == "raw" else ""
    match = re.match(r"---\n(.*?)\n---\s*(?:\n|$)", whole, re.S)
    if not match:
        raise BookError(f"{source} does not begin with a front matter between two lines ---.")
    return read_yaml(match[1]), match[0]


@dataclass(frozen=True)
class Book:
    """The configuration, and the chapters in reading order."""

    root: Path
    config: dict
    chapters: tuple[Chapter, ...]

    @classmethod
    def read(cls, root: Path = ROOT) -> Book:
        config = read_yaml(source_text(root, "_quarto.yml"))
        found: list[Chapter] = []

        def walk(items: list, part: str) -> None:
            for item in items:
                if isinstance(item, dict) and "part" in item:
                    walk(item["chapters"], item["part"])
                    continue
                source = item["file"] if isinstance(item, dict) else item
                meta = front_matter(root, source)[0]
                stem = posixpath.basename(source).rsplit(".", 1)[0]
                page = posixpath.join(posixpath.dirname(source), meta.get("output-file", f"{stem}.html"))
                found.append(
                    Chapter(
                        source=source,
                        page=page,
                        title=str(meta["title"]),
                        subtitle=" ".join(str(meta.get("subtitle", "")).split()),
                        lang=str(meta.get("lang", "en"))[:2],
                        part=part,
                        in_list=str(item.get("text", meta["title"]) if isinstance(item, dict) else meta["title"]),
                    )
                )

        walk(config["book"]["chapters"], "")
        pages = [c.page for c in found]
        twice = next((p for p in pages if pages.count(p) > 1), None)
        if twice:
            raise BookError(f"two chapters have the page {twice}: each output-file has to differ.")
        return cls(root, config, tuple(found))

    def by_source(self) -> dict[str, Chapter]:
        return {c.source: c for c in self.chapters}


# ----------------------------------------------------------------------------------------- pandoc


@functools.cache
def pandoc() -> str:
    try:
        import pypandoc
    except ImportError:
        raise BookError(
            "The book needs pandoc from the package pypandoc_binary: pip install -e '.[book]' brings it."
        ) from None
    return pypandoc.get_pandoc_path()


def run_pandoc(args: list[str], given: str, what: str, cwd: Path, **env: str) -> str:
    """Pandoc's answer. What it only warns of (a formula, a picture) would be missing in the book: it is an error."""
    done = subprocess.run(
        [pandoc(), *args],
        input=given.encode(),
        cwd=cwd,
        capture_output=True,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8"} | env,
    )
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or "[WARNING]" in said:
        raise BookError(f"{what}: pandoc says: {said[:1500]}")
    return done.stdout.decode()


# --------------------------------------------------------------------- from a notebook to Markdown


@dataclass
class Piece:
    """A code cell, or one of its outputs, that stands in the Markdown as a numbered place."""

    kind: str  # code, stream, html, figure, table
    body: str = ""
    label: str = ""
    fold: str | None = None  # the words to open it by
    file: str = ""
    size: tuple[int, int] = (0, 0)
    alt: str = ""


FENCE = ":::::::::"


def png_size(data: bytes, said: str) -> tuple[int, int]:
    """In CSS pixels: what the figure says of itself, or else the pixels of the file."""
    match = re.match(r"<(?:Plot|Figure) size ([\d.]+)x([\d.]+)", said)
    if match:
        return round(float(match[1])), round(float(match[2]))
    return struct.unpack(">II", data[16:24])


def inside(caption: str) -> str:
    """The words of a caption cell, without the div around them."""
    return re.sub(r"</?div[^>]*>", "", caption).strip()


def as_markdown(book: Book, chapter: Chapter) -> tuple[str, list[Piece], dict[str, bytes]]:
    """The chapter in Markdown, the pieces for its numbered places, and its pictures by file name."""
    if not chapter.source.endswith(".ipynb"):
        whole = source_text(book.root, chapter.source)
        include = re.compile(r"\{\{< include (\S+) >\}\}")
        return include.sub(lambda m: source_text(book.root, m[1]), whole), [], {}
    cells = json.loads(source_text(book.root, chapter.source))["cells"]
    captions = {str(c.get("id", "")): text(c["source"]) for c in cells if c["cell_type"] == "markdown"}
    out, pieces, pictures = [front_matter(book.root, chapter.source)[1]], [], {}

    def place(piece: Piece, content: str = "") -> None:
        out.append(f'{FENCE} {{.piece n="{len(pieces)}"}}\n{content}\n{FENCE}')
        pieces.append(piece)

    for i, cell in enumerate(cells[1:], 1):
        source = text(cell["source"])
        where = f"{chapter.source}, cell {i}"
        if cell["cell_type"] == "markdown":
            if not str(cell.get("id", "")).endswith("-caption"):
                out.append(source)
            continue
        if cell["cell_type"] != "code":
            raise BookError(f"{where} is a {cell['cell_type']} cell; allowed: code and markdown.")
        given, code = options(source)
        if given.get("include") is False:
            continue
        if code and given.get("echo") is not False:
            summary = str(given.get("code-summary", WORDS[chapter.lang]["code"])) if given.get("code-fold") else None
            place(Piece("code", code, fold=summary))
        for output in cell["outputs"]:
            data = {kind: text(value) for kind, value in output.get("data", {}).items()}
            label = str(given.get("label", ""))
            if output["output_type"] == "stream":
                place(Piece("stream", text(output["text"])))
            elif "image/png" in data:
                picture = base64.b64decode(data["image/png"])
                name = f"{chapter.key}-{label or len(pieces)}.png"
                pictures[name] = picture
                size = png_size(picture, data.get("text/plain", ""))
                piece = Piece("figure", label=label, file=name, size=size, alt=str(given.get("fig-alt", "")))
                place(piece, inside(captions.get(f"{cell.get('id')}-caption", "")))
            elif "text/html" in data:
                caption = inside(captions.get(f"{cell.get('id')}-caption", ""))
                place(Piece("html", data["text/html"], label=label), caption if label else "")
            elif "text/markdown" in data:
                caption = f"\n\n: {given['tbl-cap']}" if "tbl-cap" in given else ""
                place(Piece("table", label=label), data["text/markdown"].strip() + caption)
            elif "text/plain" in data:
                place(Piece("stream", data["text/plain"]))
            else:
                kinds = ", ".join(data) or output["output_type"]
                raise BookError(f"{where} has an output of type {kinds}; allowed: text, Markdown, HTML and PNG.")
    return "\n\n".join(out) + "\n", pieces, pictures


# ------------------------------------------------------------------------------- pandoc's tree

NO_ATTR = ["", [], []]


def raw(html: str) -> dict:
    return {"t": "RawBlock", "c": ["html", html]}


def div(classes: list[str], blocks: list, name: str = "", attributes: dict | None = None) -> dict:
    return {"t": "Div", "c": [[name, classes, [[k, v] for k, v in (attributes or {}).items()]], blocks]}


def changed(node, change):
    """A new tree: each element replaced by what `change` gives for it (one, or a list of them), from the leaves up."""
    if isinstance(node, list):
        new = []
        for item in node:
            made = changed(item, change)
            if isinstance(item, dict) and isinstance(made, list):
                new += made
            else:
                new.append(made)
        return new
    if isinstance(node, dict):
        return change({k: changed(v, change) for k, v in node.items()})
    return node


def words_of(node) -> str:
    """What a reader could search for in a part of the tree."""
    if isinstance(node, list):
        return "".join(map(words_of, node))
    if not isinstance(node, dict):
        return ""
    kind, c = node.get("t"), node.get("c")
    if kind == "Str":
        return c
    if kind in ("Space", "SoftBreak", "LineBreak"):
        return " "
    if kind in ("Code", "CodeBlock", "Math"):
        return c[1] + ("\n" if kind == "CodeBlock" else "")
    if kind in ("RawBlock", "RawInline"):
        return re.sub(r"<[^>]*>", " ", c[1])
    if kind == "Quoted":
        return f"“{words_of(c[1])}”"
    inner = words_of(c) if isinstance(c, list) else ""
    blocks = ("Para", "Plain", "Header", "Div", "Table", "BulletList", "OrderedList", "DefinitionList", "Figure")
    return inner + " \n" if kind in blocks else inner


def sections(chapter: Chapter, blocks: list) -> Iterator[tuple[str, str, str]]:
    """(anchor, heading, words) of the chapter, one for each heading that is in its table of contents."""
    name, heading, found = "", "", []
    for block in flat(blocks):
        if block["t"] == "Header" and block["c"][0] <= 3:
            yield name, heading, " ".join("".join(found).split())
            name, heading, found = block["c"][1][0], words_of(block["c"][2]).strip(), []
        else:
            found.append(words_of(block) + " ")
    yield name, heading, " ".join("".join(found).split())


def flat(blocks: list) -> Iterator[dict]:
    """The blocks in order; a div without a class of its own is no more than what it holds."""
    for block in blocks:
        if block["t"] == "Div" and not {"piece", "table"} & set(block["c"][0][1]):
            yield from flat(block["c"][1])
        else:
            yield block


def language(short: str) -> str:
    return "zh-Hans" if short == "zh" else short


def relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


class Maker:
    """Makes the pages of a book."""

    def __init__(self, book: Book):
        self.book = book
        self.chapters = book.by_source()
        self.look = jinja2.Environment(
            loader=jinja2.FileSystemLoader(LOOK),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )

    # -- reading

    def tree(self, chapter: Chapter) -> tuple[dict, dict[str, bytes], set[str]]:
        """Pandoc's tree of a chapter, with its code and figures in place; its pictures; the files that it names."""
        markdown, pieces, pictures = as_markdown(self.book, chapter)
        args = ["-f", READER, "-t", "json", COLUMNS]
        for name in filters(self.book, chapter):
            args += ["--lua-filter", str(self.book.root / name)]
        tree = json.loads(run_pandoc(args, markdown, chapter.source, self.book.root))
        files: set[str] = set()
        group = {"role": "group", "aria-label": WORDS[chapter.lang]["table"]}

        def change(node: dict):
            kind, c = node.get("t"), node.get("c")
            if kind == "Div" and "piece" in c[0][1]:
                n = int(dict(c[0][2])["n"])
                return self.piece(chapter, pieces[n], c[1])
            if kind == "Div" and "course-nav" in c[0][1]:
                return []  # the page has its own
            if kind == "Table":
                return div(["table"], [node], attributes=group)
            if kind == "Link":
                return self.link(chapter, node, files)
            if kind == "Image":
                c[2][0] = self.picture(chapter, c[2][0], files)
            if kind == "Math" and c[0]["t"] == "InlineMath" and len(c[1]) > LONG:
                return {"t": "Span", "c": [["", ["long"], []], [node]]}
            return node

        tree["blocks"] = changed(tree["blocks"], change)
        return tree, pictures, files

    def link(self, chapter: Chapter, node: dict, files: set[str]):
        target = node["c"][2][0]
        if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            return node
        path, _, anchor = target.partition("#")
        source = posixpath.normpath(posixpath.join(posixpath.dirname(chapter.source), unquote(path)))
        if source in self.chapters:
            target = relative(self.chapters[source].page, chapter.page) + (f"#{anchor}" if anchor else "")
        elif (self.book.root / source).is_file():
            files.add(source)
            target = relative(source, chapter.page)
        elif (self.book.root / source).is_dir():
            return node["c"][1]  # a folder is no page: its name alone
        else:
            raise BookError(f"{chapter.source} links to {target}, which is not there.")
        node["c"][2][0] = quote(target, safe="/#.-_~%")
        return node

    def picture(self, chapter: Chapter, target: str, files: set[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(chapter.source), unquote(target)))
        if not (self.book.root / source).is_file():
            raise BookError(f"{chapter.source} shows the picture {target}, which is not there.")
        files.add(source)
        return relative(source, chapter.page)

    def piece(self, chapter: Chapter, piece: Piece, content: list) -> list | dict:
        if piece.kind == "code":
            block = {"t": "CodeBlock", "c": [["", ["python"], []], piece.body]}
            if piece.fold is None:
                return div(["piece", "cell"], [block])
            opened = raw(f'<details class="fold"><summary>{escape(piece.fold)}</summary>')
            return div(["piece", "cell"], [opened, block, raw("</details>")])
        if piece.kind == "stream":
            return div(["piece", "output"], [{"t": "CodeBlock", "c": [NO_ATTR, piece.body.rstrip("\n")]}])
        if piece.kind == "html" and piece.label:  # a figure that can be moved
            figure = [[piece.label, [], []], [None, content], [raw(piece.body)]]
            return div(["piece"], [{"t": "Figure", "c": figure}])
        if piece.kind == "html":
            group = {"role": "group", "aria-label": WORDS[chapter.lang]["table"]}
            return div(["piece", "output"], [div(["table"], [raw(piece.body)], attributes=group)])
        if piece.kind == "table":
            return div(["piece", "output"], content, piece.label)
        width, height = map(str, piece.size)
        source = f"figures/{piece.file}"
        description = [{"t": "Str", "c": piece.alt}]
        image = {"t": "Image", "c": [["", [], [["width", width], ["height", height]]], description, [source, ""]]}
        link = {"t": "Link", "c": [["", ["picture"], []], [image], [source, ""]]}
        figure = [[piece.label, [], []], [None, content], [{"t": "Plain", "c": [link]}]]
        return div(["piece"], [{"t": "Figure", "c": figure}])

    # -- writing

    def page(self, chapter: Chapter, tree: dict, epub: bool) -> str:
        """The HTML of a chapter."""
        args = ["-f", "json", "-t", "html5", "--mathml", "--toc", "--toc-depth=3", "--wrap=none", PLAIN_CODE]
        args += ["--template", str(LOOK / "pandoc.html")]
        html = run_pandoc(args, json.dumps(tree | {"meta": {}}), chapter.source, self.book.root)
        toc, body = html.split("<!-- the text -->", 1)
        order = self.book.chapters
        i = order.index(chapter)
        config = self.book.config["book"]
        return self.look.get_template("page.html.j2").render(
            book=config,
            words=WORDS[chapter.lang],
            language=language,
            chapter=chapter,
            home=order[0],
            parts=parts(order),
            here=lambda target: quote(relative(target, chapter.page), safe="/.-_~"),
            previous=order[i - 1] if i else None,
            next=order[i + 1] if i + 1 < len(order) else None,
            other=self.other(chapter),
            toc=toc.strip(),
            body=tidy(body.strip()),
            epub=EPUB if epub else "",
        )

    def other(self, chapter: Chapter) -> Chapter | None:
        """The same page in the other language."""
        folder, name = posixpath.split(chapter.source)
        twin = f"nbs/{name}" if folder.endswith("/zh") else f"{folder}/zh/{name}"
        return self.chapters.get(twin)


def filters(book: Book, chapter: Chapter) -> list[str]:
    """The Lua filters that Quarto would run: those of the book and those of the page."""
    own = front_matter(book.root, chapter.source)[0].get("filters", [])
    return [*book.config.get("filters", []), *own]


def parts(chapters: Iterable[Chapter]) -> list[tuple[str, list[Chapter]]]:
    grouped: list[tuple[str, list[Chapter]]] = []
    for chapter in chapters:
        if not grouped or grouped[-1][0] != chapter.part:
            grouped.append((chapter.part, []))
        grouped[-1][1].append(chapter)
    return grouped


# The few kinds of words that code has a color for: what Pygments calls them, and the class of the page.
KINDS = {
    Token.Comment: "co",
    Token.Literal.String.Doc: "co",
    Token.Keyword: "kw",
    Token.Operator.Word: "kw",
    Token.Literal.String: "st",
    Token.Literal.Number: "nu",
    Token.Name.Function: "fu",
    Token.Name.Class: "fu",
    Token.Name.Builtin: "fu",
    Token.Name.Decorator: "fu",
}


@functools.cache
def kind_of(token: object) -> str:
    while token is not Token:
        if token in KINDS:
            return KINDS[token]
        token = token.parent
    return ""


def colored(code: str, language: str) -> str:
    """Code as HTML; neighbors of one kind share an element."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code, quote=False)
    out = []
    for kind, run in itertools.groupby(lexer.get_tokens(code), lambda pair: kind_of(pair[0])):
        words = escape("".join(word for _, word in run), quote=False)
        out.append(f'<span class="{kind}">{words}</span>' if kind and words.strip() else words)
    return "".join(out)


def tidy(html: str) -> str:
    """Pandoc's HTML with colors for code; an empty cell at the head of a table is no heading."""
    html = re.sub(
        r'<pre\s+class="([\w-]+)"><code>(.*?)</code></pre>',
        lambda m: f'<div class="code"><pre><code>{colored(unescape(m[2]), m[1])}</code></pre></div>',
        html,
        flags=re.S,
    )
    return re.sub(r"<th\b([^>]*)>\s*</th>", r"<td\1></td>", html)


def palette(scss: str) -> dict[str, str]:
    """The variables that a theme of Quarto's sets: `$body-bg: #fdfdfb !default;`."""
    found = re.findall(r"^\$([\w-]+):\s*(.*?)\s*(?:!default)?;", scss, re.M)
    return {name: value for name, value in found if "$" not in value}


def style(root: Path) -> str:
    """book.css, after the colors and fonts of Quarto's theme."""
    light, dark = (palette(source_text(root, f"nbs/_theme/book{kind}.scss")) for kind in ("", "-dark"))

    def rules(values: dict[str, str]) -> str:
        return "".join(f"  --{name}: {value};\n" for name, value in values.items())

    head = f":root {{\n{rules(light)}}}\n@media (prefers-color-scheme: dark) {{\n:root {{\n{rules(dark)}}}\n}}\n"
    return head + (LOOK / "book.css").read_text(encoding="utf8")


def search_index(book: Book, trees: dict[str, dict]) -> str:
    """A script that says where the words stand; a script may be loaded from a file, data may not."""
    pages = [[c.page, " ".join([c.number, c.in_list]).strip(), c.lang] for c in book.chapters]
    places = []
    for i, chapter in enumerate(book.chapters):
        for anchor, heading, words in sections(chapter, trees[chapter.source]["blocks"]):
            if not anchor:
                words = f"{chapter.subtitle} {words}".strip()
            if words or heading:
                places.append([i, anchor, heading, words])
    data = json.dumps({"pages": pages, "places": places}, ensure_ascii=False, separators=(",", ":"))
    return f"window.bookIndex = {data};\n"


# ------------------------------------------------------------------------------------------ EPUB


def for_epub(book: Book, chapter: Chapter, tree: dict) -> list:
    """A chapter as a part of one long document: its anchors carry its name, pictures lie where the book has them."""
    pages = {c.page: c for c in book.chapters}
    folder = posixpath.dirname(chapter.page)

    def change(node: dict):
        kind, c = node.get("t"), node.get("c")
        at = {"Header": 1, "Div": 0, "Span": 0, "Code": 0, "CodeBlock": 0, "Link": 0, "Image": 0, "Figure": 0}.get(kind)
        if at is not None and c[at][0]:
            c[at][0] = f"{chapter.key}--{c[at][0]}"
        if kind == "Image":
            c[2][0] = posixpath.normpath(posixpath.join(folder, c[2][0]))
        if kind == "Link":
            target = c[2][0]
            if "picture" in c[0][1]:
                return c[1]
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                return node
            path, _, anchor = target.partition("#")
            page = posixpath.normpath(posixpath.join(folder, unquote(path))) if path else chapter.page
            if page not in pages:
                return c[1]  # a file that is not in the EPUB
            key = pages[page].key
            c[2][0] = f"#{key}--{anchor}" if anchor else f"#{key}"
        if kind in ("RawBlock", "RawInline"):
            c[1] = re.sub(r"<script\b.*?</script>\s*", "", c[1], flags=re.S)  # the still picture stays
            c[1] = re.sub(r'\bid="([^"]+)"', rf'id="{chapter.key}--\1"', c[1])
        return node

    name = f"{chapter.number} {chapter.in_list}".strip()
    lang = language(chapter.lang)
    title = {"t": "Header", "c": [1, [chapter.key, [], [["lang", lang]]], [{"t": "Str", "c": name}]]}
    promise = {"t": "Para", "c": [{"t": "Emph", "c": [{"t": "Str", "c": chapter.subtitle}]}]}
    blocks = [promise, *changed(tree["blocks"], change)]
    return [title, *(blocks if lang == "en" else [div([], blocks, attributes={"lang": lang})])]


def commit_time(root: Path) -> str:
    """When the sources were committed: the same checkout gives the same bytes. Without git, the oldest day of a zip."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return os.environ["SOURCE_DATE_EPOCH"]
    try:
        asked = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "315532800"


def write_epub(book: Book, trees: dict[str, dict], folder: Path) -> None:
    config = book.config["book"]
    blocks = [b for c in book.chapters for b in for_epub(book, c, trees[c.source])]
    meta = {
        "title": config["title"],
        "subtitle": config["subtitle"],
        "description": config["description"],
        "lang": "en",
        "rights": config["page-footer"]["left"],
        "identifier": f"urn:llmcourse:{config['page-footer']['right'].split()[-1]}",
    }
    tree = {
        "pandoc-api-version": trees[book.chapters[0].source]["pandoc-api-version"],
        "meta": {k: {"t": "MetaString", "c": v} for k, v in meta.items()},
        "blocks": blocks,
    }
    args = ["-f", "json", "-t", "epub3", "--mathml", "--split-level=1", "--toc-depth=1", "--wrap=none", PLAIN_CODE]
    args += ["--css", str(LOOK / "epub.css"), "-o", EPUB]
    run_pandoc(args, json.dumps(tree), EPUB, folder, SOURCE_DATE_EPOCH=commit_time(book.root))


# ----------------------------------------------------------------------------------- the whole book


def make(book: Book, folder: Path, epub: bool = False, jobs: int = 2) -> None:
    """Writes the whole book into `folder`, which is empty."""
    maker = Maker(book)
    trees: dict[str, dict] = {}
    files: set[str] = set()

    def one(chapter: Chapter) -> tuple[str, dict, set[str]]:
        tree, pictures, named = maker.tree(chapter)
        page = folder / chapter.page
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(maker.page(chapter, tree, epub), encoding="utf8")
        for name, data in pictures.items():
            (page.parent / "figures").mkdir(exist_ok=True)
            (page.parent / "figures" / name).write_bytes(data)
        return chapter.source, tree, named

    with ThreadPoolExecutor(jobs) as pool:
        for source, tree, named in pool.map(one, book.chapters):
            trees[source] = tree
            files |= named
    resources = book.config["project"].get("resources", [])
    files |= {p.relative_to(book.root).as_posix() for pattern in resources for p in book.root.glob(pattern)}
    files |= {c.source for c in book.chapters if c.source.endswith(".ipynb")} | {"LICENSE"}
    for name in sorted(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(book.root / name, folder / name)
    shutil.copyfile(book.root / book.config["book"]["favicon"], folder / "favicon.svg")
    shutil.copyfile(LOOK / "book.js", folder / "book.js")
    (folder / "book.css").write_text(style(book.root), encoding="utf8")
    (folder / "search-index.js").write_text(search_index(book, trees), encoding="utf8")
    if epub:
        write_epub(book, trees, folder)


def build(out: Path, epub: bool = False, jobs: int = 2, root: Path = ROOT) -> None:
    """Makes the book beside `out` and puts it there when it is whole."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "index.html").is_file())):
        raise BookError(f"--out is {out}; allowed: a folder that is new, empty, or holds a book.")
    book = Book.read(root)
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        make(book, new, epub, jobs)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_book", help="the folder of the book (default: _book)")
    parser.add_argument("--epub", action="store_true", help=f"also write {EPUB} into it")
    parser.add_argument("--jobs", type=int, default=2, help="chapters at a time (default: 2)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; allowed: 1 or more.")
    started = time.monotonic()
    try:
        build(args.out.resolve(), args.epub, args.jobs)
    except BookError as e:
        print(e, file=sys.stderr)
        return 1
    print(f"The book is {args.out / 'index.html'}: open it in a browser ({time.monotonic() - started:.0f} s).")
    if args.epub:
        print(f"For a reader of EPUB: {args.out / EPUB}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
