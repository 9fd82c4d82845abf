"""Adam or Muon with float32 master weights, and how the learning rate goes."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

MUON = "muon"  # the key of a group of parameters: iterations of Newton-Schulz, 0 where AdamW steps them
NARROW = 32  # a side of a matrix below which Muon leaves it to Adam: the last layer's, latents', a factor's of LoRA
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024): steep at 0, and about 1 from 0.7 to 1.2


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter, 1711.05101), or Muon, with a linear warm-up and an optional decay to zero."""

    method: Literal["adamw", "muon"] = "adamw"
    newton_schulz: int = 5  # iterations of Muon's orthogonalisation, most of what it takes longer than Adam
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
        if self.method not in ("adamw", "muon"):
            raise ValueError(f"optimizer.method={self.method!r} is unknown; choose adamw or muon")
        if not (isinstance(self.newton_schulz, int) and 1 <= self.newton_schulz <= 10):
            raise ValueError(f"optimizer.newton_schulz={self.newton_schulz} must be a whole number from 1 to 10")
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
            kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": []}
            for p in (p for module in some for p in module.parameters() if p.requires_grad):
                muon = self.method == MUON and p.ndim >= 2 and min(p.flatten(1).shape) >= NARROW
                kinds.setdefault(MUON if muon else "matrices" if p.ndim >= 2 else "vectors", []).append(p)
            for key, parameters in kinds.items():
                decay = 0.0 if key == "vectors" else self.weight_decay
                steps = self.newton_schulz if key == MUON else 0
                groups.append({"params": parameters, "weight_decay": decay, "clip": name, MUON: steps})
        kind = Muon if self.method == MUON else torch.optim.AdamW
        adam = kind(groups, lr=self.learning_rate, betas=tuple(self.betas), eps=self.eps, fused=True)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: self.factor(step, max_steps))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the groups that say so, AdamW for the others.

    The momentum of a matrix is replaced by the nearest one with orthogonal rows or columns, scaled so that its root
    mean square is what Adam's steps have (Liu et al., 2502.16982, eq. 4), for which one learning rate serves both. A
    convolution's kernel is the matrix (c_out, c_in k k). ``torch.optim.Muon`` takes no kernels.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a parameter without gradient stays, with its momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # here, since it clears and clips the gradients of all groups
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group[MUON]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"] if group[MUON] else ():
                if p.grad is not None:
                    if not (state := self.state[p]):
                        state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}  # AdamW reads "step" of all
                    momentum = state["momentum"].lerp_(p.grad, 1.0 - self.MOMENTUM)
                    state["step"] += 1
                    direction = p.grad.lerp(momentum, self.MOMENTUM).flatten(1)  # Nesterov's
                    alike[direction.shape].append((p, direction))
            for shape, pairs in alike.items():
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                whole = orthogonal(torch.stack([direction for _, direction in pairs]), group[MUON])
                for (p, _), update in zip(pairs, whole, strict=True):
                    p.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=scale)
        return loss


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ by Newton-Schulz in bfloat16; (n, rows, columns) → the same, float32.

    The singular values come to between 0.7 and 1.2, those of under a thousandth of the norm to less.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices.bfloat16() if wide else matrices.bfloat16().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # so that none is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()
