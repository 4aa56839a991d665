"""The slides of the lectures: picked from the book, complete in one file, and each fits its page."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

spec = importlib.util.spec_from_file_location("slides_tool", ROOT / "tools" / "slides.py")
slides = importlib.util.module_from_spec(spec)
sys.modules["slides_tool"] = slides
pytest.importorskip("mistune", reason="mistune comes with nbconvert")
spec.loader.exec_module(slides)

SOURCES = sorted((ROOT / "slides").glob("*.yml"))
each = pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="module")
def decks() -> dict[str, str]:
    return {p.stem: slides.as_html(slides.lecture(p)) for p in SOURCES}


def test_there_are_four_lectures(capsys: pytest.CaptureFixture) -> None:
    assert len(SOURCES) == 4
    assert slides.main(["--check"]) == 0 and capsys.readouterr().err == ""


@each
def test_every_picture_has_its_text_and_nothing_comes_from_elsewhere(path: Path, decks: dict[str, str]) -> None:
    page, made = decks[path.stem], slides.lecture(path)
    pictures = re.findall(r'<img src="(.{22})[^"]*" alt="([^"]*)">', page)
    assert len(pictures) == sum("figure" in s for s in made["slides"]) == page.count("<img") >= 4
    assert all(src == "data:image/png;base64," and len(alt) >= 20 for src, alt in pictures)
    bare = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"(src|href|action)=|@import|url\(|https?://|fetch\(|<link|<iframe", bare)
    assert page.count('<div class="page"') == len(made["slides"]) + 1
    assert page.count("<h1>") == 1 and page.count("<h2>") == len(made["slides"])


@each
def test_no_text_of_the_book_is_copied(path: Path) -> None:
    """Code, outputs and figures are picked; a lecture holds short texts of its own."""
    text = path.read_text(encoding="utf8")
    assert "```" not in text and "def " not in text and "data:image" not in text
    assert all(len(s.get("text", "")) < 700 for s in slides.lecture(path)["slides"])


@each
def test_the_same_deck_for_quarto(path: Path) -> None:
    made = slides.lecture(path)
    text, files = slides.as_qmd(made, "pictures")
    head = yaml.safe_load(text.split("---")[1])
    assert head["format"]["revealjs"]["embed-resources"] and head["execute"] == {"enabled": False}
    assert re.findall(r"^## (.*)$", text, re.M) == [s["title"] for s in made["slides"]]
    used = re.findall(r"!\[\]\(([^)]*)\)\{fig-alt=\"(?:[^\"\\]|\\.)+\"\}", text)
    assert used == list(files) and all(data.startswith(b"\x89PNG") for data in files.values())


@pytest.mark.parametrize(
    ("slide", "said"),
    [
        ({"title": "x", "figure": "03_attention#fig-nothing"}, "0 cells have this label or id"),
        ({"title": "x", "figure": "03_attention#df54a752"}, "0 pictures; expected one"),
        ({"title": "x", "figure": "03_nothing#fig-heads"}, "is of no chapter of this lecture"),
        ({"title": "x", "code": "03_attention#1d99c234", "only": "nothing"}, "defines nothing 0 times"),
        ({"title": "x", "output": "03_attention#1d99c234"}, "prints nothing"),
        ({"title": "x", "picture": "y"}, "picture is no key; allowed: "),
        ({"title": "x"}, "a slide has a title, and a text"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, slide: dict, said: str) -> None:
    made = {"title": "t", "subtitle": "s", "chapters": ["03_attention"], "slides": [slide]}
    (tmp_path / "x.yml").write_text(yaml.safe_dump(made), encoding="utf8")
    with pytest.raises(slides.Problem, match=re.escape(said)):
        slides.as_html(slides.lecture(tmp_path / "x.yml"))


def test_the_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert slides.main(["1_attention", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"1_attention.html", "1_attention.qmd", "1_attention_pictures"}
    assert slides.main(["nothing"]) == 1 and "allowed: 1_attention" in capsys.readouterr().err


OVER = """() => [...document.querySelectorAll("section, pre, figure, .text, h2")]
    .filter(e => e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1)
    .map(e => `${e.closest(".page").id} ${e.tagName}`)"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_each_slide_fits_its_page_and_the_keys_move(tmp_path: Path, decks: dict[str, str]) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
        asked: list[str] = []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else asked.append(r.url))
        for name, text in decks.items():
            (tmp_path / f"{name}.html").write_text(text, encoding="utf8")
            page.goto((tmp_path / f"{name}.html").as_uri())
            assert page.evaluate(OVER) == [], f"{name}: something does not fit 1280 × 720"
            sizes = page.evaluate("[...document.images].map(i => [i.clientHeight, i.naturalHeight])")
            assert all(shown >= 240 and natural for shown, natural in sizes), f"{name}: a figure is too small to read"
            letters = page.evaluate(
                "[...document.querySelectorAll('pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
            )
            assert min(letters) >= 14, f"{name}: code too small to read"
            last = page.evaluate("document.querySelectorAll('.page').length - 1")
            for key, there in (("End", last), ("ArrowLeft", last - 1), ("Home", 0), ("ArrowRight", 1), (" ", 2)):
                page.keyboard.press(key)
                page.wait_for_function(f"Math.round(scrollY / innerHeight) === {there}", timeout=20_000)
        assert asked == []
        browser.close()
