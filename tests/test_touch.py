"""Figures that can be moved: what a browser computes is what Python computes, and everybody can reach it.

All six kinds stand on one page, on numbers made here. The controls are moved in a browser, and the scene that the
script drew is compared with the scene of the same settings in Python, which the functions of the course compute.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT

from llmcourse import touch, touch_figures
from llmcourse.plotting import contrast
from llmcourse.settings import BadInput

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
ALT = "A picture that says how one thing depends on another, whatever the settings are."


TIES = [1.5, 0.5, -0.5, -1.5]
"""with 2 bits, symmetric, the step is 1: two of them lie between two values"""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make() -> dict[str, touch.Touch]:
    names = [f"<t{i}> & “x”" for i in range(10)]
    lengths = [int(n) for n in 30 + 20 * normal(3, 60).abs()]
    words = ["start", "</script>", *"abcdefg"]
    heads = {"sharp": 3 * normal(1, 9, 9), "flat": 0.1 * normal(2, 9, 9)}
    return {
        "sampling": touch_figures.next_token(2.5 * normal(0, 900), names, alt=ALT),
        "grid": touch_figures.quantization_grid([*TIES, *0.1 * normal(4, 60) + 0.03], alt=ALT),
        "attention": touch_figures.attention_masks(heads, words, alt=ALT),
        "schedule": touch_figures.schedules(alt=ALT),
        "roofline": touch_figures.roofline(16.9e9, 118e9, 134.5e6, alt=ALT),
        "interval": touch_figures.interval_width(2 + normal(5, sum(lengths)).abs(), lengths, alt=ALT),
    }


FIGURES = make()
SETTINGS = {
    "sampling": {"temperature": (0.1, 0.7, 2), "top_p": (0.05, 0.6, 1), "top_k": ("off", "1", "5", "40")},
    "grid": {"bits": (2, 3, 4, 5, 8), "group": ("64", "16", "8"), "symmetric": (False, True)},
    "attention": {"head": ("sharp", "flat"), "mask": ("causal", "window", "none"), "window": (1, 4), "row": (1, 6, 9)},
    "schedule": {
        "kind": ("constant", "linear", "cosine", "wsd"), "warmup": (0, 1, 50), "final": (0, 0.5), "decay": (5, 90),
        "step": (1, 73, 100),
    },
    "roofline": {
        "bandwidth": (0.1, 3350), "peak": (118, 989_000), "parameters": (3.1, 7000), "element": ("4", "0.5"),
        "tokens": (0, 4, 10),
    },
    "interval": {"stop": (1, 6, 12), "unit": ("documents", "tokens"), "level": ("80", "95", "99"), "goal": (1, 10)},
}  # fmt: skip
# on top of those drawn from the table: what only they can tell apart
ALSO = {
    "grid": [{"bits": 2, "group": "8", "symmetric": True}],
    "sampling": [{"temperature": 2, "top_p": p, "top_k": "40"} for p in (0.3, 0.6, 0.9)],
}
MOVE = """([kind, settings]) => {
  const root = document.querySelector(`[data-touch=${kind}]`), svg = root.querySelector('svg');
  for (const [name, value] of Object.entries(settings)) {
    const input = root.querySelector(`[name=${name}]`);
    if (input.type === 'checkbox') input.checked = value; else input.value = value;
    input.dispatchEvent(new Event('input', { bubbles: true }));
  }
  return { scene: root.scene, pieces: root.pieces, output: root.querySelector('output').textContent,
    label: svg.getAttribute('aria-label'), width: +svg.getAttribute('width') };
}"""


def page_of(*figures: touch.Touch, style: str = "") -> str:
    body = "".join(f._repr_html_() for f in figures)
    head = '<!doctype html><html lang="en"><meta charset="utf8"><title>t</title>'
    return f'{head}<body style="{style}">{body}</body></html>'


def some_of(table: dict[str, tuple], n: int = 10) -> list[dict]:
    """So many combinations of a table, in which every value of every control occurs."""
    every = [dict(zip(table, values, strict=True)) for values in itertools.product(*table.values())]
    chosen = random.Random(5).sample(every, min(n, len(every)))
    assert all({s[name] for s in chosen} == set(values) for name, values in table.items())
    return chosen


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(chromium):
    """All figures on one page; anything that is fetched, and any error, is noted."""
    page = chromium.new_page(viewport={"width": 800, "height": 900})
    page.noted = []
    page.on("request", lambda r: page.noted.append(r.url))
    page.on("pageerror", lambda e: page.noted.append(str(e)))
    page.on("console", lambda m: page.noted.append(m.text))
    page.names = set(page.evaluate("Object.getOwnPropertyNames(window)"))
    page.set_content(page_of(*FIGURES.values()))
    page.wait_for_function("document.querySelectorAll('[data-live]').length === 6")
    return page


def differences(a, b, where: str = "", tolerance: float = 1e-5) -> list[str]:
    """What differs between two scenes; numbers may by rounding (softmaxes of the course are in float32)."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: {sorted(a)} and {sorted(b)}"] if a.keys() != b.keys() else []
        return found + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}.{k}", tolerance)]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        found = [f"{where}: {len(a)} and {len(b)} items"] if len(a) != len(b) else []
        pairs = enumerate(zip(a, b, strict=False))
        return found + [d for i, (x, y) in pairs for d in differences(x, y, f"{where}[{i}]", tolerance)]
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and bool not in (type(a), type(b)):
        return [] if math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) else [f"{where}: {a!r} and {b!r}"]
    if isinstance(a, str) and isinstance(b, str) and a != b:  # a last digit may differ
        number = r"\d[\d,]*(?:\.\d+)?"
        if re.sub(number, "#", a) != re.sub(number, "#", b):
            return [f"{where}: {a!r} and {b!r}"]
        # a number is told with three digits or more, or with three decimals
        read = lambda text: [float(n.replace(",", "")) for n in re.findall(number, text)]
        near = lambda x, y: math.isclose(x, y, rel_tol=0.011, abs_tol=0.11)
        return [] if all(map(near, read(a), read(b))) else [f"{where}: {a!r} and {b!r}"]
    return [] if a == b and type(a) is type(b) else [f"{where}: {a!r} and {b!r}"]


