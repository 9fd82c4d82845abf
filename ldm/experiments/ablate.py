"""One question, many trainings: the cells of a grid of settings, each with the same seeds, and one table of them all.

A seed fixes initial weights, order of the data, noise, timesteps and caption drops (DESIGN §5), so two cells of one
seed differ in their settings alone; they are compared seed by seed, on the same held-out images, noise and prompts.

A run's folder says how far it came: checkpoints, then ``trained``, then ``measured.json``. Whatever was killed goes on
from there when the command is given again; a training that fails leaves ``failed.txt``, and is tried again.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
from tqdm import tqdm

from ldm import checkpoint
from ldm.data.shards import write_atomically
from ldm.evaluation.report import Report, Table, table, write_json, write_text
from ldm.experiments.cells import SCORE, Cell, Scoring, as_csv, compare_cells, score_run

FAILED, TRAINED, CACHE = "failed.txt", "trained", "cache"


class Run(NamedTuple):
    """A training."""

    cell: Cell
    seed: int
    overrides: tuple[str, ...]  # of ``ldm train``
    folder: Path


@dataclass(frozen=True)
class Ablation:
    """All cells, times all seeds."""

    base: Sequence[str]  # settings of every training, key=value
    cells: Sequence[Cell]  # settings of each besides; the first is what the others are held against
    seeds: Sequence[int]
    output: Path  # one folder an ablation; more cells and seeds may be added to it later
    cached: Sequence[Cell] = ()  # those for which the frozen models make the same of the data: computed once

    def runs(self) -> list[Run]:
        """Seed by seed, so that half of the time gives a table of half of the seeds."""
        found = []
        for seed, cell in itertools.product(self.seeds, self.cells):
            name, cache = " ".join(cell), [f"cache='{self.output / CACHE}'"] * (cell in self.cached)
            slug = f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
            found.append(Run(cell, seed, (*self.base, *cell, *cache), self.output / "runs" / slug / f"seed-{seed}"))
        return found


def ablate(
    ablation: Ablation,
    scoring: Scoring,
    jobs: int = 1,  # trainings at a time, on this machine
    threads: int = 1,  # of each, and of its scoring: they, not jobs, decide the last bits
    cluster: Mapping[str, Any] | None = None,  # of submitit's executor: a job a training; None: this machine
    command: str = "",  # that the report shows
) -> Report:
    """Train and score what is missing, and report: ``report.html`` and its kin, ``table.csv`` and ``table.tex``.

    Raises:
        ValueError: the folder holds an ablation of another base or scoring, or no run at all succeeded.
        InterruptedError: a training was stopped by a signal.
    """
    own, note = {"base": sorted(ablation.base), "scoring": scoring.describe()}, ablation.output / "ablation.json"
    if note.is_file() and (there := json.loads(note.read_text("utf-8"))) != own:
        other = [key for key in own if own[key] != there.get(key)]
        raise ValueError(f"output={ablation.output} holds an ablation of another {' and '.join(other)}; name another")
    write_json(note, own)
    runs = ablation.runs()
    if ablation.cached and not all((run.folder / TRAINED).is_file() for run in runs if run.cell in ablation.cached):
        given = [*ablation.base, *ablation.cached[0], f"output='{ablation.output / CACHE}'"]
        _ldm("precompute", given, ablation.output / "cache.log", threads)
    if cluster is None:
        calls = (joblib.delayed(run_one)(run, scoring, threads) for run in runs)
        done = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)
    else:
        import submitit

        executor = submitit.AutoExecutor(ablation.output / "jobs", cluster.get("cluster"))
        executor.update_parameters(**{key: value for key, value in cluster.items() if key != "cluster"})
        several = executor.map_array(run_one, runs, [scoring] * len(runs), [threads] * len(runs))
        done = (job.result() for job in several)
    for _ in tqdm(done, "trainings", len(runs), disable=None):
        pass
    faults = {(run.cell, run.seed): (run.folder / FAILED).read_text("utf-8").strip()
              for run in runs if (run.folder / FAILED).is_file()}  # fmt: skip
    folders = {(run.cell, run.seed): run.folder for run in runs if (run.cell, run.seed) not in faults}
    report = compare_cells(ablation.cells, folders, faults, command)
    report.write(ablation.output)
    parts = (part for part in report.parts if isinstance(part, Table))
    latex = [f"% {part.title}\n{table(part.columns, part.rows, 'latex_booktabs')}" for part in parts]
    write_text(ablation.output / "table.tex", "\n".join(latex))
    write_text(ablation.output / "table.csv", as_csv(report.result["cells"]))
    return report


def run_one(run: Run, scoring: Scoring, threads: int) -> None:
    """Train, go on, or do nothing; then score. A fault of the training's own is written down, not raised."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock:
        # Handed on to the training: where this process alone was killed, the next call waits for its end.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (run.folder / SCORE).is_file():
            return
        (run.folder / FAILED).unlink(missing_ok=True)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            if not (run.folder / TRAINED).is_file():
                _train(run, threads, lock.fileno())
            write_json(run.folder / SCORE, score_run(run.folder, scoring))
        except ValueError as error:
            write_text(run.folder / FAILED, f"{error}\n")
        finally:
            torch.set_num_threads(before)


def _train(run: Run, threads: int, lock: int) -> None:
    began = any((run.folder / "checkpoints").glob(f"*/{checkpoint.MANIFEST}"))
    new = [*run.overrides, f"seed={run.seed}", f"output='{run.folder}'"]
    _ldm("train", [f"resume={run.folder}"] if began else new, run.folder / "log.txt", threads, [lock])
    write_atomically(run.folder / TRAINED, b"")


def _ldm(command: str, given: Sequence[str], log: Path, threads: int, handed_on: Sequence[int] = ()) -> None:
    """In a process of its own: a crash of one is not that of all."""
    env = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
    line = [sys.executable, "-m", "ldm.cli", command, *given]
    with log.open("a") as file:
        done = subprocess.run(line, stdout=file, stderr=file, env=env, pass_fds=handed_on, check=False)
    if done.returncode > 128:
        raise InterruptedError(f"stopped by a signal ({log}); the same command with the same output= goes on")
    if done.returncode:
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("error: ")]
        raise ValueError(said[-1].removeprefix("error: ") if said else f"exit code {done.returncode}, see {log}")
