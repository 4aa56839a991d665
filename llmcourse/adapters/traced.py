"""The adapter for architectures that no file describes: it watches one forward pass to see what reads what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import nn

from llmcourse.adapters.base import Adapter, Site, is_plain_linear
from llmcourse.adapters.separate import FusedExperts, ParallelExperts, RoutedExperts, separate
from llmcourse.runtime import evaluating
from llmcourse.settings import BadInput, require

__all__ = ["ROUTERS", "Traced", "expert_sites", "largest_list"]

ROUTERS: Mapping[str, str] = {
    "*router*": "router: small, and one wrong choice sends a token to the wrong expert",
    "*.gate.weight": "router",
    "*.gate.*.weight": "router",
    "*shared_expert_gate.weight": "router of the shared expert",
}


def largest_list(model: nn.Module) -> str:
    """Name of the module list with the most parameters: where a transformer keeps its blocks."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    require(bool(lists), "model", type(model).__name__, "a model with a list of blocks (nn.ModuleList)")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))[0]


def expert_sites(name: str, block: nn.Module, stage: int) -> list[Site]:
    """A site for each layer of each separated expert: every expert reads its own tokens."""
    found = []
    for place, module in block.named_modules():
        if isinstance(module, (RoutedExperts, FusedExperts)):
            lists = {"gate_up": module.gate_up, "down": module.down}
        elif isinstance(module, ParallelExperts):
            lists = {"experts": module.experts}
        else:
            continue
        for attribute, layers in lists.items():  # in the order in which they run
            for e, layer in enumerate(layers):
                full = f"{name}.{place}.{attribute}.{e}"
                found.append(Site(full, {full: layer}, None, stage))
            stage += 1
    return found


class Traced(Adapter):
    """Sites by observation: linear layers of a block that were given the very same tensor share one.

    It is used where every matrix of the blocks belongs to an nn.Linear that is called, or is a router by its name.
    """

    left: ClassVar[Mapping[str, str]] = ROUTERS

    def prepare(self) -> None:
        separate(self.model)

    @property
    def root(self) -> str:
        return largest_list(self.model)

    def sites(self, index: int) -> list[Site]:
        if not hasattr(self, "_sites"):
            self._sites = self._trace()
        return self._sites[index]

    def _trace(self) -> list[list[Site]]:
        """Run twelve tokens through the model and note which linear layer of which block reads which tensor."""
        kind, blocks = type(self.model).__name__, self.blocks()
        reads: list[dict[tuple, dict[str, nn.Linear]]] = [{} for _ in blocks]
        calls, held = [0] * len(blocks), []

        def note(block: int, name: str, layer: nn.Linear, x: torch.Tensor) -> None:
            held.append(x)  # alive until the end, so that no other tensor gets its address
            key = (x.data_ptr(), x.numel(), x.shape[-1], x._version)
            reads[block].setdefault(key, {})[name] = layer

        def count(block: int) -> None:
            calls[block] += 1

        ids = self.few_tokens()
        with evaluating(self.model), ExitStack() as hooks:
            for i, (prefix, block) in enumerate(blocks):
                hooks.callback(block.register_forward_pre_hook(lambda m, a, k, i=i: count(i), with_kwargs=True).remove)
                for n, m in block.named_modules():
                    if is_plain_linear(m):
                        see = lambda m, a, i=i, n=f"{prefix}.{n}": note(i, n, m, a[0])
                        hooks.callback(m.register_forward_pre_hook(see).remove)
            try:
                seen = self.logits(ids)
                other = self.logits(torch.cat((ids[:, :-1], ids[:, :1]), 1))  # the same with another last token
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
                raise BadInput(f"model is {kind!r}, which fails on twelve tokens ({e}); allowed: one that runs.") from e
        same = torch.allclose(seen[:, :-1], other[:, :-1], rtol=1e-4, atol=1e-4)
        require(same, "model", kind, "a causal one: here a token's logits depend on a later token")
        require(set(calls) == {2}, "model", kind, "one whose blocks are each called once in a forward pass")
        return [self._of_block(i, *blocks[i], reads[i]) for i in range(len(blocks))]

    def _of_block(self, index: int, name: str, block: nn.Module, reads: dict) -> list[Site]:
        routed = expert_sites(name, block, 10_000)
        inside = {layer for site in routed for layer in site.layers}
        sites, seen = [], set()
        for stage, layers in enumerate(reads.values()):
            chosen = {n: m for n, m in layers.items() if n not in inside and n not in seen}
            chosen = {n: m for n, m in chosen.items() if self._why_left(n.removeprefix(f"{name}.") + ".weight") is None}
            seen |= chosen.keys()
            if chosen:
                label = re.sub(r".*\.", "", next(iter(chosen)))
                sites.append(Site(f"{name}.{label}.in", chosen, None, stage))
        sites += routed
        self._account(name, block, sites)
        return sites

    def _why_left(self, matrix: str) -> str | None:
        has_experts = "expert" in matrix or "moe" in matrix.lower() or self._has_experts
        return super()._why_left(matrix) if has_experts else None

    @property
    def _has_experts(self) -> bool:
        return any(isinstance(m, (RoutedExperts, FusedExperts, ParallelExperts)) for m in self.model.modules())
