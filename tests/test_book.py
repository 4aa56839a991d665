"""The book's sources: every chapter that _quarto.yml lists, read and not run.

The rules are in book_rules.py; each is run here on the real chapters, and each has a test that
feeds it a broken notebook, so that a rule that has gone silent is noticed. The last class renders
the whole book: it needs Quarto, takes a minute, and runs when BOOK_TEST=1.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import book_rules as rules
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
LISTED = rules.chapter_files(CONFIG)
# For teachers: a notebook beside the book.
APART = "nbs/92_teaching.ipynb"
# The pages in nbs/zh are made from those in nbs: tests/test_translation.py looks at them.
NOTEBOOKS = [*(f for f in LISTED if f.endswith(".ipynb") and not f.startswith("nbs/zh/")), APART]
KEYS = rules.bibliography_keys((ROOT / "references.bib").read_text(encoding="utf-8"))
CHAPTERS = {rules.slug(Path(f).stem) for f in NOTEBOOKS}


@pytest.fixture(scope="module")
def books() -> dict[str, dict]:
    """All notebooks that are there, by file name."""
    return {Path(f).name: rules.load(ROOT / f) for f in NOTEBOOKS if (ROOT / f).exists()}


# A notebook that is not there fails once, in test_every_chapter_is_listed_and_there.
@pytest.fixture(params=[Path(f).name for f in NOTEBOOKS if (ROOT / f).exists()])
def chapter(request: pytest.FixtureRequest, books: dict[str, dict]) -> tuple[str, dict]:
    return request.param, books[request.param]


def fine(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


class TestChapters:
    def test_every_chapter_is_listed_and_there(self) -> None:
        existing = {
            p.relative_to(ROOT).as_posix()
            for p in [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/zh/*.ipynb"), ROOT / "index.qmd"]
            if p.exists()
        }
        fine(rules.listing(LISTED, existing))

    def test_front_matter(self, chapter: tuple[str, dict]) -> None:
        fine(rules.front_matter_complete(Path(chapter[0]).stem, chapter[1], CHAPTERS, KEYS))

    def test_one_title(self, chapter: tuple[str, dict]) -> None:
        fine(rules.one_title(chapter[1]))

    def test_directives_have_values(self, chapter: tuple[str, dict]) -> None:
        fine(rules.directives_have_values(chapter[1]))

    def test_figures_are_described(self, chapter: tuple[str, dict]) -> None:
        fine(rules.figures_described(chapter[1]))

    def test_figures_are_folded(self, chapter: tuple[str, dict]) -> None:
        fine(rules.figures_folded(chapter[1]))

    def test_figures_are_referred_to(self, chapter: tuple[str, dict]) -> None:
        fine(rules.figures_referred_to(chapter[1]))

    def test_no_errors(self, chapter: tuple[str, dict]) -> None:
        fine(rules.no_errors(chapter[1]))

    def test_as_said(self, chapter: tuple[str, dict]) -> None:
        fine(rules.as_said(chapter[1]))

    def test_was_run(self, chapter: tuple[str, dict]) -> None:
        fine(rules.was_run(chapter[1]))

    def test_nothing_volatile(self, chapter: tuple[str, dict]) -> None:
        fine(rules.nothing_volatile(chapter[1]))

    def test_no_machine_paths(self, chapter: tuple[str, dict]) -> None:
        fine(rules.no_machine_paths(chapter[1]))

    def test_intervals_say_their_level(self, chapter: tuple[str, dict]) -> None:
        fine(rules.intervals_say_their_level(chapter[1]))

    def test_no_typed_results(self, chapter: tuple[str, dict]) -> None:
        fine(rules.no_typed_results(chapter[1]))

    def test_references(self, chapter: tuple[str, dict], books: dict[str, dict]) -> None:
        known = {label for nb in books.values() for label in rules.labels(nb)}
        fine(rules.references_known(chapter[1], known, KEYS))

    def test_links(self, chapter: tuple[str, dict], books: dict[str, dict]) -> None:
        fine(rules.links_resolve(chapter[0], chapter[1], ROOT / "nbs", books))

    def test_labels_are_unique(self, books: dict[str, dict]) -> None:
        fine(rules.labels_unique(books))


# ------------------------------------------------------------------------- each rule can fail


def md(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs), "execution_count": None}


def raw(source: str) -> dict:
    return {"cell_type": "raw", "metadata": {}, "source": source}


def notebook(*cells: dict, **metadata: object) -> dict:
    return {"cells": list(cells), "metadata": metadata}


def prints(words: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": words}


def shows(**data: str) -> dict:
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()}, "metadata": {}}


FRONT = """---
title: "Quantization"
subtitle: "Store a weight in four bits and measure what that costs."
output-file: quantization.html
course:
  needs: [runtime, "a little algebra"]
  minutes-read: 25
  minutes-run: 2
  sources: ["@jacob2018"]
