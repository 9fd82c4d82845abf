"""Shards: WebDataset tars with an index beside each (DESIGN: on disk); how they are written and checked.

A shard holds, sample after sample, ``key.webp|png|jpg|jpeg``, ``key.txt`` and optionally ``key.json``. Its index,
``NAME.tar.index.json``, gives each member's offset, size and sha256, so that any sample can be read at once and
damage is seen when it is read (``ldm/data/dataset.py``), and each image's height and width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ldm.data.transforms import MAX_PIXELS, promised_size

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

Members = dict[str, tuple[int, bytes]]  # of a sample, by extension: where in the tar the bytes begin, and the bytes


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its target, fsync it, rename it: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write a tar of (key, {extension: content}), keys rising, and its index; the same samples give the same bytes."""
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
    write_atomically(index_path(path), index_bytes(index))


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def index_bytes(index: dict[str, Any]) -> bytes:
    """An index as it is on disk."""
    return json.dumps(index, indent=0).encode()


def build_index(shard: Path, skip: bool = False) -> dict[str, Any]:
    """Check a shard, write its index beside it and return it; see :func:`scan`."""
    index = scan(shard, skip)
    write_atomically(index_path(shard), index_bytes(index))
    return index


def scan(shard: Path, skip: bool = False) -> dict[str, Any]:
    """Read a whole tar and return its index; with ``skip``, a sample without a caption is under "skipped" alone.

    Raises:
        ValueError: naming shard and key; see :func:`read_samples`.
    """
    if not shard.is_file():
        raise FileNotFoundError(f"no shard at {shard}; give a WebDataset tar")
    skipped: list[str] | None = [] if skip else None
    samples = []
    with open(shard, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        for key, members in read_samples(file, str(shard), skipped):
            places = {e: [at, len(data), hashlib.sha256(data).hexdigest()] for e, (at, data) in members.items()}
            height, width = next(promised_size(data) for e, (_, data) in members.items() if e in IMAGES)
            samples.append({"key": key, "height": height, "width": width, "members": places})
        size = file.tell()
    if not samples:
        raise ValueError(f"{shard}: holds no sample; each is KEY.webp|png|jpg and KEY.txt")
    index = {"format": FORMAT, "size": size, "sha256": whole, "samples": samples}
    return {**index, "skipped": skipped} if skipped else index


def read_samples(file: IO[bytes], name: str, skipped: list[str] | None = None) -> Iterator[tuple[str, Members]]:
    """Key and members of every sample of an open tar, each checked as it comes; a stream will do.

    The headers are read here, not by ``tarfile``, which ends silently where a tar is cut, zeroed or garbled, and
    unpacks what is compressed.

    Args:
        file: read forwards alone.
        name: what an error calls it.
        skipped: where given, samples without a caption are left out, and their keys are put here.

    Raises:
        ValueError: naming shard and key, for a damaged tar, a member that is no plain file, an unknown extension, a
            key that is dotted, repeated, out of order or leads elsewhere, a sample without image or caption, what is
            larger than the limits.
    """
    offset, last, key = 0, "the beginning", ""
    members: Members = {}

    def take(size: int) -> bytes:
        nonlocal offset
        data = file.read(size)
        offset += len(data)
        if len(data) < size:
            raise ValueError(f"{name}: cut at byte {offset}, after {last}; copy the shard again")
        return data

    while any(block := take(_BLOCK)):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name}: garbled header at byte {offset - _BLOCK}, after {last} ({error}): no plain tar, or damaged; "
                "copy the shard again"
            ) from error
        if info.type in _PAX and 0 <= info.size <= MAX_TEXT_BYTES:  # webdataset's TarWriter puts one before each file
            if re.search(rb"(^|\n)\d+ (path|size|GNU\.sparse[^=]*)=", take(info.size)):
                raise ValueError(f"{name}: a name over 100 bytes or a sparse file after {last}; shorten the key")
            take(-info.size % _BLOCK)
            continue
        new, extension = _check_member(name, info, key, members)
        if new != key:
            if members and _complete(name, key, members, skipped):
                yield key, members
            key, members = new, {}
        begin, last = offset, info.name
        data = take(info.size)
        _check_content(name, info.name, extension, data)
        if any(take(-info.size % _BLOCK)):
            raise ValueError(f"{name}: the padding after {info.name} is not zero: damaged; copy the shard again")
        members[extension] = begin, data
    take(_BLOCK)  # the second half of the end-of-archive mark
    while chunk := file.read(2**20):
        if any(chunk):
            raise ValueError(f"{name}: a hole at byte {offset}, after {last}: more data follow; copy the shard again")
    if members and _complete(name, key, members, skipped):
        yield key, members


def _check_member(name: str, info: tarfile.TarInfo, last: str, members: Members) -> tuple[str, str]:
    """Key and extension of a member that keeps the rules."""
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"{name}: {info.name} is no plain file; only those are read")
    key, _, extension = info.name.rpartition(".")
    if extension not in EXTENSIONS:
        raise ValueError(f"{name}: {info.name} has an unknown extension; the rule is one of {', '.join(EXTENSIONS)}")
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{name}: key {key!r} is refused; the rule is letters, digits, '_', '-', with '/' between (no dots)"
        )
    limit = MAX_MEMBER_BYTES if extension in IMAGES else MAX_TEXT_BYTES
    if not 0 <= info.size <= limit:
        raise ValueError(f"{name}: {info.name} has {info.size} bytes; the rule is 0 to {limit}")
    if key < last:
        raise ValueError(f"{name}: key {key} comes after {last}; keys must rise and not repeat")
    if key == last and extension in members:
        raise ValueError(f"{name}: {info.name} is there twice")
    return key, extension


def _check_content(name: str, member: str, extension: str, data: bytes) -> None:
    """Refuse what is visibly zeroed, of another kind or too large; pixels are not decoded: data.on_bad is for those."""
    if extension in IMAGES:
        if math.prod(promised_size(data)) > MAX_PIXELS:
            raise ValueError(f"{name}: {member} has more than {MAX_PIXELS} pixels by its header; make it smaller")
        good = bool(re.match(_MAGIC[extension], data, re.DOTALL)) and _HOLE not in data
    else:
        try:
            text = data.decode("utf-8")
            good = "\0" not in text and (extension == "txt" or _is_meta(json.loads(text)))
        except ValueError:
            good = False
    if not good:
        raise ValueError(f"{name}: {member} is zeroed, damaged or no {extension}; write the sample again")


def _is_meta(meta: Any) -> bool:
    """An object; its ``captions``, where it has some, are texts."""
    captions = meta.get("captions", ["-"]) if isinstance(meta, dict) else None
    return isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)


def _complete(name: str, key: str, members: Members, skipped: list[str] | None) -> bool:
    """Whether a sample is one; if it only lacks its caption and that is allowed, its key goes to ``skipped``."""
    if sum(extension in IMAGES for extension in members) != 1:
        raise ValueError(f"{name}: sample {key} has members {', '.join(members)}; the rule is one image and one .txt")
    if members.get("txt", (0, b""))[1].strip():
        return True
    if skipped is None:
        raise ValueError(
            f"{name}: sample {key} has no caption: its .txt is missing or blank; write one, or leave such samples out "
            "with: ldm index ... skip=true"
        )
    skipped.append(key)
    return False
