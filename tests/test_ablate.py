"""Ablations: many trainings, one table; killed, failed, split over processes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ldm
from ldm.cli import main
from ldm.cli.settings import configs
from ldm.evaluation import over_seeds
from ldm.evaluation.report import Curve, Pictures
from ldm.experiments import ablate
from ldm.experiments.cells import compare_cells
from ldm.provenance import read_png
from tests.training.test_training import AUTOENCODER, arguments, unet

ROOT = Path(ldm.__file__).parents[1]
TABLES = ("table.csv", "table.tex")


@pytest.fixture(scope="module")
def settings(shapes: Path, parts: tuple[Path, Path]) -> list[str]:
    """Of two cells of tiny trainings: one predicts v, one ε."""
    own = arguments(shapes, Path(), "diffusion", 6, *unet(*parts), "samples.every=0", "validation.every=3")
    own = [setting for setting in own if not setting.startswith("output=")]
    return [*own, "checkpoint.every=3", "diffusion.prediction=v,epsilon", "steps=2"]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells, two seeds, two processes."""
    folder = tmp_path_factory.mktemp("ablation") / "two processes"
    assert main(["ablate", *settings, "seeds=2", "jobs=2", f"output={folder}"]) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines()))


def test_the_table_has_every_cell_its_interval_and_its_paired_difference(finished: Path) -> None:
    first, second = (row for row in rows(finished) if row["figure"] == "denoising MSE")
    assert (first["cell"], second["cell"]) == ("diffusion.prediction=v", "diffusion.prediction=epsilon")
    assert first["seeds"] == second["seeds"] == "2"
    assert float(first["low"]) < float(first["mean"]) < float(first["high"])
    assert float(second["difference"]) == pytest.approx(float(second["mean"]) - float(first["mean"]))
    assert first["difference"] == ""
    # By hand from what each run measured: the mean over both seeds.
    measured = [json.loads(path.read_text()) for path in sorted(finished.glob("runs/*_v-*/seed-*/measured.json"))]
    assert [len(one["rows"]["denoising MSE"][0]) for one in measured] == [8, 8]
    assert float(first["mean"]) == pytest.approx(np.mean([one["rows"]["denoising MSE"][0] for one in measured]))
    assert (finished / "cache/train").is_dir()  # encoded once, not in every run
    configs_of_runs = [path.read_text("utf-8") for path in finished.glob("runs/*/*/config.yaml")]
    assert [f"cache: {finished / 'cache'}" in text for text in configs_of_runs] == [True] * 4
    text = (finished / "report.md").read_text("utf-8")
    assert "Less diffusion.prediction=v" in text
    assert "Failed" not in text
    assert (finished / "table.tex").read_text("utf-8").count(r"\toprule") == 2


def test_pictures_stand_side_by_side_and_say_what_made_them(finished: Path) -> None:
    cells = [("diffusion.prediction=v",), ("diffusion.prediction=epsilon",)]
    folders = {
        (cell, seed): next(finished.glob(f"runs/*_{cell[0].split('=')[1]}-*/seed-{seed}"))
        for cell in cells for seed in (0, 1)
    }  # fmt: skip
    parts = compare_cells(cells, folders, {}).parts
    (pictures,) = [part for part in parts if isinstance(part, Pictures)]
    assert list(pictures.columns) == [" ".join(cell) for cell in cells]
    about = [about for _, about in pictures.pictures]
    assert len(about) == 16
    for left, right in zip(about[::2], about[1::2], strict=True):
        assert (left["prompt"], left["seed"]) == (right["prompt"], right["seed"])
        assert left["cell"] != right["cell"]
    capsule = read_png(next(iter(folders.values())) / "pictures/00.png")
    assert {"prompt", "negative_prompt", "seed", "sampler", "steps", "model", "versions"} <= capsule.keys()
    curves = {part.title: part for part in parts if isinstance(part, Curve)}
    assert [len(curve.lines) for curve in curves.values()] == [2, 2]
    in_training = curves["Error in training, of what each predicts"]
    assert [[point[0] for point in line] for line in in_training.lines.values()] == [[2, 5], [2, 5]]


