"""What must hold for every chapter of the book, as small functions.

A rule takes plain data (a notebook as its JSON dict, a set of names, a page of HTML) and returns a
list of sentences, one per problem; an empty list is good. So tests/test_book.py can run each rule
on the real chapters, and also feed it a broken one and see that it speaks up.

The front matter of a chapter is its first cell, a raw cell:

    ---
    title: "Quantization"
    subtitle: "Store a weight in four bits and measure what that costs."    one-line promise
    output-file: quantization.html           the notebook's name without its number
    course:
      needs: [runtime, "a little algebra"]   chapters by name, or other things in words; may be []
      minutes-read: 25
      minutes-run: 2                         measured, on two CPU cores
      sources: ["@frantar2022gptq"]          keys in references.bib; may be []
      covers: [C8, "C12#storing"]            what of nbs/_topics.yml it teaches, and in which section
    ---
"""

from __future__ import annotations

import json
import posixpath
import re
import zipfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import yaml

MIN_ALT = 40  # characters: shorter alternative texts name the picture, they do not say what it shows
CROSSREF_KINDS = ("sec", "fig", "tbl", "eq", "lst")

# ---------------------------------------------------------------------------------------- reading


def load(path: Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def text(value: str | list[str]) -> str:
    """A notebook stores text as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def cells(nb: dict, kind: str) -> list[tuple[int, dict]]:
    return [(i, c) for i, c in enumerate(nb["cells"]) if c["cell_type"] == kind]


def slug(name: str) -> str:
    """`14_quantization` -> `quantization`, `02b_tokenization` -> `tokenization`: the page's name, and the chapter's."""
    return re.sub(r"^\d+[a-z]?_", "", name)


def chapter_files(config: dict) -> list[str]:
    """All files that `_quarto.yml` lists, in reading order, parts flattened."""

    def walk(items: list) -> list[str]:
        files = []
        for item in items:
            if isinstance(item, str):
                files.append(item)
            elif "file" in item:
                files.append(item["file"])
            files += walk(item.get("chapters", [])) if isinstance(item, dict) else []
        return files

    return walk(config["book"]["chapters"] + config["book"].get("appendices", []))


def bibliography_keys(bib: str) -> set[str]:
    return set(re.findall(r"^@\w+\{([^,\s]+),", bib, re.M))


def front_matter(nb: dict) -> dict:
    """The YAML of the first cell; empty when there is none."""
    first = nb["cells"][0] if nb["cells"] else {"cell_type": "", "source": ""}
    match = re.fullmatch(r"---\n(.*?)\n---\s*", text(first["source"]), re.S)
    if first["cell_type"] != "raw" or not match:
        return {}
    return yaml.safe_load(match[1]) or {}


def directives(cell: dict) -> tuple[dict, list[str]]:
    """The `#| key: value` lines at the head of a code cell, and those that are not `key: value`."""
    lines = []
    for line in text(cell["source"]).splitlines():
        if not line.startswith("#|"):
            break
        lines.append(line[2:].removeprefix(" "))
    bare = [line for line in lines if not line.startswith((" ", "-")) and not re.match(r"[\w-]+:(\s|$)", line)]
    try:
        options = yaml.safe_load("\n".join(line for line in lines if line not in bare)) or {}
    except yaml.YAMLError:
        return {}, lines
    return options, bare


def prose(cell: dict) -> str:
    """A markdown cell with code, math and comments blanked out: what remains is read as sentences."""
    out = text(cell["source"])
    for pattern in (
        r"^( *)(```+|~~~+).*?^\1\2[`~]*$",
        r"<!--.*?-->",
        r"\$\$.*?\$\$",
        r"(?<!\\)\$[^$\n]+\$",
        r"(`+)(?!`).+?\1",
    ):
        # Keep the line breaks, so that a line has the same number before and after.
        out = re.sub(pattern, lambda m: "\n" * m[0].count("\n") or " ", out, flags=re.S | re.M)
    return out


def output_text(output: dict) -> str:
    """Everything in an output that a reader could see as text."""
    parts = [text(output.get("text", "")), "\n".join(output.get("traceback", []))]
    parts += [
        text(v) for k, v in output.get("data", {}).items() if k.startswith("text/") and isinstance(v, (str, list))
    ]
    return "\n".join(parts)


TOUCH = '<div class="llmcourse-touch"'


def is_touch(output: dict) -> bool:
    """A figure that can be moved (llmcourse/touch.py): a still picture and a script in one HTML output."""
    return text(output.get("data", {}).get("text/html", "")).startswith(TOUCH)


def is_picture(output: dict) -> bool:
    return is_touch(output) or any(mime.startswith("image/") for mime in output.get("data", {}))


# ------------------------------------------------------------------- rules for the list of chapters


def listing(listed: list[str], existing: set[str], apart: str = "nbs/92_teaching.ipynb") -> list[str]:
    """Every listed file exists, once; every notebook is listed, but for the teachers' page.

    That page names the wrong answers, and stays out of the learners' site.
    """
    problems = [f"{f} is listed in _quarto.yml but is not there" for f in listed if f not in existing]
    problems += [f"{f} is listed twice" for f in sorted(set(listed)) if listed.count(f) > 1]
    problems += [
        f"{f} is not listed in _quarto.yml"
        for f in sorted(existing)
        if f.endswith(".ipynb") and f not in listed and f != apart
    ]
    numbers = [f for f in listed if re.match(r"nbs/\d+[a-z]?_", f)]
    if apart in listed:
        problems.append(f"{apart} names the wrong answers: it is no page of the learners' site")
    if numbers != sorted(numbers):
        problems.append("the chapters are not listed in the order of their numbers, which is the reading order")
    return problems


# --------------------------------------------------------------------------- rules for one notebook


def front_matter_complete(name: str, nb: dict, chapters: set[str], keys: set[str]) -> list[str]:
    """`name` is the file's stem, `chapters` the names of all chapters, `keys` the bibliography."""
    meta = front_matter(nb)
    if not meta:
        return ["the first cell is not a raw cell with front matter between two lines of ---"]
    problems = [f"front matter has no {key}" for key in ("title", "subtitle", "course") if not meta.get(key)]
    if "\n" in str(meta.get("subtitle", "")).strip():
        problems.append("subtitle is the chapter's promise: one line")
    page = "tour.html" if name == "index" else f"{slug(name)}.html"
    if meta.get("output-file") != page:
        problems.append(f"output-file is {meta.get('output-file')!r}, the page's stable name is {page!r}")
    course = meta.get("course") or {}
    for key in ("minutes-read", "minutes-run"):
        if key == "minutes-run" and key not in course and not cells(nb, "code"):
            continue  # there is nothing to run
        value = course.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"course.{key} is {value!r}, want a number of minutes above 0")
    for key in ("needs", "sources"):
        if not isinstance(course.get(key), list):
            problems.append(f"course.{key} is {course.get(key)!r}, want a list (it may be empty)")
    for need in course.get("needs") or []:
        # One lower-case word is the name of a chapter and becomes a link; other things are said in words.
        if re.fullmatch(r"[a-z_]+", str(need)) and need not in chapters:
            problems.append(f"course.needs names {need!r}, which is no chapter")
        if str(need).lower() in chapters and need not in chapters:
            problems.append(f"course.needs names {need!r}: write {str(need).lower()!r}, then it becomes a link")
    for source in course.get("sources") or []:
        if str(source).removeprefix("@") not in keys:
            problems.append(f"course.sources names {source!r}, which is not in references.bib")
    unknown = sorted(set(course) - {"needs", "minutes-read", "minutes-run", "sources", "covers"})
    return problems + [f"course.{key} is not a field that the book knows" for key in unknown]


