"""Our own `GPT`, with one feed-forward network per block or with routed experts."""

from __future__ import annotations

from torch import nn

from llmcourse.adapters.base import Adapter, Dim, Part, Reads, Shared, linear_parts

__all__ = ["OurGPT"]


class OurGPT(Adapter):
    """The model of the chapter "The model"."""

    families = ("gpt",)
    root = "blocks"
    plan = (
        Reads("attention.in", ("attn.q", "attn.k", "attn.v"), prev="attn_norm"),
        Reads("attention.out", ("attn.o",), prev="attn.v"),
        Reads("ffn.in", ("ffn.gate", "ffn.up"), prev="ffn_norm"),
        Reads("ffn.out", ("ffn.down",), prev="ffn.up"),
        Reads("experts.*.in", ("gate", "up"), each="ffn.experts.*"),
        Reads("experts.*.out", ("down",), prev="up", each="ffn.experts.*"),
    )
    left = {"ffn.router.weight": "router"}

    def prev(self, block: nn.Module, reads: Reads) -> nn.Module | None:
        c = self.config
        exact = {
            "attn_norm": c.norm_position == "pre",
            "ffn_norm": c.norm_position == "pre",
            "attn.v": c.n_kv_heads == c.n_heads,  # with grouped queries one value column feeds several inputs of o
            "ffn.up": c.ffn in ("swiglu", "relu"),  # gelu(x / s) is not gelu(x) / s
            "up": c.ffn in ("swiglu", "relu"),
        }
        return super().prev(block, reads) if exact.get(reads.prev, False) else None

    def shared(self, block: nn.Module, reads: Reads) -> Shared | None:
        c = self.config
        if reads.prev != "attn.v" or c.n_kv_heads == c.n_heads:
            return None
        return Shared(block.attn.v, c.n_heads // c.n_kv_heads, c.head_dim)

    def dims(self, index: int) -> list[Dim]:
        c, block = self.config, self.blocks()[index][1]
        attn, ffn, group = block.attn, block.ffn, c.n_heads // c.n_kv_heads
        heads = [
            *linear_parts(attn.q, 0, group * c.head_dim),
            *linear_parts(attn.k, 0, c.head_dim),
            *linear_parts(attn.v, 0, c.head_dim),
            *linear_parts(attn.o, 1, group * c.head_dim),
        ]
        counters = ((attn, "n_heads", group), (attn, "n_kv_heads", 1))
        found = [Dim("heads", attn.n_kv_heads, tuple(heads), {"n_heads": group, "n_kv_heads": 1}, counters)]
        if c.n_experts:
            parts = (Part(ffn, "experts", 0), Part(ffn.router, "weight", 0))
            return [*found, Dim("experts", len(ffn.experts), parts, {"n_experts": 1})]
        gate = linear_parts(ffn.gate, 0) if c.ffn == "swiglu" else []
        parts = (*gate, *linear_parts(ffn.up, 0), *linear_parts(ffn.down, 1))
        return [*found, Dim("channels", ffn.down.in_features, parts, {"d_ff": 1})]
