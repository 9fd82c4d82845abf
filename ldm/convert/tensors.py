"""Named tensors in a file of others, read one at a time, and how a module of ours is strictly filled from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ldm import checkpoint

Shape = tuple[int, ...]
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """Tensors by name, none of them read yet.

    Attributes:
        label: the path, for messages.
        shapes: shape of each tensor.
        read: one tensor by its name, on the CPU.
        files: where they are.
        notes: plain values from a file's header.
    """

    label: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]
    files: tuple[Path, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, rename: Callable[[str], str]) -> Source:
        """The same tensors under other names.

        Raises:
            ValueError: if two tensors get one name.
        """
        old: dict[str, str] = {}
        for name in self.shapes:
            new = rename(name)
            if new in old:
                raise ValueError(f"{self.label} holds {old[new]} and {name}, which are one tensor; it must hold one")
            old[new] = name
        shapes = {new: self.shapes[name] for new, name in old.items()}
        return Source(self.label, shapes, lambda new: self.read(old[new]), self.files, self.notes)

    def under(self, prefix: str) -> Source:
        """The tensors whose names begin with ``prefix``, without it."""
        shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        return Source(self.label, shapes, lambda name: self.read(prefix + name), self.files, self.notes)


def open_safetensors(path: Path) -> Source:
    """The tensors of a safetensors file, mapped into memory and not copied.

    Raises:
        ValueError: if it is a pickle, or damaged.
    """
    with path.open("rb") as file:
        if is_pickle(file.read(4)):
            raise ValueError(f"{path} is a pickle, whatever its name says; use: ldm convert {path} OUT")
    try:
        opened = safetensors.safe_open(path, framework="pt")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        notes = opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    return Source(str(path), shapes, opened.get_tensor, (path,), notes)


def open_shards(index: Path) -> Source:
    """The tensors of a sharded file, from its ``*.safetensors.index.json``.

    Raises:
        ValueError: if a shard is missing, or lacks a tensor that the index lists.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or any(not isinstance(name, str) or "/" in name for name in listed.values()):
        raise ValueError(f"{index} lists no weights; fetch it again")
    shards = {}
    for name in sorted(set(listed.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing, though {index.name} lists it; fetch it again")
        shards[name] = open_safetensors(index.parent / name)
    held = {name: shard for shard in shards.values() for name in shard.shapes}
    if held.keys() != listed.keys():
        odd = sorted(held.keys() ^ listed.keys())
        raise ValueError(f"{index} and its shards disagree about {_some(odd)}; fetch them again")
    return Source(
        str(index.parent),
        {name: shard.shapes[name] for name, shard in held.items()},
        lambda name: held[name].read(name),
        tuple(path for shard in shards.values() for path in shard.files),
    )


def is_pickle(head: bytes) -> bool:
    """Whether a file's first bytes are those of ``torch.save``, zipped or plain, or of any newer pickle."""
    return head.startswith(b"PK\x03\x04") or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; the folder is incomplete") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def fill(
    module: nn.Module,
    source: Source,
    theirs: Callable[[str], str],
    own: Mapping[str, Tensor] | None = None,
    ignored: str = "",
    pointwise: bool = False,
) -> None:
    """Give a module that was built on "meta" its weights, in their own type: every tensor once, and none left over.

    Args:
        module: of ours.
        source: theirs.
        theirs: our name → theirs.
        own: values that we know and they do not hold.
        ignored: a regular expression over their names: what training leaves in a file and no model needs.
        pointwise: a linear map of ours may be a 1×1 convolution of theirs.

    Raises:
        ValueError: listing what is missing, unexpected, of another shape, of a type that is no float or not finite.
    """
    own = own or {}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in own}
    wanted = {name: theirs(name) for name in expected}
    faults = [f"missing {name}" for name in wanted.values() if name not in source.shapes]
    left = source.shapes.keys() - set(wanted.values())
    faults += [f"unexpected {name}" for name in left if not (ignored and re.fullmatch(ignored, name))]
    for name, their in wanted.items():
        shape = source.shapes.get(their, expected[name])
        if shape != expected[name] and not (pointwise and len(shape) == 4 and shape == (*expected[name], 1, 1)):
            faults.append(f"{their} is {shape}, not {expected[name]}")
    if faults:
        raise ValueError(f"{source.label} does not fit {type(module).__name__}: {_some(sorted(faults))}")
    weights = dict(own)
    for name, their in wanted.items():
        tensor = source.read(their)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{source.label}: {their} is of {tensor.dtype}; weights must be of 16 bits or more")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.label}: {their} holds NaN or infinite values; take weights of higher precision")
        weights[name] = tensor.reshape(expected[name])
    checkpoint.assign(module, weights, source.label)


def _some(names: list[str]) -> str:
    return "; ".join(names[:20]) + (f" ({len(names)} in all)" if len(names) > 20 else "")