def topics_have_places(known: dict, books: dict[str, dict]) -> list[str]:
    """Every topic of nbs/_topics.yml is taught somewhere or is listed as not taught, with a reason; none is both.

    `known` is that file, `books` all notebooks by file name.
    """
    topics, waiting = known["topics"], known["not_yet"]
    problems, taught = [], set()
    for name, nb in books.items():
        covers = (front_matter(nb).get("course") or {}).get("covers", [])
        for entry in covers:
            topic, _, anchor = str(entry).partition("#")
            taught.add(topic)
            if topic not in topics:
                problems.append(f"{name}: course.covers names {entry!r}, which is no topic")
            if anchor and anchor not in anchors(nb):
                problems.append(f"{name}: course.covers names {entry!r}, and no section has that anchor")
        twice = sorted({str(c) for c in covers if covers.count(c) > 1})
        problems += [f"{name}: course.covers names {c!r} twice" for c in twice]
    for topic, about in topics.items():
        missing = [k for k in ("section", "en", "zh") if not about.get(k)]
        problems += [f"topic {topic} has no {key}" for key in missing]
        if topic[0] not in known["articles"]:
            problems.append(f"topic {topic} belongs to no article")
        if topic not in taught and topic not in waiting:
            problems.append(f"topic {topic} ({about.get('en')}) has no place")
        if topic in taught and topic in waiting:
            problems.append(f"topic {topic} has a place: take it off the list of those that have none")
    problems += [f"not_yet names {t!r}, which is no topic" for t in waiting if t not in topics]
    return problems + [f"not_yet gives no reason for {t}" for t, why in waiting.items() if len(str(why)) < 20]


