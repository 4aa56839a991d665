"""A real browser: JupyterLab on the learner's folder.

A wrong answer is typed and its sentence read, then the right one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytest.importorskip("jupyterlab", reason='JupyterLab is not installed: pip install "llmcourse[lab]"')

from example_sheet import ROOT, as_typed, build  # noqa: E402
from lab_server import CHROMIUM, jupyterlab  # noqa: E402

from llmcourse.practice import checking  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def lab(tmp_path: Path):
    """JupyterLab in a fresh copy of the learner's folder; gives its address and the sheet."""
    folder = tmp_path / "learner"
    folder.mkdir()
    ours = sorted((ROOT / "exercises").glob("*/*.ipynb"))
    if ours:
        sheet = folder / ours[0].name
        shutil.copy(ours[0], sheet)
    else:  # before the course has a sheet: the tests' own
        made = build(tmp_path / "course")
        sheet = folder / made["learner"].name
        shutil.copy(made["learner"], sheet)
        more = (
            "import llmcourse.practice.sheets\n"
            f"llmcourse.practice.sheets.__path__.append({str(made['module'].parent)!r})\n"
        )
        startup = tmp_path / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "00_example.py").write_text(more)
        exec(more)
    with jupyterlab(folder, tmp_path) as address:
        yield address, sheet


def surprised(dialog, page, shots: Path) -> None:
    """JupyterLab asks something. Which kernel (on a slow machine): a learner presses Select.

    Anything else fails the test, in words.
    """
    if dialog.inner_text().startswith("Select Kernel"):
        dialog.get_by_role("button", name="Select", exact=True).click()
        dialog.wait_for(state="hidden")
        return
    page.screenshot(path=shots / "dialog.png")
    pytest.fail(f"JupyterLab opened a dialog: {dialog.inner_text()!r}")


def test_wrong_then_right(lab: tuple[str, Path], tmp_path: Path) -> None:
    address, sheet = lab
    shots = Path(os.environ.get("TEST_SHOTS", tmp_path))
    ex = next(iter(checking.load_sheet(sheet.stem).values()))
    wrong, right, sentence = as_typed(ex)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        page.add_locator_handler(page.locator(".jp-Dialog"), lambda dialog: surprised(dialog, page, shots))
        page.goto(f"{address}/lab/tree/{sheet.name}")
        # the stub's cell and the check below it, found by what they say, as a learner finds them
        answer = page.locator(".jp-CodeCell", has_text=f"def {ex.name}(").first
        verdict = page.locator(".jp-CodeCell", has_text=f'check("{ex.id}"')
        answer.wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()

        def focus(cell) -> None:
            cell.locator(".cm-content").click()
            cell.locator(".cm-editor.cm-focused").wait_for()

        def run(cell) -> None:
            """Run a cell and wait until the kernel is done with it: its number has changed and is a number."""
            prompt = cell.locator(".jp-InputPrompt")
            before = now = prompt.inner_text()
            started, pressed = time.monotonic(), float("-inf")
            while now == before or not re.search(r"\d", now):
                if now == before and time.monotonic() - pressed > 8:
                    # JupyterLab drops the key while it is still connecting to a new kernel; a person presses it again
                    focus(cell)
                    page.keyboard.press("Control+Enter")
                    pressed = time.monotonic()
                if time.monotonic() - started > 60:
                    page.screenshot(path=shots / "stuck.png")
                    pytest.fail(f"a cell did not run: {before!r} -> {now!r}; see {shots / 'stuck.png'}")
                time.sleep(0.1)
                now = prompt.inner_text()

        def write(text: str) -> None:
            focus(answer)
            page.keyboard.press("Control+a")
            page.keyboard.insert_text(text)
            last = text.rstrip().splitlines()[-1].strip()
            answer.locator(".cm-line", has_text=last).last.wait_for()
            run(answer)

        run(page.locator(".jp-CodeCell", has_text="import torch").first)
        run(page.locator(".jp-CodeCell", has_text="from llmcourse.practice import").first)
        write(wrong)
        run(verdict)
        card = verdict.locator(".llmcourse-check")
        card.wait_for()
        card.scroll_into_view_if_needed()
        page.screenshot(path=shots / "wrong.png")
        assert card.get_attribute("role") == "status"
        assert card.get_attribute("data-status") == "failed"
        text = card.inner_text()
        assert sentence in text
        assert "Not yet: " in text and "Smallest failing case: " in text and "expected" in text and "got" in text

        write(right)
        run(verdict)
        page.screenshot(path=shots / "right.png")
        verdict.locator(".llmcourse-check[data-status=passed]").wait_for()
        assert f"Passed: all {len(ex.all_cases())} cases" in card.inner_text()
        browser.close()
    kept = json.loads((sheet.parent / checking.PROGRESS_FILE).read_text())["exercises"][ex.id]
    assert (kept["attempts"], kept["last"]) == (2, "passed")
