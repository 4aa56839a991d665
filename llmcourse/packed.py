"""Packed storage: layers that keep their weights in a few bits, and folders that load back as what was saved.

Hand-written: the lesson (what a packed byte is) is in the quantization chapter; this is the machine around it.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcourse.compression import FakeQuant, QParams
from llmcourse.quantization import pack, unpack
from llmcourse.settings import BadInput, require, whole

__all__ = [
    "LoadedPacked",
    "PackedEmbedding",
    "PackedHead",
    "PackedLinear",
    "dequantize_model",
    "load_packed",
    "pack_model",
    "save_packed",
    "stored_bytes",
]


class _Packed(nn.Module):
    """Packed codes (R, bytes), scales (S, G) float16 and zero points (S, bytes); what both packed layers share."""

    def __init__(self, rows: int, columns: int, *, bits: int, group_size: int, symmetric: bool, scale_rows: int):
        super().__init__()
        whole("bits", bits, 2, 8)
        require(scale_rows in (1, rows), "scale_rows", scale_rows, f"1 or {rows}")
        self.rows, self.columns, self.bits, self.symmetric = rows, columns, bits, symmetric
        require(
            columns % whole("group_size", group_size, 1) == 0,
            "group_size",
            group_size,
            f"a divisor of the {columns} columns",
        )
        self.group_size, self.scale_rows = group_size, scale_rows
        groups = columns // self.group_size
        self.register_buffer("codes", torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(scale_rows, groups, dtype=torch.float16))
        self.register_buffer(
            "zero", None if symmetric else torch.empty(scale_rows, -(-groups * bits // 8), dtype=torch.uint8)
        )
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

    def _fill(self, W: Tensor, qparams: QParams) -> None:
        scale = qparams.scale.to(torch.float16)
        require(
            torch.equal(scale.to(qparams.scale.dtype), qparams.scale),
            "scale",
            "not exact in float16",
            "a grid made with scale_dtype=torch.float16",
        )
        self.codes, self.scale = pack(qparams.quantize(W.to(qparams.scale.dtype)), self.bits), scale
        if not self.symmetric:
            self.zero = pack(qparams.zero.to(torch.uint8), self.bits)
        self.like = torch.empty(0, dtype=W.dtype, device=W.device)

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
        """The weights (R, I) in float32; equal, to the last bit, to what fake quantization computes."""
        return self._values(self.codes, self.scale, self._zero_points())

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
        return {
            "kind": type(self).__name__,
            "rows": self.rows,
            "columns": self.columns,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_rows": self.scale_rows,
            "bias": getattr(self, "bias", None) is not None,
        }

    def extra_repr(self) -> str:
        size = f"{self.rows}, {self.columns}, bits={self.bits}, group_size={self.group_size}"
        return f"{size}, symmetric={self.symmetric}, nbytes={self.nbytes}"


class PackedLinear(_Packed):
    """A linear layer with packed weights: y = x Wᵀ + b, W made anew in each forward in the format of x.

    Args:
        rows, columns: O and I of the weight (O, I).
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        scale_rows: int,
        bias: bool = False,
    ):
        super().__init__(rows, columns, bits=bits, group_size=group_size, symmetric=symmetric, scale_rows=scale_rows)
        self.in_features, self.out_features, self.linear_shape = columns, rows, (rows, columns)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    @classmethod
    def from_weight(cls, W: Tensor, qparams: QParams, bias: Tensor | None = None) -> PackedLinear:
        """Pack W (O, I) on its grid."""
        layer = cls(
            *W.shape,
            bits=qparams.bits,
            group_size=qparams.group_size,
            symmetric=qparams.symmetric,
            scale_rows=qparams.scale.shape[0],
            bias=bias is not None,
        )
        layer._fill(W, qparams)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class PackedEmbedding(_Packed):
    """An embedding with packed rows; only the rows that are asked for are unpacked."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        scale_rows: int,
        bias: bool = False,
    ):
        super().__init__(rows, columns, bits=bits, group_size=group_size, symmetric=symmetric, scale_rows=scale_rows)
        self.num_embeddings, self.embedding_dim = rows, columns

    @classmethod
    def from_weight(cls, W: Tensor, qparams: QParams) -> PackedEmbedding:
        """Pack W (V, D) on its grid."""
        layer = cls(
            *W.shape,
            bits=qparams.bits,
            group_size=qparams.group_size,
            symmetric=qparams.symmetric,
            scale_rows=qparams.scale.shape[0],
        )
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
        return F.linear(x, self.source[0].dequantized().to(x.dtype))


def _raw_weight(module: nn.Module) -> Tensor | None:
    """The stored parameter behind `module.weight`, also under parametrizations."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations["weight"].original
    return module._parameters.get("weight")


