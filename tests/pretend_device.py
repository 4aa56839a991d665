"""A device that is not there: tensors on it are kept on the CPU, and mixing them with tensors of the CPU is an error.

Code that forgets to move a tensor fails on a GPU and nowhere else. With this device it fails on every machine, where
CUDA would fail. It computes with the numbers of the CPU; of kernels, streams, memory and speed it says nothing. Two
faults it does not see: a generator of the device in an operation of the CPU, and a format that only `autocast` makes.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration as registration
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "pretend"
aten = torch.ops.aten
# these carry numbers from one device to another
BETWEEN = {aten._to_copy.default, aten.copy_.default}
# as on CUDA, what is indexed says where the result is; its indices may be on the CPU
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# a number of the CPU may take part in arithmetic, but is not put into one tensor with numbers of the device
JOINING = {aten.cat.default, aten.stack.default}


def is_away(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Away(Tensor):
    """A tensor that says that it is on the device; `raw` has its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> Away:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        with torch.inference_mode(False):  # a view of a tensor that is not of inference mode is none of it either
            made = Tensor._make_wrapper_subclass(cls, raw.shape, **layout, device=torch.device(NAME, 0))
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, *args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        new = _again(self.raw.detach().clone(), self.requires_grad, hasattr(self, "_is_param"))
        new.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol):
        return _again, (self.raw.detach(), self.requires_grad, hasattr(self, "_is_param"))

    def __repr__(self, **how):
        return repr(self.raw.detach())[:-1] + f", device='{NAME}:0')"

    def __format__(self, how):
        return format(self.raw.item(), how) if self.ndim == 0 else object.__format__(self, how)

    def tolist(self):
        return self.raw.tolist()

    def __getitem__(self, index):
        return super().__getitem__(_places(index))

    def __setitem__(self, index, value):
        super().__setitem__(_places(index), value)

    def new_tensor(self, data, *, device=None, dtype=None, **how):
        return torch.tensor(data, device=self.device if device is None else device, dtype=dtype or self.dtype, **how)

    def numpy(self, *args, **how):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self):  # tied weights are found by it
        return self.raw.data_ptr()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        if not isinstance(new, Away):
            raise RuntimeError("incompatible tensor type: a tensor of the CPU as the data of one on the device")
        grad, self.grad = self.grad, None
        torch.utils.swap_tensors(self, _again(new.raw, self.requires_grad, hasattr(self, "_is_param")))
        if grad is not None and (grad.shape, grad.dtype) == (self.shape, self.dtype):
            self.grad = grad


def _places(index: Any) -> Any:
    """A list among the indices as the tensor that it stands for: PyTorch makes that one where it does not ask us."""
    one = lambda i: torch.tensor(i) if isinstance(i, list) else i
    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


def _again(raw: Tensor, requires_grad: bool, is_param: bool) -> Tensor:
    new = Away(raw)
    return torch.nn.Parameter(new, requires_grad) if is_param else new.requires_grad_(requires_grad)


class Generator(torch._C.Generator):
    """A generator of the CPU that can say that it is on the device."""

    away: weakref.WeakValueDictionary[int, Generator] = weakref.WeakValueDictionary()

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls, device="cpu" if is_away(device) else device)
        if is_away(device):
            cls.away[made._cdata] = made  # an operation gets another Python object for it
        return made

    def __init__(self, device: Any = "cpu"):
        pass

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self

    @property
    def device(self):
        return torch.device(NAME, 0) if self._cdata in self.away else super().device


def compute(func, *args, **kwargs):
    """Every operation with a tensor of the device, or whose result shall be there."""
    if func._can_decompose():  # in inference mode, operations come here that are made of others
        return func.decompose(*args, **kwargs)
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    given = any(isinstance(x, Away) for x in tensors)
    to = kwargs.get("device")
    wanted = given if to is None else is_away(to)
    if given and func not in BETWEEN:
        _check_devices(func, args, tensors)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.away) != wanted:
        names = ("cpu", NAME) if wanted else (NAME, "cpu")
        raise RuntimeError("Expected a '{1}' device type for generator but found '{0}'".format(*names))
    raw_args, raw_kwargs = tree_unflatten([x.raw if isinstance(x, Away) else x for x in flat], spec)
    if to is not None:
        raw_kwargs["device"] = torch.device("cpu")
    result = func(*raw_args, **raw_kwargs)
    known = {id(x.raw if isinstance(x, Away) else x): x for x in tensors}  # what was changed in place stays itself
    wrap = lambda t: known.get(id(t), Away(t) if wanted else t)
    return tree_map_only(Tensor, wrap, result)


def _check_devices(func, args: tuple, tensors: list[Tensor]) -> None:
    """What CUDA would say to tensors of two devices."""
    here = [x for x in tensors if not isinstance(x, Away)]
    if func in INDEXING:
        if not isinstance(args[0], Away):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        here = [x for x in here if not any(x is i for i in args[1])]
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[:1])
    numbers_too = func in JOINING or (written and any(x is args[0] for x in here))
    if any(x.ndim or numbers_too for x in here):
        places = [(tuple(x.shape), str(x.device)) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {places}")


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
    """PyTorch chooses a kernel before it lets a device of ours see the tensors: this one is made of operations."""
    if not isinstance(q, Away):
        return ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, **how)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, **how)[0]


def _from_numbers(make):
    """`torch.tensor` reads numbers below the point where a device of ours is asked: made here, it is moved there."""

    @functools.wraps(make)
    def inner(*args, device=None, requires_grad=False, **how):
        if is_away(device):
            return make(*args, **how).to(device).requires_grad_(requires_grad)
        how |= {"device": device} if device is not None else {}
        how |= {"requires_grad": True} if requires_grad else {}
        return make(*args, **how)

    return inner


def _made_here(make):
    """`torch.eye` changes the size of an empty tensor, which a tensor of ours cannot: made here, it is moved there."""

    def inner(*args, device=None, **how):
        made = make(*args, device=None if is_away(device) else device, **how)
        return made.to(device) if is_away(device) else made

    return inner


class Backend(registration._DummyBackendModule):
    """What PyTorch asks of the module of a device. Its random numbers are those of the CPU."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


ATTENTION = torch.nn.functional.scaled_dot_product_attention
KERNELS = torch.library.Library("_", "IMPL")


def start() -> torch.device:
    """From now on, in this process, the device is there and the course takes it."""
    registration._setup_privateuseone_for_python_backend(NAME, Backend())
    # a dispatch mode would do as well, but only in the thread that has started it
    KERNELS.fallback(compute, "PrivateUse1")
    KERNELS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # a parameter keeps its identity when its module moves, as on a GPU: optimizers and tied weights hold on to it.
    # Between two types of tensor PyTorch can do that only by exchanging what is in them
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.nn.functional.scaled_dot_product_attention = _attention
    _device_constructors()  # it finds torch.tensor by name, once: before that is another function
    torch.tensor, torch.as_tensor = _from_numbers(torch.tensor), _from_numbers(torch.as_tensor)
    torch.eye = _made_here(torch.eye)
    torch.Generator = Generator  # PyTorch has none for a device without kernels of its own
    import llmcourse.runtime as runtime

    real, device = runtime.choose, torch.device(NAME, 0)

    def choose(name="auto", dtype="auto"):
        if name in ("auto", NAME, str(device)):
            return device, real("cpu", dtype)[1]
        return real(name, dtype)

    runtime.choose = choose
    return device
