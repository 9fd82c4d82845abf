"""The path from image to noise: how much of the image is left at time t, z_t = α_t z_0 + σ_t ε.

Two paths with one interface: :class:`Schedule`, with α² = ᾱ and σ² = 1 - ᾱ, and :class:`Flow`, with α + σ = 1.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

LOG_SNR_CUT = -40.0  # stands for no image at all: α = 2e-9, below what float32 latents hold


class Schedule:
    """Variance-preserving schedule over discrete steps, continued to real times.

    ``linear``: β from ``beta_start`` to ``beta_end`` in equal steps (DDPM, 2006.11239, §4). ``scaled_linear``: √β in
    equal steps, which SD 1.x was trained with and CompVis code calls "linear". ᾱ_t = ∏_{s≤t} (1 - β_s) (DDPM, eq. 4),
    in float64 on the CPU: no ``.half()`` and no device touches it.

    Times run from 0 (the first noised step) to num_steps - 1; -1 is the clean image, ᾱ = 1. Between whole steps the
    log-SNR is interpolated linearly.

    As they are, the schedules leave some image at the last step (ᾱ = 4e-5 under ``linear``, 5e-3 under SD's), while
    sampling begins at pure noise. ``zero_terminal`` shifts and scales √ᾱ so that the last is 0 and the first stays
    (Lin et al., 2305.08891, algorithm 1). A network that predicts ε then says nothing of the image at the last step.

    Raises:
        ValueError: for an unknown name or β outside 0 < β_start <= β_end < 1.
    """

    def __init__(
        self,
        name: Literal["linear", "scaled_linear"] = "linear",
        num_steps: int = 1000,
        beta_start: float = 1e-4,  # β of the first step
        beta_end: float = 0.02,  # β of the last step
        zero_terminal: bool = False,  # no image left at the last step; for v and x0 alone
    ) -> None:
        if name not in ("linear", "scaled_linear"):
            raise ValueError(f"schedule {name!r} is unknown; choose linear or scaled_linear")
        if not (0.0 < beta_start <= beta_end < 1.0 and num_steps >= 1 + zero_terminal):
            raise ValueError(
                f"beta_start={beta_start}, beta_end={beta_end}, num_steps={num_steps}: "
                "the rule is 0 < beta_start <= beta_end < 1 and at least one step, or two with zero_terminal"
            )
        self.arguments: dict[str, Any] = {
            "name": name,
            "num_steps": num_steps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "zero_terminal": zero_terminal,
        }
        self.num_steps, self.zero_terminal = num_steps, zero_terminal
        if name == "linear":
            beta = np.linspace(beta_start, beta_end, num_steps)
        else:
            beta = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
        alpha_bar = np.cumprod(1.0 - beta)
        if zero_terminal:
            alpha = np.sqrt(alpha_bar)
            alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        self.alpha_bar = torch.from_numpy(alpha_bar)
        # Where no image is left, the log-SNR is cut, so that times short of the last step have one.
        self._log_snr = np.log(np.maximum(alpha_bar, math.exp(LOG_SNR_CUT))) - np.log1p(-alpha_bar)

    def alpha_bar_at(self, t: Tensor | float) -> Tensor:
        """ᾱ at real times in [-1, num_steps - 1], float64, the shape of t."""
        time = np.asarray(t, dtype=np.float64)
        if not np.all((time >= -1.0) & (time <= self.num_steps - 1)):
            raise ValueError(f"time {t}: the rule is -1 <= t <= {self.num_steps - 1}")
        whole = np.clip(np.rint(time).astype(np.int64), 0, self.num_steps - 1)
        between = 1.0 / (1.0 + np.exp(-np.interp(time, np.arange(self.num_steps), self._log_snr)))
        # Whole steps are taken as they are, to the last bit; below step 0 what is left of the noise fades to none.
        value = np.where(time == whole, self.alpha_bar.numpy()[whole], between)
        faded = 1.0 - (1.0 - self.alpha_bar.numpy()[0]) * (time + 1.0)
        return torch.from_numpy(np.asarray(np.where(time < 0.0, faded, value)))

    def alpha(self, t: Tensor | float) -> Tensor:
        """α_t = √ᾱ_t, the signal that is left, float64, the shape of t."""
        return self.alpha_bar_at(t).sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ_t = √(1 - ᾱ_t), the noise, float64, the shape of t."""
        return (1.0 - self.alpha_bar_at(t)).sqrt()

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log ᾱ_t / (1 - ᾱ_t), float64, the shape of t; infinite at -1."""
        alpha_bar = self.alpha_bar_at(t)
        return alpha_bar.log() - torch.log1p(-alpha_bar)

    def time(self, log_snr: np.ndarray) -> np.ndarray:
        """The real times in [0, num_steps - 1] of log-SNRs, the inverse of :meth:`log_snr`; beyond it the nearest."""
        return np.interp(log_snr, self._log_snr[::-1], np.arange(self.num_steps, dtype=np.float64)[::-1])

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = √ᾱ_t z_0 + √(1 - ᾱ_t) ε (DDPM, eq. 4): z and ε (n, ...), t (n,) → (n, ...), in the type of z."""
        return per_image(self.alpha(t.cpu()), z) * z + per_image(self.sigma(t.cpu()), z) * eps


class Flow:
    """The straight path of flow matching (Lipman et al., 2210.02747, eq. 22; Liu et al., 2209.03003, eq. 1).

    α = 1 - τ, σ = τ, τ = (t + 1) / num_steps: 0 at the clean image, t = -1, and 1 at pure noise, the last time. Its
    ``alpha_bar`` is that of the variance-preserving path of the same SNR.
    """

    zero_terminal = True  # no image is left at the last time

    def __init__(self, name: Literal["flow"] = "flow", num_steps: int = 1000) -> None:
        if name != "flow" or num_steps < 2:
            raise ValueError(f"name={name!r}, num_steps={num_steps}: the rule is flow, and at least two steps")
        self.arguments: dict[str, Any] = {"name": name, "num_steps": num_steps}
        self.num_steps = num_steps
        t = torch.arange(num_steps)
        self.alpha_bar = self.alpha(t) ** 2 / (self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = 1 - τ, float64, the shape of t."""
        return 1.0 - self.sigma(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = τ at real times in [-1, num_steps - 1], float64, the shape of t."""
        time = torch.as_tensor(t, dtype=torch.float64)
        if not bool(((time >= -1.0) & (time <= self.num_steps - 1)).all()):
            raise ValueError(f"time {t}: the rule is -1 <= t <= {self.num_steps - 1}")
        return (time + 1.0) / self.num_steps

    def log_snr(self, t: Tensor | float) -> Tensor:
        """2 log (1 - τ)/τ; see :class:`Schedule` for this and what follows."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`log_snr`."""
        return np.clip(self.num_steps / (1.0 + np.exp(log_snr / 2.0)) - 1.0, 0.0, self.num_steps - 1.0)

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = (1 - τ) z_0 + τ ε."""
        return per_image(self.alpha(t.cpu()), z) * z + per_image(self.sigma(t.cpu()), z) * eps


NoisePath = Schedule | Flow


def make_path(arguments: dict[str, Any]) -> NoisePath:
    """The path that a manifest describes."""
    return Flow(**arguments) if arguments.get("name") == "flow" else Schedule(**arguments)


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """One number an image, shape (n,), ready to multiply ``like`` of shape (n, ...), in its type and device."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