def _fake_quant_params(model: nn.Module) -> dict[int, QParams]:
    """id of a raw weight → the grid of its FakeQuant."""
    qparams_by_id = {}
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            for step in module.parametrizations["weight"]:
                if isinstance(step, FakeQuant):
                    qparams_by_id[id(_raw_weight(module))] = step.qparams
    return qparams_by_id


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def pack_model(model: nn.Module) -> nn.Module:
    """A copy of the model in which every fake-quantized layer keeps its weights packed. The outputs are the same.

    Raises:
        BadInput: nothing is fake-quantized, or a quantized weight belongs to a module that is no linear or embedding.
    """
    packed = copy.deepcopy(model)
    qparams_by_id = _fake_quant_params(packed)
    require(
        len(qparams_by_id) > 0,
        "model",
        type(model).__name__,
        "a model in which at least one weight is fake-quantized (run RTN or GPTQ first)",
    )
    users: dict[int, list[tuple[str, nn.Module]]] = {key: [] for key in qparams_by_id}
    for name, module in packed.named_modules():
        if (raw := _raw_weight(module)) is not None and id(raw) in qparams_by_id:
            users[id(raw)].append((name, module))
    for key, found in users.items():
        found.sort(
            key=lambda item: not isinstance(item[1], nn.Embedding)
        )  # the embedding first: the others refer to it
        owner = None
        for name, module in found:
            bias = getattr(module, "bias", None)
            if isinstance(module, nn.Embedding) and owner is None:
                owner = new = PackedEmbedding.from_weight(module.weight, qparams_by_id[key])
            elif isinstance(module, nn.Linear) and len(found) == 1:
                new = PackedLinear.from_weight(module.weight, qparams_by_id[key], bias)
            else:
                tied = isinstance(module, nn.Linear) and isinstance(owner, PackedEmbedding) and bias is None
                require(
                    tied,
                    f"quantized layer {name}",
                    type(module).__name__,
                    "a linear layer, an embedding, or an embedding tied to an output layer without bias",
                )
                new = PackedHead(owner)
            new.train(module.training)
            _replace(packed, name, new)
    return packed


_PARTS = ("codes", "scales", "zero points", "embedding", "dense linears", "other")


