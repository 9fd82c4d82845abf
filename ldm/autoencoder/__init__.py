"""Images ↔ latents: the KL autoencoder, its posterior and its losses. Only this room knows the latent scale."""

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.autoencoder.discriminator import Adversarial
from ldm.autoencoder.loss import CalibratedLoss
from ldm.autoencoder.posterior import Posterior

__all__ = ["Adversarial", "Autoencoder", "CalibratedLoss", "Posterior"]
