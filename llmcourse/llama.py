"""Llama checkpoints: reading their config.json and safetensors into a `GPT`, and writing them.

Hand-written: this is the plumbing around the chapter on the model. What a config.json says is either understood or
refused, because a number that is read with another meaning gives a model that runs and is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcourse.modelfolder import check_model_folder, locate_model, weight_files
from llmcourse.settings import BadInput, Settings, load_settings, require, whole
from llmcourse.store import write_atomic

if TYPE_CHECKING:
    from llmcourse.model import GPT, GPTConfig
    from llmcourse.runtime import Runtime

__all__ = ["LlamaFiles", "check_llama", "llama_config", "read_config", "read_weights", "their_name", "write_llama"]

# transformers' names of the weights -> ours, applied in this order; the parts of a layer end in "_proj"
_NAMES = (
    ("model.embed_tokens.", "embed."), ("model.layers.", "blocks."), ("model.norm.", "norm."), ("lm_head.", "head."),
    ("input_layernorm.", "attn_norm."), ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.", "attn."), ("mlp.", "ffn."), ("_proj.", "."),
)  # fmt: skip
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

# what a file need not say, because it is what transformers takes for a Llama
_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "rope_parameters": None, "rope_scaling": None,
    "tie_word_embeddings": False, "eos_token_id": None,
}  # fmt: skip
# the only value that a `GPT` can honour
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# changes no logit: who made the file, how it was trained, and how transformers samples or stores
_HARMLESS = {
    "architectures", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype",
    "use_cache", "pretraining_tp", "initializer_range", "attention_dropout", "bos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "is_llama_config", "transformers.js_config",
    "_attn_implementation_autoset", "tokenizer_class", "use_return_dict", "task_specific_params",
}  # fmt: skip


def read_config(found: dict[str, Any], name: str) -> tuple[GPTConfig, tuple[int, ...]]:
    """The shape that a Llama's config.json describes, and the tokens that end a text.

    Args:
        found: what the file says.
        name: for the message.
    Raises:
        BadInput: a key or a value that `GPT` does not have; also one that this function has never heard of.
    """
    from llmcourse.model import GPTConfig

    plain = "GPT reads plain Llama checkpoints"
    for key, allowed in _FIXED.items():
        require(found.get(key, allowed) == allowed, f"{key} of {name!r}", found.get(key), f"{allowed!r} ({plain})")
    require("model_type" in found, f"model_type of {name!r}", None, f"'llama' ({plain})")
    for key, value in found.items():
        if key not in _FIXED and key not in _DEFAULTS and key not in _HARMLESS:
            known = value is None or value is False  # a feature that is switched off
            require(known, f"{key} of {name!r}", value, f"no such key, or null or false: {plain}")
    c = _DEFAULTS | {k: v for k, v in found.items() if v is not None}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        whole(f"{key} of {name!r}", c[key], 1)
    config = GPTConfig(
        vocab_size=c["vocab_size"],
        d_model=c["hidden_size"],
        n_layers=c["num_hidden_layers"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        d_ff=c["intermediate_size"],
        context=c["max_position_embeddings"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=_rope_theta(c, name),
        tied=bool(c["tie_word_embeddings"]),
    )
    width = f"{config.head_dim}, hidden_size / num_attention_heads"
    require(c["head_dim"] in (None, config.head_dim), f"head_dim of {name!r}", c["head_dim"], width)
    eos = c["eos_token_id"]
    stop = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return config, tuple(whole(f"eos_token_id of {name!r}", t, 0) for t in stop)


def _rope_theta(c: dict[str, Any], name: str) -> float:
    """The base of the plain rotation; any scaling of the positions is refused, under its old and its new name."""
    theta = c["rope_theta"]
    for key in ("rope_parameters", "rope_scaling"):
        rope = c[key] or {}
        require(isinstance(rope, dict), f"{key} of {name!r}", rope, "a mapping, or null")
        for part, value in rope.items():
            if part == "rope_theta":
                theta = value
            else:
                plain = part in ("rope_type", "type") and value == "default"
                require(plain, f"{key}.{part} of {name!r}", value, "rope_type 'default', without scaling")
    return float(theta) if isinstance(theta, int) else theta


def read_weights(folder: Path, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, under the names that `GPT` uses.

    Tables of rotary frequencies, which old files hold, are left out: they follow from the config.json.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = {}
    for file in weight_files(folder):
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as e:
            raise BadInput(f"{file.name} of {str(folder)!r} cannot be read ({e}); allowed: a whole file.") from None
        for key, value in found.items():
            for theirs, ours in _NAMES:
                key = key.replace(theirs, ours)
            if not key.endswith("rotary_emb.inv_freq"):
                weights[key] = value.to(device=device, dtype=dtype)
    return weights


def check_llama(config: GPTConfig) -> None:
    """Refuse a shape that the Llama architecture does not have (BadInput): it could not be written."""
    shape = {"norm": "rms", "norm_position": "pre", "ffn": "swiglu", "position": "rope", "causal": True, "n_experts": 0}
    for name, allowed in shape.items():
        value = getattr(config, name)
        require(value == allowed, name, value, f"{allowed!r}, to be saved as a Llama checkpoint")


def llama_config(model: GPT) -> dict[str, Any]:
    """The config.json of a `GPT` of Llama's shape, as transformers reads it."""
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_theta": c.rope_theta,  # where releases before transformers 5 look
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": c.init_std,
        # said also when there is none: a reader that misses them takes 1 and 2, which are other tokens here
        "bos_token_id": None,
        "eos_token_id": None if not model.stop else model.stop[0] if len(model.stop) == 1 else list(model.stop),
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }


def write_llama(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `GPT.from_pretrained` and transformers read.

    Raises:
        BadInput: a shape that the Llama architecture does not have; nothing is written then.
    """
    from safetensors.torch import save_file

    c, folder = model.config, Path(folder)
    check_llama(c)
    weights = {their_name(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if c.tied:
        del weights["lm_head.weight"]  # the embedding's, and stored once
    config = llama_config(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def their_name(key: str) -> str:
    """transformers' name of one of our weights."""
    key = key.replace(".attn.", ".self_attn.").replace(".ffn.", ".mlp.")
    for part in _PROJECTIONS:
        key = key.replace(f".{part}.weight", f".{part}_proj.weight")
    for theirs, ours in _NAMES[:4]:
        if key.startswith(ours):
            key = theirs + key.removeprefix(ours)
    return key.replace(".attn_norm.", ".input_layernorm.").replace(".ffn_norm.", ".post_attention_layernorm.")


class LlamaFiles:
    """What a `GPT` inherits: its files, and the names by which code written for transformers asks for its parts."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain Llama checkpoint, as `write_llama` does."""
        write_llama(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, rt: Runtime | None = None, settings: Settings | None = None) -> GPT:
        """A Llama-style checkpoint, read from its safetensors files, in evaluation mode.

        Args:
            name: a model of the catalog (`llmcourse data`), or a folder with a config.json and *.safetensors.
            rt: where the model goes and its number format; by default what the settings say.
        Raises:
            BadInput: an unknown name, a model that is not prepared, an architecture that `GPT` does not have, or
                weights that do not fit the configuration.
        """
        from llmcourse.runtime import Runtime

        settings = settings or load_settings()
        rt = Runtime.of(rt, settings=settings)
        folder = locate_model(name, settings)
        require(folder is not None, "model", str(name), "a model of the catalog, or a folder")
        config, stop = read_config(check_model_folder(folder), str(name))
        weights = read_weights(folder, device=rt.device, dtype=rt.dtype)
        if config.tied and "embed.weight" in weights:
            weights["head.weight"] = weights["embed.weight"]
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(config)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            why = " ".join(str(e).split())[:200]
            raise BadInput(
                f"model {str(name)!r} has weights that do not fit its config.json ({why}); "
                "allowed: a plain Llama checkpoint."
            ) from e
        if config.tied:
            model.head.weight = model.embed.weight  # loading made two parameters of one tensor
        model.stop = stop
        return model.eval()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The embedding."""
        return self.embed

    def compression_blocks(self) -> torch.nn.ModuleList:
        """The repeated blocks, for code that treats a model block by block."""
        return self.blocks
