"""What an adapter is: where a family of models keeps its blocks, what each block reads, and what can be taken out.

An adapter accounts for every matrix of a block: it belongs to a site, it is left out by name with a reason, or it is
an error. Nothing is skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcourse.modelfolder import positions_of
from llmcourse.settings import BadInput, require

__all__ = [
    "Adapter",
    "Coverage",
    "Dim",
    "Part",
    "Reads",
    "Shared",
    "Site",
    "adapter_for",
    "coverage",
    "is_plain_linear",
    "linear_parts",
    "matches",
    "matrices",
]


@dataclass(frozen=True)
class Shared:
    """A module whose outputs reach a site several times: each stretch of `width` of them `copies` times in a row."""

    module: nn.Module
    copies: int
    width: int

    def tie(self, scale: Tensor) -> Tensor:
        """One value for all columns that come from one output, the geometric mean: (I,) -> (I,)."""
        stretches = scale.view(-1, self.copies, self.width)  # (I,) -> (heads of values, copies, width)
        return stretches.log().mean(1, keepdim=True).exp().expand_as(stretches).reshape(-1)

    def outputs(self, scale: Tensor) -> Tensor:
        """The values of a tied scale (I,) for the outputs of the module: (I / copies,)."""
        stretches = scale.view(-1, self.copies, self.width)
        same = torch.equal(stretches, stretches[:, :1].expand_as(stretches))
        require(same, "scale", "different", "equal values for columns that come from one output of the module before")
        return stretches[:, 0].reshape(-1)


@dataclass(frozen=True)
class Site:
    """The linear layers of a block that read one and the same tensor (queries, keys and values, say).

    Attributes:
        name: full name: block and place, such as `model.layers.3.attention.in`.
        layers: the layers by their full names; all have the same number of inputs.
        prev: the module that produces the tensor and nothing else, so that a scale per column can be folded into it
            exactly; None where there is no such module.
        stage: sites are read in this order within a block; sites of one stage do not depend on each other.
        shared: the same where each output feeds several columns (grouped queries: values into the attention's output).
    """

    name: str
    layers: dict[str, nn.Linear]
    prev: nn.Module | None = None
    stage: int = 0
    shared: Shared | None = None

    @property
    def source(self) -> nn.Module | None:
        """The module that a scale can be folded into, if there is one."""
        return self.prev if self.shared is None else self.shared.module


@dataclass(frozen=True)
class Reads:
    """One line of an adapter's plan: which layers of a block read one tensor.

    Attributes:
        name: the site's name within the block.
        layers: globs of names within the block; those that do not exist are passed over.
        prev: name within the block of the module that produces the tensor and nothing else.
        each: a glob of modules: one site for each of them, with `layers` and `prev` relative to it.
    """

    name: str
    layers: tuple[str, ...]
    prev: str | None = None
    each: str | None = None


@dataclass(frozen=True)
class Part:
    """Entries `[k * width, (k + 1) * width)` along `axis` of `module.attribute` belong to index k of a `Dim`.

    With `repeats`, the axis holds that many such stretches, one after the other (queries, keys, values in one matrix).
    """

    module: nn.Module
    attribute: str
    axis: int
    width: int = 1
    repeats: int = 1

    def rows(self, indices: Tensor, size: int) -> Tensor:
        """The entries along the axis that belong to `indices`, out of `size`, in order."""
        stretch = size * self.width
        inside = (indices[:, None] * self.width + torch.arange(self.width)).flatten()  # (n · width,)
        return (torch.arange(self.repeats)[:, None] * stretch + inside).flatten()


@dataclass(frozen=True)
class Dim:
    """A dimension of a block that structured pruning can shorten: heads, feed-forward channels, experts.

    Attributes:
        name: heads, channels or experts.
        size: how many there are.
        parts: the tensors that shrink with it.
        fields: name of an entry of the model's config → how much it shrinks for each index that is removed.
        counters: (module, attribute, how much): whole numbers that modules of the block keep for themselves.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    fields: Mapping[str, int]
    counters: tuple[tuple[nn.Module, str, int], ...] = ()

    @torch.no_grad()
    def keep(self, indices: Tensor) -> None:
        """Shorten every part, in place, to these indices. The config is left to the caller: it holds for all blocks."""
        for part in self.parts:
            old = getattr(part.module, part.attribute)
            if isinstance(old, nn.ModuleList):
                setattr(part.module, part.attribute, nn.ModuleList(old[i] for i in indices.tolist()))
                continue
            rows = part.rows(indices, self.size).to(old.device)
            cut = partial(_cut, axis=part.axis, rows=rows)
            if parametrize.is_parametrized(part.module, part.attribute):  # a mask lies beside its weight
                chain = part.module.parametrizations[part.attribute]
                for module in chain:
                    for name, buffer in module.named_buffers(recurse=False):
                        if buffer.shape != old.shape:
                            what = f"{part.attribute} carries {type(module).__name__}, whose {name} is no mask"
                            raise BadInput(f"{what}; allowed: take out {self.name} first, quantize last.")
                        setattr(module, name, cut(buffer))
                chain.original = cut(chain.original)
            else:
                setattr(part.module, part.attribute, cut(old))
            if isinstance(part.module, nn.Linear) and part.attribute == "weight":
                part.module.out_features, part.module.in_features = getattr(part.module, part.attribute).shape
        for module, attribute, each in self.counters:
            setattr(module, attribute, getattr(module, attribute) - each * (self.size - len(indices)))


def _cut(tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    """These entries along an axis; a parameter stays one."""
    new = tensor.index_select(axis, rows)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@dataclass(frozen=True)
class Coverage:
    """Which share of a model's parameters a pass treats, and which matrices it leaves.

    Attributes:
        adapter: name of the adapter.
        parameters: of the whole model, shared ones counted once.
        treated: of them, in matrices that are treated.
        blocks: parameters in the matrices of all blocks.
        left: matrix → why it is left. Matrices of one kind in several blocks are one entry, with `*` for the number.
    """

    adapter: str
    parameters: int
    treated: int
    blocks: int
    left: dict[str, str]

    @property
    def share(self) -> float:
        """Treated parameters / parameters of the model."""
        return self.treated / max(1, self.parameters)

    @property
    def share_of_blocks(self) -> float:
        """Treated parameters / parameters in the matrices of the blocks."""
        return self.treated / max(1, self.blocks)

    def __str__(self) -> str:
        left = "; left: " + ", ".join(f"{name} ({why})" for name, why in self.left.items()) if self.left else ""
        return f"{self.share:.1%} of the parameters, {self.share_of_blocks:.1%} of the blocks' matrices{left}"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes x Wᵀ + b and nothing else; a subclass of nn.Linear with its own forward may not."""
    # a parametrized layer has a class of its own that inherits the forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def matches(name: str, globs: str) -> bool:
    """Whether a full name matches one of the globs, separated by commas; one with `!` in front excludes.

    `*` alone is everything, `!*.down_proj` everything else, `*.mlp.*, *.0.self_attn.*` two kinds.
    """
    wanted = [g.strip() for g in globs.split(",") if g.strip()]
    refused = [g[1:] for g in wanted if g.startswith("!")]
    accepted = [g for g in wanted if not g.startswith("!")] or ["*"]
    return any(fnmatchcase(name, g) for g in accepted) and not any(fnmatchcase(name, g) for g in refused)


def _numbers_hidden(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


class Adapter:
    """The knowledge about one family.

    A subclass is short: `families`, `root`, `plan`, and `left` if it leaves something.

    Attributes:
        families: values of `config.model_type` that it handles; whoever defines a subclass registers it by that.
        root: name of the list of blocks.
        plan: what a block reads, in the order of reading.
        left: glob of a matrix within a block → why no pass treats it.
        norm_offset: what the norms add to their weight before they multiply (1 in Gemma).
    """

    families: ClassVar[tuple[str, ...]] = ()
    root: ClassVar[str] = ""
    plan: ClassVar[tuple[Reads, ...]] = ()
    left: ClassVar[Mapping[str, str]] = {}
    norm_offset: ClassVar[float] = 0.0
    registry: ClassVar[dict[str, type[Adapter]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for family in cls.families:
            Adapter.registry[family] = cls

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def prepare(self) -> None:
        """Replace, in place, what holds matrices in another form by the same thing made of nn.Linear."""

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of each block, in order."""
        return [(f"{self.root}.{i}", block) for i, block in enumerate(self.model.get_submodule(self.root))]

    def sites(self, index: int) -> list[Site]:
        """The sites of a block, in the order in which it reads them.

        Raises:
            BadInput: a matrix of the block is neither in a site nor left out by name.
        """
        name, block = self.blocks()[index]
        found = [site for stage, reads in enumerate(self.plan) for site in self._expand(name, block, reads, stage)]
        self._account(name, block, found)
        return found

    def dims(self, index: int) -> list[Dim]:
        """What can be taken out of a block; empty where the adapter does not know."""
        return []

    def prev(self, block: nn.Module, reads: Reads) -> nn.Module | None:
        """The module that `reads.prev` names, if it is there; a subclass refuses where folding would not be exact."""
        return _submodule(block, reads.prev)

    def shared(self, block: nn.Module, reads: Reads) -> Shared | None:
        """The same where `reads.prev` feeds several columns of the site with each of its outputs."""
        return None

    def fold(self, prev: nn.Module, scale: Tensor) -> None:
        """Divide the output of `prev` by `scale` (I,), exactly and in place."""
        parametrized = parametrize.is_parametrized(prev, "weight")  # by a mask: it also holds for the scaled weight
        rounded = parametrized and any(hasattr(p, "qparams") for p in prev.parametrizations.weight)
        require(not rounded, "the module before", "quantized already", "one that no pass has rounded")
        with torch.no_grad():
            weight = prev.parametrizations.weight.original if parametrized else prev.weight
            if isinstance(prev, nn.Linear):
                weight.div_(scale.to(weight)[:, None])
            else:
                weight.add_(self.norm_offset).div_(scale.to(weight)).sub_(self.norm_offset)
            if getattr(prev, "bias", None) is not None:
                prev.bias.div_(scale.to(prev.bias))

    def positions(self) -> int | None:
        """The longest sequence that the model can read; None where its configuration does not say."""
        return positions_of(self.model)

    def few_tokens(self) -> Tensor:
        """Twelve token ids (1, 12), for a quick look at what the model does."""
        weight = self.model.get_input_embeddings().weight
        return (torch.arange(12, device=weight.device) % len(weight))[None]

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for token ids (B, T), without a cache."""
        out = self.model(ids, use_cache=False)
        return getattr(out, "logits", out)

    def _expand(self, name: str, block: nn.Module, reads: Reads, stage: int) -> Iterator[Site]:
        owners = [("", block)]
        if reads.each is not None:
            owners = [(n + ".", m) for n, m in block.named_modules() if n and fnmatchcase(n, reads.each)]
            owners = [(n, m) for n, m in owners if n.count(".") == reads.each.count(".") + 1]
        for prefix, owner in owners:
            layers = {
                f"{name}.{prefix}{n}": m
                for n, m in owner.named_modules()
                if any(fnmatchcase(n, g) and n.count(".") == g.count(".") for g in reads.layers) and _has_matrix(m)
            }
            for full, layer in layers.items():
                allowed = "nn.Linear (an adapter replaces anything else exactly, or leaves it out by name)"
                require(is_plain_linear(layer), f"layer {full}", type(layer).__name__, allowed)
            if layers:
                place = reads.name.replace("*", prefix.rstrip(".").rpartition(".")[2])
                yield Site(f"{name}.{place}", layers, self.prev(owner, reads), stage, self.shared(owner, reads))

    def _account(self, name: str, block: nn.Module, sites: list[Site]) -> None:
        treated = {layer for site in sites for layer in site.layers}
        for matrix, _ in matrices(block):
            owner = f"{name}.{matrix}".rpartition(".")[0]
            if owner not in treated and self._why_left(matrix) is None:
                raise BadInput(
                    f"matrix {name}.{matrix} of {type(self.model).__name__} is not known to the adapter "
                    f"{type(self).__name__}; allowed: a model whose every matrix is treated or left out by name."
                )

    def _why_left(self, matrix: str) -> str | None:
        return next((why for glob, why in self.left.items() if fnmatchcase(matrix, glob)), None)

    def coverage(self, layers: str = "*") -> Coverage:
        """What a pass over the layers that match `layers` treats, and what it leaves."""
        blocks, treated, in_blocks, left = self.blocks(), 0, 0, {}
        parameters = {id(p): p.numel() for p in self.model.parameters()}
        inside: set[int] = set()
        for i, (name, block) in enumerate(blocks):
            chosen = {n for site in self.sites(i) for n in site.layers}
            for matrix, p in matrices(block):
                full, owner = f"{name}.{matrix}", f"{name}.{matrix}".rpartition(".")[0]
                inside.add(id(p))
                in_blocks += p.numel()
                if owner in chosen and matches(owner, layers):
                    treated += p.numel()
                else:
                    why = self._why_left(matrix) if owner not in chosen else f"not in {layers!r}"
                    left[_numbers_hidden(full)] = why
        for name, p in self.model.named_parameters():
            if p.ndim >= 2 and id(p) not in inside:
                left[name] = "outside the blocks"
        return Coverage(type(self).__name__, sum(parameters.values()), treated, in_blocks, left)


def matrices(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of a block with two or more dimensions, whether masked or quantized or not."""
    for name, p in block.named_parameters():
        if p.ndim >= 2:
            yield re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name), p


def linear_parts(layer: nn.Linear, axis: int, width: int = 1, repeats: int = 1) -> list[Part]:
    """The weight of a linear layer along `axis`, and its bias where the outputs shrink."""
    parts = [Part(layer, "weight", axis, width, repeats)]
    return parts + ([Part(layer, "bias", 0, width, repeats)] if axis == 0 and layer.bias is not None else [])


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _submodule(block: nn.Module, name: str | None) -> nn.Module | None:
    try:
        return None if name is None else block.get_submodule(name)
    except AttributeError:
        return None


# ---------------------------------------------------------------------------------------------- which adapter

_STATE = re.compile("Mamba|Rwkv|RWKV|SSM|Recurrent|ShortConv|DeltaNet|xLSTM|RetNet")
_WHAT = "allowed: a causal language model made of transformer blocks (ours, or one of transformers)."


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model: that of its family, or one that finds the sites by watching a forward pass.

    Raises:
        BadInput: one sentence saying what about this model cannot be treated.
    """
    from llmcourse.adapters.traced import Traced

    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise BadInput(f"model is {kind!r}, which has no config to tell its architecture by; {_WHAT}")
    family = getattr(config, "model_type", "gpt" if kind == "GPT" else None)
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"model is {kind!r}, an encoder with a decoder; {_WHAT}")
    stateful = next((type(m).__name__ for m in model.modules() if _STATE.search(type(m).__name__)), None)
    if stateful:
        raise BadInput(f"model is {kind!r}, whose {stateful} carries a state from token to token; {_WHAT}")
    if family != "gpt" and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise BadInput(f"model is {kind!r}, which does not predict the next token; {_WHAT}")
    return Adapter.registry.get(family, Traced)(model)


def coverage(model: nn.Module, layers: str = "*") -> Coverage:
    """Which share of `model` the passes would treat, and which matrices they would leave. Changes nothing.

    Raises:
        BadInput: as `adapter_for`, or a matrix that is neither treated nor left out by name.
    """
    import copy

    adapter = adapter_for(copy.deepcopy(model))
    adapter.prepare()
    return adapter.coverage(layers)
