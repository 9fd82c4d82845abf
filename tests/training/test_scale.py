"""Faster, smaller, on more devices: the numbers stay what they were (docs/scale.md)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ldm
from ldm import checkpoint, precision
from ldm.cli import door, train
from ldm.training.checkpointing import FolderIO
from ldm.training.guard import Guard
from ldm.training.optimizer import Optimizer
from ldm.training.speed import Layout, num_devices, resolve_precision
from tests.training.test_training import column, weights
from tests.training.test_trust import (  # fixtures, and what starts processes
    command,  # noqa: F401
    settings_of,
    start,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Command = Callable[..., list[str]]
Steps = list[tuple[float, float]]  # loss and learning rate of every step
THREE = ("data.batch_size=6",)  # which one, two and three processes divide


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    """A strategy of several processes leaves its group, and its port in the environment, to whoever comes next."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def own_steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Loss and learning rate of each step of trainings in this process from now on."""
    seen: Steps = []
    watch = Guard._watch

    def _watch(self: Guard, trainer: Any, loss: float) -> None:
        seen.append((loss, trainer.optimizers[0].param_groups[0]["lr"]))
        watch(self, trainer, loss)

    monkeypatch.setattr(Guard, "_watch", _watch)
    return seen


def ended(faults: dict[str, Any], settings: list[str], folder: Path) -> None:
    """A training in processes of its own, to its end."""
    process = start(faults, settings, folder)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()[-3000:]


def in_processes(folder: Path, settings: list[str]) -> Steps:
    """Loss and learning rate of each step of a training in processes of its own."""
    log = folder / "losses.jsonl"
    log.unlink(missing_ok=True)
    ended({"losses": str(log)}, settings, folder)
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def assert_same(steps: Steps, expected: Steps) -> None:
    """1e-5 of losses near 1: the sums over samples have another order, and 20 steps pass it on."""
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [rate for _, rate in steps] == [rate for _, rate in expected]


# ----------------------------------------------------------------------------------------------------- more devices


def test_two_processes_have_the_losses_and_rates_of_one_by_ddp_and_by_fsdp_and_each_goes_on_with_the_others_run(
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,
) -> None:
    usual = ("optimizer.decay=cosine", "optimizer.warmup=5", "validation.every=10", "checkpoint.every=20")
    one = tmp_path / "one"
    assert door(train, command("diffusion", one, 20, *usual)) == 0
    expected = list(own_steps)
    assert len(expected) == 20
    assert expected[-1][0] < expected[0][0] - 0.1  # it has moved: equal losses say something
    for strategy in ("ddp", "fsdp"):
        two = tmp_path / strategy
        both = ("trainer.devices=2", f"trainer.strategy={strategy}")
        assert_same(in_processes(tmp_path, command("diffusion", two, 20, *usual, *both)), expected)
        for name in ("val/mse", "val/mse_ema"):
            assert column(two, name) == pytest.approx(column(one, name), abs=1e-5)
        assert {k: v.shape for k, v in weights(two).items()} == {k: v.shape for k, v in weights(one).items()}
        assert ldm.load(two).sample("a red square", steps=2).images.isfinite().all()
    own_steps.clear()  # what FSDP wrote goes on in one process, and the other way round, Adam's moments and average too
    assert door(train, [f"resume={tmp_path / 'fsdp'}", "trainer.max_steps=23", "trainer.devices=1",
                        "trainer.strategy=ddp"]) == 0  # fmt: skip
    gone_on = list(own_steps)
    back = [f"resume={one}", "trainer.max_steps=23", "trainer.devices=2", "trainer.strategy=fsdp"]
    assert_same(in_processes(tmp_path, back), gone_on)
    first, second = weights(tmp_path / "fsdp"), weights(one)
    for name, tensor in first.items():  # half a step of Adam, whose sign a rounding may turn where a gradient is near 0
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-3, msg=name)


# ------------------------------------------------------------------------------------------------ checkpoints in shards


