"""What an ablation measures of each run, and the tables, curves and pictures that it makes of all of them."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm import checkpoint, loading
from ldm.data import Sample, captions
from ldm.evaluation import Drawing, Figure, Judge, evaluate_autoencoder, evaluate_pairs, over_seeds
from ldm.evaluation.features import image_batches
from ldm.evaluation.loss import measure
from ldm.evaluation.reconstruction import COLUMNS
from ldm.evaluation.report import Curve, Part, Pictures, Report, Table
from ldm.provenance import open_png, write_png
from ldm.samples import Samples

SCORE = "measured.json"
NOISE = "denoising MSE"  # of z_t divided into image and noise: the same thing whatever a cell predicts
SHOWN = (NOISE, "KID-EffNet", "text alignment", "concept R@1", "pair accuracy", "PSNR, mode (dB)", "PSNR, sample (dB)",
         "SSIM", "KL a unit (nats)", "active units", "rKID-EffNet")  # fmt: skip
SIDE_BY_SIDE = 8  # pictures a cell
_IN_TRAINING = {"val/mse_ema": "Error in training, of what each predicts", "val/psnr_ema": "PSNR in training"}

Cell = tuple[str, ...]  # its settings, key=value; of the base as it is none


@dataclass(frozen=True)
class Scoring:
    """What is measured of every run: on the same images, whatever a cell trains on."""

    samples: Sequence[Sample]  # held-out
    data: str | None  # emoji48, emoji200 or emoji, whose pairs are drawn and scored; None: own data, the loss alone
    limit: int | None = None  # so many pairs
    drawing: Drawing = Drawing(seeds=1, steps=20)  # noqa: RUF009  it is frozen

    def describe(self) -> dict[str, Any]:
        """All that the figures hang on besides the weights."""
        keys = hashlib.sha256("\n".join(sample.key for sample in self.samples).encode()).hexdigest()[:16]
        return {"data": self.data, "limit": self.limit, "samples": keys, **asdict(self.drawing)}


@cache
def _judge(data: str) -> Judge:
    """Fitted once a process, not once a run."""
    return Judge(data)


def score_run(folder: Path, scoring: Scoring) -> dict[str, Any]:
    """``values`` by name, those that are means over images also by image in ``rows``; pictures go beside it as files.

    Raises:
        ValueError: the weights give NaN or infinity.
    """
    if "unet" not in checkpoint.read_manifest(loading.find(folder))["components"]:
        return _score_autoencoder(folder, scoring)
    model, drawing = loading.load(folder), scoring.drawing
    losses = measure(model, scoring.samples, of_noise=True)
    times = dict(zip(losses.times, losses.error.mean(0).tolist(), strict=True))
    rows = {NOISE: [losses.error.mean(1).tolist(), losses.groups]}
    if scoring.data is None:
        prompts = [captions(sample)[0] for sample in scoring.samples[:SIDE_BY_SIDE]]
        scale, sampler = drawing.guidance_scale, drawing.sampler
        drawn = model.sample(prompts, steps=drawing.steps, guidance_scale=scale, sampler=sampler)
        count = _keep(folder, ((picture, drawn.capsule(i)) for i, picture in enumerate(drawn.pil())))
        return {"values": {NOISE: float(losses.error.mean())}, "rows": rows, "times": times, "pictures": count}
    scored = evaluate_pairs(model, scoring.data, limit=scoring.limit, drawing=drawing, judge=_judge(scoring.data))
    values = {NOISE: float(losses.error.mean()), **{name: figure.value for name, figure in scored.figures.items()}}
    of_picture = [name for name in values if name in scored.table[0]]
    concepts = [row["concept"] for row in scored.table]
    rows |= {name: [[float(row[name]) for row in scored.table], concepts] for name in of_picture}
    about = ({"prompt": r["prompt"], "negative_prompt": "", "seed": r["seed"], **scored.settings} for r in scored.table)
    step = max(1, len(scored.images) // SIDE_BY_SIDE)
    count = _keep(folder, list(zip(scored.images, about, strict=True))[::step][:SIDE_BY_SIDE])
    return {"values": values, "rows": rows, "times": times, "pictures": count}


def _score_autoencoder(folder: Path, scoring: Scoring) -> dict[str, Any]:
    autoencoder = loading.load_autoencoder(folder)
    network = None if scoring.data is None else _judge(scoring.data).scorer.network
    figures, _, active, columns = evaluate_autoencoder(autoencoder, scoring.samples, network=network)
    (part, images), *_ = image_batches(scoring.samples[:SIDE_BY_SIDE], SIDE_BY_SIDE)
    with torch.inference_mode():
        z = [autoencoder.encode(images), autoencoder.encode(images, torch.Generator().manual_seed(0))]
        x = autoencoder.decode(torch.cat(z))
    none = torch.zeros(len(x), dtype=torch.bool)
    about = [{"key": sample.key, "from": which} for which in ("mode", "sample") for sample in part]
    pictures = zip(Samples(x, x, [], [], none, none).pil(), about, strict=True)
    values = {name: figure.value for name, figure in figures.items()} | {"active units": active}
    concepts = [sample.meta.get("concept", sample.key) for sample in scoring.samples]
    rows = {name: [columns[:, i].tolist(), concepts] for i, name in enumerate(COLUMNS)}
    return {"values": values, "rows": rows, "times": {}, "pictures": _keep(folder, pictures)}


def _keep(folder: Path, pictures: Iterable[tuple[Image.Image, Mapping[str, Any]]]) -> int:
    """Write pictures with what made them; how many."""
    (folder / "pictures").mkdir(exist_ok=True)
    kept = list(pictures)
    for i, (picture, capsule) in enumerate(kept):
        write_png(folder / "pictures" / f"{i:02d}.png", picture, dict(capsule))
    return len(kept)


# -------------------------------------------------------------------------------------------------------- the tables


def compare_cells(
    cells: Sequence[Cell],  # the first is what the others are held against
    folders: Mapping[tuple[Cell, int], Path],  # of the runs that are scored, by cell and seed
    failed: Mapping[tuple[Cell, int], str],  # why each of the others has no score
    command: str = "",
) -> Report:
    """Cells with their intervals, their differences to the first, what failed, curves, pictures side by side.

    Raises:
        ValueError: nothing is scored.
    """
    if not folders:
        raise ValueError(f"all {len(failed)} trainings failed; one said: {next(iter(failed.values()))}")
    scores: dict[Cell, dict[int, Any]] = {cell: {} for cell in cells}
    for (cell, seed), folder in folders.items():
        scores[cell][seed] = json.loads((folder / SCORE).read_text("utf-8"))
    found, first = [], scores[cells[0]]
    for cell, own in scores.items():
        less = {}
        if own is not first and (both := [seed for seed in own if seed in first]):
            less = _figures([own[seed] for seed in both], [first[seed] for seed in both])
        count = sum(key[0] == cell for key in failed)
        found.append({"cell": named(cell), "settings": cell, "seeds": sorted(own), "failed": count,
                      "figures": _figures(list(own.values())), "less the first": less})  # fmt: skip
    parts = _tables(cells[0], found)
    lost = [[named(cell), seed, why] for (cell, seed), why in failed.items()]
    if lost:
        parts.append(Table("Failed", ["cell", "training seed", "why"], lost))
    parts += [*_curves(scores, folders), *_side_by_side(scores, folders)]
    title = f"Ablation of {', '.join(_keys(cells))}"
    return Report(title, command, parts, {"cells": found, "failed": lost})


def named(cell: Cell) -> str:
    """Its settings as a line."""
    return " ".join(cell) or "base"


def _keys(cells: Sequence[Cell]) -> list[str]:
    """What is set in any of some cells, each once."""
    return list(dict.fromkeys(each.split("=")[0].lstrip("+") for cell in cells for each in cell))


def _figures(scores: Sequence[Any], others: Sequence[Any] = ()) -> dict[str, Figure]:
    """Every figure of some seeds' scores, or with ``others`` of the same seeds, of the differences to those."""
    found = {}
    zero = {"values": defaultdict(float), "rows": defaultdict(lambda: [0.0])}
    pairs = list(zip(scores, others or [zero] * len(scores), strict=True))
    names = scores[0]["values"] if scores else ()
    for name in [name for name in names if all(name in score["values"] for score in (*scores, *others))]:
        values = [a["values"][name] - b["values"][name] for a, b in pairs]
        if name in scores[0]["rows"]:
            rows = np.stack([np.subtract(a["rows"][name][0], b["rows"][name][0]) for a, b in pairs])
            found[name] = over_seeds(name, values, rows, scores[0]["rows"][name][1])
        else:
            found[name] = over_seeds(name, values)
    return found


