"""The pages in Chinese: in step with the English ones, the same code and outputs, links that lead somewhere.

tools/translate.py says in `faults` what is wrong with a page; here the real pages have none, and each fault is seen on
a small page of our own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import book_rules as rules
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import translate  # noqa: E402

NAMES = translate.pages()
KEYS = rules.bibliography_keys((ROOT / "references.bib").read_text(encoding="utf8"))
WORDS = re.compile(r"^#\| (?:fig-cap|fig-alt|tbl-cap|code-summary):.*\n", re.M)


def fine(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


@pytest.fixture(params=NAMES)
def page(request: pytest.FixtureRequest) -> translate.Page:
    return translate.Page(request.param)


# -------------------------------------------------------------------------------------------------- the real pages


def test_a_page_is_in_step_with_its_original(page: translate.Page) -> None:
    fine(translate.faults(page))
    built = page.built.read_text(encoding="utf8") if page.built.exists() else ""
    assert built == translate.build(page), f"run: python tools/translate.py {page.name}"


def test_code_and_outputs_are_those_of_the_original(page: translate.Page) -> None:
    theirs = [c for c in rules.load(ROOT / "nbs" / f"{page.name}.ipynb")["cells"] if c["cell_type"] == "code"]
    ours = [c for c in rules.load(page.built)["cells"] if c["cell_type"] == "code" and c["id"] != translate.FOLDER]
    assert [c["id"] for c in ours] == [c["id"] for c in theirs]
    for mine, original in zip(ours, theirs, strict=True):
        assert WORDS.sub("", rules.text(mine["source"])) == WORDS.sub("", rules.text(original["source"])), mine["id"]
        assert mine["outputs"] == original["outputs"] and mine["metadata"] == original["metadata"], mine["id"]


def test_links_lead_somewhere_and_the_two_languages_to_each_other(page: translate.Page) -> None:
    books = {f"../{p.name}": rules.load(p) for p in (ROOT / "nbs").glob("*.ipynb")}
    books |= {f"{name}.ipynb": rules.load(translate.Page(name).built) for name in NAMES}
    here, original = f"{page.name}.ipynb", books[f"../{page.name}.ipynb"]
    fine(rules.links_resolve(here, books[here], ROOT / "nbs" / "zh", books))
    head = lambda nb: rules.text(next(c["source"] for c in nb["cells"] if c["id"] == "head"))
    assert f"](zh/{here})" in head(original), f"run: python tools/form.py nbs/{here}"
    assert f"](../{here})" in head(books[here])


def test_the_rules_of_the_book_hold(page: translate.Page) -> None:
    nb = rules.load(page.built)
    for rule in (rules.one_title, rules.directives_have_values, rules.figures_described, rules.figures_referred_to):
        fine(rule(nb))
    fine(rules.references_known(nb, set(rules.labels(nb)), KEYS))
    meta, original = rules.front_matter(nb), rules.front_matter(rules.load(ROOT / "nbs" / f"{page.name}.ipynb"))
    assert meta["lang"] == "zh" and meta["output-file"] == original["output-file"]
    assert not re.search("[A-Za-z]{3}", re.sub("[A-Z]{2,}", "", meta["title"])), "the title is in Chinese"


def test_every_cell_with_words_says_its_language(page: translate.Page) -> None:
    for _, cell in rules.cells(rules.load(page.built), "markdown"):
        assert 'lang="zh"' in rules.text(cell["source"]).split("\n")[0], cell["id"]


def test_the_tool_says_the_same(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["translate.py", "--check"])
    assert translate.main() == 0 and capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["translate.py", "--todo", "99_nothing"])
    with pytest.raises(SystemExit, match="PAGE is '99_nothing'; allowed"):
        translate.main()


def test_the_code_of_a_page_runs_in_the_folder_of_its_original(tmp_path, monkeypatch) -> None:
    (tmp_path / "zh").mkdir()
    monkeypatch.chdir(tmp_path / "zh")
    for _ in range(2):  # a cell may be run again
        exec(translate.ENTER)
        assert Path(os.getcwd()) == tmp_path


# --------------------------------------------------------------------------------------------- each fault can be seen

FRONT = """---
title: "Rounding"
subtitle: "Store 4 bits."
output-file: a.html
course:
  needs: []
  covers: [A1]
