"""Plain WebDataset streaming, for remote shards that have no index.

Not exactly resumable: the order depends on ranks, workers and a shuffle buffer, and a restart begins anew. Where shards
can be indexed, use ShardDataset and TrainingSet.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from torch.utils.data import IterableDataset

from ldm.data.shards import IMAGES, read_samples
from ldm.data.sources import as_source, open_url, shown
from ldm.data.transforms import decode_image, fit, to_tensor


def web_stream(
    urls: str | Iterable[str],  # local paths or http(s), braces as in "train-{000..099}.tar"
    height: int,  # pixels
    width: int,  # pixels
    shuffle: int = 0,  # samples in the shuffle buffer; 0 keeps the order of the shards
    seed: int = 0,  # of the shuffle
) -> IterableDataset[dict[str, Any]]:
    """A stream of ``{"key", "image" float32 (3, h, w) in [-1, 1], "caption"}``, once over all shards.

    Shards are dealt out over ranks and workers, and read by :func:`ldm.data.shards.read_samples`. webdataset's own
    opener (a shell), unpacking and decoders (pickle) are not used.

    Raises:
        ValueError: at once for a url of another kind; while reading for what ``ldm index`` refuses, and for images that
            cannot be decoded.
    """
    listed = [urls] if isinstance(urls, str) else list(urls)
    for url in listed:
        as_source(url)  # refuses "pipe:" and the like before webdataset sees it
    expanded = [each for url in listed for each in webdataset.shardlists.braceexpand.braceexpand(url)]
    if not expanded:
        raise ValueError("an empty list of shards came; give paths or http(s) urls")

    stages = [webdataset.SimpleShardList(expanded), webdataset.split_by_node, webdataset.split_by_worker, _samples]
    if shuffle:
        stages.append(webdataset.shuffle(shuffle, initial=shuffle, seed=seed))
    pipeline: IterableDataset[dict[str, Any]] = webdataset.DataPipeline(
        *stages, webdataset.map(partial(_decode, height=height, width=width))
    )
    return pipeline


def _samples(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        source = as_source(shard["url"])
        name = shown(source)
        try:
            with open(source, "rb") if isinstance(source, Path) else open_url(source) as file:
                for key, members in read_samples(file, name):
                    yield {"__key__": key, "name": name, **{each: data for each, (_, data) in members.items()}}
        except http.client.HTTPException as error:
            raise ConnectionError(f"{name} broke off: {error!r}; start again") from error


def _decode(sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    data = next(sample[extension] for extension in IMAGES if extension in sample)
    image = to_tensor(fit(decode_image(data, f"{sample['name']}: {sample['__key__']}"), height, width))
    return {"key": sample["__key__"], "image": image, "caption": sample["txt"].decode("utf-8").strip("\n")}
