"""Samples of shards by number, through their indices; of very large sets through a catalogue of the indices."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.remote import MAX_INDEX_BYTES, Remote, beside, file_name, is_remote, shown
from ldm.data.shards import (
    EXTENSIONS,
    FORMAT,
    IMAGES,
    MAX_MEMBER_BYTES,
    index_bytes,
    index_path,
    scan,
    write_atomically,
)
from ldm.data.transforms import BadSample

CATALOGUE = "catalogue.json"
KEPT = 16  # indices in memory, of a set with a catalogue
_PLACE = np.dtype([("offset", "i8"), ("size", "i4"), ("digest", "V32")])


class Place(NamedTuple):
    """Where a member lies in its tar."""

    offset: int
    size: int  # bytes
    digest: bytes  # sha256


@dataclass(frozen=True)
class Sample:
    """One image with its caption."""

    key: str  # unique in its data set
    image: bytes  # the encoded file, as stored
    caption: str  # the text of ``key.txt``
    meta: dict[str, Any]  # the object of ``key.json``; empty where there is none


class Index:
    """The index of a shard, checked, in 44 bytes a member."""

    def __init__(self, content: bytes, name: str) -> None:
        try:
            read = json.loads(content)
            if read["format"] != FORMAT:
                raise ValueError(f"its format is {read['format']}, this code reads {FORMAT}")
            self.size = int(read["size"])
            self.keys: list[str] = [str(sample["key"]) for sample in read["samples"]]
            self._places: dict[str, np.ndarray] = {}
            for row, sample in enumerate(read["samples"]):
                for extension, (offset, size, digest) in sample["members"].items():
                    inside = 0 <= offset <= offset + size <= self.size and 0 < size <= MAX_MEMBER_BYTES
                    if extension not in EXTENSIONS or not inside:
                        raise ValueError(f"{self.keys[row]}.{extension} is of no known kind, or not in the shard")
                    places = self._places.setdefault(extension, np.zeros(len(self.keys), _PLACE))
                    places[row] = (offset, size, bytes.fromhex(digest))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: not an index ({error}); make it anew with: ldm index") from error

    def places(self, row: int) -> dict[str, Place]:
        """Where the members of a sample lie, by extension."""
        found = {extension: places[row] for extension, places in self._places.items() if places[row]["size"]}
        return {e: Place(int(at["offset"]), int(at["size"]), at["digest"].tobytes()) for e, at in found.items()}


class ShardDataset:
    """Samples of one or more shards by number; every member is checked as it is read.

    The numbers follow the keys. Of a set with a catalogue (``ldm index FOLDER``) they go shard by shard, and an index
    is read when it is first needed: opening costs no more than the list of shards.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an index does not fit its shard, a key is there twice, or one that was asked for is not there.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],  # a folder of tars, a catalogue, a tar, a list of tars; or http(s)
        keys: Sequence[str] | None = None,  # only these
        cache: str | Path | None = None,  # of remote shards: where to keep what was read; None takes ~/.cache/ldm
        cache_bytes: int = 16 * 10**9,  # how much of it
    ) -> None:
        self._remote = Remote(cache, cache_bytes)
        self.shards, self._listed, self._source = _find(paths, self._remote)
        self.indices_kept = KEPT if self._listed else len(self.shards)
        self._indices: OrderedDict[int, Index] = OrderedDict()
        self._chosen: np.ndarray | None = None  # of each number, which sample it is, counted shard by shard
        if self._listed and keys is None:
            counts = [count for count, _ in self._listed]
        else:
            counts = [len(self._index(shard).keys) for shard in range(len(self.shards))]
        self._starts = np.cumsum([0, *counts])
        if not self._listed or keys is not None:
            self._chosen = self._by_key(keys)

    def _by_key(self, keys: Sequence[str] | None) -> np.ndarray:
        found: dict[str, int] = {}
        for shard, name in enumerate(self.shards):
            for sample, key in enumerate(self._index(shard).keys, int(self._starts[shard])):
                if key in found:
                    raise ValueError(f"key {key} is in {shown(self.shards[self._shard(found[key])])} and {shown(name)}")
                found[key] = sample
        missing = sorted(set(keys or ()) - set(found))
        if missing:
            raise ValueError(f"{len(missing)} of {len(keys or ())} keys are in no shard, the first is {missing[0]}")
        return np.array([found[key] for key in sorted(found if keys is None else set(keys))], np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, number: int) -> Sample:
        """A sample; BadSample, a ValueError, if it is damaged."""
        shard, row = self._find(number)
        index, name = self._index(shard), self.shards[shard]
        key = index.keys[row]
        read = {e: self._read(name, place, f"{key}.{e}") for e, place in index.places(row).items()}
        image = next(read[extension] for extension in IMAGES if extension in read)
        meta = json.loads(read["json"]) if "json" in read else {}
        return Sample(key, image, read["txt"].decode("utf-8").strip("\n"), meta)

    @property
    def counts(self) -> list[int] | None:
        """Samples of each shard, where the numbers go shard by shard."""
        return np.diff(self._starts).tolist() if self._chosen is None else None

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample; of a set with a catalogue this reads every index."""
        places = [self._find(number) for number in range(len(self))]
        return [self._index(shard).keys[row] for shard, row in places]

    @cached_property
    def index_hash(self) -> str:
        """Names this data set: a hash over keys and hashes of members, or over the catalogue's of indices."""
        content: list[Any]
        if self._chosen is None:
            content = [[file_name(s), *listed] for s, listed in zip(self.shards, self._listed, strict=True)]
        else:
            content = []
            for number in range(len(self)):
                shard, row = self._find(number)
                index = self._index(shard)
                members = sorted((extension, place.digest.hex()) for extension, place in index.places(row).items())
                content.append([index.keys[row], members])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def subset(self, numbers: Sequence[int]) -> ShardDataset:
        """Some of the samples, in the order given."""
        part = copy.copy(self)
        part._chosen = np.array([n if self._chosen is None else self._chosen[n] for n in numbers], np.int64)
        part._indices = OrderedDict(self._indices)
        for name in ("keys", "index_hash"):
            part.__dict__.pop(name, None)
        return part

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, "right")) - 1

    def _find(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        number = range(len(self))[number]
        sample = number if self._chosen is None else int(self._chosen[number])
        shard = self._shard(sample)
        return shard, sample - int(self._starts[shard])

    def _read(self, shard: Path | str, place: Place, name: str) -> bytes:
        if isinstance(shard, str):
            return self._remote.read(shard, place.size, place.offset, place.digest, name)
        with open(shard, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), place.size, place.offset)
        if hashlib.sha256(data).digest() != place.digest:
            raise BadSample(
                f"{shard}: {name} is damaged (its sha256 is not the index's); "
                "copy the shard again, or index it anew with: ldm index"
            )
        return data

    def _index(self, shard: int) -> Index:
        if shard not in self._indices:
            name, digest = self.shards[shard], bytes.fromhex(self._listed[shard][1]) if self._listed else None
            try:
                content = self._index_bytes(name, digest)
                if digest not in (None, hashlib.sha256(content).digest()):
                    raise BadSample("another sha256")
            except BadSample as error:  # not one sample, but all of its shard: nothing stands in for them
                raise ValueError(
                    f"{shown(name)}: its index is not the one of {self._source}; run: ldm index FOLDER"
                ) from error
            index = Index(content, f"{shown(name)}.index.json")
            size = name.stat().st_size if isinstance(name, Path) else index.size
            if size != index.size:
                raise ValueError(
                    f"{name}: {size} bytes, its index says {index.size}: cut or changed; run: ldm index {name}"
                )
            self._indices[shard] = index
        self._indices.move_to_end(shard)
        while len(self._indices) > self.indices_kept:
            self._indices.popitem(last=False)
        return self._indices[shard]

    def _index_bytes(self, shard: Path | str, digest: bytes | None) -> bytes:
        if isinstance(shard, str):
            url, remedy = beside(shard, f"{file_name(shard)}.index.json"), "make an index there with: ldm index"
            return self._remote.read(url, MAX_INDEX_BYTES, digest=digest, name="index", remedy=remedy)
        path = index_path(shard)
        return path.read_bytes() if path.is_file() else index_bytes(scan(shard))


