"""The parts of a notebook that follow from other files, and the two forms of a chapter kept in agreement.

    python tools/form.py [NOTEBOOK …]            write head, foot, captions, reading minutes and citations
    python tools/form.py --convert [NOTEBOOK …]  and replace Quarto's own syntax by what JupyterLab shows too
    python tools/form.py --check                 change nothing; exit 1 when something is out of date

A chapter is met in JupyterLab first and as a page second, so it holds no syntax that only one of them knows.
Generated, and never to be edited by hand:

- the first Markdown cell (id `head`): title, promise, what to read first, minutes, sources, sheet, the modules that it
  makes (in nbs/94_reference.ipynb, from tools/reference.py), links to the neighbors and to the page in Chinese, where
  there is one (tools/translate.py);
- the last cell (id `foot`): the sheet with its command, and the links again;
- a caption after each figure (id `…-caption`): JupyterLab shows no `fig-cap`. The page drops it and shows Quarto's own;
- the table of chapters and sheets (id `contents`) of the tour;
- the tables of what the source articles speak about and where it is taught (id `topics`), from nbs/_topics.yml and from
  `covers` in the front matter of the chapters;
- a citation `[@key]`: a link to the entry in nbs/93_references.ipynb, which is made here from references.bib;
- `#| code-fold: true` in a cell that draws a figure or only imports: on the page its code waits behind a button.
  Where the code is the lesson the cell says `code-fold: false`;
- `minutes-read` in the front matter: words / 200 + visible lines of code / 10, rounded up.

The front matter stays the first cell, a raw one that JupyterLab shows folded. Cells with `#| include: false` are
folded too.
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import re
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
REFERENCES = "93_references.ipynb"
PACKAGE_PAGE = "94_reference.ipynb"  # made by tools/reference.py
WORDS, LINES = 200, 10  # read in one minute
FOLDED = {"source_hidden": True}

# ------------------------------------------------------------------------------------- the book


@functools.cache
def reading_order() -> list[str]:
    """The notebooks of the book, in the order of _quarto.yml."""
    text = (ROOT / "_quarto.yml").read_text(encoding="utf8")
    found = re.findall(r"^\s*- (?:file: )?nbs/([\w-]+\.ipynb)", text, re.M)
    return list(dict.fromkeys(found))


def front_matter(nb: nbformat.NotebookNode) -> dict:
    source = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "raw" else ""
    return yaml.safe_load(source.strip().strip("-")) or {}


@functools.cache
def title_of(name: str) -> str:
    return front_matter(nbformat.read(NBS / name, 4))["title"]


@functools.cache
def chapters() -> dict[str, str]:
    """Name of a chapter without its number -> file."""
    return {re.sub(r"^\d+\w?_", "", Path(f).stem): f for f in reading_order()}


@functools.cache
def sheets() -> dict[str, list[dict]]:
    """Number of a chapter, as text -> its sheets: path of the learner's copy, exercises, minutes."""
    sys.path.insert(0, str(ROOT))
    from llmcourse.practice import checking

    found: dict[str, list[dict]] = {}
    for sheet in checking.sheets():
        exercises = list(checking.load_sheet(sheet).values())
        chapter = exercises[0].chapter
        minutes = sum(ex.minutes for ex in exercises)
        entry = {"sheet": sheet, "path": f"exercises/{chapter}/{sheet}.ipynb", "n": len(exercises), "minutes": minutes}
        found.setdefault(chapter.split("_")[0], []).append(entry)
    return found


# ---------------------------------------------------------------------------------------- topics


