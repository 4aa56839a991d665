"""Folders that other programs load: what is written around the codes, and the proof that it reads back as it was.

Hand-written: the lesson (where each format puts a code, a scale and a zero) is in the chapter on exporting; here are
configurations, tokenizers, metadata and the checks. A folder appears under its name only after it was read back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.settings import BadInput, one_of, require
from llmcourse.store import atomic_folder, write_manifest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmcourse.export import Grid
    from llmcourse.model import GPTConfig

__all__ = ["TARGETS", "Exported", "export_folder", "export_student", "load_compressed", "load_gguf"]

# target -> packages that it needs beyond the course's own
TARGETS = {"compressed-tensors": (), "gguf": (), "onnx": ("onnx", "onnxruntime")}
_GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what reading it back has shown."""

    target: str
    folder: Path
    bytes: int
    """of all files"""
    forms: dict[str, int]
    """in which form the matrices are -> how many"""
    weight_error: float | None
    """largest difference of a weight between the student and the file, read back; None: only logits were compared"""
    logit_error: float | None
    """largest difference of a logit when another program ran the file; None: it was not run"""
    notes: tuple[str, ...]
    """what a reader should know: what was lost, and who does not read it"""

    def __str__(self) -> str:
        forms = ", ".join(f"{n} {form}" for form, n in sorted(self.forms.items()) if n)
        found = (("a weight", self.weight_error), ("a logit", self.logit_error))
        gaps = [f"largest difference of {what} {gap:.1e}" for what, gap in found if gap is not None]
        first = f"{self.target}: {self.bytes / 1e6:.2f} MB, matrices: {forms}"
        second = f"read back: {', '.join(gaps)}"
        return "\n".join((first, second, *self.notes))


def export_folder(folder: str | Path, out: str | Path, *, to: str, exact: bool = False) -> Exported:
    """Export a folder that `llmcourse compress` or `save_student` wrote; see `export_student`."""
    target = _check(out, to)
    from llmcourse.packed import load_student

    model, tokenizer = load_student(folder)
    return export_student(model, tokenizer, target, to=to, exact=exact)


def _check(out: str | Path, to: str) -> Path:
    """What can be refused before anything is loaded; returns the folder to write."""
    from llmcourse.jobs import output_path

    for package in TARGETS[one_of("to", to, TARGETS)]:
        there = importlib.util.find_spec(package) is not None
        require(there, "to", to, f"a target whose packages are there: pip install 'llmcourse[export]' brings {package}")
    path = output_path(out)
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(empty, "out", str(out), "a folder that does not exist yet, or an empty one")
    return path


def export_student(model: nn.Module, tokenizer: Any, out: str | Path, *, to: str, exact: bool = False) -> Exported:
    """Write a quantized model as a folder that other programs load, and read it back.

    Args:
        model: as `compress`, `pack_model` or `load_student` return it. Not changed.
        tokenizer: written beside it; None where the target does without.
        out: a folder that does not exist yet, or an empty one. It appears when everything in it is whole.
        to: compressed-tensors (transformers, vLLM), gguf (llama.cpp, transformers) or onnx (onnxruntime).
        exact: refuse, or take more bytes, rather than lose anything (gguf: asymmetric grids become Q8_0).
    Raises:
        BadInput: before anything is written, if the target cannot hold this model; or if it did not read back.
    """
    target = _check(out, to)
    from llmcourse.export import stored_parts
    from llmcourse.modelfolder import library_errors

    parts = stored_parts(model)
    writer = {"compressed-tensors": _CompressedTensors, "gguf": _GGUF, "onnx": _ONNX}[to](
        model, parts, tokenizer, exact
    )
    with atomic_folder(target) as partial:
        writer.write(partial)
        try:
            weight_error, logit_error = writer.read_back(partial)
        except (BadInput, MemoryError):
            raise
        except Exception as e:  # of dozens of kinds, by the program that reads
            raise library_errors(f"what was written for {to}", e) from e
        write_manifest(partial)
        size = sum(f.stat().st_size for f in partial.iterdir())
    return Exported(to, target, size, dict(writer.forms), weight_error, logit_error, tuple(writer.notes))


