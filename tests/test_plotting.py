"""Plotting: the numerics (contrast, color distance, Pareto front), label placement, files, bad input."""

import itertools
import os
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llmcourse import plotting as p
from llmcourse.settings import BadInput

ALT = "A chart that a test has drawn."
rgb = st.tuples(*[st.floats(0, 1, allow_nan=False)] * 3)


# ------------------------------------------------------------------------------------------------ colors


@given(rgb, rgb)
def test_contrast_is_symmetric_and_bounded(a, b):
    assert 1 <= p.contrast(a, b) <= 21 + 1e-9
    assert p.contrast(a, b) == p.contrast(b, a)


@given(rgb)
def test_black_or_white_text_always_passes(background):
    assert p.contrast(p.text_color(background), background) >= 21**0.5 - 1e-9 > 4.5


def test_published_contrasts():
    for color, published in (("#000000", 21.0), ("#767676", 4.54), ("#777777", 4.48)):
        assert round(p.contrast(color, "white"), 2) == published


def test_line_colors_can_be_seen_and_told_apart():
    pairs = np.triu_indices(len(p.LINES), 1)
    assert all(p.contrast(c, "white") >= 3 for c in p.LINES)
    for vision in ("normal", "protanopia", "deuteranopia"):
        assert p.color_distances(p.LINES, vision)[pairs].min() > 10


@given(st.floats(0, 1))
def test_grays_look_the_same_to_everybody(v):
    """The rows of the simulation matrices sum to 1, so the distance of two grays does not depend on the vision."""
    grays = [(v, v, v), (0.5, 0.5, 0.5)]
    expected = p.color_distances(grays)[0, 1]
    for vision in ("protanopia", "deuteranopia"):
        assert p.color_distances(grays, vision)[0, 1] == pytest.approx(expected, abs=0.01)


# ------------------------------------------------------------------------------------------ Pareto front

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@given(points, st.sampled_from(["lower", "higher"]), st.sampled_from(["lower", "higher"]))
def test_front_is_the_definition(cloud, x_better, y_better):
    x, y = np.array(cloud, dtype=float).T
    front = p.pareto_front(x, y, x_better=x_better, y_better=y_better)
    sx, sy = (1 if b == "lower" else -1 for b in (x_better, y_better))
    assert sorted(front) == sorted(p.pareto_front_brute(sx * x, sy * y))
    assert list(x[front]) == sorted(x[front])


@given(points)
def test_every_point_off_the_front_is_dominated_by_one_on_it(cloud):
    x, y = np.array(cloud, dtype=float).T
    front = p.pareto_front(x, y)
    for i in set(range(len(x))) - set(front):
        assert any(x[j] <= x[i] and y[j] <= y[i] and (x[j], y[j]) != (x[i], y[i]) for j in front)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_names_cover_neither_each_other_nor_points(seed):
    rng = np.random.default_rng(seed)
    fig, axes = p.new_figure(ALT, size=(7.5, 4.8))
    axes[0, 0].set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    cloud = [p.Point(f"model {i}", x, y) for i, (x, y) in enumerate(rng.random((10, 2)))]
    boxes = p._place_labels(fig, axes[0, 0], cloud)
    assert sum(p._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    frame = axes[0, 0].get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_pareto_says_which_direction_is_better():
    fig = p.pareto(
        [p.Point("a", 1, 2), p.Point("b", 2, 3)], alt=ALT, xlabel="size", ylabel="accuracy", y_better="higher"
    )
    assert "smaller is better" in fig.axes[0].get_xlabel() and "larger is better" in fig.axes[0].get_ylabel()


# ----------------------------------------------------------------------------------------------- figures


curves = np.random.default_rng(0).random((3, 10))
MAKE = {
    "loss_curves": lambda: p.loss_curves({"a": curves, "b": curves[:1]}, alt=ALT, logy=True),
    "pareto": lambda: p.pareto(
        [p.Point("a", 1, 2, 1.5, 2.5, "g"), p.Point("b", 2, 1)], alt=ALT, xlabel="x", ylabel="y", logx=True, logy=True
    ),
    "intervals": lambda: p.intervals({"a": (1, 0.5, 2)}, alt=ALT, xlabel="x", reference=1),
    "heatmap": lambda: p.heatmap(curves - 0.5, alt=ALT, center=0),
    "attention_map": lambda: p.attention_map(
        np.tril(np.ones((2, 4, 4))) / np.arange(1, 5)[:, None], list("abcd"), alt=ALT
    ),
}


def test_a_single_curve_is_called_one():
    texts = [t.get_text() for t in MAKE["loss_curves"]().axes[0].get_legend().get_texts()]
    assert texts == ["a (median, n = 3)", "b (n = 1, no band)"]


def test_two_ended_maps_are_symmetric():
    low, high = MAKE["heatmap"]().axes[0].images[0].get_clim()
    assert low == -high


def test_tensors_are_welcome():
    torch = pytest.importorskip("torch")
    x = torch.rand(2, 5, dtype=torch.bfloat16, requires_grad=True)
    before = x.detach().clone()
    p.heatmap(x, alt=ALT)
    p.loss_curves({"a": x}, alt=ALT)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["pareto", "heatmap", "attention_map"])