def _tables(first: Cell, cells: Sequence[Mapping[str, Any]]) -> list[Part]:
    shown = [name for name in SHOWN if any(name in cell["figures"] for cell in cells)]
    keys, rows = _keys([cell["settings"] for cell in cells]), []
    if any(_keys([cell["settings"]]) != keys for cell in cells):
        keys = ["cell"]  # which differ in more than values
    for cell in cells:
        seeds = f"{len(cell['seeds'])}" + f", {cell['failed']} FAILED" * bool(cell["failed"])
        settings = [each.split("=", 1)[1] for each in cell["settings"]] if keys != ["cell"] else [cell["cell"]]
        rows.append([*settings, seeds, *(cell["figures"].get(name, "") for name in shown)])
    note = ("Mean over training seeds; 95 % interval for other seeds and other images. Errors and distances: lower is "
            f"better. {NOISE}: of z_t divided into image and noise, whatever is predicted.")  # fmt: skip
    parts: list[Part] = [Table("Cells", [*keys, "seeds", *shown], rows, note)]
    less = [[cell["cell"], d.name, d._replace(note=""), d.verdict]
            for cell in cells for d in (cell["less the first"].get(name) for name in shown) if d]  # fmt: skip
    if less:
        note = f"Paired by training seed, image, noise and prompt; {len(less)} comparisons at 95 % each."
        parts.append(Table(f"Less {named(first)}", ["cell", "of", "difference", "verdict"], less, note))
    return parts