@pytest.fixture(scope="module")
def runs(shapes: Path, parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same six steps of three processes by FSDP, with whole checkpoints and with those in shards."""
    folder, found = tmp_path_factory.mktemp("shards"), {}
    for name, more in (("whole", ()), ("shards", ("checkpoint.sharded=true",))):
        found[name] = folder / name
        settings = (*THREE, "trainer.devices=3", "trainer.strategy=fsdp", *more)
        ended({"apart": True} if more else {}, settings_of(shapes, parts, found[name], 6, *settings), folder)
    return found


def test_shards_hold_each_rank_s_own_and_together_what_a_whole_checkpoint_holds_to_the_bit(
    runs: dict[str, Path],
) -> None:
    whole, shards = (checkpoint.newest(run) for run in runs.values())
    manifest = checkpoint.read_manifest(shards)
    names = [f"{part}.shard-0000{r}-of-00003.safetensors" for part in ("state", "unet.raw", "unet") for r in range(3)]
    assert sorted(name for name in manifest["files"] if "shard" in name) == names
    assert {path.name for path in shards.iterdir()} == {*manifest["files"], checkpoint.MANIFEST}
    first, last = (safetensors.torch.load_file(shards / names[i]) for i in (3, 5))
    assert first.keys() > last.keys()  # the four output channels are 2 + 2 + 0
    own = sum(tensor.numel() for tensor in first.values())
    total = sum(tensor.numel() for tensor in checkpoint.read_tensors(shards, manifest, "unet.safetensors").values())
    assert own == pytest.approx(total / 3, rel=0.1)
    one, other = everything(whole), everything(shards)
    assert one.keys() == other.keys()
    assert sum(name.startswith("adam/") for name in one) > 100
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    left, right = (checkpoint.load(folder, weights="raw").components["unet"].state_dict() for folder in (whole, shards))
    assert all(torch.equal(left[name], right[name]) for name in left)
    frozen = ["autoencoder.safetensors", "text_encoder.safetensors"]
    assert [(shards.with_name("step-00000003") / name).stat().st_ino for name in frozen] == [
        (shards / name).stat().st_ino for name in frozen
    ]


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, of its training too."""
    loaded = FolderIO(dict, {}).load_checkpoint(folder)
    contents = checkpoint.load(folder)
    return {
        **{f"{name}/{k}": v for name, module in contents.components.items() for k, v in module.state_dict().items()},
        **{f"raw/{k}": v for k, v in loaded["state_dict"].items()},
        **{f"tensors/{k}": v for k, v in contents.tensors.items()},
        **{
            f"adam/{i}/{k}": torch.as_tensor(v)
            for i, one in loaded["optimizer_states"][0]["state"].items()
            for k, v in one.items()
        },
    }


def test_shards_open_and_go_on_as_whole_checkpoints_do_in_one_process_and_in_two(
    runs: dict[str, Path],
    shapes: Path,
    parts: tuple[Path, Path],
    tmp_path: Path,
    own_steps: Steps,
    capsys: Any,
) -> None:
    one, moved = tmp_path / "one", tmp_path / "moved"
    assert door(train, settings_of(shapes, parts, one, 9, *THREE)) == 0
    expected = list(own_steps)
    shutil.copytree(runs["shards"], moved)
    assert ldm.load(moved).sample("a red square", steps=2).images.isfinite().all()
    own_steps.clear()
    alone = [f"resume={moved}", "trainer.max_steps=9", "trainer.devices=1", "trainer.strategy=ddp"]
    assert door(train, alone) == 2
    assert "set checkpoint.sharded=false" in capsys.readouterr().err
    assert door(train, [*alone, "checkpoint.sharded=false"]) == 0
    assert_same(own_steps, expected[6:])
    shutil.rmtree(one / "checkpoints/step-00000009")
    both = [f"resume={one}", "trainer.devices=2", "trainer.strategy=fsdp", "checkpoint.sharded=true"]
    assert_same(in_processes(tmp_path, both), expected[6:])
    assert len(list((one / "checkpoints/step-00000009").glob("unet.raw.shard-*-of-00002.safetensors"))) == 2
    first, second = (everything(checkpoint.newest(run)) for run in (one, moved))
    assert first.keys() == second.keys()
    for name, tensor in first.items():  # as above: half a step of Adam
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_shard_that_is_missing_or_damaged_is_named_and_the_checkpoint_before_is_taken(
    damage: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["shards"], run)
    file = run / "checkpoints/step-00000006/state.shard-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if damage == "missing" else file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} is {'missing' if damage == 'missing' else 'damaged'}"):
        FolderIO(dict, {}).load_checkpoint(file.parent)
    with pytest.warns(checkpoint.DamagedCheckpoint, match=f"{file} is .*: took step-00000003, 1 before"):
        assert checkpoint.newest(run).name == "step-00000003"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("limit", "checkpoint {}/checkpoints/step-00000006 could not be written: File too large; those before"),
        ("spoil", "{}/checkpoints/step-00000006/unet.raw.shard-00001-of-00002.safetensors: time_embedding.0.weight"),
    ],
)
def test_a_fault_of_one_rank_in_writing_ends_all_with_one_line_and_leaves_nothing_half_written(
    fault: str,
    said: str,
    command: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    both = ("trainer.devices=2", "trainer.strategy=fsdp", "checkpoint.sharded=true")
    process = start({fault: [1, 6]}, command("diffusion", run, 9, *both), tmp_path)
    _, stderr = process.communicate(timeout=300)
    lines = [line for line in stderr.decode().splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, stderr.decode()[-3000:]
    assert len(lines) == 2  # of each process
    assert lines[0] == lines[1]
    assert said.format(run) in lines[0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    checkpoint.verify(run / "checkpoints/step-00000003")


def test_shards_are_refused_where_nothing_is_shared_out(command: Command, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    assert door(train, command("diffusion", tmp_path / "run", 2, "checkpoint.sharded=true")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: checkpoint.sharded=True, trainer.strategy=ddp: the rule is true or false, and true")
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_of_a_sample_does_not_change_with_micro_batches(
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,
) -> None:
    settings = ("optimizer.decay=cosine", "optimizer.warmup=5")
    assert door(train, command("diffusion", tmp_path / "whole", 8, *settings)) == 0
    whole = list(own_steps)
    own_steps.clear()
    assert door(train, command("diffusion", tmp_path / "parts", 8, *settings, "trainer.accumulate_grad_batches=4")) == 0
    assert_same(own_steps, whole)
    factors = [Optimizer(warmup=5, decay="cosine").factor(step, 8) for step in range(8)]
    assert [rate for _, rate in whole] == pytest.approx([2e-3 * factor for factor in factors], rel=1e-9)


def test_fsdp_refuses_what_it_does_not_shard(command: Command, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    settings = command("autoencoder", tmp_path / "run", 2, "trainer.strategy=fsdp")
    assert door(train, settings) == 2
    assert "train the autoencoder with trainer=ddp" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain memory alone"):
        Layout.of({"accelerator": "cpu", "precision": "32-true", "strategy": "fsdp", "channels_last": True})


def test_a_training_for_slurm_submits_itself_once_and_trains_inside_the_job(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/sbatch.log\necho 4711\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = tmp_path / "run"
    settings = command("autoencoder", run, 2, "trainer=slurm", "trainer.accelerator=cpu", "trainer.devices=1",
                       "trainer.num_nodes=1", "trainer.precision=32-true", "trainer.slurm.time='1:00:00'")  # fmt: skip
    assert door(train, settings) == 0
    assert "job 4711" in capsys.readouterr().out
    said = (tmp_path / "sbatch.log").read_text().splitlines()
    for option in ("--requeue", "--signal=USR1@120", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=8",
                   "--time=1:00:00", f"--output={run}/slurm-%j.log"):  # fmt: skip
        assert option in said
    assert not any("partition" in option for option in said)
    (wrapped,) = (line.removeprefix("--wrap=srun ") for line in said if line.startswith("--wrap"))
    _, *inner = shlex.split(wrapped)
    assert inner[:3] == ["-m", "ldm.cli", "train"]
    assert sorted(inner[3:]) == sorted(settings)
    assert not (run / "checkpoints").exists()
    for name, value in {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "ldm",
        "SLURM_NTASKS_PER_NODE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert door(train, inner[3:]) == 0
    assert checkpoint.newest(run).name == "step-00000002"
    monkeypatch.delenv("SLURM_JOB_ID")
    sbatch.write_text("#!/bin/sh\necho no such account >&2\nexit 1\n")
    settings = [s for s in settings if not s.startswith("output=")]
    assert door(train, [*settings, f"output={tmp_path / 'other'}"]) == 2
    assert "no such account" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- faster


@pytest.mark.parametrize(("bfloat16", "chosen"), [(1.0, "bf16-mixed"), (2.0, "32-true")])
def test_precision_auto_takes_bfloat16_where_a_product_is_half_again_as_fast_and_says_so_and_keeps_it(
    bfloat16: float,
    chosen: str,
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(precision, "faster_in_bfloat16", lambda: 2.0 / bfloat16)
    monkeypatch.setenv("LDM_PRECISION", "")  # so that it is as before afterwards
    monkeypatch.delenv("LDM_PRECISION")
    assert door(train, command("diffusion", tmp_path / "run", 2, "trainer.precision=auto")) == 0
    layout = "plain layout" if chosen == "bf16-mixed" else "channels-last"
    assert f"on cpu in {chosen}, {layout}\n" in capsys.readouterr().out
    monkeypatch.setattr(precision, "faster_in_bfloat16", lambda: 1.0)  # another machine would choose float32
    monkeypatch.delenv("LDM_PRECISION")
    assert door(train, [f"resume={tmp_path / 'run'}", "trainer.max_steps=3"]) == 0
    assert f"on cpu in {chosen}," in capsys.readouterr().out
    assert all(value.dtype == torch.float32 for name, value in weights(tmp_path / "run").items() if "unet" in name)


def test_an_explicit_precision_is_left_alone() -> None:
    assert resolve_precision("64-true", "cpu") == "64-true"


def test_the_ranks_that_a_first_one_starts_take_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_PRECISION", "bf16-mixed")
    monkeypatch.setattr(precision, "faster_in_bfloat16", lambda: 1.0)
    assert resolve_precision("auto", "cpu") == "bf16-mixed"


def test_auto_is_channels_last_but_for_bfloat16_on_a_cpu_and_compiles_on_gpus_alone() -> None:
    def chosen(accelerator: str, number: str, **more: Any) -> str:
        return str(Layout.of({"accelerator": accelerator, "precision": number, **more}))

    assert chosen("cpu", "32-true") == "channels-last"
    assert chosen("cpu", "bf16-mixed") == "plain layout"
    assert chosen("gpu", "bf16-mixed") == "channels-last and compile"
    assert chosen("gpu", "bf16-mixed", strategy="fsdp") == "plain layout"
    assert chosen("cpu", "bf16-mixed", compile=True, checkpointing=True) == "checkpointing and compile"
    with pytest.raises(ValueError, match="choose true, false or auto"):
        chosen("cpu", "32-true", compile="yes")


def test_the_layout_of_an_autoencoder_is_what_it_trains_in_and_what_it_has_not_is_refused() -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "precision": "32-true"}
    assert str(Layout.of(settings, unet=False)) == "plain layout"
    for key in ("channels_last", "checkpointing"):
        with pytest.raises(ValueError, match=f"trainer.{key}=true is for the UNet of stage two"):
            Layout.of({**settings, key: True}, unet=False)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"accelerator": "cpu", "devices": "auto"}, 1),
        ({"accelerator": "cpu", "devices": 3, "num_nodes": 2}, 6),
        ({"accelerator": "gpu", "devices": "auto", "num_nodes": 2}, 8),
        ({"accelerator": "gpu", "devices": -1}, 4),
        ({"accelerator": "auto", "devices": [0, 3]}, 2),
        ({"accelerator": "gpu", "devices": "2"}, 2),
    ],
)
def test_devices_are_counted_as_lightning_will(
    settings: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_devices(settings, check=True) == count


def test_gpus_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for devices in ("auto", 1, [0]):
        with pytest.raises(ValueError, match="torch sees 0 GPUs; take trainer=cpu"):
            num_devices({"accelerator": "gpu", "devices": devices}, check=True)
    assert num_devices({"accelerator": "gpu", "devices": "auto"}) == 1  # to plan for another machine


@pytest.mark.parametrize("setting", ["channels_last=false", "checkpointing=true"])
def test_layout_and_checkpointing_change_losses_by_no_more_than_rounding(
    setting: str,
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,
) -> None:
    assert door(train, command("diffusion", tmp_path / "usual", 10)) == 0
    usual = list(own_steps)
    own_steps.clear()
    assert door(train, command("diffusion", tmp_path / "other", 10, f"trainer.{setting}")) == 0
    assert_same(own_steps, usual)


@pytest.mark.parametrize("first", ["true", "false"])
def test_a_run_that_goes_on_in_another_layout_has_the_losses_of_one_that_does_not(
    first: str,
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,
) -> None:
    run, then = tmp_path / "run", "false" if first == "true" else "true"
    assert door(train, command("diffusion", tmp_path / "usual", 6)) == 0
    usual = list(own_steps)
    own_steps.clear()
    assert door(train, command("diffusion", run, 3, f"trainer.channels_last={first}")) == 0
    assert door(train, [f"resume={run}", "trainer.max_steps=6", f"trainer.channels_last={then}"]) == 0
    assert_same(own_steps, usual)


def test_checkpointing_keeps_fewer_values_for_the_backward_pass() -> None:
    from tests.conftest import tiny_model

    network = tiny_model().unet.train().requires_grad_(True)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 77, 16)
    kept = []
    for network.gradient_checkpointing in (False, True):
        size = [0]

        def note(value: torch.Tensor, size: list[int] = size) -> torch.Tensor:
            size[0] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            network(*inputs).sum().backward()
        kept.append(size[0])
    assert kept[1] < 0.7 * kept[0]  # the middle and both ends are not checkpointed


def test_checkpointing_in_stage_one_is_refused(command: Command, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    assert door(train, command("autoencoder", tmp_path / "run", 2, "trainer.checkpointing=true")) == 2
    assert "for the UNet of stage two" in capsys.readouterr().err


@pytest.mark.slow  # a minute of a C++ compiler
def test_a_compiled_unet_has_the_losses_of_a_plain_one(
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,
) -> None:
    assert door(train, command("diffusion", tmp_path / "usual", 5)) == 0
    usual = list(own_steps)
    own_steps.clear()
    assert door(train, command("diffusion", tmp_path / "other", 5, "trainer.compile=true")) == 0
    assert_same(own_steps, usual)
    assert {k: v.shape for k, v in weights(tmp_path / "usual").items()} == {
        k: v.shape for k, v in weights(tmp_path / "other").items()
    }
