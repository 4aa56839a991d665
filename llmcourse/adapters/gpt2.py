"""GPT-2: matrices that are stored transposed (`Conv1D`), which become nn.Linear before the walk."""

from __future__ import annotations

from llmcourse.adapters.base import Adapter, Dim, Reads, linear_parts
from llmcourse.adapters.separate import separate

__all__ = ["GPT2"]


class GPT2(Adapter):
    """GPT-2 without cross-attention."""

    families = ("gpt2",)
    root = "transformer.h"
    plan = (
        Reads("attention.in", ("attn.c_attn",), prev="ln_1"),
        Reads("attention.out", ("attn.c_proj",)),
        Reads("mlp.in", ("mlp.c_fc",), prev="ln_2"),
        Reads("mlp.out", ("mlp.c_proj",)),
    )

    def prepare(self) -> None:
        separate(self.model)

    def dims(self, index: int) -> list[Dim]:
        block = self.blocks()[index][1]
        attn, mlp = block.attn, block.mlp
        heads = (*linear_parts(attn.c_attn, 0, attn.head_dim, repeats=3), *linear_parts(attn.c_proj, 1, attn.head_dim))
        counters = ((attn, "num_heads", 1), (attn, "split_size", attn.head_dim))
        channels = (*linear_parts(mlp.c_fc, 0), *linear_parts(mlp.c_proj, 1))
        return [
            Dim("heads", attn.num_heads, heads, {"n_head": 1}, counters),
            Dim("channels", mlp.c_proj.in_features, channels, {"n_inner": 1}),
        ]
