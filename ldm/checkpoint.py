"""One safe on-disk format (DESIGN: on disk): a folder of safetensors with a manifest that is written last.

Reading runs nothing from the folder: weights are safetensors, the manifest is JSON, classes come from the table
below, and a training's ``state.pt`` is read with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.text import TextEncoder
from ldm.unet import UNet

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.pt"
CLASSES: dict[str, type[nn.Module]] = {"Autoencoder": Autoencoder, "TextEncoder": TextEncoder, "UNet": UNet}
Shape = tuple[int, ...]


class DamagedCheckpoint(UserWarning):
    """The newest checkpoint of a run is damaged, and an earlier one was taken."""


@dataclass
class Contents:
    """What a checkpoint holds."""

    components: dict[str, nn.Module]  # unet, autoencoder, text_encoder, with the weights to use: EMA's if any
    raw: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)  # their weights as the optimiser has them
    tensors: dict[str, Tensor] = field(default_factory=dict)  # what else the model needs, e.g. null_context
    settings: dict[str, Any] = field(default_factory=dict)  # prediction, schedule, grid, guidance, size, data cursor


def save(
    folder: str | Path,
    contents: Contents,
    state: dict[str, Any] | None = None,  # a training's: tensors and primitives alone
    share: Path | None = None,  # another checkpoint; a file that both hold is linked to, not written again
    shards: dict[str, Any] | None = None,  # size and sha256 of what lies in the partial folder already, by name
) -> None:
    """Write a checkpoint: beside its target, fsynced, manifest last, renamed; an old one there goes afterwards.

    Raises:
        ValueError: if a tensor is not finite; nothing is written then.
        OSError: if it cannot be written; what was begun is taken away, and what was there stays.
    """
    target = Path(folder)
    tensors = {f"{name}.safetensors": dict(module.state_dict()) for name, module in contents.components.items()}
    tensors |= {f"{name}.raw.safetensors": dict(weights) for name, weights in contents.raw.items()}
    tensors |= {"tensors.safetensors": contents.tensors} if contents.tensors else {}
    tensors = {file: weights for file, weights in tensors.items() if not listed(shards or {}, file)}
    for file, weights in tensors.items():
        check_finite(weights, f"{target}/{file}")
    check_finite(dict(_tensors_in(state or {}, STATE)), str(target))
    with writing(target) as part:
        if shards is None:
            shutil.rmtree(part, ignore_errors=True)  # of a killed process
            part.mkdir(parents=True)
        _fill(part, contents, tensors, state, _shareable(share), dict(shards or {}))
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """The folder in which a checkpoint is written; a fault takes it away, and one of the disk becomes a line."""
    part = target.with_name(f".{target.name}.partial")
    try:
        yield part
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        if isinstance(error, RuntimeError) and shutil.disk_usage(target.parent).free < 2**20:
            reason = os.strerror(errno.ENOSPC)  # torch.save hides it behind a position that it did not expect
        shutil.rmtree(part, ignore_errors=True)
        if reason is None or isinstance(error, ValueError):  # it is a line already
            raise
        raise OSError(f"checkpoint {target} could not be written: {reason}; those before it are untouched") from error


def _fill(
    part: Path, contents: Contents, tensors: Any, state: Any, shared: Mapping[str, Path], files: dict[str, Any]
) -> None:
    """All files of a checkpoint but for ``files``, the manifest last."""
    for file, weights in tensors.items():
        files[file] = put(part / file, weights, shared)
    for name, module in contents.components.items():
        if isinstance(module, TextEncoder):
            file = f"{name}.tokenizer.json"
            files[file] = put(part / file, module.tokenizer_json.encode(), shared)
    if state is not None:
        with open(part / STATE, "wb+") as written:
            torch.save(state, written)
            written.flush()
            os.fsync(written.fileno())
            written.seek(0)
            files[STATE] = {"sha256": hashlib.file_digest(written, "sha256").hexdigest(), "size": written.tell()}
    classes = {n: {"class": type(m).__name__, "arguments": m.arguments} for n, m in contents.components.items()}
    manifest = {
        "format": FORMAT,
        "components": classes,
        "settings": contents.settings,
        "files": files,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    _write(part / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(part)


def _tensors_in(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a training's state, by their place in it."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _tensors_in(value, f"{name}/{key}")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if it cannot be read or is of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {folder}: it holds no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path}: format {manifest['format']}, this code reads {FORMAT}")
        manifest["components"], manifest["files"], manifest["settings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); take another checkpoint") from error
    return manifest


def load(
    folder: str | Path,
    weights: str = "ema",  # those to use; "raw": the optimiser's
    only: tuple[str, ...] | None = None,  # names of components; None takes all
) -> Contents:
    """Read a checkpoint: hashes first, then names, shapes and types, every difference listed.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is missing, damaged or does not fit its class.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; choose ema or raw")
    root, manifest = Path(folder), read_manifest(folder)
    components: dict[str, nn.Module] = {}
    for name, entry in manifest["components"].items():
        if only is not None and name not in only:
            continue
        if entry["class"] not in CLASSES:
            raise ValueError(f"{root}/{MANIFEST}: class {entry['class']!r} of {name} is unknown to this version")
        arguments = dict(entry["arguments"])
        if entry["class"] == "TextEncoder":
            arguments["tokenizer"] = read_verified(root, manifest, f"{name}.tokenizer.json").decode()
        raw = f"{name}.raw.safetensors"
        file = raw if weights == "raw" and listed(manifest["files"], raw) else f"{name}.safetensors"
        # Built without memory, so that loading costs the weights once and no time for their initial values.
        with torch.device("meta"):
            module = CLASSES[entry["class"]](**arguments)
        assign(module, read_tensors(root, manifest, file), f"{root}/{file}")
        components[name] = module.eval()
    tensors = read_tensors(root, manifest, "tensors.safetensors") if "tensors.safetensors" in manifest["files"] else {}
    return Contents(components, tensors=tensors, settings=manifest["settings"])


