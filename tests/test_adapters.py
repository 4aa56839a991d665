"""Adapters over random small models: every matrix is accounted for, and calibration sees what the model sees."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from archs import CAUSAL, OURS, REFUSED, build, ids, logits
from torch import nn
from torch.overrides import TorchFunctionMode

from llmcourse.adapters import Adapter, adapter_for, coverage, matches
from llmcourse.adapters.base import is_plain_linear, matrices
from llmcourse.adapters.traced import Traced
from llmcourse.compression import Hessian, LayerPass, LayerUpdate, SiteUpdate, compress, fold_scale
from llmcourse.data import TokenData
from llmcourse.modelfolder import positions_of
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput

transformers.logging.set_verbosity_error()
RT = Runtime(device=torch.device("cpu"), dtype=torch.float32)
ALL = [*OURS, *CAUSAL]


@pytest.fixture(scope="module")
def data():
    stream = ids(1, 200, seed=5)[0]
    return TokenData(
        train=stream, val=stream, test=stream, calib=stream, bytes={}, name="random", tokenizer="none", separator=0
    )


def prepared(name: str) -> tuple[nn.Module, Adapter]:
    model = build(name)
    adapter = adapter_for(model)
    adapter.prepare()
    return model, adapter


@dataclass(frozen=True, kw_only=True)
class Identity(LayerPass):
    """Changes nothing and remembers the statistics that it was given."""

    stats = (Hessian,)
    seen: dict

    def solve_site(self, site, weights, stats, masks):
        for name in weights:
            self.seen[name] = stats[Hessian].value, stats[Hessian].n
        return SiteUpdate({name: LayerUpdate(W) for name, W in weights.items()})


@pytest.mark.parametrize("name", ALL)
def test_identity_is_exact_and_sees_what_an_ordinary_forward_pass_sees(name, data):
    model, seen = build(name), {}
    student, (report,) = compress(model, [Identity(seen=seen, n_calib=4, seq_len=20)], data, RT)
    sequences = data.calib_batch(4, 20, 0)
    hooked = {name: Hessian() for name in seen}
    handles = [
        student.get_submodule(layer).register_forward_pre_hook(
            lambda m, a, layer=layer: hooked[layer].add(a[0].reshape(-1, a[0].shape[-1]))
        )
        for layer in seen
    ]
    after = logits(student, sequences)
    for handle in handles:
        handle.remove()
    # gpt-oss multiplies by a transposed matrix, which rounds the sum in another order
    torch.testing.assert_close(after, logits(model, sequences), rtol=0, atol=1e-5 if name == "gpt-oss" else 0)
    for layer, (H, n) in seen.items():
        if hooked[layer].n == 0:  # an expert that no token visits
            assert not H.any()
            continue
        assert hooked[layer].n == n
        torch.testing.assert_close(H, hooked[layer].value, rtol=1e-4, atol=1e-5 * float(H.abs().max()))
    assert {r.name for r in report.layers} == set(seen)
    assert all(r.output_error in (0, None) and r.weight_error == 0 for r in report.layers)


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_of_the_blocks_is_treated_or_left_by_name(name):
    model, adapter = prepared(name)
    found = adapter.coverage()
    treated = {layer for i in range(len(adapter.blocks())) for s in adapter.sites(i) for layer in s.layers}
    left = [why for why in found.left.values() if why != "outside the blocks"]
    assert all("router" in why for why in left)
    assert found.treated == sum(model.get_submodule(n).weight.numel() for n in treated)
    assert found.treated + sum(
        p.numel()
        for block, module in adapter.blocks()
        for n, p in matrices(module)
        if f"{block}.{n}".removesuffix(".weight") not in treated
    ) == sum(p.numel() for _, module in adapter.blocks() for _, p in matrices(module))
    assert 0.985 < found.share_of_blocks <= 1 and (left or found.share_of_blocks == 1)
    assert str(found).startswith(f"{found.share:.1%} of the parameters")


@pytest.mark.parametrize("name", ALL)
def test_a_site_is_what_reads_one_tensor(name):
    """The plan of a family says the same as a forward pass that is watched."""
    model, adapter = prepared(name)
    watched = Traced(model)
    for i in range(len(adapter.blocks())):
        ours = {frozenset(s.layers) for s in adapter.sites(i)}
        theirs = {frozenset(s.layers) for s in watched.sites(i)} if "experts" not in name else ours
        assert ours == theirs
        stages = [s.stage for s in adapter.sites(i)]
        assert stages == sorted(stages)


@pytest.mark.parametrize("name", ALL)
def test_a_scale_that_is_folded_in_changes_nothing(name):
    model, adapter = prepared(name)
    before, folded = logits(model, ids()), 0
    generator = torch.Generator().manual_seed(1)
    for i in range(len(adapter.blocks())):
        for site in adapter.sites(i):
            if site.source is None:
                continue
            folded += 1
            layers = list(site.layers.values())
            scale = torch.rand(layers[0].in_features, generator=generator) * 2 + 0.5
            if site.shared is not None:
                with pytest.raises(BadInput, match="equal values for columns that come from one output"):
                    fold_scale(adapter, site, scale)
                scale = site.shared.tie(scale)
            fold_scale(adapter, site, scale)
            with torch.no_grad():
                for layer in layers:
                    layer.weight.mul_(scale)
    torch.testing.assert_close(logits(model, ids()), before, rtol=1e-3, atol=1e-4)
    assert folded or isinstance(adapter, Traced)


def test_grouped_queries_fold_into_the_values():
    for name, copies in (("llama", 2), ("gemma2", 2), ("mixtral", 2), ("ours, gelu, layer norm, learned positions", 2)):
        _, adapter = prepared(name)
        site = next(s for s in adapter.sites(0) if s.name.endswith("attention.out"))
        assert site.prev is None and site.shared.copies == copies, name
        scale = torch.arange(1.0, next(iter(site.layers.values())).in_features + 1)
        tied = site.shared.tie(scale).view(-1, copies, site.shared.width)
        want = scale.view_as(tied).prod(1) ** (1 / copies)  # geometric mean over the heads of a group
        torch.testing.assert_close(tied[:, 0], want)
    clipped = prepared("olmoe")[1]
    clipped.config.clip_qkv = 1.0
    site = next(s for s in clipped.sites(0) if s.name.endswith("attention.out"))
    assert site.source is None  # what is cut off at a limit does not scale


@pytest.mark.parametrize("name", ALL)
def test_removing_is_the_same_as_zeroing(name):
    """A head or channel that is cut out of one block, against the same model with its output columns at zero."""
    model, adapter = prepared(name)
    dims = adapter.dims(1)
    if type(adapter) is Traced:  # it has found the layers by itself, and does not know what may be cut
        assert dims == []
        return
    assert "channels" in [d.name for d in dims] or "experts" in name or type(adapter).__name__ == "Routed"
    for k, dim in enumerate(dims):
        if dim.name == "experts":
            continue
        cut, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        gone = 1
        keep = torch.tensor([j for j in range(dim.size) if j != gone])
        adapter_for(cut).dims(1)[k].keep(keep)
        assert adapter_for(cut).dims(1)[k].size == dim.size - 1
        out = adapter_for(zeroed).dims(1)[k].parts[-1]  # the matrix that reads this dimension comes last
        assert out.axis == 1
        with torch.no_grad():
            out.module.weight[:, out.rows(torch.tensor([gone]), dim.size)] = 0
        fewer = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters())
        assert fewer > 0 and not torch.equal(logits(zeroed, ids()), logits(model, ids()))
        torch.testing.assert_close(logits(cut, ids()), logits(zeroed, ids()), rtol=1e-4, atol=1e-5)


class Closed(TorchFunctionMode):
    """The router with this weight never chooses expert `gone`."""

    def __init__(self, weight: torch.Tensor, gone: int):
        super().__init__()
        self.weight, self.gone = weight, torch.tensor([gone])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        chooses = func is nn.functional.linear and args[1] is self.weight
        return out.index_fill(-1, self.gone, -torch.inf) if chooses else out


@pytest.mark.parametrize("gone", [0, 2, 3])
@pytest.mark.parametrize("name", ["ours, experts", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_removing_an_expert_is_the_same_as_never_choosing_it(name, gone):
    model, adapter = prepared(name)
    cut = copy.deepcopy(model)
    dim = next(d for d in adapter_for(cut).dims(1) if d.name == "experts")
    dim.keep(torch.tensor([e for e in range(4) if e != gone]))
    (field,) = dim.fields
    assert dim.size == getattr(model.config, field) == 4
    assert next(d for d in adapter_for(cut).dims(1) if d.name == "experts").size == 3
    router = next(d for d in adapter.dims(1) if d.name == "experts").parts[-1]
    with Closed(router.module.weight, gone):
        closed = logits(model, ids())
    assert not torch.equal(closed, logits(model, ids()))
    torch.testing.assert_close(logits(cut, ids()), closed)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_treated_is_refused_in_one_sentence(name):
    with pytest.raises(BadInput) as caught:
        coverage(build(name))
    text = str(caught.value)
    assert REFUSED[name][-1] in text and text.count("; allowed: ") == 1 and "\n" not in text


class Scaled(nn.Linear):
    """Looks like a linear layer and computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["llama", "olmo2", "ours"])
