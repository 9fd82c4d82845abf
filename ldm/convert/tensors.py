"""Named tensors in a file of others, and how a module of ours is strictly filled from them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from ldm import checkpoint
from ldm.autoencoder import Autoencoder
from ldm.checkpoint import Shape
from ldm.convert.names import naming

Part = TypeVar("Part", bound=nn.Module)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SD_SCALE = 0.18215  # 1 / standard deviation of SD's raw latents


@dataclass(frozen=True)
class Source:
    """Tensors by name, none of them read yet."""

    label: str  # where they are, for messages
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]  # one tensor by its name, on the CPU
    files: tuple[Path, ...]
    notes: Mapping[str, str] = field(default_factory=dict)  # plain values from a file's header

    def renamed(self, rename: Callable[[str], str | None]) -> Source:
        """The same tensors under other names, without those that get None; ValueError if two get one name."""
        old: dict[str, str] = {}
        for name in self.shapes:
            new = rename(name)
            if new in old:
                raise ValueError(f"{self.label} holds {old[new]} and {name}, which are one tensor; it must hold one")
            if new is not None:
                old[new] = name
        shapes = {new: self.shapes[name] for new, name in old.items()}
        return replace(self, shapes=shapes, read=lambda new: self.read(old[new]))

    def under(self, prefix: str) -> Source:
        """The tensors whose names begin with ``prefix``, without it."""
        found = self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
        return replace(found, label=f"{self.label}: {prefix}*")


def open_safetensors(*paths: Path) -> Source:
    """The tensors of a safetensors file or of its shards, mapped; ValueError if one is a pickle or damaged."""
    shapes: dict[str, Shape] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for path in paths:
        with path.open("rb") as file:
            if is_pickle(file.read(4)):
                raise ValueError(f"{path} is a pickle, whatever its name says; use: ldm convert {path} OUT")
        try:
            opened = safetensors.safe_open(path, framework="pt")
            for name in opened.keys():  # noqa: SIM118
                shapes[name], readers[name] = tuple(opened.get_slice(name).get_shape()), opened.get_tensor
            notes = opened.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    label = str(paths[0] if len(paths) == 1 else paths[0].parent)
    return Source(label, shapes, lambda name: readers[name](name), paths, notes)


def is_pickle(head: bytes) -> bool:
    """Whether a file's first bytes are those of ``torch.save``, zipped or plain, or of any newer pickle."""
    return head.startswith(b"PK\x03\x04") or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


# What honest checkpoints hold beside their weights. None of it is imported: each becomes a stand-in.
_HONEST = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..*"
    r"|builtins\.(frozenset|dict|list|tuple|int|float|bool|str|object|slice|range)"
    r"|collections\.defaultdict|pathlib\.(Posix|Windows)Path|argparse\.Namespace|copyreg\._reconstructor|typing\.Any"
    r"|numpy\.(dtype|ndarray|float32|float64|int64|bool_|_?core\.multiarray\.(scalar|_reconstruct))"
)


class _StandIn:
    """Takes whatever a pickle does to an object, and keeps none of it."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Refused(ValueError):
    """One line for the user; any other error in a reading means a damaged file."""


def open_pickle(path: Path) -> Source:
    """The tensors of a file of ``torch.save``, or of its ``state_dict``; nothing in the file is run.

    A pickle is a program: it names functions and calls them. Torch's reader knows a closed list of names, with which
    tensors are made; those of :data:`_HONEST` mean an empty stand-in here, and any other ends the reading.

    Raises:
        ValueError: if it is no pickle, is damaged, or asks for anything but tensors; what it asks for is named.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if not is_pickle(head):
        raise ValueError(f"{path} is no file of torch.save by its first bytes; safetensors files end in .safetensors")
    if not head.startswith(b"PK"):
        raise ValueError(f"{path} is of before torch 1.6 (no zip) and was not read; save it again with a newer torch")
    try:
        value = _unpickle(path)
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path} is damaged or cut short ({reason}); fetch it again") from error
    found = value.get("state_dict", value) if isinstance(value, dict) else {}
    held = found.items() if isinstance(found, dict) else ()
    tensors = {name: tensor for name, tensor in held if isinstance(tensor, Tensor)}
    if not tensors or any(not isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no tensors by name; give a checkpoint with a state_dict")
    plain = {name for name, t in tensors.items() if t.layout == torch.strided and t.device.type == "cpu"}
    if odd := sorted(tensors.keys() - plain):
        raise ValueError(f"{path}: {odd[0]} is no plain tensor; give a checkpoint of plain weights")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    own = torch.contiguous_format  # of memory of its own
    return Source(str(path), shapes, lambda name: tensors[name].detach().clone(memory_format=own), (path,))


def _unpickle(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise _Refused(f"{path} is a compressed zip, which torch.save never writes: it could unfold without end")
        if damaged := archive.testzip():  # torch checks no sums
            raise ValueError(f"the checksum of {damaged} is another")
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if refused := sorted(name for name in asked if not _HONEST.fullmatch(name)):
        asks = ", ".join(refused)[:200]
        raise _Refused(
            f"{path} is refused: its pickle asks for {asks}, which no weights need, and which could run code; nothing "
            "was run"
        )
    with torch.serialization.safe_globals([(_StandIn, name) for name in asked]):
        # Said outright, weights_only=True is not undone by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or no JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def build(
    kind: type[Part], arguments: Mapping[str, Any], source: Source, column: int, ignored: str = "", scale: float = 1.0
) -> Part:
    """A module of ours with the weights of others, in their own type: every tensor once, and none left over.

    ``column`` says whose names they have; ``ignored`` is a regular expression over names of what no model needs;
    ``scale`` is that of an autoencoder's latents, the same for all channels: z = scale · m.

    Raises:
        ValueError: listing what is missing, unexpected, of another shape, of a type that is no float or not finite.
    """
    with torch.device("meta"):
        module = kind(**arguments)
    weights: dict[str, Tensor] = {}
    if isinstance(module, Autoencoder):
        mean = torch.zeros(module.latent_channels)
        weights = {"latent_mean": mean, "latent_std": torch.full_like(mean, 1.0 / scale)}
    held = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in weights}
    theirs = naming(module, column)
    wanted = {theirs(name): (name, shape) for name, shape in held.items()}
    found = {name: shape for name, shape in source.shapes.items() if name in wanted or not re.fullmatch(ignored, name)}
    if isinstance(module, Autoencoder):  # its attention is linear maps in some files, 1×1 convolutions in others
        matrices = {name for name, (_, shape) in wanted.items() if len(shape) == 2}
        found |= {name: found[name][:2] for name in matrices & found.keys() if found[name][2:] == (1, 1)}
    expected = {name: shape for name, (_, shape) in wanted.items()}
    checkpoint.check_fit(expected, found, f"{source.label}, as {kind.__name__},")
    for name, (ours, shape) in wanted.items():
        tensor = source.read(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{source.label}: {name} is of {tensor.dtype}; weights must be of 16 bits or more")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.label}: {name} holds NaN or infinite values; take weights of higher precision")
        weights[ours] = tensor.reshape(shape)
    checkpoint.assign(module, weights, source.label)
    return module
