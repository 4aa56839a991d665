"""The plain edition of the book (tools/book.py), built once and looked at: first as files, then in a real browser.

The rules stand in book_rules.py; those that are only for this edition have a test here that feeds them a broken book.
BOOK_TEST=1 looks at every page in the browser, and not only at a few.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import book_rules as rules
import pytest
from conftest import ROOT
from filelock import FileLock
from lab_server import CHROMIUM

sys.path.insert(0, str(ROOT / "tools"))
import book

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pypandoc") is None, reason="pypandoc_binary is not installed: pip install -e '.[book]'"
)
BOOK = book.Book.read()
EVERY_PAGE = os.environ.get("BOOK_TEST") == "1"


def fine(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def speaks(problems: list[str], word: str) -> None:
    assert any(word in p for p in problems), f"nothing says {word!r}: {problems}"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole book with its EPUB; parallel workers share one."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / "plain-book"
    with FileLock(shared / "plain-book.lock"):
        if not folder.exists():
            book.build(folder, epub=True, jobs=1)
    return folder


@pytest.fixture(scope="session")
def pages(built: Path) -> dict[Path, rules.Page]:
    return {p.resolve(): rules.Page(p.read_text(encoding="utf8")) for p in built.rglob("*.html")}


@pytest.fixture(scope="session")
def index(built: Path) -> dict:
    return rules.search_data((built / "search-index.js").read_text(encoding="utf8"))


# ---------------------------------------------------------------------------------- the files


class TestFiles:
    def test_every_chapter_has_its_page_and_no_other_is_there(self, built: Path, pages) -> None:
        assert {p.relative_to(built.resolve()).as_posix() for p in pages} == {c.page for c in BOOK.chapters}
        assert len(BOOK.chapters) == len(rules.chapter_files(BOOK.config))

    def test_the_pages_lie_where_quarto_puts_them(self) -> None:
        for c in BOOK.chapters:
            name = rules.slug(Path(c.source).stem).replace("index", "tour")
            assert c.page == ("index.html" if c.source == "index.qmd" else f"{Path(c.source).parent}/{name}.html")

    @pytest.mark.parametrize(
        "rule",
        [
            rules.pictures_have_alt,
            rules.math_is_mathml,
            rules.nothing_external,
            rules.no_leaks,
            rules.whole_page,
            rules.ids_unique,
        ],
    )
    def test_pages(self, pages, rule) -> None:
        fine([f"{where.name}: {problem}" for where, page in pages.items() for problem in rule(page)])

    def test_links_anchors_and_pictures(self, pages) -> None:
        fine([f"{where.name}: {p}" for where in pages for p in rules.page_links_resolve(where, pages)])

    def test_the_style_sheet_loads_nothing(self, built: Path) -> None:
        fine(rules.css_external((built / "book.css").read_text(encoding="utf8")))

    def test_every_formula_of_the_notebooks_is_mathml(self, pages, built: Path) -> None:
        page = pages[(built / "nbs/attention.html").resolve()].html
        assert page.count("<math ") > 100
        assert page.count("<math ") == page.count("application/x-tex")

    def test_answers_are_folded_and_code_as_the_notebook_says(self, built: Path) -> None:
        """As many <details> as the notebook has, and one for each folded cell; all shut."""
        chapter = BOOK.by_source()["nbs/03_attention.ipynb"]
        cells = rules.load(ROOT / chapter.source)["cells"]
        answers = sum(rules.text(c["source"]).count("<details>") for c in cells if c["cell_type"] == "markdown")
        seen = [rules.directives(c)[0] for c in cells if c["cell_type"] == "code"]
        folds = sum(bool(s.get("code-fold")) for s in seen if s.get("include") is not False)
        html = (built / chapter.page).read_text(encoding="utf8")
        main = html[html.index("<main") : html.index("</main>")]
        assert main.count("<details") == answers + folds > 10
        assert "<details open" not in main

    def test_a_cell_that_is_not_included_is_not_shown(self, built: Path) -> None:
        cells = rules.load(ROOT / "nbs/03_attention.ipynb")["cells"]
        hidden = next(c for c in cells if c["cell_type"] == "code" and "def refused(" in rules.text(c["source"]))
        assert rules.directives(hidden)[0]["include"] is False
        assert "def refused(" not in (built / "nbs/attention.html").read_text(encoding="utf8")

    def test_sheets_and_notebooks_can_be_downloaded(self, built: Path) -> None:
        for c in BOOK.chapters:
            if c.source.endswith(".ipynb"):
                assert (built / c.source).read_bytes() == (ROOT / c.source).read_bytes()
        for sheet in ROOT.glob("exercises/*/*.ipynb"):
            assert (built / sheet.relative_to(ROOT)).is_file()
        assert not (built / "nbs/92_teaching.ipynb").exists(), "it names the wrong answers"

    def test_before_and_after(self, built: Path) -> None:
        """Following `next` from the home page goes through every chapter in reading order, `prev` back."""
        order = [c.page for c in BOOK.chapters]
        for i, page in enumerate(order):
            html = (built / page).read_text(encoding="utf8")
            for way, j in (("prev", i - 1), ("next", i + 1)):
                found = rules.rel_links(html, way)
                want = {(built / order[j]).resolve()} if 0 <= j < len(order) else set()
                assert {((built / page).parent / f).resolve() for f in found} == want, (page, way)

    def test_the_search_knows_every_chapter(self, index: dict, built: Path) -> None:
        fine(rules.search_covers(index, built))

    def test_the_theme_is_the_one_of_quarto(self, built: Path) -> None:
        css = (built / "book.css").read_text(encoding="utf8")
        assert "--body-bg: #fdfdfb;" in css and "--body-bg: #16191d;" in css

    def test_the_epub(self, built: Path) -> None:
        fine(rules.epub_whole(built / book.EPUB, [f"{c.number} {c.in_list}".strip() for c in BOOK.chapters]))


class TestContrast:
    """WCAG 2.2, 1.4.3: 4.5 to 1. The colors of code, of both schemes, on the grounds that they stand on."""

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_colors(self, built: Path, scheme: str) -> None:
        colors = rules.css_colors((built / "book.css").read_text(encoding="utf8"), scheme)
        words = ("body-color", "link-color", "pre-color", "comment-color", "word", "string", "digit", "name")
        pairs = [(w, g) for w in words for g in ("body-bg", "code-block-bg", "sidebar-bg")]
        pairs += [("code-color", "code-bg"), ("body-color", "mark"), ("sidebar-fg", "body-bg")]
        fine(
            [
                f"{w} on {g}: {rules.contrast(colors[w], colors[g]):.2f}"
                for w, g in pairs
                if rules.contrast(colors[w], colors[g]) < 4.5
            ]
        )

    def test_the_rule(self) -> None:
        assert rules.contrast("#000000", "#ffffff") == pytest.approx(21)
        assert rules.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


# ------------------------------------------------------------------------------ a book of two chapters

FRONT = '---\ntitle: "{title}"\nsubtitle: "A promise: $x^2$ apart."\noutput-file: {page}\n---'
CONFIG = """
project: {type: book, output-dir: _book, resources: ["exercises/*/*.ipynb"]}
book:
  title: Two
  subtitle: chapters
  description: A book for the tests.
  favicon: nbs/_theme/favicon.svg
  page-footer: {left: "Code and text: a license. Of ours.", right: "two 1.0"}
  chapters:
    - index.qmd
    - part: One
      chapters: [nbs/01_first.ipynb, nbs/02_second.ipynb]
