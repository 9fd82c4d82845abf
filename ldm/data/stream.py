"""Plain WebDataset streaming, for shards too large to index.

Not exactly resumable: the order depends on ranks, workers and a shuffle buffer, and a restart begins another pass.
Where shards can be indexed, use ShardDataset and TrainingSet.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import IterableDataset

from ldm import randomness
from ldm.data.dataset import Sample
from ldm.data.sets import captions, check_policy, chosen, made
from ldm.data.shards import read_samples
from ldm.data.sources import as_source, open_url, shown
from ldm.data.transforms import BadSample


class WebStream:
    """Shards, and how their samples are mixed; nothing is opened yet.

    Raises:
        ValueError: for a url of another kind, an empty list, or a negative ``shuffle``.
    """

    def __init__(
        self,
        urls: str | Sequence[str],  # local paths or http(s), braces as in "train-{000..099}.tar"
        shuffle: int = 1000,  # samples in the shuffle buffer of each reading process; 0 keeps the order of the shards
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        for url in listed:
            as_source(url)  # refuses "pipe:" and the like before webdataset sees it
        self.shards: list[str] = [each for url in listed for each in webdataset.shardlists.braceexpand.braceexpand(url)]
        self.shuffle = shuffle
        if not self.shards:
            raise ValueError("an empty list of shards came; give paths or http(s) urls")
        if isinstance(shuffle, bool) or not isinstance(shuffle, int) or shuffle < 0:
            raise ValueError(f"data.train.shuffle={shuffle}: the rule is a whole number of samples, at least 0")

    @property
    def index_hash(self) -> str:
        """Names the shards; what is in them is not known before they are read."""
        return hashlib.sha256(json.dumps([shown(as_source(shard)) for shard in self.shards]).encode()).hexdigest()

    def samples(self, seed: int, number: int, rank: int = 0, world: int = 1) -> Iterator[Sample]:
        """Pass ``number`` over a rank's share of the shards, which DataLoader's workers share in turn."""
        shards, mixed = self.shards, []
        if self.shuffle:
            shards = [shards[i] for i in np.argsort(randomness.uniform(seed, "shards", number, len(shards)))]
            mixing = randomness.integer(seed, "shuffle", number, 2**31)
            mixed = [webdataset.shuffle(self.shuffle, initial=self.shuffle, seed=mixing)]
        listed = webdataset.SimpleShardList(shards[rank::world])
        return iter(webdataset.DataPipeline(listed, webdataset.split_by_worker, _read, *mixed))


class StreamedSet(IterableDataset[dict[str, Any]]):
    """The items of :class:`ldm.data.TrainingSet` from a stream, pass after pass.

    A position is a hash of pass and key, so that a sample draws other noise in each pass, whoever reads it.
    webdataset's own opener (a shell), unpacking and decoders (pickle) are not used.
    """

    def __init__(
        self,
        stream: WebStream,
        height: int,  # pixels
        width: int,  # pixels
        seed: int = 0,
        first: int = 0,  # number of the first pass
        passes: int | None = None,  # None goes on without end
        flip: bool = False,  # mirror half of the images
        random_crop: bool = False,  # else the centre
        on_bad: str = "error",  # a sample that cannot be decoded ends the training; "skip": the next stands in for it
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_policy(on_bad)
        self.stream, self.height, self.width = stream, height, width
        self.seed, self.first, self.passes = seed, first, passes
        self.flip, self.random_crop, self.on_bad, self.rank, self.world = flip, random_crop, on_bad, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """As TrainingSet's items. ValueError for what ``ldm index`` refuses, and for a pass without any sample."""
        for number in itertools.islice(itertools.count(self.first), self.passes):
            found, bad = 0, 0
            for sample in self.stream.samples(self.seed, number, self.rank, self.world):
                digest = hashlib.sha256(f"{number} {sample.key}".encode()).digest()
                position, variants = int.from_bytes(digest[:7]), len(captions(sample))
                choice = chosen(self.seed, position, variants, self.flip, self.random_crop)
                try:
                    item = made(sample, choice, position, self.height, self.width)
                except BadSample:
                    if self.on_bad == "error":
                        raise
                    bad = 1
                    continue
                yield {**item, "substituted": bad}
                found, bad = found + 1, 0
            if not found:
                raise ValueError(f"no sample that can be read in {self.stream.shards[0]} and those after it")


def _read(shards: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    for shard in shards:
        source = as_source(shard["url"])
        name = shown(source)
        try:
            with open(source, "rb") if isinstance(source, Path) else open_url(source) as file:
                for key, members in read_samples(file, name):
                    yield Sample.of(key, {each: data for each, (_, data) in members.items()})
        except http.client.HTTPException as error:
            raise ConnectionError(f"{name} broke off: {error!r}; start again") from error