class _Target:
    """One export: `check` refuses, `write` fills a folder, `read_back` compares it with the student."""

    def __init__(self, model: nn.Module, parts: dict[str, Grid | Tensor], tokenizer: Any, exact: bool):
        from llmcourse.packed import PackedEmbedding, PackedLinear

        self.model, self.parts, self.tokenizer, self.exact = model, parts, tokenizer, exact
        self.forms: Counter[str] = Counter()
        self.notes: list[str] = []
        kinds = (PackedLinear, PackedEmbedding)
        tables = sum(hasattr(m, "dequantized") and not isinstance(m, kinds) for m in model.modules())
        if tables:
            self.notes.append(f"{tables} of the matrices on a table of values, which the format does not hold: dense")
        self.check()

    def _named(self, name: str, what: Any, *args: Any, **options: Any) -> Any:
        """`what(…)`, whose complaint is preceded by the name of the tensor."""
        try:
            return what(*args, **options)
        except BadInput as e:
            raise BadInput(f"{name} cannot be held by {self.name}: {e}") from None

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Some tokens (1, T), and what the student answers: (1, T, V) in float32."""
        import torch

        from llmcourse.compression import qparams_of
        from llmcourse.modelfolder import positions_of
        from llmcourse.packed import dequantize_model, pack_model
        from llmcourse.runtime import evaluating

        rounded = any(qparams_of(m) is not None for m in self.model.modules())
        dense = dequantize_model(pack_model(self.model) if rounded else self.model).float().cpu()
        vocabulary = dense.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(min(16, positions_of(dense) or 16))[None] * 7919) % vocabulary
        with evaluating(dense), torch.no_grad():
            return ids, getattr(out := dense(ids, use_cache=False), "logits", out)

    def _compare(self, ours: Tensor, theirs: Tensor, share: float) -> float:
        """The largest difference of a logit; refuses one above `share` of the largest logit."""
        gap = float((ours - theirs.float()).abs().max())
        allowed = f"at most {share:g} of the largest logit: nothing was kept"
        require(gap <= share * float(ours.abs().max()), f"difference of a logit, {self.name}", gap, allowed)
        return gap


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration by which transformers builds the same architecture."""
    from llmcourse.llama import check_llama, llama_config
    from llmcourse.model import GPT

    if isinstance(model, GPT):
        check_llama(model.config)
        return llama_config(model)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    return config | {"architectures": [type(model).__name__]}


def _plain_llama(model: nn.Module, parts: dict[str, Grid | Tensor], target: str) -> tuple[GPTConfig, dict[str, Any]]:
    """The shape of a plain Llama and its config.json; refuses every other architecture, and one with a part too few."""
    import torch

    from llmcourse.llama import read_config, their_name
    from llmcourse.model import GPT

    try:
        config = _config_of(model)
        shape = read_config(config, type(model).__name__)[0]
    except BadInput as e:
        raise BadInput(f"{target} is written for plain Llamas only: {e}") from None
    with torch.device("meta"):
        names = {their_name(key) for key in GPT(shape).state_dict()}
    if shape.tied:
        names.discard("lm_head.weight")
    odd = sorted(names ^ parts.keys())
    require(not odd, "tensors of the model", odd[:3], f"those of a Llama, {len(names)} in all")
    return shape, config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines and bars that the libraries print while they write and read."""
    import transformers

    level, logs = transformers.utils.logging.get_verbosity(), logging.getLogger("gguf")
    bars, before = transformers.utils.logging.is_progress_bar_enabled(), logs.level
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        logs.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def load_compressed(folder: str | Path) -> nn.Module:
    """A folder in the form of compressed-tensors, as transformers loads it: float32, on the processor."""
    import torch
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf8"))
    groups = config["quantization_config"]["config_groups"].values()
    how = {}
    if not all(g["weights"]["symmetric"] for g in groups):
        how["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    auto = transformers.AutoModelForCausalLM
    with _quiet(), torch.no_grad():
        model = auto.from_pretrained(folder, dtype=torch.float32, **how).eval()
        model(torch.zeros(1, 1, dtype=torch.long))  # the weights are unpacked in the first call
        return model


def load_gguf(folder: str | Path) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a folder with model.gguf, as transformers loads them: dense, float32.

    The tokenizer is None with transformers 5.17, which takes the token that begins a text for the one that ends it, and
    fails where the file names none; 5.18 does neither.
    """
    import torch
    import transformers

    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    with _quiet():
        how = {"gguf_file": _GGUF_FILE}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        tokenizer = None if release < (5, 18) else transformers.AutoTokenizer.from_pretrained(folder, **how)
        return model.eval(), tokenizer


