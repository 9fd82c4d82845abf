"""Bytes become pixels in [-1, 1], and what is no safe image is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import decode_image, fit, to_tensor


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_the_three_formats_are_read(form: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (5, 7), (200, 40, 90)), form, quality=100))
    assert (image.mode, image.size) == ("RGB", (5, 7))
    assert np.abs(np.asarray(image, dtype=int) - [200, 40, 90]).max() <= 4  # what JPEG's rounding may cost


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match="pic7"):
        decode_image(encoded(Image.new("RGB", (5, 7)), form), "pic7")


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_cut_images_are_refused(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form)
    with pytest.raises(ValueError, match="pic7"):
        decode_image(data[: len(data) // 2], "pic7")


def test_what_is_transparent_becomes_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    half = decode_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 127)))).getpixel((0, 0))
    assert half == (128, 128, 128)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0])
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(bytes(100))
    bomb += struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    with pytest.raises(ValueError, match="bomb7"):
        decode_image(bomb, "bomb7")


def test_tensors_are_channels_first_in_minus_one_to_one() -> None:
    x = to_tensor(Image.new("RGB", (5, 3), (255, 0, 51)))
    assert (x.shape, x.dtype) == ((3, 3, 5), torch.float32)
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (5, 31), (40, 40)])
def test_fit_gives_the_size_asked_for(height: int, width: int) -> None:
    for size in [(20, 10), (10, 20), (7, 7), (640, 11)]:
        assert fit(Image.new("RGB", size), height, width).size == (width, height)


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), 8, 8)), pixels)


def test_the_crop_goes_from_border_to_border() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(30, dtype=np.uint8)[None, :, None], 10, 0).repeat(3, 2))  # (10, 30, 3)
    lefts = [np.asarray(fit(ramp, 10, 10, crop_x=u))[0, 0, 0] for u in (0.0, 0.5, 1.0)]
    assert lefts == [0, 10, 20]
    tall = ramp.transpose(Image.Transpose.TRANSPOSE)
    assert [np.asarray(fit(tall, 10, 10, crop_y=u))[0, 0, 0] for u in (0.0, 0.5, 1.0)] == [0, 10, 20]