def test_a_matrix_that_nobody_knows_is_an_error(name):
    model = build(name)
    block = adapter_for(model).blocks()[1][1]
    block.extra = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(BadInput, match=r"\.1\.extra .* not known"):
        coverage(model)
    del block.extra
    owner, child, layer = next((m, n, c) for m in block.modules() for n, c in m.named_children() if is_plain_linear(c))
    setattr(owner, child, Scaled(layer.in_features, layer.out_features, bias=False))
    with pytest.raises(BadInput, match=rf"\.1\..*{child}.*(Scaled|not known)"):
        coverage(model)


def test_a_model_that_does_something_between_blocks_is_refused(data):
    model = build("olmo2")

    def between(module, args, kwargs):
        return (args[0] * 1.5, *args[1:]), kwargs

    handle = model.model.layers[2].register_forward_pre_hook(between, with_kwargs=True)
    with pytest.raises(BadInput, match=r"something between model\.layers\.1 and the next block"):
        compress(model, [Identity(seen={}, n_calib=2, seq_len=10)], data, RT)
    handle.remove()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "jetmoe", "llama4", "gpt2", "falcon"])
def test_matrices_in_another_form_are_taken_apart_exactly(name):
    model, original = prepared(name)[0], build(name)
    torch.testing.assert_close(logits(model, ids()), logits(original, ids()), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in original.parameters())
    assert not any(p.ndim > 2 for p in model.parameters())


