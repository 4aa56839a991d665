"""The map of the source articles, and their five programs, mended: every topic has its place, every program works."""

from __future__ import annotations

import copy
import math
import sys

import book_rules as rules
import pytest
import torch
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import form

KNOWN = yaml.safe_load((ROOT / "nbs" / "_topics.yml").read_text(encoding="utf8"))
# Topics that no chapter teaches. When one gets a place, it leaves nbs/_topics.yml and this set: it only shrinks.
NOWHERE = {"A29", "B26", "B28", "D12", "D19", "E14"}


@pytest.fixture(scope="module")
def books() -> dict[str, dict]:
    return {p.name: rules.load(p) for p in sorted((ROOT / "nbs").glob("*.ipynb"))}


def test_every_topic_has_its_place_or_a_reason(books):
    assert rules.topics_have_places(KNOWN, books) == []
    assert set(KNOWN["not_yet"]) <= NOWHERE, "a topic has lost its place"
    assert len(KNOWN["topics"]) > 100 and {t[0] for t in KNOWN["topics"]} == set("ABCDE")


def chapter(covers: str) -> dict:
    front = f"---\ntitle: T\ncourse:\n  needs: []\n  covers: {covers}\n---"
    cell = lambda kind, source: {"cell_type": kind, "metadata": {}, "source": source}
    return {"cells": [cell("raw", front), cell("markdown", "## A section")], "metadata": {}}


@pytest.mark.parametrize(
    ("covers", "waiting", "says"),
    [
        ("[A1#a-section, A2]", {}, None),
        ("[A1]", {"A2": "a chapter on it is to come later"}, None),
        ("[A1]", {}, "A2 (two) has no place"),
        ("[A1, A2, A3]", {}, "'A3', which is no topic"),
        ("[A1, A2#another-section]", {}, "no section has that anchor"),
        ("[A1, A2, A2]", {}, "twice"),
        ("[A1, A2]", {"A2": "a chapter on it is to come later"}, "take it off the list"),
        ("[A1]", {"A2": "later"}, "no reason for A2"),
        ("[A1, A2]", {"A7": "a chapter on it is to come later"}, "'A7', which is no topic"),
    ],
)
def test_the_rule_can_fail(covers, waiting, says):
    topics = {"A1": {"section": "1", "en": "one", "zh": "一"}, "A2": {"section": "2", "en": "two", "zh": "二"}}
    known = {"articles": {"A": {}}, "topics": topics, "not_yet": waiting}
    problems = rules.topics_have_places(known, {"00_a.ipynb": chapter(covers)})
    assert (problems == []) if says is None else any(says in p for p in problems), problems


def test_the_table_shows_every_topic_once(books):
    cell = next(c for c in books["90_errata.ipynb"]["cells"] if c.get("id") == "topics")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in rules.text(cell["source"]).splitlines()]
    assert [r for r in rows if r in KNOWN["topics"]] == list(KNOWN["topics"])


# ------------------------------------------------------------------------- the five programs of the chapter, mended


@pytest.fixture(scope="module")
def program(books) -> dict:
    """What the cells `listing-…` of the chapter define, and the imports that they need."""
    made: dict = {"__name__": "errata"}
    for cell in books["90_errata.ipynb"]["cells"]:
        source = rules.text(cell["source"])
        imports = cell["cell_type"] == "code" and form.only_imports(source)
        if imports or str(cell.get("id")).startswith("listing-"):
            exec(compile(source, str(cell["id"]), "exec"), made)
    return made


@pytest.fixture(scope="module")
def course(home):
    from llmcourse.data import load_model

    return load_model("course-3m")


@pytest.fixture(scope="module")
def bank(course):
    from llmcourse.data import token_data

    return token_data(course.tokenizer, "banking", limits={"train": 20_000, "val": 512, "test": 512})


@pytest.fixture
def rt():
    from llmcourse.runtime import Runtime

    return Runtime.auto()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.model