def test_files_carry_the_alternative_text_and_are_repeatable(name, tmp_path):
    alt = 'Värme < 3 & "so on". Second sentence.'
    fig = MAKE[name]()
    fig.alt = alt
    svg = p.save(fig, tmp_path / "a.svg")
    root = ET.parse(svg).getroot()
    assert (
        root.find("{http://www.w3.org/2000/svg}desc").text == alt
        and root.find("{http://www.w3.org/2000/svg}title").text
    )
    assert root.get("role") == "img" and root.get("aria-label") == alt
    with Image.open(p.save(fig, tmp_path / "a.png")) as image:
        assert image.info["Description"] == alt
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == p.save(fig, tmp_path / f"b.{kind}").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    fig, path = MAKE["intervals"](), tmp_path / "a.svg"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        p.save(fig, path)
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.svg"]


def test_drawing_leaves_the_style_of_others_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    for make in MAKE.values():
        make()
    assert dict(mpl.rcParams) == before


# ---------------------------------------------------------------------------------------------- bad input

ok = np.ones((2, 3))
nan = ok.copy()
nan[1, 2] = np.nan


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: p.loss_curves({}, alt=ALT), "curves is {}"),
        (lambda: p.loss_curves({"a": nan}, alt=ALT), "curves['a'][1, 2] is nan"),
        (lambda: p.loss_curves({"a": [1, 2, 3]}, alt=ALT), "shape of curves['a'] is (3,)"),
        (lambda: p.loss_curves({"a": [[1, 2], [1]]}, alt=ALT), "all rows of the same length"),
        (lambda: p.loss_curves({"a": ok, "b": ok[:, :2]}, alt=ALT), "length of curves['b'] is 2"),
        (lambda: p.loss_curves({"a": ok}, x=[1, 2], alt=ALT), "length of x is 2"),
        (lambda: p.loss_curves({"a": ok}, alt=ALT, band="std"), "band is 'std'"),
        (lambda: p.pareto([], alt=ALT, xlabel="", ylabel=""), "points is []"),
        (lambda: p.pareto([p.Point("m", 1, float("nan"))], alt=ALT, xlabel="", ylabel=""), "points' y[0] is nan"),
        (lambda: p.pareto([p.Point("m", 1, 2, 3, 4)], alt=ALT, xlabel="", ylabel=""), "interval of 'm'"),
        (lambda: p.pareto([p.Point("m", 1, 2, 1)], alt=ALT, xlabel="", ylabel=""), "both ends or neither"),
        (lambda: p.pareto([p.Point("m", 0, 2)], alt=ALT, xlabel="", ylabel="", logx=True), "x of 'm' is 0"),
        (lambda: p.pareto_front([1, 2], [1]), "length of y is 1"),
        (lambda: p.pareto_front([1], [1], x_better="less"), "x_better is 'less'"),
        (lambda: p.intervals({}, alt=ALT, xlabel=""), "estimates is {}"),
        (lambda: p.intervals({"a": (1, 2, 3)}, alt=ALT, xlabel=""), "interval of 'a'"),
        (lambda: p.intervals({"a": (1, 0)}, alt=ALT, xlabel=""), "three numbers each"),
        (lambda: p.heatmap(nan, alt=ALT), "matrix[1, 2] is nan"),
        (lambda: p.heatmap(np.ones((0, 3)), alt=ALT), "shape of matrix is (0, 3)"),
        (lambda: p.heatmap(ok, alt=ALT, rows=["a"]), "number of rows is 1"),
        (lambda: p.attention_map(np.ones((2, 2)), alt=ALT), "weights is"),
        (lambda: p.attention_map(np.full((2, 4), 0.25), alt=ALT), "shape of weights"),
        (lambda: p.attention_map(np.eye(3), ["a"], alt=ALT), "number of tokens is 1"),
        (lambda: p.color_distances(["red"], "tetra"), "vision is 'tetra'"),
        (lambda: p.heatmap(ok, alt="  "), "alt is '  '"),
        (lambda: p.save(p.Plot(), "x.svg"), "alt is ''"),
        (lambda: p.save(p.Plot(), "x.pdf", alt=ALT), "x.pdf"),
        (lambda: p.save(p.Plot(), "no/such/x.svg", alt=ALT), "existing folder"),
    ],
)
def test_bad_input_is_one_sentence(wrong, words):
    with pytest.raises(BadInput) as e:
        wrong()
    assert words in str(e.value) and "allowed" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("draw", [p.loss_curves, p.pareto, p.attention_map, p.heatmap, p.intervals])
