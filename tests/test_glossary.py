"""The reference page: one meaning for each letter, kept by every chapter; the terms, complete and in order."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

CHAPTERS = sorted((ROOT / "nbs").glob("[0-8]*.ipynb"))
# letters that hold within one section only, and say there what they are
LOCAL = {
    "01_plotting": {"Y"},  # relative luminance
    "02c_cleaning": {"J"},  # Jaccard similarity
    "03_attention": {"M"},  # numbers that the fast memory holds
    "04_model": {"P"},  # mean routing probability
    "05_evaluation": {"A", "P"},  # the models A and B; a matrix of probabilities
    "06_optimizers": {"M", "U"},
    "07_training": {"Sigma", "A"},  # A: a constant of a published law
    "08_objectives": {"K", "P"},
    "10b_search": {"Phi"},  # the normal distribution function
    "11_compression": {"X", "Delta"},  # a change of weights, as in the table, but not bold
    "12_pruning": {"U"},  # the Cholesky factor, as in quantization
    "14_quantization": {"U", "Delta"},
    "16b_federated": {"Phi"},  # the normal distribution function
    "16c_scaling": {"A", "U", "P"},  # a constant of the published law; different tokens; FLOP/s of a device
}


def markdown(path) -> str:
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def letters(formula: str) -> set[str]:
    """Italic capitals and Greek letters of a formula; bold, calligraphic and upright ones are other letters."""
    formula = re.sub(r"\\(text|mathrm|operatorname|mathbf|mathcal|mathbb|begin|end)\s*\{[^}]*\}", " ", formula)
    names = "alpha|beta|gamma|delta|epsilon|eta|theta|lambda|mu|rho|sigma|tau|phi|omega|Delta|Sigma|Phi|Theta"
    greek = re.findall(rf"\\(?:var)?({names})(?![a-zA-Z])", formula)
    return set(re.findall(r"[A-Z]", re.sub(r"\\[A-Za-z]+", " ", formula))) | set(greek)


def formulas(text: str) -> list[str]:
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.S)]


GLOSSARY = markdown(ROOT / "nbs" / "91_glossary.ipynb")
NOTATION, TERMS = GLOSSARY[GLOSSARY.index("## Notation") :].split("## Terms")
KNOWN = set().union(*map(letters, formulas(NOTATION)))


def test_the_rule_can_fail():
    assert letters(r"\hat w = \Delta\,(q - Z) + \mathbf{Q} + \text{PPL} + \beta_1") == {"Delta", "Z", "beta"}
    assert {"B", "T", "S", "D", "H", "V", "eta", "lambda", "omega", "rho"} <= KNOWN and "Z" not in KNOWN


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_letter_is_in_the_table(path):
    unknown = {x for f in formulas(markdown(path)) for x in letters(f)} - KNOWN - LOCAL.get(path.stem, set())
    unknown -= {"Q", "K"}  # as in the table, but not bold
    assert not unknown, "a letter that 91_glossary does not list: choose one of the table, or list it"


def test_the_terms_are_complete_and_in_order():
    rows = re.findall(r'^\| (.+?) \| <span lang="zh">(.+?)</span> \| (.+?) \|$', TERMS, re.M)
    names = [name for name, _, _ in rows]
    assert len(rows) == TERMS.count("\n| ") - 1 and len(rows) > 150  # all but the head
    assert names == sorted(set(names), key=lambda n: n.casefold().replace("–", "-"))
    assert all(meaning.strip() for _, _, meaning in rows)
    for term in ("RoPE", "GQA", "MoE", "nucleus", "GPTQ", "LoRA", "logit"):
        assert any(term in name for name in names), term
    assert "逻辑值" not in TERMS
