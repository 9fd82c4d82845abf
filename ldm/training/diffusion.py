"""Stage two: the text-conditioned UNet (line two of the picture)."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import randomness
from ldm.checkpoint import Contents
from ldm.diffusion import Draw, Objective, min_snr_weight, per_sample_error, target
from ldm.diffusion.schedule import per_image
from ldm.pipeline import LatentDiffusion
from ldm.text.encoder import MAX_TOKENS
from ldm.training import draws
from ldm.training.alignment import Alignment
from ldm.training.checkpointing import no_pickle
from ldm.training.ema import EMA
from ldm.training.lora import factors, merged
from ldm.training.optimizer import Optimizer

VALIDATION_BINS = 4  # ranges of timesteps, each validation image once in each


class DiffusionTraining(pl.LightningModule):
    """Trains the UNet of a model; noise, timestep and caption drop of a sample hang on (seed, position) alone."""

    load_from_checkpoint: Any = classmethod(no_pickle)

    def __init__(
        self,
        model: LatentDiffusion,
        optimizer: Optimizer,
        objective: Objective,
        caption_dropout: float = 0.1,  # share of captions replaced by the null context
        ema_decay: float = 0.999,
        seed: int = 0,
        power: Sequence[float] = (),  # lengths σ_rel of averages that are kept for later
        repa: float = 0.0,  # λ of representation alignment; 0 has none
    ) -> None:
        super().__init__()
        if not 0.0 <= caption_dropout < 1.0:
            raise ValueError(f"caption_dropout={caption_dropout}: the rule is 0 <= rate < 1; 0.1 is usual")
        self.unet = model.unet.train()
        if not any(factors(self.unet)):  # of a LoRA, which alone are trained
            self.unet.requires_grad_(True)
        self._frozen = [model]  # in a list, so that the frozen parts are not taken for parameters of this module
        self.optimizer, self.objective, self.seed, self.caption_dropout = optimizer, objective, seed, caption_dropout
        steps, channels = model.schedule.num_steps, model.autoencoder.latent_channels
        self.draws = partial(draws.stage_two, seed, channels, objective, steps, caption_dropout)  # of a batch
        weight = min_snr_weight(model.schedule.log_snr(torch.arange(steps)), model.prediction, objective.min_snr)
        of_times = [f(torch.arange(steps)) for f in (model.schedule.alpha, model.schedule.sigma)]
        self._tables = torch.stack([*of_times, weight.double()])  # α, σ, weight: (3, steps), where the UNet is
        self.ema = EMA(self.unet, ema_decay, power)
        self.alignment = Alignment(model.unet, repa) if repa else None

    @property
    def model(self) -> LatentDiffusion:
        """The model in training, with the raw weights."""
        return self._frozen[0]

    def averaged_model(self) -> LatentDiffusion:
        """The model with the EMA weights, ready to sample from."""
        model = copy.copy(self.model)
        model.unet, model.name = self.ema.average, ""  # type: ignore[assignment]
        return model

    def on_fit_start(self) -> None:
        """The frozen parts go where the UNet is, and what is looked up there by a time."""
        self.model.to(self.device)
        self._tables = self._tables.to(self.device)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """Encode → drop captions → draw t and noise → loss → log."""
        z, context = self.encode(batch)
        context = self.drop_captions(context, batch["dropped"])
        drawn = self.draw(batch, z)
        error, weight = self.error(self.unet, z, drawn, context)
        loss = (weight * error).mean()
        if self.alignment is not None:
            aligned = self.alignment(batch["image"])
            self.log("train/alignment", aligned.detach())
            loss = loss + aligned
        self.log("train/mse", error.detach().mean())
        return loss

    def encode(self, batch: dict[str, Any], noisy: bool = True) -> tuple[Tensor, Tensor]:
        """Latents (n, 4, h/8, w/8), drawn from the posterior unless not ``noisy``, and context (n, 77, d)."""
        if "moments" in batch:
            mean, std = batch["moments"].unbind(1)
            context = F.pad(batch["context"], (0, 0, 0, MAX_TOKENS - batch["context"].shape[1]))
        else:
            with torch.no_grad():
                posterior = self.model.autoencoder.posterior(batch["image"])
            mean, std = posterior.mean, posterior.std
            context = self.model.text_encoder(batch["caption"])
        if noisy:
            mean = mean + std * batch["posterior"].to(mean.dtype)
        return self.model.autoencoder.normalise(mean), context

    def drop_captions(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Replace the context of a share of the samples by the null context: what guidance needs (2207.12598)."""
        self.log("train/dropped_captions", dropped.float().mean())
        return torch.where(dropped[:, None, None], self.model.null_context.to(context), context)

    def draw(self, batch: dict[str, Any], z: Tensor) -> Draw:
        """Times and noise of the samples of a batch."""
        if "eps" not in batch:  # their latents decide
            return self.objective.draw(self.seed, batch["position"], z, self.model.schedule.num_steps)
        return Draw(batch["t"], batch["eps"].to(z.dtype), batch["added"].to(z.dtype))

    def error(self, unet: torch.nn.Module, z: Tensor, drawn: Draw, context: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of each sample's prediction, and its weight: (n,), (n,)."""
        t, eps, added = drawn
        alpha, sigma, weight = self._tables[:, t].to(z)
        alpha, sigma = per_image(alpha, z), per_image(sigma, z)
        prediction = unet(alpha * z + sigma * added, t, context)  # z_t: Schedule.add_noise, without a wait for t
        return per_sample_error(prediction, target(self.model.prediction, z, eps, alpha, sigma)), weight

    def validation_step(self, batch: dict[str, Any]) -> None:
        """Error on fixed (image, t, ε), by range of timesteps, raw and EMA: a curve that can be read."""
        z, context = self.encode(batch, noisy=False)
        positions = batch["position"]
        steps = self.model.schedule.num_steps
        for k in range(VALIDATION_BINS):
            low, high = k * steps // VALIDATION_BINS, (k + 1) * steps // VALIDATION_BINS
            t = [low + randomness.integer(0, f"validation {k}", p, high - low) for p in positions.tolist()]
            eps = randomness.normals(0, f"validation noise {k}", positions, z)
            times = torch.tensor(t, device=z.device)
            for name, unet in (("", self.unet), ("_ema", self.ema.average)):
                error = self.error(unet, z, Draw(times, eps, eps), context)[0].mean()
                self.log(f"val/mse{name}_t{low}-{high - 1}", error, sync_dist=True, batch_size=len(z))
                self._sums.setdefault(name, []).append(float(error) * len(z))
        self._seen += len(z)

    def on_validation_epoch_start(self) -> None:
        """Begin the sums over bins and batches."""
        self._sums: dict[str, list[float]] = {}
        self._seen = 0

    def on_validation_epoch_end(self) -> None:
        """The mean over all timesteps."""
        for name, values in self._sums.items():
            mean = sum(values) / (self._seen * VALIDATION_BINS)
            self.log(f"val/mse{name}", mean, prog_bar=name == "_ema", sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam over the UNet."""
        trained = [self.unet] if self.alignment is None else [self.unet, self.alignment]
        return self.optimizer.build({"": trained}, self.trainer.max_steps)

    def contents(self) -> Contents:
        """What a checkpoint keeps: the whole model with the EMA weights, and the raw ones of the UNet."""
        contents = self.averaged_model().contents()
        contents.components["unet"] = merged(self.ema.average)  # type: ignore[arg-type]
        contents.raw = {"unet": merged(self.unet).state_dict()}
        return contents