@browser_only
@pytest.mark.parametrize("kind", FIGURES)
def test_the_script_computes_what_python_computes(page, kind: str) -> None:
    figure, table = FIGURES[kind], SETTINGS[kind]
    assert table.keys() == figure.start.keys()
    for settings in [*some_of(table), *ALSO.get(kind, [])]:
        seen, scene = page.evaluate(MOVE, [kind, settings]), figure.scene(**settings)
        assert differences(scene, seen["scene"]) == [], settings
        assert seen["output"] == seen["scene"]["say"] and seen["label"] == f"{ALT} Now: {seen['output']}"
    drawn = json.loads(json.dumps(touch.pieces(scene, seen["width"])))
    points = lambda found: [
        [t, a | {"points": [*map(float, re.findall(r"[\d.]+", a.get("points", "")))]}, w] for t, a, w in found
    ]
    assert differences(points(drawn), points(seen["pieces"]), tolerance=2e-2) == []


def test_the_comparison_can_fail() -> None:
    a = {"values": {"x": 1.0}, "say": "It takes 12.3 ms."}
    assert differences(a, {"values": {"x": 1.0 + 1e-8}, "say": "It takes 12.4 ms."}) == []
    for b in ({"x": 1.001}, {"y": 1.0}, {"x": True}, {"x": [1.0]}):
        assert differences(a, a | {"values": b}) != []
    for say in ("It takes 13.3 ms.", "It takes 12.3 s.", ""):
        assert differences(a, a | {"say": say}) != []


@browser_only
def test_nothing_is_fetched_and_no_name_is_left_behind(page) -> None:
    page.evaluate(MOVE, ["grid", {"bits": 4}])
    assert page.noted == []
    added = set(page.evaluate("Object.getOwnPropertyNames(window)")) - page.names
    assert {n for n in added if not n.isdigit()} == set()
    for name in ("touch", *FIGURES):
        source = (touch.SCRIPTS / f"{name}.js").read_text(encoding="utf8")
        assert not re.search(
            r"\b(fetch|eval|import|XMLHttpRequest|WebSocket|Function)\b|innerHTML|https?://(?!www\.w3)", source
        )
        assert len(source.splitlines()) <= 150, name
        assert max(map(len, source.splitlines())) <= 120, name


@browser_only
def test_two_of_a_kind_on_one_page_do_not_disturb_each_other(chromium) -> None:
    page = chromium.new_page()
    page.set_content(page_of(FIGURES["schedule"], FIGURES["schedule"]))
    says = "[...document.querySelectorAll('output')].map(o => o.textContent)"
    before = page.evaluate(says)
    page.locator("[name=step]").nth(1).fill("7")
    after = page.evaluate(says)
    assert before[0] == before[1] == after[0] and after[1].startswith("cosine: step 7 of 100")
    assert page.locator("[id]").count() == 0, "an id would be there twice"
    page.close()