def _weight(part: Grid | Tensor) -> Tensor:
    from llmcourse.export import Grid

    return part.weight() if isinstance(part, Grid) else part.detach().float().cpu()


def _gap(back: Tensor, part: Grid | Tensor) -> float:
    """Largest difference of a weight; infinite where one is not a number, which no comparison would find."""
    gap = float((back - _weight(part)).abs().max())
    return gap if math.isfinite(gap) else math.inf


# ---------------------------------------------------------------------------------------------- compressed-tensors


class _CompressedTensors(_Target):
    name = "compressed-tensors"

    def check(self) -> None:
        from torch import nn

        from llmcourse.adapters.separate import is_separated
        from llmcourse.export import Grid, ct_matrix
        from llmcourse.packed import PackedEmbedding

        allowed = "one whose layers have names of their own in transformers"
        taken = "one whose layers had to be taken apart (experts in one tensor, the layers of GPT-2)"
        require(not is_separated(self.model), "model", taken, allowed)
        self.config = _config_of(self.model)
        modules = list(self.model.named_modules())
        names = {name for name, m in modules if isinstance(m, nn.Linear) or hasattr(m, "linear_shape")}
        self.linears = sorted(_their(self.model, names))
        tables = {name for name, m in modules if isinstance(m, (nn.Embedding, PackedEmbedding))}
        self.tables = {f"{name}.weight" for name in _their(self.model, tables)}
        self.tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if isinstance(part, Grid) and name not in self.tables:
                found = self._named(name, ct_matrix, part)
                self.tensors |= {f"{name.removesuffix('weight')}{key}": t for key, t in found.items()}
                self.forms[f"int{part.bits}"] += 1
                continue
            self.tensors[name] = _weight(part) if isinstance(part, Grid) else part.detach().cpu()
            self.forms["dense"] += self.tensors[name].dim() == 2
        if any(isinstance(self.parts.get(name), Grid) for name in self.tables):
            self.notes.append("the embedding's rows lie on their grid as float32: the form is for linear layers only")
        if any(isinstance(p, Grid) and not p.symmetric for p in self.parts.values()):
            self.notes.append(
                "zero points: transformers reads them with CompressedTensorsConfig(dequantize=True); without it the "
                "package compressed-tensors stops with an error from 0.18 on"
            )

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        from llmcourse.export import ct_config

        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config | {"quantization_config": ct_config(self.parts, self.linears), "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(folder)

    def read_back(self, folder: Path) -> tuple[float, float | None]:
        import torch
        from safetensors.torch import load_file

        from llmcourse.export import Grid, unwords

        found, worst = load_file(folder / "model.safetensors"), 0.0
        for name, part in self.parts.items():
            stem = name.removesuffix("weight")
            if f"{stem}weight_packed" in found:
                rows, columns = found[f"{stem}weight_shape"].tolist()
                codes = unwords(found[f"{stem}weight_packed"], part.bits, columns)
                zero, scale = part.zero, found[f"{stem}weight_scale"].float()
                if (packed := found.get(f"{stem}weight_zero_point")) is not None:
                    zero = unwords(packed.T, part.bits, rows).T.float()
                back = Grid(codes, scale, zero, part.bits, part.symmetric).weight()
            else:
                back = found[name].float()
            worst = max(worst, _gap(back, part))
        require(worst == 0, "difference of a weight, compressed-tensors", worst, "0: nothing was kept")
        if importlib.util.find_spec("compressed_tensors") is None:
            self.notes.append("not loaded with transformers: that takes the package compressed-tensors")
            return worst, None
        ids, ours = self._logits()
        with torch.no_grad():
            return worst, self._compare(ours, load_compressed(folder)(ids).logits, 1e-5)


def _their(model: nn.Module, names: set[str]) -> list[str]:
    """Names of modules as transformers has them."""
    from llmcourse.llama import their_name
    from llmcourse.model import GPT

    return [their_name(f"{n}.weight").removesuffix(".weight") if isinstance(model, GPT) else n for n in names]


# ---------------------------------------------------------------------------------------------- GGUF


class _GGUF(_Target):
    name = "gguf"

    def check(self) -> None:
        from llmcourse.export import Grid, gguf_name, gguf_type, interleaved

        self.shape, self.config = _plain_llama(self.model, self.parts, self.name)
        self.words = _byte_level(self.tokenizer, self.shape.vocab_size)
        eos = self.config.get("eos_token_id")
        self.ends = eos if isinstance(eos, list) else [self.tokenizer.eos_token_id if eos is None else eos]
        self.around = _around(self.tokenizer, self.ends[0])
        if len(self.ends) > 1:
            self.notes.append(f"the file names one end of a text, token {self.ends[0]}, and the model {self.ends}")
        self.tensors: dict[str, tuple[Grid | Tensor, str]] = {}
        for name, part in self.parts.items():
            kind = self._named(name, gguf_type, part, exact=self.exact) if isinstance(part, Grid) else "dense"
            self.forms[kind] += kind != "dense" or part.dim() == 2
            heads = {"q_proj": self.shape.n_heads, "k_proj": self.shape.n_kv_heads}.get(name.split(".")[-2])
            self.tensors[gguf_name(name)] = (interleaved(part, heads) if heads else part), kind
        if self.forms["Q4_1"]:
            self.notes.append("Q4_1 keeps minimum = -zero * scale as float16: the weights are rounded once more")

    def write(self, folder: Path) -> None:
        import gguf

        from llmcourse.export import gguf_blocks

        with _quiet():
            writer = gguf.GGUFWriter(folder / _GGUF_FILE, "llama")
            self._metadata(writer)
            for name, (part, kind) in self.tensors.items():
                if kind == "dense":  # norms have to be float32; so are matrices that nobody has rounded
                    writer.add_tensor(name, part.detach().float().cpu().contiguous().numpy())
                else:
                    writer.add_tensor(name, gguf_blocks(part, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    def _metadata(self, w: Any) -> None:
        import gguf

        c, most = self.shape, max((k for k in self.forms if k != "dense"), key=self.forms.get)
        w.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        w.add_quantization_version(gguf.GGML_QUANT_VERSION)
        w.add_context_length(c.context)
        w.add_embedding_length(c.d_model)
        w.add_block_count(c.n_layers)
        w.add_feed_forward_length(c.d_ff)
        w.add_head_count(c.n_heads)
        w.add_head_count_kv(c.n_kv_heads)
        w.add_layer_norm_rms_eps(c.norm_eps)
        w.add_rope_freq_base(c.rope_theta)
        w.add_rope_dimension_count(c.head_dim)
        w.add_vocab_size(c.vocab_size)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(self.words["pre"])
        w.add_token_list(self.words["tokens"])
        w.add_token_types(self.words["types"])
        w.add_token_merges(self.words["merges"])
        w.add_add_bos_token(self.around[0])
        w.add_add_eos_token(self.around[1])
        for add, token in (
            (w.add_bos_token_id, self.tokenizer.bos_token_id),
            (w.add_eos_token_id, self.ends[0]),
            (w.add_unk_token_id, self.tokenizer.unk_token_id),
            (w.add_pad_token_id, self.tokenizer.pad_token_id),
        ):
            if token is not None:
                add(token)
        if getattr(self.tokenizer, "chat_template", None):
            w.add_chat_template(self.tokenizer.chat_template)

    def read_back(self, folder: Path) -> tuple[float, float | None]:
        import gguf
        import numpy as np
        import torch

        worst, found = 0.0, {t.name: t for t in gguf.GGUFReader(folder / _GGUF_FILE).tensors}
        odd = sorted(found.keys() ^ self.tensors.keys())
        require(not odd, "tensors of the file", odd, "exactly those of the model")
        for name, (part, _) in self.tensors.items():
            back = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
            worst = max(worst, _gap(torch.from_numpy(np.array(back)), part))
        # a minimum of at most 15 steps, rounded to 11 bits: what Q4_1 may lose of the largest weight
        largest = max(float(_weight(p).abs().max()) for p, kind in self.tensors.values())
        limit = 2**-11 * 2 * largest if self.forms["Q4_1"] else 0.0
        require(worst <= limit, "difference of a weight, gguf", worst, f"at most {limit:.2g}: nothing was kept")
        return worst, None


_PRE = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}  # how text is cut before merging -> its name
# what the file has no place for, and the value with which it is not needed
_PLAIN = {
    "ByteLevel": {"add_prefix_space": False, "use_regex": True},
    "Digits": {"individual_digits": True},
    "BPE": dict.fromkeys(("dropout", "byte_fallback", "ignore_merges"), False)
    | dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
}


def _around(tokenizer: Any, end: int | None) -> tuple[bool, bool]:
    """Whether the tokenizer puts a token before each text, and whether it puts one after it."""
    bare, full = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
    for before in (False, True):
        for after in (False, True):
            if full == [tokenizer.bos_token_id] * before + bare + [end] * after:
                return before, after
    raise BadInput(
        f"what the tokenizer puts around 'a' is {full}; allowed: {bare}, with the token that begins a text "
        f"({tokenizer.bos_token_id}) before it and the one that ends it ({end}) after it, or without."
    )


def _byte_level(tokenizer: Any, size: int) -> dict[str, Any]:
    """Tokens, their types and merges of a byte-level BPE tokenizer, `size` tokens in all."""
    allowed = "a byte-level BPE tokenizer that cuts its text as the one of GPT-2 or of SmolLM does"
    require(hasattr(tokenizer, "backend_tokenizer"), "tokenizer", type(tokenizer).__name__, allowed)
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = about.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    cuts = tuple(c.get("type") for c in steps)
    known = about["model"]["type"] == "BPE" and cuts in _PRE
    require(known, "tokenizer", f"{about['model']['type']} after {cuts}", allowed)
    require(about.get("normalizer") is None, "tokenizer", "one that normalizes its text", allowed)
    for step in (*steps, about["model"]):
        for key, value in _PLAIN[step["type"]].items():
            found = step.get(key, value)
            require((found or None) == (value or None), f"{key} of the tokenizer's {step['type']}", found, f"{value!r}")
    tokens = {token: at for token, at in about["model"]["vocab"].items()}
    added = {t["content"]: t for t in about["added_tokens"]}
    tokens |= {content: t["id"] for content, t in added.items()}
    names, types = [f"[unused {i}]" for i in range(size)], [5] * size  # 5: never used
    require(max(tokens.values()) < size, "tokens of the tokenizer", max(tokens.values()) + 1, f"at most {size}")
    for token, at in tokens.items():
        names[at] = token
        types[at] = (3 if added[token]["special"] else 4) if token in added else 1  # control, user's, normal
    merges = [m if isinstance(m, str) else " ".join(m) for m in about["model"]["merges"]]
    return {"pre": _PRE[cuts], "tokens": names, "types": types, "merges": merges}


# ---------------------------------------------------------------------------------------------- ONNX


class _ONNX(_Target):
    name = "onnx"

    def check(self) -> None:
        from llmcourse.export import Grid, onnx_block

        self.shape, self.config = _plain_llama(self.model, self.parts, self.name)
        for name, part in self.parts.items():
            if isinstance(part, Grid):
                self._named(name, onnx_block, part)
                self.forms[f"int{part.bits}"] += 1
            else:
                self.forms["dense"] += part.dim() == 2

    def write(self, folder: Path) -> None:
        from llmcourse.export import write_onnx

        write_onnx(self.parts, self.shape, folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def read_back(self, folder: Path) -> tuple[None, float]:
        from llmcourse.export import OnnxLlama

        ids, ours = self._logits()
        gap = self._compare(ours, OnnxLlama(folder, level="exact")(ids), 1e-4)
        fast = float((OnnxLlama(folder, level="fast")(ids) - ours).abs().max())
        self.notes.append(f"level fast rounds what a matrix reads to int8: largest difference of a logit {fast:.1e}")
        return None, gap