def heading_id(heading: str) -> str:
    """The anchor of a heading: lower case, dashes, no punctuation, nothing before the first letter."""
    plain_text = re.sub(r"[^\w\s.-]", "", re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", plain_text.strip().lower()))


def topic_list() -> dict:
    """`articles`, `topics` and `not_yet` of nbs/_topics.yml."""
    return yaml.safe_load((NBS / "_topics.yml").read_text(encoding="utf8"))


@functools.cache
def places() -> dict[str, list[str]]:
    """Topic -> links to the chapters and sections whose front matter says that they teach it, in reading order."""
    found: dict[str, list[str]] = {}
    for name in reading_order():
        nb = nbformat.read(NBS / name, 4)
        text = "\n".join(re.sub(r"(?ms)^```.*?^```", "", c.source) for c in nb.cells if c.cell_type == "markdown")
        sections = {heading_id(h): h.strip() for h in re.findall(r"^#{2,} +(.+)$", text, re.M)}
        meta = front_matter(nb)
        for entry in meta["course"].get("covers", []):
            topic, _, anchor = entry.partition("#")
            if anchor and anchor not in sections:
                raise SystemExit(f"{name}: course.covers names {entry}, and no section has that anchor")
            title = f"{meta['title']} › {sections[anchor]}" if anchor else meta["title"]
            found.setdefault(topic, []).append(f"[{title}]({name}{'#' + anchor if anchor else ''})")
    return found


def topics() -> str:
    """One table an article: each topic, its Chinese name, and where it is taught."""
    known, parts = topic_list(), []
    for letter, article in known["articles"].items():
        mine = {t: topic for t, topic in known["topics"].items() if t[0] == letter}
        head = f'### {letter}: {article["en"]}\n\n<span lang="zh">{article["zh"]}</span>'
        rows = ["| | section | topic | 中文 | taught in |", "|---|---|---|---|---|"]
        for t, topic in mine.items():
            where = "; ".join(places().get(t, [])) or f"*none:* {known['not_yet'].get(t, '')}"
            zh = f'<span lang="zh">{topic["zh"]}</span>'
            rows.append(f"| {t} | {topic['section']} | {topic['en']} | {zh} | {where} |")
        parts.append(head + "\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------ references


@functools.cache
def bibliography() -> dict:
    from pybtex.database import parse_string

    text = re.sub(r"^%.*$", "", (ROOT / "references.bib").read_text(encoding="utf8"), flags=re.M)
    return dict(parse_string(text, "bibtex").entries)


@functools.cache
def plain(text: str) -> str:
    """BibTeX's text without braces and escapes."""
    from pybtex.backends.plaintext import Backend  # `render_as("text")` would look for it among all packages each time
    from pybtex.richtext import Text

    return Text.from_latex(text).render(Backend()).strip()


def surnames(key: str) -> list[str]:
    people = [p for p in bibliography()[key].persons.get("author", []) if str(p) != "others"]
    return [plain(" ".join([*p.prelast_names, *p.last_names])) for p in people]


def short_name(key: str) -> str:
    names = surnames(key)
    if not names:
        return plain(bibliography()[key].fields["title"])
    alone = len(names) == len(bibliography()[key].persons["author"])
    return " & ".join(names) if alone and len(names) <= 2 else f"{names[0]} et al."


def entry_text(key: str) -> str:
    """One entry of the references page, as Markdown."""
    entry = bibliography()[key]
    fields = {k.lower(): v for k, v in entry.fields.items()}
    people = [plain(str(p)) for p in entry.persons.get("author", []) if str(p) != "others"]
    people = [re.sub(r"^(.*?), (.*)$", r"\2 \1", p) for p in people]
    more = len(people) > 8 or len(people) < len(entry.persons.get("author", []))
    who = ", ".join(people[:8]) + (" and others" if more else "")
    keys = ("journal", "booktitle", "institution", "publisher", "howpublished")
    where = next((plain(fields[k]) for k in keys if k in fields), "")
    details = [f"volume {fields['volume']}" if "volume" in fields else "", plain(fields.get("note", ""))]
    link = fields.get("url") or (f"https://doi.org/{fields['doi']}" if "doi" in fields else "")
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", fields.get("note", "")) or re.match(
        r"(\d{4}\.\d{4,5})", fields.get("eprint", "")
    )
    link = link or (f"https://arxiv.org/abs/{arxiv[1]}" if arxiv else "")
    title = f"*{plain(fields['title'])}*"
    parts = [
        f"{who} ({fields['year']})" if who else f"({fields['year']})",
        f"[{title}]({link})" if link else title,
        where,
    ]
    text = ". ".join([p for p in parts if p]) + "".join(f", {d}" for d in details if d)
    return f'- <span id="{key}"></span>{text}.'


def citation(inside: str, before: str) -> str:
    """`@key; @other, page 3` -> links; in parentheses, unless it is a part of the sentence."""
    links = []
    for part in inside.split(";"):
        match = re.match(r"\s*-?@([\w:-]+)(.*)", part)
        key, more = match[1], match[2]
        if key not in bibliography():
            raise SystemExit(f"citation @{key} is not in references.bib")
        links.append((short_name(key), bibliography()[key].fields["year"], key, more))
    in_sentence = re.search(r"(?:^|[.:|]|\b(?:of|in|by|from|why|to|with|that))\s*$", before)
    if in_sentence:
        return ", ".join(f"[{name} ({year})]({REFERENCES}#{key}){more}" for name, year, key, more in links)
    text = "; ".join(f"[{name}, {year}]({REFERENCES}#{key}){more}" for name, year, key, more in links)
    return text if before.rfind("(") > before.rfind(")") else f"({text})"


def outside_code(text: str, change) -> str:
    """`change` applied to what is neither code nor math."""
    parts = re.split(r"(^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$)", text, flags=re.S | re.M)
    return "".join(part if i % 2 else change(part, "".join(parts[:i])) for i, part in enumerate(parts))


def with_citations(text: str) -> str:
    def change(part: str, before: str) -> str:
        done = re.sub(
            r"\[(-?@[A-Za-z][^\]\[]*)\](?!\()",
            lambda m: citation(m[1], (before + part[: m.start()])[-40:].split("\n")[-1]),
            part,
        )
        return re.sub(
            r"(?<![\w@/.\[{(`])@(?!fig-|tbl-|sec-|eq-)([A-Za-z][\w:-]*\w)",
            lambda m: citation(m[0], ".") if m[1] in bibliography() else m[0],
            done,
        )

    return outside_code(text, change)


# ------------------------------------------------------------------------- generated cells


def navigation(name: str) -> str:
    order = reading_order()
    if name not in order:  # the teachers' page lies beside the book
        return '<div class="course-nav">\n\n[Contents](index.ipynb)\n\n</div>'
    i = order.index(name)
    parts = [f"[← {title_of(order[i - 1])}]({order[i - 1]})"] if i else []
    parts += ["[Contents](index.ipynb)"] if name != "index.ipynb" else []
    parts += [f"[{title_of(order[i + 1])} →]({order[i + 1]})"] if i + 1 < len(order) else []
    if (NBS / "zh" / f"{Path(name).stem}.md").exists():
        parts.append(f'[<span lang="zh">中文</span>](zh/{name})')
    return '<div class="course-nav">\n\n' + " · ".join(parts) + "\n\n</div>"


def duration(minutes: float) -> str:
    hours, rest = divmod(round(minutes), 60)
    return f"{minutes:g} min" if not hours else f"{hours} h {rest} min" if rest else f"{hours} h"


def practice(name: str) -> list[str]:
    found = sheets().get(name.split("_")[0], []) if name[0].isdigit() else []
    return [f"[{s['n']} exercises](../{s['path']}), about {duration(s['minutes'])}" for s in found]


@functools.cache
def exports(name: str) -> list[str]:
    """The modules that a notebook writes, or adds to."""
    text = (NBS / name).read_text(encoding="utf8") if (NBS / name).exists() else ""
    return list(dict.fromkeys(re.findall(r'"#\|\s*(?:default_exp|export): *(?!true\b)(\w+)', text)))


def head(name: str, meta: dict) -> str:
    course = meta.get("course", {})
    known = chapters()
    facts = []
    if course.get("needs"):
        needs = [f"[{title_of(known[n])}]({known[n]})" if n in known else str(n) for n in course.get("needs", [])]
        facts.append("**Read first:** " + ", ".join(needs))
    if "minutes-read" in course:
        facts.append(f"**To read:** {duration(course['minutes-read'])}")
    if "minutes-run" in course:
        facts.append(f"**To run:** {duration(course['minutes-run'])} on two CPU cores")
    facts += [f"**Practice:** {p}" for p in practice(name)]
    if made := exports(name):
        facts.append("**Reference:** " + ", ".join(f"[{m}]({PACKAGE_PAGE}#{m})" for m in made))
    keys = [str(s).lstrip("@") for s in course.get("sources", [])]
    if keys:
        years = {k: bibliography()[k].fields["year"] for k in keys}
        facts.append("**Sources:** " + "; ".join(f"[{short_name(k)}, {years[k]}]({REFERENCES}#{k})" for k in keys))
    box = '<div class="course-facts">\n\n' + "\n".join(f"* {f}" for f in facts) + "\n\n</div>"
    return f"# {meta['title']}\n\n*{meta['subtitle'].strip()}*\n\n{box}\n\n{navigation(name)}"


def foot(name: str) -> str:
    parts = []
    for s in sheets().get(name.split("_")[0], []) if name[0].isdigit() else []:
        parts.append(
            f"**Practice.** [{s['n']} exercises](../{s['path']}), about {duration(s['minutes'])}. "
            f"Each knows the wrong answers that people give and says which one is yours. "
            f"In the sheet: `check`, `hint`, `reveal`, `progress`; in the shell: `llmcourse check {s['sheet']}`."
        )
    return "\n\n".join([*parts, navigation(name)])


def contents() -> str:
    """The table of the tour: every chapter with its promise and its sheets (the teachers' page is no chapter)."""
    rows = ["| chapter | what it does | practice |", "|---|---|---|"]
    for name in reading_order():
        if name == "index.ipynb" or "teaching" in name:
            continue
        promise = front_matter(nbformat.read(NBS / name, 4))["subtitle"].strip()
        rows.append(f"| [{title_of(name)}]({name}) | {promise} | {'; '.join(practice(name))} |")
    return "\n".join(rows)


def caption(text: str, number: int) -> str:
    return f'<div class="figure-caption">\n\n*Figure {number}.* {with_citations(text)}\n\n</div>'


def options(cell: nbformat.NotebookNode) -> dict:
    lines = []
    for line in cell.source.splitlines():
        if not line.startswith("#|"):
            break
        lines.append(line[2:].removeprefix(" "))
    try:
        return yaml.safe_load("\n".join(line for line in lines if re.match(r"[\w-]+:|\s", line))) or {}
    except yaml.YAMLError:
        return {}


def only_imports(source: str) -> bool:
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic, say
        return False
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)


