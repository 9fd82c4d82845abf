"""What the frozen models make of the data, computed once: kept in memory, or in a folder by ``ldm precompute``.

A part holds the samples of a range of numbers. In a folder it is a safetensors file that is mapped, not read: memory
holds pages that the system may drop, and the headers of the last few parts, of a cache of any size.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from ldm.autoencoder import Autoencoder
from ldm.data import BadSample, FixedSet, ShardDataset, TrainingSet, captions
from ldm.data.sets import first_good
from ldm.data.shards import write_atomically
from ldm.text import TextEncoder

PART = 1024  # samples a file: half a gigabyte at 512×512, and what a killed run does again
AGAIN = "make it again with the same ldm precompute"
_NAME = "part-{:06d}.safetensors"


class Part(NamedTuple):
    """Some samples: of every image (and its mirror image) the posterior, of every caption variant the context.

    The mean and the standard deviation are kept, not a sample, so that training from here draws the latents anew
    each time, as it does from images.
    """

    name: str  # its file
    samples: list[tuple[str, int, list[int]]]  # key, row of the moments, and which contexts; none if it cannot be read
    checksums: dict[str, int]  # CRC-32 of each tensor
    tensor: Callable[[str], Tensor]  # "moments ROW FLIP" (2, 4, h/8, w/8), "context WHICH" (tokens, d)

    def checked(self, name: str) -> Tensor:
        """A tensor, if it is what was written."""
        tensor = self.tensor(name)
        if _checksum(tensor) != self.checksums[name]:
            raise OSError(f"{self.name} is damaged ({name} is not what was written): delete it, {AGAIN}")
        return tensor


class LatentCache(NamedTuple):
    """Parts by number, and how many samples each of them has."""

    part: Callable[[int], Part]
    size: int


class CachedSet(Dataset[dict[str, Any]]):
    """A training or fixed set whose images and captions are replaced by what the cache holds of them."""

    def __init__(self, items: TrainingSet | FixedSet, cache: LatentCache) -> None:
        self.items, self.cache = items, cache

    def __len__(self) -> int:
        return len(self.items.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``moments`` (2, 4, h/8, w/8), ``context`` (its own tokens, d), ``key``, ``position``, ``substituted``."""

        def read(number: int) -> dict[str, Any]:
            part, row = self.cache.part(number // self.cache.size), number % self.cache.size
            (key, at, contexts), variant, flip = part.samples[row], 0, False
            if not contexts:
                raise BadSample(f"{key} could not be read when the cache was made")
            if isinstance(self.items, TrainingSet):
                choice = self.items.choose(position, len(contexts))
                variant, flip = choice.variant, choice.flip
            moments, context = part.checked(f"moments {at} {int(flip)}"), part.checked(f"context {contexts[variant]}")
            return {"moments": moments, "context": context, "key": key, "position": position}

        return first_good(self.items.candidates(position), read)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; contexts, padded by zeros, have the length of the longest: a fifth of what 77 tokens are to move."""
    batch = default_collate([{k: v for k, v in item.items() if k != "context"} for item in items])
    if "context" in items[0]:
        batch["context"] = pad_sequence([item["context"] for item in items], batch_first=True)
    return batch


class Encoding:
    """Makes the cache of a data set, or opens one that was made of the same."""

    def __init__(
        self,
        samples: ShardDataset,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        height: int,  # pixels
        width: int,  # pixels
        flip: bool,  # mirror images too
        on_bad: str = "error",  # "skip": a sample that cannot be read is remembered as such
        num_workers: int = 0,  # processes that read images
    ) -> None:
        self.samples, self.autoencoder, self.text_encoder, self.flip = samples, autoencoder, text_encoder, flip
        self.images, self.num_workers = FixedSet(samples, height, width, on_bad), num_workers
        self._count = -(-len(samples) // PART)

    @cached_property
    def key(self) -> dict[str, str]:
        """What decides the values, by name, so that a stale cache can say which of it differs.

        The autoencoder's decoder and latent scale do not count. The data's hash is over keys, images and captions.
        """
        encoder, tower = nn.ModuleList([self.autoencoder.encoder, self.autoencoder.to_moments]), self.text_encoder
        return {
            "format": "2",
            "data": self.samples.index_hash[:16],
            "size": f"{self.images.height}×{self.images.width}, cropped at the centre",
            "flip": str(self.flip).lower(),
            "precision": f"{next(encoder.parameters()).dtype}, {next(tower.parameters()).dtype}",
            "autoencoder": _fingerprint(encoder, self.autoencoder.arguments),
            "text tower": _fingerprint(tower, {**tower.arguments, "tokenizer": tower.tokenizer_json}),
        }

    def in_memory(self) -> LatentCache:
        """All of it, as one part."""
        tensors, about = self._compute(0, len(self.samples))
        part = Part("the cache in memory", about["samples"], about["checksums"], tensors.__getitem__)
        return LatentCache([part].__getitem__, len(self.samples))

    def write(self, folder: Path, rank: int = 0, world: int = 1) -> int:
        """Write every ``world``-th part that is not there yet, whole or not at all; returns how many those were.

        Raises:
            ValueError: if a part is there that was made of something else, naming what.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written = 0
        for number in range(rank, self._count, world):
            try:
                _open(folder, json.dumps(self.key), number)
            except OSError:  # it is not there, or damaged
                tensors, about = self._compute(number * PART, min(number * PART + PART, len(self.samples)))
                content = safetensors.torch.save(tensors, {"part": json.dumps(about)})
                write_atomically(folder / _NAME.format(number), content)
                written += 1
        return written

    def open(self, folder: Path) -> LatentCache:
        """What :meth:`write` left in a folder; a part is looked into when it is first needed.

        Raises:
            OSError: if a part is missing, or the first damaged.
            ValueError: if it was made of something else, naming what.
        """
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing = [name for name in map(_NAME.format, range(self._count)) if name not in there]
        if missing:
            what = f"{len(missing)} of {self._count} parts are missing in {folder}, the first is {missing[0]}"
            raise FileNotFoundError(f"{what}; make them with: ldm precompute ... output=CACHE")
        read = partial(_open, folder, json.dumps(self.key))
        read(0)
        return LatentCache(read, PART)

    @torch.no_grad()
    def _compute(self, first: int, stop: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of a part, and what is said of them; its batches are the same whoever makes it."""
        device, tensors, bad = next(self.autoencoder.parameters()).device, {}, set()
        samples = self.samples.subset(range(first, stop))
        # The first row of each key: a sample that is drawn more often than others is there several times, encoded once.
        rows = {key: row for row, key in reversed([*enumerate(samples.keys)])}
        once = [first + row for row in sorted(rows.values())]
        reader = DataLoader(self.images, 32, sampler=once, num_workers=self.num_workers)
        for batch in tqdm(reader, desc="encoding images", unit="batch", disable=None, leave=False):
            bad |= set(batch["position"][batch["substituted"] > 0].tolist())
            for flip in range(1 + self.flip):
                x = batch["image"].flip(-1) if flip else batch["image"]
                posterior = self.autoencoder.posterior(x.to(device))
                moments = torch.stack([posterior.mean, posterior.std], dim=1).cpu()  # (n, 2, 4, h/8, w/8)
                for number, row in zip(batch["position"].tolist(), moments, strict=True):
                    tensors[f"moments {number - first} {flip}"] = row.clone()
        texts = {key: [] if first + row in bad else captions(samples[row]) for key, row in rows.items()}
        distinct = sorted({text for some in texts.values() for text in some}, key=lambda text: (len(text), text))
        for start in tqdm(range(0, len(distinct), 64), desc="encoding captions", disable=None, leave=False):
            tokens = self.text_encoder.tokenize(distinct[start : start + 64])
            context = self.text_encoder.encode(tokens).cpu()
            for row, length in enumerate(tokens.lengths.tolist()):
                # MiniLM's context is zero past a caption's own tokens: those zeros are not stored.
                own = context[row, :length] if self.text_encoder.family == "minilm" else context[row]
                tensors[f"context {start + row}"] = own.clone()
        which = {text: number for number, text in enumerate(distinct)}
        return tensors, {
            "key": self.key,
            "samples": [(key, rows[key], [which[text] for text in texts[key]]) for key in samples.keys],
            "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }


@lru_cache(maxsize=128)
def _open(folder: Path, key: str, number: int) -> Part:
    """A part of a folder, mapped; OSError if it is not there or damaged, ValueError if it is made of something else."""
    path = folder / _NAME.format(number)
    try:
        file = safetensors.safe_open(path, "pt")
        about = json.loads((file.metadata() or {})["part"])
        was, part = about["key"], Part(str(path), about["samples"], about["checksums"], file.get_tensor)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise OSError(f"{path} is missing or damaged ({error}): {AGAIN}") from error
    other = [f"{name} was {was.get(name)}, now {now}" for name, now in json.loads(key).items() if was.get(name) != now]
    if other:
        said = f"{path} was made of something else: {'; '.join(other)}"
        raise ValueError(f"{said}; make one that fits: ldm precompute ... output=ANOTHER")
    return part


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)


def _fingerprint(module: nn.Module, arguments: dict[str, Any]) -> str:
    """16 hexadecimal digits over a module's arguments and its weights."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
