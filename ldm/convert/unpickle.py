"""Reading a pickle of ``torch.save`` without running what is in it.

A pickle is a program: it names functions and calls them. Here a name means something only if it is in a closed list,
and what it means then is ours: tensors become notes of where their numbers lie in the file, objects of Lightning and
NumPy become empty stand-ins. Any other name ends the reading and is named. torch.load is not used: an environment
variable turns its safe mode off, and that mode refuses the stand-ins which checkpoints of CompVis need.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ldm.convert.tensors import Shape, Source, is_pickle

_TYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Found in honest checkpoints beside the weights. What they name is never imported: it becomes an empty object.
_STAND_INS = {
    "torch": "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool complex64 Size device",
    "builtins": "set frozenset complex bytearray dict list tuple int float bool str object slice range",
    "collections": "defaultdict Counter", "pathlib": "PosixPath WindowsPath", "argparse": "Namespace",
    "numpy": "dtype ndarray float32 float64 int64 bool_", "_codecs": "encode", "copyreg": "_reconstructor",
    "numpy.core.multiarray": "scalar _reconstruct", "numpy._core.multiarray": "scalar _reconstruct", "typing": "Any",
}  # fmt: skip
_STAND_IN_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_OPCODES_REFUSED = ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4")  # torch.save writes none
_MEMO_LIMIT = 2**24  # a real checkpoint numbers some hundred thousand objects


class _Refused(ValueError):
    """One line for the user; any other error in a reading means a damaged file."""


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    length: int  # in numbers


class _Lazy(NamedTuple):
    """A tensor that has not been read: a view of a storage."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


class _Reader(pickle.Unpickler):
    """An unpickler that knows a closed list of names."""

    def __init__(self, file: IO[bytes], label: str) -> None:
        super().__init__(file, encoding="latin1")
        self.file, self.label = file, label

        # A class and functions of their own for each reading: a pickle may set attributes of what it can name.
        class StandIn(dict[Any, Any]):
            """Takes whatever a pickle does to an object, and keeps none of it."""

            def __init__(self, *arguments: Any) -> None:
                super().__init__()

            def __hash__(self) -> int:  # type: ignore[override]
                return id(self)

            def __setstate__(self, *given: Any) -> None: ...

            __setitem__ = append = extend = add = __setstate__

        def rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Lazy:
            whole = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *stride))
            if not whole or not isinstance(storage, _Storage):
                raise ValueError("a tensor in it is described by something else than whole numbers")
            reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
            if all(shape) and reach > storage.length:
                raise ValueError("a tensor in it reaches beyond its storage")
            return _Lazy(storage, offset, tuple(shape), tuple(stride))

        self.stand_in = StandIn
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            **{("torch", name): dtype for name, dtype in _TYPES.items()},
        }

    def load(self) -> Any:
        """The object of one pickle; the file is left behind it."""
        start = self.file.tell()
        # A few bytes may ask for gigabytes, by a length or an object's number: looked at before anything is made.
        for opcode, argument, _ in pickletools.genops(self.file):
            far = "PUT" in opcode.name and isinstance(argument, int) and argument > _MEMO_LIMIT
            if far or opcode.name in _OPCODES_REFUSED:
                raise ValueError(f"{opcode.name} {argument!r}"[:80])
        self.file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        # Files of torch.save write some names as Python 2 knew them.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        if name in _STAND_INS.get(module, "").split() or module.startswith(_STAND_IN_PACKAGES):
            return self.stand_in
        raise _Refused(
            f"{self.label} is refused: its pickle asks for {module}.{name}, which no weights need, and which could run "
            "code; nothing was run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, key, _, int(count), *_):
                return _Storage(str(key), dtype, count)
        raise _Refused(f"{self.label} is refused: it refers to {str(pid)[:80]!r}, which is no storage of torch")


def open_pickle(path: Path) -> Source:
    """The tensors of a file of ``torch.save``, or of its ``state_dict``, not read yet.

    Raises:
        ValueError: if it is no pickle, is damaged, or asks for anything but tensors; what it asks for is named.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if not is_pickle(head):
        raise ValueError(f"{path} is no file of torch.save by its first bytes; safetensors files end in .safetensors")
    try:
        value, read = _open_zip(path)
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is damaged or cut short ({type(error).__name__}: {error}); fetch it again") from error
    found = value.get("state_dict", value) if isinstance(value, dict) else {}
    held = found.items() if isinstance(found, dict) else ()
    tensors = {name: tensor for name, tensor in held if isinstance(tensor, _Lazy)}
    if not tensors or any(not isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no tensors by name; give a checkpoint with a state_dict")

    def tensor(name: str) -> Tensor:
        lazy = tensors[name]
        try:
            data = read(lazy.storage.key)
            if len(data) != lazy.storage.length * lazy.storage.dtype.itemsize:
                raise ValueError(f"{len(data)} bytes for {lazy.storage.length} numbers")
        except Exception as error:  # as above
            raise ValueError(f"{path} is damaged: {name} cannot be read ({error}); fetch it again") from error
        if not len(data):
            return torch.empty(lazy.shape, dtype=lazy.storage.dtype)
        flat = torch.frombuffer(data, dtype=lazy.storage.dtype)
        return flat.as_strided(lazy.shape, lazy.stride, lazy.offset).contiguous()

    return Source(str(path), {name: lazy.shape for name, lazy in tensors.items()}, tensor, (path,))


def _open_zip(path: Path) -> tuple[Any, Callable[[str], Any]]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:  # four pickles in a row: one of them may have something to hide
            for _ in range(4):
                _Reader(file, str(path)).load()
        raise _Refused(f"{path} is of before torch 1.6, which wrote no zip; save it again with a newer torch")
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused(f"{path} is a zip file, but none of torch.save: it holds {len(pickles)} data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _Refused(f"{path} is a compressed zip, which torch.save never writes and which could unfold without end")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise _Refused(f"{path} was written on a machine of the other byte order; save it again on this kind")
    value = _Reader(io.BytesIO(archive.read(pickles[0])), str(path)).load()
    return value, lambda key: bytearray(archive.read(f"{root}data/{key}"))
