"""OPT and GPT-NeoX (Pythia): plain feed-forward networks, biases, learned or partly rotated positions."""

from __future__ import annotations

from torch import nn

from llmcourse.adapters.base import Adapter, Dim, Reads, linear_parts

__all__ = ["OPT", "GPTNeoX"]


class OPT(Adapter):
    """OPT, with its norms before or after each half of a block."""

    families = ("opt",)
    root = "model.decoder.layers"
    plan = (
        Reads("attention.in", tuple(f"self_attn.{p}_proj" for p in "qkv"), prev="self_attn_layer_norm"),
        Reads("attention.out", ("self_attn.out_proj",), prev="self_attn.v_proj"),
        Reads("ffn.in", ("fc1",), prev="final_layer_norm"),
        Reads("ffn.out", ("fc2",), prev="fc1"),
    )

    def prev(self, block: nn.Module, reads: Reads) -> nn.Module | None:
        if reads.prev.endswith("layer_norm") and not self.config.do_layer_norm_before:
            return None
        if reads.prev == "fc1" and self.config.activation_function != "relu":  # relu(x / s) = relu(x) / s for s > 0
            return None
        return super().prev(block, reads)

    def dims(self, index: int) -> list[Dim]:
        block = self.blocks()[index][1]
        attn = block.self_attn
        into = (part for p in (attn.q_proj, attn.k_proj, attn.v_proj) for part in linear_parts(p, 0, attn.head_dim))
        heads = (*into, *linear_parts(attn.out_proj, 1, attn.head_dim))
        channels = (*linear_parts(block.fc1, 0), *linear_parts(block.fc2, 1))
        return [
            Dim("heads", attn.num_heads, heads, {"num_attention_heads": 1}, ((attn, "num_heads", 1),)),
            Dim("channels", block.fc2.in_features, channels, {"ffn_dim": 1}),
        ]


class GPTNeoX(Adapter):
    """GPT-NeoX and Pythia: attention and feed-forward network side by side, each with a norm of its own."""

    families = ("gpt_neox",)
    root = "gpt_neox.layers"
    plan = (
        Reads("attention.in", ("attention.query_key_value",), prev="input_layernorm"),
        Reads("attention.out", ("attention.dense",)),
        Reads("mlp.in", ("mlp.dense_h_to_4h",), prev="post_attention_layernorm"),
        Reads("mlp.out", ("mlp.dense_4h_to_h",)),
    )

    def dims(self, index: int) -> list[Dim]:
        block = self.blocks()[index][1]
        attn, mlp = block.attention, block.mlp
        size = attn.dense.in_features // attn.head_size
        # a head's queries, keys and values are neighbors
        heads = (
            *linear_parts(attn.query_key_value, 0, 3 * attn.head_size),
            *linear_parts(attn.dense, 1, attn.head_size),
        )
        channels = (*linear_parts(mlp.dense_h_to_4h, 0), *linear_parts(mlp.dense_4h_to_h, 1))
        return [
            Dim("heads", size, heads, {"num_attention_heads": 1}),
            Dim("channels", mlp.dense_4h_to_h.in_features, channels, {"intermediate_size": 1}),
        ]
