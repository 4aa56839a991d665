"""What does not fit in a finished project is found, one thing at a time; an honest folder is whole."""

from __future__ import annotations

import copy
import html
import json
from pathlib import Path

import pytest

from llmcourse.capstone_report import conclusion
from llmcourse.practice import checking
from llmcourse.practice.project import main, project_faults
from llmcourse.settings import BadInput
from llmcourse.store import write_atomic, write_manifest

SIZES = {"4 bits": 80, "3 bits": 60, "channels, 4 bits": 70, "4 bits, not adapted": 80}
OWN, BESIDE = "minutes.jsonl", "wikipedia"
COSTS = {"original": 1.02, "adapted": 1.0, "4 bits": 1.04, "3 bits": 1.3}


def cost(value: float, text: str, wide: float = 0.02) -> dict:
    own = text == OWN
    limit, low, high = 1.1 if own else 1.5, value - wide, value + wide
    told = {"value": value, "low": low, "high": high, "level": 0.95, "text": text}
    word = "within" if high <= limit else "above" if low > limit else "not decided"
    base = "adapted" if own else "original"
    return told | {"base": base, "bound": "own" if own else "beside", "limit": limit, "word": word}


def row(name: str) -> dict:
    value, compressed = COSTS.get(name, 1.07), name in SIZES
    costs = {OWN: value, BESIDE: 1.2 * value / 1.02 if name != "original" else 1.0}
    perplexities = {OWN: 20 * value, BESIDE: 30 * costs[BESIDE]}
    return {
        "name": name,
        "compressed": compressed,
        "bytes_disk": SIZES.get(name, 400),
        "perplexity": {text: {"value": p} for text, p in perplexities.items()},
        "val": {text: cost(value, text, 0.01) for text, value in costs.items()},
        "test": {text: cost(value, text) for text, value in costs.items()},
    }


def finished() -> dict:
    """The numbers of a project, as the command writes them."""
    job = {
        "rows": [row(name) for name in ("original", "adapted", *SIZES)],
        "data": OWN,
        "beside": [BESIDE],
        "original": "original",
        "reference": "adapted",
        "bounds": {"own": 1.1, "beside": 1.5},
        "chosen": "channels, 4 bits",
        "delivered": "channels, 4 bits",
        "recipe": checking.find("capstone.plan").solution(),
    }
    return job | {"conclusion": conclusion(job)}


def hand_in(folder: Path, job: dict) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "packed.safetensors").write_bytes(b"x" * 70)
    write_manifest(folder / "model", name="m")
    write_atomic(folder / "capstone.json", json.dumps(job, indent=1))
    page = f"<p>Conclusion.\n {html.escape(job['conclusion'])}</p>" if isinstance(job, dict) else ""
    write_atomic(folder / "report.html", page.replace(" bound", "\n bound"))
    write_manifest(folder, name="p")
    return folder


def test_a_whole_project_has_no_faults(tmp_path, capsys):
    folder = hand_in(tmp_path / "result", finished())
    assert project_faults(folder) == [] and main([str(folder)]) == 0
    assert "fit together" in capsys.readouterr().out


def test_the_checkpoint_chooses_as_the_folder_does():
    job = finished()
    name, words = checking.find("capstone.chosen").solution(job["rows"], **job["bounds"])
    assert name == job["chosen"] and words == dict.fromkeys(SIZES, "within") | {"3 bits": "above"}


def test_a_project_in_which_nothing_fits_is_whole_as_well(tmp_path):
    job = finished()
    for r in job["rows"]:
        r["val"] = {text: cost(1.6, text) for text in r["val"]}
    job |= {"chosen": None, "delivered": "adapted"}
    job |= {"conclusion": conclusion(job)}
    assert project_faults(hand_in(tmp_path / "result", job)) == []