def test_a_killed_ablation_goes_on_and_gives_the_table_of_one_that_was_not_and_of_two_processes(
    settings: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "one process"
    command = [sys.executable, "-m", "ldm.cli", "ablate", *settings, "seeds=2", "jobs=1", f"output={folder}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    # In the middle of the second training, which itself lives on for a while: nobody tells it.
    while not (list(folder.glob("runs/*/*/measured.json")) and len(list(folder.glob("runs/*/*/log.txt"))) == 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (done,) = folder.glob("runs/*/*/measured.json")
    written = done.stat().st_mtime_ns
    assert main(["ablate", *settings, "seeds=2", "jobs=1", f"output={folder}"]) == 0
    assert done.stat().st_mtime_ns == written
    for name in TABLES:
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_failed_cell_is_marked_and_a_setting_that_changes_nothing_differs_by_nothing(
    settings: list[str], tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "failing"
    own = [setting for setting in settings if not setting.startswith("diffusion.prediction=")]
    command = ["ablate", *own, "checkpoint.keep=1,2,0", "seeds=1", "jobs=1", f"output={folder}"]
    assert main(command) == 3
    said = capsys.readouterr().out
    assert "0, 1 FAILED" in said
    assert "intervals and keep must be at least 1" in said
    same, failed = (row for row in rows(folder)[1:] if row["figure"] == "denoising MSE"), rows(folder)[-1]
    assert [(float(row["difference"]), row["verdict"]) for row in same] == [(0.0, "one seed")]
    assert failed["cell"] != "checkpoint.keep=0"  # it has no figures, and none is made up
    report = json.loads((folder / "result.json").read_text("utf-8"))
    assert [(cell, seed) for cell, seed, _ in report["failed"]] == [("checkpoint.keep=0", 0)]
    assert [cell["failed"] for cell in report["cells"]] == [0, 0, 1]

    # The same once more: what is measured stays; the failed one is tried again, and fails again.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/measured.json")}
    assert main(command) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/measured.json")} == before
    assert len((next(folder.glob("runs/*_0-*/seed-0/log.txt"))).read_text().split("error: ")) == 3
    with pytest.raises(ValueError, match="all 1 trainings failed; one said: no memory"):
        compare_cells([("a=1",)], {}, {(("a=1",), 0): "no memory"})


def test_stage_one_is_ablated_by_its_own_figures(shapes: Path, tmp_path: Path) -> None:
    own = arguments(shapes, Path(), "autoencoder", 4, *AUTOENCODER, "samples.every=0", "validation.every=2")
    twice = ("output=", "validation.every=50", "samples.every=100")
    own = [setting for setting in own if not setting.startswith(twice)]
    assert main(["ablate", *own, "loss.beta=0.18,1000", "seeds=1", "jobs=1", f"output={tmp_path / 'beta'}"]) == 0
    found = {(row["cell"], row["figure"]): float(row["mean"]) for row in rows(tmp_path / "beta")}
    assert {"PSNR, mode (dB)", "PSNR, sample (dB)", "SSIM", "KL a unit (nats)", "active units"} == {f for _, f in found}
    assert found["loss.beta=1000", "KL a unit (nats)"] < found["loss.beta=0.18", "KL a unit (nats)"]
    text = (tmp_path / "beta/report.html").read_text("utf-8")
    assert "PSNR in training" in text
    assert text.count("data:image/webp") == 32  # of two cells, eight from the mode and eight from a sample


def test_a_cluster_does_what_this_machine_does(settings: list[str], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    lost = next(folder.glob("runs/*/seed-1/measured.json"))
    before = lost.read_bytes()
    lost.unlink()
    assert main(["ablate", *settings, "seeds=2", "cluster=local", f"output={folder}"]) == 0  # of submitit: processes
    assert lost.read_bytes() == before
    assert (folder / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()


def test_another_question_in_the_same_folder_is_refused_and_more_seeds_are_not(
    settings: list[str], finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(["ablate", *settings, "ema_decay=0.5", f"output={finished}"]) == 2
    assert "of another base; name another" in capsys.readouterr().err
    assert main(["ablate", *settings, "sampler=heun", f"output={finished}"]) == 2
    assert "of another scoring; name another" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == written
    asked: list[Any] = []
    monkeypatch.setattr(ablate, "run_one", lambda run, *rest: asked.append((run.cell, run.seed)))
    assert main(["ablate", *settings, "seeds=[0,1,7]", "jobs=1", f"output={finished}"]) == 2  # nothing was trained
    assert [seed for _, seed in asked] == [0, 0, 1, 1, 7, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["experiment=emoji/diffusion"], "no question came"),
        (["seed=1,2"], "seed= is what an ablation decides"),
        (["loss.nothing=1,2"], "nothing"),
        (["diffusion.prediction=v,epsilon", "seeds=0"], "seeds=0"),
        (["diffusion.prediction=v,epsilon", "seeds=[a]"], "seeds=a"),
        (["diffusion.prediction=v,epsilon", "jobs=0.5"], "jobs=0.5"),
        (["diffusion.prediction=v,epsilon", "limit=0"], "limit=0"),
        (["diffusion.prediction=v,epsilon", "limit=many"], "limit=many"),
        (["diffusion.prediction=v,epsilon", "jobs=0"], "jobs=0"),
        (["diffusion.prediction=v,epsilon", "pictures=0"], "at least 1"),
        (["experiment=emoji/nothing,emoji/diffusion"], "emoji/nothing"),
        (["data._target_=os.system,shutil.rmtree"], "is refused"),
        (["ablation=nothing"], "choose one of beta, caption_dropout, min_snr, openmoji, prediction, recipes"),
        (["a word"], "is no setting"),
        (["cells=['']"], "no question came: 1 different cells of 1"),
        (["cells=['', ema_decay=0.5, ema_decay=0.5]"], "2 different cells of 3"),
        (["cells=ema_decay=0.5"], "a list of texts is expected"),
        (["cells=['', nothing=1]"], "nothing"),
    ],
)
def test_bad_requests_end_with_2_one_line_and_no_file(
    tmp_path: Path, capsys: Any, given: list[str], message: str
) -> None:
    assert main(["ablate", *given, f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_cells_of_different_settings_stand_in_one_table(settings: list[str], tmp_path: Path) -> None:
    folder, own = tmp_path / "out", [each for each in settings if "prediction" not in each]
    assert main(["ablate", *own, "cells=['', 'loss.min_snr=5 ema_decay=0.5']", "seeds=1", f"output={folder}"]) == 0
    first, second = (row for row in rows(folder) if row["figure"] == "denoising MSE")
    assert (first["cell"], second["cell"]) == ("base", "loss.min_snr=5 ema_decay=0.5")
    assert float(second["difference"]) != 0.0
    assert "| cell " in (folder / "report.md").read_text("utf-8")
    config = next((folder / "runs").glob("loss*/seed-0/config.yaml")).read_text("utf-8")
    assert "min_snr: 5" in config
    assert "ema_decay: 0.5" in config


def test_cells_and_axes_multiply_and_share_a_cache_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ablate, "ablate", lambda *arguments: seen.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["ablate", "experiment=emoji/diffusion", "cells=['', repa=0.5 cache=false]", "ema_decay=0.5,0.9"])
    ablation = seen[0][0]
    assert ablation.cells == [("ema_decay=0.5",), ("ema_decay=0.9",), ("repa=0.5", "cache=false", "ema_decay=0.5"),
                              ("repa=0.5", "cache=false", "ema_decay=0.9")]  # fmt: skip
    assert ablation.cached == ablation.cells[:2]


@pytest.mark.parametrize("path", sorted((configs() / "ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_ablation_that_ships_is_ten_lines_and_a_grid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def caught(*arguments: Any) -> None:
        seen.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr(ablate, "ablate", caught)
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    with pytest.raises(InterruptedError):
        main(["ablate", f"ablation={path.stem}", "seeds=5", "limit=3"])
    ablation, scoring = seen[:2]
    given = yaml.safe_load(path.read_text())
    listed = given.get("cells")
    assert len(path.read_text().splitlines()) - len(listed or ()) <= 14
    assert len(ablation.cells) == (len(listed) if listed else 4 if path.stem == "beta" else 3)
    assert len(ablation.runs()) == 5 * len(ablation.cells)
    own = given.get("data", "emoji48" if "data.train.name" not in given else None)
    assert (scoring.data, scoring.limit, len(scoring.samples)) == (own, 3, 3)
    assert given["seeds"] in (1, 2, 3)


# ---------------------------------------------------------------------------------------------------------- intervals


def simulated(trial: int, k: int, n: int, of_seed: float, of_image: float, rest: float) -> np.ndarray:
    """Scores of n images by k trainings, 0 on the average: an effect of each training, of each image, and noise."""
    random = np.random.Generator(np.random.Philox(key=[7, trial]))
    return (of_seed * random.standard_normal((k, 1)) + of_image * random.standard_normal((1, n))
            + rest * random.standard_normal((k, n)))  # fmt: skip


@pytest.mark.parametrize(("of_seed", "of_image"), [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_the_interval_over_seeds_and_images_covers_the_truth(of_seed: float, of_image: float) -> None:
    trials = 200
    held = 0
    for trial in range(trials):
        x = simulated(trial, 3, 40, of_seed, of_image, 0.5)
        figure = over_seeds("x", x.mean(1).tolist(), x, range(40))
        held += figure.low <= 0.0 <= figure.high
    # At least 95 % (the two half-widths in quadrature are a little wide): 183 of 200 is three standard errors below.
    assert held >= 183
    # And no wider than that: three seeds that agree must not hide what they agree on.
    x = simulated(0, 3, 40, 0.0, 0.0, 0.01) + 0.1
    assert over_seeds("x", x.mean(1).tolist(), x, range(40)).resolved


def test_pairing_by_seed_resolves_what_the_spread_of_seeds_hides() -> None:
    a = simulated(1, 3, 40, 1.0, 1.0, 0.05)
    b = a + 0.1 + simulated(2, 3, 40, 0.01, 0.0, 0.05)
    less = over_seeds("x", (b - a).mean(1).tolist(), b - a, range(40))
    assert less.resolved
    assert less.high - less.low < 0.2
    own = [over_seeds("x", y.mean(1).tolist(), y, range(40)) for y in (a, b)]
    assert own[0].low < own[1].value < own[0].high


def test_one_seed_is_said_to_be_one_and_resolves_nothing() -> None:
    figure = over_seeds("x", [1.0], np.ones((1, 5)) + np.arange(5) / 100, range(5))
    assert figure.note == "one seed"
    assert not figure.resolved
    assert over_seeds("x", [1.0, 1.1]).high == pytest.approx(1.05 + 12.706 * 0.05, rel=1e-4)  # t of one degree


def test_a_file_of_settings_and_the_line_beside_it_are_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("experiment: emoji/diffusion\nema_decay: 0.9,0.99\nunet.widths: [32, 64, 128]\nseeds: [3]\n")
    seen: list[Any] = []
    monkeypatch.setattr(ablate, "ablate", lambda *arguments: seen.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["ablate", f"ablation={file}", "ema_decay=0.5,0.6", "limit=2"])
    ablation = seen[0][0]
    assert ablation.base == ["experiment=emoji/diffusion", "unet.widths=[32, 64, 128]"]
    assert ablation.cells == [("ema_decay=0.5",), ("ema_decay=0.6",)]
    assert ablation.cached == ablation.cells
    with pytest.raises(ZeroDivisionError):
        main(["ablate", f"ablation={file}", "ema_decay=0.5", "data=emoji48,emoji200", "limit=2"])
    assert not seen[1][0].cached  # the cells do not train on the same images
    assert [run.seed for run in ablation.runs()] == [3, 3]
