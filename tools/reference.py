"""The reference: one page with every public name of the package, made from signatures and docstrings.

    python tools/reference.py           write nbs/94_reference.ipynb
    python tools/reference.py --check   change nothing; exit 1 when the page is out of date or a name says nothing

The sources are read and not imported, so the page is the same on every machine. A name is public when its module lists
it in `__all__`. What a chapter makes stands under the section of the chapter that makes it, with a link to it; a module
that no notebook makes says so. Of a name that a module only passes on, the page says where it is described.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent))
import form

ROOT = form.ROOT
PACKAGE = ROOT / "llmcourse"
PAGE = "94_reference.ipynb"
# the checkers of the exercises hold the answers; the stand-in for setuptools is no part of the package's face
APART = ("practice/sheets/", "null_backend/")
LONG = 44  # characters of a default value or of a constant that are shown
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
INTRO = """\
Every public name of the package, with its signature and what its docstring says. `help(name)` in a notebook says the
same, and `name??` in JupyterLab shows the code. A module is named by what it is about; the names in it stand in the
order in which its chapter makes them, under the section that does.

`*` in a signature: what follows is given by name. Shapes are written as in [the glossary](91_glossary.ipynb)."""
SHELL = "`llmcourse COMMAND --help` lists the options of each. `python -m llmcourse` is the same program."
TOP = "The names that `from llmcourse import …` knows. `llmcourse.passes()` is the list of all methods of compression."
HAND = """\
No notebook makes these modules: they hold what a lesson has no room for, such as storage, kernels, servers, commands
and the machine that checks exercises."""


@dataclass
class Module:
    """One file of the package, read."""

    path: Path
    text: str = field(init=False)
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.path.read_text(encoding="utf8")
        self.tree = ast.parse(self.text)

    @property
    def name(self) -> str:
        parts = self.path.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(p for p in parts if p != "__init__")

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @functools.cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """Name -> the statement of this file that makes it."""
        found: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                for target in ast.walk(node.targets[0]):
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, node)
        return found

    @functools.cached_property
    def imported(self) -> dict[str, str]:
        """Name -> the module of this package that it comes from."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.path.relative_to(PACKAGE).parts[: -node.level]
                    base = ".".join([*package, base]).strip(".")
                elif base.split(".")[0] == "llmcourse":
                    base = base.removeprefix("llmcourse").strip(".")
                else:
                    continue
                found |= {a.asname or a.name: base for a in node.names}
        return found

    @functools.cached_property
    def public(self) -> list[str]:
        """`__all__`; that of the package itself is its table of names."""
        everything = self.definitions.get("__all__")
        if everything is None:
            return []
        try:
            return list(ast.literal_eval(everything.value))
        except ValueError:
            return [*sorted(ast.literal_eval(self.definitions["_PUBLIC"].value)), "passes"]

    @functools.cached_property
    def cells(self) -> list[tuple[int, str, str]]:
        """(line, notebook, cell) of every cell that the file was exported from."""
        marks = enumerate(self.lines, 1)
        found = [(i, re.match(r"# %% \.\./nbs/(\S+\.ipynb) #(\S+)", line)) for i, line in marks]
        return [(i, m[1], m[2]) for i, m in found if m]

    def made_in(self, name: str) -> tuple[str, str] | None:
        """(notebook, cell) that makes a name; None where no notebook does."""
        line = self.definitions[name].lineno
        before = [(notebook, cell) for i, notebook, cell in self.cells if i <= line]
        return before[-1] if before else None


@functools.cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.relative_to(PACKAGE).as_posix().startswith(APART):
            module = Module(path)
            found[module.name] = module
    return found


def home(module: Module, name: str) -> Module | None:
    """The module that makes a name: this one, or the one that it is passed on from."""
    seen = set()
    while name not in module.definitions:
        source = module.imported.get(name)
        if source is None and "__getattr__" in module.definitions:  # a package that looks its names up when asked
            inside = [m for m in modules().values() if m.name.startswith(f"{module.name}.") and name in m.definitions]
            return inside[0] if inside else None
        if source is None or source in seen or source not in modules():
            return None
        seen.add(source)
        module = modules()[source]
    return module


