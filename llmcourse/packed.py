"""Packed storage: layers that keep their weights in a few bits, and folders that load back as what was saved.

Hand-written: the lesson (what a packed byte is) is in the quantization chapter; this is the machine around it.
`save_student` and `load_student` write and read any student: dense, masked, quantized, of other shapes, or all of it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcourse.adapters.base import is_plain_linear
from llmcourse.adapters.separate import is_separated, separate
from llmcourse.compression import (
    ActQuant,
    Codebook,
    Mask,
    QParams,
    parametrizations,
    parametrize_like,
    qparams_of,
    round_input,
)
from llmcourse.model import GPT, GPTConfig
from llmcourse.quantization import pack, pack_bits, unpack, unpack_bits
from llmcourse.rotation import Rotation, turn_input
from llmcourse.runtime import evaluating
from llmcourse.settings import BadInput, one_of, require, whole
from llmcourse.store import MANIFEST, manifest_faults, scratch_folder, write_manifest

__all__ = [
    "CodebookLinear",
    "LoadedStudent",
    "PackedEmbedding",
    "PackedHead",
    "PackedLinear",
    "dequantize_model",
    "digits_per_byte",
    "load_student",
    "pack_digits",
    "pack_model",
    "save_student",
    "stored_bytes",
    "without_kernels",
]


class _Packed(nn.Module):
    """What all packed layers share: packed codes (R, bytes), scales (S, G) float16, and the bytes that they take.

    Args:
        rows, columns: of the weight.
        row_bytes: bytes of the codes of a row.
        group_size: columns that share a scale.
        scale_rows: 1, or one for each row.
    """

    fields: ClassVar[tuple[str, ...]] = ("rows", "columns", "group_size", "scale_rows")
    loaded = 0
    """how often a state was loaded: whoever keeps something that was made of the weights can see that it is old"""

    def __init__(self, rows: int, columns: int, *, row_bytes: int, group_size: int, scale_rows: int):
        super().__init__()
        require(scale_rows in (1, rows), "scale_rows", scale_rows, f"1 or {rows}")
        self.rows, self.columns = rows, columns
        divides = columns % whole("group_size", group_size, 1) == 0
        require(divides, "group_size", group_size, f"a divisor of the {columns} columns")
        self.group_size, self.scale_rows = group_size, scale_rows
        self.register_buffer("codes", torch.empty(rows, row_bytes, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(scale_rows, columns // group_size, dtype=torch.float16))
        # Empty and not stored: remembers the floating-point format of the model around it.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def _apply(self, fn, recurse=True):
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None and name != "like"}
        old = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if self._buffers[name].dtype != dtype:  # a change of format: take the device, keep the numbers
                self._buffers[name] = old[name].to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.loaded += any(prefix + name in state_dict for name in self._buffers)

    def _fill(self, W: Tensor, qparams: QParams | Codebook) -> None:
        scale = qparams.scale.to(torch.float16)
        exact = torch.equal(scale.to(qparams.scale.dtype), qparams.scale)
        require(exact, "scale", "not exact in float16", "scales made with scale_dtype=torch.float16")
        self.codes, self.scale = self._packed(qparams.quantize(W.to(qparams.scale.dtype))), scale
        self.like = torch.empty(0, dtype=W.dtype, device=W.device)

    def _packed(self, codes: Tensor) -> Tensor:
        """Codes (R, I) uint8 → packed rows (R, bytes)."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The weights (R, I) in float32; equal, to the last bit, to what fake quantization computes."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weights, made anew at each access, in the format of the model around."""
        return self.dequantized().to(self.like.dtype)

    def passport_counts(self) -> tuple[int, int]:
        """(parameters, parameters that are not zero) that these bytes stand for."""
        bias = getattr(self, "bias", None)
        extra = (0, 0) if bias is None else (bias.numel(), int(bias.count_nonzero()))
        return self.rows * self.columns + extra[0], int(self.dequantized().count_nonzero()) + extra[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.nbytes for t in self.state_dict().values())

    def layout(self) -> dict[str, Any]:
        """What is needed to make an empty layer of this shape again."""
        bias = {"bias": True} if getattr(self, "bias", None) is not None else {}
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in self.fields}, **bias}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*self.fields, "nbytes"))


class _OnGrid(_Packed):
    """Weights on evenly spaced values: a stream of bits in each row, and zero points (S, bytes).

    Args:
        bits, symmetric: as in `QParams`.
        how: as in `_Packed`.
    """

    fields = (*_Packed.fields, "bits", "symmetric")

    def __init__(self, rows: int, columns: int, *, bits: int, symmetric: bool, **how: int):
        row_bytes = -(-columns * whole("bits", bits, 2, 8) // 8)
        super().__init__(rows, columns, row_bytes=row_bytes, **how)
        self.bits, self.symmetric = bits, symmetric
        zero_bytes = -(-self.scale.shape[1] * bits // 8)
        self.register_buffer("zero", None if symmetric else torch.empty(self.scale_rows, zero_bytes, dtype=torch.uint8))

    def _packed(self, codes: Tensor) -> Tensor:
        return pack(codes, self.bits)

    def _fill(self, W: Tensor, qparams: QParams) -> None:
        super()._fill(W, qparams)
        if not self.symmetric:
            self.zero = pack(qparams.zero.to(torch.uint8), self.bits)

    def _zero_points(self) -> Tensor:
        """Zero points (S, G) in float32."""
        if self.symmetric:
            return torch.full(self.scale.shape, float(2 ** (self.bits - 1)), device=self.scale.device)
        return unpack(self.zero, self.bits, self.scale.shape[1]).float()

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Packed rows (…, bytes) with their scales and zero points (…, G) → weights (…, I) in float32."""
        groups = unpack(codes, self.bits, self.columns).unflatten(-1, (-1, self.group_size)).float()
        return ((groups - zero[..., None]) * scale.float()[..., None]).flatten(-2)

    def dequantized(self) -> Tensor:
        return self._values(self.codes, self.scale, self._zero_points())