@pytest.mark.parametrize(
    ("globs", "chosen"),
    [
        ("*", "abc"),
        ("*.a", "a"),
        ("*.a, *.b", "ab"),
        ("!*.c", "ab"),
        ("*,!*.b", "ac"),
        ("m.[0-2].?", "abc"),
        ("m.1.*", ""),
    ],
)
def test_layers_are_chosen_by_globs(globs, chosen):
    assert "".join(n for n in "abc" if matches(f"m.0.{n}", globs)) == chosen


def test_a_new_family_registers_itself():
    class Mine(Adapter):
        families = ("a-family-of-mine",)

    assert Adapter.registry["a-family-of-mine"] is Mine
    del Adapter.registry["a-family-of-mine"]


@pytest.mark.parametrize("name", ALL)
def test_how_much_a_model_reads_is_found_in_every_configuration(name):
    """The adapter and everything that asks without one; a model that does not say may read anything."""
    model = build(name)
    found = positions_of(model)
    assert found == adapter_for(model).positions() and (found is None or found >= 12)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"context": 8}, 8),
        ({"max_position_embeddings": 16}, 16),
        ({"n_positions": 4}, 4),
        ({"max_seq_len": 6}, 6),
        ({"max_position_embeddings": 0, "max_seq_len": 6}, 6),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 3.5}, None),
        ({}, None),
    ],
)
def test_how_much_a_model_reads(config, says):
    assert positions_of(SimpleNamespace(config=SimpleNamespace(**config))) == says
    pair = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**config), context=99)
    assert positions_of(SimpleNamespace(config=pair)) == says  # of texts and pictures: the text's
    assert positions_of(lambda ids: ids) is None