def _curves(scores: Mapping[Cell, Mapping[int, Any]], folders: Mapping[tuple[Cell, int], Path]) -> list[Curve]:
    """The validation in training, and the error by timestep."""
    lines: dict[str, dict[str, list[Any]]] = defaultdict(dict)
    for cell, own in scores.items():
        several: dict[tuple[str, float], list[float]] = defaultdict(list)
        for seed, score in own.items():
            for row in csv.DictReader(io.StringIO((folders[cell, seed] / "metrics.csv").read_text("utf-8"))):
                for name, title in _IN_TRAINING.items():
                    if row.get(name):
                        several[title, int(row["step"])].append(float(row[name]))
            for time, error in score["times"].items():
                several[f"{NOISE} by timestep", sum(map(int, time.split(" to "))) / 2].append(error)
        for (title, x), values in several.items():
            lines[title].setdefault(named(cell), []).append((x, over_seeds(title, values), ""))
    return [Curve(title, "t" if "timestep" in title else "step", title.split(",")[0], found)
            for title, found in lines.items()]  # fmt: skip


def _side_by_side(scores: Mapping[Cell, Mapping[int, Any]], folders: Mapping[tuple[Cell, int], Path]) -> list[Part]:
    """The same prompts and seeds, a column a cell, of the first training seed that all cells have."""
    cells = [cell for cell, own in scores.items() if own]
    shared = set.intersection(*(set(scores[cell]) for cell in cells))
    if not shared:
        return []
    seed, kept = min(shared), []
    for i, cell in itertools.product(range(min(scores[cell][seed]["pictures"] for cell in cells)), cells):
        capsule, picture = open_png(folders[cell, seed] / "pictures" / f"{i:02d}.png")
        kept.append((picture, {"cell": named(cell), **capsule}))
    return [Pictures(f"Side by side, training seed {seed}", kept, [named(cell) for cell in cells])]


def as_csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """Every figure of every cell, a line each."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("mean", "low", "high", "difference", "difference low", "difference high", "verdict")
    writer.writerow(["cell", "seeds", "failed", "figure", *head])
    for cell in cells:
        for name, f in cell["figures"].items():
            d = cell["less the first"].get(name)
            less = ["", "", "", ""] if d is None else [d.value, d.low, d.high, d.verdict]
            writer.writerow([cell["cell"], len(cell["seeds"]), cell["failed"], name, f.value, f.low, f.high, *less])
    return buffer.getvalue()
