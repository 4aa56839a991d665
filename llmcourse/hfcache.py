"""A quantized key-value cache for models of transformers: their `Cache`, with the stores of the chapter on rotations.

Hand-written: the lesson (what is rounded, and when) is in `llmcourse.rotation`; here are the names that the library
calls its caches by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from llmcourse.rotation import CacheFormat, change_batch, crop, length_of, nbytes_of, stores_for

__all__ = ["HFCache"]


class _Layer(DynamicLayer):
    """One layer: `update` adds to two stores and returns everything, as the dense layer does."""

    def __init__(self, form: CacheFormat):
        super().__init__()
        self.form, self.stores = form, stores_for(form)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores
        return keys.append(key_states), values.append(value_states)

    def get_seq_length(self) -> int:
        return length_of(self.stores[0])

    def reset(self) -> None:
        self.stores, self.is_initialized = stores_for(self.form), False

    def crop(self, tokens_to_remove: int) -> None:
        for store in self.stores:
            crop(store, max(0, length_of(store) - abs(tokens_to_remove)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: torch.repeat_interleave(t, repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])

    def _change(self, change) -> None:
        for store in self.stores:
            change_batch(store, change)


class HFCache(Cache):
    """For `past_key_values` of a causal model of transformers, and of its `generate`."""

    def __init__(self, n_layers: int, form: CacheFormat):
        super().__init__(layers=[_Layer(form) for _ in range(n_layers)])

    @property
    def bytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(nbytes_of(store) for layer in self.layers for store in layer.stores)