def with_fold(cell: nbformat.NotebookNode) -> str:
    """The source of a code cell, folded on the page when it draws a figure or only imports."""
    seen = options(cell)
    if "code-fold" in seen or seen.get("include") is False:
        return cell.source
    if str(seen.get("label", "")).startswith("fig-"):
        return re.sub(r"(?m)^(#\| label: .*)$", r"\1\n#| code-fold: true", cell.source, count=1)
    if only_imports(cell.source):
        head = re.match(r"(#\|.*\n)*", cell.source)[0]
        fold = '#| code-fold: true\n#| code-summary: "Imports"\n'
        return head + fold + cell.source.removeprefix(head)
    return cell.source


def minutes_to_read(nb: nbformat.NotebookNode) -> int:
    words = lines = 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            if cell.id in ("head", "foot", "topics") or cell.id.endswith("-caption"):  # generated
                continue
            if cell.id.startswith("module-") and cell.id != "module-how":  # looked up, not read
                continue
            words += len(re.sub(r"<!--.*?-->|</?\w[^>]*>", " ", cell.source, flags=re.S).split())
        elif cell.cell_type == "code":
            seen = options(cell)
            if seen.get("include") is not False and seen.get("echo") is not False:
                lines += sum(bool(line.strip()) and not line.startswith("#|") for line in cell.source.splitlines())
    return max(1, math.ceil(words / WORDS + lines / LINES))


