"""Adam with float32 master weights, and how the learning rate goes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter, 1711.05101) with a linear warm-up and an optional decay to zero."""

    learning_rate: float = 1e-4  # after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of Adam's two moments
    eps: float = 1e-8  # added to the root of the second moment; below it a gradient is taken for rounding
    weight_decay: float = 0.01  # decoupled, on weights of two or more dimensions alone
    warmup: int = 500  # steps of linear warm-up
    decay: Literal["constant", "cosine", "linear"] = "constant"  # cosine over all the steps, linear over the last
    cooldown: float = 0.3  # share of the steps over which `linear` decays

    def __post_init__(self) -> None:
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must be a finite number above 0")
        if self.decay not in ("constant", "cosine", "linear"):
            raise ValueError(f"optimizer.decay={self.decay!r} is unknown; choose constant, cosine or linear")

    def factor(self, step: int, max_steps: int) -> float:
        """The learning rate's factor at a step, in [0, 1]."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay == "cosine":
            return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max_steps)))
        if self.decay == "linear":
            return warm * min(1.0, max(0.0, (max_steps - step) / max(1.0, self.cooldown * max_steps)))
        return warm

    def build(self, modules: Mapping[str, Iterable[nn.Module]], max_steps: int) -> dict[str, Any]:
        """Optimiser and schedule in the form Lightning takes; gradients of one name are clipped together."""
        groups: list[dict[str, Any]] = []
        for name, some in modules.items():
            parameters = [p for module in some for p in module.parameters() if p.requires_grad]
            matrices, vectors = ([p for p in parameters if (p.ndim >= 2) == wide] for wide in (True, False))
            groups.append({"params": matrices, "weight_decay": self.weight_decay, "clip": name})
            groups.append({"params": vectors, "weight_decay": 0.0, "clip": name})
        adam = torch.optim.AdamW(groups, lr=self.learning_rate, betas=tuple(self.betas), eps=self.eps, fused=True)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: self.factor(step, max_steps))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
