"""How long until it works? ``train.py experiment=emoji/speedrun``, beside it the usual loop over diffusers' modules.

    python -m tests.benchmarks.speedrun outputs/speedrun    # trains what is not there yet, scores, writes the table
    python -m tests.benchmarks.speedrun outputs/speedrun until=60  # the other's minutes, if it shall be fewer
    python -m tests.benchmarks.speedrun outputs/other experiment=emoji/speedrun trainer.max_steps=100  # writes none

Both take the same data and autoencoder, the one that the speedrun trains first, and its minutes. The other trains until
three times the minutes in which ours came to the aim, with the choices of diffusers' ``train_text_to_image.py``: images
and captions encoded at every step, ε and a plain squared error, no caption dropped, batches of 16, AdamW at a constant
1e-4 after 500 steps, EMA to 0.9999, float32. Its UNet is diffusers', of the same widths, heads and levels with
attention. Every checkpoint is scored by pair accuracy, with eight pictures a pair: ours at the guidance that its config
names, the other's at the one that serves its last one best on the very pairs. The aim counts as reached at the first
checkpoint after which none is below it. The other loop may be stopped: the same command goes on with it, a few minutes
back, and scores are kept in RUN/scores.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import ldm
from ldm.checkpoint import MANIFEST
from ldm.cli.settings import value_of
from ldm.convert.diffusers import read_part
from ldm.data import STYLES, PositionSampler, TrainingSet
from ldm.diffusion import Schedule
from ldm.evaluation import Drawing, Judge, evaluate_pairs
from ldm.evaluation.report import table, write_json
from ldm.loading import load_autoencoder, load_text_encoder
from ldm.pipeline import Defaults, LatentDiffusion
from tests.benchmarks.common import DOCS, machine, write
from tests.tools.gallery import Sheet

DATA, HELD = "emoji200", "heldout_pairs"
SHARE = 0.4  # of the reference's pair accuracy: the aim
GUIDANCE = (1.0, 1.5, 3.0, 7.5)  # of which the peer takes its best
STEPS = 10  # of DDIM
PICTURES = 8  # of a held-out pair: three gave 0.242 where eight give 0.228, on either side of the aim
SHOWN = ("pair accuracy", "concept R@1", "concept R@5", "style accuracy", "KID-EffNet")
THINGS = ("red apple", "rocket", "pizza", "cat", "sunflower", "sailboat")  # in the picture
TIMES = 3  # as long as ours took to the aim, the peer is trained
KEPT = 5.0  # minutes between the states from which a stopped peer goes on


def ours(run: Path, arguments: list[str]) -> None:
    """Train as a user does, unless that is done."""
    if not (run / "checkpoints").exists():
        subprocess.run([sys.executable, "train.py", *arguments, f"output={run}"], check=True)


def minutes(run: Path) -> dict[Path, float]:
    """The checkpoints of a speedrun, with the minutes since its stage one began."""
    begin = (run / "autoencoder" / "environment.json").stat().st_mtime
    found = sorted(run.glob(f"checkpoints/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return {path.parent: (path.stat().st_mtime - begin) / 60 for path in found}


def peer(run: Path, first: float, marks: Sequence[float]) -> dict[Path, float]:
    """diffusers' loop on the speedrun's autoencoder from minute ``first`` on; its UNets at some minutes, with those."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    folder, kept = run / "peer", run / "peer" / "state.pt"
    own = ldm.load(run).unet.arguments
    levels = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in own["attention"]]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=tuple(own["widths"]), layers_per_block=own["num_blocks"],
        cross_attention_dim=own["context_dim"], attention_head_dim=tuple(own["num_heads"]),  # their number
        down_block_types=tuple(levels), up_block_types=tuple(level.replace("Down", "Up") for level in levels[::-1]),
    ).train()  # fmt: skip
    ema = EMAModel(unet.parameters(), decay=0.9999)
    adam = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / 500))
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    parts: dict[str, Any] = {"unet": unet, "ema": ema, "adam": adam, "rate": rate}
    done, spent, found = 0, 0.0, dict[str, float]()
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        done, spent, found = state["step"], state["spent"], state["found"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
    autoencoder, text = load_autoencoder(run / "autoencoder"), load_text_encoder("emoji")
    images = TrainingSet(instantiate(OmegaConf.load(run / "config.yaml").data.train), 0, 128, 128, False, False)
    loader = torch.utils.data.DataLoader(images, 16, sampler=PositionSampler(16, done, 10**9, 0, 1, 1))
    batches, start, last = iter(loader), time.monotonic(), spent
    while first + spent < max(marks):
        batch = next(batches)
        with torch.no_grad():
            posterior = autoencoder.posterior(batch["image"])
            z = autoencoder.normalise(posterior.mean + posterior.std * torch.randn_like(posterior.mean))
            context = text(batch["caption"])
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        prediction = unet(scheduler.add_noise(z, noise, t), t, context).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adam.step()
        rate.step()
        adam.zero_grad()
        ema.step(unet.parameters())
        done, now = done + 1, time.monotonic()
        before, spent, start = spent, spent + (now - start) / 60, now
        if passed := any(before < mark - first <= spent for mark in marks):
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            unet.save_pretrained(folder / f"step-{done}")
            ema.restore(unet.parameters())
            found[f"step-{done}"] = first + spent
            sys.stderr.write(f"peer: {done} steps in {spent:.1f} minutes\n")
        if passed or spent >= last + KEPT:
            last = spent
            state = {"step": done, "spent": spent, "found": found, "rng": torch.get_rng_state()}
            folder.mkdir(exist_ok=True)
            torch.save(state | {name: part.state_dict() for name, part in parts.items()}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
        start += time.monotonic() - now  # what was written counts for neither
    return {folder / name: minute for name, minute in found.items()}


def load_peer(folder: Path) -> LatentDiffusion:
    """A peer's UNet in our model, to be sampled and scored as ours."""
    autoencoder = load_autoencoder(folder.parents[1] / "autoencoder")
    unet = read_part(folder, "unet", "main", False)[0]
    parts = (unet.eval().requires_grad_(False), autoencoder, load_text_encoder("emoji"))
    return LatentDiffusion(*parts, Schedule("linear"), "epsilon", Defaults("trailing", 1.0, 128, 128))  # type: ignore[arg-type]


class Scores:
    """What checkpoints of a run score; each is drawn once, and its figures kept in RUN/scores.json."""

    def __init__(self, run: Path) -> None:
        self.run, self.path, self.judge = run, run / "scores.json", Judge(DATA)
        self.kept: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def of(self, load: Callable[[Path], LatentDiffusion], folder: Path, split: str, drawing: Drawing) -> dict[str, Any]:
        """The cells of a checkpoint's row, its pair accuracy and R@5, and the share of the reference."""
        key = f"{folder.relative_to(self.run)} {split} {drawing}"
        if key not in self.kept:
            scored = evaluate_pairs(load(folder), DATA, split, None, drawing, self.judge)
            accuracy, real = (each.figures()["pair accuracy"].value for each in (scored.scores, scored.reference))
            self.kept[key] = {
                "cells": [str(scored.figures[name]) for name in SHOWN],
                "rank": [accuracy, scored.figures["concept R@5"].value],
                "share": accuracy / real,
            }
            write_json(self.path, self.kept)
            sys.stderr.write(f"{key}: {', '.join(self.kept[key]['cells'])}\n")
        return self.kept[key]


def reached(shares: Mapping[float, float]) -> float | None:
    """The first minute from which on no share of the reference is below the aim."""
    held = None
    for minute in sorted(shares, reverse=True):
        if shares[minute] < SHARE:
            break
        held = minute
    return held


def picture(lasts: Mapping[str, LatentDiffusion], guidance: Mapping[str, float]) -> None:
    """What both draw in the end, from the same prompts, into docs/images."""
    sheet = Sheet()
    for thing in THINGS:
        prompts = [f"a {thing}, {style} style" for style in STYLES]
        drawn = [
            model.sample(prompts, seed=list(range(len(prompts))), steps=STEPS, guidance_scale=guidance[name]).images
            for name, model in lasts.items()
        ]
        sheet.add(f"{thing}: {' | '.join(lasts)}", torch.cat(drawn))
    sheet.write(DOCS / "images" / "speedrun.jpg")


def main(arguments: list[str]) -> None:
    """Train, score, and write docs/speedrun.md unless other settings are given."""
    run, given = Path(arguments[0]), [word for word in arguments[1:] if not word.startswith("until=")]
    until = value_of("until", next((word[6:] for word in arguments[1:] if word not in given), ".inf"))
    if not isinstance(until, int | float):
        sys.exit(f"until={until} must be a number: minutes, stage one's among them")
    ours(run, given or ["experiment=emoji/speedrun"])
    own = minutes(run)
    first = max(path.stat().st_mtime for path in run.glob(f"autoencoder/checkpoints/*/{MANIFEST}"))
    first = (first - (run / "autoencoder" / "environment.json").stat().st_mtime) / 60
    if not until > first:
        sys.exit(f"until={until:g}: stage one alone took {first:.1f} minutes, and both share it; give more")
    scores = Scores(run)
    rows: list[list[object]] = []
    when: dict[str, float | None] = {}
    guidance: dict[str, float] = {}
    lasts: dict[str, LatentDiffusion] = {}
    for name, load in (("ours", ldm.load), ("diffusers' loop", load_peer)):
        if name == "ours":
            checkpoints = own
        else:
            aim = when["ours"]
            marks = [max(own.values()), *([aim, TIMES * aim] if aim else [])]
            checkpoints = peer(run, first, [min(mark, until) for mark in marks])
        last, scale = list(checkpoints)[-1], ldm.load(run).defaults.guidance_scale
        if name != "ours":
            tried = {g: scores.of(load, last, HELD, Drawing(PICTURES, STEPS, g))["rank"] for g in GUIDANCE}
            scale = max(tried, key=tried.__getitem__)
        shares = dict[float, float]()
        for folder, minute in checkpoints.items():
            row = scores.of(load, folder, HELD, Drawing(PICTURES, STEPS, scale))
            shares[minute] = row["share"]
            rows.append([name, f"{minute:.1f}", *row["cells"], f"{row['share']:.2f}"])
        training = scores.of(load, last, "train", Drawing(1, STEPS, scale))
        rows.append([f"{name}, at its end, training pairs", "", *training["cells"], ""])
        when[name], guidance[name], lasts[name] = reached(shares), scale, load(last)
    heads = ["held-out pairs", "minutes", *SHOWN, "of the reference"]
    said = "; ".join(f"{name} {f'after {m:.0f} minutes' if m else 'not reached'}" for name, m in when.items())
    guided = ", ".join(f"{scale:g} for {name}" for name, scale in guidance.items())
    here = re.sub(r"\d+ threads", f"{os.cpu_count()} threads in training", machine())  # scored with any number
    where = (
        f"{here}. Stage one {first:.1f} minutes of each. {STEPS} DDIM steps, guidance {guided}; {PICTURES} pictures of "
        f"a held-out pair, one of a training pair. {SHARE} of the reference: {said}."
    )
    content = [where, "", table(heads, rows)]
    sys.stdout.write("\n".join(content) + "\n")
    if not given:
        write("speedrun.md", "speedrun", content)
        picture(lasts, guidance)


if __name__ == "__main__":
    main(sys.argv[1:])