def _stored(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name of each stored tensor → (its part, the tensor); a tensor with two names appears under the first."""
    out, seen = {}, set()
    for prefix, module in model.named_modules(remove_duplicate=True):
        own = {
            **module._parameters,
            **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for key, tensor in own.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, (PackedEmbedding, nn.Embedding)):
                part = "embedding"
            elif isinstance(module, PackedLinear) and key in ("codes", "scale", "zero"):
                part = {"codes": "codes", "scale": "scales", "zero": "zero points"}[key]
            else:
                part = "dense linears" if isinstance(module, nn.Linear) else "other"
            out[f"{prefix}.{key}" if prefix else key] = (part, tensor)
    return out


def _is_packed_buffer(model: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return isinstance(model.get_submodule(owner), _Packed) and key in ("codes", "scale", "zero")


def stored_bytes(model: nn.Module, rest_dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of the parameters and stored buffers of a model, by part, and their `total`.

    Args:
        model: dense or packed.
        rest_dtype: count floating-point tensors outside the packed ones as if they were stored in this format.
    """
    sizes = dict.fromkeys(_PARTS, 0)
    for name, (part, tensor) in _stored(model).items():
        convert = rest_dtype is not None and tensor.is_floating_point() and not _is_packed_buffer(model, name)
        sizes[part] += tensor.numel() * rest_dtype.itemsize if convert else tensor.nbytes
    return {**sizes, "total": sum(sizes.values())}


_METHOD, _VERSION, _WEIGHTS = "llmcourse", 1, "packed.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: a reader never sees a part of a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_packed(
    model: nn.Module, tokenizer: Any, folder: str | Path, *, rest_dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Write a packed `transformers` model as a folder that `load_packed` reads.

    Args:
        model: from `pack_model`, or still fake-quantized (then it is packed here).
        tokenizer: saved beside it; None for none.
        folder: made if it is not there.
        rest_dtype: the format of what is not quantized.
    Returns:
        The bytes of all tensors in the file, by part, as `stored_bytes`. The file itself has a header on top.
    """
    from safetensors.torch import save_file

    require(
        rest_dtype in (torch.float32, torch.bfloat16, torch.float16),
        "rest_dtype",
        rest_dtype,
        "torch.float32, torch.bfloat16, torch.float16",
    )
    require(
        hasattr(getattr(model, "config", None), "to_json_string"),
        "model",
        type(model).__name__,
        "a transformers model (its config is stored with it)",
    )
    if _fake_quant_params(model):
        model = pack_model(model)
    layers = {name: module.layout() for name, module in model.named_modules() if isinstance(module, _Packed)}
    require(len(layers) > 0, "model", type(model).__name__, "a model with at least one packed or fake-quantized layer")
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, PackedHead):
            layers[name] = {"kind": "PackedHead", "of": names[id(module.source[0])]}
    tensors = {}
    for name, (_, tensor) in _stored(model).items():
        convert = tensor.is_floating_point() and not _is_packed_buffer(model, name)
        tensors[name] = tensor.detach().to("cpu", rest_dtype if convert else tensor.dtype).contiguous()
    # json.loads(to_json_string()) and not to_dict(): the latter holds objects that JSON cannot write
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {
        "quant_method": _METHOD,
        "version": _VERSION,
        "rest_dtype": str(rest_dtype).removeprefix("torch."),
        "layers": layers,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / _WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    # last, so that a folder with a config.json is complete
    _write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1), encoding="utf8"))
    return stored_bytes(model, rest_dtype)


class _NoInit(torch.overrides.TorchFunctionMode):
    """Inside this context, filling a tensor with random numbers does nothing."""

    _SKIPPED = (
        Tensor.normal_,
        Tensor.uniform_,
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.kaiming_uniform_,
        nn.init.trunc_normal_,
        nn.init.xavier_uniform_,
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class LoadedPacked(NamedTuple):
    """A model from `load_packed`, and its tokenizer (None if the folder has none)."""

    model: nn.Module
    tokenizer: Any


def _read_packed_config(folder: Path) -> dict[str, Any]:
    """The configuration of a packed folder, or the reason why it is none."""
    if folder.suffix in _PICKLES or (folder.is_dir() and not (folder / _WEIGHTS).is_file()):
        pickles = [folder] if folder.suffix in _PICKLES else sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
        require(
            not pickles,
            "model file",
            pickles[0].name if pickles else "",
            f"{_WEIGHTS}; a pickle can run any program when it is opened, so it is not read",
        )
    require(folder.is_dir(), "folder", str(folder), "a folder written by save_packed")
    for name in ("config.json", _WEIGHTS):
        require((folder / name).is_file(), "folder", str(folder), f"a folder with {name}, which is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except ValueError as e:
        raise BadInput(
            f"config.json in {str(folder)!r} is not JSON ({e}); allowed: a folder written by save_packed."
        ) from None
    about = config.get("quantization_config") if isinstance(config, dict) else None
    require(isinstance(about, dict), "quantization_config", about, "an entry in config.json, as save_packed writes it")
    require(about.get("quant_method") == _METHOD, "quant_method", about.get("quant_method"), repr(_METHOD))
    require(about.get("version") == _VERSION, "quantization_config version", about.get("version"), str(_VERSION))
    return config


@torch.no_grad()
def load_packed(folder: str | Path, *, dtype: torch.dtype = torch.float32, dequantize: bool = False) -> LoadedPacked:
    """Read a folder written by `save_packed`.

    Args:
        dtype: format of what is not packed, and so of the computation.
        dequantize: make ordinary dense layers with the same weights: faster, and as large as before.
    Raises:
        BadInput: a pickle, a missing, cut or foreign file, or tensors that do not fit the configuration.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_packed_config(folder)
    about = config.pop("quantization_config")
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as e:
        raise BadInput(
            f"{_WEIGHTS} in {str(folder)!r} cannot be read ({e}); allowed: a complete file, so copy or make it again."
        ) from None
    with _NoInit():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=dtype)
    layouts = sorted(
        about["layers"].items(), key=lambda item: item[1]["kind"] == "PackedHead"
    )  # heads after what they refer to
    for name, layout in layouts:
        layout = dict(layout)
        kind = layout.pop("kind")
        require(
            kind in ("PackedLinear", "PackedEmbedding", "PackedHead"),
            f"kind of {name}",
            kind,
            "PackedLinear, PackedEmbedding, PackedHead",
        )
        new = (
            PackedHead(model.get_submodule(layout["of"]))
            if kind == "PackedHead"
            else {"PackedLinear": PackedLinear, "PackedEmbedding": PackedEmbedding}[kind](**layout)
        )
        _replace(model, name, new)
    stored = {name: tensor for name, (_, tensor) in _stored(model).items()}
    odd = sorted(stored.keys() ^ tensors.keys())
    require(
        not odd,
        f"tensors in {_WEIGHTS}",
        f"{len(tensors)}, and {odd[0]!r} has no partner" if odd else "",
        "exactly those that config.json describes",
    )
    for name, tensor in stored.items():
        require(
            tensors[name].shape == tensor.shape,
            f"shape of {name}",
            tuple(tensors[name].shape),
            f"{tuple(tensor.shape)}, as config.json says",
        )
        tensor.copy_(tensors.pop(name))
    for module in model.modules():
        if isinstance(module, _Packed):
            module.like = module.like.to(dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
    )
    model = model.eval()
    return LoadedPacked(dequantize_model(model, dtype=dtype) if dequantize else model, tokenizer)


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
        _replace(dense, name, new.train(module.training))
    return dense
