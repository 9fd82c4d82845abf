"""A model's score: draw the pairs of a split from their captions, and look at the pictures (DESIGN §7, the score)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm import checkpoint, loading
from ldm.data import Sample, captions, emoji_dataset
from ldm.data.emoji import PART_OF
from ldm.data.emoji import splits as all_splits
from ldm.evaluation.features import cat
from ldm.evaluation.pairs import PairScorer, hash_order, training_choice
from ldm.evaluation.reconstruction import evaluate_autoencoder
from ldm.evaluation.report import autoencoder_table, pairs_table, write_json, write_text
from ldm.pipeline import LatentDiffusion


def pairs_of(name: str, split: str, limit: int | None = None) -> list[Sample]:
    """The samples that are scored: a held-out split, or of ``train`` as many as ``heldout_pairs`` has, by a hash.

    Args:
        name: ``"emoji48"``, ``"emoji200"`` or ``"emoji"``.
        split: ``"heldout_pairs"``, ``"heldout_concepts"`` or ``"train"``.
        limit: so many of them, by a hash.

    Raises:
        ValueError: an unknown name or split, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: score at least one pair, or None for all")
    samples = emoji_dataset(name, split)
    keys = training_choice(name) if split == "train" else hash_order(samples.keys)
    number = {key: i for i, key in enumerate(samples.keys)}
    return [samples[number[key]] for key in keys[:limit]]


def evaluate_pairs(
    model: LatentDiffusion,
    name: str = "emoji200",
    split: str = "heldout_pairs",
    seeds: int = 3,
    limit: int | None = None,
    steps: int = 50,
    guidance_scale: float | None = None,
    sampler: str = "ddim",
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    scorer: PairScorer | None = None,
) -> dict[str, Any]:
    """Draw every pair of a split from its first caption, with several seeds, and score the pictures.

    The seeds of a pair hang on the pair alone, so that a limit or another split changes no picture.

    Args:
        model: what draws.
        name: data set, ``"emoji48"``, ``"emoji200"`` or ``"emoji"``.
        split: see :func:`pairs_of`.
        seeds: pictures a pair, at least 1.
        limit: so many pairs, chosen by a hash; None is all.
        steps: of the sampler.
        guidance_scale: None takes what the model recommends.
        sampler: its name.
        batch_size: pictures at a time.
        progress: called as (pictures done, pictures in all).
        scorer: to reuse one that is fitted on this data set.

    Returns:
        ``dataset``, ``split``, ``seeds``, ``steps``, ``guidance_scale``, ``sampler``; ``num_pairs``, and
        ``num_left_out`` whose concept no other hand drew; ``generated`` and ``reference`` (the real images of the same
        pairs) as :meth:`PairScores.summary` gives them; ``table``, a row a picture with its key, seed and prompt.

    Raises:
        ValueError: seeds or batch_size below 1, a scorer of another data set, no pair that can be scored, and whatever
            the model raises.
    """
    if seeds < 1 or batch_size < 1:
        raise ValueError(f"seeds={seeds}, batch_size={batch_size}: each must be at least 1")
    whole = PART_OF.get(name, name)
    if scorer is not None and scorer.name != whole:
        raise ValueError(f"the scorer was fitted on {scorer.name}, the pairs are of {name}; give its own, or none")
    samples = pairs_of(name, split, limit)
    scorer = PairScorer(whole) if scorer is None else scorer
    pairs = [sample for sample in samples if scorer.drawn_by_others(sample.meta["concept"], sample.meta["style"])]
    if not pairs:
        raise ValueError(f"no other hand drew any of the {len(samples)} concepts chosen of {name}; take a higher limit")
    drawn = [(s, int(hashlib.sha256(s.key.encode()).hexdigest()[:6], 16) + k) for s in pairs for k in range(seeds)]
    parts = []
    for first in range(0, len(drawn), batch_size):
        batch = drawn[first : first + batch_size]
        pictures = model.sample(
            [captions(s)[0] for s, _ in batch],
            num_images=1,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            seed=[seed for _, seed in batch],
            batch_size=batch_size,
        )
        parts.append(scorer.network(pictures.images))
        if progress is not None:
            progress(first + len(batch), len(drawn))
    concepts, styles = [s.meta["concept"] for s, _ in drawn], [s.meta["style"] for s, _ in drawn]
    scores = scorer.score_features(cat(parts), concepts, styles)
    reference = scorer.reference([s.key for s in pairs]).summary()
    # Dealt another style, a real image would be compared with itself: that row is for pictures that a model drew.
    del reference["ignores_style"]
    rows = [{"key": s.key, "seed": seed, "prompt": captions(s)[0]} for s, seed in drawn]
    return {
        "dataset": name,
        "split": split,
        "seeds": seeds,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "num_pairs": len(pairs),
        "num_left_out": len(samples) - len(pairs),
        "generated": scores.summary(),
        "reference": reference,
        "table": [row | scored for row, scored in zip(rows, scores.table(), strict=True)],
    }


def evaluate_model(
    model: str | Path,
    data: str = "emoji48",
    output: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    **drawing: Any,
) -> str:
    """What ``ldm evaluate`` does: pair accuracy on held-out and on as many training pairs, and the autoencoder's table.

    Args:
        model: bundled name, run folder or checkpoint folder; one of stage one is scored for its autoencoder alone.
        data: ``"emoji48"``, ``"emoji200"`` or ``"emoji"``.
        output: folder for ``report.md`` and ``result.json``; None writes nothing.
        progress: called as (pictures done, pictures in all), a split after the other.
        batch_size: pictures at a time.
        limit: so many pairs a split, and so many images of the autoencoder's.
        **drawing: ``seeds``, ``steps``, ``guidance_scale``, ``sampler`` of :func:`evaluate_pairs`.

    Returns:
        The report as Markdown.
    """
    folder = loading.find(model)
    result: dict[str, Any] = {"model": str(model), "checkpoint": folder.name}
    report = [f"# {model}\n"]
    if "unet" in checkpoint.read_manifest(folder)["components"]:
        whole = loading.load(folder)
        autoencoder, device = whole.autoencoder, whole.device
        scorer = PairScorer(PART_OF.get(data, data))
        for split in ("heldout_pairs", "train"):
            result[split] = evaluate_pairs(
                whole, data, split, limit=limit, batch_size=batch_size, progress=progress, scorer=scorer, **drawing
            )
            report.append(pairs_table(result[split]))
    else:
        autoencoder = loading.load_autoencoder(folder)
        device = next(autoencoder.parameters()).device
    heldout = [split for split in all_splits()[data] if split.startswith("heldout")]
    result["autoencoder"] = evaluate_autoencoder(autoencoder, data, heldout, batch_size, limit, device)
    report.append(f"Autoencoder, {data}\n\n{autoencoder_table(result['autoencoder'])}")
    text = "\n".join(report)
    if output is not None:
        write_json(Path(output) / "result.json", result)
        write_text(Path(output) / "report.md", text)
    return text
