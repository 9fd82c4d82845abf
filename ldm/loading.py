"""``ldm.load``: a name or a path → a model."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

import torch

from ldm import averages, checkpoint
from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Contents
from ldm.diffusion import make_path
from ldm.pipeline import Defaults, LatentDiffusion
from ldm.text import TextEncoder
from ldm.unet import UNet

BUNDLED = ("emoji",)


def find(source: str | Path) -> Path:
    """The checkpoint folder of a bundled name, a run folder (its newest good one), or whatever is at a path.

    A name like ``owner/name`` that is no path is asked for at the hub.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    if str(source) in BUNDLED:
        return Path(str(files("ldm") / "assets" / str(source)))
    path = Path(source)
    if (path / "checkpoints").is_dir():
        return checkpoint.newest(path)
    if path.exists():
        return path
    from ldm.convert import fetch

    if fetched := fetch(str(source)):
        return fetched
    raise FileNotFoundError(
        f"no model at {source}: give a bundled name ({', '.join(BUNDLED)}), a run folder, a checkpoint folder, "
        "a diffusers folder, a .safetensors or a hub id"
    )


def read(source: str | Path, weights: str = "ema", only: tuple[str, ...] | None = None) -> tuple[Contents, str]:
    """What a source holds, ours or of others, and 16 hexadecimal digits that tell its weights from any others.

    ``source`` and ``weights`` are those of :func:`load`; ``only`` names components, None takes all.
    """
    path = find(source)
    if not (path / checkpoint.MANIFEST).is_file():
        from ldm import convert  # the ways of other formats are learnt only where one is met

        if convert.is_foreign(path):
            contents, files = convert.read(path, weights, only)
            return contents, "" if only else convert.fingerprint(files)
    kind, _, length = weights.partition(":")
    contents = checkpoint.load(path, weights if kind != "ema" else kind, only)
    if length:
        if not re.fullmatch(r"0?\.\d+", length):
            raise ValueError(f"weights={weights}: the rule is ema, raw, or ema:SIGMA with a length as in ema:0.07")
        if "unet" not in contents.components:
            raise ValueError(f"weights={weights}: averages of other lengths are kept of a UNet alone; take ema or raw")
        folder, step = path.parent.parent / averages.FOLDER, contents.settings.get("cursor", {}).get("step", 0)
        checkpoint.assign(contents.components["unet"], averages.reconstruct(folder, float(length), step), str(folder))
    manifest = (path / checkpoint.MANIFEST).read_bytes()
    return contents, hashlib.sha256(manifest + length.encode()).hexdigest()[:16]


def load(
    source: str | Path,  # a name, a path or a hub id
    weights: str = "ema",  # or "raw"; of a run with ``ema.power``, "ema:0.07" is the average of that σ_rel
    device: str | torch.device | None = None,  # None takes a GPU if there is one
    offload: bool = False,  # text tower and autoencoder wait on the CPU while they are idle: less GPU memory
) -> LatentDiffusion:
    """Load a model, ready to sample.

    ``source`` is a bundled name, a run folder (its newest verified checkpoint), a checkpoint folder; or of others a
    diffusers folder, a CompVis single file (``.safetensors``), a hub id (``owner/name``). Pickles: ``ldm convert``.
    Weights keep their own precision, but half precision on a CPU becomes float32, which is faster and exacter there.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if it is damaged, of another family, or holds no whole model.
    """
    contents, name = read(source, weights)
    parts = contents.components
    if "unet" not in parts:
        raise ValueError(f"{source} holds {', '.join(parts)} but no UNet; for an autoencoder use ldm.load_autoencoder")
    unet, autoencoder, text_encoder = parts["unet"], parts["autoencoder"], parts["text_encoder"]
    assert isinstance(unet, UNet)
    assert isinstance(autoencoder, Autoencoder)
    assert isinstance(text_encoder, TextEncoder)
    device = _device(device)
    dtype = next(unet.parameters()).dtype
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    for module in (unet, autoencoder, text_encoder):
        # Before the empty prompt of a model of others is encoded, in the type of use.
        module.to("cpu" if offload and module is not unet else device, dtype)
    if device.type == "cuda":  # tensor cores read channels last; on a CPU it changes nothing
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    said = contents.settings
    defaults = Defaults(said["grid"], said["guidance_scale"], said["height"], said["width"])
    schedule, null = make_path(said["schedule"]), contents.tensors.get("null_context")
    model = LatentDiffusion(
        unet, autoencoder, text_encoder, schedule, said["prediction"], defaults, null, name=name, offload=offload
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
    """The autoencoder of what :func:`load` takes, of a stage-one run, or alone in a folder or file; on the CPU."""
    part = read(source, weights, only=("autoencoder",))[0].components.get("autoencoder")
    if not isinstance(part, Autoencoder):
        raise ValueError(f"{source} holds no autoencoder; give the run folder of a stage-one training")
    return part.float()


def load_text_encoder(source: str | Path) -> TextEncoder:
    """The text tower of whatever :func:`load` takes, or alone in a folder of transformers; float32, on the CPU."""
    part = read(source, only=("text_encoder",))[0].components.get("text_encoder")
    if not isinstance(part, TextEncoder):
        raise ValueError(f"{source} holds no text tower")
    return part.float()
