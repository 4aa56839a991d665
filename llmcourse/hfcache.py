"""The caches of the course for models of transformers: quantized keys and values, and keys and values in blocks.

Hand-written: the lessons (what is rounded, and when; what is kept where) are in `llmcourse.rotation` and
`llmcourse.serving`; here are the names that the library calls its caches by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from llmcourse.rotation import CacheFormat, change_batch, crop, length_of, nbytes_of, stores_for

__all__ = ["Borrowed", "HFCache"]


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


class _BorrowedLayer(DynamicLayer):
    """One layer of a cache of the course, which knows where keys and values go."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_initialized = layer, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self.layer.append(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.layer.length


class Borrowed(Cache):
    """A cache of the course (layers with `append` and `length`), as models of transformers want it, for one pass.

    Every layer shows all of its tokens: windows and chunks are left to the masks, which the model makes from lengths.
    """

    def __init__(self, cache):
        super().__init__(layers=[_BorrowedLayer(layer) for layer in cache.layers])
