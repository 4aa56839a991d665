"""Quantization-aware training: the grid of RTN, and then training with rounded weights in the forward pass."""

from __future__ import annotations

__all__ = ["QAT"]

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from .compression import Context, LayerUpdate, Report
from .quantization import RTN, choose_qparams
from .settings import number, whole
from .training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class QAT(RTN):
    """Round to nearest, and train on: rounded in the forward pass, not rounded in the backward pass [jacob2018].

    The layer keeps the raw weight and shows the nearest value of its grid (`FakeQuant`, a straight-through estimator).
    A raw weight whose code was clipped to an end of the grid gets no gradient. The grids are those of the weights
    before training, and stay. Everything that is not rounded, norms and embeddings, learns as well.

    Attributes:
        steps, batch_size, lr: of the training, in sequences of `seq_len` tokens; AdamW without decay, cosine.
        n_train: sequences of training text that there have to be; read again when the steps need more.
        bits, group_size, symmetric, layers, seed: as in `RTN`; the seed is also that of the training.
    """

    name = "qat"
    steps: int = 200
    batch_size: int = 8
    lr: float = 1e-4
    n_train: int = 256

    def __post_init__(self):
        super().__post_init__()
        whole("steps", self.steps, 1)
        whole("batch_size", self.batch_size, 1)
        number("lr", self.lr, 0)
        whole("n_train", self.n_train, 1)

    @property
    def training(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            lr=self.lr,
            weight_decay=0.0,  # it would pull raw weights towards 0 that the loss does not see
            warmup=self.steps // 10,
            seed=self.seed,
        )

    @property
    def needs(self) -> Mapping[str, int]:
        return {"train": self.n_train * self.seq_len + 1}

    def solve(self, W: Tensor, stats: Mapping, mask: Tensor | None) -> LayerUpdate:
        """The grid of RTN, and the weight as it is: what is rounded away is where the training begins."""
        if mask is not None:
            W = torch.where(mask.bool(), W, 0)
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return LayerUpdate(W, mask, choose_qparams(W, **grid))

    def run(self, model: nn.Module, ctx: Context) -> tuple[nn.Module, Report]:
        start = perf_counter()
        model, report = super().run(model, ctx)
        out = None if ctx.checkpoint is None else ctx.checkpoint / "training"
        train(model, ctx.data, self.training, rt=ctx.rt, out=out)
        return model, Report(self.name, self.config, report.layers, perf_counter() - start, report.coverage)
