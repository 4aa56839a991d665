"""Adapters: what the compression walk has to know about a family of models, one short file for each family.

To add a family, subclass `Adapter` with the `model_type` of its configuration, the name of its list of blocks and what
a block reads, and add the architecture to the table in `tests/test_adapters.py`.
"""

from llmcourse.adapters import gpt, gpt2, llama, opt, routed, traced  # noqa: F401  (each registers its families)
from llmcourse.adapters.base import Adapter, Coverage, Dim, Part, Reads, Shared, Site, adapter_for, coverage, matches
from llmcourse.adapters.separate import expert_matrices

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
    "expert_matrices",
    "matches",
]
