"""Make the slides of the lectures from the notebooks of the book.

    python tools/slides.py [LECTURE …]     # build/slides/NAME.html and NAME.qmd; all lectures by default
    python tools/slides.py --check         # write nothing; exit 1 when a picked cell is missing

A lecture is a file in slides/: a title, and slides with short texts of their own. Figures, code and outputs are not in
it. They are picked from the chapters, as `03_attention#fig-heads` (a label) or `03_attention#1d99c234` (the id of a
cell), so a slide always shows what the book shows. `only` takes one function of a cell, with the first line of
its docstring, `lines` the first lines of an output.

The HTML file holds everything that it needs: no script, style, font or picture comes from elsewhere. Arrow keys, space,
Home and End move; N shows the notes; printing gives a page for each slide. The .qmd file is the same deck for Quarto's
revealjs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import functools
import html
import sys
from pathlib import Path

import mistune
import nbformat
import yaml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
SOURCES, NBS = ROOT / "slides", ROOT / "nbs"
KEYS = {"title", "text", "code", "only", "output", "lines", "figure", "note"}
WIDTH, HEIGHT = 1280, 720


class Problem(Exception):
    """A lecture asks for something that is not there; the text says what and where."""


# ------------------------------------------------------------------------------ what is picked


@functools.cache
def notebook(name: str) -> nbformat.NotebookNode:
    path = NBS / f"{name}.ipynb"
    if not path.is_file():
        raise Problem(f"there is no chapter {name}")
    return nbformat.read(path, 4)


def options(source: str) -> dict:
    lines = [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]
    return yaml.safe_load("\n".join(lines)) or {}


def without_options(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")


def pick(where: str) -> nbformat.NotebookNode:
    """The cell that `CHAPTER#LABEL_OR_ID` names."""
    chapter, _, name = where.partition("#")
    found = [
        c
        for c in notebook(chapter).cells
        if c.cell_type == "code" and name in (c.get("id"), options(c.source).get("label"))
    ]
    if len(found) != 1:
        raise Problem(f"{where}: {len(found)} cells have this label or id; expected one")
    return found[0]


def figure(where: str) -> tuple[bytes, str, str]:
    """(PNG, alternative text, caption) of a cell's picture."""
    cell = pick(where)
    pictures = [o["data"]["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    about = options(cell.source)
    if len(pictures) != 1:
        raise Problem(f"{where}: {len(pictures)} pictures; expected one")
    if len(about.get("fig-alt", "")) < 20:
        raise Problem(f"{where}: the picture has no alternative text")
    return base64.b64decode(pictures[0]), about["fig-alt"], about.get("fig-cap", "")


def code(where: str, only: str = "") -> str:
    """The source of a cell, or of one function of it."""
    text = without_options(pick(where).source)
    if not only:
        return text
    found = [n for n in ast.parse(text).body if getattr(n, "name", "") == only]
    if len(found) != 1:
        raise Problem(f"{where}: defines {only} {len(found)} times; expected once")
    first = min([found[0].lineno, *(d.lineno for d in found[0].decorator_list)])
    lines = text.splitlines()
    said = found[0].body[0]
    if ast.get_docstring(found[0]) and said.end_lineno > said.lineno:  # its first line is enough on a slide
        kept = [*lines[first - 1 : said.lineno - 1], lines[said.lineno - 1] + '"""']
        kept += lines[said.end_lineno : found[0].end_lineno]
    else:
        kept = lines[first - 1 : found[0].end_lineno]
    return "\n".join(kept)


def output(where: str, lines: int = 0) -> str:
    """What a cell printed, all of it or its first lines."""
    text = "".join(o.get("text", "") for o in pick(where).outputs if o.output_type == "stream").rstrip("\n")
    if not text:
        raise Problem(f"{where}: the cell prints nothing")
    return "\n".join(text.splitlines()[: lines or None])


def lecture(path: Path) -> dict:
    """A lecture, checked key by key."""
    made = yaml.safe_load(path.read_text(encoding="utf8"))
    for key in ("title", "subtitle", "chapters", "slides"):
        if not made.get(key):
            raise Problem(f"{path.name}: {key} is missing")
    for name in made["chapters"]:
        notebook(name)
    for i, slide in enumerate(made["slides"], 1):
        at = f"{path.name}, slide {i}"
        if unknown := sorted(set(slide) - KEYS):
            raise Problem(f"{at}: {unknown[0]} is no key; allowed: {', '.join(sorted(KEYS))}")
        if not slide.get("title") or not set(slide) & {"text", "code", "output", "figure"}:
            raise Problem(f"{at}: a slide has a title, and a text, code, output or figure")
        for key in ("code", "output", "figure"):
            if key in slide and slide[key].partition("#")[0] not in made["chapters"]:
                raise Problem(f"{at}: {slide[key]} is of no chapter of this lecture")
    return made


# ------------------------------------------------------------------------------------ the HTML

STYLE = """
:root { color-scheme: light; --ink: #1c2230; --line: #1f5f8b; --paper: #ffffff; --soft: #f3f5f8; }
* { box-sizing: border-box; }
html { scroll-snap-type: y mandatory; background: #dfe3e9; }
body { margin: 0; font-family: system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; color: var(--ink); }
.page { height: 100vh; display: grid; place-items: center; scroll-snap-align: start; overflow: hidden; }
section { width: 1280px; height: 720px; flex: none; background: var(--paper); padding: 44px 64px 40px;
  display: flex; flex-direction: column; gap: 18px; overflow: hidden; position: relative; zoom: var(--zoom, 1); }
h1 { font-size: 54px; line-height: 1.15; margin: auto 0 0; }
h1 + p { font-size: 28px; margin: 0 0 auto; max-width: 24em; }
h2 { font-size: 36px; line-height: 1.2; margin: 0; padding-bottom: 10px; border-bottom: 3px solid var(--line); }
.text { font-size: 25px; line-height: 1.42; max-width: 44em; }
.text p, .text ul, .text ol { margin: 0 0 14px; } .text li { margin-bottom: 7px; }
.beside .text { font-size: 22px; max-width: none; } .beside .text > :last-child { margin-bottom: 0; }
figure { margin: 0; flex: 1 1 0; min-height: 0; display: flex; justify-content: center; }
figure img { max-width: 100%; max-height: 100%; object-fit: contain; }
pre { margin: 0; padding: 14px 18px; background: var(--soft); border-left: 4px solid var(--line);
  font: 16px/1.38 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; tab-size: 4; }
pre.out { background: #fff; border: 1px solid #c7cedb; border-left: 4px solid #6b7484; }
.from { position: absolute; right: 64px; bottom: 14px; font-size: 14px; color: #4d566b; }
aside { display: none; font-size: 18px; color: #4d566b; border-top: 1px solid #c7cedb; padding-top: 8px; }
.notes aside { display: block; }
@media print { @page { size: 1280px 720px; margin: 0; } html { background: none; }
  .page { height: 720px; break-after: page; } section { zoom: 1; } }
"""

SCRIPT = """
const pages = [...document.querySelectorAll(".page")];
const fit = () => document.documentElement.style.setProperty(
  "--zoom", Math.min(innerWidth / 1280, innerHeight / 720));
const here = () => Math.round(scrollY / innerHeight);
const go = n => { const page = pages[Math.max(0, Math.min(pages.length - 1, n))];
  page.scrollIntoView(); history.replaceState(null, "", "#" + page.id); };
addEventListener("resize", fit); fit();
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const moves = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
  if (e.key in moves) { e.preventDefault(); go(here() + (e.shiftKey && e.key === " " ? -1 : moves[e.key])); }
  else if (e.key === "Home") { e.preventDefault(); go(0); }
  else if (e.key === "End") { e.preventDefault(); go(pages.length - 1); }
  else if (e.key === "n") document.body.classList.toggle("notes");
});
"""


def prose(text: str) -> str:
    return mistune.html(text.strip())


def blocks(texts: list[tuple[str, bool]]) -> list[str]:
    """Code (True) and outputs (False) of a slide, in the largest letters in which all of them fit."""
    lines = [line for text, _ in texts for line in text.splitlines()]
    size = min(22.0, 1100 / (0.62 * max(map(len, lines))), 410 / (1.38 * len(lines)))
    made = []
    for text, python in texts:
        inner = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)) if python else html.escape(text)
        kind = "code" if python else "out"
        made.append(f'<pre class="{kind}" style="font-size: {size:.1f}px" tabindex="0">{inner}</pre>')
    return made