def one_title(nb: dict) -> list[str]:
    """The title is in the head cell, which tools/form.py writes; the page shows that of the front matter."""
    return [
        f"cell {i}: level-1 heading {line!r}, begin sections with ##"
        for i, cell in cells(nb, "markdown")
        for line in prose(cell).splitlines()
        if re.match(r"# \S", line) and cell.get("id") != "head"
    ]


def directives_have_values(nb: dict) -> list[str]:
    """`#| export` alone makes Quarto print the cell's fence into the page; `#| export: true` does not."""
    return [
        f"cell {i}: directive {line!r} has no value, write `#| {line.split()[0] if line.split() else '...'}: true`"
        for i, cell in cells(nb, "code")
        for line in directives(cell)[1]
    ]


def figures_described(nb: dict) -> list[str]:
    """A cell that draws has one picture, a label fig-..., a caption and an alternative text."""
    problems = []
    for i, cell in cells(nb, "code"):
        options, _ = directives(cell)
        pictures = sum(is_picture(o) for o in cell["outputs"])
        label = str(options.get("label", ""))
        if label.startswith("fig-") and not pictures:
            problems.append(f"cell {i}: {label} has no picture in its output, run the notebook")
        if not pictures or options.get("include") is False or options.get("output") is False:
            continue
        if pictures > 1:
            problems.append(f"cell {i}: {pictures} pictures in one cell, they would share one alternative text")
        if not label.startswith("fig-"):
            problems.append(f"cell {i}: a picture needs `#| label: fig-...`")
        if not options.get("fig-cap"):
            problems.append(f"cell {i}: a picture needs `#| fig-cap: ...`")
        alt = str(options.get("fig-alt") or "")
        if len(alt) < MIN_ALT:
            problems.append(
                f"cell {i}: `#| fig-alt:` has {len(alt)} characters, want {MIN_ALT} or more that say what is to be seen"
            )
    return problems


def figures_folded(nb: dict) -> list[str]:
    """A reader of the page wants the figure: the code that draws it is folded, unless the cell says that it stays."""
    return [
        f"cell {i}: {label} says neither `#| code-fold: true` nor `false`: run tools/form.py"
        for i, cell in cells(nb, "code")
        if (label := str(directives(cell)[0].get("label", ""))).startswith("fig-")
        and not isinstance(directives(cell)[0].get("code-fold"), bool)
    ]


