"""Samples of shards by number, through their indices; of very large sets through a catalogue of the indices."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import shards as tars
from ldm.data.sources import Files, Source, as_source, beside, file_name, shown
from ldm.data.transforms import BadSample

CATALOGUE = "catalogue.json"
KEPT = 16  # indices in memory, of a set with a catalogue
_PLACE = np.dtype([("offset", "i8"), ("size", "i4"), ("digest", "V32")])


@dataclass(frozen=True)
class Sample:
    """One image with its caption."""

    key: str  # unique in its data set
    image: bytes  # the encoded file, as stored
    caption: str  # the text of ``key.txt``
    meta: dict[str, Any]  # the object of ``key.json``; empty where there is none

    @classmethod
    def of(cls, key: str, members: dict[str, bytes]) -> Sample:
        """From the files of a shard that have this key, by extension."""
        image = next(members[extension] for extension in tars.IMAGES if extension in members)
        meta = json.loads(members["json"]) if "json" in members else {}
        return cls(key, image, members["txt"].decode("utf-8").strip("\n"), meta)


class Index:
    """The index of a shard, checked, in 44 bytes a member and 8 a sample."""

    def __init__(self, content: bytes, name: str) -> None:
        try:
            read = json.loads(content)
            if read["format"] != tars.FORMAT:
                raise ValueError(f"its format is {read['format']}, this code reads {tars.FORMAT}")
            self.size = int(read["size"])
            self.keys: list[str] = [str(sample["key"]) for sample in read["samples"]]
            sizes = [(sample.get("height", -1), sample.get("width", -1)) for sample in read["samples"]]
            self.sizes = np.array(sizes, "i4").reshape(-1, 2)  # of the images; -1 where an early version wrote it
            self._places: dict[str, np.ndarray] = {}
            for row, sample in enumerate(read["samples"]):
                if len({*tars.IMAGES} & {*sample["members"]}) != 1 or "txt" not in sample["members"]:
                    raise ValueError(f"{self.keys[row]} is not one image and one .txt")
                for extension, (offset, size, digest) in sample["members"].items():
                    inside = 0 <= offset <= offset + size <= self.size and 0 < size <= tars.MAX_MEMBER_BYTES
                    if extension not in tars.EXTENSIONS or not inside:
                        raise ValueError(f"{self.keys[row]}.{extension} is of no known kind, or not in the shard")
                    if extension not in self._places:
                        self._places[extension] = np.zeros(len(self.keys), _PLACE)
                    self._places[extension][row] = (offset, size, bytes.fromhex(digest))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{name}: not an index ({error}); make it anew with: ldm index") from error

    def places(self, row: int) -> list[tuple[str, int, int, bytes]]:
        """Extension, first byte, size and sha256 of each member of a sample."""
        found = [(extension, places[row]) for extension, places in self._places.items() if places[row]["size"]]
        return [(e, int(at["offset"]), int(at["size"]), at["digest"].tobytes()) for e, at in found]


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
        self._files = Files(cache, cache_bytes)
        self.shards, self._listed = _find(paths, self._files)
        self.indices_kept = KEPT if self._listed else len(self.shards)
        self._indices: OrderedDict[int, Index] = OrderedDict()
        self._chosen: np.ndarray | None = None  # of each number, which sample it is, counted shard by shard
        if self._listed and keys is None:
            self._starts = np.cumsum([0, *(count for count, _ in self._listed)])
        else:
            self._starts = np.cumsum([0, *(len(self._index(shard).keys) for shard in range(len(self.shards)))])
            self._chosen = self._by_key(keys)

    def _by_key(self, keys: Sequence[str] | None) -> np.ndarray:
        found: dict[str, int] = {}
        for shard, name in enumerate(self.shards):
            for sample, key in enumerate(self._index(shard).keys, int(self._starts[shard])):
                if key in found:
                    other = np.searchsorted(self._starts, found[key], "right") - 1
                    raise ValueError(f"key {key} is in {shown(self.shards[other])} and {shown(name)}")
                found[key] = sample
        missing = sorted(set(keys or ()) - set(found))
        if missing:
            raise ValueError(f"{len(missing)} of {len(keys or ())} keys are in no shard, the first is {missing[0]}")
        return np.array([found[key] for key in sorted(found if keys is None else set(keys))], np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, number: int) -> Sample:
        """A sample; BadSample, a ValueError, if it is damaged."""
        index, row, shard = self._find(number)
        read = {}
        for extension, first, size, digest in index.places(row):
            read[extension] = self._files.read(shard, first, size, digest)
            if hashlib.sha256(read[extension]).digest() != digest:
                raise BadSample(
                    f"{shown(shard)}: {index.keys[row]}.{extension} is damaged (its sha256 is not the index's); "
                    "copy the shard again, or index it anew with: ldm index"
                )
        return Sample.of(index.keys[row], read)

    def image_digest(self, number: int) -> bytes:
        """The sha256 of an image's file, as its index has it."""
        index, row, _ = self._find(number)
        return next(digest for extension, *_, digest in index.places(row) if extension in tars.IMAGES)

    def image_sizes(self) -> np.ndarray:
        """Height and width of every image, shape (n, 2), 0 where its header cannot be read; this reads every index.

        Raises:
            ValueError: if an index is of an early version, which did not keep them.
        """
        sizes = [self._index(shard).sizes for shard in range(len(self.shards))]
        for shard, some in zip(self.shards, sizes, strict=True):
            if (some < 0).any():
                raise ValueError(f"{shown(shard)}: its index lacks the sizes of images; make it anew with: ldm index")
        return np.concatenate(sizes)[slice(None) if self._chosen is None else self._chosen]

    @property
    def counts(self) -> list[int] | None:
        """Samples of each shard, where the numbers go shard by shard."""
        return np.diff(self._starts).tolist() if self._chosen is None else None

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample; of a set with a catalogue this reads every index."""
        found = map(self._find, range(len(self)))
        return [index.keys[row] for index, row, _ in found]

    @cached_property
    def index_hash(self) -> str:
        """Names this data set: a hash over keys and hashes of members, or over the catalogue's of indices."""
        content: list[Any]
        if self._chosen is None:
            content = [[file_name(s), *listed] for s, listed in zip(self.shards, self._listed, strict=True)]
        else:
            found = map(self._find, range(len(self)))
            content = [
                [index.keys[row], sorted((place[0], place[3].hex()) for place in index.places(row))]
                for index, row, _ in found
            ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def subset(self, numbers: Sequence[int]) -> ShardDataset:
        """Some of the samples, in the order given."""
        part = copy.copy(self)
        part._chosen = np.array([n if self._chosen is None else self._chosen[n] for n in numbers], np.int64)
        part._indices = OrderedDict(self._indices)
        for name in ("keys", "index_hash"):
            part.__dict__.pop(name, None)
        return part

    def _find(self, number: int) -> tuple[Index, int, Source]:
        """Where a sample is: the index of its shard, its row there, the shard."""
        number = range(len(self))[number]
        sample = number if self._chosen is None else int(self._chosen[number])
        shard = int(np.searchsorted(self._starts, sample, "right")) - 1
        return self._index(shard), sample - int(self._starts[shard]), self.shards[shard]

    def _index(self, shard: int) -> Index:
        if shard not in self._indices:
            tar, listed = self.shards[shard], self._listed[shard] if self._listed else None
            path = beside(tar, f"{file_name(tar)}.index.json")
            if isinstance(tar, Path) and not path.is_file():  # type: ignore[union-attr]
                content = tars.index_bytes(tars.scan(tar))
            else:
                digest = bytes.fromhex(listed[1]) if listed else None
                content = self._files.read(path, digest=digest, remedy="make an index there with: ldm index")
            index = Index(content, shown(path))
            if listed not in (None, (len(index.keys), hashlib.sha256(content).hexdigest())):
                raise ValueError(f"{shown(path)} is not the index that {CATALOGUE} lists; run: ldm index FOLDER")
            size = tar.stat().st_size if isinstance(tar, Path) else index.size
            if size != index.size:
                raise ValueError(f"{tar}: {size} bytes, not {index.size} as in its index; cut? run: ldm index {tar}")
            self._indices[shard] = index
        self._indices.move_to_end(shard)
        while len(self._indices) > self.indices_kept:
            self._indices.popitem(last=False)
        return self._indices[shard]


def write_catalogue(folder: Path) -> Path:
    """Write the catalogue of a folder whose tars all have their index: name, number of samples, sha256 of the index.

    Raises:
        ValueError: if a key is in two shards.
    """
    shards, rows, spans = find_tars(folder), [], []
    for shard in shards:
        content = tars.index_path(shard).read_bytes()
        keys = Index(content, str(tars.index_path(shard))).keys
        rows.append([shard.name, len(keys), hashlib.sha256(content).hexdigest()])
        spans.append((keys[0], keys[-1]))
    spans.sort()
    if any(one[1] >= next_one[0] for one, next_one in itertools.pairwise(spans)):
        ShardDataset(shards)  # some may be in two: it names one
    tars.write_atomically(folder / CATALOGUE, json.dumps({"format": tars.FORMAT, "shards": rows}, indent=0).encode())
    return folder / CATALOGUE


def find_tars(folder: Path) -> list[Path]:
    """The tars of a folder, sorted; FileNotFoundError if there are none."""
    found = sorted(folder.glob("*.tar"))
    if not found:
        raise FileNotFoundError(f"no *.tar in {folder}; make shards with: ldm pack")
    return found


def _find(paths: str | Path | Sequence[str | Path], files: Files) -> tuple[list[Source], list[tuple[int, str]]]:
    """The shards, and where a catalogue lists them, samples of each and sha256 of its index."""
    if isinstance(paths, (str, Path)):
        source = as_source(paths)
        if isinstance(source, Path) and source.is_dir():
            if not (source / CATALOGUE).is_file():
                return [*find_tars(source)], []
            source = source / CATALOGUE
        if file_name(source) == CATALOGUE:
            rows = _rows(files.read(source), shown(source))
            if isinstance(source, Path) and [row[0] for row in rows] != [tar.name for tar in find_tars(source.parent)]:
                raise ValueError(f"{source} lists other shards than lie there; run: ldm index {source.parent}")
            return [beside(source, row[0]) for row in rows], [row[1:] for row in rows]
        shards = [source]
    else:
        shards = [as_source(path) for path in paths]
        if not shards:
            raise ValueError("the list of shards is empty; name at least one tar")
    for shard in shards:
        if isinstance(shard, Path) and not shard.is_file():
            raise FileNotFoundError(f"no shard at {shard}; give a tar, a list of tars or a folder of them")
    return shards, []


def _rows(content: bytes, name: str) -> list[Any]:
    """Name, number of samples and sha256 of the index of every shard in a catalogue."""
    try:
        read = json.loads(content)
        rows = [(str(tar), int(count), str(digest)) for tar, count, digest in read["shards"]]
        odd = [row for row in rows if not re.fullmatch(r"[\w\-.]+\.tar [1-9]\d* [0-9a-f]{64}", "{} {} {}".format(*row))]
        if read["format"] != tars.FORMAT or odd:
            raise ValueError(odd[0] if odd else f"format {read['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: not a catalogue ({error}); make it anew with: ldm index FOLDER") from error
    return rows
