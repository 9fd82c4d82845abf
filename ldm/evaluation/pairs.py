"""Pair accuracy: does a picture show the concept, in the style, that its prompt asked for (DESIGN §7, the score)?

A picture of (concept, style) counts if, by features,

(a) the nearest of the real images *by other hands* of 200 candidate concepts is of its concept, and
(b) a linear probe, fitted on real training images, says its style: how a thing is drawn, so by the statistics of
    earlier layers (Features.texture), not by the pooled last one, which has forgotten most of it.

By other hands: a model that copied the training drawing of its own hand would otherwise be scored against it. Nearest
is by cosine over pooled features, centred at the mean of the real images. The candidates of a concept are the first
199 others in the order of a hash, and itself; of those that only one hand drew, none can be asked for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import HANDS, STYLES, captions, emoji_dataset
from ldm.data.emoji import PART_OF
from ldm.data.emoji import splits as all_splits
from ldm.evaluation.features import EfficientNetLite0, Features, cat, image_batches
from ldm.evaluation.scores import PairScores

NUM_CANDIDATES = 200
_UNRANKED = 1 << 30  # no other hand drew the concept: it can be found by nobody


def hash_order(names: Sequence[str]) -> list[str]:
    """The same names in an order that hangs on nothing but the names: a fixed choice is its beginning."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def training_choice(name: str) -> list[str]:
    """As many training samples as ``heldout_pairs`` has, chosen by a hash; the style probe never learns from them."""
    sets = all_splits()[name]
    if name in PART_OF:
        return [key for key in training_choice(PART_OF[name]) if key in set(sets["train"])]
    return hash_order(sets["train"])[: len(sets["heldout_pairs"])]


@dataclass(frozen=True)
class RealImages:
    """A data set of N images as the scorer sees it."""

    features: Features
    keys: list[str]
    concepts: list[str]  # what is drawn
    styles: list[str]  # how, words of ldm.data.STYLES
    prompts: list[str]  # first captions
    in_probe: Tensor  # whether the probes of style and text may learn from an image, bool (N,)

    def chosen(self, rows: Tensor | Sequence[int]) -> tuple[Features, list[str]]:
        """Features and prompts of some of them."""
        return self.features.of(rows), [self.prompts[i] for i in torch.arange(len(self.keys))[rows].tolist()]


def load_real(name: str, network: EfficientNetLite0 | None = None) -> RealImages:
    """Features of all images of ``"emoji200"`` or ``"emoji"``, every split: about 60 a second on two cores."""
    network = EfficientNetLite0() if network is None else network
    sets = all_splits()
    if name not in sets or name == "openmoji" or name in PART_OF:
        raise ValueError(f"data set {name!r} has no held-out pairs by several hands; take emoji200 or emoji")
    kept = set(sets[name]["train"]) - set(training_choice(name))
    batches = [batch for split in sets[name] for batch in image_batches(emoji_dataset(name, split), 64)]
    samples = [sample for part, _ in batches for sample in part]
    return RealImages(
        cat([network(images) for _, images in batches]),
        [s.key for s in samples],
        [s.meta["concept"] for s in samples],
        [s.meta["style"] for s in samples],
        [captions(s)[0] for s in samples],
        torch.tensor([s.key in kept for s in samples]),
    )


class StyleProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS (Liu & Nocedal, 1989) with an L2 penalty."""

    def __init__(
        self,
        features: Tensor,  # (n, d)
        labels: Tensor,  # int64 in [0, num_classes), (n,)
        num_classes: int,
        penalty: float = 0.01,  # times the squared weights, beside the mean cross-entropy; 0.05 is no different
    ) -> None:
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        x = (features - self.mean) / self.std
        weight = torch.zeros(x.shape[1], num_classes, requires_grad=True)
        bias = torch.zeros(num_classes, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + penalty * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weight, self.bias = weight.detach(), bias.detach()

    def __call__(self, features: Tensor) -> Tensor:
        """The most likely class of each row, int64: (n, d) → (n,)."""
        return (((features - self.mean) / self.std) @ self.weight + self.bias).argmax(1)


# ------------------------------------------------------------------------------------------------ the score


class PairScorer:
    """Scores pictures of a data set's concepts and styles; fitted once."""

    def __init__(
        self,
        name: str = "emoji200",  # or "emoji"
        network: EfficientNetLite0 | None = None,  # to reuse one
        real: RealImages | None = None,  # to reuse the data set's features
    ) -> None:
        self.name = name
        self.network = EfficientNetLite0() if network is None else network
        self.real = load_real(name, self.network) if real is None else real
        styles = torch.tensor([STYLES.index(style) for style in self.real.styles])
        kept = self.real.in_probe
        self.probe = StyleProbe(self.real.features.texture[kept], styles[kept], len(STYLES))
        self._centre = self.real.features.pooled.mean(0)
        self._gallery = self._normalise(self.real.features.pooled)  # (N, d)
        self.concepts = hash_order(sorted(set(self.real.concepts)))
        number = {concept: i for i, concept in enumerate(self.concepts)}
        self._concept = torch.tensor([number[concept] for concept in self.real.concepts])  # (N,)
        self._hands = [HANDS[style] for style in self.real.styles]

    def drawn_by_others(self, concept: str, style: str) -> bool:
        """Whether another hand than the style's drew the concept: without it, the pair cannot be scored."""
        pairs = zip(self.real.concepts, self._hands, strict=True)
        return any(c == concept and hand != HANDS[style] for c, hand in pairs)

    def score(self, features: Features, concepts: Sequence[str], styles: Sequence[str]) -> PairScores:
        """Score pictures by their features (see ``network``), of which each concept and style was asked for.

        Raises:
            ValueError: lengths that differ, an unknown concept or style, a concept that no other hand drew.
        """
        lengths = [len(features.pooled), len(concepts), len(styles)]
        if len(set(lengths)) > 1:
            raise ValueError("{} pictures, {} concepts, {} styles: give one of each".format(*lengths))
        for concept, style in set(zip(concepts, styles, strict=True)):
            if style not in STYLES:
                raise ValueError(f"style {style!r} is unknown; choose one of {', '.join(STYLES)}")
            if not self.drawn_by_others(concept, style):
                raise ValueError(f"concept {concept!r} was drawn by no other hand in {self.name}; leave it out")
        own = torch.tensor([self.concepts.index(concept) for concept in concepts])
        similarity = self._normalise(features.pooled) @ self._gallery.T  # (n, N)
        by_hand = {hand: self._rank(similarity, own, hand) for hand in sorted(set(HANDS.values()))}
        asked = [by_hand[HANDS[style]] for style in styles]
        return PairScores(
            list(concepts),
            list(styles),
            [self.concepts[int(nearest[i])] for i, (_, nearest, _) in enumerate(asked)],
            [STYLES[i] for i in self.probe(features.texture).tolist()],
            torch.stack([by_hand[HANDS[style]][0] for style in STYLES], 1),
            torch.stack([count[i] for i, (_, _, count) in enumerate(asked)]),
        )

    def reference(self, keys: Sequence[str]) -> PairScores:
        """The score of the data set's own images, asked for as what they are."""
        rows = [self.real.keys.index(key) for key in keys]
        concepts, styles = [self.real.concepts[i] for i in rows], [self.real.styles[i] for i in rows]
        return self.score(self.real.features.of(rows), concepts, styles)

    def _normalise(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled - self._centre, dim=1)

    def _rank(self, similarity: Tensor, own: Tensor, hand: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rank of the own concept, nearest candidate, number of candidates, each (n,), in a gallery without a hand."""
        n, num_concepts = len(similarity), len(self.concepts)
        others = torch.tensor([h != hand for h in self._hands])
        best = torch.full((n, num_concepts), -torch.inf)  # similarity of each concept's nearest image
        best.scatter_reduce_(1, self._concept[others].expand(n, -1), similarity[:, others], "amax")
        drawn = torch.zeros(num_concepts, dtype=torch.bool)
        drawn[self._concept[others]] = True
        # Concepts are numbered in hash order: the first 200 drawn ones, or the first 199 and the own one behind them.
        place = drawn.cumsum(0) - 1  # (num_concepts,)
        limit = torch.where(place[own] < NUM_CANDIDATES, NUM_CANDIDATES, NUM_CANDIDATES - 1)
        candidate = drawn & (place < limit[:, None])  # (n, num_concepts)
        candidate.scatter_(1, own[:, None], drawn[own][:, None])
        best = best.masked_fill(~candidate, -torch.inf)
        mine = best.gather(1, own[:, None])
        # A tie counts against the picture, its own concept is one of those that are as near: a blank wins nothing.
        rank = torch.where(mine.isneginf()[:, 0], _UNRANKED, (best >= mine).sum(1))
        return rank, best.argmax(1), candidate.sum(1)