filters: [nbs/_theme/course.lua]
"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def cell(kind: str, source: str, id: str = "", *outputs: dict) -> dict:
    more = {"outputs": list(outputs), "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source, "id": id} | more


def shown(**data: str) -> dict:
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()}, "metadata": {}}


def two(*cells: dict) -> dict:
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The sources of a book of two chapters."""
    root = tmp_path / "course"
    (root / "nbs").mkdir(parents=True)
    shutil.copytree(ROOT / "nbs/_theme", root / "nbs/_theme")
    (root / "_quarto.yml").write_text(CONFIG)
    (root / "LICENSE").write_text("all of it")
    (root / "README.md").write_text("# Two\n\nSee [the first](nbs/01_first.ipynb#idea) and [LICENSE](LICENSE).\n")
    include = "{{< include README.md >}}"
    (root / "index.qmd").write_text(f'---\ntitle: "Two"\nfilters: [nbs/_theme/home.lua]\n---\n\n{include}\n')
    figure = '#| label: fig-one\n#| fig-alt: "One <red> dot & no more."\n#| code-fold: true\nplot("a < b")'
    first = [
        cell("raw", FRONT.format(title="The first", page="first.html")),
        cell("markdown", "# The first\n\n*A promise: $x^2$ apart.*", "head"),
        cell("markdown", "## Idea\n\nAn $\\alpha$ and a [second](02_second.ipynb#sec-b) thing, [@key]."),
        cell("markdown", "<details><summary>Answer</summary>\n\nIt is **zebra**.\n\n</details>"),
        cell("code", "#| include: false\nsecret = 1"),
        cell(
            "code", "if a < b and s == '```':\n    print('&amp;')", "", {"output_type": "stream", "text": "1 < 2 ```\n"}
        ),
        cell("code", figure, "f", shown(image_png=PNG, text_plain="<Plot size 300x200 with 1 Axes>")),
        cell("markdown", '<div class="figure-caption">\n\n*Figure 1.* A *dot*.\n\n</div>', "f-caption"),
        cell("code", "table", "", shown(text_html="<table><tr><th></th><th>n</th></tr><tr><td>a</td></tr></table>")),
    ]
    second = [
        cell("raw", FRONT.format(title="The second", page="second.html")),
        cell("markdown", "## B {#sec-b}\n\n| letter | |\n|---|---|\n| $b$ | giraffe |\n"),
    ]
    (root / "nbs/01_first.ipynb").write_text(json.dumps(two(*first)))
    (root / "nbs/02_second.ipynb").write_text(json.dumps(two(*second)))
    return root


def spoil(root: Path, *cells: dict) -> None:
    path = root / "nbs/02_second.ipynb"
    nb = rules.load(path)
    path.write_text(json.dumps(nb | {"cells": nb["cells"] + list(cells)}))


class TestTwoChapters:
    def test_the_same_sources_give_the_same_bytes(self, small: Path, tmp_path: Path) -> None:
        made = [tmp_path / "a", tmp_path / "b"]
        for folder, jobs in zip(made, (1, 2)):
            book.build(folder, epub=True, jobs=jobs, root=small)
        one, other = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in made)
        assert one.keys() == other.keys() and len(one) > 10
        assert [str(k) for k in one if one[k] != other[k]] == []

    def test_what_stands_on_a_page(self, small: Path, tmp_path: Path) -> None:
        book.build(tmp_path / "out", epub=True, root=small)
        html = (tmp_path / "out/nbs/first.html").read_text()
        assert html.count("<h1>") == 1 and "secret" not in html
        assert 'href="second.html#sec-b"' in html and "[@key]" in html  # the notebooks hold no citations, only links
        assert '<figure id="fig-one">' in html and 'alt="One &lt;red&gt; dot &amp; no more."' in html
        assert 'width="300" height="200"' in html and html.count("A <em>dot</em>.") == 1
        assert "s <span" not in html and "&amp;amp;" in html and "1 &lt; 2 ```" in html
        assert '<details class="fold"><summary>Code</summary>' in html
        assert "<th></th>" not in html and "<th>n</th>" in html
        pages = {p.resolve(): rules.Page(p.read_text()) for p in (tmp_path / "out").rglob("*.html")}
        for where, page in pages.items():
            fine(rules.page_links_resolve(where, pages) + rules.whole_page(page) + rules.ids_unique(page))
        index = rules.search_data((tmp_path / "out/search-index.js").read_text())
        assert "zebra" in str(index) and "giraffe" in str(index) and "secret" not in str(index)

    def test_a_book_is_replaced_and_another_folder_is_not(self, small: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        book.build(out, root=small)
        (out / "old.html").write_text("")
        book.build(out, root=small)
        assert not (out / "old.html").exists() and not out.with_name("out.new").exists()
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "work.txt").write_text("")
        with pytest.raises(book.BookError, match=r"mine; allowed: a folder that is new, empty, or holds a book"):
            book.build(mine, root=small)
        assert (mine / "work.txt").exists()

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            (cell("markdown", "[x](03_third.ipynb)"), "links to 03_third.ipynb, which is not there"),
            (cell("markdown", "![x](no.png)"), "picture no.png, which is not there"),
            (cell("markdown", r"$\nosuchcommand{x}$"), "nosuchcommand"),
            (cell("code", "x", "", shown(**{"application/x-widget": "w"})), "output of type application/x-widget"),
            (cell("code", "x", "", {"output_type": "error", "ename": "E"}), "output of type error"),
            (cell("raw", "x"), "is a raw cell; allowed: code and markdown"),
        ],
    )
    def test_what_cannot_be_shown_is_refused(self, small: Path, tmp_path: Path, made: dict, says: str) -> None:
        spoil(small, made)
        with pytest.raises(book.BookError, match=r"02_second") as told:
            book.build(tmp_path / "out", root=small)
        assert says in str(told.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.new").exists(), "nothing half made is left"

    def test_a_chapter_that_is_not_there(self, small: Path, tmp_path: Path) -> None:
        (small / "nbs/02_second.ipynb").unlink()
        with pytest.raises(book.BookError, match=r"lists nbs/02_second.ipynb, which is not there"):
            book.build(tmp_path / "out", root=small)

    def test_two_chapters_of_one_name(self, small: Path, tmp_path: Path) -> None:
        path = small / "nbs/02_second.ipynb"
        path.write_text(path.read_text().replace("second.html", "first.html"))
        with pytest.raises(book.BookError, match=r"two chapters have the page nbs/first.html"):
            book.build(tmp_path / "out", root=small)

    def test_without_pandoc(self, small: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pypandoc", None)
        book.pandoc.cache_clear()
        try:
            with pytest.raises(book.BookError, match=r"package pypandoc_binary: pip install"):
                book.build(tmp_path / "out", root=small)
        finally:
            book.pandoc.cache_clear()

    def test_the_command(self, small: Path, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setattr(book, "build", functools.partial(book.build, root=small))
        assert book.main(["--out", str(tmp_path / "out"), "--epub"]) == 0
        assert "out/index.html: open it in a browser" in capsys.readouterr().out
        assert (tmp_path / "out" / book.EPUB).is_file()
        with pytest.raises(SystemExit):
            book.main(["--jobs", "0"])
        assert "--jobs is 0; allowed: 1 or more." in capsys.readouterr().err
        (small / "_quarto.yml").unlink()
        assert book.main(["--out", str(tmp_path / "out")]) == 1
        assert "_quarto.yml" in capsys.readouterr().err


class TestRulesCanFail:
    GOOD = (
        '<!doctype html><html lang="en"><head><title>T</title><meta name="description" content="d">'
        '<link rel="next" href="b.html"></head><body><a class="skip" href="#m">Skip</a><main id="m"><h1>T</h1>'
        "<details><summary>Answer</summary>a</details></main></body></html>"
    )

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (' lang="en"', "", "language"),
            ("<title>T</title>", "<title></title>", "title"),
            ('name="description" content="d"', 'name="description" content=""', "description"),
            ('class="skip" href="#m"', 'class="skip" href="#n"', "skip"),
            ("<h1>T</h1>", "", "0 level-1"),
            ("<h1>T</h1>", "<h1>T</h1><h1>U</h1>", "2 level-1"),
            ("<summary>Answer</summary>", "", "summary"),
            ("<summary>Answer</summary>", "<summary> </summary>", "summary"),
        ],
    )
    def test_whole_page(self, old: str, new: str, says: str) -> None:
        assert rules.whole_page(rules.Page(self.GOOD)) == []
        assert old in self.GOOD
        speaks(rules.whole_page(rules.Page(self.GOOD.replace(old, new))), says)

    def test_ids(self) -> None:
        assert rules.ids_unique(rules.Page(self.GOOD)) == []
        speaks(rules.ids_unique(rules.Page(self.GOOD.replace("<h1>", '<h1 id="m">'))), "m")

    def test_rel_links(self) -> None:
        assert rules.rel_links(self.GOOD, "next") == {"b.html"} and rules.rel_links(self.GOOD, "prev") == set()

    def test_search(self, tmp_path: Path) -> None:
        (tmp_path / "a.html").write_text('<main><h2 id="s">Zebras</h2></main>')
        index = {"pages": [["a.html", "A", "en"]], "places": [[0, "s", "Zebras", "Zebras eat grass in the evening."]]}
        assert rules.search_covers(index, tmp_path) == []
        other = index | {"places": [[0, "t", "Zebras", "Zebras eat grass in the evening."]]}
        speaks(rules.search_covers(other, tmp_path), "#t")
        speaks(rules.search_covers(index | {"places": []}, tmp_path), "no word")
        speaks(rules.search_covers({"pages": [], "places": []}, tmp_path), "a.html is not in the search")
        with pytest.raises(ValueError):
            rules.search_data("var x = 1")

    def test_epub(self, tmp_path: Path) -> None:
        def epub(nav: str, chapter: str, mime: str = "application/epub+zip") -> Path:
            path = tmp_path / "b.epub"
            with zipfile.ZipFile(path, "w") as z:
                z.writestr("mimetype", mime)
                z.writestr("EPUB/nav.xhtml", f'<html xmlns="http://www.w3.org/1999/xhtml"><nav>{nav}</nav></html>')
                z.writestr("EPUB/a.xhtml", f'<html xmlns="http://www.w3.org/1999/xhtml">{chapter}</html>')
            return path

        nav, chapter = '<a href="a.xhtml#x">A</a>', '<p id="x"/><a href="nav.xhtml">n</a>'
        assert rules.epub_whole(epub(nav, chapter), ["A"]) == []
        speaks(rules.epub_whole(epub(nav, chapter), ["A", "B"]), "lists")
        speaks(rules.epub_whole(epub(nav, '<p id="y"/>'), ["A"]), "#x")
        speaks(rules.epub_whole(epub(nav, chapter + '<img src="p.png"/>'), ["A"]), "p.png")
        speaks(rules.epub_whole(epub(nav, "<br>"), ["A"]), "not well-formed")
        speaks(rules.epub_whole(epub(nav, chapter, "text/plain"), ["A"]), "mimetype")


# ------------------------------------------------------------------------------------- in a browser

SAMPLE = [
    "index.html",
    "nbs/tour.html",
    "nbs/deployment.html",
    "nbs/students.html",
    "nbs/glossary.html",
    "nbs/zh/tour.html",
]
LOOKED_AT = [c.page for c in BOOK.chapters] if EVERY_PAGE else SAMPLE
VIEWS = [("light", 1400), ("dark", 1400), ("light", 360), ("dark", 360)]

# Every pair of a color of words and the ground below it, with the ratio that WCAG asks for: axe's own rule looks at the
# same, but takes a second for every hundred words.
CONTRAST = """() => {
  const one = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => {
    one.clearRect(0, 0, 1, 1); one.fillStyle = color; one.fillRect(0, 0, 1, 1);
    return [...one.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const ground = (el) => {
    const stack = [];
    for (let e = el; e; e = e.parentElement) stack.push(rgba(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const el = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !el.checkVisibility() || el.closest('annotation, script, .skip')) continue;
    const style = getComputedStyle(el), below = ground(el);
    const words = over(rgba(style.color), below);
    const [a, b] = [light(words), light(below)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), heavy = style.fontWeight >= 700;
    const need = size >= 24 || (heavy && size >= 18.66) ? 3 : 4.5;
    const ratio = (a + 0.05) / (b + 0.05);
    const pair = `${style.color} on ${below.map(Math.round)}: ${ratio.toFixed(2)}`;
    if (ratio < need) found[pair] = el.textContent.slice(0, 40);
  }
  return Object.entries(found).map(([k, v]) => `contrast of ${k}, at ${JSON.stringify(v)}`);
}"""
AXE = """async (contrast) => {
  const found = await axe.run(document, {
    preload: false, resultTypes: ['violations'],
    rules: {'color-contrast': {enabled: contrast}, 'target-size': {enabled: true}},
  });
  return found.violations.map((v) => `${v.id} (${v.nodes.length}): ${v.nodes[0].html.slice(0, 200)}`);
}"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
OPEN_ALL = "() => document.querySelectorAll('details').forEach((d) => { d.open = true; })"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, built: Path):
    """Opens a page of the book from its file; nothing may be said in the console, nothing fetched from elsewhere."""
    opened, said = [], []

    def open_page(page: str, **more):
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | more))
        opened.append(context)
        one = context.new_page()
        one.set_default_timeout(30_000)
        one.on("console", lambda m: said.append(f"{page}: {m.type}: {m.text}"))
        one.on("pageerror", lambda e: said.append(f"{page}: {e}"))
        one.on("request", lambda r: said.append(r.url) if not r.url.startswith("file://") else None)
        one.goto((built / page).as_uri())
        return one

    yield open_page
    for context in opened:
        context.close()
    assert said == []


