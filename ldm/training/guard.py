"""What all ranks decide together, once an optimiser step: whether to skip it, and whether to stop after it."""

import json
import math
import signal
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.training.sharded import whole

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # finish the step, save, stop; SIGUSR1 requeues under SLURM
_MEMORY = 0.98  # of the running mean and variance of the loss
_LEAST = 50  # steps before a spike can be told


class PosteriorCollapse(UserWarning):
    """Almost no unit of the latents varies over the validation images."""


@dataclass(frozen=True)
class Limits:
    """When a training stops by itself."""

    nonfinite: int = 5  # steps in a row with a loss or a gradient that is not finite; each is skipped
    substituted: float = 0.01  # share of the samples that data.on_bad=skip may replace, once there were a hundred
    spike: float = 6.0  # a loss so many standard deviations above its running mean is logged with its samples' keys
    active_units: float = 0.05  # stage one: share of latent units below which a validation warns of a collapse

    def __post_init__(self) -> None:
        shares = all(0.0 <= share <= 1.0 for share in (self.substituted, self.active_units))
        if self.nonfinite < 1 or not shares or not self.spike > 0.0:
            raise ValueError(f"{self}: the rule is nonfinite >= 1, spike > 0, substituted and active_units in [0, 1]")


class Guard(pl.Callback):
    """Clips gradients, skips a step that is not finite on any rank, stops at a signal that came to any rank.

    The ranks exchange five numbers a step, so none can take a step or stop that the others do not. What happened is
    written to ``events.jsonl`` in the run folder.
    """

    def __init__(self, limits: Limits, run: Path, clip: float | None) -> None:
        self.limits, self.run, self.clip = limits, run, math.inf if clip is None else clip
        self.signal: int | None = None  # that stopped the training, on whichever rank it came
        self.fault: str | None = None  # why the training stopped by itself
        self._received = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._in_a_row = self._skipped = self._seen = self._replaced = 0
        self._mean, self._variance, self._steps = 0.0, 0.0, 0
        self._clear()

    def _clear(self) -> None:
        """Begin an optimiser step."""
        self._keys: list[str] = []
        self._loss: Tensor | float = 0.0
        self._batch = [0, 0]  # samples of this rank, and how many of them were replaced

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, from Lightning's handlers too: theirs waits for the other ranks in mid-step."""
        if trainer.world_size > 1:  # on CPUs, so that a step does not wait for the GPU once more
            self._group = dist.new_group(backend="gloo")
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = number

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any) -> None:
        """Note whose step it is."""
        self._keys += batch["key"]
        self._batch[0] += len(batch["key"])
        self._batch[1] += int(batch["substituted"].sum()) if "substituted" in batch else 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add up the loss of the micro-batches (Lightning has divided it by their number)."""
        self._loss = self._loss + loss.detach().double()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Agree, clip, skip."""
        together: dict[str, list[Tensor]] = defaultdict(list)  # parameters of the groups of one name
        for group in optimizer.param_groups:
            together[group["clip"]] += group["params"]
        norms = {name: whole(torch.nn.utils.clip_grad_norm_(some, self.clip)) for name, some in together.items()}
        values = torch.stack([torch.as_tensor(self._loss), *(norm.double() for norm in norms.values())]).tolist()
        own = [float(self._received), float(not all(map(math.isfinite, values))), values[0], *map(float, self._batch)]
        numbers, faults, losses, seen, replaced = zip(*self._gather(own), strict=True)  # a column of all ranks each
        bad, loss = any(faults), sum(losses) / len(losses)
        self._seen += int(sum(seen))
        self._replaced += int(sum(replaced))
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad:
            optimizer.zero_grad()  # without gradients the optimiser leaves weights and moments alone
            self._skipped += 1
            self._event(trainer, "skipped", loss)
        else:
            self._watch(trainer, loss)
            pl_module.log("train/loss", loss)
            pl_module.log("loss", loss, prog_bar=True, logger=False)
            pl_module.log_dict({f"train/grad_norm{name}": norm for name, norm in norms.items()})
        pl_module.log_dict({"train/skipped_steps": float(self._skipped), "train/substituted": float(self._replaced)})
        self._judge(int(max(numbers)))
        self._clear()

    def _gather(self, own: list[float]) -> list[list[float]]:
        """A row of each rank."""
        if self._group is None:
            return [own]
        rows = [torch.zeros(len(own), dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, torch.tensor(own, dtype=torch.float64), group=self._group)
        return [row.tolist() for row in rows]

    def _watch(self, trainer: pl.Trainer, loss: float) -> None:
        """Log a spike; keep the running mean and variance."""
        above = loss - self._mean
        if self._steps >= _LEAST and above > self.limits.spike * math.sqrt(self._variance):
            self._event(trainer, "spike", loss)
            above = math.copysign(self.limits.spike * math.sqrt(self._variance), above)  # one does not hide the next
        weight = max(1.0 - _MEMORY, 1.0 / (self._steps + 1))
        self._variance = (1.0 - weight) * (self._variance + weight * above**2)
        self._mean += weight * above
        self._steps += 1

    def _judge(self, number: int) -> None:
        """Whether to stop after this step."""
        if number:
            self.signal = number
        rate = self._replaced / max(1, self._seen)
        if self._in_a_row >= self.limits.nonfinite:
            self.fault = (
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, the last with the samples "
                f"{', '.join(self._last_keys[:8])}{', …' if len(self._last_keys) > 8 else ''}; the weights are those "
                "before them; lower optimizer.learning_rate or look at these samples"
            )
        elif self._seen >= 100 and rate > self.limits.substituted:
            self.fault = (
                f"{self._replaced} of {self._seen} samples were bad and replaced, more than "
                f"guard.substituted={self.limits.substituted:g}; check the shards with: ldm index"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that the latents no longer tell images apart."""
        share = float(trainer.callback_metrics.get("val/active_units", 1.0))
        if share < self.limits.active_units:
            self._event(trainer, "collapse", share, "active_units")
            rule = f"fewer than guard.active_units={self.limits.active_units:g}: the posterior collapses"
            said = f"step {trainer.global_step}: {share:.1%} of the latent units are active, {rule}; lower loss.beta"
            if trainer.is_global_zero:
                warnings.warn(said, PosteriorCollapse, stacklevel=2)

    def _event(self, trainer: pl.Trainer, name: str, value: float, what: str = "loss") -> None:
        """Write down a step and its samples; every rank calls this at the same step."""
        every: list[Any] = [self._keys]
        if self._group is not None:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, self._keys, group=self._group)
        self._last_keys: list[str] = [key for keys in every for key in keys]
        if trainer.is_global_zero:
            line = {"step": trainer.global_step, "event": name, what: str(value), "keys": self._last_keys}
            with open(self.run / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop after this step."""
        if self.signal is not None or self.fault is not None:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self.on_fit_end(trainer, pl_module)


def ignore_signals(worker: int) -> None:
    """For the processes that read data: a signal to the whole group is for the process that trains."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
