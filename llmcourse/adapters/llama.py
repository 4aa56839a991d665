"""Llama and its relatives: Mistral, Qwen, SmolLM, Granite, Phi-3, and Gemma with its windows and extra norms."""

from __future__ import annotations

from torch import nn

from llmcourse.adapters.base import Adapter, Dim, Reads, Shared, linear_parts

__all__ = ["Gemma", "Llama"]


class Llama(Adapter):
    """Pre-norm blocks with rotary positions and a gated feed-forward network."""

    families = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
    root = "model.layers"
    plan = (
        Reads("attention.in", tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "qkv")), prev="input_layernorm"),
        Reads("attention.out", ("self_attn.o_proj",), prev="self_attn.v_proj"),
        Reads("mlp.in", tuple(f"mlp.{p}_proj" for p in ("gate", "up", "gate_up")), prev="post_attention_layernorm"),
        Reads("mlp.out", ("mlp.down_proj",), prev="mlp.up_proj"),
    )

    def prev(self, block: nn.Module, reads: Reads) -> nn.Module | None:
        if reads.prev == "self_attn.v_proj" and (self._groups > 1 or self._clips):  # see `shared`
            return None
        return super().prev(block, reads)

    def shared(self, block: nn.Module, reads: Reads) -> Shared | None:
        """With grouped queries one value column feeds several inputs of o."""
        if reads.prev != "self_attn.v_proj" or self._groups == 1 or self._clips:
            return None
        value = super().prev(block, reads)
        return value and Shared(value, self._groups, block.self_attn.head_dim)

    @property
    def _clips(self) -> bool:
        """Whether the values are cut off at a limit (OLMoE), which would then have to be scaled, too."""
        return getattr(self.config, "clip_qkv", None) is not None

    @property
    def _groups(self) -> int:
        """Query heads that read one head of values."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def dims(self, index: int) -> list[Dim]:
        block = self.blocks()[index][1]
        return [*self._heads(block.self_attn), *self._channels(block.mlp)]

    def _channels(self, mlp: nn.Module) -> list[Dim]:
        if hasattr(mlp, "gate_up_proj"):
            wide = linear_parts(mlp.gate_up_proj, 0, repeats=2)
        else:
            wide = [*linear_parts(mlp.gate_proj, 0), *linear_parts(mlp.up_proj, 0)]
        parts = (*wide, *linear_parts(mlp.down_proj, 1))
        return [Dim("channels", mlp.down_proj.in_features, parts, {"intermediate_size": 1})]

    def _heads(self, attn: nn.Module) -> list[Dim]:
        if hasattr(attn, "qkv_proj"):  # Phi-3's config has no head_dim: loaded again, it would take hidden_size / heads
            return []
        # a norm over all heads (OLMoE): without one head the others would be scaled differently
        if hasattr(attn, "q_norm") and attn.q_norm.weight.numel() != attn.head_dim:
            return []
        size = attn.k_proj.out_features // attn.head_dim
        group = attn.q_proj.out_features // attn.head_dim // size
        parts = (
            *linear_parts(attn.q_proj, 0, group * attn.head_dim),
            *linear_parts(attn.k_proj, 0, attn.head_dim),
            *linear_parts(attn.v_proj, 0, attn.head_dim),
            *linear_parts(attn.o_proj, 1, group * attn.head_dim),
        )
        return [Dim("heads", size, parts, {"num_attention_heads": group, "num_key_value_heads": 1})]


class Gemma(Llama):
    """Gemma 1: its norms multiply by one plus their weight."""

    families = ("gemma",)
    norm_offset = 1.0


class Gemma2(Gemma):
    """Gemma 2 and 3: norms before and after each half of a block, and full and sliding windows in turn."""

    families = ("gemma2", "gemma3_text")
    plan = (
        *Llama.plan[:2],
        Reads("mlp.in", ("mlp.gate_proj", "mlp.up_proj"), prev="pre_feedforward_layernorm"),
        Llama.plan[3],
    )
