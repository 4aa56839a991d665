"""Pages in Chinese beside the English ones: code and outputs of the original, the text from a file.

    python tools/translate.py [PAGE …]               build nbs/zh/PAGE.ipynb from nbs/PAGE.ipynb and nbs/zh/PAGE.md
    python tools/translate.py --check                change nothing; exit 1 when a page is not in step
    python tools/translate.py --todo [PAGE …]        blocks that are missing or older than their original, to be written
    python tools/translate.py --diff PAGE …          what changed in the original since a block was written (asks git)
    python tools/translate.py --confirm PAGE CELL …  these blocks say what the original says now: note that
    python tools/translate.py --terms [PAGE …]       terms of the glossary that a block calls otherwise: look at them

A page is the name of a notebook without its ending. To begin one: `--todo PAGE > nbs/zh/PAGE.md`, write, build, add the
page to the part 中文 of _quarto.yml, and run tools/form.py, which puts the link to it on the English page.

nbs/zh/PAGE.md holds a block for each cell that has words: a Markdown cell, or the captions of a code cell (as YAML).

    <!-- cell c7e0bfbe a1b2c3d4 -->
    the Chinese text

The eight digits are a digest of the original at the time of writing; when that changes, the block is older than its
original and `--check` says so. Links are written as in the original. Titles and promises of all chapters are in
nbs/zh/_titles.yml, because the tour lists them all. Everything that tools/form.py generates in English (head, foot,
captions, the table of chapters) is said in Chinese here. What must be the same in both languages is compared: headings,
links, formulas, code, numbers.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import form  # noqa: E402

LANG = "zh"
CELL = re.compile(r"^<!-- cell (\S+) ([0-9a-f]{8}) -->[ \t]*\n", re.M)
GENERATED = ("head", "foot", "contents", "topics")
TEXTS = ("fig-cap", "fig-alt", "tbl-cap", "code-summary")  # options of a code cell that a reader reads
# words that need no block of their own
PHRASES = {
    "Imports": "导入",
    "The drawing": "绘图代码",
    "The table": "表格代码",
    "Python": "Python",
    "the basics of PyTorch tensors": "PyTorch 张量的基本用法",
    "a little linear algebra": "一点线性代数",
    "the chain rule": "链式法则",
}
HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
FOLDER = "zh-folder"
# The code of a page is that of nbs/, with the files that it names there.
ENTER = '#| include: false\nimport os\n\nif os.path.basename(os.getcwd()) == "zh":\n    os.chdir("..")'


def digest(text: str) -> str:
    """Eight digits; the number of a figure, which is counted anew each time, does not matter."""
    return hashlib.sha256(re.sub(r"\[Figure \d+\]", "[Figure]", text).strip().encode()).hexdigest()[:8]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@dataclass
class Block:
    original: str  # digest
    text: str


@dataclass
class Page:
    """A notebook in `nbs` and what is written about it in `nbs`/zh."""

    name: str
    nbs: Path = form.NBS

    @property
    def words(self) -> Path:
        return self.nbs / LANG / f"{self.name}.md"

    @property
    def built(self) -> Path:
        return self.nbs / LANG / f"{self.name}.ipynb"

    @cached_property
    def cells(self) -> list[dict]:
        return read(self.nbs / f"{self.name}.ipynb")["cells"]

    @cached_property
    def blocks(self) -> dict[str, Block]:
        parts = CELL.split(self.words.read_text(encoding="utf8") if self.words.exists() else "")
        found: dict[str, Block] = {}
        for id, original, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if id in found:
                raise SystemExit(f"{self.words.name}: cell {id} has two blocks; allowed: one")
            if "<!-- cell" in text:
                line = text[text.index("<!-- cell") :].split("\n")[0]
                raise SystemExit(f"{self.words.name}: {line!r} is no mark; allowed: <!-- cell ID DIGEST -->")
            found[id] = Block(original, text.strip("\n"))
        return found

    @cached_property
    def titles(self) -> dict[str, dict]:
        file = self.nbs / LANG / "_titles.yml"
        return yaml.safe_load(file.read_text(encoding="utf8")) if file.exists() else {}

    def wanted(self) -> dict[str, str]:
        """Cell -> the words of the original that need a block."""
        found = {}
        for cell in self.cells:
            id, words = cell["id"], ""
            if cell["cell_type"] == "markdown" and id not in GENERATED and not id.endswith("-caption"):
                words = source(cell)
            elif cell["cell_type"] == "code":
                said = {k: str(v) for k, v in options(cell).items() if k in TEXTS and v not in PHRASES}
                words = yaml.safe_dump(said, allow_unicode=True, width=10**6, sort_keys=False) if said else ""
            if words.strip():
                found[id] = words.strip("\n")
        return found


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8"))


def options(cell: dict) -> dict:
    return form.options(argparse.Namespace(source=source(cell)))


def front(cell: dict) -> dict:
    return yaml.safe_load(source(cell).strip().strip("-")) or {}


def pages(nbs: Path = form.NBS) -> list[str]:
    """What is translated, in the order of the names, the tour first."""
    return sorted((p.stem for p in (nbs / LANG).glob("*.md")), key=lambda n: (n != "index", n))


# ------------------------------------------------------------------------------------------ the words of form.py


def title(page: Page, name: str) -> str:
    known = page.titles.get(Path(name).stem)
    return known["title"] if known else front(read(page.nbs / name)["cells"][0])["title"]


def here(page: Page, name: str) -> bool:
    return (page.nbs / LANG / f"{Path(name).stem}.md").exists()


def duration(text: str) -> str:
    """`1 h 22 min` -> `1 小时 22 分钟`."""
    return text.replace(" h", " 小时").replace(" min", " 分钟")


def practice(text: str) -> str:
    return re.sub(
        r"\[(\d+) exercises\]\(([^)]*)\), about ([\d.]+ (?:h \d+ min|h|min))(?:; )?",
        lambda m: f"[{m[1]} 道习题]({m[2]})，约 {duration(m[3])}；",
        text,
    ).rstrip("；")


def links(page: Page, text: str) -> list[str]:
    return [f"[{title(page, file)}]({file})" for file in re.findall(r"\]\(([\w-]+\.ipynb)\)", text)]


def fact(page: Page, line: str) -> str:
    """One line of the box under the title."""
    name, _, rest = line.removeprefix("* **").partition(":** ")
    if name == "Read first":
        others = [PHRASES.get(part, part) for part in re.sub(r"\[[^\]]*\]\([^)]*\)", "", rest).split(", ") if part]
        return f"* **先读：** {'、'.join(links(page, rest) + others)}"
    if name == "To read":
        return f"* **阅读：** {duration(rest)}"
    if name == "To run":
        return f"* **运行：** {duration(rest.removesuffix(' on two CPU cores'))}（两个 CPU 核心）"
    if name == "Practice":
        return f"* **练习：** {practice(rest)}"
    if name == "Reference":
        return f"* **接口：** {rest}"
    if name == "Sources":
        return f"* **来源：** {rest.replace('; ', '；')}"
    raise SystemExit(f"the head of {page.name}: {line!r} has no Chinese form in tools/translate.py")


def navigation(page: Page, text: str) -> str:
    """The links to the neighbors, to the table of chapters and to the original."""
    parts = [f'[<span lang="en">English</span>](../{page.name}.ipynb)']
    for words, file in re.findall(r"\[([^\]]*)\]\(([\w-]+\.ipynb)\)", text):
        if words == "Contents":
            parts.append(f"[目录]({file})")
        else:
            label = title(page, file) + ("" if here(page, file) else "（英文）")
            parts.append(f"[← {label}]({file})" if words.startswith("←") else f"[{label} →]({file})")
    return '<div class="course-nav">\n\n' + " · ".join(parts) + "\n\n</div>"


def box(text: str, name: str) -> str:
    found = re.search(rf'<div class="{name}">\n\n(.*?)\n\n</div>', text, re.S)
    return found[1] if found else ""


def head(page: Page, text: str) -> str:
    said = page.titles[page.name]
    lines = [fact(page, line) for line in box(text, "course-facts").splitlines()]
    facts = "\n".join([*lines, "* **说明：** 代码、输出和图与英文页相同"])
    facts = f'<div class="course-facts">\n\n{facts}\n\n</div>'
    return f"# {said['title']}\n\n*{said['subtitle']}*\n\n{facts}\n\n{navigation(page, box(text, 'course-nav'))}"


def foot(page: Page, text: str) -> str:
    parts = []
    for links, sheet in re.findall(r"\*\*Practice\.\*\* (.*?)\. Each knows.*`llmcourse check ([\w-]+)`", text):
        parts.append(
            f"**练习。** {practice(links)}。每道题都认得人们常给的错误答案，会告诉你犯的是哪一个。"
            f"在习题本中使用 `check`、`hint`、`reveal`、`progress`，在终端中使用 `llmcourse check {sheet}`。"
        )
    return "\n\n".join([*parts, navigation(page, box(text, "course-nav"))])


def contents(page: Page, text: str) -> str:
    rows = []
    for file, done in re.findall(r"^\| \[[^\]]*\]\(([\w-]+\.ipynb)\) \|.*\| ?(.*?) ?\|$", text, re.M):
        said = page.titles.get(Path(file).stem) or {"subtitle": front(read(page.nbs / file)["cells"][0])["subtitle"]}
        mark = "（中文）" if here(page, file) else ""
        rows.append(f"| [{title(page, file)}]({file}){mark} | {said['subtitle']} | {practice(done)} |")
    some = "标有“中文”的章节已有中文页面，其余链接通向英文章节；习题本都是英文的。"
    none = "各章正文目前是英文的，习题本也是；这里给出它们的中文标题和提要。"
    note = some if any("（中文）" in row for row in rows) else none
    return f"{note}\n\n| 章节 | 内容 | 练习 |\n|---|---|---|\n" + "\n".join(rows)


# ----------------------------------------------------------------------------------------------------- building


def relink(page: Page, text: str) -> str:
    """Links of a page in nbs, for a page in nbs/zh: to the Chinese page where there is one."""

    def target(match: re.Match) -> str:
        path = match[2].partition("#")[0]
        if re.match(r"[a-z][a-z0-9+.-]*:|#", match[2]) or (path.endswith(".ipynb") and here(page, path)):
            return match[0]
        # the link to the original is written as it shall be
        return match[0] if path == f"../{page.name}.ipynb" else f"{match[1]}../{match[2]}"

    change = lambda part, _: re.sub(r'(\]\(\s*<?|(?:src|href)=")([^)\s>"]+)', target, part)
    return form.outside_code(text, change)


def headings(text: str) -> list[tuple[str, str]]:
    """Marks and words of the headings, outside code."""
    return re.findall(r"^(#{2,6}) +(.+?)\s*$", re.sub(r"(?ms)^```.*?^```", "", text), re.M)


def with_anchors(text: str, original: str) -> str:
    """Each heading can be linked to under the name that it has in English."""
    names, ours = headings(original), headings(text)
    if [mark for mark, _ in names] != [mark for mark, _ in ours]:
        return text  # `faults` says so
    for (mark, words), (_, english) in zip(ours, names, strict=True):
        if anchor := form.heading_id(english):
            line = re.compile(rf"^{mark} +{re.escape(words)}\s*$", re.M)
            text = line.sub(lambda m, a=anchor: f'<span id="{a}"></span>\n\n{m[0]}', text, count=1)
    return text


def marked(text: str) -> str:
    """The page says its language in its head; JupyterLab shows no such head, so each cell says it too."""
    return f'<div lang="{LANG}">\n\n{text}\n\n</div>'


def front_matter(page: Page, original: str) -> str:
    said = page.titles[page.name]
    text = re.sub(r"(?m)^  covers:.*\n(?:   .*\n)*", "", original)
    for key in ("title", "subtitle"):
        line = f"{key}: {json.dumps(said[key], ensure_ascii=False)}"
        text = re.sub(rf"(?m)^{key}:.*$", lambda m, line=line: line, text, count=1)
    return text.replace("\ncourse:", f'\nlang: {LANG}\ntoc-title: "本页内容"\ncourse:', 1)


def with_texts(page: Page, cell: dict) -> str:
    """The source of a code cell with its captions in Chinese."""
    block = page.blocks.get(cell["id"])
    said = (yaml.safe_load(block.text) if block else None) or {}
    lines = source(cell).split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("#|"):
            break
        key = re.match(r"#\| ?([\w-]+):", line)
        if key and key[1] in TEXTS:
            words = said.get(key[1]) or PHRASES.get(options(cell)[key[1]])
            if words:
                lines[i] = f"#| {key[1]}: {json.dumps(relink(page, str(words)), ensure_ascii=False)}"
    return "\n".join(lines)


def build(page: Page) -> str:
    """The text of the notebook; where a block is missing the original stands in its place."""
    if page.name not in page.titles:
        raise SystemExit(f"nbs/{LANG}/_titles.yml has no title for {page.name}: --todo {page.name} prints the entry")
    made, numbers = [], {}
    for cell in page.cells:
        cell = {key: value for key, value in cell.items()}
        id, text, block = cell["id"], source(cell), page.blocks.get(cell["id"])
        if cell["cell_type"] == "raw":
            text = front_matter(page, text)
        elif cell["cell_type"] == "code":
            text = with_texts(page, cell)
            label = str(options(cell).get("label", ""))
            if label.startswith("fig-"):
                numbers[label] = len(numbers) + 1
        elif id in ("head", "foot", "contents"):
            text = marked(relink(page, {"head": head, "foot": foot, "contents": contents}[id](page, text)))
        elif id.endswith("-caption"):
            drawn = made[-1]  # the cell before
            words = form.with_citations(str(options(drawn).get("fig-cap", "")))
            number = numbers[options(drawn)["label"]]
            text = f'<div class="figure-caption" lang="{LANG}">\n\n*图 {number}。* {words}\n\n</div>'
        elif block:
            text = marked(with_anchors(relink(page, block.text), text))
        else:
            text = relink(page, text)
        if cell["cell_type"] == "code" and not any(c["cell_type"] == "code" for c in made):
            hidden = {"cell_type": "code", "execution_count": None, "id": FOLDER, "outputs": [], "source": ENTER}
            made.append(hidden | {"metadata": {"jupyter": dict(form.FOLDED)}})
        made.append(cell | {"source": text})
    for cell in made:
        if cell["cell_type"] == "markdown":  # figures are counted; whoever translates need not
            change = lambda m: f"[图 {numbers[m[1]]}](#{m[1]})" if m[1] in numbers else m[0]
            cell["source"] = re.sub(r"\[图 ?\d*\]\(#(fig-[\w-]+)\)", change, cell["source"])
        cell["source"] = cell["source"].splitlines(keepends=True)
    nb = read(page.nbs / f"{page.name}.ipynb") | {"cells": made}
    return json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


# ------------------------------------------------------------------------------------------------------- checking


def plain(text: str) -> str:
    """A sign in the place of code, formulas, comments and tags, and links without their targets."""
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|<!--.*?-->|<[^>\n]+>", "※", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def same(text: str) -> dict[str, Counter]:
    """What has to be the same in both languages."""
    fences = re.findall(r"(?ms)^```.*?^```", text)
    rest = re.sub(r"(?ms)^```.*?^```", "", text)
    no_code = re.sub(r"`[^`\n]+`", "", rest)
    numbers = re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", re.sub(r"\[(?:Figure|图) ?\d*\]", "", plain(text)), re.A)
    return {
        "headings": Counter(mark for mark, _ in headings(text)),
        "blocks of code": Counter(re.sub(r"(?m)\s+# .*$", "", f) for f in fences),  # a comment may be Chinese
        "code in the text": Counter(re.findall(r"`[^`\n]+`", rest)),
        "formulas": Counter(re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", no_code, re.S)),
        "links": Counter(re.findall(r"\]\(\s*<?([^)\s>]+)", no_code)),
        "tags": Counter(re.findall(r"</?(?:div|details|summary)\b[^>]*>", no_code)),
        "rows of tables": Counter(line[0] for line in rest.splitlines() if line.startswith("|")),
        "numbers": Counter(set(n.replace(",", "") for n in numbers)),
    }


def shown(text: str) -> str:
    """What CommonMark makes of it, without code, an x for each formula."""
    from markdown_it import MarkdownIt

    words = []
    for token in MarkdownIt("commonmark").parse(re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "x", text, flags=re.S)):
        words += [child.content for child in token.children or [] if child.type == "text"]
    return "\n".join(words)


def flat_stars(text: str) -> list[str]:
    """Emphasis that CommonMark does not see: `**注意：**这里`, a sign inside of the stars and a character outside."""
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$", "x", text)
    sign = lambda c: unicodedata.category(c)[0] in "PS"
    found = []
    for match in re.finditer(r"(\*{1,2})(?=[^\s*])([^*\n]+)(?<=\S)\1", text):
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        opens = not sign(match[2][0]) or before.strip() == "" or sign(before)
        closes = not sign(match[2][-1]) or after.strip() == "" or sign(after)
        if not (opens and closes):
            found.append(match[0])
    return found


def compare(original: str, text: str) -> list[str]:
    """What a translation has lost, added, or written as Chinese is not written."""
    found = []
    before, after = same(original), same(text)
    for what, there in before.items():
        lost, added = there - after[what], after[what] - there
        if lost or added:
            told = [f"{word} {', '.join(map(str, n))}" for word, n in (("without", lost), ("with", added)) if n]
            found.append(f"not the {what} of the original, but {'; '.join(told)}")
    words = plain(text)
    if re.search(r"[A-Za-z]{2}", plain(original)) and not re.search(f"[{HAN}]", words):
        found.append("there is no Chinese in it")
    for match in re.finditer(rf"[{HAN}][,;:!?()]|[{HAN}]\.(?![\w])|[(][{HAN}]|[{HAN}] +[{HAN}]", words):
        found.append(f"{match[0]!r} is not how Chinese is set: fullwidth signs, and no space between its characters")
    if flat_stars(text) or "*" in shown(text):
        found.append("a star is left in what JupyterLab shows: put the sign inside the stars outside of them")
    return found


def faults(page: Page) -> list[str]:
    """What is wrong with a translation, a sentence each; an empty list is good."""
    where, wanted, found = f"nbs/{LANG}/{page.words.name}", page.wanted(), []
    for id, words in wanted.items():
        block = page.blocks.get(id)
        if block is None:
            found.append(f"{where}: cell {id} has no block; python tools/translate.py --todo {page.name} prints it")
            continue
        if block.original != digest(words):
            found.append(
                f"{where}: cell {id} is older than its original; python tools/translate.py --diff {page.name} shows "
                f"what changed there; once the text is right again: --confirm {page.name} {id}"
            )
        text = block.text
        if any(cell["id"] == id and cell["cell_type"] == "code" for cell in page.cells):
            said, ours = yaml.safe_load(words), yaml.safe_load(text)
            if not isinstance(ours, dict) or set(ours) != set(said):
                found.append(f"{where}: cell {id} wants {', '.join(said)}, each with its text")
                continue
            words, text = "\n\n".join(said.values()), "\n\n".join(str(ours[key]) for key in said)
        found += [f"{where}: cell {id}: {fault}" for fault in compare(words, text)]
    for id in page.blocks.keys() - wanted:
        found.append(f"{where}: cell {id} is in no cell of the original, or has no words there: take its block out")
    order = [id for id in page.blocks if id in wanted]
    if order != [id for id in wanted if id in page.blocks]:
        found.append(f"{where}: the blocks stand in another order than the cells")
    return found + title_faults(page)


def title_faults(page: Page) -> list[str]:
    """Every page needs its own title; the tour, which lists all chapters, those of all."""
    names, found = [page.name], []
    for cell in page.cells:
        if cell["id"] == "contents":
            names += [Path(f).stem for f in re.findall(r"^\| \[[^\]]*\]\(([\w-]+\.ipynb)\)", source(cell), re.M)]
            found += [
                f"nbs/{LANG}/_titles.yml: {name} is no chapter of the book: take it out"
                for name in page.titles
                if name not in names and not (page.nbs / f"{name}.ipynb").exists()
            ]
    for name in names:
        said, now = page.titles.get(name), original_title(page, name)
        if said is not None:
            ours = f"{said['title']}\n{said['subtitle']}"
            found += [f"nbs/{LANG}/_titles.yml: {name}: {fault}" for fault in compare(now, ours)]
        if said is None:
            found.append(f"nbs/{LANG}/_titles.yml: {name} has no title; python tools/translate.py --todo {page.name}")
        elif str(said["original"]) != digest(now):
            found.append(
                f"nbs/{LANG}/_titles.yml: {name} is older than its original, which now says {now!r}; once the text is "
                f"right again: python tools/translate.py --confirm {page.name} {name}"
            )
    return found


def original_title(page: Page, name: str) -> str:
    meta = front(read(page.nbs / f"{name}.ipynb")["cells"][0])
    return f"{meta['title']}\n{meta['subtitle'].strip()}"


# ------------------------------------------------------------------------------------------------ for translators


def todo(page: Page) -> str:
    """The blocks to write, each with its original; then the titles."""
    parts, wanted = [], page.wanted()
    for id, words in wanted.items():
        block = page.blocks.get(id)
        if block is None or block.original != digest(words):
            parts.append(f"<!-- cell {id} {digest(words)} -->\n{words}\n")
    for fault in title_faults(page):
        name = fault.split(": ")[1].split(" ")[0]
        if (page.nbs / f"{name}.ipynb").exists():
            now = original_title(page, name)
            said = dict(zip(("title", "subtitle"), now.split("\n"), strict=True))
            lines = [f"  {key}: {json.dumps(value)}" for key, value in ({"original": digest(now)} | said).items()]
            parts.append("\n".join([f"(in nbs/{LANG}/_titles.yml)", f"{name}:", *lines, ""]))
    return "\n".join(parts)


def changes(page: Page) -> str:
    """For each block that is older than its original: that original then and now."""
    old = {i: w for i, w in page.wanted().items() if i in page.blocks and page.blocks[i].original != digest(w)}
    file = f"nbs/{page.name}.ipynb"
    ask = lambda *args: subprocess.run(["git", *args], cwd=page.nbs.parent, capture_output=True, text=True).stdout
    then: dict[str, str] = {}
    for commit in ask("log", "--format=%h", "--", file).split():
        if len(then) == len(old):
            break
        past = Page(page.name, page.nbs)
        past.__dict__["cells"] = json.loads(ask("show", f"{commit}:{file}") or '{"cells": []}')["cells"]
        for id, words in past.wanted().items():
            if id in old and digest(words) == page.blocks[id].original:
                then.setdefault(id, words)
    parts = []
    for id, now in old.items():
        if id not in then:
            parts.append(f"cell {id}: no commit of {file} has the original that it was written from")
            continue
        names = {"fromfile": f"{id} then", "tofile": f"{id} now", "lineterm": "", "n": 1}
        parts.append("\n".join(difflib.unified_diff(then[id].splitlines(), now.splitlines(), **names)))
    return "\n\n".join(parts)


def terms(page: Page) -> str:
    """Terms of the glossary in an original whose Chinese does not stand in the block: advice, no rule."""
    glossary = "".join(source(c) for c in read(page.nbs / "91_glossary.ipynb")["cells"] if c["cell_type"] == "markdown")
    rows = re.findall(rf'^\| (.+?) \| <span lang="{LANG}">(.+?)</span> \|', glossary, re.M)
    found = []
    for id, words in page.wanted().items():
        text = page.blocks[id].text if id in page.blocks else ""
        for english, chinese in rows:
            names = [re.escape(name) for name in re.sub(r" *\([^)]*\)", "", english).split(", ")]
            forms = [f for f in re.split(r"[（），、]|\(|\)", chinese) if f]
            there = re.search(rf"(?<![\w-])(?:{'|'.join(names)})s?(?![\w-])", plain(words), re.I)
            if there and not any(form in text for form in forms):
                found.append(f"{page.name}, cell {id}: {english}: {chinese}")
    return "\n".join(found)


def confirm(page: Page, ids: list[str]) -> None:
    wanted = page.wanted()
    text, file = page.words.read_text(encoding="utf8"), page.nbs / LANG / "_titles.yml"
    for id in ids:
        if id in wanted and id in page.blocks:
            text = re.sub(rf"(?m)^<!-- cell {re.escape(id)} \w+ -->", f"<!-- cell {id} {digest(wanted[id])} -->", text)
        elif id in page.titles:
            entry = rf"(?m)^({re.escape(id)}:\n  original:).*$"
            line = rf"\1 {json.dumps(digest(original_title(page, id)))}"
            file.write_text(re.sub(entry, line, file.read_text(encoding="utf8")), encoding="utf8")
        else:
            raise SystemExit(f"CELL is {id!r}; allowed: a cell with a block in {page.words.name}, or a chapter's name")
    page.words.write_text(text, encoding="utf8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="default: every page that is translated")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is not in step")
    what.add_argument("--todo", action="store_true", help="print the blocks that are missing or old")
    what.add_argument("--diff", action="store_true", help="print what changed in the original of old blocks")
    what.add_argument("--terms", action="store_true", help="print terms that are called otherwise than in the glossary")
    what.add_argument("--confirm", nargs="+", metavar=("PAGE", "CELL"), help="these blocks are right again")
    args = parser.parse_args()
    if args.confirm:
        args.pages = args.confirm[:1]
    names = [Path(name).stem for name in args.pages] or pages()
    for name in names:
        if not (form.NBS / f"{name}.ipynb").exists():
            raise SystemExit(f"PAGE is {name!r}; allowed: the name of a notebook in nbs")
    if args.confirm:
        confirm(Page(names[0]), args.confirm[1:])
    if args.todo or args.diff or args.terms:
        for name in names:
            print((todo if args.todo else changes if args.diff else terms)(Page(name)))
        return 0
    wrong = 0
    for page in map(Page, names):
        text, found = build(page), faults(page)
        if text != (page.built.read_text(encoding="utf8") if page.built.exists() else ""):
            if args.check:
                found.append(f"nbs/{LANG}/{page.built.name} is out of date: python tools/translate.py {page.name}")
            else:
                page.built.write_text(text, encoding="utf8")
                print(f"wrote nbs/{LANG}/{page.built.name}")
        for fault in found:
            print(fault)
        wrong += len(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
