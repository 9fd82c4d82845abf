"""``ldm.load``: a name or a path → a model."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import torch

from ldm import checkpoint
from ldm.autoencoder import Autoencoder
from ldm.diffusion import Schedule
from ldm.pipeline import Defaults, LatentDiffusion
from ldm.text import TextEncoder
from ldm.unet import UNet

BUNDLED = ("emoji",)


def find(source: str | Path) -> Path:
    """The checkpoint folder of a bundled name, a run folder (its newest good one) or a checkpoint folder.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    if str(source) in BUNDLED:
        return Path(str(files("ldm") / "assets" / str(source)))
    path = Path(source)
    if (path / "checkpoints").is_dir():
        return checkpoint.newest(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no model at {source}: give a bundled name ({', '.join(BUNDLED)}), a run folder or a checkpoint folder"
        )
    return path


def load(source: str | Path, weights: str = "ema", device: str | torch.device | None = None) -> LatentDiffusion:
    """Load a model, ready to sample.

    Weights keep their own precision, but half precision on a CPU becomes float32, which is faster and exacter there.

    Args:
        source: bundled name, run folder (its newest verified checkpoint) or checkpoint folder.
        weights: ``"ema"`` or ``"raw"``.
        device: None takes a GPU if there is one.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if it is damaged, or holds no whole model.
    """
    folder = find(source)
    contents = checkpoint.load(folder, weights)
    parts = contents.components
    if "unet" not in parts:
        raise ValueError(f"{source} holds {', '.join(parts)} but no UNet; for an autoencoder use ldm.load_autoencoder")
    unet, autoencoder, text_encoder = parts["unet"], parts["autoencoder"], parts["text_encoder"]
    assert isinstance(unet, UNet)
    assert isinstance(autoencoder, Autoencoder)
    assert isinstance(text_encoder, TextEncoder)
    settings = contents.settings
    device = _device(device)
    dtype = next(unet.parameters()).dtype
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    model = LatentDiffusion(
        unet,
        autoencoder,
        text_encoder,
        Schedule(**settings["schedule"]),
        settings["prediction"],
        Defaults(settings["grid"], settings["guidance_scale"], settings["height"], settings["width"]),
        contents.tensors["null_context"],
        name=hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()[:16],
    )
    return model.to(device, dtype)


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name} is unknown; choose cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this machine has no GPU that torch can use; choose cpu")
    return device


def load_autoencoder(source: str | Path, weights: str = "ema") -> Autoencoder:
    """The autoencoder of a bundled model, a run folder of either stage, or a checkpoint folder; float32, on the CPU."""
    part = checkpoint.load(find(source), weights, only=("autoencoder",)).components.get("autoencoder")
    if not isinstance(part, Autoencoder):
        raise ValueError(f"{source} holds no autoencoder; give the run folder of a stage-one training")
    return part.float()


def load_text_encoder(source: str | Path) -> TextEncoder:
    """The text tower of a bundled model or checkpoint; float32, on the CPU."""
    part = checkpoint.load(find(source), only=("text_encoder",)).components.get("text_encoder")
    if not isinstance(part, TextEncoder):
        raise ValueError(f"{source} holds no text tower")
    return part.float()
