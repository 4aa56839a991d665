"""AWQ, SmoothQuant and 8-bit inputs: scales that change no output, and what rounding costs with them."""

from __future__ import annotations

__all__ = [
    "AWQ",
    "DynamicInt8",
    "Int8Linear",
    "Scaled",
    "SmoothQuant",
    "awq_scale",
    "clip_groups",
    "quantize_tokens",
    "smooth_scale",
    "to_int8",
]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmcourse.compression import (
    AbsMax,
    ActQuant,
    Hessian,
    LayerUpdate,
    RootMeanSquare,
    SiteUpdate,
    Stat,
    chosen_sites,
    layer_error,
    qparams_of,
)

from .adapters import Adapter, Site
from .quantization import RTN, group_width, rtn
from .settings import number, one_of, require, whole


class MeanAbs(RootMeanSquare):
    """Mean magnitude of each input column: value (I,)."""

    def _of(self, x: Tensor) -> Tensor:
        return x.abs().sum(0)

    def _finish(self, total: Tensor) -> Tensor:
        return total / max(self.n, 1)


def awq_scale(mean: Tensor, alpha: float) -> Tensor:
    """mean^α, and the largest times the smallest entry is 1: (I,) -> (I,) [lin2024].

    Args:
        mean: mean magnitude of each input; below 1e-4 of the largest it counts as that much.
        alpha: 0 (no scale) to 1.
    """
    typical = (mean / mean.max().clamp_min(1e-30)).clamp_min(1e-4)
    scale = typical**alpha
    return scale / (scale.max() * scale.min()).sqrt()