def html_slide(slide: dict, number: int) -> str:
    """One slide: title, then text, code, output and figure in this order."""
    parts = [f"<h2>{html.escape(slide['title'])}</h2>"]
    if "text" in slide:
        parts.append(f'<div class="text">{prose(slide["text"])}</div>')
    texts = [(code(slide["code"], slide.get("only", "")), True)] if "code" in slide else []
    texts += [(output(slide["output"], slide.get("lines", 0)), False)] if "output" in slide else []
    parts += blocks(texts) if texts else []
    if "figure" in slide:
        picture, alt, _ = figure(slide["figure"])
        data = base64.b64encode(picture).decode()
        parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"></figure>')
    if "note" in slide:
        parts.append(f"<aside>{html.escape(slide['note'])}</aside>")
    sources = dict.fromkeys(slide[k].partition("#")[0] for k in ("code", "output", "figure") if k in slide)
    parts.append(f'<div class="from">{" ".join([*sources, str(number)])}</div>')
    kind = "beside" if sources else "alone"
    return f'<div class="page" id="s{number}"><section class="{kind}">\n' + "\n".join(parts) + "\n</section></div>"


def as_html(made: dict) -> str:
    """The whole deck as one file."""
    title, subtitle = html.escape(made["title"]), html.escape(made["subtitle"])
    first = f'<div class="page" id="s1"><section><h1>{title}</h1><p>{subtitle}</p></section></div>'
    slides = [html_slide(slide, n) for n, slide in enumerate(made["slides"], 2)]
    colors = HtmlFormatter(style="default").get_style_defs("pre")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{colors}\n{STYLE}</style>\n'
        "</head><body>\n" + "\n".join([first, *slides]) + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


