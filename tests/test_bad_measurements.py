"""What cannot be measured is refused in one sentence, and nothing is written: the table of the evaluation chapters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT

from llmcourse import accuracy as ac
from llmcourse import metrics as me
from llmcourse import verdicts as ve
from llmcourse.evaluation import document_bootstrap
from llmcourse.settings import BadInput

FEW = me.mean_score([0.2, 0.9, 0.4], "x")
LENGTHS = {
    "BLEU": lambda: me.corpus_bleu(["a"], ["a", "b"]),
    "BLEU, references of each": lambda: me.corpus_bleu(["a", "b"], [["a"]]),
    "chrF": lambda: me.chrf(["a", "b"], ["a"]),
    "two scores": lambda: me.compare_scores(me.mean_score(range(9), "x"), me.mean_score(range(8), "x")),
    "McNemar": lambda: ac.mcnemar([True], [True, False]),
    "permutations": lambda: ac.permutation_test([1.0, 2.0], [1.0]),
    "two accuracies": lambda: ac.compare_accuracy(
        ac.Accuracy(hits=np.ones(30, bool), chance=0.5), {"b": ac.Accuracy(hits=np.ones(31, bool), chance=0.5)}
    ),
    "answers": lambda: ac.accuracy([0], [ac.Item(context="a", choices=("b", "c"), answer=0)] * 2),
    "reliability": lambda: ac.reliability([0.5, 0.6], [True]),
    "Brier": lambda: ac.brier([[0.5, 0.5]], [0, 1]),
    "temperature": lambda: ac.fit_temperature([[0.5, 0.1]], [0, 1]),
    "paired runs, one of one": lambda: ve.paired([1.0, 2.0], [1.0]),
    "paired runs": lambda: ve.paired([1.0, 2.0], [1.0, 2.0, 3.0]),
    "documents": lambda: document_bootstrap([1.0, 2.0, 3.0], [1, 1]),
}
NOTHING = {
    "no reference": lambda: me.corpus_bleu(["a"], [[]]),
    "no reference of one": lambda: me.chrf(["a", "b"], [["a"], []]),
    "no reference for ROUGE": lambda: me.rouge("a", []),
    "no right answer": lambda: me.token_f1("a", []),
    "no items": lambda: me.corpus_bleu([], []),
    "no choices": lambda: ac.Item(context="a", choices=(), answer=0),
    "no pairs": lambda: ve.paired([], []),
    "no shares": lambda: ac.wilson_interval(0, 0),
}
CLASSES = {
    "Brier of one class": lambda: ac.brier([[1.0], [1.0]], [0, 0]),
    "temperature of one class": lambda: ac.fit_temperature([[1.0], [2.0]], [0, 0]),
    "all right": lambda: ac.fit_temperature([[2.0, 1.0], [0.0, 1.0]], [0, 1]),
    "the answer is always A": lambda: ac.check_items([ac.Item(context="a", choices=("b", "c"), answer=0)] * 30),
    "sums below 1": lambda: ac.brier([[0.5, 0.4]], [0]),
    "sums above 1": lambda: ac.brier([[0.5, 0.5], [0.5, 0.6]], [0, 1]),
    "a negative probability": lambda: ac.brier([[1.5, -0.5]], [0]),
    "a confidence above 1": lambda: ac.calibration_test([1.5], [True]),
}
SMALL = {
    "interval of a score": lambda: me.score_interval(FEW),
    "two scores of three items": lambda: me.compare_scores(FEW, FEW),
    "two accuracies": lambda: ac.compare_accuracy(ac.Accuracy(hits=np.ones(19, bool), chance=0.5), {}),
    "one pair of runs": lambda: ve.paired([1.0], [2.0]),
    "one run": lambda: ve.welch([1.0], [1.0, 2.0]),
    "items in order": lambda: ac.order_test(len, [1, 2]),
}
CHOICES = {
    "equal": lambda: ac.Item(context="a", choices=("b", "c", "b"), answer=0),
    "equal but for spaces": lambda: ac.Item(context="a", choices=("b", " b"), answer=0),
    "one": lambda: ac.Item(context="a", choices=("b",), answer=0),
}
TABLE = {
    f"{kind}: {name}": call
    for kind, cases in {
        "another length": LENGTHS, "nothing": NOTHING, "classes": CLASSES, "few": SMALL, "choices": CHOICES,
    }.items()
    for name, call in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_refused_in_one_sentence(name):
    with pytest.raises(BadInput) as e:
        TABLE[name]()
    said = str(e.value)
    assert said.endswith(".") and "allowed: " in said and "\n" not in said and len(said) < 300


def test_an_interval_of_too_few_is_said_and_not_computed():
    assert me.score_level(FEW) is None and me.score_level(me.mean_score([0.5], "x")) is None
    few = ac.Accuracy(hits=np.ones(19, bool), chance=0.25)
    assert few.interval is None and "no interval: fewer than 20 items" in str(few)


@pytest.mark.parametrize("command", ["evaluate", "compress"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"caf\xe9 " * 900, "not UTF-8"), (b"too short", "at least"), (b"", "with text"), (None, "nowhere.txt")],
    ids=["Latin-1", "short", "empty", "absent"],
)
def test_a_text_that_is_none_leaves_nothing(cli, tiny_model, tmp_path, command, content, words):
    mine, out = tmp_path / ("mine.txt" if content is not None else "nowhere.txt"), tmp_path / "made"
    if content is not None:
        mine.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    more = () if command == "evaluate" else ("--out", out, "--recipe", ROOT / "recipes" / "w4.toml")
    code, printed, err = cli(command, tiny_model, "--data", mine, "--scale", "test", *more)
    assert code == 2 and words in err and not printed and err.count("\n") == 1 and "Traceback" not in err
    assert not out.exists() and sorted(p for p in tmp_path.rglob("*") if p.suffix != ".lock") == before


@pytest.mark.parametrize("choices", [["b", "b"], ["b"], "bc", ["b", ""], ["b", None]])
def test_a_task_whose_choices_are_equal(choices):
    from llmcourse import lmeval

    with pytest.raises(BadInput) as e:
        lmeval.items_task([ac.Item(context="a", choices=choices, answer=0)])
    assert "choices is" in str(e.value) and json.dumps(str(e.value))
