"""What made a picture, in a text chunk of its PNG; and where it was made: code, versions, machine."""

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CHUNK = "ldm"
MAX_PIXELS = 64_000_000  # of a picture that is read: a small PNG can unfold to gigabytes
_PACKAGES = ("latent-diffusion-lab", "torch", "numpy", "transformers", "tokenizers", "safetensors", "pillow",
             "torchmetrics", "pytorch-lightning")  # fmt: skip


def environment() -> dict[str, Any]:
    """Where this process runs, as plain values, without the name of a person, a host or a folder.

    Returns:
        ``git``: commit of the code and whether it is dirty, None outside a repository; ``versions`` of Python and
        packages; ``machine``, with the names of all its GPUs, which wakes them.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    return {"git": _git(), "versions": versions, "machine": {**_machine(), "gpus": gpus}}


def origin() -> dict[str, Any]:
    """What a capsule says beside prompt, seed and settings: whatever else may change a pixel."""
    git = _git()
    commit = {} if git is None else {"commit": git["commit"] + "+changes" * git["dirty"]}
    versions = {"ldm": _version("latent-diffusion-lab"), **commit, "torch": torch.__version__}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    return {"versions": versions, "machine": {**_machine(), **gpu}}


def write_png(path: Path, image: Image.Image, capsule: dict[str, Any]) -> None:
    """Write a PNG with its capsule: beside its target, then renamed, so that no half file is ever seen."""
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps({**capsule, **origin()}, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.partial")
    image.save(temporary, "PNG", pnginfo=info)
    os.replace(temporary, path)


def read_png(path: str | Path) -> dict[str, Any]:
    """The capsule of a PNG.

    Raises:
        FileNotFoundError: no file there.
        ValueError: the file is no PNG, is damaged, or carries no capsule.
    """
    return open_png(path)[0]


def open_png(path: str | Path) -> tuple[dict[str, Any], Image.Image]:
    """The capsule of a PNG and its pixels, RGB; raises as :func:`read_png`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}; give a PNG that ldm sample wrote")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, at most {MAX_PIXELS:,} are read")
            text = getattr(image, "text", {}).get(CHUNK)
            pixels = image.convert("RGB")
        capsule = None if text is None else json.loads(text)
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a PNG ({error}); give one that ldm sample wrote") from error
    if not isinstance(capsule, dict):
        raise ValueError(f"{path} carries no settings; only pictures that this program wrote do")
    return capsule, pixels


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # not installed, or run from a source tree that never was
        return "unknown"


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@cache
def _git() -> dict[str, Any] | None:
    """Commit of the repository that holds this file, and whether a tracked file differs from it; None without one."""
    here = Path(__file__).resolve().parent
    try:
        said = [subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
                for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"],
                                ["ls-files", "--error-unmatch", "provenance.py"])]  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(answer.returncode for answer in said):  # no repository, or one that only surrounds an installed copy
        return None
    return {"commit": said[0].stdout.strip(), "dirty": bool(said[1].stdout.strip())}
