"""Models that other people wrote: what is looked at before a weight is read, and what is asked after.

Hand-written: this is plumbing, not a lesson. Nothing in a folder is run, nothing outside it is read, and a tensor that
is missing, unexpected or of another shape is an error: transformers would fill a missing one with random numbers.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmcourse.settings import BadInput, Settings, require
from llmcourse.store import CATALOG, MANIFEST, manifest_faults, verify

__all__ = [
    "check_model_folder",
    "from_pretrained",
    "is_hub_id",
    "library_errors",
    "locate_model",
    "on_disk",
    "positions_of",
    "weight_files",
]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PACKED, SINGLE, INDEX = "packed.safetensors", "model.safetensors", "model.safetensors.index.json"


def on_disk(name: str | Path) -> Path | None:
    """The file or folder of that name, if there is one."""
    try:
        path = Path(name).expanduser()
        return path if str(name) and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, the home of nobody
        return None


def is_hub_id(name: str | Path) -> bool:
    """Whether a name has the form `owner/name`."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)))


def locate_model(name: str | Path, settings: Settings) -> Path | None:
    """Where a model lies: its folder, or None for the hub. The one place that decides what a name means.

    Raises:
        BadInput: a name that is neither in the catalog nor a folder, a model that is not prepared, or a hub id while
            offline.
    """
    name, models = str(name), [a.name for a in CATALOG.values() if a.kind == "models"]
    if name in CATALOG:
        require(name in models, "model", name, ", ".join(models))
        return Path(verify(name, settings.home))
    if (folder := on_disk(name)) is not None and folder.is_dir():
        return folder
    allowed = f"{', '.join(models)}, a folder, or a hub id owner/name"
    require(is_hub_id(name), "model", name, allowed)
    if settings.offline:
        raise BadInput(
            f"model is {name!r}, which is not in the cache nor a folder, and the course is offline; "
            f"allowed: {allowed} with LLMCOURSE_OFFLINE=false."
        )
    return None


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        raise BadInput(
            f"{path.name} of {str(path.parent)!r} is not JSON; allowed: as save_pretrained writes it."
        ) from None
    require(isinstance(value, dict), f"{path.name} of {str(path.parent)!r}", type(value).__name__, "a JSON object")
    return value


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a model folder that are read when it is loaded: one file, or the shards of its index.

    Raises:
        BadInput: there are none, a pickle, or an index that leads to something else than a *.safetensors of the folder.
    """
    folder = Path(folder)
    for name in (PACKED, SINGLE):
        if (folder / name).is_file():
            return [folder / name]
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        good = isinstance(shards, dict) and bool(shards) and all(isinstance(s, str) for s in shards.values())
        require(good, f"weight_map in {INDEX}", str(shards)[:80], "a table from names of tensors to names of files")
        for shard in sorted(set(shards.values())):
            inside = Path(shard).name == shard and "\\" not in shard and shard.endswith(".safetensors")
            require(inside, f"file in {INDEX}", shard, "the name of a *.safetensors in the same folder")
            require((folder / shard).is_file(), f"file in {INDEX}", shard, f"a file that is in {str(folder)!r}")
        return [folder / shard for shard in sorted(set(shards.values()))]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise BadInput(
            f"model folder {str(folder)!r} has its weights in {pickles[0]}, a pickle, and reading a pickle can run any "
            f"code; allowed: *.safetensors (transformers writes them with save_pretrained)."
        )
    raise BadInput(f"model folder {str(folder)!r} has no weights; allowed: {SINGLE}, or {INDEX} and its *.safetensors.")


def check_model_folder(folder: str | Path) -> dict:
    """The configuration of a model folder, after everything that can be known without reading a weight.

    Raises:
        BadInput: no configuration, no usable weights, an index that leads out of the folder, an adapter without its
            model, or a file that differs from the folder's own manifest.
    """
    folder = Path(folder)
    require(
        (folder / "config.json").is_file(), "model folder", str(folder), "a folder with a config.json and *.safetensors"
    )
    config = _json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"model folder {str(folder)!r} holds an adapter; allowed: a whole model (merge the adapter into it)."
        )
    require(
        "transformers_weights" not in config, "key in config.json", "transformers_weights", f"none: {SINGLE} is read"
    )
    weight_files(folder)
    faults = manifest_faults(folder) if (folder / MANIFEST).is_file() else []
    if faults:
        raise BadInput(
            f"model folder {str(folder)!r} {faults[0]}; allowed: a folder as it was written: copy or make it again."
        )
    return config


def library_errors(what: str, e: Exception) -> BadInput:
    """One sentence for what a library says about a model, a file or a table that it cannot use."""
    if isinstance(e, BadInput):
        return e
    said = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, KeyError):
        said = f"the key {said} is missing"
    if type(e).__name__ == "SafetensorError":  # the class cannot be imported everywhere
        return BadInput(f"{what} has a damaged safetensors file ({said[:200]}); allowed: a whole one.")
    return BadInput(f"{what} could not be loaded: {said[:300]}.")


def _refuse(what: str, kind: str, names: Iterable[Any]) -> None:
    names = sorted(str(n) for n in names)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise BadInput(
            f"{what} {kind} {names[0]}{more}; allowed: exactly the tensors that config.json describes "
            "(a missing one would be filled with random numbers)."
        )


def from_pretrained(auto: Any, source: str | Path, what: str, **options: Any) -> Any:
    """`auto.from_pretrained(source, **options)` that runs no code of the folder and reads safetensors only.

    Args:
        auto: a transformers class: of a model, a tokenizer or a configuration.
        source: a folder that passed `check_model_folder`, or a hub id.
        what: how a complaint calls it, e.g. "model 'x'".
    Raises:
        BadInput: the library cannot load it; or, of a model: tensors that are missing, too many, or of another shape.
    """
    from transformers.utils import logging

    if Path(source).is_dir():
        options["local_files_only"] = True
    is_model = "Model" in getattr(auto, "__name__", "") or hasattr(auto, "forward")
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would print is raised below
    try:
        loaded = auto.from_pretrained(source, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as e:  # dozens of kinds, by architecture
        raise library_errors(what, e) from e
    finally:
        logging.set_verbosity(before)
    if not is_model:
        return loaded
    model, info = loaded
    _refuse(what, "lacks the tensor", info["missing_keys"])
    _refuse(what, "has the unknown tensor", info["unexpected_keys"])
    _refuse(what, "has another shape of the tensor", (m[0] for m in info["mismatched_keys"]))
    return model


def positions_of(model: Any) -> int | None:
    """How many tokens a model can read at once; None where its configuration does not say.

    Args:
        model: a model, its configuration, or what is in a `config.json`.
    """
    config = getattr(model, "config", model)
    if isinstance(config, Mapping):
        config = types.SimpleNamespace(**(config.get("text_config") or config))
    if hasattr(config, "get_text_config"):  # a model of texts and pictures has one for each
        config = config.get_text_config(decoder=True)
    names = ("context", "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    known = (getattr(config, name, None) for name in names)
    return next((n for n in known if isinstance(n, int) and n > 0), None)


def kernels_said(model: Any) -> str:
    """How the weights of a model that was loaded are multiplied, as one line."""
    if (speed := getattr(model, "speed", None)) is not None:
        return "; ".join(str(speed).splitlines())
    packed = any(hasattr(m, "passport_counts") for m in model.modules())
    return "packed weights, unpacked at every step" if packed else "dense, no kernels of ours"