# ------------------------------------------------------------------------------------ the qmd


def as_qmd(made: dict, pictures: str) -> tuple[str, dict[str, bytes]]:
    """The deck for Quarto's revealjs, and the pictures that lie beside it."""
    head = {
        "title": made["title"],
        "subtitle": made["subtitle"],
        "format": {"revealjs": {"embed-resources": True, "slide-number": True, "width": WIDTH, "height": HEIGHT}},
        "execute": {"enabled": False},
    }
    lines, files = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""], {}
    for slide in made["slides"]:
        lines += [f"## {slide['title']}", ""]
        if "text" in slide:
            lines += [slide["text"].strip(), ""]
        if "code" in slide:
            lines += ["```python", code(slide["code"], slide.get("only", "")), "```", ""]
        if "output" in slide:
            lines += ["```", output(slide["output"], slide.get("lines", 0)), "```", ""]
        if "figure" in slide:
            picture, alt, _ = figure(slide["figure"])
            name = f"{pictures}/{slide['figure'].replace('#', '-')}.png"
            files[name] = picture
            lines += [f"![]({name}){{fig-alt={yaml_text(alt)}}}", ""]
        if "note" in slide:
            lines += ["::: {.notes}", slide["note"], ":::", ""]
    return "\n".join(lines), files


def yaml_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lectures", nargs="*", help="files of slides/, with or without .yml; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "slides")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a picked cell is missing")
    args = parser.parse_args(argv)
    known = {p.stem: p for p in sorted(SOURCES.glob("*.yml"))}
    names = [Path(n).stem for n in args.lectures] or list(known)
    try:
        for name in names:
            if name not in known:
                raise Problem(f"lecture is {name!r}; allowed: {', '.join(known)}")
            made = lecture(known[name])
            page, (text, files) = as_html(made), as_qmd(made, f"{name}_pictures")
            if args.check:
                continue
            for path, content in {f"{name}.html": page, f"{name}.qmd": text, **files}.items():
                file = args.out / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content, encoding="utf8")
            print(f"wrote {args.out / name}.html: {len(made['slides']) + 1} slides, {len(page) / 1e6:.1f} MB")
    except (Problem, yaml.YAMLError) as e:
        print(f"slides: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
