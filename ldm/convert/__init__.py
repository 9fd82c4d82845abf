"""Weights of others ↔ ours: diffusers folders, CompVis single files, the hub; and back to a diffusers folder."""

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import torch

from ldm import checkpoint, loading
from ldm.checkpoint import Contents
from ldm.convert import compvis, diffusers
from ldm.convert.diffusers import export_diffusers
from ldm.convert.tensors import PICKLES, open_pickle, open_safetensors, read_json
from ldm.diffusion.prediction import check_prediction

__all__ = ["convert", "export_diffusers", "fetch", "fingerprint", "is_foreign", "read"]

# Weights at the root of a repository are left there unless they are its only part: single files of the whole model.
_HUB_FILES = ["*/*.json", "*/*.txt", "*/*.safetensors", "*.json", "merges.txt", "diffusion_pytorch_model*.safetensors",
              "model*.safetensors"]  # fmt: skip
_HUB_NOT = ["*.non_ema.*", "*flax*", "*onnx*", "*openvino*", "safety_checker/*", "feature_extractor/*"]


def is_foreign(path: Path) -> bool:
    """Whether a path is a file or folder of others: no checkpoint folder of ours."""
    return path.is_file() or any((path / name).is_file() for name in (diffusers.INDEX, "config.json"))


def read(
    path: Path,  # a folder with model_index.json or with the config.json of one part, a .safetensors, a pickle
    weights: str = "ema",  # averaged weights where the source holds both; "raw": the others
    only: tuple[str, ...] | None = None,  # names of components; None takes all
    prediction: str | None = None,  # what the UNet returns, where the caller knows and the source may not say
    pickles: bool = False,  # read files of torch.save, by a closed list of names that runs nothing
) -> tuple[Contents, tuple[Path, ...]]:
    """What a diffusers folder, a CompVis single file or one part of a model holds, and the files it came from.

    Raises:
        ValueError: for anything that is no SD 1.x or 2.x, or does not fit it, in one line.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; choose ema or raw")
    if prediction is not None:
        check_prediction(prediction)
    try:
        if path.is_file():
            if path.suffix in PICKLES and not pickles:
                raise ValueError(f"{path} is a pickle, which could hold more than weights; use: ldm convert {path} OUT")
            source = open_pickle(path) if path.suffix in PICKLES else open_safetensors(path)
            contents, files = compvis.read(source, weights, prediction, only), source.files
        elif (path / diffusers.INDEX).is_file():
            contents, files = diffusers.read(path, weights, only, pickles)
        else:
            kind = read_json(path / "config.json").get("_class_name")
            name = {None: "text_encoder", "AutoencoderKL": "autoencoder"}.get(kind)  # transformers names no class so
            if name is None:
                raise ValueError(f"{path} holds a {kind} alone; give the folder above it, with {diffusers.INDEX}")
            if only is None or name not in only:
                raise ValueError(f"{path} holds only one part of a model; use ldm.load_{name}")
            module, files = diffusers.read_part(path, name, weights, pickles)
            contents = Contents({name: module})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no SD 1.x or 2.x: a setting or tensor is missing or odd ({reason})") from error
    if only is not None:
        return contents, files
    said, parts = contents.settings, cast("dict[str, Any]", contents.components)
    said["prediction"] = prediction or said["prediction"]
    if said["prediction"] == "epsilon" and said["schedule"].get("zero_terminal"):
        raise ValueError(f"{path}: no image is left at its last step, where epsilon says nothing; the rule is v or x0")
    taken, given = parts["unet"].in_channels, parts["unet"].arguments["out_channels"]
    c = parts["autoencoder"].latent_channels
    if taken not in (c, 2 * c + 1) or given != c:
        raise ValueError(
            f"{path}: its UNet takes {taken} channels and gives {given}; the rule is {c}, "
            f"or taking {2 * c + 1} with a mask and a masked picture (inpainting)"
        )
    return contents, files


def fingerprint(files: tuple[Path, ...]) -> str:
    """What tells one model's files from another's: 16 hexadecimal digits of the sha256 of their sha256."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()[:16]


def fetch(source: str) -> Path | None:
    """The folder of a hub id, ``owner/name``, fetched or from the cache; None if ``source`` does not look like one.

    Weights and settings alone are fetched, half precision only where there is nothing else. FileNotFoundError if the
    hub cannot be reached, or holds no such model.
    """
    # A folder of that first name makes it a mistyped path: the hub is not asked.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or Path(source.split("/")[0]).exists():
        return None
    from huggingface_hub import snapshot_download

    try:
        for skipped in ([*_HUB_NOT, "*fp16*"], _HUB_NOT):
            folder = Path(snapshot_download(source, allow_patterns=_HUB_FILES, ignore_patterns=skipped))
            if any(folder.rglob("*.safetensors")):
                break
    except Exception as error:  # the hub's client raises its own, the network's and the file system's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise FileNotFoundError(
            f"no model at {source}: no such path, and the hub gave none ({reason}); check the name and the network"
        ) from error
    return folder


def convert(
    source: str | Path,  # what read takes, or a hub id
    out: str | Path,  # a folder that does not exist yet
    half: bool = False,  # weights in float16
    prediction: str | None = None,  # what the UNet returns, if the source does not say
    weights: str = "ema",  # or "raw"
) -> Contents:
    """Read what others wrote, pickles too, and write a checkpoint folder of ours.

    Raises:
        ValueError: for what cannot be read, and if half precision cannot hold a weight.
        FileNotFoundError: if there is nothing at ``source``.
    """
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    path = loading.find(source)
    if not is_foreign(path):
        raise ValueError(f"{path} is neither a diffusers folder nor a single file; nothing to convert")
    whole = path.is_file() or (path / diffusers.INDEX).is_file()
    contents, _ = read(path, weights, None if whole else ("autoencoder", "text_encoder"), prediction, pickles=True)
    for name, module in contents.components.items() if half else ():
        for parameter_name, parameter in module.named_parameters():
            largest = parameter.abs().max().item()
            if largest > torch.finfo(torch.float16).max:
                raise ValueError(f"half=true: {name}.{parameter_name} reaches {largest:.3g}, more than float16 holds")
            parameter.data = parameter.data.half()  # buffers keep theirs: the latent scale is one number, and exact
    checkpoint.save(target, contents)
    return contents