def figures_referred_to(nb: dict) -> list[str]:
    """A sentence right before or right after a figure names it and says what to see there: `@fig-levels`.

    tools/form.py writes that as [Figure 1](#fig-levels), which JupyterLab shows too.
    """
    words = {
        i: text(c["source"])
        for i, c in cells(nb, "markdown")
        if c.get("id") not in ("head", "foot") and not str(c.get("id", "")).endswith("-caption")
    }
    problems = []
    for i, cell in cells(nb, "code"):
        label = str(directives(cell)[0].get("label", ""))
        near = max((j for j in words if j < i), default=-1), min((j for j in words if j > i), default=-1)
        mention = rf"(?:@|\]\(#){re.escape(label)}(?![\w-])"
        if label.startswith("fig-") and not any(re.search(mention, words.get(j, "")) for j in near):
            problems.append(f"cell {i}: no sentence next to it refers to @{label}")
    return problems


def no_errors(nb: dict) -> list[str]:
    return [
        f"cell {i}: its output is an error, {output.get('ename')}"
        for i, cell in cells(nb, "code")
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]


def as_said(nb: dict) -> list[str]:
    """The saved run bears out what the text says about times (`say_unseen` says what a run does not)."""
    return [
        f"cell {i}: {line}: run the notebook when the machine is quiet"
        for i, cell in cells(nb, "code")
        if directives(cell)[0].get("include") is False
        for output in cell["outputs"]
        for line in output_text(output).splitlines()
        if line.startswith("Not seen in this run")
    ]


def was_run(nb: dict) -> list[str]:
    """Quarto shows the saved outputs and says nothing when there are none."""
    code = [c for _, c in cells(nb, "code") if directives(c)[0].get("eval") is not False]
    doing = [
        c
        for c in code
        if any(not line.lstrip().startswith("#") and line.strip() for line in text(c["source"]).splitlines())
    ]
    if doing and not any(c["outputs"] for c in doing):
        return [f"none of the {len(doing)} code cells has an output: run `nbdev-test --save`"]
    return []


def nothing_volatile(nb: dict) -> list[str]:
    """No state of a front end, no widgets, nothing that needs a script or the network to show.

    A figure that can be moved has a script, and a still picture for those who do not run it.
    """
    problems = [
        f"notebook metadata holds {key!r}"
        for key in nb.get("metadata", {})
        if key not in ("kernelspec", "language_info")
    ]
    for i, cell in enumerate(nb["cells"]):
        problems += [
            f"cell {i}: metadata holds {k!r}"
            for k in cell.get("metadata", {})
            if k in ("execution", "collapsed", "scrolled", "ExecuteTime")
        ]
        for output in cell.get("outputs", []):
            mimes = output.get("data", {})
            problems += [f"cell {i}: output of type {m}" for m in mimes if "javascript" in m or "widget" in m]
            html = text(mimes.get("text/html", ""))
            if is_touch(output):
                problems += [f"cell {i}: {problem}" for problem in touch_problems(html)]
            elif re.search(r"<script|<iframe|(?:src|href)=[\"']?(?:https?:)?//", html):
                problems.append(f"cell {i}: HTML output loads a script or something from the network")
    return problems


STILL = re.compile(
    r'<div class="llmcourse-touch" data-touch="(?P<kind>[a-z]+)">\n'
    r'<img class="touch-still" src="data:image/svg\+xml,[^"]+" width="\d+" alt="(?P<alt>[^"]+)"[^<>]*/>\n'
    r'<p class="touch-still"><small>[^<]+</small></p>\n'
    r'<script type="application/json">(?P<data>[^<]*)</script>\n<script>\n(?P<script>.*)\n</script>\n</div>',
    re.S,
)


def touch_problems(html: str) -> list[str]:
    """The still picture and its words are there, and the script is the one that the package writes now."""
    from llmcourse.touch import SCRIPTS, script

    match = STILL.fullmatch(html)
    if not match:
        return ["a figure that can be moved is not as llmcourse/touch.py writes it: a still picture, data, one script"]
    problems = []
    if len(match["alt"]) < MIN_ALT:
        problems.append(f"the still picture's alt has {len(match['alt'])} characters, want {MIN_ALT} or more")
    try:
        told = json.loads(match["data"])
        missing = [key for key in ("title", "alt", "controls", "data") if key not in told]
        problems += [f"the data of the figure has no {key}" for key in missing]
    except ValueError:
        problems.append("the data of the figure is no JSON")
    known = (SCRIPTS / f"{match['kind']}.js").exists()
    if not known or match["script"] != script(match["kind"]):
        problems.append("the script is not the one in llmcourse/templates/touch: run the cell again")
    return problems


