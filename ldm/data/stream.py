"""Plain WebDataset streaming, for remote shards too large to index (``data=stream``).

Not exactly resumable: the order depends on ranks, workers and a shuffle buffer, a restart begins anew, and a shard
that is cut at a member's end passes as a shorter one. Where shards can be indexed, use ShardDataset and TrainingSet.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import webdataset
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from ldm.data.shards import EXTENSIONS, IMAGES
from ldm.data.transforms import decode_image, fit, to_tensor

TIMEOUT = 60  # seconds without a byte


def web_stream(
    urls: str | Iterable[str],  # local paths or http(s), braces as in "train-{000..099}.tar"
    height: int,  # pixels
    width: int,  # pixels
    shuffle: int = 0,  # samples in the shuffle buffer; 0 keeps the order of the shards
    seed: int = 0,  # of the shuffle
) -> IterableDataset[dict[str, Any]]:
    """A stream of ``{"key", "image" float32 (3, h, w) in [-1, 1], "caption"}``, once over all shards.

    Shards are dealt out over ranks and workers. webdataset's own opener (a shell) and decoders (pickle) are not used.

    Raises:
        ValueError: at once for a url of another kind; while reading for members that the closed list does not have,
            samples without image or caption, and images that cannot be decoded.
    """
    listed = [urls] if isinstance(urls, str) else list(urls)
    for url in listed:
        _check_url(url)
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


def _check_url(url: str) -> None:
    # webdataset reads "pipe:" as a shell command, "::" as a list in which one may hide, and "${...}" as a variable.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.\-]*):", url)
    if "::" in url or "pipe:" in url or (scheme and scheme[1].lower() not in ("http", "https")):
        raise ValueError(f"shard {url!r} is refused; the rule is a local path, http:// or https://, one shard each")


def _decode(sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    name = f"{sample['__url__']}: {sample['__key__']}"
    images = [extension for extension in IMAGES if extension in sample]
    if len(images) != 1 or "txt" not in sample:
        raise ValueError(f"{name}: the rule is one image and one .txt; it has {sorted(sample)}")
    image = to_tensor(fit(decode_image(sample[images[0]], name), height, width))
    return {"key": sample["__key__"], "image": image, "caption": sample["txt"].decode("utf-8").strip("\n")}


def _samples(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from group_by_keys(tar_file_expander(_open(shards), select_files=_check_member))


def _open(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        url = shard["url"]
        remote = url.lower().startswith(("http://", "https://"))
        with urllib.request.urlopen(url, timeout=TIMEOUT) if remote else open(url, "rb") as stream:
            yield {"url": url, "stream": stream}


def _check_member(name: str) -> bool:
    if name.rpartition("/")[2].partition(".")[2] not in EXTENSIONS:
        raise ValueError(f"member {name!r} is refused; the rule is KEY.EXTENSION, of {', '.join(EXTENSIONS)}")
    return True
