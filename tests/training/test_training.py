"""Both trainings through the door, small: what they write, that they learn, stop, and go on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ldm
from ldm import checkpoint
from ldm.cli import door, main, train
from ldm.cli.building import build
from ldm.cli.training import compose
from ldm.data import FixedSet, ShardDataset
from ldm.training.ema import EMA
from ldm.training.optimizer import Optimizer
from tests.benchmarks.speedrun import SHARE, reached
from tests.conftest import tiny_text

STEPS = 200


def arguments(shapes: Path, output: Path, stage: str, steps: int, *more: str) -> list[str]:
    return [
        f"experiment=emoji/{stage}",
        "data=shards",
        f"data.train.paths={shapes}",
        f"data.validation.paths={shapes}",
        "data.height=32",
        "data.width=32",
        "data.batch_size=8",
        "data.num_workers=0",
        "data.flip=false",
        f"output={output}",
        f"trainer.max_steps={steps}",
        "validation.images=8",
        "optimizer.warmup=10",
        "optimizer.learning_rate=2e-3",
        *more,
    ]


AUTOENCODER = ("autoencoder.widths=[32,64]", "samples.every=100", "checkpoint.every=100", "validation.every=50")


def unet(text: Path, autoencoder: Path) -> tuple[str, ...]:
    return (
        "unet.widths=[32,64]",
        "unet.attention=[false,true]",
        "unet.num_heads=2",
        "unet.context_dim=16",
        f"text.weights={text}",
        f"autoencoder.weights={autoencoder}",
        "samples.prompts=[a red square,a green disc]",
        "samples.every=100",
        "checkpoint.every=100",
        "validation.every=50",
        "ema_decay=0.95",
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower, tiny and random, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("text") / "clip"
    checkpoint.save(folder, checkpoint.Contents({"text_encoder": tiny_text("clip")}))
    return folder


@pytest.fixture(scope="module")
def stage_one(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "autoencoder"
    assert door(train, arguments(shapes, output, "autoencoder", STEPS, *AUTOENCODER)) == 0
    return output


@pytest.fixture(scope="module")
def stage_two(shapes: Path, clip: Path, stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "diffusion"
    assert door(train, arguments(shapes, output, "diffusion", STEPS, *unet(clip, stage_one))) == 0
    return output


def column(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(run)
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_a_run_folder_holds_what_scripts_rely_on(stage: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(stage)
    there = sorted(path.name for path in run.iterdir())
    assert there == ["checkpoints", "config.yaml", "environment.json", "metrics.csv", "samples", "scores.json"]
    origin = json.loads((run / "environment.json").read_text())
    assert origin.keys() == {"git", "versions", "machine", "index"}
    assert len(origin["index"]) == 64
    names = ["step-00000100", "step-00000200"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert sorted(path.stem for path in (run / "samples").iterdir()) == names
    for name in names:
        checkpoint.verify(run / "checkpoints" / name)


def test_the_autoencoder_learns(stage_one: Path) -> None:
    # Measured 13.2 dB at step 50 and 14.0 dB at step 200.
    psnr = column(stage_one, "val/psnr")
    assert psnr[-1] > 13.0
    assert psnr[-1] > psnr[0] + 0.4
    loss = column(stage_one, "train/loss")
    assert loss[-1] < loss[0] - 0.5  # nats a pixel value


def test_its_latents_have_zero_mean_and_unit_variance_over_the_data(stage_one: Path, shapes: Path) -> None:
    autoencoder, items = ldm.load_autoencoder(stage_one), FixedSet(ShardDataset(shapes), 32, 32)
    x = torch.stack([items[i]["image"] for i in range(len(items))])
    with torch.no_grad():
        posterior = autoencoder.posterior(x)
        z = autoencoder.normalise(posterior.mean)
    total = z.var((0, 2, 3), correction=0) + ((posterior.std / autoencoder.latent_std[:, None, None]) ** 2).mean(
        (0, 2, 3)
    )
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(total, torch.ones(4), rtol=1e-3, atol=0)


def test_decoder_only_keeps_the_latents_to_the_bit_and_trains_the_rest(
    stage_one: Path, shapes: Path, tmp_path: Path, capsys: Any
) -> None:
    more = (*AUTOENCODER, "decoder_only=true", "adversarial=patch", "adversarial.widths=[32]", "adversarial.start=0")
    run = tmp_path / "run"
    assert door(train, arguments(shapes, run, "autoencoder", 3, f"init={stage_one}", *more)) == 0
    before, after = ldm.load_autoencoder(stage_one).state_dict(), ldm.load_autoencoder(run).state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert changed == {"from_latents", "decoder"}
    assert torch.equal(ldm.load_autoencoder(run).encode(x), ldm.load_autoencoder(stage_one).encode(x))
    capsys.readouterr()
    assert door(train, arguments(shapes, tmp_path / "other", "autoencoder", 3, *AUTOENCODER, "decoder_only=true")) == 2
    assert "decoder_only=true keeps the encoder of init=MODEL: give one" in capsys.readouterr().err


@pytest.mark.parametrize("alone", [True, False])  # the decoder over an encoder that stays, or both
def test_noise_on_the_latents_teaches_a_decoder_to_bear_it(
    alone: bool, stage_one: Path, shapes: Path, tmp_path: Path
) -> None:
    more = (f"init={stage_one}", *AUTOENCODER, f"decoder_only={alone}", "loss.log_scale=-2")
    x = torch.stack([FixedSet(ShardDataset(shapes), 32, 32)[i]["image"] for i in range(16)])
    noise, errors = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0)), {}
    for tau in (0.0, 1.0):
        run = tmp_path / str(tau)
        assert door(train, arguments(shapes, run, "autoencoder", 40, *more, f"latent_noise={tau}")) == 0
        model = ldm.load_autoencoder(run)
        with torch.no_grad():
            z = model.encode(x)
            errors[tau] = [(model.decode(z + s * noise) - x).abs().mean().item() for s in (0.0, 1.0)]
    assert errors[1.0][1] < errors[0.0][1]
    assert errors[0.0][0] < errors[0.0][1]


def test_an_encoder_escapes_the_noise_of_its_latents_by_no_scale_and_no_other_sample_changes_it(
    shapes: Path, tmp_path: Path
) -> None:
    own = (*AUTOENCODER, "latent_noise=0.7")
    module = build(compose(arguments(shapes, tmp_path, "autoencoder", 1, *own))[0])[0]
    m, blank = torch.randn(3, 4, 5, 6) * 4 + 1, torch.full((3, 4, 5, 6), 2.0, requires_grad=True)
    batch = {"level": torch.randn(3, 1, 1, 1), "latent_noise": torch.randn(3, 4, 5, 6)}
    added = module.noisy(m, batch) - m
    wanted = 0.7 * batch["level"] * m.std((2, 3), correction=0, keepdim=True) * batch["latent_noise"]
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.noisy(100 * m, batch) - 100 * m, 100 * wanted, rtol=1e-4, atol=1e-3)
    one = {name: drawn[1:2] for name, drawn in batch.items()}
    assert torch.equal(module.noisy(m[1:2], one), module.noisy(m, batch)[1:2])
    module.noisy(blank, batch).sum().backward()
    assert blank.grad is not None
    assert blank.grad.isfinite().all()


@pytest.fixture
def tiny_stage_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speedrun's autoencoder, two steps of it."""
    real = ldm.cli.training.compose

    def composed(given: list[str]) -> Any:
        small = ["trainer.max_steps=2", "trainer.precision=32-true", "autoencoder.widths=[32,32]"]
        return real([*given, *small] if "experiment=emoji/speedrun_autoencoder" in given else given)

    monkeypatch.setattr(ldm.cli.training, "compose", composed)