@browser_only
def test_the_keyboard_reaches_and_moves_every_control(page) -> None:
    page.evaluate("document.activeElement.blur()")
    wanted = [(kind, c.name) for kind, figure in FIGURES.items() for c in figure.controls]
    seen = []
    for _ in wanted:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(
            "[document.activeElement.closest('[data-touch]').dataset.touch, document.activeElement.name]"
        ))  # fmt: skip
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px", seen[-1]
    assert seen == [list(pair) for pair in wanted]
    page.locator("[data-touch=schedule] [name=step]").focus()
    page.evaluate(MOVE, ["schedule", {"step": 40}])
    page.keyboard.press("ArrowRight")
    said = page.locator("[data-touch=schedule] output").text_content()
    assert "step 41 of 100" in said
    assert page.locator("[data-touch=schedule] [name=step]").get_attribute("aria-valuetext") == "41"


@browser_only
def test_a_screen_reader_has_names_and_words_for_everything(page) -> None:
    assert page.evaluate("[...document.querySelectorAll('input, select')].filter(i => !i.labels.length).length") == 0
    for kind, figure in FIGURES.items():
        root = page.locator(f"[data-touch={kind}]")
        assert root.locator("svg").get_attribute("role") == "img"
        assert root.locator("output").get_attribute("aria-live") == "polite"
        assert root.get_by_role("group", name=figure.title).count() == 1
        for control in figure.controls:
            assert root.get_by_label(control.label, exact=False).count() >= 1, control.label
    attention = page.locator("[data-touch=attention] [name=row]")
    page.evaluate(MOVE, ["attention", {"row": 3}])
    assert attention.get_attribute("aria-valuetext") == "3: a"


@browser_only
def test_a_number_that_makes_no_sense_is_refused_in_a_sentence(page) -> None:
    root = page.locator("[data-touch=roofline]")
    page.evaluate(MOVE, ["roofline", {"bandwidth": 100}])
    before = root.locator("svg").get_attribute("aria-label")
    for bad in ("-1", "", "1e9"):
        root.locator("[name=bandwidth]").fill(bad)
        said = f"Bandwidth, GB/s is '{bad}'; allowed: a number from 0.1 to 100000."
        assert root.locator("output").text_content() == said
        assert root.locator("[name=bandwidth]").get_attribute("aria-invalid") == "true"
        assert root.locator("svg").get_attribute("aria-label") == before
    root.locator("[name=bandwidth]").fill("50")
    assert root.locator("[name=bandwidth]").get_attribute("aria-invalid") == "false"
    assert "the ridge is at" in root.locator("output").text_content()


@browser_only
def test_letters_are_large_enough_and_nothing_is_wider_than_a_telephone(chromium) -> None:
    page = chromium.new_page(viewport={"width": 360, "height": 700})
    page.set_content(page_of(*FIGURES.values(), style="margin: 16px"))
    sizes = "[...document.querySelectorAll('.llmcourse-touch :is(text, label, output)')].map(e => {" \
        "const m = e.getScreenCTM?.(); return parseFloat(getComputedStyle(e).fontSize) * (m ? m.a : 1); })"  # fmt: skip
    assert min(page.evaluate(sizes)) >= 11
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    outside = """[...document.querySelectorAll('svg')].flatMap(svg => { const edge = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
        return b.left < edge.left - 1 || b.right > edge.right + 1; }).map(t => t.textContent); })"""
    long = {f"“{name}”" for name in FIGURES["sampling"].data["tokens"]} | {"</script> 2"}
    assert set(page.evaluate(outside)) <= long, "only the names that were made too long here"
    page.close()
    bare = chromium.new_context(java_script_enabled=False, viewport={"width": 360, "height": 700}).new_page()
    bare.set_content(page_of(*FIGURES.values(), style="margin: 16px"))
    pictures = bare.locator("img.touch-still")
    assert pictures.count() == 6 and bare.locator("input, select, svg").count() == 0
    for i in range(6):
        box = pictures.nth(i).bounding_box()
        assert 12 * box["width"] / touch.STILL >= 11 and box["width"] <= 328 and box["height"] > 150
    bare.context.close()


@browser_only
def test_dark_and_light_take_the_color_of_the_page(chromium) -> None:
    for background, ink in (("#ffffff", "#24292f"), ("#16191d", "#d8dce0")):
        page = chromium.new_page()
        page.set_content(page_of(FIGURES["schedule"], style=f"background: {background}; color: {ink}"))
        numbers = page.evaluate(
            "['text', 'output', 'label', 'select', 'input'].map(n => getComputedStyle(document.querySelector(n)).color)"
        )
        assert {f"#{''.join(f'{int(v):02x}' for v in re.findall(r'[0-9]+', n))}" for n in numbers} == {ink}
        fills = page.evaluate("[...document.querySelectorAll('text')].map(t => getComputedStyle(t).fill)")
        assert set(fills) == {numbers[0]}
        page.close()


