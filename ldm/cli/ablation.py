"""``ldm ablate``: from a line, or a file of ten, to a grid of trainings and its report."""

import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from ldm.cli.settings import OVERRIDE, configs, parse, stamp
from ldm.cli.targets import check_targets
from ldm.cli.training import STOPPED_ITSELF, compose

_OWN = {"seeds": 3, "jobs": None, "threads": 1, "cluster": None, "limit": None, "pictures": 1, "steps": 20,
        "guidance_scale": None, "sampler": "ddim", "cells": None, "output": None}  # fmt: skip
# Settings that may change what the frozen models make of the data; cells with others share one cache.
_FROZEN = ("cache", "data", "text", "autoencoder", "experiment", "repa", "stage")


def ablate(arguments: list[str]) -> int:
    """``ldm ablate``; the exit code is that of a training which stopped for a fault of its own, if one did."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    given = _settings(arguments)
    own = [f"{key}={given.pop(key)}" for key in _OWN if key in given]
    settings, _ = parse(own, _OWN, ("sampler", "output"))
    listed = settings["cells"] or [""]
    if not isinstance(listed, list) or not all(isinstance(cell, str) for cell in listed):
        raise ValueError(f"cells={listed}: a list of texts is expected, each a cell's settings: ['', 'loss.min_snr=5']")
    if decided := sorted({"seed", "resume"} & given.keys()):
        raise ValueError(f"{decided[0]}= is what an ablation decides; give seeds=3 or seeds=[0,1,2], and output= again")
    base, axes = [], []
    for line, override in zip(
        lines := [f"{key}={value}" for key, value in given.items()],
        OverridesParser.create().parse_overrides(lines),
        strict=True,
    ):
        if override.is_sweep_override():
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            base.append(line)
    cells = [(*shlex.split(cell), *rest) for cell in listed for rest in itertools.product(*axes)]
    if len(cells) < 2 or len(cells) > len(set(cells)):
        raise ValueError(
            f"no question came: {len(set(cells))} different cells of {len(cells)}; give a setting several values, "
            "as in diffusion.prediction=epsilon,v, or several cells="
        )

    from ldm import request
    from ldm.evaluation import Drawing
    from ldm.evaluation.model import pairs_of
    from ldm.experiments.ablate import Ablation
    from ldm.experiments.ablate import ablate as perform
    from ldm.experiments.cells import Scoring

    cluster, limit, threads = settings["cluster"], settings["limit"], request.count("threads", settings["threads"])
    if limit is not None:
        request.count("limit", limit)
    seeds, jobs = settings["seeds"], settings["jobs"]
    if isinstance(seeds, list):
        seeds = [request.count("seeds", seed, 0) for seed in seeds]
    else:
        seeds = range(request.count("seeds", seeds))
    jobs = max(1, (os.cpu_count() or 1) // threads) if jobs is None else request.count("jobs", jobs)
    output = Path(settings["output"] or f"outputs/ablations/{stamp()}")
    for cell in reversed(cells):  # what is no setting or choice is refused before anything is trained
        cfg = compose([*base, *cell])[0]
        check_targets(OmegaConf.to_container(cfg, resolve=False))
    cached = cells if cfg.stage == "diffusion" and cfg.cache is True else []
    cached = [cell for cell in cached if not any(re.split(r"[.=]", each.lstrip("+~"))[0] in _FROZEN for each in cell)]
    ablation = Ablation(base, cells, seeds, output, cached)
    data = cfg.data.validation.get("name")  # of the first cell: all are scored on the same images
    if data in (None, "openmoji"):
        found, count = instantiate(cfg.data.validation), limit or cfg.validation.images
        data, samples = None, [found[i] for i in range(0, len(found), max(1, len(found) // count))][:count]
    else:
        samples = pairs_of(data, "heldout_pairs", limit)
    drawing = Drawing(settings["pictures"], settings["steps"], settings["guidance_scale"], settings["sampler"])
    command = shlex.join(["ldm", "ablate", *arguments])
    report = perform(ablation, Scoring(samples, data, limit, drawing), jobs, threads,
                     {"cluster": cluster} if isinstance(cluster, str) else cluster, command)  # fmt: skip
    files = "report.html report.md table.csv table.tex result.json"
    sys.stdout.write(f"{report.markdown()}\nwritten to {output}: {files}\n")
    return STOPPED_ITSELF if report.result["failed"] else 0


def _settings(arguments: list[str]) -> dict[str, str]:
    """Settings as text by key: those of ``ablation=``, a file of settings, and over them those of the command line."""
    for argument in arguments:
        if not OVERRIDE.match(argument):
            raise ValueError(f"{argument!r} is no setting; write key=value, see ldm ablate --help")
    given = dict(argument.split("=", 1) for argument in arguments)
    name = given.pop("ablation", None)
    if name is None:
        return given
    shipped = configs() / "ablation"
    path = Path(name) if name.endswith(".yaml") else shipped / f"{name}.yaml"
    if not path.is_file():
        choices = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
        raise ValueError(f"ablation={name}: no such file; choose one of {choices}, or give a file that ends in .yaml")
    read: Any = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"ablation={name}: a file of settings, key: value, is what is expected")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in read.items()}
    return {**texts, **given}