def speedrun(shapes: Path, clip: Path, output: Path, *more: str) -> list[str]:
    settings = [each for each in unet(clip, Path("emoji")) if not each.startswith("samples.")]
    return arguments(shapes, output, "speedrun", 2, "trainer.precision=32-true", *settings, *more)


@pytest.mark.parametrize(
    ("shares", "minute"),
    [
        ({10: 0.0, 20: SHARE + 0.1, 30: SHARE - 0.01, 40: SHARE, 50: SHARE + 0.1}, 40),  # touched at 20, and lost
        ({50: SHARE, 40: 0.0}, 50),
        ({10: SHARE + 0.1, 20: SHARE - 0.01}, None),
        ({}, None),
    ],
)
def test_the_aim_is_reached_where_no_later_checkpoint_is_below_it(shares: Any, minute: float | None) -> None:
    assert reached(shares) == minute


def test_one_command_trains_both_stages_and_goes_on_with_either(
    shapes: Path, clip: Path, tmp_path: Path, tiny_stage_one: None, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert door(train, speedrun(shapes, clip, run)) == 0
    trained = ldm.load_autoencoder(run / "autoencoder")
    assert trained.arguments["widths"] == [32, 32]
    assert torch.equal(
        ldm.load(run).autoencoder.decode_raw(torch.ones(1, 4, 4, 4)), trained.decode_raw(torch.ones(1, 4, 4, 4))
    )
    whole = weights(run)
    # Stopped between the stages: the command that names the whole run goes on, and ends with the same weights.
    before = {path: path.stat().st_mtime_ns for path in (run / "autoencoder" / "checkpoints").rglob("*.safetensors")}
    shutil.rmtree(run / "checkpoints")
    assert door(train, [f"resume={run}"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    again = weights(run)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert door(train, [f"resume={run}", "trainer.max_steps=3"]) == 0
    assert checkpoint.newest(run).name == "step-00000003"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("unet.num_heads=3", "heads"),  # of stage two, and said before stage one has begun
        ("stage_one=emoji/nothing", "emoji/nothing"),
        ("cache=/nowhere", "stage_one=emoji/speedrun_autoencoder"),
        ("trainer.devices=2", "one device"),
    ],
)
def test_what_is_wrong_with_either_stage_is_said_before_the_first_step(
    setting: str, said: str, shapes: Path, clip: Path, tmp_path: Path, tiny_stage_one: None, capsys: Any
) -> None:
    assert door(train, speedrun(shapes, clip, tmp_path / "run", setting)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "run").exists()


def test_nothing_is_cached_of_an_autoencoder_that_is_yet_to_come(tmp_path: Path, capsys: Any) -> None:
    assert main(["precompute", "experiment=emoji/speedrun", f"output={tmp_path / 'cache'}"]) == 2
    assert "not trained yet; give autoencoder.weights=RUN stage_one=null" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_the_unet_learns_by_the_curve_on_fixed_noise(stage_two: Path) -> None:
    # Velocity of unit variance: 1.0 is what predicting nothing scores; measured 0.52 at step 50 and 0.47 at step 200.
    curve = column(stage_two, "val/mse")
    assert curve[-1] < 0.6
    assert curve[-1] < curve[0] - 0.02
    bins = [column(stage_two, f"val/mse_t{low}-{low + 249}")[-1] for low in (0, 250, 500, 750)]
    assert sum(bins) / 4 == pytest.approx(curve[-1], rel=1e-4)


def test_the_measured_rate_of_dropped_captions_is_logged_and_near_a_tenth(stage_two: Path) -> None:
    rates = column(stage_two, "train/dropped_captions")
    assert 0.0 < sum(rates) / len(rates) < 0.25  # 160 captions: five standard errors are 0.12
    assert column(stage_two, "train/grad_norm")


def test_a_run_is_sampled_by_its_ema_weights_or_its_raw_ones(stage_two: Path) -> None:
    average, raw = ldm.load(stage_two), ldm.load(stage_two, weights="raw")
    assert average.text_encoder.family == "clip"
    pictures = [m.sample("a red square", steps=5).images for m in (average, raw)]
    assert pictures[0].shape == (1, 3, 32, 32)
    assert not torch.equal(*pictures)


def test_the_null_context_of_training_is_kept(stage_two: Path, clip: Path) -> None:
    model = ldm.load(stage_two)
    assert torch.equal(model.null_context, ldm.load_text_encoder(clip)([""])[0])


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    stage: str, shapes: Path, clip: Path, stage_one: Path, tmp_path: Path, capfd: Any, recwarn: Any
) -> None:
    more = AUTOENCODER if stage == "autoencoder" else unet(clip, stage_one)
    more = (*more, "checkpoint.every=3", "optimizer.decay=constant")
    assert door(train, arguments(shapes, tmp_path / "whole", stage, 6, *more)) == 0
    assert door(train, arguments(shapes, tmp_path / "halves", stage, 3, *more)) == 0
    capfd.readouterr()
    assert door(train, [f"resume={tmp_path / 'halves'}", "trainer.max_steps=6"]) == 0
    shown = capfd.readouterr()
    assert "| 3/6 [" in shown.out
    assert "| 6/6 [" in shown.out
    assert not [str(w.message) for w in recwarn if "resuming" in str(w.message)]
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_cache_gives_the_losses_of_live_encoding(shapes: Path, clip: Path, stage_one: Path, tmp_path: Path) -> None:
    losses = []
    for cache in ("true", "false"):
        run = tmp_path / cache
        more = (*unet(clip, stage_one), f"cache={cache}", "samples.every=0")
        assert door(train, arguments(shapes, run, "diffusion", 20, *more)) == 0
        losses.append(column(run, "train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # encoded in batches of 32 and of 8


def test_accumulation_changes_nothing_but_memory(shapes: Path, clip: Path, stage_one: Path, tmp_path: Path) -> None:
    results = []
    for parts in (1, 2):
        run = tmp_path / str(parts)
        more = (*unet(clip, stage_one), f"trainer.accumulate_grad_batches={parts}", "samples.every=0")
        assert door(train, arguments(shapes, run, "diffusion", 3, *more)) == 0
        results.append(weights(run))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-4)


def test_ctrl_c_finishes_the_step_saves_and_exits_with_130(
    shapes: Path, clip: Path, stage_one: Path, tmp_path: Path
) -> None:
    root, run = Path(ldm.__file__).parents[1], tmp_path / "run"
    command = arguments(shapes, run, "diffusion", 100_000, *unet(clip, stage_one), "samples.every=0")
    process = subprocess.Popen(
        [sys.executable, str(root / "train.py"), *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    assert f"resume={run}" in stderr.decode()
    assert ldm.load(run).sample("a red square", steps=2).images.isfinite().all()


def test_resuming_with_another_batch_is_refused_with_the_difference(stage_two: Path, capsys: Any) -> None:
    before = (stage_two / "config.yaml").read_text()
    assert door(train, [f"resume={stage_two}", "data.batch_size=4"]) == 2
    assert "only speed and length may change" in capsys.readouterr().err
    (stage_two / "config.yaml").write_text(before.replace("batch_size: 8", "batch_size: 4"))
    assert door(train, [f"resume={stage_two}", "trainer.max_steps=300"]) == 2
    assert "batch_size was 8, now 4" in capsys.readouterr().err
    (stage_two / "config.yaml").write_text(before)


def test_a_gradient_that_is_not_finite_stops_the_run_and_writes_nothing_broken(
    shapes: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    more = (
        *AUTOENCODER,
        "checkpoint.every=1000",
        "optimizer.learning_rate=1e18",
        "optimizer.warmup=1",
        "samples.every=0",
    )
    assert door(train, arguments(shapes, run, "autoencoder", 50, *more)) == 3
    err = capsys.readouterr().err
    assert "5 steps in a row" in err
    assert "not saved (" in err  # the first step, a finite one, has ruined the weights
    assert not list((run / "checkpoints").glob("step-*"))


def test_wandb_without_a_key_is_an_error_in_the_first_second(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.api._api", None, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    assert door(train, ["experiment=emoji/autoencoder", "logger=wandb"]) == 2
    assert "no API key" in capsys.readouterr().err


def test_wandb_works_offline_and_says_where_it_wrote(shapes: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    more = (*AUTOENCODER, "logger=wandb", "logger.mode=offline", "samples.every=0")
    assert door(train, arguments(shapes, run, "autoencoder", 2, *more)) == 0
    import wandb

    wandb.finish()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert "wandb sync" in capfd.readouterr().err


def streamed(shards: Path, *given: str) -> list[str]:
    left_out = ("data=", "data.train.paths=")
    return [*(each for each in given if not each.startswith(left_out)), "data=stream", f"data.train.urls={shards}"]


def test_a_stream_trains_both_stages_and_goes_on(
    shapes: Path, clip: Path, stage_one: Path, tmp_path: Path, capfd: Any
) -> None:
    for stage in ("autoencoder", "diffusion"):
        more = AUTOENCODER if stage == "autoencoder" else (*unet(clip, stage_one), "cache=false")
        run = tmp_path / stage
        more = (*more, "data.num_workers=1", "validation.every=7")
        given = streamed(shapes / "shapes.tar", *arguments(shapes, run, stage, 7, *more))
        assert door(train, given) == 0  # into the third pass over 24 samples
        assert "a stream of 1 shards, not exactly resumable" in capfd.readouterr().out
        assert door(train, [f"resume={run}", "trainer.max_steps=9"]) == 0
        assert checkpoint.read_manifest(checkpoint.newest(run))["settings"]["cursor"]["step"] == 9
        assert capfd.readouterr().out.count("| 9/9 [") >= 1
        assert len(column(run, "val/psnr_ema" if stage == "autoencoder" else "val/mse_ema")) == 1
    assert ldm.load(run).sample("a red square", steps=2).images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ((), "the rule is cache=false"),
        (("cache=false", "+data.window=2"), "data.window=null"),
        (("cache=false", "data.num_workers=2"), "1 shards for 2 readers; the rule is at least one a reader"),
        (("cache=false", "data.train.shuffle=-1"), "data.train.shuffle=-1: the rule is a whole number"),
        (("cache=false", "data.train.urls=[]"), "an empty list of shards"),
    ],
)
def test_what_a_stream_cannot_do_is_said(
    more: tuple[str, ...], rule: str, shapes: Path, clip: Path, stage_one: Path, tmp_path: Path, capfd: Any
) -> None:
    given = arguments(shapes, tmp_path / "run", "diffusion", 2, *unet(clip, stage_one))
    assert door(train, [*streamed(shapes / "shapes.tar", *given), *more]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert rule in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", ["emoji/autoencoder", "emoji/diffusion", "emoji/speedrun"])
def test_the_experiments_start_from_the_embedded_data_with_no_further_argument(experiment: str) -> None:
    cfg, resume = compose([f"experiment={experiment}", "cache=false"])
    assert resume is None
    module, data, options = build(cfg)
    assert len(data.train) == {"emoji/autoencoder": 5969, "emoji/diffusion": 179, "emoji/speedrun": 11_481}[experiment]
    assert options["trainer"]["max_steps"] == cfg.trainer.max_steps
    item = data.train_set[0]
    assert item["image"].shape == (3, 128, 128)
    assert module.training


def test_ema_follows_the_published_rule_and_leaves_the_weights_alone() -> None:
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(linear.weight)
    ema, expected = EMA(linear, decay=0.9), 0.0
    for step in range(1, 200):
        torch.nn.init.constant_(linear.weight, float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert linear.weight.item() == step
    assert next(ema.average.parameters()).item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_decays_as_named() -> None:
    constant = Optimizer(warmup=10)
    assert [constant.factor(step, 100) for step in (0, 4, 9, 99)] == [0.1, 0.5, 1.0, 1.0]
    cosine = Optimizer(warmup=0, decay="cosine")
    assert [round(cosine.factor(step, 100), 6) for step in (0, 50, 100)] == [1.0, 0.5, 0.0]
    linear = Optimizer(warmup=0, decay="linear", cooldown=0.5)
    assert [linear.factor(step, 100) for step in (0, 50, 75, 100)] == [1.0, 1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="choose constant, cosine or linear"):
        Optimizer(decay="step")  # type: ignore[arg-type]
