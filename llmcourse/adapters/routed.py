"""Mixtral, Qwen-MoE, OLMoE and their relatives: attention as in Llama, feed-forward networks as routed experts."""

from __future__ import annotations

from torch import nn

from llmcourse.adapters.base import Dim, Part, Reads, Site
from llmcourse.adapters.llama import Llama
from llmcourse.adapters.separate import RoutedExperts, separate
from llmcourse.adapters.traced import ROUTERS, expert_sites

__all__ = ["Routed"]


class Routed(Llama):
    """Llama's attention with experts, a router that is left out, and possibly an expert that all tokens visit."""

    families = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
    plan = (
        *Llama.plan[:2],
        Reads("mlp.in", ("mlp.gate_proj", "mlp.up_proj"), prev="post_attention_layernorm"),
        Reads("mlp.out", ("mlp.down_proj",), prev="mlp.up_proj"),
        # the norm before experts is read by the router too: no scale can be folded into it
        Reads("shared.in", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
        Reads("shared.out", ("mlp.shared_expert.down_proj",), prev="mlp.shared_expert.up_proj"),
    )
    left = ROUTERS

    def prepare(self) -> None:
        separate(self.model)

    def sites(self, index: int) -> list[Site]:
        name, block = self.blocks()[index]
        found = [site for stage, reads in enumerate(self.plan) for site in self._expand(name, block, reads, stage)]
        found += expert_sites(name, block, len(self.plan))
        self._account(name, block, found)
        return found

    def dims(self, index: int) -> list[Dim]:
        block = self.blocks()[index][1]
        inside = self._experts if hasattr(block.mlp, "experts") else self._channels
        return [*self._heads(block.self_attn), *inside(block.mlp)]

    def _experts(self, mlp: nn.Module) -> list[Dim]:
        experts, router = mlp.experts, mlp.gate
        if not isinstance(experts, RoutedExperts):  # all in one parameter, before `prepare`
            return []
        parts = (Part(experts, "gate_up", 0), Part(experts, "down", 0), Part(router, "weight", 0))
        field = "num_local_experts" if hasattr(self.config, "num_local_experts") else "num_experts"
        return [Dim("experts", len(experts.down), parts, {field: 1}, ((router, "num_experts", 1),))]