# ---------------------------------------------------------------------------------------------- signatures


def short(node: ast.stmt | ast.expr | None) -> str:
    """The source of a value; of a long one, its kind."""
    text = re.sub(r"\s+", " ", ast.unparse(node)) if node is not None else ""
    if len(text) <= LONG:
        return text
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return repr(node.value[:LONG] + "…")
    if isinstance(node, ast.Call) and len(name := ast.unparse(node.func)) <= LONG:
        return f"{name}(…)"
    ends = {ast.Dict: "{…}", ast.Set: "{…}", ast.List: "[…]", ast.Tuple: "(…)"}
    return ends.get(type(node), "…")


def argument(arg: ast.arg, default: ast.expr | None = None, star: str = "") -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    end = f"{' = ' if kind else '='}{short(default)}" if default is not None else ""
    return f"{star}{arg.arg}{kind}{end}"


def parameters(args: ast.arguments, drop_first: bool) -> str:
    places = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(places) - len(args.defaults)) + list(args.defaults)
    parts = [argument(a, d) for a, d in zip(places, defaults, strict=True)]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if drop_first:
        parts = parts[1:]
        parts = parts[1:] if parts[:1] == ["/"] else parts
    if args.vararg:
        parts.append(argument(args.vararg, star="*"))
    elif args.kwonlyargs:
        parts.append("*")
    parts += [argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append(argument(args.kwarg, star="**"))
    return ", ".join(parts)


def decorators(node: ast.stmt) -> list[str]:
    return [ast.unparse(d) for d in node.decorator_list]


def of_function(node: ast.FunctionDef, method: bool = False) -> str:
    marks = decorators(node)
    back = f" → {ast.unparse(node.returns)}" if node.returns is not None else ""
    if any(m.split(".")[-1] in ("property", "cached_property") for m in marks):
        return back
    return f"({parameters(node.args, method and 'staticmethod' not in marks)}){back}"


def is_data(node: ast.ClassDef) -> bool:
    marks = [m.split("(")[0].split(".")[-1] for m in decorators(node)]
    bases = [ast.unparse(b).split(".")[-1] for b in node.bases]
    return "dataclass" in marks or bool({"NamedTuple", "TypedDict", "BaseModel"} & set(bases))


def lineage(module: Module, node: ast.ClassDef) -> list[tuple[Module, ast.ClassDef]]:
    """A class and its bases in this package, the class first."""
    found = [(module, node)]
    for base in node.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        where = home(module, name)
        above = where.definitions[name] if where else None
        if isinstance(above, ast.ClassDef):
            found += lineage(where, above)
    return found


def fields(module: Module, node: ast.ClassDef) -> dict[str, tuple[str, str]]:
    """Field -> (how it is given, the comment that explains it), in the order of a dataclass: bases first."""
    found: dict[str, tuple[str, str]] = {}
    for where, part in reversed(lineage(module, node)):
        for item in part.body if is_data(part) else []:
            if not isinstance(item, ast.AnnAssign) or "ClassVar" in ast.unparse(item.annotation):
                continue
            if item.target.id.startswith("_") or "init=False" in short(item.value):
                continue
            told = f"{item.target.id}: {ast.unparse(item.annotation)}"
            told += f" = {short(item.value)}" if item.value is not None else ""
            after = part.body[part.body.index(item) + 1 :][:1]
            below = after[0].value if after and isinstance(after[0], ast.Expr) else None
            words = str(below.value) if isinstance(below, ast.Constant) else comment(where, item)
            found[item.target.id] = (told, words)
    return found


def comment(module: Module, node: ast.stmt) -> str:
    """The comment behind a statement, or in the lines right above it."""
    end = module.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    if behind := re.match(r"\s*#\s*(.+)", end):
        return "" if behind[1].startswith(("noqa", "type:")) else behind[1].strip()
    above, i = [], node.lineno - 2
    while i >= 0 and re.match(r"\s*# (?!%%)", module.lines[i]):
        above.insert(0, re.sub(r"^\s*# ?", "", module.lines[i]).strip())
        i -= 1
    return " ".join(above)


# ---------------------------------------------------------------------------------------------- words


CITED = r"\[[a-z]+\d{4}\w*(?:, [a-z]+\d{4}\w*)*\]"


def escaped(text: str) -> str:
    """Plain words as Markdown that shows them as they are. What stands in backticks stays code; a notebook that is
    named there is linked, and so are the sources in brackets, [kuensch1989, politis1992]."""
    parts = re.split(rf"(``.+?``|`[^`\n]+`|{CITED})", text)
    for i, part in enumerate(parts):
        notebook = re.fullmatch(r"`(?:nbs/)?(\d\w*\.ipynb)`", part)
        keys = part[1:-1].split(", ") if re.fullmatch(CITED, part) else []
        if notebook and notebook[1] in form.reading_order():
            parts[i] = f"[{form.title_of(notebook[1])}]({notebook[1]})"
        elif keys and all(key in form.bibliography() for key in keys):
            parts[i] = form.citation("; ".join(f"@{key}" for key in keys), "".join(parts[:i]))
        elif i % 2 == 0 or keys:
            plain = re.sub(r"([\\*_\[\]$|~^@#])", r"\\\1", part)
            parts[i] = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(parts)


def joined(lines: list[str]) -> str:
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def listed(body: list[str]) -> list[str]:
    """`name: words`, with deeper lines that go on -> one entry each."""
    items: list[list[str]] = []
    for line in body:
        if line.strip() and (not line.startswith(" ") or not items):
            items.append([line])
        elif line.strip():
            items[-1].append(line)
    return [joined(item) for item in items]


def laid_out(doc: str) -> tuple[str, list[str]]:
    """A docstring as (its first paragraph, further blocks of Markdown)."""
    blocks: list[str] = []
    lines, i = textwrap.dedent(doc).splitlines(), 0
    while i < len(lines):
        head = re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples):", lines[i].strip())
        if head and not lines[i].startswith(" "):
            body, i = [], i + 1
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                body.append(lines[i][4:])
                i += 1
            if head[1] in ("Returns", "Yields"):
                blocks.append(f"* *{head[1]}:* {escaped(joined(body))}")
            elif head[1].startswith("Example"):
                blocks.append("```python\n" + "\n".join(body).strip() + "\n```")
            else:
                before = "*Raises* " if head[1] == "Raises" else ""
                for item in listed(body):
                    names, _, words = item.partition(": ")
                    blocks.append(f"* {before}`{names}`: {escaped(words)}" if words else f"* {escaped(item)}")
        elif not lines[i].strip():
            i += 1
        elif lines[i].startswith("    "):
            body = []
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                body.append(lines[i][4:])
                i += 1
            blocks.append("```\n" + "\n".join(body).strip("\n") + "\n```")
        elif re.match(r"[-*] ", lines[i]):
            body = [lines[i]]
            while i + 1 < len(lines) and lines[i + 1].startswith(" ") and lines[i + 1].strip():
                i += 1
                body.append(lines[i])
            blocks.append(f"* {escaped(joined(body)[2:])}")
            i += 1
        else:
            body = []
            while (
                i < len(lines) and lines[i].strip() and not re.match(r"(Args|Returns|Raises|Yields):$|[-*] ", lines[i])
            ):
                body.append(lines[i])
                i += 1
            blocks.append(escaped(joined(body)))
    first = blocks.pop(0) if blocks and not blocks[0].startswith(("* ", "```")) else ""
    return first, blocks