# How `Comparison`, `Ratio` and their levels print: 1.02× (95% interval 0.97 to 1.07), and 1.0171× (0.99 to 1.04, 92 %).
OF_TIMES = re.compile(r"× \((?!\d+ ?% interval )[^()]*\d to \d[^()]*\), .*\(quartiles ")
OF_TEXTS = re.compile(r"\d\.\d{4}× \(\d[\d.]* to \d[\d.]*\)")
BY_HAND = re.compile(r"\b1\.96 ?\*|\* ?1\.96\b")


def intervals_say_their_level(nb: dict) -> list[str]:
    """A printed ratio of times or of perplexities names how often such an interval holds, and none is made by hand.

    An interval with 1.96 standard errors takes the spread for known: Student's, Wilson's and the bootstrap's stand in
    `llmcourse.verdicts` and say what they keep. What is called "textbook" is there to be shown wrong.
    """
    problems = []
    for i, cell in cells(nb, "code"):
        source = text(cell["source"])
        if BY_HAND.search(source) and "def textbook" not in source:
            problems.append(f"cell {i}: an interval made by hand with 1.96; use llmcourse.verdicts")
        for line in "\n".join(map(output_text, cell["outputs"])).splitlines():
            if OF_TIMES.search(line) or OF_TEXTS.search(line):
                problems.append(f"cell {i}: an interval without its level: {line.strip()[:80]}")
    return problems


def no_machine_paths(nb: dict) -> list[str]:
    """An output that names a folder of the machine it ran on differs on every other one."""
    pattern = re.compile(
        r"(?<![\w./:])/(?:home|root|Users|work|tmp|opt|mnt|private|usr|var)/[\w.-]+[^\s'\"]*|\b[A-Z]:\\\\?\w+|site-packages"
    )
    return [
        f"cell {i}: output names {match[0]!r}"
        for i, cell in cells(nb, "code")
        for output in cell["outputs"]
        for match in pattern.finditer(output_text(output))
    ]


# -------------------------------------------------------------------------- links and cross-references


