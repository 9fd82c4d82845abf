"""Whole reports, as `ldm evaluate` writes them, with a tiny random model."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from ldm import averages
from ldm.checkpoint import Contents
from ldm.checkpoint import save as save_checkpoint
from ldm.cli import main
from ldm.evaluation import Drawing, Judge, score, studies, sweep
from ldm.evaluation.loss import measure
from ldm.evaluation.model import pairs_of
from ldm.pipeline import LatentDiffusion

QUICK = Drawing(seeds=2, steps=2, guidance_scale=2.0)


@pytest.fixture
def saved(model: LatentDiffusion, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_report_of_a_model_has_its_scores_their_references_its_loss_and_its_autoencoder(
    saved: Path, judge48: Judge, tmp_path: Path
) -> None:
    report = score(saved, limit=3, drawing=QUICK, command="ldm evaluate limit=3", judge=judge48)
    report.write(tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text("utf-8")
    for words in ("heldout_pairs: 6 pictures", "train: 6 pictures", "real images of these pairs", "dealt out at random",
                  "chance", "FD-EffNet", "KID-EffNet", "diversity-EffNet", "text alignment", "n=6 < 2048: biased",
                  "Loss on train, worst images", "PSNR, mode", "ldm evaluate limit=3"):  # fmt: skip
        assert words in text, words
    result = json.loads((tmp_path / "out/result.json").read_text("utf-8"))
    assert len({row["key"] for row in result["train"]["table"]}) == 3
    for name, figure in result["train"]["figures"].items():
        assert figure["low"] <= figure["high"], name
        assert {"reference", "resize", "image_format", "sampler", "steps", "guidance_scale", "seeds", "weights",
                "n"} <= figure["fingerprint"].keys(), name  # fmt: skip
    for part in ("loss, train", "loss, heldout_pairs", "autoencoder, heldout_pairs"):
        assert result[part]["fingerprint"].keys() == {"n", "reference", "weights"}
        assert re.fullmatch("[0-9a-f]{16}", result[part]["fingerprint"]["weights"])
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert page.count("data:image/webp;base64,") == 12
    assert "http://" not in page.replace("http://www.w3.org", "")  # names of SVG's name spaces, which nobody fetches
    assert "https://" not in page

    # The same again, against what it wrote: every picture is the same, so nothing is resolved.
    again = score(saved, limit=3, drawing=QUICK, against=tmp_path / "out", judge=judge48)
    (table,) = [part for part in again.parts if part.title.startswith("train: this evaluation less")]
    assert {row[2] for row in table.rows} == {"not resolved at n=6"}
    assert {row[1].value for row in table.rows} == {0.0}
    other = score(saved, limit=3, drawing=Drawing(2, 3, 2.0), against=tmp_path / "out", judge=judge48)
    (table,) = [part for part in other.parts if part.title.startswith("train: this evaluation less")]
    assert {row[2] for row in table.rows} == {"not comparable: other evaluations, steps"}


def test_concepts_that_are_held_out_whole_are_drawn_too_and_compared(
    saved: Path, judge48: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = studies.evaluate_pairs

    def drawn(model: Any, data: str, split: str, *more: Any, judge: Judge) -> Any:
        assert data == "emoji"
        return real(model, "emoji48", "train", *more, judge=judge)  # fitting a judge of all emoji takes minutes

    monkeypatch.setattr(studies, "evaluate_pairs", drawn)
    report = score(saved, "emoji", 1, QUICK, judge=judge48)
    assert [split for split in report.result if "table" in report.result[split]] == [
        "heldout_pairs", "train", "heldout_concepts"]  # fmt: skip
    assert {"loss, heldout_concepts", "autoencoder, heldout_concepts"} <= report.result.keys()
    report.write(tmp_path / "out")
    again = score(saved, "emoji", 1, QUICK, tmp_path / "out", judge=judge48)
    assert sum(part.title.startswith("heldout_concepts: this evaluation less") for part in again.parts) == 1


def test_a_run_of_stage_one_is_scored_for_its_autoencoder_alone(model: LatentDiffusion, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "stage one", Contents({"autoencoder": model.autoencoder}))
    (table,) = score(tmp_path / "stage one", limit=2).parts
    assert "PSNR, mode (dB)" in [row[1] for row in table.rows]


def test_sweeps_give_a_table_a_front_and_curves(saved: Path, judge48: Judge, tmp_path: Path) -> None:
    drawing = Drawing(seeds=2, steps=2)
    guidance = sweep(saved, "guidance", [1.0, 3.0], limit=3, drawing=drawing, judge=judge48)
    table, curve, *pictures = guidance.parts
    columns = list(table.columns)
    assert [row[columns.index("guidance")] for row in table.rows] == [1.0, 3.0]
    assert [row[columns.index("UNet passes")] for row in table.rows] == [2, 4]  # guidance 1 costs one pass a step
    assert "yes" in [row[columns.index("Pareto")] for row in table.rows]
    assert (curve.x, curve.y) == ("text alignment", "KID-EffNet")
    assert len(pictures) == 2
    steps = sweep(saved, "steps", [1, 2], ["ddim", "heun"], limit=3, drawing=drawing, judge=judge48)
    assert [row[:3] for row in steps.parts[0].rows] == [["ddim", 1, 2], ["ddim", 2, 4], ["heun", 1, 2], ["heun", 2, 6]]
    assert [curve.y for curve in steps.parts[1:3]] == ["KID-EffNet", "text alignment"]
    steps.write(tmp_path / "out")
    assert "<svg" in (tmp_path / "out/report.html").read_text("utf-8")
    with pytest.raises(ValueError, match="too few for a curve"):
        sweep(saved, "guidance", [1.0], limit=1, drawing=drawing, judge=judge48)


def test_a_sweep_over_averages_scores_each_length(model: LatentDiffusion, judge48: Judge, tmp_path: Path) -> None:
    run, contents = tmp_path / "run", model.contents()
    contents.settings["cursor"] = {"step": 4}
    save_checkpoint(run / "checkpoints/step-00000004", contents)
    own = dict(model.unet.state_dict())
    averages.write(run / averages.FOLDER, averages.Profile(0.05, 4), own)
    averages.write(run / averages.FOLDER, averages.Profile(0.1, 4), {name: 1.5 * value for name, value in own.items()})
    table, loss, quality, *_ = sweep(
        run, "ema", [0.05, 0.1], data="emoji48", limit=3, drawing=Drawing(2, 2), judge=judge48
    ).parts
    short, long = (figure.value for _, figure, _ in loss.lines["ddim"])
    assert [x for x, _, _ in loss.lines["ddim"]] == [0.05, 0.1]
    assert short == pytest.approx(measure(model, pairs_of("emoji48", "train", 3)).error.mean(), rel=1e-2)  # in float16
    assert abs(long - short) > 0.05 * short
    assert (loss.y, quality.y) == ("loss", "KID-EffNet")
    assert "loss" in table.columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=nothing"], "'nothing' is unknown here"),
        (["sweep=seeds"], "choose guidance, steps, ema"),
        (["sweep=guidance", "against=emoji"], "ask one at a time"),
        (["sweep=ema", "limit=3"], "train with ema.power"),
        (["values=1,2"], "belongs to sweep="),
        (["samplers=ddim"], "belongs to sweep="),
        (["seeds=0"], "at least 1"),
        (["seeds=x"], "a whole number of at least 1"),
        (["data=openmoji"], "choose emoji48"),
        (["sweep=steps", "values=[1"], "not a value"),
        (["limit=0", "against=emoji"], "limit=0"),
        (["against=nowhere"], "no model at nowhere"),
        (["model=nowhere"], "no model at nowhere"),
        (["a word"], "is no setting"),
        (["step=3"], "did you mean steps=?"),
    ],
)
def test_bad_requests_of_evaluate_end_with_2_one_line_and_no_file(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(studies, "Judge", lambda name: pytest.fail("checked after the features were computed"))
    out = tmp_path / "out"
    assert main(["evaluate", f"output={out}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"sweep": []}', '{"train": 3, "heldout_pairs": {}}'])
def test_what_is_no_result_of_a_model_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"its result\.json is not that of a model's evaluation"):
        score(saved, against=tmp_path)


def test_the_door_evaluates_and_writes(
    saved: Path, judge48: Judge, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "Judge", lambda name: judge48)
    out = tmp_path / "out"
    assert main(["evaluate", f"model={saved}", "limit=2", "seeds=2", "steps=1", f"output={out}"]) == 0
    assert "report.html" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert result["command"] == f"ldm evaluate model={saved} limit=2 seeds=2 steps=1 output={out}"
    assert result["environment"]["versions"]["torch"] == torch.__version__


def work(rank: int, world: int, port: int, folder: str) -> None:
    """One of several processes that score the same model."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    judge = torch.load(f"{folder}/judge.pt", weights_only=False)  # what this test wrote itself
    drawing = Drawing(seeds=1, steps=2, batch_size=2)  # two batches, one a process
    report = score(f"{folder}/model", limit=3, drawing=drawing, judge=judge)
    report.write(Path(folder) / f"of {world}, {rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_drawing_and_each_has_the_report_of_one(
    saved: Path, judge48: Judge, tmp_path: Path
) -> None:
    torch.save(judge48, tmp_path / "judge.pt")
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, (world, port, str(tmp_path)), nprocs=world)
    alone = (tmp_path / "of 1, 0/report.html").read_text("utf-8")
    assert alone.count("data:image/webp") == 6
    for rank in (0, 1):
        assert (tmp_path / f"of 2, {rank}/report.html").read_text("utf-8") == alone


def test_evaluate_launches_the_processes_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched: list[Any] = []
    monkeypatch.setattr("ldm.cli.research.launch", lambda *arguments: launched.append(arguments))
    assert main(["evaluate", "devices=2", "limit=3", f"output={tmp_path / 'out'}"]) == 0
    assert launched == [("evaluate", 2, ["devices=2", "limit=3", f"output={tmp_path / 'out'}"])]
    assert main(["evaluate", "devices=0"]) == 2
