"""What the frozen models make of the data, computed once and kept in memory: latents' posterior and text context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.autoencoder import Autoencoder
from ldm.data import BadSample, FixedSet, ShardDataset, TrainingSet, captions
from ldm.data.sets import first_good
from ldm.text import TextEncoder


class LatentCache:
    """Posterior of every image (and of its mirror image where asked for) and context of every caption variant.

    The mean and the standard deviation are kept, not a sample, so that training from here draws the latents anew
    each time, as it does from images.
    """

    def __init__(
        self,
        samples: ShardDataset,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        height: int,  # pixels
        width: int,  # pixels
        flip: bool,  # mirror images too
        on_bad: str = "error",  # "skip": a sample that cannot be read is remembered as such
    ) -> None:
        device = next(autoencoder.parameters()).device
        images = DataLoader(FixedSet(samples, height, width, on_bad), batch_size=32)
        self.bad: set[int] = set()
        #: (n, flips, 2, 4, h/8, w/8): the mean and the standard deviation
        moments = []
        for batch in tqdm(images, desc="encoding images", unit="batch", disable=None, leave=False):
            self.bad |= set(batch["position"][batch["substituted"] > 0].tolist())
            both = [batch["image"], batch["image"].flip(-1)] if flip else [batch["image"]]
            rows = []
            for x in both:
                with torch.no_grad():
                    posterior = autoencoder.posterior(x.to(device))
                rows.append(torch.stack([posterior.mean, posterior.std], dim=1).cpu())
            moments.append(torch.stack(rows, dim=1))
        self.moments = torch.cat(moments)
        self.variants = [[] if i in self.bad else captions(samples[i]) for i in range(len(samples))]
        distinct = sorted({caption for some in self.variants for caption in some}, key=lambda c: (len(c), c))
        self._row = {caption: i for i, caption in enumerate(distinct)}
        self._context: list[torch.Tensor] = []
        for chunk in tqdm(_chunks(distinct, 64), desc="encoding captions", disable=None, leave=False):
            tokens = text_encoder.tokenize(chunk)
            context = text_encoder.encode(tokens).cpu()
            # MiniLM's context is zero past a caption's own tokens: those zeros are not stored.
            keep = tokens.lengths.tolist() if text_encoder.family == "minilm" else [context.shape[1]] * len(chunk)
            self._context += [context[i, :length].clone() for i, length in enumerate(keep)]
        self._shape = tuple(context.shape[1:])

    def context(self, caption: str) -> torch.Tensor:
        """Context of a caption, shape (77, d)."""
        stored = self._context[self._row[caption]]
        padded = torch.zeros(self._shape, dtype=stored.dtype)
        padded[: len(stored)] = stored
        return padded


class CachedSet(Dataset[dict[str, Any]]):
    """A training or fixed set whose images and captions are replaced by what the cache holds of them."""

    def __init__(self, items: TrainingSet | FixedSet, cache: LatentCache) -> None:
        self.items, self.cache = items, cache

    def __len__(self) -> int:
        return len(self.items.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``moments`` (2, 4, h/8, w/8), ``context`` (77, d), ``key``, ``position``, ``substituted``."""

        def read(number: int) -> dict[str, Any]:
            key, variants, variant, flip = self.items.samples.keys[number], self.cache.variants[number], 0, False
            if number in self.cache.bad:
                raise BadSample(f"{key} could not be read when the cache was made")
            if isinstance(self.items, TrainingSet):
                choice = self.items.choose(position, len(variants))
                variant, flip = choice.variant, choice.flip
            moments, context = self.cache.moments[number, int(flip)], self.cache.context(variants[variant])
            return {"moments": moments, "context": context, "key": key, "position": position}

        return first_good(self.items.candidates(position), read)


def _chunks(items: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