def test_program_a_learns_from_speeches_and_reads_its_file_back(program, home):
    from llmcourse.data import load_records

    speeches = load_records("sotu")
    train, test = (next(r["text"] for r in speeches if r["split"] == s)[:12_000] for s in ("train", "test"))
    first, again, other = (program["article_a"](train, test, steps=10, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert math.log(256) - 0.5 < first["before"] < math.log(256) + 0.5
    assert first["after"] < first["before"] - 1 and first["reloaded"] == first["after"]
    untrained = program["article_a"](train, test, steps=0, seed=0)
    assert untrained["before"] == pytest.approx(untrained["after"], rel=1e-6)


def test_program_a_does_not_see_the_byte_that_it_predicts(program):
    torch.manual_seed(0)
    model = program["TransformerModel"]().eval()
    ids = torch.randint(256, (1, 20))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 256
    with torch.no_grad():
        moved = (model(ids) - model(changed)).abs().amax((0, 2))  # (T,)
    assert moved[:10].max() < 1e-5 < moved[10:].min()


@pytest.mark.model
def test_program_b_gets_better_smaller_and_writes(program, course, bank, rt):
    before = weights(course.model)
    how = {"tokens": 400, "seed": 0, "rt": rt}
    scores, written, (tuned, student, small) = program["article_b"](
        course.model, course.tokenizer, bank, "The card", steps=6, **how
    )
    assert list(scores) == ["pretrained", "tuned", "a block fewer", "distilled", "4 bits"]
    assert scores["tuned"] < 0.9 * scores["pretrained"] and scores["distilled"] < scores["a block fewer"]
    assert abs(scores["4 bits"] / scores["distilled"] - 1) < 0.2
    numbers = [sum(p.numel() for p in m.parameters()) for m in (tuned, student)]
    assert numbers[1] < numbers[0] and same(course.model, before)
    rows = small.get_submodule("model.layers.0.mlp.up_proj").weight[:, :64]  # a group of 64 columns
    assert max(len(row.unique()) for row in rows) <= 16
    assert len(written) == 3 and len(set(written)) > 1 and not any(text.startswith("The card") for text in written)


@pytest.mark.model
def test_program_c_prunes_what_it_says_and_nothing_else(program, course):
    before = weights(course.model)
    small, zeros = program["article_c_prune"](course.model, 0.3)
    assert zeros == pytest.approx(0.3, abs=1e-3) and same(course.model, before)
    after = small.state_dict()
    assert set(after) == set(before)  # no masks are left over
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    kept = torch.cat([before[n][after[n] != 0].abs().flatten() for n in changed])
    gone = torch.cat([before[n][after[n] == 0].abs().flatten() for n in changed])
    assert gone.max() <= kept.min()


@pytest.mark.model
def test_program_c_distils_towards_the_teacher(program, course, bank):
    from llmcourse.distillation import student_of

    student, rows = student_of(course.model, [0, 1, 3, 4]), bank.train[: 64 * 32].view(-1, 64)
    before = weights(course.model)
    curve = program["article_c_distill"](course.model, student, rows, steps=12, seed=0)
    assert min(curve) >= 0 and sum(curve[-3:]) < 0.9 * sum(curve[:3]) and same(course.model, before)
    equal = program["article_c_distill"](course.model, copy.deepcopy(course.model), rows, steps=1, seed=0)
    assert equal[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.model
def test_program_c_quantizes_copies(program, course):
    before = weights(course.model)
    eight, binary = program["article_c_quantize"](course.model)
    assert same(course.model, before)
    name = "model.layers.0.mlp.up_proj"
    W, of_eight, of_two = (m.get_submodule(name).weight.detach() for m in (course.model, eight, binary))
    assert all(len(row.unique()) == 2 for row in of_two) and torch.equal(of_two.sign(), W.sign())
    assert 0 < (of_eight - W).norm() / W.norm() < 0.02 < (of_two - W).norm() / W.norm()


@pytest.mark.model
def test_program_c_transfers_to_another_task(program, course, home, rt):
    from llmcourse.data import load_records
    from llmcourse.finetuning import Labeled, draw_labels, topic_texts

    topics = topic_texts(load_records("wikipedia"), n_topics=8, test_per_topic=25)
    half = lambda pairs, first: [(t, c - first) for t, c in pairs if first <= c < first + 4]
    made = lambda pairs: Labeled(course.tokenizer, *zip(*pairs), n_classes=4, cut=12)
    source, target = (made(draw_labels(half(topics.train, a), 24, 0)) for a in (0, 4))
    test = made(half(topics.test, 4))
    before = weights(course.model)
    found = program["article_c_transfer"](course.model, source, target, test, steps=12, seed=0, rt=rt)
    assert set(found) == {"transferred", "not transferred"} and min(found.values()) > 0.3  # guessing: 0.25
    assert found["transferred"] != found["not transferred"] and same(course.model, before)


def test_program_d_learns_a_rule_and_nothing_from_coins(program):
    rule = lambda x, dice: x @ torch.linspace(-1, 1, 10) > 0
    coins = lambda x, dice: torch.rand(len(x), generator=dice) > 0.5
    mean = lambda rule, key, n: sum(program["article_d"](rule, n=n, seed=s)[key] for s in range(6)) / 6
    assert mean(rule, "test", 400) > 0.9 and abs(mean(coins, "test", 400) - 0.5) < 0.06
    assert mean(coins, "training", 40) > mean(coins, "training", 400) > 0.53


@pytest.mark.model
def test_program_e_reads_reviews(program, home):
    from llmcourse.data import load_model, load_records

    encoder = load_model("bert-tiny")
    reviews = [r for r in load_records("sentiment") if r["source"] == "movieReviewSnippets"]
    sure = [(r["text"], int(float(r["score"]) > 0), r["split"]) for r in reviews if abs(float(r["score"])) >= 1]
    train, test = ([p[:2] for p in sure if p[2] == s][:n] for s, n in (("train", 480), ("test", 200)))
    before = weights(encoder.model)
    shares = program["article_e"](encoder, train, test, epochs=1, seed=0, lr=1e-3)
    assert len(shares) == 2 and abs(shares[0] - 0.5) < 0.12 and shares[1] > 0.6
    assert same(encoder.model, before)
