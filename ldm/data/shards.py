"""Shards: WebDataset tars with an index beside each, and a reader by index (DESIGN: on disk).

A shard holds, sample after sample, ``key.webp|png|jpg|jpeg``, ``key.txt`` and optionally ``key.json``. Its index,
``NAME.tar.index.json``, gives each member's offset, size and sha256, so that any sample can be read at once and
damage is seen when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
IMAGES = ("webp", "png", "jpg", "jpeg")
EXTENSIONS = (*IMAGES, "txt", "json")
MAX_MEMBER_BYTES = 64 * 2**20  # larger members are refused before they are read
MAX_TEXT_BYTES = 2**20
_BLOCK = 512
_HOLE = bytes(4096)  # a file system's page: what a lost write leaves, and what no image encoder writes
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_MAGIC = {"webp": rb"RIFF....WEBP", "png": rb"\x89PNG\r\n\x1a\n", "jpg": rb"\xff\xd8\xff", "jpeg": rb"\xff\xd8\xff"}
_KEY = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)*")


@dataclass(frozen=True)
class Sample:
    """One image with its caption."""

    key: str  # unique in its data set
    image: bytes  # the encoded file, as stored
    caption: str  # the text of ``key.txt``
    meta: dict[str, Any]  # the object of ``key.json``; empty where there is none


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its target, fsync it, rename it: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write a tar and its index; the same samples give the same bytes.

    Args:
        path: of the tar.
        samples: (key, {extension: content}), in rising order of key.
    """
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples:
                for extension, content in sorted(members.items()):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    try:
        index = scan(temporary)
    except ValueError:
        temporary.unlink()
        raise
    os.replace(temporary, path)
    write_atomically(index_path(path), json.dumps(index, indent=0).encode())


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path) -> dict[str, Any]:
    """Check a shard, write its index beside it and return it; see :func:`scan`."""
    index = scan(shard)
    write_atomically(index_path(shard), json.dumps(index, indent=0).encode())
    return index


