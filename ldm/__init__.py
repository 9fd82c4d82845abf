"""Latent text-to-image diffusion: train, sample, evaluate, ablate."""

from ldm.loading import load, load_autoencoder, load_text_encoder
from ldm.pipeline import LatentDiffusion
from ldm.samples import Samples

__all__ = ["LatentDiffusion", "Samples", "load", "load_autoencoder", "load_text_encoder"]