def glued(blocks: list[str]) -> str:
    """Blocks with an empty line between, except inside a list."""
    out = ""
    for i, block in enumerate(blocks):
        tight = i and block.startswith("* ") and blocks[i - 1].startswith("* ")
        out += ("\n" if tight else "\n\n" if i else "") + block
    return out


def paragraphs(text: str) -> str:
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


# ---------------------------------------------------------------------------------------------- entries


def code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def anchor(module: Module, name: str) -> str:
    return f"{module.name.replace('.', '-') or 'llmcourse'}-{name}"


def said(node: ast.stmt) -> str:
    return ast.get_docstring(node) or ""


def of_methods(node: ast.ClassDef) -> list[str]:
    blocks, silent = [], []
    for item in node.body:
        if not isinstance(item, FUNCTIONS) or item.name.startswith("_"):
            continue
        if any(m.endswith((".setter", "overload")) for m in decorators(item)):
            continue
        if not said(item):
            silent.append(f"`{item.name}`")
            continue
        first, more = laid_out(said(item))
        inner = [re.sub(r"(?m)^", "  ", block) for block in more]
        told = f"* **.{escaped(item.name)}**{code(of_function(item, True)) if of_function(item, True) else ''}: {first}"
        blocks.append("\n".join([told, *inner]))
    if silent:
        blocks.append(f"* also {', '.join(silent)}")
    return blocks


