"""Every chapter in JupyterLab, in a real browser: what a learner sees before running anything."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import book_rules as rules
import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytest.importorskip("jupyterlab", reason='JupyterLab is not installed: pip install "llmcourse[lab]"')

from lab_server import CHROMIUM, jupyterlab  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.xdist_group("lab"),  # one server for all
]
NOTEBOOKS = sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "zh").glob("*.ipynb")])
# What the page shows: cells in order, each with what can be seen of it.
LOOK = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].map(cell => {
  const seen = e => !!e && e.getClientRects().length > 0;
  const shown = cell.querySelector('.jp-RenderedMarkdown, .jp-MarkdownOutput');
  return {
    kind: ['Code', 'Markdown', 'Raw'].find(k => cell.classList.contains(`jp-${k}Cell`)),
    text: seen(shown) ? shown.innerText : '',
    source: seen(cell.querySelector('.cm-content')),
    title: shown?.querySelector('h1')?.innerText.replace('¶', '').trim() ?? '',
    open: [...cell.querySelectorAll('details')].filter(d => d.open).length,
    summaries: [...cell.querySelectorAll('details > summary')].filter(seen).length,
    hidden: [...cell.querySelectorAll('details > :not(summary)')].filter(e => e.checkVisibility()).length,
    pictures: [...cell.querySelectorAll('.jp-OutputArea img, .jp-OutputArea svg')].filter(seen).length,
    links: [...(shown?.querySelectorAll('a') ?? [])].map(a => a.innerText).filter(t => t && t !== '¶'),
  };
})"""
# No kernel: nothing is run here, and each takes a second.
OPEN = """async path => {
  const { commands, shell } = window.jupyterapp;
  for (const { context } of shell.widgets('main')) if (context) context.model.dirty = false;  // no question at the end
  await commands.execute('application:close-all');
  await commands.execute('docmanager:open', { path, kernelPreference: { shouldStart: false, canStart: false } });
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """A browser page beside a JupyterLab on a copy of the course."""
    course = tmp_path_factory.mktemp("course")
    for name in ("nbs", "exercises"):
        shutil.copytree(ROOT / name, course / name)
    with jupyterlab(course, tmp_path_factory.mktemp("private")) as address, sync_api.sync_playwright() as p:
        arguments = ["--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000}, base_url=address)
        page.set_default_timeout(90_000)
        page.goto("/lab")
        page.wait_for_function("() => window.jupyterapp?.restored.then(() => true)")
        yield page
        browser.close()


def cells_seen(page, path: str, n: int) -> list[dict]:
    """Open a notebook alone, in the JupyterLab that is there, and wait until its `n` cells are drawn."""
    page.evaluate(OPEN, path)
    page.wait_for_function("n => document.querySelectorAll('.jp-Notebook .jp-Cell').length === n", arg=n)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-MarkdownCell')].every(c => c.classList.contains('jp-mod-rendered')"
        " && (c.querySelector('.jp-RenderedMarkdown')?.innerHTML ?? '') !== '')"
    )
    return page.evaluate(LOOK)


def unreadable(cells: list[dict]) -> list[str]:
    """Traces of syntax that JupyterLab does not know, in what it shows."""
    patterns = [
        r":::", r"\[@\w", r"\]\{[.#]", r"\{#(?:sec|fig|eq|tbl)-", r"(?<![\w@])@(?:fig|tbl|sec|eq)-",
        r"<!--", r"</?(?:div|details|summary)\b",
    ]  # fmt: skip
    found = []
    for i, cell in enumerate(cells):
        for pattern in patterns:
            found += [f"cell {i} shows {m[0]!r}" for m in re.finditer(pattern, cell["text"])]
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_a_chapter_reads_well_in_jupyterlab(page, notebook: Path) -> None:
    nb = rules.load(notebook)
    cells = cells_seen(page, notebook.relative_to(ROOT).as_posix(), len(nb["cells"]))
    if "TEST_SHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["TEST_SHOTS"]) / f"lab-{notebook.parent.name}-{notebook.stem}.png")
    title = rules.front_matter(nb)["title"]
    assert [c["title"] for c in cells if c["title"]] == [title], "the title is the first thing, and the only one"
    raw = [c for c in cells if c["kind"] == "Raw"]
    assert raw and not any(c["source"] for c in raw), "the front matter is folded"
    assert cells.index(raw[0]) == 0 and cells[1]["title"] == title
    assert unreadable(cells) == []
    written = sum("<details>" in rules.text(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    assert sum(c["summaries"] > 0 for c in cells if c["kind"] == "Markdown") == written
    assert not any(c["open"] or c["hidden"] for c in cells), "answers are closed"
    for i, cell in rules.cells(nb, "code"):
        options, _ = rules.directives(cell)
        if str(options.get("label", "")).startswith("fig-"):
            assert cells[i]["pictures"] >= 1, f"cell {i}: no picture"
            assert cells[i + 1]["text"].startswith(("Figure ", "图 ")), f"cell {i}: no visible caption"
        if options.get("include") is False:
            assert not cells[i]["source"], f"cell {i}: not for the reader, and not folded"
    for where, cell in (("head", cells[1]), ("foot", cells[-1])):
        assert any(word in link for link in cell["links"] for word in ("→", "←", "Contents", "目录")), (
            f"no way on at the {where}"
        )


# A learner who runs the cell trusts it; here the stored output is trusted, and nothing is run.
TRUST = """() => {
  for (const { content } of window.jupyterapp.shell.widgets('main')) {
    for (const cell of content?.widgets ?? []) if (cell.model.type === 'code') cell.model.trusted = true;
  }
}"""
MOVABLE = [
    p for p in NOTEBOOKS if any(rules.is_touch(o) for _, c in rules.cells(rules.load(p), "code") for o in c["outputs"])
]


@pytest.mark.parametrize("notebook", MOVABLE, ids=lambda p: p.stem)
def test_a_figure_that_can_be_moved(page, notebook: Path) -> None:
    nb = rules.load(notebook)
    cells_seen(page, notebook.relative_to(ROOT).as_posix(), len(nb["cells"]))
    still = page.locator(".jp-Notebook img.touch-still")
    assert still.count() >= 1 and still.first.evaluate("e => e.naturalWidth") > 300, "before it is trusted"
    assert page.locator(".jp-Notebook .llmcourse-touch :is(input, select)").count() == 0
    page.evaluate(TRUST)
    root = page.locator(".jp-Notebook .llmcourse-touch[data-live]").first
    root.wait_for()
    root.scroll_into_view_if_needed()
    slider, output = root.locator("input[type=range]").last, root.locator("output")
    slider.focus()
    active = "() => [...window.jupyterapp.shell.widgets('main')].map(w => w.content?.activeCellIndex)"
    before, said, label = page.evaluate(active), output.text_content(), slider.get_attribute("aria-valuetext")
    for key in ("ArrowUp", "ArrowDown", "ArrowDown", "ArrowUp", "Home", "End"):
        value = slider.input_value()
        page.keyboard.press(key)
        if slider.input_value() != value:
            assert slider.get_attribute("aria-valuetext") != label
        label = slider.get_attribute("aria-valuetext")
    page.keyboard.press("b")  # would insert a cell
    slider.press("Home")
    first = output.text_content()
    slider.press("End")
    assert first != output.text_content() and said, "the words follow the slider"
    assert page.evaluate(active) == before, "JupyterLab took the arrow keys for itself"
    assert len(page.locator(".jp-Notebook .jp-Cell").all()) == len(nb["cells"])
    assert root.locator("svg").bounding_box()["width"] > 300 and still.count() == 0
    if "TEST_SHOTS" in os.environ:
        root.screenshot(path=Path(os.environ["TEST_SHOTS"]) / f"touch-{notebook.stem}.png")


def test_the_look_can_fail() -> None:
    bad = ["::: {.callout-tip}", "as in [@gptq]", "see @fig-one", "</div>", "[x]{.y}", "$x$ {#eq-one}"]
    assert all(len(unreadable([{"text": text}])) >= 1 for text in bad)
    assert unreadable([{"text": "a list[int] and x@y: fine"}]) == []
