"""The capstone: recipes that are refused, items and openings, the choice, a run that is stopped and goes on."""

import copy
import dataclasses
import json
import re

import pytest
from conftest import ROOT

from llmcourse import capstone as module
from llmcourse.capstone import Bounds, capstone, choose, continuation_items, load_capstone_recipe, openings
from llmcourse.capstone_report import conclusion, front, render
from llmcourse.practice.project import project_faults
from llmcourse.settings import BadInput, load_settings
from llmcourse.store import manifest_faults

RECIPE = """
name = "small"
description = "A small model"
model = "course-3m"
data = "{data}"
export = ["gguf"]
license = "none"
limits = "none"
items = 8
validation = 2
answers = 2
ask = ["The first word"]

[choose]
own = 2.0
beside = 3.0

[adapt.train]
steps = 2
batch_size = 2
seq_len = 32
lr = 1e-3
eval_every = 0

[[arm]]
name = "RTN 4"
passes = [{{ method = "rtn", bits = 4, group_size = 64 }}]

[[arm]]
name = "Depth, RTN 4"
of = "original"
passes = [{{ method = "depth", blocks = 1 }}, {{ method = "rtn", bits = 4, group_size = 64 }}]
"""


def small_settings():
    settings = load_settings(overrides={"scale": "test", "device": "cpu", "dtype": "float32", "kernels": "portable"})
    scale = dataclasses.replace(settings.scale, eval_tokens=4096, context=64, stride=48, batch_size=16, calib_length=32)
    return dataclasses.replace(settings, scale=scale)


def written(path, text):
    path.write_text(text, encoding="utf8")
    return path


# ------------------------------------------------------------------------------------------------ recipes


def test_the_recipe_of_the_course_is_whole_and_has_its_controls():
    recipe = load_capstone_recipe(ROOT / "recipes" / "capstone" / "finance.toml")
    assert {c.of for c in recipe.candidates} == {"adapted", "original"}
    assert any(c.calib for c in recipe.candidates)
    assert any(len(c.arm.passes) > 2 for c in recipe.candidates)
    for c in recipe.candidates:
        assert c.arm.build(load_settings())


def test_other_data_are_not_asked_about_a_bank(tmp_path):
    path = ROOT / "recipes" / "capstone" / "finance.toml"
    recipe = load_capstone_recipe(path, model="course-3m", data="wikipedia")
    assert (recipe.model, recipe.data, recipe.beside, recipe.ask) == ("course-3m", "wikipedia", (), ())
    own = load_capstone_recipe(path)
    assert own.ask and load_capstone_recipe(path, model=own.model, data=own.data) == own


@pytest.mark.parametrize("given", [{"model": "course-3m"}, {"data": "sotu"}, {"model": "course-3m", "data": "sotu"}])
def test_what_the_recipe_says_of_its_own_model_and_text_is_not_said_of_others(given):
    path = ROOT / "recipes" / "capstone" / "finance.toml"
    own, other = load_capstone_recipe(path), load_capstone_recipe(path, **given)
    for key in ("description", "license", "limits"):
        assert getattr(other, key) != getattr(own, key) and "a bank" not in getattr(other, key)
    assert bool(other.ask) == ("data" not in given)
    assert ("the model" in other.license, "the text" in other.license) == ("model" in given, "data" in given)