def maker_of(module: Module, node: ast.ClassDef) -> ast.FunctionDef | None:
    """The `__init__` or `__new__` that says how a class is called; None where its fields do."""
    for _, part in lineage(module, node):
        for item in part.body:
            if isinstance(item, FUNCTIONS) and item.name in ("__init__", "__new__"):
                return item
        if is_data(part):
            return None
    return None


def entry(module: Module, name: str) -> str:
    """What the page says about one name."""
    where = home(module, name)
    mark = f'<span id="{anchor(module, name)}"></span>**{escaped(name)}**'
    if where is None:
        raise SystemExit(f"llmcourse.{module.name}: __all__ names {name}, and nothing there makes it")
    if where is not module and name in where.public:
        return f"{mark}: as in [{where.name}](#{anchor(where, name)})."
    module, node = where, where.definitions[name]
    if isinstance(node, FUNCTIONS):
        first, more = laid_out(said(node))
        return glued([f"{mark}{code(of_function(node))}: {first}", *more])
    if not isinstance(node, ast.ClassDef):
        words, alone = comment(module, node), not isinstance(getattr(node, "targets", [None])[0], ast.Tuple)
        value = short(node.value) if alone else short(node)
        return f"{mark}{code('= ' + value if alone else value)}" + (f": {escaped(words)}" if words else "")
    first, more = laid_out(said(node))
    explained = []
    maker = maker_of(module, node)
    if maker is not None:
        call, above = of_function(maker, True).split(" → ")[0], laid_out(said(maker))
        more += [b for b in (above[0], *above[1]) if b]
    else:
        known = fields(module, node)
        call = f"({', '.join(told for told, _ in known.values())})" if known else ""
        explained = [f"* `{key}`: {escaped(words)}" for key, (_, words) in known.items() if words]
    bases = [ast.unparse(b) for b in node.bases]
    kind = f" *(class, extends {code(', '.join(bases))})*" if bases else " *(class)*"
    return glued([f"{mark}{code(call) if call else ''}{kind}: {first}", *more, *explained, *of_methods(node)])


@functools.cache
def sections(notebook: str) -> dict[str, tuple[str, str]]:
    """Cell of a chapter -> (heading above it, its anchor)."""
    found, now = {}, ("", "")
    for cell in json.loads((form.NBS / notebook).read_text(encoding="utf8"))["cells"]:
        if cell["cell_type"] == "markdown" and cell["id"] not in ("head", "foot"):
            body = re.sub(r"(?ms)^```.*?^```", "", "".join(cell["source"]))
            for words in re.findall(r"^#{2,} +(.+?)\s*$", body, re.M):
                words, _, label = words.partition(" {#")
                now = (words, label.rstrip("}") or form.heading_id(words))
        found[cell["id"]] = now
    return found


def place(notebook: str, cell: str) -> str:
    heading, where = sections(notebook).get(cell, ("", ""))
    title = form.title_of(notebook)
    return f"[{title} › {heading}]({notebook}#{where})" if where else f"[{title}]({notebook})"


