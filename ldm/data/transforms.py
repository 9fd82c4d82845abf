"""Encoded images → tensors in [-1, 1]."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

FORMATS = ("WEBP", "PNG", "JPEG")
MAX_PIXELS = 32 * 2**20  # a header that promises more is refused before anything is decoded


class BadSample(ValueError):
    """One sample that is damaged or cannot be decoded; with ``on_bad="skip"`` another stands in for it."""


_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError)


def promised_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image by its header; 0, 0 where none can be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Image.DecompressionBombError:
        return MAX_PIXELS + 1, 1
    except _UNREADABLE:
        return 0, 0


def decode_image(data: bytes, name: str = "image") -> Image.Image:
    """Decode a webp, png or jpeg file to RGB; what is transparent becomes white.

    Raises:
        BadSample: a ValueError naming ``name``, for other formats, damage, or more than 32 megapixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels; the limit is {MAX_PIXELS}")
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return image.convert("RGB")
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}: not a readable webp, png or jpeg ({error})") from error


def fit(image: Image.Image, height: int, width: int, crop_y: float = 0.5, crop_x: float = 0.5) -> Image.Image:
    """Resize until the target is just covered (Lanczos), then crop; 0.5 is the centre, 0 and 1 the borders."""
    scale = max(height / image.height, width / image.width)
    if scale != 1.0:
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = round((image.width - width) * crop_x), round((image.height - height) * crop_y)
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 in [-1, 1], shape (3, h, w)."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