def smooth_scale(largest: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|x|^α / max|w|^(1-α) of each input: (I,) [xiao2023].

    Args:
        largest: largest magnitude of each input (I,).
        weights: largest magnitude of each column (I,), over all layers that read the tensor.
        alpha: 0 leaves all difficulty with the activations, 1 moves all of it into the weights.
    """
    x, w = largest.clamp_min(1e-5), weights.clamp_min(1e-5)  # limits of the authors' code
    return (x**alpha / w ** (1 - alpha)).clamp_min(1e-5)


def clip_groups(W: Tensor, H: Tensor, *, group_size: int | str, lowest: float = 0.5, **grid: object) -> Tensor:
    """W (O, I) with the range of each group cut where that makes its part of the output better.

    Args:
        H: Hessian (I, I) of the inputs that these weights meet.
        group_size, grid: as in `rtn`.
        lowest: smallest share of the range that is tried, in steps of a twentieth.
    """
    width = group_width(group_size, W.shape[1])
    groups = W.unflatten(1, (-1, width))  # (O, G, width)
    blocks = torch.stack([H[a : a + width, a : a + width] for a in range(0, len(H), width)])
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # (O, G, 1): the range contains 0
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    best, kept = None, groups
    for share in torch.linspace(1, lowest, round(20 * (1 - lowest)) + 1).tolist():
        cut = groups.clamp(low * share, high * share)
        rounded = rtn(cut.flatten(1), group_size=group_size, **grid).weight.view_as(groups)
        delta = (rounded - groups).transpose(0, 1)  # (G, O, width)
        error = ((delta @ blocks) * delta).sum(-1).T  # (O, G)
        error = error.sum().expand_as(error) if group_size == "tensor" else error
        if best is None:
            best, kept = error, cut
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better[..., None], cut, kept)
    return kept.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Scaled(RTN):
    """A method that multiplies the columns of a site's weights before it rounds them.

    Attributes:
        where: sites that are scaled: `norms` (those that read a norm), `folded` (all where the
            division can be folded into the module before) or `all` (the rest divides its input).
    """

    where: str = "all"

    def __post_init__(self):
        super().__post_init__()
        one_of("where", self.where, ("norms", "folded", "all"))
        allowed = "false: within a block the last site has to be treated first"
        require(not self.true_sequential, "true_sequential", self.true_sequential, allowed)

    def check(self, model: nn.Module, adapter: Adapter) -> None:
        super().check(model, adapter)
        for site in (s for i in range(len(adapter.blocks())) for s in chosen_sites(self, adapter, i)):
            rounded = site.source is not None and qparams_of(site.source) is not None
            what = f"the module before {site.name}"
            require(not rounded, what, "quantized already", "one that no pass has rounded")

    def scale(self, weights: Mapping, stats: Mapping, masks: Mapping, tie: Callable) -> Tensor | None:
        """The vector (I,) of a site, or None; `tie` makes entries equal that have to be."""
        raise NotImplementedError

    def finish(self, W: Tensor, stats: Mapping, scale: Tensor, mask: Tensor | None) -> LayerUpdate:
        """Round weights (O, I) that are scaled already."""
        raise NotImplementedError

    def scales(self, site: Site) -> bool:
        """Whether this site gets a scale."""
        folded = site.source is not None
        norm = folded and not isinstance(site.source, nn.Linear)
        return {"all": True, "folded": folded, "norms": norm}[self.where]

    def solve_site(self, site: Site, weights: Mapping, stats: Mapping[type, Stat], masks: Mapping) -> SiteUpdate:
        for kind, stat in stats.items():
            finite = bool(stat.value.isfinite().all())
            require(finite, f"{kind.__name__} of the inputs", "not finite", "finite numbers")
        tie = (lambda s: s) if site.shared is None else site.shared.tie
        found = self.scale(weights, stats, masks, tie) if self.scales(site) else None
        W = next(iter(weights.values()))
        s = W.new_ones(W.shape[1]) if found is None else found.to(W)
        new = {n: self.finish(W * s, stats, s, masks[n]) for n, W in weights.items()}
        if found is None or site.source is not None:
            return SiteUpdate(new, None if found is None else s)
        for n, update in new.items():  # nothing to fold into: the layer divides what it reads
            act = update.act or ActQuant(None)
            new[n] = replace(update, act=ActQuant(act.bits, act.scale, s))
        return SiteUpdate(new)


@dataclass(frozen=True, kw_only=True)
class AWQ(Scaled):
    """Scales by the inputs' mean magnitude, chosen by the output's error, then RTN [lin2024].

    Attributes:
        n_grid: exponents that are tried: 0, 1/n_grid, …, 1; with 0 there is no scale.
        clip: cut the range of each group where that helps.
    """

    name = "awq"
    stats = (MeanAbs, Hessian)
    n_grid: int = 10
    clip: bool = True

    def __post_init__(self):
        super().__post_init__()
        whole("n_grid", self.n_grid, 0)
        one_of("clip", self.clip, (True, False))

    @property
    def grid(self) -> dict:
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def scale(self, weights: Mapping, stats: Mapping, masks: Mapping, tie: Callable) -> Tensor:
        mean, H = stats[MeanAbs].value, stats[Hessian].value

        def error(s: Tensor) -> float:
            """Error of the outputs of all layers of the site."""
            rounded = {n: rtn(W * s, mask=masks[n], **self.grid).weight for n, W in weights.items()}
            return sum(layer_error(rounded[n] / s - W, H) for n, W in weights.items())

        exponents = torch.linspace(0, 1, self.n_grid + 1).tolist()
        return min((tie(awq_scale(mean, alpha)) for alpha in exponents), key=error)

    def finish(self, W: Tensor, stats: Mapping, scale: Tensor, mask: Tensor | None) -> LayerUpdate:
        if self.clip:
            W = clip_groups(W, stats[Hessian].value / torch.outer(scale, scale), **self.grid)
        return rtn(W, mask=mask, **self.grid)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -127 to 127 of each row x (…, I), int8, and the step of each row (…, 1)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # 8 bits of bfloat16 are too few for 127
    step = x.abs().amax(-1, keepdim=True) / 127
    step = torch.where(step == 0, 1.0, step)  # a row of zeros: any step will do
    return (x / step).round().clamp(-127, 127).to(torch.int8), step


class Int8Linear(nn.Module):
    """A linear layer that multiplies whole numbers: a step per row of weights and per token.

    Args:
        codes: (O, I) int8.
        step: (O,), what a difference of one stands for in each row.
    """

    def __init__(self, codes: Tensor, step: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.linear_shape = tuple(codes.shape)
        for name, tensor in (("codes", codes), ("step", step), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        codes, step = quantize_tokens(x.flatten(0, -2))  # (N, I) int8, (N, 1)
        sums = torch._int_mm(codes, self.codes.T)  # (N, O) int32, exact
        y = (sums * step * self.step).to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y)


@dataclass(frozen=True, kw_only=True)
class DynamicInt8(RTN):
    """Weights in 8 bits with a step per row, inputs in 8 bits with a step per token.

    Attributes:
        act_bits: bits of the inputs, 2 to 8.
    """

    name = "dynamic-int8"
    bits: int = 8
    group_size: int | str = "channel"
    symmetric: bool = True
    act_bits: int = 8

    def __post_init__(self):
        super().__post_init__()
        whole("act_bits", self.act_bits, 2, 8)

    def solve(self, W: Tensor, stats: Mapping, mask: Tensor | None) -> LayerUpdate:
        return replace(super().solve(W, stats, mask), act=ActQuant(self.act_bits))


def _is_int8(layer: nn.Module) -> bool:
    q, act = qparams_of(layer), getattr(layer, "input_quant", None)
    return (
        isinstance(layer, nn.Linear) and q is not None and act is not None
        and q.bits == act.bits == 8 and q.symmetric and q.scale.shape == (layer.out_features, 1)
        and act.scale is None and act.divide is None
    )  # fmt: skip


@torch.no_grad()
def to_int8(model: nn.Module) -> int:
    """Put an `Int8Linear` in the place of every layer that `DynamicInt8` has treated, in place.

    Returns:
        how many there were.
    """
    found = [(name, layer) for name, layer in model.named_modules() if _is_int8(layer)]
    allowed = "one whose layers have 8-bit rows and inputs, as DynamicInt8 makes them"
    require(bool(found), "model", type(model).__name__, allowed)
    for name, layer in found:
        q = qparams_of(layer)
        codes = (q.quantize(layer.weight).int() - 128).to(torch.int8)  # 0 … 255 -> -128 … 127
        bias = None if layer.bias is None else layer.bias.detach().clone()
        parent, _, child = name.rpartition(".")
        new = Int8Linear(codes, q.scale[:, 0].clone(), bias)
        setattr(model.get_submodule(parent), child, new)
    return len(found)


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(DynamicInt8, Scaled):
    """Weights and inputs in 8 bits, after outliers were moved from inputs to weights [xiao2023].

    Attributes:
        alpha: 0 to 1, share of the difficulty that the weights take; None: no scale.
        per: `token` (a step for each token) or `tensor` (one, from calibration text).
        where: as in `Scaled`; the paper scales after norms only.
    """

    name = "smoothquant"
    stats = (AbsMax,)
    alpha: float | None = 0.5
    per: str = "token"
    where: str = "folded"

    def __post_init__(self):
        super().__post_init__()
        if self.alpha is not None:
            number("alpha", self.alpha, 0, 1)
        one_of("per", self.per, ("token", "tensor"))

    def scale(self, weights: Mapping, stats: Mapping, masks: Mapping, tie: Callable) -> Tensor | None:
        if self.alpha is None:
            return None
        columns = torch.stack([W.abs().amax(0) for W in weights.values()]).amax(0)  # (I,)
        return tie(smooth_scale(stats[AbsMax].value, columns, self.alpha))

    def finish(self, W: Tensor, stats: Mapping, scale: Tensor, mask: Tensor | None) -> LayerUpdate:
        update = self.solve(W, stats, mask)
        if self.per == "token":
            return update
        step = (stats[AbsMax].value / scale).amax() / (2 ** (self.act_bits - 1) - 1)
        return replace(update, act=ActQuant(self.act_bits, step[None]))
