"""Every pass after every other: what is refused, before anything has run, in a list and on a finished student alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from archs import random_text

import llmcourse
from llmcourse import compression
from llmcourse.adapters import adapter_for
from llmcourse.compression import Pass, Report, check_order, compress, mask_of, qparams_of
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig

transformers.logging.set_verbosity_error()
RT = Runtime.auto("cpu", "float32")
ROUND = {"awq", "binary", "dynamic-int8", "gptq", "nf4", "qat", "rtn", "smoothquant", "ternary"}
PRUNE = {"gradient", "gradual", "magnitude", "random-mask", "sparsegpt", "wanda"}
NOISE = {"noise", "rounding-noise"}
# first pass → second passes that would spoil what it did; after all others anything may come
REFUSED = {
    **{name: ROUND | PRUNE | NOISE | {"rotate", "rotate-inputs", "structured"} for name in ROUND},
    **{name: {"binary", "rotate", "rotate-inputs"} for name in PRUNE},
    "rtn-embedding": {"rotate", "rtn-embedding"},
    "rotate-inputs": {"rotate", "rotate-inputs", "structured"},
}
FREE = {"depth", "distill", "keep-blocks", "structured", "rotate", *NOISE}
NAMES = sorted({*REFUSED, *FREE})
# as little work as a pass can do
LEAST = dict(n_calib=1, seq_len=8, batch_size=1, steps=1, ramp=0, every=1, n_train=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=3, max_position_embeddings=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


@pytest.fixture(scope="module")
def passes(model):
    """One pass of every kind."""
    own = {name: cls for name, cls in llmcourse.passes().items() if cls.__module__.startswith("llmcourse.")}
    assert set(own) == set(NAMES), "a new pass: say in REFUSED or FREE what may come after it"
    needed = {
        "distill": dict(teacher=model, train=TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3)),
        "keep-blocks": dict(kept=2),
        "ternary": dict(steps=0),
        "binary": dict(steps=0),
    }
    grouped = {"awq", "gptq", "nf4", "qat", "rtn", "rounding-noise"}
    found = {}
    for name, cls in own.items():
        least = {f.name: LEAST[f.name] for f in dataclasses.fields(cls) if f.name in LEAST and name != "distill"}
        found[name] = cls(**least | needed.get(name, {}) | ({"group_size": 4} if name in grouped else {}))
    return found


@pytest.fixture(scope="module")
def students(model, passes):
    """What each pass makes of the model, and what the bars of progress were called meanwhile."""
    before, bars, made = compression.progress, {}, {}
    try:
        for name, p in passes.items():
            compression.progress = lambda items, title, _name=name: bars.setdefault(_name, []).append(title) or items
            made[name], _ = compress(model, [p], random_text(), RT)
    finally:
        compression.progress = before
    return made, bars


def sentence(attempt) -> str | None:
    """What is refused, or None."""
    try:
        attempt()
    except BadInput as e:
        return str(e)
    return None


@pytest.mark.parametrize("first", NAMES)
def test_a_list_and_a_finished_student_are_refused_the_same(model, passes, students, first):
    dense, student = adapter_for(model), students[0][first]
    adapter = adapter_for(student)

    def alone(p):
        p.check(student, adapter)
        check_order([p], adapter)

    for second, p in passes.items():
        planned = sentence(lambda p=p: check_order([passes[first], p], dense))
        found = sentence(lambda p=p: alone(p))
        expected = second in REFUSED.get(first, ())
        assert (planned is not None) == expected, (second, planned)
        assert (found is not None) == expected, (second, found)
        for text in (planned, found) if expected else ():
            assert "; allowed: " in text and text.endswith(".") and "\n" not in text, text
        if expected:
            assert f"{second!r} after {first!r}: it would undo the " in planned, planned


@pytest.mark.parametrize("first", sorted(REFUSED))
def test_nothing_has_run_when_a_pair_is_refused(model, passes, monkeypatch, first):
    kinds = {type(p) for p in passes.values()}
    for kind in kinds:
        monkeypatch.setattr(kind, "run", lambda *args: pytest.fail("a pass has run"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for second in sorted(REFUSED[first])[:: 1 if len(REFUSED[first]) < 4 else 5]:
        with pytest.raises(BadInput, match="it would undo the"):
            compress(model, [passes[first], passes[second]], random_text(), RT)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# one first pass for each kind of thing that a layer can carry
@pytest.mark.parametrize("first", ["rotate-inputs", "nf4"])
def test_what_is_not_refused_runs_and_leaves_what_was_there(passes, students, first):
    old = dict(students[0][first].named_modules())
    for second in sorted(set(NAMES) - set(REFUSED.get(first, ()))):
        student, reports = compress(students[0][first], [passes[second]], random_text(), RT)
        assert [r.name for r in reports] == [passes[second].name]
        kept = 0
        for name in old.keys() & dict(student.named_modules()).keys():  # some passes leave blocks out
            before, layer = old[name], student.get_submodule(name)
            if hasattr(before, "input_rotation"):
                assert layer.input_rotation.kind == before.input_rotation.kind, (second, name)
                kept += 1
            elif (q := qparams_of(before)) is not None:
                now = qparams_of(layer)
                assert type(now) is type(q) and torch.equal(now.fake_quantize(layer.weight), layer.weight), second
                kept += 1
        assert kept >= 2 and torch.isfinite(student(torch.arange(8)[None]).logits).all(), second


@pytest.mark.parametrize("first", sorted(ROUND))
def test_training_on_a_teacher_leaves_every_weight_on_its_values(passes, students, first):
    """Whatever the values are: evenly spaced, of a table, two or three."""
    student = compress(students[0][first], [passes["distill"]], random_text(), RT)[0]
    moved = 0
    for (name, layer), old in zip(student.named_modules(), students[0][first].modules(), strict=True):
        if (q := qparams_of(layer)) is not None:
            assert torch.equal(q.fake_quantize(layer.weight), layer.weight), name
            moved += not torch.equal(layer.parametrizations.weight.original, old.parametrizations.weight.original)
    assert moved > 5


def test_the_bar_of_progress_has_the_name_of_the_pass(passes, students):
    seen = students[1]
    assert {"magnitude", "gradient", "wanda", "rtn", "nf4"} <= seen.keys()
    for name, titles in seen.items():
        assert set(titles) == {f"{passes[name].name}: blocks"}


def test_a_pass_after_one_that_changes_shapes_is_refused_when_its_turn_comes(model, passes, monkeypatch):
    """Which layer is which afterwards is not known before; but the third pass itself must not begin."""
    monkeypatch.setattr(type(passes["wanda"]), "run", lambda *args: pytest.fail("a pass has run"))
    with pytest.raises(BadInput, match="'wanda' after earlier passes on this model"):
        compress(model, [passes["nf4"], passes["depth"], passes["wanda"]], random_text(), RT)


def test_only_the_layers_that_both_passes_treat_are_looked_at(model, passes):
    first = dataclasses.replace(passes["nf4"], layers="*.mlp.*")
    rest = dataclasses.replace(passes["magnitude"], layers="*.self_attn.*")
    student, _ = compress(model, [first, rest], None, None)
    block = student.model.layers[0]
    assert qparams_of(block.mlp.up_proj) is not None and mask_of(block.self_attn.q_proj) is not None
    folds = dataclasses.replace(passes["awq"], layers="*.o_proj")  # into the module before: v_proj
    with pytest.raises(BadInput, match=r"'awq' after 'nf4': it would undo the rounding of '.*v_proj'"):
        compress(model, [dataclasses.replace(first, layers="*.v_proj"), folds], random_text(), RT)


def test_a_pass_of_ones_own_says_what_it_leaves_and_spoils(model):
    class Both(Pass):
        leaves = ("mask",)
        spoils = {"mask": "once"}

        def treats(self, adapter):
            return {"lm_head": adapter.model.lm_head}

        def run(self, model, ctx):
            return model, Report("both", {}, (), 0.0)

    compress(model, [Both()], None, None)
    with pytest.raises(BadInput, match=r"'Both' after 'Both': it would undo the mask of 'lm_head'.*allowed: once"):
        compress(model, [Both(), Both()], None, None)
