"""Quantization-aware training: on the grid, learning, clipped weights at rest, masks kept, refusals before the work."""

from __future__ import annotations

import copy

import pytest
import torch
from archs import build, ids, logits, random_text

from llmcourse.compression import compress, mask_of, qparams_of
from llmcourse.evaluation import perplexity
from llmcourse.packed import load_student, save_student
from llmcourse.pruning import Magnitude
from llmcourse.qat import QAT
from llmcourse.quantization import RTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.training import train

RT = Runtime.auto("cpu", "float32")
HOW = dict(bits=2, group_size=8, steps=30, batch_size=4, seq_len=16, lr=3e-3, n_train=20)


@pytest.fixture(scope="module")
def data():
    return random_text()


@pytest.fixture(scope="module")
def dense():
    return build("llama")


@pytest.fixture(scope="module")
def student(dense, data):
    return compress(dense, [QAT(**HOW)], data, RT)[0]


def quantized(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and qparams_of(m) is not None]


def test_every_layer_lies_on_its_grid_and_the_raw_weights_have_learned(dense, student):
    layers = quantized(student)
    assert len(layers) == len(quantized(compress(dense, [RTN(bits=2, group_size=8)], None, None)[0])) > 5
    names = {m: n for n, m in student.named_modules()}
    for layer in layers:
        q, raw = qparams_of(layer), layer.parametrizations.weight.original
        assert torch.equal(q.fake_quantize(layer.weight), layer.weight) and not torch.equal(layer.weight, raw)
        assert not torch.equal(raw, dense.get_submodule(names[layer]).weight)


def test_it_learns_what_rounding_has_cost(dense, data, student):
    """On the text that it was trained on: a test of the training, not of a language model."""
    from dataclasses import replace

    again = replace(data, test=data.train)
    how = dict(context=16, stride=15, batch_size=8, rt=RT)
    rounded = compress(dense, [RTN(bits=2, group_size=8)], None, None)[0]
    assert perplexity(student, again, **how).value < perplexity(rounded, again, **how).value


def test_a_clipped_weight_stays_where_it_is(data, student):
    model = copy.deepcopy(student)
    layer = quantized(model)[0]
    raw, q = layer.parametrizations.weight.original, qparams_of(layer)
    far = 100 * q.columns(0, raw.shape[1])[0][0, 0].item()
    with torch.no_grad():
        raw[0, 0], raw[0, 1] = far, -far
    before = raw.detach().clone()
    train(model, data, QAT(**HOW | dict(steps=3)).training, rt=RT)
    moved = raw.detach() != before
    inside = q.inside(before)
    assert not inside[0, :2].any() and not moved[~inside].any() and moved[inside].float().mean() > 0.9


def test_masks_stay(dense, data):
    found = compress(dense, [Magnitude(sparsity=0.5), QAT(**HOW | dict(steps=3))], data, RT)[0]
    for layer in quantized(found):
        assert (layer.weight[~mask_of(layer)] == 0).all()
        assert 0.4 < mask_of(layer).float().mean() < 0.6


def test_the_folder_holds_what_was_trained(student, tmp_path):
    save_student(student, None, tmp_path / "s", rest_dtype=torch.float32)
    loaded, _ = load_student(tmp_path / "s")
    torch.testing.assert_close(logits(loaded, ids()), logits(student, ids()), rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_bits(dense, data):
    one, two, other = (
        compress(dense, [QAT(**HOW | dict(steps=3), seed=s)], data, RT)[0].state_dict() for s in (0, 0, 1)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(steps=0), "steps"),
        (dict(steps=1.5), "steps"),
        (dict(batch_size=0), "batch_size"),
        (dict(lr=-1.0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(bits=9), "bits"),
        (dict(seq_len=0), "seq_len"),
        (dict(n_train=0), "n_train"),
    ],
)
def test_what_makes_no_sense_is_refused(options, word):
    with pytest.raises(BadInput, match=word):
        QAT(**HOW | options)


def test_no_text_to_train_on_is_refused_before_the_work(dense, data):
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    for text, n in ((None, 20), (data, 100)):  # data has 400 tokens in each part
        with pytest.raises(BadInput):
            compress(dense, [QAT(**HOW | dict(n_train=n))], text, RT)
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in before.items())
