"""Stage one: the KL autoencoder (line two of the picture, its first half)."""

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.autoencoder import Adversarial, Autoencoder, CalibratedLoss
from ldm.autoencoder.autoencoder import DOWNSAMPLING
from ldm.checkpoint import Contents
from ldm.data import BadSample, ShardDataset, decode_image, to_tensor
from ldm.evaluation.reconstruction import ACTIVE, psnr
from ldm.training import draws
from ldm.training.checkpointing import no_pickle
from ldm.training.ema import EMA
from ldm.training.optimizer import Optimizer
from ldm.training.perceptual import Perceptual

SCALE_IMAGES = 512  # images over which the latent scale is measured; latents of 131,072 places a channel at 128×128


class AutoencoderTraining(pl.LightningModule):
    """Trains an autoencoder; the posterior's noise of a sample hangs on (seed, position) alone."""

    load_from_checkpoint: Any = classmethod(no_pickle)

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: CalibratedLoss,
        optimizer: Optimizer,
        samples: ShardDataset,  # training images, or others like them, for the latent scale
        ema_decay: float = 0.999,
        seed: int = 0,
        adversarial: Adversarial | None = None,
        perceptual: Perceptual | None = None,
        decoder_only: bool = False,  # the latents stay what they are, so that a UNet trained on them still fits
        latent_noise: float = 0.0,  # τ: the decoder sees z + |s| n, s ~ N(0, τ²), n ~ N(0, I) (RAE, 2510.11690)
    ) -> None:
        super().__init__()
        self.decoder_only, self.latent_noise, self.adversarial = decoder_only, latent_noise, adversarial
        self._perceptual = [perceptual]  # in a list, so that no checkpoint keeps the frozen network
        self._means: list[Tensor] = []  # of the posteriors of a validation
        self.autoencoder, self.loss = autoencoder.train().requires_grad_(True), loss
        if decoder_only:
            autoencoder.encoder.requires_grad_(False)
            autoencoder.to_moments.requires_grad_(False)
        self.optimizer, self.samples, self.seed = optimizer, samples, seed
        self.draws = partial(draws.stage_one, seed, autoencoder.latent_channels, latent_noise > 0.0)  # of a batch
        self.ema = EMA(autoencoder, ema_decay)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """Encode → draw the latents → decode → loss → log."""
        x = batch["image"]
        posterior = self.autoencoder.posterior(x)
        m = posterior.mean + posterior.std * batch["posterior"].to(posterior.mean.dtype)
        if self.latent_noise:
            m = self.noisy(m, batch)
        reconstruction = self.autoencoder.decode_raw(m)
        parts = self.loss(x, reconstruction, posterior)
        loss, error = parts.pop("loss"), parts["nll"]
        if self._perceptual[0] is not None:
            parts["perceptual"] = self._perceptual[0].to(self.device)(x, reconstruction)
            loss, error = loss + parts["perceptual"], error + parts["perceptual"]
        if self.adversarial is not None:
            last = self.autoencoder.decoder[-1].weight
            assert isinstance(last, Tensor)
            over_ranks = partial(self.trainer.strategy.reduce, reduce_op="mean")
            parts |= self.adversarial(x, reconstruction, error, last, self.global_step, over_ranks)
            loss = loss + parts["generator"] + parts["discriminator"]
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        return loss

    def noisy(self, m: Tensor, batch: dict[str, Any]) -> Tensor:
        """Raw latents (n, c, h, w) with noise in their standard deviations a channel, of each sample's own level."""
        # Before they are known the sample's own: no scale lessens the noise, and no number of devices changes it.
        own = (m.var((2, 3), correction=0, keepdim=True) + 1e-6).sqrt()
        scale = self.autoencoder.latent_std[:, None, None] if self.decoder_only else own
        return m + self.latent_noise * batch["level"].to(m.dtype) * scale * batch["latent_noise"].to(m.dtype)

    def validation_step(self, batch: dict[str, Any]) -> None:
        """PSNR of held-out images from the mode, raw and EMA; KL; what active units are told by."""
        x = batch["image"]
        log = partial(self.log, on_epoch=True, sync_dist=True, batch_size=len(x))
        for name, model in (("", self.autoencoder), ("_ema", self.ema.average)):
            assert isinstance(model, Autoencoder)
            posterior = model.posterior(x)
            log(f"val/psnr{name}", psnr(model.decode_raw(posterior.mode()), x).mean(), prog_bar=name == "_ema")
            log(f"val/kl_per_unit{name}", posterior.kl().mean() / posterior.mean[0].numel())
            if model is self.autoencoder:
                self._means.append(posterior.mean.float().cpu())

    def on_validation_epoch_end(self) -> None:
        """The share of units whose posterior mean varies over the images (Burda et al., 1509.00519, §5.3)."""
        means, self._means = torch.cat(self._means), []
        if len(means) > 1:
            self.log("val/active_units", (means.var(0, correction=0) > ACTIVE).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam over the autoencoder, the scale of its likelihood, and the discriminator."""
        modules: dict[str, list[torch.nn.Module]] = {"": [self.autoencoder, self.loss]}
        if self.adversarial is not None:
            modules["_discriminator"] = [self.adversarial]
        return self.optimizer.build(modules, self.trainer.max_steps)

    @torch.no_grad()
    def measure_latent_scale(self) -> None:
        """Measure mean and standard deviation a channel of raw latents over training images, and keep them in the EMA.

        Var m = Var E[m|x] + E Var[m|x]: the posterior's own variance counts, since stage two draws from it.
        """
        model = self.ema.average
        assert isinstance(model, Autoencoder)
        every = max(1, len(self.samples) // SCALE_IMAGES)
        means, squares = [], []
        for i in range(0, len(self.samples), every):
            try:
                sample = self.samples[i]
                x = to_tensor(decode_image(sample.image, sample.key))[None].to(self.device)
            except BadSample:  # whether that ends the training is for data.on_bad to say
                continue
            x = x[..., : x.shape[-2] // DOWNSAMPLING * DOWNSAMPLING, : x.shape[-1] // DOWNSAMPLING * DOWNSAMPLING]
            posterior = model.posterior(x)
            means.append(posterior.mean.double().mean((0, 2, 3)))
            squares.append((posterior.mean.double().square() + posterior.logvar.double().exp()).mean((0, 2, 3)))
        mean = torch.stack(means).mean(0)
        std = (torch.stack(squares).mean(0) - mean.square()).sqrt()
        for autoencoder in (model, self.autoencoder):
            autoencoder.set_latent_scale(mean.float(), std.float())

    def contents(self) -> Contents:
        """What a checkpoint keeps; the latent scale is measured for it."""
        if not self.decoder_only:
            self.measure_latent_scale()
        return Contents({"autoencoder": self.ema.average}, raw={"autoencoder": self.autoencoder.state_dict()})