def heading_id(heading: str) -> str:
    """The anchor that a heading gets when it names none: lower case, dashes, no punctuation."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = re.sub(r"[^\w\s.-]", "", plain).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", plain))


def labels(nb: dict) -> list[str]:
    """Every label that can be referred to, with repetitions."""
    found = []
    for _, cell in cells(nb, "markdown"):
        found += re.findall(r"\{#([\w-]+)", text(cell["source"]))
        found += re.findall(r"<\w+ [^>]*\bid=\"([\w-]+)\"", text(cell["source"]))
    for _, cell in cells(nb, "code"):
        label = directives(cell)[0].get("label")
        found += [label] if label else []
    return found


def anchors(nb: dict) -> set[str]:
    """Every place in a page that `page#anchor` can point to."""
    found = set(labels(nb))
    for _, cell in cells(nb, "markdown"):
        # Headings may hold code, so this reads the cell's own text, without its fenced blocks.
        body = re.sub(r"^(```+).*?^\1$", "", text(cell["source"]), flags=re.S | re.M)
        found |= {heading_id(re.sub(r"\{[^}]*\}\s*$", "", h)) for h in re.findall(r"^#{1,6} +(.+?)\s*$", body, re.M)}
    return found


def labels_unique(books: dict[str, dict]) -> list[str]:
    """`books` is all notebooks by file name. A label is looked up in the whole book."""
    seen: dict[str, str] = {}
    problems = []
    for name, nb in books.items():
        for label in labels(nb):
            if label in seen:
                problems.append(f"label {label} is in {seen[label]} and again in {name}")
            seen[label] = name
    return problems


def references_known(nb: dict, known_labels: set[str], keys: set[str]) -> list[str]:
    """Every @sec-..., @fig-... is a label of the book, every other @key is in the bibliography."""
    problems = []
    for i, cell in cells(nb, "markdown"):
        for name in re.findall(r"(?<![\w@/.])@\{?([A-Za-z][\w:-]*\w)", prose(cell)):
            if name.split("-")[0] in CROSSREF_KINDS and "-" in name:
                if name not in known_labels:
                    problems.append(f"cell {i}: @{name} refers to no label of the book")
            elif name not in keys:
                problems.append(f"cell {i}: @{name} is not in references.bib")
    return problems


def links_resolve(name: str, nb: dict, folder: Path, books: dict[str, dict]) -> list[str]:
    """Pictures and relative links lead somewhere; `name` is this notebook, `books` all by file name."""
    problems = []
    for i, cell in cells(nb, "markdown"):
        for bang, words, target in re.findall(r"(!?)\[([^\]]*)\]\(\s*<?([^)\s>]+)", prose(cell)):
            if bang and not words.strip():
                problems.append(f"cell {i}: the picture {target} has no alternative text")
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                if bang:
                    problems.append(f"cell {i}: the picture {target} is not a file of the book")
                continue
            path, _, anchor = target.partition("#")
            if path and not (folder / unquote(path)).exists():
                problems.append(f"cell {i}: {target} is not there")
                continue
            page = books.get(path or name)
            if anchor and page is not None and anchor not in anchors(page):
                problems.append(f"cell {i}: {target}: no heading or label #{anchor}")
    return problems


# ------------------------------------------------------------------------------ no typed-in results

# A number that looks measured: with decimals, or a percentage, near a word for a result ...
RESULT_WORD = (
    r"(?:perplexit\w+|ppl|bits per (?:byte|character)|accuracy|seconds?|secs?|ms|milliseconds?"
    r"|tok(?:ens)?/s|tokens per second|[KMG]i?B|×|times|faster|slower|smaller|larger|quicker)"
)
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+|(?:\.\d+)?\s?%)"
NEAR = r"(?:\W+\w+){0,4}?\W*?"
MEASURED = re.compile(
    rf"{NUMBER}{NEAR}(?<!\w){RESULT_WORD}(?!\w)|(?<!\w){RESULT_WORD}(?!\w){NEAR}{NUMBER}"
    # ... or a whole number right before a unit of speed.
    r"|(?<![\w.])\d[\d,]*\s?(?:ms|tok(?:ens)?/s|×\s?(?:faster|slower))(?!\w)",
    re.I,
)


def no_typed_results(nb: dict) -> list[str]:
    """A result is printed by a cell, never typed into a sentence, where it would grow stale.

    Allowed: a sentence with a citation; anything inside `<div class="published">` ... `</div>`; a line that
    ends with <!-- number-ok: why this number is not a measurement of ours -->. Generated cells are not prose.
    """
    problems = []
    for i, cell in cells(nb, "markdown"):
        if cell.get("id") in ("head", "foot", "topics") or str(cell.get("id", "")).endswith("-caption"):
            continue
        if str(cell.get("id", "")).startswith("module-"):  # from docstrings: tools/reference.py
            continue
        stack: list[bool] = []  # open blocks, True where published
        for line, original in zip(prose(cell).splitlines(), text(cell["source"]).splitlines(), strict=False):
            fence = re.match(r"\s*:{3,}\s*(.*)", line)
            if fence:
                if fence[1].strip(" :"):
                    stack.append("published" in fence[1])
                elif stack:
                    stack.pop()
                continue
            if re.match(r"\s*</?div", original):
                stack = stack[:-1] if "</div" in original else [*stack, "published" in original]
                continue
            escape = re.search(r"<!--\s*number-ok:?\s*(.*?)\s*-->", original)
            if escape:
                if len(escape[1]) < 10:
                    problems.append(f"cell {i}: number-ok without a reason: {original.strip()[:80]!r}")
                continue
            if any(stack):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\[(*_])", line):
                match = MEASURED.search(sentence)
                if match and not re.search(r"(?<!\w)@[A-Za-z]|\]\(93_references\.ipynb#", sentence):
                    problems.append(f"cell {i}: a result typed into prose: {match[0].strip()!r}")
    return problems


# ------------------------------------------------------------------------- rules for the rendered book


@dataclass
class Page(HTMLParser):
    """What the checks need to know of one HTML page."""

    html: str
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # what the browser fetches by itself
    pictures: list[tuple[str, str]] = field(default_factory=list)  # (src, alt)
    tex: int = 0  # formulas that were left as TeX

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {k: v or "" for k, v in attrs}
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag == "img":
            self.pictures.append((a.get("src", ""), a.get("alt", "")))
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "track") and a.get("src"):
            self.files.append(a["src"])
        if tag == "object" and a.get("data"):
            self.files.append(a["data"])
        # rel=next, rel=prev, rel=canonical only name a page, the others fetch it.
        if tag == "link" and not set(a.get("rel", "").split()) <= {"next", "prev", "canonical", "alternate", "author"}:
            self.files.append(a.get("href", ""))
        if tag == "span" and "math" in a.get("class", "").split():
            self.tex += 1


def warnings_in(log: str) -> list[str]:
    """Quarto ends with success in spite of a broken cross-reference; it only says WARN."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return [line.strip() for line in plain.splitlines() if re.search(r"\b(WARN|WARNING|ERROR)\b", line)]


