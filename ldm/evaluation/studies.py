"""What ``ldm evaluate`` does, a report each: score a model, compare the losses of two, sweep guidance or steps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm import checkpoint, loading
from ldm.data import STYLES, Sample
from ldm.data.emoji import splits as all_splits
from ldm.evaluation.alignment import COLUMNS as ALIGNMENT
from ldm.evaluation.figures import Figure, compare, mean, paired
from ldm.evaluation.loss import Losses, check_comparable, measure
from ldm.evaluation.model import Drawing, Judge, Scored, evaluate_pairs, pairs_of
from ldm.evaluation.reconstruction import evaluate_autoencoder
from ldm.evaluation.report import Curve, Part, Pictures, Report, Table
from ldm.evaluation.scores import METRICS

SPLITS = ("heldout_pairs", "train")
IN_GRID = 96  # pictures of a split that the report shows
QUALITY, ADHERENCE = "KID-EffNet", ALIGNMENT[0]
USUAL: Mapping[str, Sequence[float]] = {
    "guidance": (1.0, 1.5, 2.0, 3.0, 5.0), "steps": (5, 10, 20, 50), "ema": (0.04, 0.05, 0.07, 0.1, 0.15)
}  # fmt: skip


def score(
    source: str | Path,  # as for ldm.load; a run of stage one is scored for its autoencoder alone
    data: str = "emoji200",  # emoji48, emoji200 or emoji
    limit: int | None = None,  # so many images of each split
    drawing: Drawing | None = None,
    against: Path | None = None,  # folder of an earlier evaluation, to compare with
    command: str = "",  # that the report shows
    judge: Judge | None = None,  # to reuse one of this data set
) -> Report:
    """Everything about one model: what it draws, its loss, its autoencoder."""
    drawing, earlier = drawing or Drawing(), None if against is None else _read(against)
    report = Report(str(source), command, result={"model": str(source)})
    splits = (*SPLITS, *(split for split in all_splits().get(data, ()) if split not in SPLITS))  # heldout_concepts
    samples = {split: pairs_of(data, split, limit) for split in splits}
    if "unet" in checkpoint.read_manifest(loading.find(source))["components"]:
        model = loading.load(source)
        judge = Judge(data) if judge is None else judge
        for split in splits:
            scored = evaluate_pairs(model, data, split, limit, drawing, judge=judge)
            own = {"figures": scored.figures, "table": scored.table}
            report.result[split] = {**own, "reference": scored.reference.figures()}
            report.parts += _drawn(data, scored)
            if earlier is not None and split in earlier:
                report.parts.append(_compared(f"{split}: this evaluation less that in {against}", own, earlier[split]))
        for split in splits:
            report.parts += _loss_parts(split, measure(model, samples[split]), report, model.name)
        autoencoder, weights = model.autoencoder.float(), model.name  # on a GPU it may be in half precision
    else:
        autoencoder, weights = loading.load_autoencoder(source), loading.read(source, only=("autoencoder",))[1]
    rows = []
    network = None if judge is None else judge.scorer.network
    for split in [split for split in samples if split.startswith("heldout")]:
        by_key = sorted(samples[split], key=lambda sample: sample.key)
        found, std, active, _ = evaluate_autoencoder(autoencoder, by_key, drawing.batch_size, network)
        report.result[f"autoencoder, {split}"] = {"figures": found, "std of z": std.tolist(), "active units": active,
                                                  "fingerprint": _fingerprint(by_key, weights)}  # fmt: skip
        named = {**found, "active units": active, "std of z": ", ".join(f"{value:.2f}" for value in std)}
        rows += [[split, name, value] for name, value in named.items()]
    report.parts.append(Table(f"Autoencoder, {data}", ["split", "figure", "value"], rows))
    return report


def compare_losses(
    source: str | Path, against: str | Path, data: str = "emoji200", limit: int | None = None, command: str = ""
) -> Report:
    """Loss of one model less that of another on the same (x, t, ε), and what the pairing brings.

    Raises:
        ValueError: if their losses measure different things.
    """
    models = [loading.load(source), loading.load(against)]
    check_comparable(*models)
    report = Report(f"{source} against {against}", command, result={"model": str(source), "against": str(against)})
    for split in SPLITS:
        losses = [measure(model, pairs_of(data, split, limit)) for model in models]
        found = losses[0].less(losses[1])
        half = (found[0].high - found[0].low) / 2
        note = "Negative: the first is better. "
        if found[0].gain is not None:
            note += (f"Paired, these {found[0].n} images resolve a difference of {half:.2g}; unpaired they would "
                     f"resolve {half * found[0].gain:.2g}, {found[0].gain:.3g} times as much.")  # fmt: skip
        report.result[split] = found
        report.parts.append(_differences(f"Loss on {data}, {split}: {source} less {against}, by timestep", found, note))
        for name, one, model in zip("AB", losses, models, strict=True):
            report.parts += _loss_parts(f"{split}, {name}", one, report, model.name)
    return report


def sweep(
    source: str | Path,
    axis: str,  # guidance, steps, or ema: σ_rel of a run with ema.power
    values: Sequence[float] | None = None,  # of it; None takes the usual ones
    samplers: Sequence[str] = ("ddim",),  # a line each
    data: str = "emoji200",
    split: str = "train",
    limit: int | None = None,
    drawing: Drawing | None = None,
    command: str = "",
    judge: Judge | None = None,
) -> Report:
    """Quality against adherence over guidance scales, or against steps of sampling, or lengths of averages."""
    if axis not in USUAL:
        raise ValueError(f"sweep={axis} is unknown; choose {', '.join(USUAL)}")
    drawing = drawing or Drawing()
    samples = pairs_of(data, split, limit)  # refuses what there is none of, before anything is computed
    values, loss, cost, length = USUAL[axis] if values is None else values, "loss", "UNet passes", "σ_rel"
    model = loading.load(source, weights=f"ema:{values[0]}" if axis == "ema" else "ema")
    judge = Judge(data) if judge is None else judge
    found: list[tuple[str, float, float, Scored]] = []
    for sampler in dict.fromkeys(samplers):
        for value in values:
            changed: dict[str, Any] = {"sampler": sampler}
            if axis == "ema":
                model = loading.load(source, weights=f"ema:{value}")
            else:
                changed["guidance_scale" if axis == "guidance" else "steps"] = value
            scored = evaluate_pairs(model, data, split, limit, replace(drawing, **changed), judge=judge)
            if axis == "ema":
                losses = measure(model, samples)
                scored.figures[loss] = mean(loss, losses.error.mean(1), losses.groups)
            passes = scored.settings["evaluations"] * (1 if scored.settings["guidance_scale"] == 1.0 else 2)
            found.append((sampler, value, passes, scored))
    names = list(found[0][3].figures)
    if QUALITY not in names:
        raise ValueError(f"{found[0][3].figures[ADHERENCE].n} pictures a setting are too few for a curve; raise limit=")
    quality, adherence = (np.array([s.figures[name].value for *_, s in found]) for name in (QUALITY, ADHERENCE))
    front = [not ((quality < q) & (adherence > a)).any() for q, a in zip(quality, adherence, strict=True)]
    rows = [[sampler, value, passes, "yes" if best else "", *scored.figures.values()]
            for (sampler, value, passes, scored), best in zip(found, front, strict=True)]  # fmt: skip
    note = f"Pareto: no other setting is better both in {QUALITY} and in {ADHERENCE}, which the intervals qualify."
    shown = {"guidance": [(ADHERENCE, QUALITY)], "steps": [(cost, QUALITY), (cost, ADHERENCE)],
             "ema": [(length, loss), (length, QUALITY)]}  # fmt: skip
    curves = []
    for x, y in shown[axis]:
        lines: dict[str, list[tuple[float | Figure, Figure, str]]] = {sampler: [] for sampler in samplers}
        for sampler, value, passes, scored in found:
            places: dict[str, float | Figure] = {cost: passes, length: value, **scored.figures}
            lines[sampler].append((places[x], scored.figures[y], f"{value:g}" if x == ADHERENCE else ""))
        curves.append(Curve(f"{y} against {x}", x, y, lines))
    table = Table(f"{data}, {split}", ["sampler", axis, cost, "Pareto", *names], rows, note)
    pictures = [_pictures(f"{sampler}, {axis} {value:g}", scored) for sampler, value, _, scored in found]
    result = [{"passes": passes, **scored.settings, "figures": scored.figures} for *_, passes, scored in found]
    return Report(f"{source}, over {axis}", command, [table, *curves, *pictures], {"sweep": result})


# ------------------------------------------------------------------------------------------------- parts of a report


def _drawn(data: str, scored: Scored) -> list[Part]:
    """The pair scores beside what to hold them against, the other figures, and the pictures."""
    rows: list[list[Any]] = [["model", *(scored.figures[name] for name in METRICS)]]
    rows += [[f"– asked for {s}", *scored.scores.figures(s).values()] for s in STYLES if s in scored.scores.styles]
    rows.append(["real images of these pairs", *scored.reference.figures().values()])
    # Dealt another style, a real image would be compared with itself: that row is for pictures that a model drew.
    rows.append(["model, its style words dealt out at random", *scored.scores.ignoring_style()])
    rows.append(["chance", *scored.scores.chance()])
    note = "95 % intervals over concepts."
    if scored.num_left_out:
        note += f" {scored.num_left_out} pairs were left out, whose concept no other hand drew."
    others = {name: figure for name, figure in scored.figures.items() if name not in METRICS}
    said = "; ".join(f"{key}: {value}" for key, value in others[ADHERENCE].fingerprint.items() if key != "n")
    title = f"{data}, {scored.split}: {len(scored.table)} pictures"
    return [
        Table(title, ["of", *METRICS], rows, note),
        Table(f"{title}, by features", ["figure", "value", "n"], [[k, f, f.n] for k, f in others.items()], said),
        _pictures(title, scored),
    ]


def _pictures(title: str, scored: Scored) -> Pictures:
    about = [{**row, **scored.settings} for row in scored.table]
    return Pictures(title, list(zip(scored.images, about, strict=True))[:IN_GRID])


def _fingerprint(samples: Sequence[Sample], weights: str) -> dict[str, Any]:
    """Of figures that hang on images and weights alone."""
    content = hashlib.sha256(b"".join(sample.image for sample in samples)).hexdigest()[:16]
    return {"n": len(samples), "reference": content, "weights": weights}


def _loss_parts(title: str, losses: Losses, report: Report, weights: str) -> list[Part]:
    """Loss by timestep and caption, and the worst images; also into the report's result."""
    times, groups, worst = losses.by_timestep(), losses.by_caption(), losses.worst()
    report.result[f"loss, {title}"] = {"by_timestep": times, "by_caption": groups, "worst": worst,
                                        "fingerprint": _fingerprint(losses.samples, weights)}  # fmt: skip
    middle = [sum(map(int, figure.name.split(" to "))) / 2 for figure in times]
    line = [(t, figure, "") for t, figure in zip(middle, times, strict=True)]
    return [
        Curve(f"Loss on {title}, by timestep", "t", "squared error", {title: line}),
        Table(f"Loss on {title}, by what captions say", ["group", "loss", "n"], [[f.name, f, f.n] for f in groups]),
        Table(f"Loss on {title}, worst images", ["key", "caption", "loss"], worst),
    ]