@functools.cache
def axe_source() -> str:
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf8")


@pytest.mark.slow
class TestInABrowser:
    @pytest.mark.parametrize("page", LOOKED_AT)
    def test_everybody_can_use_it(self, tab, page: str) -> None:
        """axe finds nothing; light and dark, wide and narrow; with every answer and every list open."""
        one = tab(page)
        one.evaluate(axe_source())
        problems = []
        for scheme, width in VIEWS:
            one.emulate_media(color_scheme=scheme)
            one.set_viewport_size({"width": width, "height": 900})
            one.evaluate(OPEN_ALL)
            one.wait_for_timeout(100)
            found = one.evaluate(AXE, False) + one.evaluate(CONTRAST)
            wide = one.evaluate(SIDEWAYS)
            found += [f"the page scrolls sideways by {wide} px"] if wide > 0 else []
            problems += [f"{scheme}, {width}: {f}" for f in found]
        fine(problems)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast_as_axe_sees_it(self, tab, scheme: str) -> None:
        """The rule above that stands in for axe's own agrees with it on a page with code, tables and a figure."""
        one = tab("nbs/students.html" if EVERY_PAGE else "index.html", color_scheme=scheme)
        one.evaluate(axe_source())
        assert one.evaluate(AXE, True) == [] == one.evaluate(CONTRAST)
        one.evaluate("() => document.querySelector('main p').style.color = '#888'")
        seen = [p for p in one.evaluate(AXE, True) if "contrast" in p]
        assert bool(seen) == bool(one.evaluate(CONTRAST)) == (scheme == "light")

    def test_axe_would_speak(self, tab) -> None:
        one = tab("index.html")
        one.evaluate(axe_source())
        one.evaluate("() => document.querySelector('main img').removeAttribute('alt')")
        speaks(one.evaluate(AXE, False), "image-alt")

    def test_the_page_would_scroll_sideways(self, tab) -> None:
        one = tab("index.html", viewport={"width": 360, "height": 700})
        one.evaluate("() => document.querySelector('main p').style.width = '500px'")
        assert one.evaluate(SIDEWAYS) > 0

    def test_the_search_finds_and_leads_there(self, tab, index: dict) -> None:
        """By keyboard alone, from the file, on a page in a folder of its own."""
        one = tab("nbs/zh/tour.html")
        box = one.get_by_role("searchbox")
        box.focus()
        box.fill("telescoping zebra nowhere")
        one.get_by_role("status").get_by_text("没有找到").wait_for()
        box.fill("gptq column")
        one.locator(".found a").first.wait_for()
        box.press("ArrowDown")
        first = one.locator(".found a").first
        assert first.evaluate("a => a === document.activeElement")
        target = first.get_attribute("href")
        first.press("Enter")
        one.wait_for_url(target)
        assert "gptq" in one.locator("main").inner_text().lower()

    def test_the_search_finds_a_word_of_every_chapter(self, tab, index: dict) -> None:
        one = tab("index.html")
        box = one.get_by_role("searchbox")
        box.focus()
        one.wait_for_function("() => window.bookIndex")
        missed = []
        for page, title, _ in index["pages"]:
            box.fill(title)
            hrefs = one.locator(".found a").evaluate_all("all => all.map((a) => a.href.split('#')[0])")
            if not any(href.endswith("/" + page) for href in hrefs[:5]):
                missed.append(title)
        assert missed == []

    def test_an_answer_unfolds_by_keyboard(self, tab) -> None:
        one = tab("nbs/attention.html")
        answer = one.locator("main details").first
        assert not answer.locator("p").first.is_visible()
        answer.locator("summary").focus()
        one.keyboard.press("Enter")
        assert answer.locator("p").first.is_visible()

    def test_keyboard_only(self, tab) -> None:
        """The first stop is the link over the list of chapters; it leads to the text."""
        one = tab("nbs/attention.html")
        one.keyboard.press("Tab")
        assert one.evaluate("() => document.activeElement.className") == "skip"
        assert one.locator(".skip").bounding_box()["x"] >= 0
        one.keyboard.press("Enter")
        assert one.evaluate("() => document.activeElement.id") == "book-main"

    def test_what_scrolls_is_reached_by_keyboard(self, tab) -> None:
        one = tab("nbs/glossary.html", viewport={"width": 360, "height": 700})
        boxes = one.locator("main .table").evaluate_all(
            "all => all.map((b) => [b.scrollWidth > b.clientWidth + 1, b.tabIndex])"
        )
        assert boxes and all((stop == 0) == wide for wide, stop in boxes)

    def test_formulas_are_visible(self, tab) -> None:
        one = tab("nbs/attention.html")
        size = "(m) => { const box = m.getBoundingClientRect(); return Math.min(box.width, box.height); }"
        shown = "all.filter((m) => !m.closest('details'))"
        sizes = one.locator("main math").evaluate_all(f"all => {shown}.map({size})")
        assert len(sizes) > 50 and min(sizes) > 2

    def test_on_a_telephone_the_lists_open(self, tab) -> None:
        one = tab("nbs/attention.html", viewport={"width": 360, "height": 700})
        chapters = one.get_by_role("navigation", name="Chapters")
        assert not chapters.is_visible()
        one.get_by_role("button", name="Chapters").focus()
        one.keyboard.press("Enter")
        assert chapters.get_by_role("link", name="03 Attention").is_visible()
        one.keyboard.press("Escape")
        assert not chapters.is_visible()
        one.get_by_role("button", name="On this page").click()
        one.get_by_role("navigation", name="On this page").get_by_role("link", name="Masks", exact=True).click()
        assert one.url.endswith("#masks")

    @pytest.mark.parametrize("width", [1400, 360])
    def test_without_scripts(self, tab, width: int) -> None:
        """The list of chapters, the text, the answers: nothing needs a script. The search, which does, is not shown."""
        one = tab("nbs/attention.html", java_script_enabled=False, viewport={"width": width, "height": 700})
        if width == 360:
            one.get_by_role("button", name="Chapters").click()
        assert one.get_by_role("navigation", name="Chapters").get_by_role("link", name="04 The model").is_visible()
        assert not one.get_by_role("searchbox").is_visible()
        answer = one.locator("main details").first
        one.keyboard.press("Escape")
        answer.locator("summary").click()
        assert answer.locator("p").first.is_visible()

    def test_on_paper(self, tab) -> None:
        """Answers are open, code is not cut off, the lists are gone."""
        one = tab("nbs/students.html", java_script_enabled=False, viewport={"width": 700, "height": 900})
        one.emulate_media(media="print")
        assert one.locator("main details p").first.is_visible()
        assert not one.get_by_role("navigation", name="Chapters").is_visible() and not one.locator(".bar").is_visible()
        clipped = "all => all.filter((p) => p.scrollWidth > p.clientWidth + 1).length"
        assert one.locator("main pre, main .table").evaluate_all(clipped) == 0

    def test_zoomed_and_reflowed(self, tab) -> None:
        """1280 px at 400 % are 320 px (WCAG 1.4.10); letters twice as large leave the page in its width, too."""
        one = tab("nbs/students.html", viewport={"width": 320, "height": 640})
        assert one.evaluate(SIDEWAYS) <= 0
        one.set_viewport_size({"width": 1400, "height": 900})
        one.evaluate("() => document.documentElement.style.fontSize = '200%'")
        assert one.evaluate(SIDEWAYS) <= 0