def section(module: Module) -> str:
    """One module: what it is, and a closed list of its names."""
    chapters = list(dict.fromkeys(notebook for _, notebook, _ in module.cells))
    about = said(module.tree)
    if chapters:
        links = " and ".join(f"[{form.title_of(c)}]({c})" for c in chapters)
        lead = f"Made in {links}."
    else:
        first, more = laid_out(about)
        lead = glued([first or "Written by hand.", *more])
    parts, last = [], None
    for name in module.public:
        source = module.made_in(name) if name in module.definitions else None
        here = place(*source) if source else None
        if here and here != last:
            parts.append(f"*{here}*")
            last = here
        parts.append(entry(module, name))
    n = len(module.public)
    names = f"{n} name{'s' if n != 1 else ''}"
    body = "\n\n".join(parts)
    summary = f"{names}: {', '.join(module.public[:4])}{', …' if n > 4 else ''}"
    return f"### {module.name}\n\n{lead}\n\n<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def top(module: Module) -> str:
    """The names of the package itself, each with the module that describes it."""
    table = ast.literal_eval(module.definitions["_PUBLIC"].value)
    by_module: dict[str, list[str]] = {}
    for name, where in table.items():
        owner = home(modules()[where], name)
        by_module.setdefault(where, []).append(f"[{name}](#{anchor(owner, name)})")
    rows = [f"| [{where}](#{where}) | {', '.join(names)} |" for where, names in by_module.items()]
    return "\n".join([TOP, "", "| module | names |", "|---|---|", *rows])


def shell() -> str:
    """The commands of the program `llmcourse`."""
    rows = ["| command | what it does |", "|---|---|"]
    practice = modules()["practice.commands"]
    added = re.search(r"for command in \(([\w, ]+)\):", practice.text)[1].split(
        ", "
    )  # each by the name of its function
    found = [practice.definitions[name] for name in added]
    for node in reversed([n for n in modules()["cli"].tree.body if isinstance(n, ast.FunctionDef)]):
        if any(ast.unparse(mark).startswith("app.command(") for mark in node.decorator_list):
            found.insert(0, node)
    rows += [f"| `llmcourse {node.name}` | {laid_out(said(node))[0]} |" for node in found]
    return "\n".join([SHELL, "", *rows])


def exported_order() -> list[str]:
    order = form.reading_order()
    made = [m for m in modules().values() if m.cells and m.public]
    return [m.name for m in sorted(made, key=lambda m: (order.index(m.cells[0][1]), m.name))]


def page() -> nbformat.NotebookNode:
    front = (
        '---\ntitle: "Reference of the package"\n'
        'subtitle: "Every public name: how it is called, what it gives back, and the chapter that makes it."\n'
        "output-file: reference.html\ncourse:\n  needs: []\n  minutes-read: 1\n  sources: []\n---"
    )
    cells = [nbformat.v4.new_raw_cell(front, id="front"), form.markdown_cell("module-how", paragraphs(INTRO))]
    cells.append(form.markdown_cell("module-names", f"## The package\n\n{top(modules()[''])}"))
    cells.append(form.markdown_cell("module-shell", f"## The commands\n\n{shell()}"))
    cells.append(form.markdown_cell("module-chapters", "## What the chapters make"))
    known = modules()
    exported = exported_order()
    hand = [name for name in known if name and name not in exported and known[name].public]
    cells += [form.markdown_cell(f"module-{n.replace('.', '-')}", section(known[n])) for n in exported]
    cells.append(form.markdown_cell("module-hand", "## What is written by hand\n\n" + paragraphs(HAND)))
    cells += [form.markdown_cell(f"module-{n.replace('.', '-')}", section(known[n])) for n in hand]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def silent() -> list[str]:
    """Public functions and classes without a docstring."""
    found = []
    for module in modules().values():
        for name in module.public:
            node = (home(module, name) or module).definitions.get(name)
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not said(node):
                found.append(".".join(part for part in ("llmcourse", module.name, name) if part))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something is out of date")
    check, stale = parser.parse_args().check, []
    form.write(form.NBS / PAGE, form.generate(PAGE, page()), check, stale)
    for name in stale:
        print(f"{name} is out of date: python tools/reference.py" if check else f"wrote {name}")
    missing = silent()
    for name in missing:
        print(f"{name} has no docstring")
    return int(bool(missing) or (check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
