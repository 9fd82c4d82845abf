"""Score what a model draws of the pairs of a data set, from their captions (DESIGN §7, the score)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from ldm.data import Sample, captions, emoji_dataset
from ldm.data.emoji import PART_OF
from ldm.data.emoji import splits as all_splits
from ldm.evaluation.alignment import COLUMNS, TextProbe
from ldm.evaluation.features import Features, cat
from ldm.evaluation.figures import Figure
from ldm.evaluation.metrics import NEIGHBOURS, ImageMetric, diversity, figures, means, set_distances
from ldm.evaluation.pairs import PairScorer, hash_order, training_choice
from ldm.evaluation.scores import PairScores
from ldm.loading import load_text_encoder
from ldm.pipeline import LatentDiffusion


def pairs_of(name: str, split: str, limit: int | None = None) -> list[Sample]:
    """The samples that are scored: a held-out split, or of ``train`` as many as ``heldout_pairs`` has, by a hash.

    Raises:
        ValueError: an unknown name or split, a limit below 1.
    """
    if name == "openmoji" or name not in all_splits():  # one hand drew all of it: nothing to compare with
        raise ValueError(f"data set {name!r} is unknown here; choose emoji48, emoji200 or emoji")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: score at least one pair, or None for all")
    samples = emoji_dataset(name, split)
    keys = training_choice(name) if split == "train" else hash_order(samples.keys)
    number = {key: i for i, key in enumerate(samples.keys)}
    return [samples[number[key]] for key in keys[:limit]]


@dataclass(frozen=True)
class Drawing:
    """How the pictures that are scored are drawn."""

    seeds: int = 3  # pictures a pair
    steps: int = 50
    guidance_scale: float | None = None  # None takes what the model recommends
    sampler: str = "ddim"
    batch_size: int = 16  # pictures at a time

    def __post_init__(self) -> None:
        if min(self.seeds, self.batch_size) < 1:
            raise ValueError(f"seeds={self.seeds}, batch_size={self.batch_size}: each must be at least 1")


class Judge:
    """What looks at pictures of a data set (``"emoji48"``, ``"emoji200"``, ``"emoji"``), fitted on its real images."""

    def __init__(self, name: str = "emoji200", scorer: PairScorer | None = None) -> None:
        whole = PART_OF.get(name, name)
        if scorer is not None and scorer.name != whole:
            raise ValueError(f"the scorer was fitted on {scorer.name}, the pairs are of {name}; give its own, or none")
        self.name, self.scorer = name, PairScorer(whole) if scorer is None else scorer
        real, splits = self.scorer.real, all_splits()[name]
        self.probe = TextProbe(*real.chosen(real.in_probe), load_text_encoder("emoji"), real.prompts)
        own = {key for keys in splits.values() for key in keys}
        self.real = real.features.of([key in own for key in real.keys]).pooled
        hashes = "".join(emoji_dataset(name, split).index_hash for split in splits)
        self.fingerprint = {
            "reference": f"{name}, {len(self.real)} images, {hashlib.sha256(hashes.encode()).hexdigest()[:16]}",
            "features": "EfficientNet-Lite0, mean over places of the last layer",
            "resize": "bicubic with antialiasing to 224×224",
            "image_format": "float32 as drawn, no file between",
        }

    def figures(
        self, features: Features, concepts: Sequence[str], prompts: Sequence[str], fingerprint: dict[str, Any]
    ) -> dict[str, Figure]:
        """Text alignment, set distances and diversity of generated pictures, as far as there are enough of them."""
        alignment = ImageMetric(self.probe, means(COLUMNS), over_ranks=False)
        alignment.update(features, prompts, groups=concepts)
        spread = ImageMetric(torch.nn.Identity(), diversity, over_ranks=False)
        spread.update(features.pooled - self.real.mean(0), groups=prompts)
        distances = ImageMetric(torch.nn.Identity(), set_distances, over_ranks=False)
        distances.update(self.real, groups=None)
        distances.update(features.pooled, groups=prompts)
        found: dict[str, Figure] = {}
        for metric in (alignment, distances, spread) if len(prompts) > NEIGHBOURS else (alignment, spread):
            found |= figures(metric, fingerprint)
        return found


@dataclass(frozen=True)
class Scored:
    """What was drawn of a split, and how it scores."""

    split: str
    figures: dict[str, Figure]  # by name, of all pictures
    scores: PairScores
    reference: PairScores  # of the real images of the same pairs
    table: list[dict[str, Any]]  # a row a picture
    images: list[Image.Image]
    settings: dict[str, Any]  # of the sampler, as in a capsule
    num_left_out: int  # pairs whose concept no other hand drew


def evaluate_pairs(
    model: LatentDiffusion,
    name: str = "emoji200",  # emoji48, emoji200 or emoji
    split: str = "heldout_pairs",  # see pairs_of
    limit: int | None = None,  # so many pairs, chosen by a hash; None is all
    drawing: Drawing | None = None,  # None takes the defaults
    judge: Judge | None = None,  # to reuse one of this data set
) -> Scored:
    """Draw every pair of a split from its first caption, with several seeds, and score the pictures.

    The seeds of a pair hang on the pair alone, so that a limit or another split changes no picture.

    Raises:
        ValueError: no pair that can be scored, and whatever the model raises.
    """
    drawing, samples = drawing or Drawing(), pairs_of(name, split, limit)
    judge = Judge(name) if judge is None else judge
    scorer = judge.scorer
    pairs = [sample for sample in samples if scorer.drawn_by_others(sample.meta["concept"], sample.meta["style"])]
    if not pairs:
        raise ValueError(f"no other hand drew any of the {len(samples)} concepts chosen of {name}; take a higher limit")
    drawn = [(s, int(hashlib.sha256(s.key.encode()).hexdigest()[:6], 16) + k)
             for s in pairs for k in range(drawing.seeds)]  # fmt: skip
    prompts = [captions(s)[0] for s, _ in drawn]
    starts, rank, world = range(0, len(drawn), drawing.batch_size), 0, 1
    if dist.is_initialized():  # every world-th batch is this process's, whose pictures do not hang on it
        rank, world = dist.get_rank(), dist.get_world_size()
    how = {key: value for key, value in vars(drawing).items() if key != "seeds"}
    own: dict[int, Any] = {}
    for first in tqdm(starts[rank::world], f"{name}, {split}", disable=True if rank else None):  # on a terminal
        batch = slice(first, first + drawing.batch_size)
        out = model.sample(prompts[batch], seed=[seed for _, seed in drawn[batch]], **how)
        own[first] = (scorer.network(out.images), out.pil(), out.settings)
    shares = [own]
    if world > 1:
        shares = [{}] * world
        dist.all_gather_object(shares, own)
    batches = [batch for _, batch in sorted(item for share in shares for item in share.items())]
    parts, images = [batch[0] for batch in batches], [image for batch in batches for image in batch[1]]
    settings = {key: v for key, v in batches[0][2].items() if key not in ("negative_prompts", "batch_size")}
    features, concepts = cat(parts), [s.meta["concept"] for s, _ in drawn]
    scores = scorer.score(features, concepts, [s.meta["style"] for s, _ in drawn])
    fingerprint = {
        **judge.fingerprint,
        "data": f"{name}, {split}, {len(pairs)} pairs",
        "seeds": f"{drawing.seeds} a pair, from a hash of its key",
        **{"weights" if key == "model" else key: value for key, value in settings.items()},
    }
    found = {key: f._replace(fingerprint={**fingerprint, "n": f.n}) for key, f in scores.figures().items()}
    found |= judge.figures(features, concepts, prompts, fingerprint)
    aligned = judge.probe(features, prompts)[:, 0].tolist()
    table = [
        {"key": s.key, "seed": seed, "prompt": prompt, **row, COLUMNS[0]: cosine}
        for (s, seed), prompt, row, cosine in zip(drawn, prompts, scores.table(), aligned, strict=True)
    ]
    reference = scorer.reference([s.key for s in pairs])
    return Scored(split, found, scores, reference, table, images, settings, len(samples) - len(pairs))