def assign(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Give a module its weights, strictly, in their own type.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_fit(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    check_finite(weights, source)
    module.load_state_dict(weights, strict=True, assign=True)
    # Position ids and the like are no weights: they are not on disk, and a module built on "meta" lacks them.
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                fresh = torch.arange(buffer.shape[-1]) if name == "position_ids" else torch.zeros(buffer.shape[-1])
                owner.register_buffer(name, fresh.to(buffer.dtype).expand(buffer.shape), persistent=False)
    module.requires_grad_(False)


def check_fit(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Raise ValueError listing the first twenty tensors that are missing, unexpected or of another shape."""
    faults = [f"missing {name}" for name in expected.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    faults += [f"{n} is {found[n]}, not {expected[n]}" for n in found if expected.get(n, found[n]) != found[n]]
    if faults:
        raise ValueError(f"{source} does not fit: {'; '.join(sorted(faults)[:20])} ({len(faults)} in all)")


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values; take an earlier checkpoint")


def listed(files: Iterable[str], file: str) -> list[str]:
    """The names under which a manifest lists a file: its own, or those of its shards, in their order."""
    return sorted(n for n in files if n == file or n.startswith(f"{file.removesuffix('.safetensors')}.shard-"))


def read_tensors(root: Path, manifest: dict[str, Any], file: str) -> dict[str, Tensor]:
    """Tensors of a verified safetensors file, or of its shards, which hold chunks of their first dimension."""
    found: dict[str, list[Tensor]] = {}
    try:
        for part in listed(manifest["files"], file) or [file]:
            for name, tensor in safetensors.torch.load(read_verified(root, manifest, part)).items():
                found.setdefault(name, []).append(tensor)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{root}/{file} is no safetensors file, nor shards of one ({error})") from error


def read_state(folder: str | Path) -> dict[str, Any]:
    """The training state of a checkpoint, verified; holds tensors and primitives alone."""
    manifest = read_manifest(folder)
    if STATE not in manifest["files"]:
        raise ValueError(f"{folder} holds no training state: it can be sampled, but not resumed; use init={folder}")
    data = read_verified(Path(folder), manifest, STATE)
    try:  # said outright, weights_only=True is not undone by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD (tests/test_security.py)
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "it is damaged")
        raise ValueError(f"{folder}/{STATE} is refused, and nothing in it was run: {reason}") from error
    return state


def read_verified(root: Path, manifest: dict[str, Any], file: str) -> bytes:
    """Bytes of a file of the checkpoint, whose size and sha256 are those of the manifest."""
    if file not in manifest["files"]:
        raise ValueError(f"{root}/{MANIFEST} lists no {file}; the checkpoint is incomplete")
    try:
        data = (root / file).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{root}/{file} is missing; the checkpoint is incomplete, take another") from error
    found, listed = _describe(data), manifest["files"][file]
    if found != listed:
        what = "sha256" if found["size"] == listed["size"] else f"size {found['size']} for {listed['size']}"
        raise ValueError(f"{root}/{file} is damaged (its {what} is not the manifest's); take another checkpoint")
    return data


def verify(folder: str | Path) -> None:
    """Check every file of a checkpoint against its manifest; ValueError or FileNotFoundError names the first fault."""
    manifest = read_manifest(folder)
    for file in manifest["files"]:
        read_verified(Path(folder), manifest, file)


def newest(run: str | Path) -> Path:
    """The newest complete checkpoint of a run folder; a damaged one is passed over for the one before.

    Raises:
        FileNotFoundError: if the run holds none.
        ValueError: if every one is damaged, saying what is wrong with the newest.
    """
    found = sorted(Path(run, "checkpoints").glob("step-*"), reverse=True)
    fault: Exception = FileNotFoundError(f"no checkpoint in {run}/checkpoints; has the training saved one yet?")
    for i, folder in enumerate(found):
        try:
            verify(folder)
        except (ValueError, FileNotFoundError) as error:
            fault = error if i == 0 else fault
            continue
        if i:
            warnings.warn(f"{fault}: took {folder.name}, {i} before the newest", DamagedCheckpoint, stacklevel=2)
        return folder
    raise fault


def _describe(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _shareable(folder: Path | None) -> dict[str, Path]:
    """Files of another checkpoint by their sha256."""
    if folder is None or not (folder / MANIFEST).is_file():
        return {}
    files = read_manifest(folder)["files"]
    return {entry["sha256"]: folder / name for name, entry in files.items() if (folder / name).is_file()}


def put(path: Path, content: bytes | Mapping[str, Tensor], shared: Mapping[str, Path]) -> dict[str, Any]:
    """Write or link a file, tensors as safetensors; returns its size and sha256."""
    if not isinstance(content, bytes):
        content = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in content.items()})
    entry = _describe(content)
    try:
        os.link(shared[entry["sha256"]], path)
    except (KeyError, OSError):  # not there, or on another file system
        _write(path, content)
    return entry


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