def test_colors_can_be_told_from_a_white_and_from_a_dark_page() -> None:
    for page in ("#ffffff", "#fdfdfb", "#16191d", "#111111"):
        assert contrast(touch.BLUE, page) >= 3 and contrast(touch.RED, page) >= 3
    assert len({json.dumps(sorted(look)) for look in touch.ALONG.values()}) >= 3, "not by color alone"


# ---------------------------------------------------------------------------------- without a browser


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.alt, self.src = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.alt, self.src = dict(attrs)["alt"], dict(attrs)["src"]


@pytest.mark.parametrize("kind", FIGURES)
def test_the_still_picture_stands_alone(kind: str) -> None:
    figure = FIGURES[kind]
    found = Tags(figure._repr_html_())
    assert found.tags == ["div", "img", "p", "small", "script", "script"]
    assert found.alt == f"{ALT} Here: {figure.scene()['say']}"
    picture = ElementTree.fromstring(unquote(found.src.removeprefix("data:image/svg+xml,")))
    assert len(list(picture)) == len(touch.pieces(figure.scene(), touch.STILL)) + 2  # title and background
    assert figure._repr_html_() == figure._repr_html_() == make()[kind]._repr_html_(), "the same bytes each time"
    assert "llmcourse" in repr(type(figure)) and kind in repr(figure)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_stored_figure_can_be_drawn_anew(kind: str) -> None:
    now = FIGURES[kind]._repr_html_()
    old = now.replace("now.", "then.").replace("stroke%3D", "s%3D")
    assert touch_figures.redrawn(now) == touch_figures.redrawn(old) == now


def test_the_notebooks_hold_what_the_package_draws() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import touch as tool

    assert tool.main(check=True) == 0, "run: python tools/touch.py"
    stored = [p.stem for p in (ROOT / "nbs").glob("*.ipynb") if "llmcourse-touch" in p.read_text(encoding="utf8")]
    assert len(stored) >= 6


def test_three_digits() -> None:
    told = {
        1234567: "1,230,000",
        0.0012345: "0.00123",
        0.5: "0.5",
        118.4: "118",
        99.96: "100",
        1: "1",
        1e-7: "0.0000001",
    }
    assert {x: touch.short(x) for x in told} == told


def bad(**changes):
    return lambda: touch.Touch(
        **{"kind": "grid", "title": "t", "alt": ALT, "data": {}, "controls": (), "rule": None, **changes}
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (bad(alt=" "), "alt is ' '; allowed"),
        (lambda: touch_figures.redrawn("<p>1</p>"), "html is '<p>1</p>'; allowed"),
        (bad(kind="pie"), "kind is 'pie'; allowed: attention, grid"),
        (lambda: FIGURES["grid"].scene(bit=3), "name of a control is 'bit'; allowed: bits, group, symmetric"),
        (lambda: touch.Slider("a", "A", 0, 5, 9).told(), "start of a is 9; allowed"),
        (lambda: touch.Slider("a", "A", 0, 2, 1, words=["x"]).told(), "words of a is 1; allowed"),
        (lambda: touch.Choice("a", "A", {"x": "x"}, "y").told(), "start of a is 'y'; allowed"),
        (lambda: touch.Switch("a", "A", 1).told(), "start of a is 1; allowed"),
        (lambda: touch.Entry("a", "A", 1, 2, math.nan).told(), "start of a is nan; allowed"),
        (lambda: touch_figures.next_token([1.0, 2.0], ["a"], alt=ALT), "logits is '2 numbers'; allowed"),
        (lambda: touch_figures.quantization_grid([0.0] * 64, alt=ALT), "weights is '64 numbers'; allowed"),
        (lambda: touch_figures.quantization_grid([math.nan] * 64, alt=ALT), "weights is '64 numbers'; allowed"),
        (lambda: touch_figures.attention_masks({"h": [[1.0]]}, ["a", "b"], alt=ALT), "scores"),
        (lambda: touch_figures.attention_masks({}, ["a", "b"], alt=ALT), "tokens is 2; allowed"),
        (lambda: touch_figures.schedules(alt=ALT, total=7), "total is 7; allowed"),
        (lambda: touch_figures.roofline(0, 1, 1, alt=ALT), "bandwidth is 0; allowed"),
        (lambda: touch_figures.interval_width([1.0] * 9, [3, 3, 2], alt=ALT), "lengths is '3 documents'; allowed"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, says: str) -> None:
    with pytest.raises(BadInput) as e:
        call()
    assert says in str(e.value) and "; allowed: " in str(e.value) and "\n" not in str(e.value)