def scan(shard: Path) -> dict[str, Any]:
    """Read a whole tar, header by header, and return its index.

    The headers are read here, not by ``tarfile``, which ends silently where a tar is cut, zeroed or garbled.

    Raises:
        ValueError: naming shard and key, for a damaged tar, a member that is no plain file, an unknown extension, a
            key that is dotted, repeated, out of order or leads elsewhere, a sample without image or caption.
    """
    if not shard.is_file():
        raise FileNotFoundError(f"no shard at {shard}; give a WebDataset tar")
    size = shard.stat().st_size
    samples: list[dict[str, Any]] = []
    with open(shard, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        offset = 0
        while True:
            file.seek(offset)
            block = file.read(_BLOCK)
            if len(block) == _BLOCK and not any(block):
                break
            if len(block) < _BLOCK:
                raise ValueError(f"{shard}: cut at byte {offset}: no end-of-archive mark; copy the shard again")
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise ValueError(f"{shard}: garbled header at byte {offset} ({error}); copy the shard again") from error
            start = offset + _BLOCK
            if info.type in _PAX and info.size <= MAX_TEXT_BYTES:  # webdataset's TarWriter puts one before each file
                if re.search(rb"(^|\n)\d+ (path|size|GNU\.sparse[^=]*)=", file.read(info.size)):
                    raise ValueError(
                        f"{shard}: a name over 100 bytes or a sparse file at byte {offset}; shorten the key"
                    )
                offset = start + -(-info.size // _BLOCK) * _BLOCK
                continue
            key, extension = _check_member(shard, info, samples)
            if start + info.size > size:
                raise ValueError(f"{shard}: {info.name} is cut: {size - start} of {info.size} bytes are there")
            file.seek(start)
            data = file.read(info.size)
            _check_content(shard, key, extension, data)
            if any(file.read(-info.size % _BLOCK)):
                raise ValueError(f"{shard}: the padding after {info.name} is not zero: damaged; copy the shard again")
            digest = hashlib.sha256(data).hexdigest()
            if not samples or samples[-1]["key"] != key:
                samples.append({"key": key, "members": {}})
            samples[-1]["members"][extension] = [start, info.size, digest]
            offset = start + -(-info.size // _BLOCK) * _BLOCK
        file.seek(offset)
        if size - offset < 2 * _BLOCK:
            raise ValueError(f"{shard}: cut at byte {size}: half of the end-of-archive mark; copy the shard again")
        while chunk := file.read(2**20):
            if chunk != bytes(len(chunk)):
                raise ValueError(f"{shard}: data after the end mark at byte {offset}: a hole; copy the shard again")
    for sample in samples:
        _check_sample(shard, sample)
    if not samples:
        raise ValueError(f"{shard}: holds no sample; each is KEY.webp|png|jpg and KEY.txt")
    return {"format": FORMAT, "size": size, "sha256": whole, "samples": samples}


def _check_member(shard: Path, info: tarfile.TarInfo, samples: list[dict[str, Any]]) -> tuple[str, str]:
    """Key and extension of a member that keeps the rules."""
    if not info.isreg():
        raise ValueError(f"{shard}: {info.name} is no plain file; only those are read")
    key, _, extension = info.name.rpartition(".")
    if extension not in EXTENSIONS:
        raise ValueError(f"{shard}: {info.name} has an unknown extension; the rule is one of {', '.join(EXTENSIONS)}")
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{shard}: key {key!r} is refused; the rule is letters, digits, '_', '-', with '/' between (no dots)"
        )
    if info.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{shard}: {info.name} has {info.size} bytes; the limit is {MAX_MEMBER_BYTES}")
    if samples and key < samples[-1]["key"]:
        raise ValueError(f"{shard}: key {key} comes after {samples[-1]['key']}; keys must rise and not repeat")
    if samples and key == samples[-1]["key"] and extension in samples[-1]["members"]:
        raise ValueError(f"{shard}: {info.name} is there twice")
    return key, extension


def _check_content(shard: Path, key: str, extension: str, data: bytes) -> None:
    """Refuse what is visibly zeroed or of another kind; pixels are not decoded."""
    if extension in _MAGIC:
        good = bool(re.match(_MAGIC[extension], data, re.DOTALL)) and _HOLE not in data
    else:
        try:
            text = data.decode("utf-8")
            good = "\0" not in text and bool(text.strip())
            good = good and (extension == "txt" or isinstance(json.loads(text), dict))
        except ValueError:
            good = False
    if not good:
        raise ValueError(f"{shard}: {key}.{extension} is zeroed, empty or no {extension}; write the sample again")


def _check_sample(shard: Path, sample: dict[str, Any]) -> None:
    images = [extension for extension in sample["members"] if extension in IMAGES]
    if len(images) != 1 or "txt" not in sample["members"]:
        raise ValueError(
            f"{shard}: sample {sample['key']} has members {', '.join(sample['members'])}; "
            "the rule is one image and one .txt"
        )


class ShardDataset:
    """Samples of one or more shards by number, in the order of their keys; every member is checked as it is read.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an index does not fit its shard, a key is there twice, or one that was asked for is not there.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],  # a folder of tars, a tar, or a list of tars
        keys: Sequence[str] | None = None,  # only these
    ) -> None:
        self.shards = _find(paths)
        entries: dict[str, tuple[int, dict[str, list[Any]]]] = {}
        for number, shard in enumerate(self.shards):
            for sample in read_index(shard)["samples"]:
                if sample["key"] in entries:
                    raise ValueError(f"key {sample['key']} is in {self.shards[entries[sample['key']][0]]} and {shard}")
                entries[sample["key"]] = (number, sample["members"])
        if keys is not None:
            missing = sorted(set(keys) - set(entries))
            if missing:
                raise ValueError(f"{len(missing)} of {len(keys)} keys are in no shard, the first is {missing[0]}")
            entries = {key: entries[key] for key in keys}
        self.keys: list[str] = sorted(entries)
        self._entries = [entries[key] for key in self.keys]
        content = json.dumps(
            [
                [key, sorted((extension, place[2]) for extension, place in members.items())]
                for key, (_, members) in zip(self.keys, self._entries, strict=True)
            ]
        )
        #: Names this data set: a hash over its keys and the hashes of their members.
        self.index_hash = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        shard, members = self._entries[number]
        read = {extension: self._read(shard, extension, number) for extension in members}
        image = next(read[extension] for extension in IMAGES if extension in read)
        meta = json.loads(read["json"]) if "json" in read else {}
        return Sample(self.keys[number], image, read["txt"].decode("utf-8").strip("\n"), meta)

    def image_digest(self, number: int) -> str:
        """The sha256 of an image's file, as the index has it."""
        members = self._entries[number][1]
        return str(next(members[extension][2] for extension in IMAGES if extension in members))

    def _read(self, shard: int, extension: str, number: int) -> bytes:
        offset, size, digest = self._entries[number][1][extension]
        with open(self.shards[shard], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"{self.shards[shard]}: {self.keys[number]}.{extension} is damaged (its sha256 is not the index's); "
                "copy the shard again, or index it anew with: ldm index"
            )
        return data


def _find(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, (str, Path)):
        root = Path(paths)
        found = sorted(root.glob("*.tar")) if root.is_dir() else [root]
        if not found:
            raise FileNotFoundError(f"no *.tar in {root}; make shards with: ldm pack")
    else:
        found = [Path(path) for path in paths]
        if not found:
            raise ValueError("the list of shards is empty; name at least one tar")
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"no shard at {path}; give a tar, a list of tars or a folder of them")
    return found


def read_index(shard: Path) -> dict[str, Any]:
    """The index beside a shard, or that of a scan where there is none."""
    path = index_path(shard)
    if not path.is_file():
        return scan(shard)
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise ValueError(f"{path}: index format {index['format']}, this code reads {FORMAT}; run: ldm index")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index ({error}); make it anew with: ldm index {shard}") from error
    size = shard.stat().st_size
    if size != index["size"]:
        raise ValueError(
            f"{shard}: {size} bytes, its index says {index['size']}: cut or changed; run: ldm index {shard}"
        )
    return index