def test_alt_is_required(draw):
    with pytest.raises(TypeError, match="alt"):
        draw([])


# ------------------------------------------------------------------------------------ without color, and at page width


@pytest.mark.parametrize("n", [2, 5, 10])
def test_lines_differ_without_their_color(n):
    """A black-and-white printer sees dashes: no two of the first five lines share one, nor two of equal color."""
    fig = p.loss_curves({str(i): curves for i in range(n)}, alt=ALT)
    looks = [(line.get_color(), str(line.get_linestyle()), line._dash_pattern) for line in fig.axes[0].lines]
    assert len({str(dash) for _, _, dash in looks[:5]}) == min(n, 5) and len({str(look) for look in looks}) == n
    with p.style():
        _, axes = p.new_figure(ALT)
        lines = [axes[0, 0].plot([0, 1], [i, i])[0] for i in range(n)]
    assert len({str((line.get_color(), line._dash_pattern)) for line in lines}) == n
    assert len({str(line._dash_pattern) for line in lines[:5]}) == min(n, 5)


def test_letters_are_large_enough_at_page_width():
    """A page is 820 pixels wide: 9 points are 12 of them."""
    wide = [p.new_figure(ALT, size=(14, 4))[0], p.heatmap(np.random.rand(4, 30), alt=ALT), MAKE["attention_map"]()]
    wide.append(p.attention_map(np.tile(np.eye(9), (5, 1, 1)), alt=ALT))
    for fig in [*wide, *(make() for make in MAKE.values())]:
        shown = min(1.0, 820 / (96 * fig.get_figwidth()))
        fig.draw_without_rendering()
        texts = [t for t in fig.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_visible() and t.get_text()]
        assert all(t.get_fontsize() * shown >= 9 for t in texts), min(t.get_fontsize() * shown for t in texts)


@pytest.mark.parametrize(("heads", "n"), [(1, 13), (3, 9), (3, 13), (3, 16)])
def test_names_of_tokens_do_not_overlap(heads, n):
    weights = np.tile(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None], (heads, 1, 1))
    fig = p.attention_map(weights, ["harbor"] * n, alt=ALT)
    fig.draw_without_rendering()
    for ax in fig.axes[:heads]:
        for labels, side in ((ax.get_xticklabels(), "x"), (ax.get_yticklabels(), "y")):
            shown = [t for t in labels if t.get_visible() and t.get_text()]  # the first panel of a row has names
            if any(t.get_rotation() % 90 for t in shown):  # slanted: their boxes overlap, they do not
                continue
            seen = [t.get_window_extent(fig.canvas.get_renderer()) for t in shown]
            ends = sorted((getattr(b, f"{side}0"), getattr(b, f"{side}1")) for b in seen)
            assert all(b[0] >= a[1] - 1.5 for a, b in itertools.pairwise(ends)), side
            inside = ax.get_window_extent()
            assert all(b.y1 <= inside.y0 if side == "x" else b.x1 <= inside.x0 for b in seen), side