def write_catalogue(folder: Path) -> Path:
    """Write the catalogue of a folder whose tars all have their index: name, number of samples, sha256 of the index.

    Raises:
        ValueError: if a key is in two shards.
    """
    shards, rows, spans = find_tars(folder), [], []
    for shard in shards:
        content = index_path(shard).read_bytes()
        keys = Index(content, str(index_path(shard))).keys
        rows.append([shard.name, len(keys), hashlib.sha256(content).hexdigest()])
        spans.append((keys[0], keys[-1]))
    spans.sort()
    if any(one[1] >= next_one[0] for one, next_one in itertools.pairwise(spans)):
        ShardDataset(shards)  # some may be in two: it names one
    write_atomically(folder / CATALOGUE, json.dumps({"format": FORMAT, "shards": rows}, indent=0).encode())
    return folder / CATALOGUE


def find_tars(folder: Path) -> list[Path]:
    """The tars of a folder, sorted; FileNotFoundError if there are none."""
    found = sorted(folder.glob("*.tar"))
    if not found:
        raise FileNotFoundError(f"no *.tar in {folder}; make shards with: ldm pack")
    return found


def _find(
    paths: str | Path | Sequence[str | Path], remote: Remote
) -> tuple[list[Path | str], list[tuple[int, str]], str]:
    """Shards (a Path is local, a str remote); where a catalogue lists them, samples and hash of each; and its name."""
    shards: list[Path | str]
    if not isinstance(paths, (str, Path)):
        shards = [str(path) if is_remote(path) else Path(path) for path in paths]
        if not shards:
            raise ValueError("the list of shards is empty; name at least one tar")
    elif is_remote(paths):
        if file_name(paths) == CATALOGUE:
            rows = _rows(remote.read(str(paths), MAX_INDEX_BYTES), shown(paths))
            return [beside(str(paths), row[0]) for row in rows], [row[1:] for row in rows], shown(paths)
        shards = [str(paths)]
    else:
        root = Path(paths)
        catalogue = root if root.name == CATALOGUE else root / CATALOGUE
        if catalogue.is_file():
            rows = _rows(catalogue.read_bytes(), str(catalogue))
            if [row[0] for row in rows] != [path.name for path in find_tars(catalogue.parent)]:
                raise ValueError(f"{catalogue} lists other shards than lie there; run: ldm index {catalogue.parent}")
            return [catalogue.parent / row[0] for row in rows], [row[1:] for row in rows], str(catalogue)
        shards = [*find_tars(root)] if root.is_dir() else [root]
    for shard in shards:
        if isinstance(shard, Path) and not shard.is_file():
            raise FileNotFoundError(f"no shard at {shard}; give a tar, a list of tars or a folder of them")
    return shards, [], ""


def _rows(content: bytes, name: str) -> list[Any]:
    """Name, number of samples and hash of the index of every shard in a catalogue."""
    try:
        read = json.loads(content)
        rows = [(file, int(count), str(digest)) for file, count, digest in read["shards"]]
        if read["format"] != FORMAT or not all(re.fullmatch(r"[\w\-.]+\.tar", row[0]) and row[1] > 0 for row in rows):
            raise ValueError("another format, or an odd name")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: not a catalogue ({error}); make it anew with: ldm index FOLDER") from error
    return rows
