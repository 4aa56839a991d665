"""Exact replacements, made of nn.Linear, for modules of transformers that hold their matrices in another form.

GPT-2's `Conv1D` keeps its matrix transposed; routed experts keep all experts in one three-dimensional parameter. A pass
treats matrices (O, I) with one input each, so these are taken apart before the walk, in the copy that is compressed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcourse.settings import BadInput

__all__ = ["FusedExperts", "ParallelExperts", "RoutedExperts", "expert_matrices", "is_separated", "separate"]


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer around W (O, I), which is copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


class _Experts(nn.Module):
    """Shared by the three: the layers of E experts as two lists."""

    def __init__(self, up: list[nn.Linear], down: list[nn.Linear]):
        super().__init__()
        self.gate_up, self.down = nn.ModuleList(up), nn.ModuleList(down)


class RoutedExperts(_Experts):
    """E gated experts; a router says which of them each token visits (Mixtral, Qwen, OLMoE, DeepSeek, gpt-oss …).

    Args:
        fused: the module of transformers; its `_apply_gate` (or its activation) is kept, its parameters are not.
    """

    def __init__(self, fused: nn.Module):
        transposed, bias = fused.is_transposed, fused.has_bias
        up = fused.gate_up_proj if fused.has_gate else fused.up_proj  # (E, 2F, D), or (E, D, 2F) transposed
        matrix = (lambda p, e: p[e].T) if transposed else (lambda p, e: p[e])
        up_bias = (fused.gate_up_proj_bias if fused.has_gate else fused.up_proj_bias) if bias else None
        down_bias = fused.down_proj_bias if bias else None
        experts = range(len(up))
        super().__init__(
            [_linear(matrix(up, e), up_bias[e] if bias else None) for e in experts],
            [_linear(matrix(fused.down_proj, e), down_bias[e] if bias else None) for e in experts],
        )
        self.rule = _without_parameters(fused)

    def gate(self, hidden: Tensor) -> Tensor:
        """The nonlinearity between the two layers: (n, 2F) → (n, F)."""
        return self.rule._apply_gate(hidden) if self.rule.has_gate else self.rule.act_fn(hidden)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), experts (N, K) and their weights (N, K) → (N, D)."""
        y = torch.zeros_like(x)
        for e in experts.unique().tolist():
            if e >= len(self.down):  # stands for "no expert"
                continue
            choice, token = torch.where(e == experts.T)  # in the order of transformers: all first choices, then second
            hidden = self.gate(self.gate_up[e](x[token]))  # (n, F)
            y.index_add_(0, token, (self.down[e](hidden) * weights[token, choice, None]).to(y.dtype))
        return y


class FusedExperts(_Experts):
    """E experts, all of which read all tokens, scaled by the router's score (Llama 4)."""

    def __init__(self, fused: nn.Module):
        experts = range(len(fused.down_proj))
        super().__init__(
            [_linear(fused.gate_up_proj[e].T) for e in experts], [_linear(fused.down_proj[e].T) for e in experts]
        )
        self.act_fn = fused.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x (E · N, D), expert by expert → (E · N, D)."""
        out = []
        for rows, up, down in zip(x.view(len(self.down), -1, x.shape[-1]), self.gate_up, self.down, strict=True):
            gate, value = up(rows).chunk(2, dim=-1)  # (N, F) each
            out.append(down(value * self.act_fn(gate)))
        return torch.cat(out)


class ParallelExperts(nn.Module):
    """E matrices, each for its own slice of the rows (JetMoE)."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.experts = nn.ModuleList(_linear(W) for W in fused.weight)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x (N, I), sorted by expert, and how many rows each expert has → (N, O)."""
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, x.split(sizes), strict=True)])


def _without_parameters(module: nn.Module) -> nn.Module:
    """The same module, its own parameters removed."""
    for name in list(module._parameters):
        del module._parameters[name]
    return module


def _replacement(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if kind == "Conv1D":
        return _linear(module.weight.T, module.bias)
    if kind == "FalconLinear":  # a subclass of nn.Linear that multiplies and adds in two steps
        return _linear(module.weight, module.bias)
    if kind == "Llama4TextExperts":
        return FusedExperts(module)
    if kind.endswith("ParallelExperts") and getattr(module, "weight", torch.empty(0)).ndim == 3:
        return ParallelExperts(module)
    if hasattr(module, "is_transposed") and hasattr(module, "down_proj") and module.down_proj.ndim == 3:
        if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "_apply_gate"):
            raise BadInput(f"experts are {kind!r}, with a norm of their own; allowed: experts without one.")
        return RoutedExperts(module)
    return None


def expert_matrices(module: nn.Module) -> tuple[int, int, list[nn.Module]] | None:
    """How many experts a module has, the entries of their matrices, and the layers they are in; None: it has none."""
    fused = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
    if fused:
        return len(fused[0]), sum(p.numel() for p in fused), []
    ours = isinstance(getattr(module, "experts", None), nn.ModuleList) and hasattr(module, "router")
    if ours or isinstance(module, (_Experts, ParallelExperts)):
        parts = [m for m in module.modules() if hasattr(m, "in_features") and m is not getattr(module, "router", None)]
        experts = module.down if isinstance(module, _Experts) else module.experts
        return len(experts), sum(m.in_features * m.out_features for m in parts), parts
    return None


def is_separated(model: nn.Module) -> bool:
    """Whether `separate` has replaced something in this model."""
    return getattr(model, "separated", False)


def separate(model: nn.Module) -> bool:
    """Replace every module of that kind, in place; returns whether there was one."""
    found = False
    for name, module in list(model.named_modules()):
        new = _replacement(module)
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.train(module.training))
            found = True
    if found:
        model.separated = True
    return found