---"""
ALT = "A staircase of sixteen levels that follows a straight line from minus one to one."
FIGURE = f'#| label: fig-levels\n#| fig-cap: "Sixteen levels."\n#| fig-alt: "{ALT}"\nplot()'
PICTURE = shows(image_png="iVBORw0KGgo=")


def speaks(problems: list[str], word: str) -> None:
    assert any(word in p for p in problems), f"nothing says {word!r}: {problems}"


class TestRulesCanFail:
    def test_listing(self) -> None:
        assert (
            rules.listing(["index.qmd", "nbs/00_a.ipynb"], {"index.qmd", "nbs/00_a.ipynb", "nbs/92_teaching.ipynb"})
            == []
        )
        speaks(rules.listing(["nbs/92_teaching.ipynb"], {"nbs/92_teaching.ipynb"}), "learners")
        speaks(rules.listing(["nbs/00_a.ipynb"], set()), "not there")
        speaks(rules.listing([], {"nbs/00_a.ipynb"}), "not listed")
        speaks(rules.listing(["nbs/00_a.ipynb"] * 2, {"nbs/00_a.ipynb"}), "twice")
        speaks(rules.listing(["nbs/02_b.ipynb", "nbs/00_a.ipynb"], {"nbs/02_b.ipynb", "nbs/00_a.ipynb"}), "order")

    def test_chapter_files_flattens_parts(self) -> None:
        config = {
            "book": {
                "chapters": [
                    {"file": "index.qmd", "text": "Home"},
                    {"part": "One", "chapters": ["nbs/00_a.ipynb"]},
                    "nbs/01_b.ipynb",
                ]
            }
        }
        assert rules.chapter_files(config) == ["index.qmd", "nbs/00_a.ipynb", "nbs/01_b.ipynb"]

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ('title: "Quantization"\n', "", "no title"),
            ('subtitle: "Store a weight in four bits and measure what that costs."\n', "", "no subtitle"),
            ("output-file: quantization.html", "output-file: 14_quantization.html", "output-file"),
            ("minutes-read: 25", "minutes-read: long", "minutes-read"),
            ("minutes-run: 2", "minutes-run: 0", "minutes-run"),
            ('needs: [runtime, "a little algebra"]', "needs: runtime", "needs"),
            ("needs: [runtime,", "needs: [runtimes,", "no chapter"),
            ("needs: [runtime,", "needs: [Runtime,", "becomes a link"),
            ("@jacob2018", "@jacob1918", "references.bib"),
            ("  minutes-run: 2", "  minutes-run: 2\n  mood: calm", "mood"),
            ("---\ntitle", "title", "raw cell"),
        ],
    )
    def test_front_matter(self, old: str, new: str, says: str) -> None:
        chapters, keys = {"runtime", "quantization"}, {"jacob2018"}
        assert rules.front_matter_complete("14_quantization", notebook(raw(FRONT)), chapters, keys) == []
        assert old in FRONT
        speaks(
            rules.front_matter_complete("14_quantization", notebook(raw(FRONT.replace(old, new, 1))), chapters, keys),
            says,
        )

    def test_front_matter_in_a_markdown_cell_does_not_count(self) -> None:
        speaks(rules.front_matter_complete("14_quantization", notebook(md(FRONT)), set(), set()), "raw cell")

    def test_one_title(self) -> None:
        assert rules.one_title(notebook(md("## Idea\n\n```python\n# a comment\n```"))) == []
        speaks(rules.one_title(notebook(md("# Again"))), "level-1")

    @pytest.mark.parametrize("line", ["#| export", "#| hide", "#|export", "#| default_exp quantization"])
    def test_directives_have_values(self, line: str) -> None:
        assert rules.directives_have_values(notebook(code("#| export: true\n#| code-fold: true\nx = 1"))) == []
        assert rules.directives_have_values(notebook(code("#| default_exp: quantization"))) == []
        speaks(rules.directives_have_values(notebook(code(f"{line}\nx = 1"))), "no value")

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            (FIGURE.replace("fig-levels", "levels"), "label"),
            (FIGURE.replace('#| fig-cap: "Sixteen levels."\n', ""), "fig-cap"),
            (FIGURE.replace(ALT, "A plot."), "fig-alt"),
            ("plot()", "fig-alt"),
        ],
    )
    def test_figures(self, source: str, says: str) -> None:
        assert rules.figures_described(notebook(code(FIGURE, PICTURE))) == []
        speaks(rules.figures_described(notebook(code(source, PICTURE))), says)

    def test_figure_that_can_be_moved(self) -> None:
        from llmcourse.touch_figures import schedules

        good = schedules(alt=ALT)._repr_html_()
        moved = lambda html: notebook(code(FIGURE, shows(text_html=html)))
        assert rules.figures_described(moved(good)) == rules.nothing_volatile(moved(good)) == []
        speaks(rules.figures_described(notebook(code("plot()", shows(text_html=good)))), "fig-alt")
        changed = {
            "script is not the one": good.replace("now.warmup", "now.warm"),
            "no JSON": good.replace('json">{', 'json">'),
            "no controls": good.replace('"controls":', '"buttons":'),
            "want 40 or more": re.sub(r' alt="[^"]*"', ' alt="Lines."', good),
            "a still picture, data, one script": good.replace("<img", "<object"),
            "not as llmcourse/touch.py writes it": good.replace("data:image/svg+xml,", "https://a.example/"),
        }
        for says, html in changed.items():
            assert html != good
            speaks(rules.nothing_volatile(moved(html)), says)
        speaks(rules.nothing_volatile(moved(f"<p></p>{good}")), "loads a script")

    def test_figure_that_was_not_drawn(self) -> None:
        speaks(rules.figures_described(notebook(code(FIGURE))), "no picture")
        speaks(rules.figures_described(notebook(code(FIGURE, PICTURE, PICTURE))), "2 pictures")

    def test_figure_whose_code_is_open(self) -> None:
        speaks(rules.figures_folded(notebook(code(FIGURE))), "fig-levels")
        for choice in ("true", "false"):
            assert rules.figures_folded(notebook(code(f"#| code-fold: {choice}\n{FIGURE}"), code("x = 1"))) == []
        speaks(rules.figures_folded(notebook(code(f"#| code-fold: yes please\n{FIGURE}"))), "fig-levels")

    @pytest.mark.parametrize("words", ["See @fig-levels.", "In [Figure 1](#fig-levels) the levels are even."])
    def test_figure_that_no_sentence_names(self, words: str) -> None:
        caption = {**md("*Figure 1.* See @fig-levels."), "id": "c-caption"}
        for cells in ((md(words), code("x"), code(FIGURE)), (code(FIGURE), caption, code("x"), md(words))):
            assert rules.figures_referred_to(notebook(*cells)) == []
        speaks(rules.figures_referred_to(notebook(md("A figure."), code(FIGURE), caption)), "@fig-levels")
        speaks(rules.figures_referred_to(notebook(md("See @fig-levels-2."), code(FIGURE))), "@fig-levels")
        speaks(rules.figures_referred_to(notebook(md(words), md("Elsewhere."), code(FIGURE))), "@fig-levels")

    def test_errors(self) -> None:
        assert rules.no_errors(notebook(code("x", prints("1")))) == []
        speaks(
            rules.no_errors(
                notebook(code("x", {"output_type": "error", "ename": "NameError", "evalue": "", "traceback": []}))
            ),
            "NameError",
        )

    def test_as_said(self) -> None:
        from llmcourse.runtime import say_unseen

        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            say_unseen({"twice as fast": False, "half as large": True})
        line = told.getvalue()
        assert "twice as fast" in line and "half as large" not in line
        assert rules.as_said(notebook(code("#| include: true\nx", prints(line)))) == []  # the lesson about it
        assert rules.as_said(notebook(code("#| include: false\nx", prints("1")))) == []
        speaks(rules.as_said(notebook(code("#| include: false\nx", prints(line)))), "twice as fast")

    def test_was_run(self) -> None:
        assert rules.was_run(notebook(md("only words"))) == []
        assert rules.was_run(notebook(code("#| default_exp: x"))) == []
        assert rules.was_run(notebook(code("x = 1"), code("x", prints("1")))) == []
        speaks(rules.was_run(notebook(code("x = 1"), code("x"))), "2 code cells")

    def test_volatile(self) -> None:
        table = shows(text_html="<table><tr><td>1</td></tr></table>")
        assert rules.nothing_volatile(notebook(code("df", table), kernelspec={})) == []
        speaks(rules.nothing_volatile(notebook(widgets={})), "widgets")
        speaks(rules.nothing_volatile(notebook({**code("x"), "metadata": {"execution": {}}})), "execution")
        speaks(rules.nothing_volatile(notebook(code("x", shows(**{"application/javascript": "f()"})))), "javascript")
        speaks(rules.nothing_volatile(notebook(code("x", shows(text_html="<script>f()</script>")))), "script")
        speaks(
            rules.nothing_volatile(notebook(code("x", shows(text_html='<img src="https://a.example/b.png">')))),
            "network",
        )

    @pytest.mark.parametrize(
        "words",
        ["saved to /home/ann/model", "/Users/ann/x.py:3: UserWarning", r"C:\\Users\\ann", ".../site-packages/torch"],
    )
    def test_machine_paths(self, words: str) -> None:
        assert rules.no_machine_paths(notebook(code("x", prints("saved to out/model, 3 tok/s, and/or")))) == []
        assert rules.no_machine_paths(notebook(code("x", prints(words)))) != []

    @pytest.mark.parametrize(
        "line",
        [
            "again 1.02× (0.97 to 1.07), 3.5 ms (quartiles 3.4 to 3.6, n = 40)",
            "again 1.02× (interval 0.97 to 1.07), 3.5 ms (quartiles 3.4 to 3.6, n = 40)",
            "against the trigram: 0.0859× (0.0699 to 0.1047)",
        ],
    )
    def test_intervals_without_a_level(self, line: str) -> None:
        speaks(rules.intervals_say_their_level(notebook(code("x", prints(line)))), "without its level")
        told = (
            line.replace("(interval 0.97", "(0.97").replace("(0.97", "(95% interval 0.97").replace("47)", "47, 92 %)")
        )
        assert rules.intervals_say_their_level(notebook(code("x", prints(told)))) == []

    @pytest.mark.parametrize("source", ["half = 1.96 * error", 'print(f"± {error*1.96:.2f}")'])
    def test_intervals_by_hand(self, source: str) -> None:
        speaks(rules.intervals_say_their_level(notebook(code(source))), "llmcourse.verdicts")
        assert rules.intervals_say_their_level(notebook(code("def textbook(p):\n    return 1.96 * p"))) == []
        assert rules.intervals_say_their_level(notebook(code("edge = 1.96 / len(x) ** 0.5"))) == []

    def test_references(self) -> None:
        nb = notebook(
            md("See @sec-idea, @fig-levels and [@jacob2018; @nagel2021]. Write to a@b.example, `@property`, pass@1.")
        )
        assert rules.references_known(nb, {"sec-idea", "fig-levels"}, {"jacob2018", "nagel2021"}) == []
        speaks(rules.references_known(nb, {"sec-idea"}, {"jacob2018", "nagel2021"}), "@fig-levels")
        speaks(rules.references_known(nb, {"sec-idea", "fig-levels"}, {"jacob2018"}), "@nagel2021")

    def test_labels(self) -> None:
        one = notebook(md("## Idea {#sec-idea}"), code(FIGURE))
        assert rules.labels(one) == ["sec-idea", "fig-levels"]
        assert rules.labels_unique({"a": one}) == []
        speaks(rules.labels_unique({"a": one, "b": one}), "sec-idea")

    def test_links(self, tmp_path: Path) -> None:
        other = notebook(md("## The `Runtime` idea\n\n## Second {#sec-second}"))
        (tmp_path / "00_b.ipynb").write_text("{}")
        (tmp_path / "p.png").write_text("")

        def check(source: str) -> list[str]:
            nb = notebook(md("## Here\n\n" + source))
            return rules.links_resolve("01_a.ipynb", nb, tmp_path, {"01_a.ipynb": nb, "00_b.ipynb": other})

        good = (
            "[b](00_b.ipynb), [b](00_b.ipynb#sec-second), [b](00_b.ipynb#the-runtime-idea), [h](#here), "
            "[w](https://a.example), ![A picture](p.png) `[x](y)`"
        )
        assert check(good) == []
        speaks(check("[b](00_c.ipynb)"), "not there")
        speaks(check("[b](00_b.ipynb#sec-third)"), "#sec-third")
        speaks(check("[b](#there)"), "#there")
        speaks(check("![A picture](q.png)"), "not there")
        speaks(check("![](p.png)"), "alternative text")
        speaks(check("![A picture](https://a.example/p.png)"), "not a file")

    @pytest.mark.parametrize(
        "sentence",
        [
            "The perplexity falls from 15.2 to 14.1.",
            "That is 3.4× faster.",
            "It is 12 % slower than before.",
            "We measured 120 ms per step.",
            "The file takes 134.5 MB.",
            "Decoding gives 15 tok/s.",
            "This takes 2.5 seconds.",
        ],
    )
    def test_typed_results(self, sentence: str) -> None:
        speaks(rules.no_typed_results(notebook(md(sentence))), "typed into prose")
        assert rules.no_typed_results(notebook(md(f"{sentence[:-1]} [@jacob2018]."))) == []
        assert rules.no_typed_results(notebook(md(f"::: {{.published}}\n{sentence}\n:::"))) == []
        assert (
            rules.no_typed_results(notebook(md(f"{sentence} <!-- number-ok: an example, not a measurement -->"))) == []
        )
        assert rules.no_typed_results(notebook(md(f"```\n{sentence}\n```"))) == []
        # A reason is needed, a citation covers its own sentence only, and a published block ends.
        speaks(rules.no_typed_results(notebook(md(f"{sentence} <!-- number-ok: -->"))), "without a reason")
        speaks(rules.no_typed_results(notebook(md(f"As shown [@jacob2018]. {sentence}"))), "typed into prose")
        speaks(rules.no_typed_results(notebook(md(f"::: {{.published}}\nx\n:::\n{sentence}"))), "typed into prose")

    def test_plain_numbers_are_no_results(self) -> None:
        nb = notebook(
            md(
                "Chapter 3 uses 128 windows of 512 tokens, Python 3.11, and $0.5$ of them. "
                "A float has 32 bits, so int8 is 4 times smaller."
            )
        )
        assert rules.no_typed_results(nb) == []

    def test_rendered_page(self, tmp_path: Path) -> None:
        def page(body: str) -> rules.Page:
            return rules.Page(f"<html><body>{body}</body></html>")

        good = page(
            '<h2 id="a">A</h2><a href="#a">a</a><img src="p.png" alt="A picture"><math></math><pre>#| code</pre>'
        )
        for rule in (rules.pictures_have_alt, rules.math_is_mathml, rules.nothing_external, rules.no_leaks):
            assert rule(good) == []
        speaks(rules.pictures_have_alt(page('<img src="p.png">')), "alternative text")
        speaks(rules.math_is_mathml(page('<span class="math inline">x^2</span>')), "left as TeX")
        speaks(rules.math_is_mathml(page('<script src="libs/MathJax.js"></script>')), "MathJax")
        speaks(rules.nothing_external(page('<script src="https://cdn.example/a.js"></script>')), "cdn.example")
        speaks(rules.nothing_external(page('<link rel="stylesheet" href="//cdn.example/a.css">')), "cdn.example")
        speaks(rules.nothing_external(page("<style>@import 'https://fonts.example/a.css';</style>")), "fonts.example")
        speaks(rules.no_leaks(page("<p>#| export</p>")), "export")
        speaks(rules.no_leaks(page("<p>::: {#c6 .cell}</p>")), ":::")
        speaks(rules.no_leaks(page("<p>see ?@fig-levels</p>")), "fig-levels")

        (tmp_path / "a.html").write_text("")
        (tmp_path / "p.png").write_text("")
        here = tmp_path / "a.html"
        assert rules.page_links_resolve(here, {here: good}) == []
        speaks(rules.page_links_resolve(here, {here: page('<a href="b.html">b</a>')}), "b.html")
        speaks(rules.page_links_resolve(here, {here: page('<a href="#b">b</a>')}), "anchor")
        speaks(rules.page_links_resolve(here, {here: page('<img src="q.png" alt="q">')}), "q.png")

    def test_log(self) -> None:
        assert rules.warnings_in("[1/2] index.qmd\nOutput created: _book/index.html") == []
        speaks(rules.warnings_in("\x1b[33mWARN: Unable to resolve crossref @sec-x\x1b[39m"), "crossref")
        speaks(rules.warnings_in("[WARNING] Citeproc: citation x not found"), "citation")
        speaks(rules.warnings_in("\x1b[91mERROR: Book chapter not found"), "chapter")


# ------------------------------------------------------------------------------ the rendered book


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("BOOK_TEST") != "1", reason="renders the book: set BOOK_TEST=1")
@pytest.mark.skipif(shutil.which("quarto") is None, reason="needs Quarto on the path")
class TestRenderedBook:
    @pytest.fixture(scope="class")
    def rendered(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        """A copy is rendered, so that the checkout stays clean. Returns its folder and the log."""
        copy = tmp_path_factory.mktemp("book")
        for name in ("_quarto.yml", "index.qmd", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        shutil.copytree(ROOT / "exercises", copy / "exercises")
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*_files"))
        done = subprocess.run(["quarto", "render"], cwd=copy, capture_output=True, text=True, timeout=900)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
        return copy / CONFIG["project"]["output-dir"], log

    @pytest.fixture(scope="class")
    def pages(self, rendered: tuple[Path, str]) -> dict[Path, rules.Page]:
        return {
            p.resolve(): rules.Page(p.read_text(encoding="utf-8"))
            for p in rendered[0].rglob("*.html")
            if "site_libs" not in p.parts
        }

    def test_no_warnings(self, rendered: tuple[Path, str]) -> None:
        fine(rules.warnings_in(rendered[1]))

    def test_every_page_is_there(self, rendered: tuple[Path, str], pages: dict[Path, rules.Page]) -> None:
        listed = [Path(f) for f in LISTED if f.endswith(".ipynb")]
        names = {f.parent / rules.slug(f.stem).replace("index", "tour") for f in listed}
        want = {"index.html"} | {f"{name.as_posix()}.html" for name in names}
        assert {p.relative_to(rendered[0].resolve()).as_posix() for p in pages} == want

    @pytest.mark.parametrize(
        "rule", [rules.pictures_have_alt, rules.math_is_mathml, rules.nothing_external, rules.no_leaks]
    )
    def test_pages(self, pages: dict[Path, rules.Page], rule) -> None:
        fine([f"{where.name}: {problem}" for where, page in pages.items() for problem in rule(page)])

    def test_links(self, pages: dict[Path, rules.Page]) -> None:
        fine([f"{where.name}: {problem}" for where in pages for problem in rules.page_links_resolve(where, pages)])

    def test_a_page_says_its_language(self, pages: dict[Path, rules.Page]) -> None:
        for where, page in pages.items():
            lang = "zh" if where.parent.name == "zh" else "en"
            assert f'<html xmlns="http://www.w3.org/1999/xhtml" lang="{lang}' in page.html, where.name

    def test_style_sheets_load_nothing_external(self, rendered: tuple[Path, str]) -> None:
        fine(
            [
                f"{p.name}: {problem}"
                for p in rendered[0].rglob("*.css")
                for problem in rules.css_external(p.read_text(encoding="utf-8"))
            ]
        )

    def test_the_folder_it_was_made_in_is_not_in_the_pages(
        self, rendered: tuple[Path, str], pages: dict[Path, rules.Page]
    ) -> None:
        fine([where.name for where, page in pages.items() if str(rendered[0].parent) in page.html])