def pictures_have_alt(page: Page) -> list[str]:
    return [f"picture {src[:60]} has no alternative text" for src, alt in page.pictures if not alt.strip()]


def math_is_mathml(page: Page) -> list[str]:
    problems = [f"{page.tex} formulas were left as TeX"] if page.tex else []
    return problems + [
        f"{lib} is loaded" for lib in ("MathJax", "katex") if re.search(rf"<script[^>]*{lib}", page.html, re.I)
    ]


def nothing_external(page: Page) -> list[str]:
    problems = [f"loads {url[:80]}" for url in page.files if re.match(r"(?:https?:)?//", url)]
    styles = "".join(re.findall(r"<style.*?</style>", page.html, re.S))
    return problems + css_external(styles)


def css_external(css: str) -> list[str]:
    return [
        f"style sheet loads {m[:80]}"
        for m in re.findall(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')]+)", css)
    ]


def no_leaks(page: Page) -> list[str]:
    """Directives, fences and unresolved references that show up as text."""
    body = re.sub(r"<(script|style|pre|code|math)\b.*?</\1>", "", page.html, flags=re.S)
    shown = re.sub(r"<[^>]+>", " ", body)
    return [
        f"the page shows {m.strip()!r}" for m in re.findall(r"#\|[^\n]{0,30}|:::[^\n]{0,30}|\?@[\w-]+|\(\w+\?\)", shown)
    ]


def page_links_resolve(where: Path, pages: dict[Path, Page]) -> list[str]:
    """Every internal link, anchor and file of the page at `where` is there."""
    problems = []
    page = pages[where]
    for url in page.links + page.files:
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not url or url == "#":
            continue
        target = (where.parent / unquote(parts.path)).resolve() if parts.path else where
        if target.is_dir():
            target = target / "index.html"
        if not target.exists():
            problems.append(f"{url} is not there")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            problems.append(f"{url}: no such anchor")
    return problems


# --------------------------------------------------------------------- rules for the plain edition


def whole_page(page: Page) -> list[str]:
    """A page says its language, title and description, has one heading of level 1, and a link to its text."""
    html = page.html
    problems = []
    if not re.search(r"<html [^>]*lang=\"[a-zA-Z-]+\"", html):
        problems.append("the page does not say its language")
    if not re.search(r"<title>\s*[^<\s]", html):
        problems.append("the page has no title")
    if not re.search(r"<meta name=\"description\" content=\"[^\"]+\"", html):
        problems.append("the page has no description")
    skip = re.search(r"<a class=\"skip\" href=\"#([\w-]+)\"", html)
    if not skip or skip[1] not in page.ids:
        problems.append("no skip link leads to the text")
    if (n := len(re.findall(r"<h1\b", html))) != 1:
        problems.append(f"{n} level-1 headings; allowed: one")
    opened, named = len(re.findall(r"<details\b", html)), len(re.findall(r"<summary\b[^>]*>\s*\S", html))
    named -= len(re.findall(r"<summary\b[^>]*>\s*</summary>", html))
    if opened != named or opened != html.count("</details>"):
        problems.append(f"{opened} details with {named} words in a summary and {html.count('</details>')} ends")
    return problems


def ids_unique(page: Page) -> list[str]:
    body = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", page.html, flags=re.S)
    found = re.findall(r"<\w+\b[^>]*\sid=\"([^\"]+)\"", body)
    return [f"the anchor {name} stands twice" for name in sorted({n for n in found if found.count(n) > 1})]


def rel_links(html: str, rel: str) -> set[str]:
    return set(re.findall(rf"<(?:a|link)\b[^>]*rel=\"{rel}\"[^>]*href=\"([^\"]+)\"", html))


def search_data(script: str) -> dict:
    """What search-index.js holds."""
    match = re.fullmatch(r"window\.bookIndex = (\{.*\});\n", script, re.S)
    if not match:
        raise ValueError("search-index.js is not one assignment to window.bookIndex")
    return json.loads(match[1])


def search_covers(index: dict, folder: Path) -> list[str]:
    """Every page is in the search with words of its own, and every place that it names is there."""
    problems = []
    listed = [page for page, _, _ in index["pages"]]
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if name not in listed:
            problems.append(f"{name} is not in the search")
            continue
        places = [p for p in index["places"] if p[0] == listed.index(name)]
        if not re.search(r"\w{4,}", " ".join(p[3] for p in places)):
            problems.append(f"no word of {name} is in the search")
        ids = set(re.findall(r"\sid=\"([^\"]+)\"", path.read_text(encoding="utf-8"))) | {""}
        problems += [f"{name}#{p[1]} is in the search and not on the page" for p in places if p[1] not in ids]
    return problems


def css_colors(css: str, scheme: str) -> dict[str, str]:
    """The colors `--name: #rrggbb` that hold in a scheme; the dark ones stand in a media query after the light ones."""
    dark = r"@media \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}\s*\}"
    blocks = re.findall(
        r":root \{(.*?)\}", re.sub(r"@media print.*", "", re.sub(dark, "", css, flags=re.S), flags=re.S), re.S
    )
    blocks += re.findall(dark, css, re.S) if scheme == "dark" else []
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", "\n".join(blocks)))


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colors `#rrggbb`."""

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), parts))

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def epub_whole(path: Path, chapters: list[str]) -> list[str]:
    """The EPUB lists these chapters, its pages are well-formed, and each link and picture is in it."""
    problems = []
    with zipfile.ZipFile(path) as z:
        names = set(z.namelist())
        if z.namelist()[0] != "mimetype" or z.read("mimetype") != b"application/epub+zip":
            problems.append("its first file is no mimetype application/epub+zip")
        trees = {}
        for name in sorted(n for n in names if n.endswith(".xhtml")):
            try:
                trees[name] = ElementTree.fromstring(z.read(name))
            except ElementTree.ParseError as e:
                problems.append(f"{name} is not well-formed: {e}")
    ids = {name: {e.get("id") for e in tree.iter()} for name, tree in trees.items()}
    for name, tree in trees.items():
        for element in tree.iter():
            target = element.get("href") or element.get("src") or ""
            if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), file)) if file else name
            if place not in names:
                problems.append(f"{name}: {target} is not there")
            elif anchor and place in ids and anchor not in ids[place]:
                problems.append(f"{name}: {target}: no such anchor #{anchor}")
    nav = next((t for n, t in trees.items() if n.endswith("nav.xhtml")), None)
    first = next((e for e in nav.iter() if e.tag.endswith("}nav")), []) if nav is not None else []
    found = [
        " ".join("".join(e.itertext()).split()) for e in (first.iter() if len(first) else []) if e.tag.endswith("}a")
    ]
    if found != [" ".join(c.split()) for c in chapters]:
        problems.append(f"it lists {len(found)} chapters, {found[:3]} …; wanted: {len(chapters)}, {chapters[:3]} …")
    return problems
