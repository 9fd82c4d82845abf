"""The denoiser of the picture: (z_t, t, context) → prediction."""

from ldm.unet.unet import UNet

__all__ = ["UNet"]