@pytest.mark.parametrize(
    "old, new, says",
    [
        ('name = "small"', 'name = "a/b"', "name"),
        ('limits = "none"', 'limits = " "', "limits"),
        ('limits = "none"', "", "limits"),
        ("items = 8", "items = 0", "items"),
        ("validation = 2", "validation = 0", "validation"),
        ("items = 8", "items = 8.0", "items"),
        ("answers = 2", "answers = 1", "answers"),
        ("own = 2.0", "own = 0.99", "own"),
        ("own = 2.0", 'own = "2"', "own"),
        ("beside = 3.0", "besides = 3.0", "besides"),
        ('export = ["gguf"]', 'export = ["awq"]', "export"),
        ('export = ["gguf"]', 'export = ["gguf", "gguf"]', "export"),
        ('export = ["gguf"]', 'beside = ["{data}"]', "beside"),
        ('ask = ["The first word"]', 'ask = [" "]', "ask"),
        ("[adapt.train]", "[adapt]\n[adapt.training]", "adapt"),
        ("steps = 2", "steps = -1", "steps"),
        ("[adapt.train]", '[adapt]\nmethod = "head"\n[adapt.train]', "method"),
        ('of = "original"', 'of = "distilled"', "of in arm 'Depth, RTN 4'"),
        ('of = "original"', "of = 1", "of in"),
        ('of = "original"', "calib = 1", "calib in"),
        ('name = "Depth, RTN 4"', 'name = "RTN-4"', "names of the arms"),
        ('name = "RTN 4"', 'name = "adapted"', "names of the arms"),
        ('method = "depth"', 'method = "deep"', "deep"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_in_one_sentence(tmp_path, old, new, says):
    text = RECIPE.replace("{{", "{").replace("}}", "}").replace("{data}", "sotu")
    changed = text.replace(old, new.replace("{data}", "sotu"), 1)
    assert changed != text
    path = written(tmp_path / "r.toml", changed)
    with pytest.raises(BadInput, match=re.escape(says)) as e:
        recipe = load_capstone_recipe(path)
        for c in recipe.candidates:
            c.arm.build(load_settings())
    assert "\n" not in str(e.value)


def test_without_adapting_the_original_is_the_reference_and_nothing_can_start_from_another(tmp_path):
    text = RECIPE.format(data="sotu")
    start, end = text.index("[adapt.train]"), text.index("[[arm]]")
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", text[:start] + text[end:]))
    assert recipe.reference == "original" and {c.of for c in recipe.candidates} == {"original"}
    with pytest.raises(BadInput, match="of in arm"):
        changed = (text[:start] + text[end:]).replace('of = "original"', 'of = "adapted"')
        load_capstone_recipe(written(tmp_path / "s.toml", changed))


# ------------------------------------------------------------------------------------ items, openings, choice


def documents(n, words=40, gap=" "):
    return [gap.join(f"d{i}w{k}" for k in range(words)) for i in range(n)]


def test_the_right_choice_is_what_follows_and_the_others_come_from_other_documents():
    texts = documents(9)
    for item in continuation_items(texts, 9, before=10, after=5):
        right = item.choices[item.answer]
        assert any(item.context + right in text for text in texts)
        assert len(item.context.split()) == 10 and len(right.split()) == 5
        own = item.context.split("w")[0]
        assert sum(choice.strip().startswith(own + "w") for choice in item.choices) == 1


def test_a_line_break_before_the_continuation_does_not_give_the_answer_away():
    texts = [*documents(4, gap="\n"), *documents(4, gap=" ")]
    for item in continuation_items(texts, 8, after=5):
        assert len({choice[: len(choice) - len(choice.lstrip())] for choice in item.choices}) == 1


def test_items_are_drawn_by_the_seed_and_are_at_most_as_many_as_asked():
    texts = documents(30)
    same, again, other = (continuation_items(texts, 7, seed=s) for s in (3, 3, 4))
    assert same == again != other and len(same) == 7
    assert len({item.answer for item in continuation_items(texts, 30)}) == 4
    assert len(continuation_items(texts, 99)) == 30


@pytest.mark.parametrize("words, made", [(23, 0), (24, 5)])
def test_a_document_has_to_have_words_before_and_after(words, made):
    texts = documents(5, words=words)
    if made:
        assert len(continuation_items(texts, 9, after=12)) == made
    else:
        with pytest.raises(BadInput, match="at least 4 documents of 24 words"):
            continuation_items(texts, 9, after=12)


def test_documents_that_are_all_alike_make_no_items():
    with pytest.raises(BadInput, match="alike"):
        continuation_items(["a b c d e f g h i j k l " * 4] * 6, 3)


def test_an_opening_is_at_most_half_of_a_document():
    found = openings(documents(2, words=10) + documents(1, words=200) + ["too short for it"], 9)
    assert [len(o.prompt.split()) for o in found] == [5, 5, 40]
    assert [len(o.reference.split()) for o in found] == [5, 5, 24]
    assert found[0].reference.startswith("d0w5") and not found[0].prompt.endswith(" ")


def row(name, disk, own=1.05, beside=1.2, level=0.95):
    ends = {"own": own, "beside": beside}
    return {
        "name": name,
        "bytes_disk": disk,
        "val": {b: {"bound": b, "value": high - 0.01, "high": high, "level": level} for b, high in ends.items()},
    }


@pytest.mark.parametrize(
    "rows, chosen",
    [
        ([row("a", 10), row("b", 9)], "b"),
        ([row("a", 10), row("b", 9, own=1.1)], "b"),  # the bound itself is within
        ([row("a", 10), row("b", 9, own=1.1001)], "a"),  # its value is within, its upper end is not
        ([row("a", 10), row("b", 9, beside=1.6)], "a"),
        ([row("a", 10), row("b", 9, level=None)], "a"),  # too few units to say
        ([row("a", 10, own=2.0), row("b", 9, beside=2.0)], None),
        ([], None),
    ],
)
def test_the_smallest_is_taken_that_is_shown_within_both_bounds(rows, chosen):
    assert choose(rows, Bounds(own=1.1, beside=1.5)) == chosen


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """A run that was stopped before the times were taken, and went on; what both said."""
    folder, said = tmp_path_factory.mktemp("capstone"), []
    path = written(folder / "recipe.toml", RECIPE.format(data=corpus))
    recipe, settings, out = load_capstone_recipe(path), small_settings(), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Capstone, "_speed", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            capstone(recipe, out, settings=settings, say=said.append)
    assert not (out / "result").exists()
    before = {p.name: p.read_bytes() for p in (out / "steps").iterdir()}
    said.append("stopped")
    result = capstone(recipe, out, settings=settings, say=said.append, command="llmcourse capstone it")
    job = json.loads((result / "capstone.json").read_text(encoding="utf8"))
    return {"recipe": recipe, "out": out, "before": before, "said": said, "result": result, "job": job}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_its_finished_steps(run):
    after = run["said"][run["said"].index("stopped") :]
    assert sum("done before" in line for line in after) == len(run["before"]) == 7
    for name, content in run["before"].items():
        assert (run["out"] / "steps" / name).read_bytes() == content


@pytest.mark.slow
def test_a_finished_run_does_nothing_again_and_another_recipe_is_refused(run):
    said, stamp = [], (run["result"] / "capstone.json").stat().st_mtime_ns
    assert capstone(run["recipe"], run["out"], settings=small_settings(), say=said.append) == run["result"]
    assert "nothing to do" in said[-1] and (run["result"] / "capstone.json").stat().st_mtime_ns == stamp
    other = dataclasses.replace(run["recipe"], items=9)
    with pytest.raises(BadInput, match="a folder of this recipe"):
        capstone(other, run["out"], settings=small_settings(), say=said.append)
    assert not manifest_faults(run["result"])


@pytest.mark.slow
def test_a_finished_run_is_whole_in_the_eyes_of_who_marks_it(run):
    assert project_faults(run["result"]) == []


@pytest.mark.slow
def test_every_model_was_measured_on_the_same_and_the_chosen_one_is_delivered(run):
    job, rows = run["job"], {r["name"]: r for r in run["job"]["rows"]}
    assert list(rows) == ["original", "adapted", "RTN 4", "Depth, RTN 4"]
    assert job["reference"] == "adapted" and rows["adapted"]["test"][job["data"]]["value"] == 1
    assert job["chosen"] == choose([r for r in job["rows"] if r["compressed"]], run["recipe"].choose) == "Depth, RTN 4"
    assert rows["RTN 4"]["bytes_disk"] < rows["original"]["bytes_disk"] == 2 * rows["original"]["parameters"]
    assert rows["Depth, RTN 4"]["parameters"] < rows["RTN 4"]["parameters"]
    assert rows[job["chosen"]]["against"][job["data"]]["value"] == 1
    between = rows["RTN 4"]["against"][job["data"]]
    apart = rows["RTN 4"]["perplexity"][job["data"]]["value"] / rows[job["chosen"]]["perplexity"][job["data"]]["value"]
    assert between["value"] == pytest.approx(apart) and between["low"] < apart < between["high"]
    assert {len(texts) for texts in job["written"].values()} == {2}
    from llmcourse.data import load_model

    model = load_model(run["result"] / "model", settings=small_settings()).model
    assert any(hasattr(m, "passport_counts") for m in model.modules())
    assert (run["result"] / "gguf" / "model.gguf").is_file()


@pytest.mark.slow
def test_the_served_model_writes_what_the_loaded_one_writes_and_ends_cleanly(run):
    asked = run["job"]["asked"]
    assert [a["prompt"] for a in asked["answers"]] == ["The first word"]
    assert asked["answers"][0]["same"] and asked["answers"][0]["answer"].strip() and asked["stopped"] == 0


@pytest.mark.slow
def test_the_page_holds_its_numbers_and_nothing_from_outside(run):
    page = (run["result"] / "report.html").read_text(encoding="utf8")
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    visible = re.sub(r"<[^>]+>", " ", page)
    for r in run["job"]["rows"]:
        p = r["perplexity"][run["job"]["data"]]["value"]
        assert r["name"] in visible and f"{p:.2f}" in visible
    assert "llmcourse capstone it" in visible and run["job"]["chosen"] in front(run["job"]).alt


@pytest.mark.slow
def test_the_conclusion_says_what_the_intervals_say(run):
    job = copy.deepcopy(run["job"])
    name, text = job["data"], conclusion(job)
    assert job["chosen"] in text and "holds" in text and "in 16 bits" in text
    chosen = next(r for r in job["rows"] if r["name"] == job["chosen"])
    for word, says in (("above", "does not hold"), ("not decided", "is not decided")):
        chosen["test"][name]["word"] = word
        assert says in conclusion(job) and says not in text
    job |= {"chosen": None, "delivered": job["reference"], "needed": None}
    assert "None of 2" in conclusion(job) and "is delivered" in conclusion(job)
    svg = "<svg></svg>"
    assert "None of 2" in render(job | {"conclusion": conclusion(job)}, svg)


# ------------------------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    "change, says",
    [
        ({"data": "nothing"}, "nothing"),
        ({"model": "nothing"}, "nothing"),
        ({"beside": ("nothing",)}, "nothing"),
        ({"ask": ("word " * 600,)}, "positions"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(tmp_path, corpus, change, says):
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", RECIPE.format(data=corpus)))
    with pytest.raises(BadInput, match=says) as e:
        capstone(dataclasses.replace(recipe, **change), tmp_path / "out", settings=small_settings(), say=print)
    assert not (tmp_path / "out").exists() and "\n" not in str(e.value)


def test_more_of_the_validation_part_is_read_where_the_recipe_says_so(tmp_path, corpus):
    text = RECIPE.format(data=corpus).replace("validation = 2", "validation = 3")
    settings = small_settings()
    settings = dataclasses.replace(settings, scale=dataclasses.replace(settings.scale, eval_tokens=256))
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", text))
    job = module._Capstone(recipe, settings, print, "")
    assert {key: len(t.tokens) for key, t in job.texts.items()} == {(job.data, "val"): 768, (job.data, "test"): 256}


@pytest.mark.parametrize("wanted, cut", [(2, False), (100_000, True)])
def test_a_scale_that_wants_more_calibration_than_there_is_takes_what_there_is(tmp_path, corpus, wanted, cut):
    text = RECIPE.format(data=corpus).replace('[{ method = "rtn"', '[{ method = "gptq"', 1)
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", text))
    settings, said = small_settings(), []
    settings = dataclasses.replace(settings, scale=dataclasses.replace(settings.scale, calib_sequences=wanted))
    job = module._Capstone(recipe, settings, said.append, "")
    length, found = settings.scale.calib_length, job.inputs["scale"]["calib_sequences"]
    texts = [r["text"] for r in job.records[job.data] if r["split"] == "calib"]
    tokens = sum(1 + len(job.tokenizer(text).input_ids) for text in texts)  # a separator before each
    assert (found < wanted) == cut and bool(said) == cut
    assert not cut or found == tokens // length
    assert all(p.n_calib == found for c in recipe.candidates for p in c.arm.build(job.settings) if p.name == "GPTQ")


@pytest.mark.parametrize(
    "passes, says",
    [
        ('[{ method = "rtn", bits = 4, group_size = 77 }]', "arm 'RTN 4'"),
        ('[{ method = "gptq", bits = 4, group_size = 64, n_calib = 100000 }]', "arm 'RTN 4'"),
    ],
)
def test_a_candidate_that_cannot_be_made_is_refused_by_its_name(tmp_path, corpus, passes, says):
    text = RECIPE.format(data=corpus).replace('[{ method = "rtn", bits = 4, group_size = 64 }]', passes, 1)
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", text))
    with pytest.raises(BadInput, match=says):
        capstone(recipe, tmp_path / "out", settings=small_settings(), say=print)
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_schedule_that_training_refuses_is_refused_at_once(tmp_path, corpus):
    text = RECIPE.format(data=corpus).replace("seq_len = 32", "seq_len = 4096")
    recipe = load_capstone_recipe(written(tmp_path / "r.toml", text))
    with pytest.raises(BadInput, match="seq_len"):
        capstone(recipe, tmp_path / "out", settings=small_settings(), say=print)
    assert not (tmp_path / "out").exists()
