"""The capsule in a PNG: what made a picture, in a text chunk of its file."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CHUNK = "ldm"


def code_version() -> str:
    """The version of this package."""
    try:
        return version("latent-diffusion-lab")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def write_png(path: Path, image: Image.Image, capsule: dict[str, Any]) -> None:
    """Write a PNG with its capsule: beside its target, then renamed, so that no half file is ever seen."""
    info = PngInfo()
    stamped = {**capsule, "versions": {"ldm": code_version(), "torch": torch.__version__}}
    info.add_itxt(CHUNK, json.dumps(stamped, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.partial")
    image.save(temporary, "PNG", pnginfo=info)
    os.replace(temporary, path)


def read_png(path: str | Path) -> dict[str, Any]:
    """The capsule of a PNG.

    Raises:
        ValueError: if the file carries none.
    """
    with Image.open(path, formats=("PNG",)) as image:
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        raise ValueError(f"{path} carries no settings; only pictures that this program wrote do")
    capsule: dict[str, Any] = json.loads(text)
    return capsule