def markdown_cell(id: str, source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(source, id=id)


def generate(name: str, nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with everything that is generated, in place."""
    nb.cells = [c for c in nb.cells if c.id not in ("head", "foot") and not c.id.endswith("-caption")]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = with_citations(cell.source)
        elif cell.cell_type == "code":
            cell.source = with_fold(cell)
        folded = cell.cell_type == "raw" or (cell.cell_type == "code" and options(cell).get("include") is False)
        if folded:
            cell.metadata["jupyter"] = FOLDED
        else:
            cell.metadata.pop("jupyter", None)
    for cell in nb.cells:
        if cell.id == "contents":
            cell.source = contents()
        elif cell.id == "topics":
            cell.source = topics()
    raw, numbers = nb.cells[0], {}
    if "minutes-read" in raw.source:
        raw.source = re.sub(r"(?m)^(\s*minutes-read:).*$", rf"\1 {minutes_to_read(nb)}", raw.source)
    cells = [raw, markdown_cell("head", head(name, front_matter(nb)))]
    for cell in nb.cells[1:]:
        cells.append(cell)
        seen = options(cell) if cell.cell_type == "code" else {}
        label = str(seen.get("label", ""))
        if label.startswith("fig-") and seen.get("fig-cap"):
            numbers[label] = len(numbers) + 1
            cells.append(markdown_cell(f"{cell.id}-caption", caption(str(seen["fig-cap"]), numbers[label])))
    cells.append(markdown_cell("foot", foot(name)))
    for cell in cells:  # a figure is named by its number, and linked: `@fig-heads` means nothing to JupyterLab
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[Figure \d+\]\(#(fig-[\w-]+)\)", r"@\1", cell.source)
            cell.source = outside_code(
                cell.source,
                lambda part, _: re.sub(
                    r"(?<![\w@/.])@(fig-[\w-]*\w)",
                    lambda m: f"[Figure {numbers[m[1]]}](#{m[1]})" if m[1] in numbers else m[0],
                    part,
                ),
            )
    nb.cells = cells
    return nb


def references_page() -> nbformat.NotebookNode:
    front = (
        '---\ntitle: "References"\nsubtitle: "Everything that the chapters cite, with a link to it."\n'
        "output-file: references.html\ncourse:\n  needs: []\n  minutes-read: 1\n  sources: []\n---"
    )
    order = sorted(bibliography(), key=lambda k: (short_name(k).lower(), bibliography()[k].fields["year"], k))
    body = "\n".join(entry_text(k) for k in order)
    cells = [nbformat.v4.new_raw_cell(front, id="front"), markdown_cell("entries", body)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


# -------------------------------------------------------------------------------------- convert

BOXES = {"note": "Note", "tip": "Tip", "warning": "Warning", "caution": "Caution", "important": "Important"}


def converted(text: str) -> str:
    """Quarto's divs as HTML that both show, with Markdown inside."""

    def box(match: re.Match) -> str:
        attributes, body = match[1], match[2].strip("\n")
        kind = re.search(r"\.callout-(\w+)", attributes)
        title = re.search(r'title="([^"]*)"', attributes)
        if kind and "collapse" in attributes:
            summary = title[1] if title else BOXES[kind[1]]
            return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"
        classes = " ".join(re.findall(r"\.([\w-]+)", attributes))
        lead = f"**{title[1] if title else BOXES[kind[1]]}.** " if kind else ""
        return f'<div class="{classes}">\n\n{lead}{body}\n\n</div>'

    text = re.sub(r"^::: *\{([^}]*)\} *\n(.*?)\n::: *$", box, text, flags=re.S | re.M)
    return re.sub(r"(\$\$) *\{#eq-[\w-]+\}", r"\1", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook of the book")
    parser.add_argument("--convert", action="store_true", help="also replace Quarto's own divs, once")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something is out of date")
    args = parser.parse_args()
    stale = []
    if not args.notebooks:
        page = NBS / REFERENCES
        made = generate(REFERENCES, references_page())
        write(page, made, args.check, stale)
    for name in [p.name for p in args.notebooks] or sorted(p.name for p in NBS.glob("*.ipynb") if p.name != REFERENCES):
        nb = nbformat.read(NBS / name, 4)
        for cell in nb.cells if args.convert else []:
            if cell.cell_type == "markdown":
                cell.source = converted(cell.source)
        write(NBS / name, generate(name, nb), args.check, stale)
    for name in stale:
        print(f"{name} is out of date: python tools/form.py {name}" if args.check else f"wrote {name}")
    return int(args.check and bool(stale))


def write(path: Path, nb: nbformat.NotebookNode, check: bool, stale: list[str]) -> None:
    text = nbformat.writes(nb, version=4)
    text = text if text.endswith("\n") else text + "\n"
    before = path.read_text(encoding="utf8") if path.exists() else ""
    if text != before:
        stale.append(f"nbs/{path.name}")
        if not check:
            path.write_text(text, encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