def own_of(job: dict, name: str, part: str = "test") -> dict:
    return next(r for r in job["rows"] if r["name"] == name)[part][OWN]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda j: j.update(conclusion=j["conclusion"].replace("smallest", "best")), ["The conclusion should read: "]),
        (lambda j: j.update(chosen="4 bits", delivered="4 bits"), ["By the rule channels, 4 bits is chosen"]),
        (lambda j: j.update(chosen=None, delivered="adapted"), ["is chosen, and the numbers say none of the models"]),
        (lambda j: j.update(delivered="adapted"), ["adapted is delivered, and channels, 4 bits was chosen"]),
        (lambda j: own_of(j, "3 bits").update(word="within"), ["3 bits on the test part of", "are 'above', not"]),
        (lambda j: own_of(j, "4 bits").update(level=None), ["are 'not decided', not 'within'"]),
        (lambda j: own_of(j, "4 bits").update(low=1.05), ["1.04 is not between 1.05 and 1.06"]),
        (lambda j: own_of(j, "4 bits").update(value=1.041), ["the ratio is 1.041, and the perplexities make 1.04."]),
        (lambda j: own_of(j, "4 bits", "val").update(limit=1.2), ["the bound is 1.2, and should be 1.1"]),
        (lambda j: j.update(recipe=j["recipe"].replace("own = 1.1", "own = 0.9")), ["accepted: [choose]: own is 0.9"]),
        (lambda j: j.update(recipe=j["recipe"].replace("own = 1.1", "own = 1.2")), ["states the bounds", "1.2"]),
        (lambda j: j.update(recipe=j["recipe"].replace('"3 bits"', '"2 bits"')), ["has the arms 4 bits, 2 bits"]),
        (lambda j: j["rows"].pop(2), ["has the arms 4 bits, 3 bits", "the table the models 3 bits, "]),
        (lambda j: next(r for r in j["rows"] if r["bytes_disk"] == 70).update(bytes_disk=69), ["has 70 bytes", "69"]),
        (lambda j: j.pop("bounds"), ["capstone.json is not as the command writes it (KeyError: 'bounds')"]),
        (lambda j: j.update(rows=3), ["capstone.json is not as the command writes it (TypeError"]),
        (lambda j: own_of(j, "4 bits").update(value="1.04"), ["capstone.json is not as the command writes it"]),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, change, says, capsys):
    job = copy.deepcopy(finished())
    change(job)
    folder = hand_in(tmp_path / "result", job)
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    for text in says:
        assert text in out


def test_files_that_were_changed_or_taken_away_are_told(tmp_path):
    folder = hand_in(tmp_path / "result", finished())
    report = folder / "report.html"
    report.write_text(report.read_text(encoding="utf8").replace("smallest", "cleverest"), encoding="utf8")
    assert [f for f in project_faults(folder) if "report.html does not say the conclusion" in f]
    assert [f for f in project_faults(folder) if "has a report.html of" in f]
    report.unlink()
    assert [f for f in project_faults(folder) if "lacks report.html" in f]
    (folder / "model" / "packed.safetensors").write_bytes(b"y" * 70)
    found = project_faults(folder)
    assert [f for f in found if f.startswith("The folder model has a packed.safetensors whose sha256")]
    (folder / "model" / "packed.safetensors").unlink()
    assert [f for f in project_faults(folder) if "allowed: a folder with *.safetensors" in f]
    (folder / "MANIFEST.json").unlink()
    assert [f for f in project_faults(folder) if "has no readable MANIFEST.json" in f]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"rows": []}'])
def test_numbers_that_are_no_numbers_are_told_and_stop_nothing(tmp_path, text):
    folder = hand_in(tmp_path / "result", finished())
    write_atomic(folder / "capstone.json", text)
    assert [f for f in project_faults(folder) if "capstone.json is not as the command writes it" in f]


def test_another_folder_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(BadInput, match="allowed: the folder `result` of llmcourse capstone"):
        project_faults(tmp_path)
    assert main([str(tmp_path / "nowhere")]) == 2 and "allowed: the folder `result`" in capsys.readouterr().err
