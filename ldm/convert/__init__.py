"""Weights of others ↔ ours: diffusers folders, CompVis single files, the hub; and back to a diffusers folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ldm import checkpoint
from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents
from ldm.convert import compvis, diffusers
from ldm.convert.export import export_diffusers
from ldm.convert.tensors import PICKLES, open_safetensors, read_json
from ldm.convert.unpickle import open_pickle
from ldm.diffusion.prediction import check_prediction
from ldm.unet import UNet

__all__ = ["convert", "export_diffusers", "fetch", "fingerprint", "is_foreign", "read"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights at the root of a repository are left there unless they are its only part: single files of the whole model.
_HUB_FILES = ["*/*.json", "*/*.txt", "*/*.safetensors", "*.json", "merges.txt", "diffusion_pytorch_model*.safetensors",
              "model*.safetensors"]  # fmt: skip
_HUB_NOT = ["*.non_ema.*", "*flax*", "*onnx*", "*openvino*", "safety_checker/*", "feature_extractor/*"]


def is_foreign(path: Path) -> bool:
    """Whether a path is a file or folder of others: no checkpoint folder of ours."""
    return path.is_file() or any((path / name).is_file() for name in (diffusers.INDEX, "config.json"))


def read(
    path: Path,
    weights: str = "ema",
    only: tuple[str, ...] | None = None,
    prediction: str | None = None,
    pickles: bool = False,
) -> tuple[Contents, tuple[Path, ...]]:
    """Read a diffusers folder, a CompVis single file, or one part of a model.

    Args:
        path: a folder with ``model_index.json``, one with the ``config.json`` of an autoencoder or a text tower, a
            ``.safetensors``, or a pickle.
        weights: ``"ema"`` prefers averaged weights where the source holds both, ``"raw"`` the others.
        only: names of components; None takes all.
        prediction: what the UNet returns, where the caller knows and the source may not say.
        pickles: read files of ``torch.save``, through an unpickler that runs nothing.

    Returns:
        What the source holds, and the files it came from.

    Raises:
        ValueError: for anything that is no SD 1.x or 2.x, or does not fit it, in one line.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; choose ema or raw")
    if prediction is not None:
        check_prediction(prediction)
    try:
        contents, files = _read(path, weights, only, prediction, pickles)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a setting is missing or odd ({type(error).__name__}: {error})") from error
    said = contents.settings
    if prediction is not None and said:
        said["prediction"] = prediction
    if said and said["prediction"] == "epsilon" and said["schedule"].get("zero_terminal"):
        raise ValueError(f"{path}: no image is left at its last step, where epsilon says nothing; the rule is v or x0")
    unet, autoencoder = contents.components.get("unet"), contents.components.get("autoencoder")
    if isinstance(unet, UNet) and isinstance(autoencoder, Autoencoder):
        c = autoencoder.latent_channels
        out_channels = unet.arguments["out_channels"]
        if unet.in_channels not in (c, 2 * c + 1) or out_channels != c:
            raise ValueError(
                f"{path}: its UNet takes {unet.in_channels} channels and gives {out_channels}; the rule is {c}, "
                f"or taking {2 * c + 1} with a mask and a masked picture (inpainting)"
            )
    return contents, files


def _read(
    path: Path, weights: str, only: tuple[str, ...] | None, prediction: str | None, pickles: bool
) -> tuple[Contents, tuple[Path, ...]]:
    if path.is_file():
        if path.suffix in PICKLES and not pickles:
            raise ValueError(f"{path} is a pickle, which could hold more than weights; use: ldm convert {path} OUT")
        source = open_pickle(path) if path.suffix in PICKLES else open_safetensors(path)
        return compvis.read(source, weights, prediction, only), source.files
    if (path / diffusers.INDEX).is_file():
        return diffusers.read(path, weights, only, pickles)
    part: Any
    if "AutoencoderKL" in (kind := str(read_json(path / "config.json").get("_class_name"))):
        name, part = "autoencoder", diffusers.read_autoencoder
    elif kind == "None":  # transformers' configs name no class so
        name, part = "text_encoder", diffusers.read_text_encoder
    else:
        raise ValueError(f"{path} holds a {kind} alone; give the folder above it, with {diffusers.INDEX}")
    if only is None or name not in only:
        raise ValueError(f"{path} holds only one part of a model; use ldm.load_{name}")
    return Contents({name: part(path, pickles)}), (path / "config.json",)


def fingerprint(files: tuple[Path, ...]) -> str:
    """What tells one model's files from another's: 16 hexadecimal digits of the sha256 of their sha256."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()[:16]


def fetch(source: str) -> Path | None:
    """The folder of a hub id, ``owner/name``, fetched or from the cache; None if ``source`` does not look like one.

    Weights and settings alone are fetched; half precision only where there is nothing else.

    Raises:
        FileNotFoundError: if the hub cannot be reached, or holds no such model.
    """
    # A folder of that first name makes it a mistyped path: the hub is not asked.
    if not _HUB_ID.fullmatch(source) or Path(source.split("/")[0]).exists():
        return None
    from huggingface_hub import snapshot_download

    try:
        for skipped in ([*_HUB_NOT, "*fp16*"], _HUB_NOT):
            folder = Path(snapshot_download(source, allow_patterns=_HUB_FILES, ignore_patterns=skipped))
            if any(folder.rglob("*.safetensors")):
                break
    except Exception as error:  # the hub's client raises its own, the network's and the file system's
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise FileNotFoundError(
            f"no model at {source}: there is no such path, and the hub gave none ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a folder or file"
        ) from error
    return folder


def convert(
    source: str | Path, out: str | Path, half: bool = False, prediction: str | None = None, weights: str = "ema"
) -> Contents:
    """Read what others wrote, pickles too, and write a checkpoint folder of ours.

    Args:
        source: as for :func:`read`, or a hub id.
        out: a folder that does not exist yet.
        half: weights in float16.
        prediction: what the UNet returns, if the source does not say.
        weights: ``"ema"`` or ``"raw"``.

    Returns:
        What was written.

    Raises:
        ValueError: for what cannot be read, and if half precision cannot hold a weight.
        FileNotFoundError: if there is nothing at ``source``.
    """
    path, target = Path(source), Path(out)
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    if not path.exists():
        path = fetch(str(source)) or path
    if not path.exists():
        raise FileNotFoundError(f"no model at {source}: give a diffusers folder, a .safetensors, a .ckpt or a hub id")
    if not is_foreign(path):
        raise ValueError(f"{path} is neither a diffusers folder nor a single file; nothing to convert")
    parts = _parts_of(path)
    contents, _ = read(path, weights, parts, prediction, pickles=True)
    if half:
        _halve(contents)
    checkpoint.save(target, contents)
    return contents


def _parts_of(path: Path) -> tuple[str, ...] | None:
    """None for a whole model; else which part of one a folder holds."""
    if path.is_file() or (path / diffusers.INDEX).is_file():
        return None
    return ("autoencoder", "text_encoder")


def _halve(contents: Contents) -> None:
    for name, module in contents.components.items():
        for parameter_name, parameter in module.named_parameters():
            largest = parameter.abs().max().item()
            if largest > torch.finfo(torch.float16).max:
                raise ValueError(f"half=true: {name}.{parameter_name} reaches {largest:.3g}, more than float16 holds")
            parameter.data = parameter.data.half()  # buffers keep theirs: the latent scale is one number, and exact