---"""
TEXT = """## Idea

A *weight* of $s$ is rounded, as [the next](02_b.ipynb) chapter says with `round`:

```bash
make b  # it
```

![A grid](_images/grid.png)"""
DRAW = """#| label: fig-a
#| fig-cap: "Four values."
#| fig-alt: "A line with four points."
#| code-summary: "Imports"
x = 1"""
HEAD = """# Rounding

*Store 4 bits.*

<div class="course-facts">

* **Read first:** [Next](02_b.ipynb), a little linear algebra
* **To read:** 1 h 5 min
* **Practice:** [2 exercises](../exercises/01_a/a.ipynb), about 3 h 1 min
* **Sources:** [Shannon, 1948](93_references.ipynb#shannon1948)

</div>

<div class="course-nav">

[Contents](index.ipynb) · [Next →](02_b.ipynb)

</div>"""
CHINESE = {
    "idea": """## 思路

权重 $s$ 用 `round` 舍入，见[下一章](02_b.ipynb)；这里的*权重*只有一个：

```bash
make b  # 就是它
```

![一个网格](_images/grid.png)""",
    "draw": "fig-cap: 四个值。\nfig-alt: 一条线上的四个点。",
    "look": "见[图 7](#fig-a)。",
}
TITLES = {"01_a": {"title": "舍入", "subtitle": "只存 4 位。"}}


def cell(id: str, source: str, kind: str = "markdown") -> dict:
    more = {"outputs": [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}], "execution_count": None}
    return {"cell_type": kind, "id": id, "metadata": {}, "source": source} | (more if kind == "code" else {})


@pytest.fixture
def small(tmp_path: Path):
    """A book of two chapters, the first translated; `change(what, value)` writes it anew and gives the page."""
    nbs = tmp_path / "nbs"
    (nbs / "zh").mkdir(parents=True)
    cells = [cell("front", FRONT, "raw"), cell("head", HEAD), cell("idea", TEXT), cell("draw", DRAW, "code")]
    cells += [cell("draw-caption", "Four"), cell("look", "See [Figure 1](#fig-a)."), cell("foot", HEAD)]
    now = {"cells": cells, "blocks": CHINESE, "titles": TITLES}
    first = translate.Page("01_a", nbs)

    def write(cells: list[dict]) -> None:
        for name in ("01_a", "02_b"):
            (nbs / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}), encoding="utf8")

    write(cells)
    digests = {id: translate.digest(words) for id, words in first.wanted().items()}
    of_title = translate.digest("Rounding\nStore 4 bits.")

    def change(**new: object) -> translate.Page:
        said = now | new
        write(said["cells"])
        marks = [f"<!-- cell {id} {digests.get(id, '0' * 8)} -->\n{text}\n" for id, text in said["blocks"].items()]
        (nbs / "zh" / "01_a.md").write_text("about\n\n" + "\n".join(marks), encoding="utf8")
        titles = {name: {"original": of_title} | t for name, t in said["titles"].items()}
        (nbs / "zh" / "_titles.yml").write_text(yaml.safe_dump(titles, allow_unicode=True), encoding="utf8")
        return translate.Page("01_a", nbs)

    change.cells, change.nbs = cells, nbs
    return change


def speaks(page: translate.Page, *words: str) -> None:
    found = translate.faults(page)
    assert len(found) == 1 and all(word in found[0] for word in words), found


def with_source(cells: list[dict], id: str, source: str) -> list[dict]:
    return [c | {"source": source} if c["id"] == id else c for c in cells]


def test_a_page_without_faults(small) -> None:
    page = small()
    assert translate.faults(page) == []
    made = {c["id"]: c for c in json.loads(translate.build(page))["cells"]}
    assert list(made) == ["front", "head", "idea", translate.FOLDER, "draw", "draw-caption", "look", "foot"]
    said = {id: "".join(c["source"]) for id, c in made.items()}
    assert 'title: "舍入"' in said["front"] and "\nlang: zh\n" in said["front"] and "covers" not in said["front"]
    for words in (
        "* **先读：** [Rounding](../02_b.ipynb)、一点线性代数",
        "* **阅读：** 1 小时 5 分钟",
        "[2 道习题](../../exercises/01_a/a.ipynb)，约 3 小时 1 分钟",
        "[Shannon, 1948](../93_references.ipynb#shannon1948)",
        "[目录](../index.ipynb) · [Rounding（英文） →](../02_b.ipynb)",
    ):
        assert words in said["head"], words
    assert '<span id="idea"></span>\n\n## 思路' in said["idea"] and "(../_images/grid.png)" in said["idea"]
    for line in ('#| fig-cap: "四个值。"', '#| fig-alt: "一条线上的四个点。"', '#| code-summary: "导入"', "x = 1"):
        assert line in said["draw"].split("\n")
    assert "*图 1。* 四个值。" in said["draw-caption"] and "[图 1](#fig-a)" in said["look"]
    assert made["draw"]["outputs"] == small.cells[3]["outputs"]


def test_a_link_to_a_chapter_that_is_translated_stays_in_chinese(small) -> None:
    (small.nbs / "zh" / "02_b.md").write_text("", encoding="utf8")
    assert "[下一章](02_b.ipynb)" in translate.build(small())


def test_a_block_that_is_older_than_its_original(small) -> None:
    page = small(cells=with_source(small.cells, "idea", TEXT.replace("rounded", "cut")))
    speaks(page, "01_a.md: cell idea is older", "--diff 01_a", "--confirm 01_a idea")
    assert translate.todo(page).startswith(f"<!-- cell idea {translate.digest(page.wanted()['idea'])} -->\n## Idea")
    translate.confirm(page, ["idea"])
    assert translate.faults(translate.Page("01_a", small.nbs)) == []


def test_a_caption_that_is_older_than_its_original(small) -> None:
    speaks(small(cells=with_source(small.cells, "draw", DRAW.replace("Four", "Five"))), "cell draw is older")
    assert translate.faults(small(cells=with_source(small.cells, "draw", DRAW.replace("x = 1", "x = 2")))) == []


def test_a_figure_that_is_counted_anew_makes_nothing_old(small) -> None:
    assert translate.faults(small(cells=with_source(small.cells, "look", "See [Figure 2](#fig-a)."))) == []


def test_what_changed_is_found_in_the_history(small) -> None:
    small()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", "-C", str(small.nbs.parent)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    shown = translate.changes(small(cells=with_source(small.cells, "idea", TEXT.replace("rounded", "cut"))))
    assert "\n-A *weight* of $s$ is rounded," in shown and "\n+A *weight* of $s$ is cut," in shown


def test_terms_that_the_glossary_calls_otherwise(small) -> None:
    row = '| weight | <span lang="zh">{}</span> | a number |'
    for chinese, said in (("权重（参数）", ""), ("砝码", "01_a, cell idea: weight: 砝码")):
        words = json.dumps({"cells": [cell("terms", row.format(chinese))], "metadata": {}})
        (small.nbs / "91_glossary.ipynb").write_text(words, encoding="utf8")
        assert translate.terms(small()) == said


def test_blocks_and_cells_that_lack_each_other(small) -> None:
    speaks(small(cells=[*small.cells, cell("more", "More.")]), "cell more has no block", "--todo 01_a")
    speaks(small(blocks=CHINESE | {"gone": "没有了"}), "gone is in no cell")
    speaks(small(blocks=dict(reversed(CHINESE.items()))), "another order")
    speaks(small(blocks=CHINESE | {"draw": "fig-cap: 四个值。"}), "cell draw wants fig-cap, fig-alt")
    for bad in ("<!-- cell idea -->", "<!-- cell idea 00000000 -->"):
        with pytest.raises(SystemExit, match=r"allowed: (<!-- cell ID DIGEST -->|one)"):
            translate.faults(small(blocks=CHINESE | {"look": f"见[图 1](#fig-a)。\n\n{bad}\n错"}))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("## 思路", "思路", "headings"),
        ("`round`", "round", "code in the text"),
        ("$s$", "$t$", "formulas"),
        ("02_b", "03_c", "links"),
        ("make b", "make c", "blocks of code"),
        ("只有一个", "只有 1 个", "numbers"),
        ("：\n", ":\n", "fullwidth"),
        ("舍入，见", "舍入, 见", "fullwidth"),
        ("这里的*权重*只有一个", "**这里：**只有一个", "star"),
        ("这里的*权重*只有一个", "*这里。*只有*一个*，而且*就*一个", "star"),
        ("一个网格", "a grid", None),
        ("```\n\n!", "```\n\n<div>\n\n</div>\n\n!", "tags"),
        ("\n\n```bash", "\n\n| a |\n|---|\n\n```bash", "rows of tables"),
    ],
)
def test_a_translation_that_lost_or_added_something(small, old: str, new: str, says: str | None) -> None:
    assert old in CHINESE["idea"]
    page = small(blocks=CHINESE | {"idea": CHINESE["idea"].replace(old, new, 1)})
    assert translate.faults(page) == [] if says is None else True
    if says:
        speaks(page, "cell idea", says)


def test_a_block_that_was_left_in_english(small) -> None:
    speaks(small(blocks=CHINESE | {"look": "See [Figure 1](#fig-a)."}), "cell look", "no Chinese")


def test_titles(small) -> None:
    speaks(small(titles={}), "01_a has no title")
    old = {"01_a": TITLES["01_a"] | {"original": "00000000"}}
    speaks(small(titles=old), "01_a is older", "'Rounding\\nStore 4 bits.'", "--confirm 01_a 01_a")
    translate.confirm(small(titles=old), ["01_a"])
    assert translate.faults(translate.Page("01_a", small.nbs)) == []
    speaks(small(titles={"01_a": TITLES["01_a"] | {"subtitle": "只存几位。"}}), "numbers", "4")
    with pytest.raises(SystemExit, match="no title"):
        translate.build(small(titles={}))


def test_the_table_of_chapters(small) -> None:
    table = "| chapter | what it does | practice |\n|---|---|---|\n| [Rounding](02_b.ipynb) | Store. | "
    table += "[2 exercises](../exercises/a.ipynb), about 48 min; [4 exercises](b), about 2 h |"
    page = small(cells=[*small.cells, cell("contents", table)])
    speaks(page, "02_b has no title")
    titles = TITLES | {"02_b": TITLES["01_a"] | {"title": "下一章"}}
    page = small(cells=[*small.cells, cell("contents", table)], titles=titles)
    assert translate.faults(page) == []
    made = "".join(json.loads(translate.build(page))["cells"][-1]["source"])
    assert "| [下一章](../02_b.ipynb) | 只存 4 位。 | [2 道习题](../../exercises/a.ipynb)，约 48 分钟；[4 道" in made
    assert made.endswith("[4 道习题](../b)，约 2 小时 |\n\n</div>")
    gone = TITLES | {"02_b": titles["02_b"], "77_gone": TITLES["01_a"]}
    speaks(small(cells=[*small.cells, cell("contents", table)], titles=gone), "77_gone is no chapter")


def test_a_line_of_the_head_that_has_no_chinese_form(small) -> None:
    page = small(cells=with_source(small.cells, "head", HEAD.replace("To read", "To sing")))
    with pytest.raises(SystemExit, match="To sing"):
        translate.build(page)