def digits_per_byte(levels: int) -> int:
    """How many codes fit in a byte, each with so many possible values: 8 of 2, 5 of 3, 2 of 16, 1 of 256."""
    return max(n for n in range(1, 9) if levels**n <= 256)


def pack_digits(codes: Tensor, levels: int) -> Tensor:
    """Codes (…, n) below `levels` → bytes (…, ⌈n / digits_per_byte⌉): the digits of a number, the lowest first.

    For 16 levels the bytes are those of `pack` with 4 bits, for 3 those of `pack_trits`, for 2 those of `pack_bits`.
    """
    n = digits_per_byte(levels)
    digits = F.pad(codes, (0, -codes.shape[-1] % n)).unflatten(-1, (-1, n)).int()  # (…, bytes, n)
    return (digits * levels ** torch.arange(n, device=codes.device)).sum(-1).to(torch.uint8)


class _OnTable(_Packed):
    """Weights on the values of a table: as many codes in a byte as fit, and the table (K,) float32.

    One rule for all sizes. Two values take a bit each. Three take 1.6: the 2 bits that a grid would need make the file
    a quarter larger, and buy nothing, because a byte is looked up in a table of its digits either way.

    Args:
        levels: K, 2 to 256.
        how: as in `_Packed`.
    """

    fields = (*_Packed.fields, "levels")

    def __init__(self, rows: int, columns: int, *, levels: int, **how: int):
        row_bytes = -(-columns // digits_per_byte(whole("levels", levels, 2, 256)))
        super().__init__(rows, columns, row_bytes=row_bytes, **how)
        self.levels = levels
        self.register_buffer("values", torch.empty(levels, dtype=torch.float32))

    def _packed(self, codes: Tensor) -> Tensor:
        return pack_digits(codes, self.levels)

    def _fill(self, W: Tensor, qparams: Codebook) -> None:
        super()._fill(W, qparams)
        self.values = qparams.values.float()

    def dequantized(self) -> Tensor:
        n = digits_per_byte(self.levels)
        byte = torch.arange(256, device=self.codes.device)[:, None]
        digits = byte // self.levels ** torch.arange(n, device=byte.device) % self.levels  # (256, n)
        table, codes = self.values[digits], self.codes.int()
        if n == 2:  # two float32 are fetched as one number of 8 bytes, in a third of the time
            pairs = table.view(torch.int64).flatten().index_select(0, codes.flatten())
            found = pairs.view(torch.float32).view(self.rows, -1)
        else:
            found = F.embedding(codes, table).flatten(1)  # (R, bytes, n) -> (R, bytes · n)
        groups = found[:, : self.columns].unflatten(1, (-1, self.group_size))
        return (groups * self.scale.float()[..., None]).flatten(1)

    def check(self) -> None:
        """Raise BadInput if the table is none."""
        good = bool(self.values.isfinite().all() and (self.values.diff() > 0).all())
        require(good, "table of values", self.values.tolist()[:4], f"{self.levels} finite numbers that ascend")


def _storage(q: QParams | Codebook) -> dict[str, Any]:
    own = {"bits": q.bits, "symmetric": q.symmetric} if isinstance(q, QParams) else {"levels": len(q.values)}
    return own | {"group_size": q.group_size, "scale_rows": q.scale.shape[0]}


class _Linear(_Packed):
    """A linear layer with packed weights: y = x Wᵀ + b, W made anew in each forward in the format of x.

    Args:
        rows, columns: O and I of the weight (O, I).
        storage: how the weights are stored: what `layout` returns, but for the kind.
    """

    def __init__(self, rows: int, columns: int, *, bias: bool = False, **storage: Any):
        super().__init__(rows, columns, **storage)
        self.in_features, self.out_features, self.linear_shape = columns, rows, (rows, columns)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    @classmethod
    def from_weight(cls, W: Tensor, qparams: QParams | Codebook, bias: Tensor | None = None) -> Self:
        """Pack W (O, I), which is representable with these parameters."""
        layer = cls(*W.shape, **_storage(qparams), bias=bias is not None)
        layer._fill(W, qparams)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class PackedLinear(_Linear, _OnGrid):
    """A linear layer whose weights lie on a grid (`QParams`) and are kept as its codes.

    With 4 or 8 bits, on a GPU with Triton, one kernel unpacks and multiplies where the shapes allow it
    (`kernels.product`).
    """

    def forward(self, x: Tensor) -> Tensor:
        y = _by_kernel(x, self, self.bias)
        return super().forward(x) if y is None else y


def _by_kernel(x: Tensor, layer: _OnGrid, bias: Tensor | None = None) -> Tensor | None:
    """x (…, I) times the packed weights by a Triton kernel; None where there is none for this."""
    if layer.bits not in (4, 8) or x.shape[-1] != layer.columns:
        return None
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    from llmcourse import kernels  # imports Triton, which takes longer than all of this module

    how = dict(group_size=layer.group_size, bits=layer.bits, bias=bias)
    return kernels.product(x, layer.codes, layer.scale, layer.zero, **how)


class CodebookLinear(_Linear, _OnTable):
    """A linear layer whose weights are values of a table times a scale (`Codebook`), kept as indices into it."""


class PackedEmbedding(_OnGrid):
    """An embedding with packed rows; only the rows that are asked for are unpacked."""

    def __init__(self, rows: int, columns: int, **storage: Any):
        super().__init__(rows, columns, **storage)
        self.num_embeddings, self.embedding_dim = rows, columns

    @classmethod
    def from_weight(cls, W: Tensor, qparams: QParams) -> PackedEmbedding:
        """Pack W (V, D), which is representable with these parameters."""
        layer = cls(*W.shape, **_storage(qparams))
        layer._fill(W, qparams)
        return layer

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        at = ids if self.scale_rows > 1 else torch.zeros_like(ids)
        return self._values(self.codes[ids], self.scale[at], self._zero_points()[at]).to(self.like.dtype)


class PackedHead(nn.Module):
    """The output layer of a model with tied embeddings: logits from the packed rows of the embedding."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self.source = (embedding,)  # in a tuple, so that it is not registered a second time as a part of the model
        self.in_features, self.out_features = embedding.columns, embedding.rows
        self.linear_shape = (embedding.rows, embedding.columns)

    @property
    def weight(self) -> Tensor:
        """The rows of the embedding, made anew at each access."""
        return self.source[0].weight

    def forward(self, x: Tensor) -> Tensor:
        y = _by_kernel(x, self.source[0])
        return F.linear(x, self.source[0].dequantized().to(x.dtype)) if y is None else y


def _raw_weight(module: nn.Module) -> Tensor | None:
    """The stored parameter behind `module.weight`, also under parametrizations."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations["weight"].original
    return module._parameters.get("weight")


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _quantized(model: nn.Module) -> dict[int, QParams | Codebook]:
    """id of a raw weight → the values that its layer lies on."""
    return {id(_raw_weight(m)): q for m in model.modules() if (q := qparams_of(m)) is not None}


@torch.no_grad()
def pack_model(model: nn.Module) -> nn.Module:
    """A copy of the model in which every rounded layer keeps its weights packed. The outputs are the same.

    Raises:
        BadInput: nothing is fake-quantized, or a quantized weight belongs to something that cannot be packed.
    """
    require(
        bool(_quantized(model)),
        "model",
        type(model).__name__,
        "a model in which at least one weight is fake-quantized (run RTN or GPTQ first)",
    )
    packed = copy.deepcopy(model)
    _pack_in_place(packed)
    return packed


@torch.no_grad()  # so that no layer works out which of its weights would learn
def _pack_in_place(model: nn.Module) -> None:
    quantized = _quantized(model)
    users: dict[int, list[tuple[str, nn.Module]]] = {key: [] for key in quantized}
    for name, module in model.named_modules():
        if (raw := _raw_weight(module)) is not None and id(raw) in quantized:
            users[id(raw)].append((name, module))
    for key, found in users.items():
        found.sort(key=lambda item: not isinstance(item[1], nn.Embedding))  # the embedding first: others refer to it
        owner = None
        for name, module in found:
            bias = getattr(module, "bias", None)
            table = isinstance(quantized[key], Codebook)
            if _is_plain_embedding(module) and owner is None and not table:
                owner = new = PackedEmbedding.from_weight(module.weight, quantized[key])
            elif is_plain_linear(module) and len(found) == 1:
                kind = CodebookLinear if table else PackedLinear
                new = kind.from_weight(module.weight, quantized[key], bias)
            else:
                tied = is_plain_linear(module) and isinstance(owner, PackedEmbedding) and bias is None
                allowed = "nn.Linear, or on a grid nn.Embedding, also one tied to an output layer without bias"
                require(tied, f"quantized layer {name}", type(module).__name__, allowed)
                new = PackedHead(owner)
            _read_as(new, module)
            _replace(model, name, new.train(module.training))


def _read_as(new: nn.Module, old: nn.Module) -> None:
    """Let a layer turn and round its input as the one does in whose place it comes."""
    if (turn := getattr(old, "input_rotation", None)) is not None:
        turn_input(new, turn)
    if (act := getattr(old, "input_quant", None)) is not None:
        round_input(new, act)


def _is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module looks up rows and does nothing else (Gemma's embedding also scales them)."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


# ---------------------------------------------------------------------------------------------- bytes

_PARTS = ("codes", "scales", "zero points", "masks", "embedding", "dense linears", "other")
# a table of values is counted with the scales that it is multiplied by
_PACKED_BUFFERS = {"codes": "codes", "scale": "scales", "values": "scales", "zero": "zero points"}


def _stored(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name of each stored tensor → (its part, the tensor); a tensor with two names appears under the first."""
    out, seen = {}, set()
    for prefix, module in model.named_modules():
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, (PackedEmbedding, nn.Embedding)):
                part = "embedding"
            elif isinstance(module, _Linear) and key in _PACKED_BUFFERS:
                part = _PACKED_BUFFERS[key]
            elif isinstance(module, Mask):
                part = "masks"
            else:
                linear = isinstance(module, (nn.Linear, parametrize.ParametrizationList))
                part = "dense linears" if linear else "other"
            out[f"{prefix}.{key}" if prefix else key] = (part, tensor)
    return out


def _is_bits(owner: nn.Module, name: str) -> bool:
    """Whether a tensor has two values, and a bit of the file is enough for each: masks and random signs."""
    return isinstance(owner, Mask) or (isinstance(owner, Rotation) and name.endswith(".signs"))


def _as_stored(model: nn.Module, name: str, tensor: Tensor, rest_dtype: torch.dtype) -> Tensor:
    """The form in which a tensor is written: masks and signs as bits, what is not packed in `rest_dtype`."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if _is_bits(owner, name):
        return pack_bits((tensor.detach().cpu().flatten() > 0).to(torch.uint8), 1)
    exact = isinstance(owner, (_Packed, ActQuant, Rotation))
    return tensor.detach().to("cpu", tensor.dtype if exact or not tensor.is_floating_point() else rest_dtype)


def stored_bytes(model: nn.Module, rest_dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of the parameters and stored buffers of a model, by part, and their `total`.

    Args:
        model: dense or packed.
        rest_dtype: count them as `save_student` would write them, with this format for what is not packed.
    """
    sizes = dict.fromkeys(_PARTS, 0)
    for name, (part, tensor) in _stored(model).items():
        sizes[part] += (tensor if rest_dtype is None else _as_stored(model, name, tensor, rest_dtype)).nbytes
    return {**sizes, "total": sum(sizes.values())}


# ---------------------------------------------------------------------------------------------- folders

_METHOD, _VERSION, _WEIGHTS = "llmcourse", 3, "packed.safetensors"
_READ = (2, _VERSION)  # version 2 knows no tables of values: its folders are read as they are
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_KINDS = {kind.__name__: kind for kind in (PackedLinear, CodebookLinear, PackedEmbedding)}


class LoadedStudent(NamedTuple):
    """A model from `load_student`, and its tokenizer (None if the folder has none)."""

    model: nn.Module
    tokenizer: Any


def save_student(
    model: nn.Module, tokenizer: Any, folder: str | Path, *, rest_dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Write a model as a folder that `load_student` reads: what is quantized packed, masks as bits, the rest dense.

    The folder is read back, and compared tensor by tensor and in its logits, before it is put in its place.

    Args:
        model: a `GPT` or a causal model of transformers, as `compress` or `pack_model` return it.
        tokenizer: saved beside it; None for none.
        folder: made if it is not there; files of the same names are replaced.
        rest_dtype: the format of what is not quantized.
    Returns:
        The bytes of all tensors in the file, by part, as `stored_bytes`. The file itself has a header on top.
    Raises:
        BadInput: before anything is written, if this model could not be read back.
    """
    one_of("rest_dtype", rest_dtype, (torch.float32, torch.bfloat16, torch.float16))
    config, folder = _config_of(model), Path(folder)
    student = without_kernels(copy.deepcopy(model))
    _pack_in_place(student)
    config["quantization_config"] = _layout(student) | {"rest_dtype": str(rest_dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f".{folder.name}.saving-") as scratch:
        _write(student, tokenizer, config, scratch, rest_dtype)
        _read_back(student, scratch)
        # the manifest last: a folder whose files and manifest agree is whole
        for file in sorted(scratch.iterdir(), key=lambda f: (f.name == MANIFEST, f.name == "config.json", f.name)):
            os.replace(file, folder / file.name)
    return stored_bytes(student, rest_dtype)


def without_kernels(model: nn.Module) -> nn.Module:
    """In place: what `llmcourse.deployment.faster` has put into a model as it was before."""
    for name, module in list(model.named_modules()):
        if callable(getattr(module, "portable", None)):  # FastLinear, FastHead, FastRMSNorm
            _replace(model, name, module.portable())
    return model


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration as JSON can hold it; raises if no class would be found for it again."""
    import transformers

    kind, config = type(model).__name__, getattr(model, "config", None)
    if type(model) is GPT:
        return {"model_type": "llmcourse-gpt", **asdict(config)}
    known = hasattr(config, "to_json_string") and getattr(transformers, kind, None) is type(model)
    require(known, "model", kind, "a GPT, or a model of transformers of a class that it has by that name")
    # json.loads(to_json_string()) and not to_dict(): the latter holds objects that JSON cannot write
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [kind]}


def _layout(model: nn.Module) -> dict[str, Any]:
    """What `load_student` has to know beside the architecture."""
    names = {id(module): name for name, module in model.named_modules()}
    packed: dict[str, dict] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Packed):
            packed[name] = module.layout()
        elif isinstance(module, PackedHead):
            packed[name] = {"kind": "PackedHead", "of": names[id(module.source[0])]}
    about = {"quant_method": _METHOD, "version": _VERSION, "separated": is_separated(model)}
    turned = {n: m.input_rotation.kind for n, m in model.named_modules() if hasattr(m, "input_rotation")}
    return about | {"layers": packed, "parametrized": parametrizations(model), "turned": turned}


def _write(model: nn.Module, tokenizer: Any, config: dict, folder: Path, rest_dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    stored = {name: _as_stored(model, name, tensor, rest_dtype) for name, (_, tensor) in _stored(model).items()}
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / _WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf8")
    write_manifest(folder)


def _read_back(model: nn.Module, folder: Path) -> None:
    """Load the folder and compare: the same modules, the same tensors (as stored), the same logits."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    back = load_student(folder, dtype=like.dtype).model.to(like.device)
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    odd = kinds.items() ^ {name: type(m).__name__ for name, m in back.named_modules()}.items()
    if odd:
        name = min(n for n, _ in odd)
        raise BadInput(f"model has a module {name!r} that does not load back; allowed: what its configuration builds.")
    loaded = {name: tensor for name, (_, tensor) in _stored(back).items()}
    ids = torch.arange(8, device=like.device)[None] % model.get_input_embeddings().weight.shape[0]
    with evaluating(model, back):
        for name, (_, tensor) in _stored(model).items():
            tensor.copy_(loaded[name])  # the copy that is being saved, rounded to the format of the file
        ours, theirs = (getattr(out := m(ids, use_cache=False), "logits", out) for m in (model, back))
    close = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    require(
        close, "model", type(model).__name__, "one that computes the same after loading (a part is not in its config)"
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _NoInit(torch.overrides.TorchFunctionMode):
    """Inside this context, filling a tensor with random numbers does nothing: each would be thrown away."""

    # by name: transformers puts functions of its own in the place of those of nn.init
    _SKIPPED = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_"}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", None) in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a student's folder, or the reason why it is none."""
    if folder.suffix in _PICKLES or (folder.is_dir() and not (folder / _WEIGHTS).is_file()):
        pickles = [p for p in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())) if p.suffix in _PICKLES]
        allowed = f"{_WEIGHTS}; a pickle can run any program when it is opened, so it is not read"
        require(not pickles, "model file", pickles[0].name if pickles else "", allowed)
    require(folder.is_dir(), "folder", str(folder), "a folder written by save_student")
    for name in ("config.json", _WEIGHTS):
        require((folder / name).is_file(), "folder", str(folder), f"a folder with {name}, which is missing")
    faults = manifest_faults(folder)  # digests: once per file and change
    allowed = f"a whole one, so copy or make it again (it {faults[0]})" if faults else ""
    require(not faults, "folder", str(folder), allowed)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except ValueError as e:
        text = f"config.json in {str(folder)!r} is not JSON ({e}); allowed: a folder written by save_student."
        raise BadInput(text) from None
    about = config.get("quantization_config") if isinstance(config, dict) else None
    require(isinstance(about, dict), "quantization_config", about, "an entry in config.json, as save_student writes it")
    require(about.get("quant_method") == _METHOD, "quant_method", about.get("quant_method"), repr(_METHOD))
    one_of("quantization_config version", about.get("version"), _READ)
    return config


def _empty_model(config: dict[str, Any], about: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The architecture with packed layers, masks and rounded inputs in their places, and any numbers in them."""
    import transformers

    with _NoInit(), _default_dtype(dtype):
        if config.get("model_type") == "llmcourse-gpt":
            model = GPT(GPTConfig(**{k: v for k, v in config.items() if k != "model_type"}))
        else:
            kind = (config.get("architectures") or ["?"])[0]
            model_class = getattr(transformers, kind, None)
            known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
            require(known, "architectures", kind, "a class of transformers")
            model = model_class(transformers.AutoConfig.for_model(**config))
        if about.get("separated"):
            separate(model)
    heads_last = sorted(about["layers"].items(), key=lambda item: item[1]["kind"] == "PackedHead")
    with _default_dtype(dtype):  # a bias has the format of the model around
        for name, layout in heads_last:
            _replace(model, name, _empty_layer(model, name, dict(layout)))
    for name, kind in about.get("turned", {}).items():  # before what rounds the turned input
        try:
            layer = model.get_submodule(name)
            turn_input(layer, Rotation.empty(layer.in_features, kind))
        except AttributeError:
            raise BadInput(f"turned layer is {name!r}; allowed: the name of a linear layer of the model.") from None
        except BadInput as e:
            raise BadInput(f"turned input of {name!r}: {e}") from None
    parametrize_like(model, about["parametrized"])
    return model


def _empty_layer(model: nn.Module, name: str, layout: dict[str, Any]) -> nn.Module:
    """A layer as `layout` describes it, or the reason why there is none of that kind."""
    kind = layout.pop("kind", None)
    one_of(f"kind of {name}", kind, (*_KINDS, "PackedHead"))
    try:
        return PackedHead(model.get_submodule(layout["of"])) if kind == "PackedHead" else _KINDS[kind](**layout)
    except (TypeError, KeyError, AttributeError):  # a key too many or too few, or something that is no number
        allowed = "what save_student writes for a layer of that kind"
        raise BadInput(f"layout of {name} is {layout!r}; allowed: {allowed}.") from None
    except BadInput as e:
        raise BadInput(f"layer {name!r}: {e}") from None


@torch.no_grad()
def load_student(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, dequantize: bool = False, kernels: str = "portable"
) -> LoadedStudent:
    """Read a folder written by `save_student`.

    Args:
        dtype: format of what is not packed, and so of the computation; one of floating point.
        dequantize: make ordinary dense layers with the same weights: faster, and as large as before.
        kernels: portable (packed layers unpack themselves), int4 or auto, as in `llmcourse.deployment.faster`; what was
            chosen is in the model's `speed`. Of no effect with `dequantize`.
    Raises:
        BadInput: a pickle, a missing, changed, cut or foreign file, or tensors that do not fit the configuration.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    one_of("kernels", kernels, ("auto", "int4", "portable"))
    one_of("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    folder = Path(folder)
    config = _read_config(folder)
    about = config.pop("quantization_config")
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as e:
        text = f"{_WEIGHTS} in {str(folder)!r} cannot be read ({e}); allowed: a complete file."
        raise BadInput(text) from None
    model = _empty_model(config, about, dtype)
    stored = {name: tensor for name, (_, tensor) in _stored(model).items()}
    odd = sorted(stored.keys() ^ tensors.keys())
    partner = f"{len(tensors)}, and {odd[0]!r} has no partner" if odd else ""
    require(not odd, f"tensors in {_WEIGHTS}", partner, "exactly those that config.json describes")
    for name, tensor in stored.items():
        value, expected = tensors.pop(name), tensor.shape
        owner = model.get_submodule(name.rpartition(".")[0])
        if _is_bits(owner, name):
            bits = 8 * value.numel() >= tensor.numel() > 8 * (value.numel() - 1)
            value = unpack_bits(value, 1, tensor.numel()).view(tensor.shape) if bits else value
            value = value if isinstance(owner, Mask) or not bits else 2.0 * value - 1  # 0, 1 -> -1, 1
        fits = value.shape == expected
        require(fits, f"shape of {name}", tuple(value.shape), f"{tuple(expected)}, as config.json says")
        tensor.copy_(value)
    for name, module in model.named_modules():
        if isinstance(module, _Packed):
            module.like = module.like.to(dtype)
        if isinstance(module, _OnTable):
            try:
                module.check()
            except BadInput as e:
                raise BadInput(f"layer {name!r} in {_WEIGHTS}: {e}") from None
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    model = model.eval()
    if dequantize:
        return LoadedStudent(dequantize_model(model, dtype=dtype), tokenizer)
    if kernels != "portable":
        from llmcourse.deployment import faster_  # made of the layers of this module

        model, model.speed = faster_(model, kernels=kernels)
    return LoadedStudent(model, tokenizer)


@torch.no_grad()
def dequantize_model(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a packed model with ordinary dense layers; tied layers stay tied."""
    dense = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for name, module in list(dense.named_modules()):
        if not isinstance(module, (_Packed, PackedHead)):
            continue
        source = module.source[0] if isinstance(module, PackedHead) else module
        if id(source) not in made:
            made[id(source)] = nn.Parameter(source.dequantized().to(dtype), requires_grad=False)
        weight = made[id(source)]
        if isinstance(module, PackedEmbedding):
            new = nn.Embedding(source.rows, source.columns, device="meta")
            new.weight = weight
        else:
            new = nn.Linear(source.columns, source.rows, bias=False, device="meta")
            new.weight, new.bias = weight, getattr(module, "bias", None)
        _read_as(new, module)
        _replace(dense, name, new.train(module.training))
    return dense
