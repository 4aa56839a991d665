"""llmcourse: make a language model smaller and faster, and measure what was lost.

The modules are exported from the notebooks of the course (`nbs/`). Importing the package loads neither torch nor
transformers: each public name is looked up in its module when it is first used.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "load_settings": "settings",
    "Runtime": "runtime",
    "seed_everything": "runtime",
    "load_model": "data",
    "load_data": "data",
    "token_data": "data",
    "TokenData": "data",
    "BPE": "tokenizer",
    "perplexity": "evaluation",
    "corpus_bleu": "metrics",
    "chrf": "metrics",
    "rouge": "metrics",
    "evaluate": "evaluator",
    "make_optimizer": "optim",
    "TrainConfig": "training",
    "train": "training",
    "adapter_for": "adapters",
    "coverage": "adapters",
    "compress": "compression",
    "Passport": "compression",
    "Magnitude": "pruning",
    "Wanda": "pruning",
    "SparseGPT": "pruning",
    "Structured": "pruning",
    "Distill": "distillation",
    "KeepBlocks": "distillation",
    "RTN": "quantization",
    "GPTQ": "quantization",
    "AWQ": "activations",
    "SmoothQuant": "activations",
    "DynamicInt8": "activations",
    "QAT": "lowbit",
    "NF4": "lowbit",
    "Ternary": "lowbit",
    "Binary": "lowbit",
    "Rotate": "rotation",
    "CacheFormat": "rotation",
    "quantized_cache": "rotation",
    "faster": "deployment",
    "Engine": "serving",
    "Request": "serving",
    "save_student": "packed",
    "load_student": "packed",
}

__all__ = sorted([*_PUBLIC, "passes"])


def passes() -> dict[str, type]:
    """Every compression method of the package by the name in its class, which is the one that recipes use."""
    for module in sorted(set(_PUBLIC.values())):
        _import_module(f"{__name__}.{module}")
    return dict(_import_module(f"{__name__}.compression").Pass.registry)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(_import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