def _read(folder: Path) -> dict[str, Any]:
    """The result of an earlier evaluation."""
    try:
        found = json.loads((folder / "result.json").read_text("utf-8"))
        splits = {*SPLITS, *(key for key in found if "table" in found[key])}
        return {split: {key: found[split][key] for key in ("figures", "table")} for split in splits}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"against={folder}: its result.json is not that of a model's evaluation ({error})") from error


def _compared(title: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """This result less an earlier one: paired where the pictures are of the same pairs and seeds."""
    ours, theirs = own["table"], other["table"]
    same = [(row["key"], row["seed"]) for row in ours] == [(row["key"], row["seed"]) for row in theirs]
    found = []
    for name, figure in own["figures"].items():
        if name in other["figures"]:
            difference = compare(figure, Figure(**other["figures"][name]))
            if same and name in ours[0]:
                a, b = (np.array([row[name] for row in table], dtype=float) for table in (ours, theirs))
                groups = [row["concept"] for row in ours]
                difference = paired(name, a, b, groups)._replace(note=difference.note)
            found.append(difference)
    return _differences(title, found)


def _differences(title: str, found: Sequence[Figure], note: str = "") -> Table:
    rows = [[d.name, d._replace(note=""), d.verdict, d.gain or ""] for d in found]
    return Table(title, ["of", "difference", "verdict", "narrower by pairing"], rows, note)
