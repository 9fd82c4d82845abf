"""A run that is killed, moved, starved or fed NaN is afterwards the run it would have been (docs/trust.md)."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm import checkpoint
from ldm.autoencoder import Adversarial, Autoencoder
from ldm.cli import door, train
from ldm.data import ShardDataset, write_shard
from ldm.training.guard import Guard, Limits
from tests.training.test_training import AUTOENCODER, arguments, column, unet, weights

ROOT = Path(ldm.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = ("autoencoder", "adversarial", "diffusion")
QUIET = ("samples.every=0", "optimizer.decay=constant", "validation.every=1000", "checkpoint.every=3")
DEADLINE = 120  # seconds for a process to get to a state; they take about 15 on two idle cores


@pytest.fixture
def command(shapes: Path, parts: tuple[Path, Path]) -> Callable[..., list[str]]:
    """The settings of a tiny training of a stage."""

    def build(stage: str, output: Path, steps: int, *more: str) -> list[str]:
        if stage == "diffusion":
            return settings_of(shapes, parts, output, steps, *more)
        own = (*AUTOENCODER, *QUIET)
        if stage == "adversarial":
            own = (*own, "adversarial=patch", "adversarial.widths=[32,32]", "adversarial.start=2")
        return arguments(shapes, output, "autoencoder", steps, *own, *more)

    return build


def settings_of(shapes: Path, parts: tuple[Path, Path], output: Path, steps: int, *more: str) -> list[str]:
    """The settings of a tiny training of stage two."""
    return arguments(shapes, output, "diffusion", steps, *unet(*parts), *QUIET, *more)


def start(faults: dict[str, Any], settings: list[str], folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A training in its own processes, with faults planted in it."""
    (folder / "plant.json").write_text(json.dumps(faults))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/training/harness.py"), str(folder / "plant.json"), *settings],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[1].decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def everything(run: Path) -> dict[str, torch.Tensor]:
    """Raw, averaged and frozen weights, and the optimiser's moments."""
    state = checkpoint.read_state(checkpoint.newest(run))
    moments = state["optimizer_states"][0]["state"]
    return {
        **weights(run),
        **{f"rest/{name}": tensor for name, tensor in state["rest"].items()},
        **{f"adam/{i}/{name}": torch.as_tensor(value) for i, one in moments.items() for name, value in one.items()},
    }


def assert_identical(one: Path, other: Path) -> None:
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture
def read_keys(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of the samples of each micro-batch that trainings in this process read from now on."""
    read: list[list[str]] = []
    begin = Guard.on_train_batch_start

    def on_train_batch_start(self: Guard, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        read.append(list(batch["key"]))
        begin(self, trainer, module, batch, *args)

    monkeypatch.setattr(Guard, "on_train_batch_start", on_train_batch_start)
    return read


# --------------------------------------------------------------------------------------------- killed and gone on with


@pytest.mark.parametrize("stage", STAGES)
def test_after_kill_9_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    stage: str, command: Callable[..., list[str]], tmp_path: Path, read_keys: list[list[str]]
) -> None:
    run = tmp_path / "killed"
    process = start({"slow": 0.05}, command(stage, run, 100_000), tmp_path)
    wait_for(lambda: (run / "checkpoints/step-00000006").exists(), process)
    process.kill()
    process.wait()
    last = int(checkpoint.newest(run).name.removeprefix("step-"))  # a multiple of 3: the exact end of an epoch
    assert last % 3 == 0
    torch.manual_seed(last)  # another process seed than the whole run's below
    assert door(train, [f"resume={run}", f"trainer.max_steps={last + 4}"]) == 0
    resumed = list(read_keys)
    read_keys.clear()
    torch.manual_seed(0)
    assert door(train, command(stage, tmp_path / "whole", last + 4)) == 0
    assert resumed == read_keys[last:]
    assert_identical(run, tmp_path / "whole")


@pytest.mark.parametrize(
    ("stage", "always", "then"),
    [
        ("diffusion", (), ("data.num_workers=2",)),
        ("autoencoder", (), ("data.num_workers=2",)),
        ("diffusion", ("trainer.accumulate_grad_batches=2",), ()),
        ("adversarial", ("trainer.accumulate_grad_batches=2",), ("data.num_workers=2",)),
    ],
)
def test_workers_and_accumulation_do_not_change_what_a_resumed_run_computes(
    stage: str, always: tuple[str, ...], then: tuple[str, ...], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert door(train, command(stage, tmp_path / "whole", 7, *always)) == 0
    assert door(train, command(stage, tmp_path / "halves", 3, *always)) == 0
    assert door(train, [f"resume={tmp_path / 'halves'}", "trainer.max_steps=7", *then]) == 0
    assert_identical(tmp_path / "whole", tmp_path / "halves")


def test_ranks_from_one_to_two_to_one_read_the_same_batches_and_end_with_the_same_weights(
    command: Callable[..., list[str]], tmp_path: Path, read_keys: list[list[str]]
) -> None:
    stage, moved = "adversarial", tmp_path / "moved"
    # Biases that a normalisation takes away again have no gradient but rounding, which Adam would scale up to a step.
    more = ("optimizer.eps=1e-4",)
    assert door(train, command(stage, tmp_path / "whole", 9, *more)) == 0
    whole = [sorted(keys) for keys in read_keys]
    read_keys.clear()
    assert door(train, command(stage, moved, 3, *more)) == 0
    assert [sorted(keys) for keys in read_keys] == whole[:3]
    process = start({"keys": str(tmp_path)}, [f"resume={moved}", "trainer.max_steps=6", "trainer.devices=2"], tmp_path)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, stderr.decode()[-3000:]
    ranks = [
        [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]
    assert [step for step, _ in ranks[0]] == [step for step, _ in ranks[1]] == [3, 4, 5]  # equal steps on both
    assert [sorted(a + b) for (_, a), (_, b) in zip(*ranks, strict=True)] == whole[3:6]
    read_keys.clear()
    assert door(train, [f"resume={moved}", "trainer.max_steps=9", "trainer.devices=1"]) == 0
    assert [sorted(keys) for keys in read_keys] == whole[6:]
    for first in (0, 3, 6):  # three batches of eight are an epoch of the 24 samples
        assert len({key for keys in whole[first : first + 3] for key in keys}) == 24
    one, other = weights(tmp_path / "whole"), weights(moved)
    for name, tensor in one.items():  # measured 1.2e-7: one rounding
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------------ stopped


def test_sigterm_to_one_rank_stops_all_and_saves_and_nan_on_one_rank_is_skipped_by_all(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = command("diffusion", run, 100_000, "trainer.devices=2", "checkpoint.every=100000")
    process = start({"keys": str(tmp_path), "slow": 0.05, "nan": [1, 2]}, settings, tmp_path)
    read = tmp_path / "rank1.jsonl"
    wait_for(lambda: read.exists() and len(read.read_text().splitlines()) > 5, process)
    (rank_1,) = children(process.pid)
    asked = time.monotonic()
    os.kill(rank_1, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert process.returncode == 128 + signal.SIGTERM, stderr.decode()[-3000:]
    assert f"stopped by SIGTERM at step {int(checkpoint.newest(run).name[5:])}" in stderr.decode()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(2, "skipped")]
    assert len(events[0]["keys"]) == 8  # of both ranks
    last = int(checkpoint.newest(run).name[5:])
    seen = [json.loads(line)[0] for line in read.read_text().splitlines()]
    assert seen == list(range(last))
    # And to both, as a batch system sends it.
    process = start({"slow": 0.05, "keys": str(tmp_path)}, [f"resume={run}"], tmp_path)
    wait_for(lambda: len(read.read_text().splitlines()) > last + 3, process)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr.decode()[-3000:]
    assert int(checkpoint.newest(run).name[5:]) > last


def test_sigusr1_under_slurm_saves_and_requeues_and_the_requeued_job_goes_on(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
           "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}  # fmt: skip
    run, settings = tmp_path / "run", command("autoencoder", tmp_path / "run", 100_000, "checkpoint.every=100000")
    process = start({"keys": str(tmp_path), "slow": 0.05}, settings, tmp_path, **job)
    read = tmp_path / "rank0.jsonl"
    wait_for(lambda: read.exists() and len(read.read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, stderr.decode()[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    last = int(checkpoint.newest(run).name[5:])
    again = command("autoencoder", run, last + 2, "checkpoint.every=100000")  # the same command, run by the scheduler
    process = start({}, again, tmp_path, SLURM_RESTART_COUNT="1", **job)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, stderr.decode()[-3000:]
    assert checkpoint.newest(run).name == f"step-{last + 2:08d}"


def test_a_rank_that_dies_takes_the_run_down_with_a_code(command: Callable[..., list[str]], tmp_path: Path) -> None:
    settings = command("autoencoder", tmp_path / "run", 100_000, "trainer.devices=2")
    process = start({"slow": 0.05}, settings, tmp_path)
    wait_for(lambda: (tmp_path / "run/checkpoints/step-00000003").exists(), process)
    (rank_1,) = children(process.pid)
    os.kill(rank_1, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    checkpoint.verify(checkpoint.newest(tmp_path / "run"))


# --------------------------------------------------------------------------------------------------- not a number


def plant_nan(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    from ldm.training.autoencoder import AutoencoderTraining

    original = AutoencoderTraining.training_step

    def step(self: AutoencoderTraining, batch: Any) -> Any:
        loss = original(self, batch)
        return loss * float("nan") if self.global_step in steps else loss

    monkeypatch.setattr(AutoencoderTraining, "training_step", step)


@pytest.mark.parametrize("stage", ["autoencoder", "adversarial"])
def test_one_nan_step_leaves_weights_and_moments_alone_and_is_counted(
    stage: str, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert door(train, command(stage, tmp_path / "before", 3)) == 0
    plant_nan(monkeypatch, range(3, 4))
    assert door(train, command(stage, tmp_path / "run", 4)) == 0
    left, right = everything(tmp_path / "before"), everything(tmp_path / "run")
    trained = [name for name in left if ".raw." in name or name.startswith(("adam", "rest"))]
    assert len(trained) > 50
    # The latent scale lies among the raw weights and is that of the average, which goes on towards the weights.
    assert [n for n in trained if "latent_" not in n and not torch.equal(left[n], right[n])] == []
    event = json.loads((tmp_path / "run/events.jsonl").read_text())
    assert (event["step"], event["event"], len(event["keys"])) == (3, "skipped", 8)


def test_nan_steps_in_a_row_stop_the_run_with_its_last_good_state_and_the_keys(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plant_nan(monkeypatch, range(4, 100))
    assert door(train, command("autoencoder", tmp_path / "run", 50, "guard.nonfinite=3")) == 3
    said = capsys.readouterr().err
    assert "stopped at step 7, saved in" in said
    assert "3 steps in a row" in said
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [4, 5, 6]
    assert events[-1]["keys"][0] in said
    assert all(torch.isfinite(tensor).all() for tensor in everything(tmp_path / "run").values())


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_bad_samples_are_replaced_and_counted_and_too_many_end_the_run(
    stage: str, command: Callable[..., list[str]], shapes: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, rows = ShardDataset(shapes), []
    for number, key in enumerate(whole.keys):
        image = whole[number].image
        rows.append((key, {"png": image[:100] if number == 7 else image, "txt": b"a red square"}))
    write_shard(tmp_path / "spoilt.tar", rows)
    own = [f"data.{part}.paths={tmp_path / 'spoilt.tar'}" for part in ("train", "validation")]
    run = tmp_path / "run"
    assert door(train, command(stage, run, 12, *own)) == 2
    assert "0007" in capsys.readouterr().err
    allowed = ("data.on_bad=skip", "guard.substituted=0.05")
    assert door(train, command(stage, tmp_path / "skip", 30, *own, *allowed)) == 0
    assert column(tmp_path / "skip", "train/substituted")[-1] == 10.0  # one in each of the ten epochs
    assert door(train, command(stage, tmp_path / "many", 30, *own, "data.on_bad=skip")) == 3
    assert "of 104 samples were bad and replaced, more than guard.substituted=0.01" in capsys.readouterr().err


def test_a_spike_is_told_from_noise_and_does_not_hide_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, spikes = Guard(Limits(), tmp_path, None), []
    monkeypatch.setattr(Guard, "_event", lambda self, trainer, name, loss: spikes.append(loss))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    for i, value in enumerate(noise):
        guard._watch(None, 5.0 - 0.002 * i + 0.1 * value)  # type: ignore[arg-type]
        if i in (500, 502):
            guard._watch(None, 20.0)  # type: ignore[arg-type]
    assert spikes == [20.0, 20.0]


# ------------------------------------------------------------------------------------------------------- checkpoints


def _save_for_ever(run: Path) -> None:
    torch.set_num_threads(1)
    contents = checkpoint.Contents({"autoencoder": Autoencoder(widths=(32, 64), num_blocks=1, stem=4)})
    previous = None
    for step in range(1, 10_000):
        folder = run / f"checkpoints/step-{step:08d}"
        checkpoint.save(folder, contents, {"moments": torch.full((2**20,), float(step))}, share=previous)
        previous = folder


def test_kill_9_in_the_middle_of_saves_leaves_a_newest_checkpoint_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A temporary folder on another file system, where a rename would be a copy that can be cut.
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    context, cut = multiprocessing.get_context("fork"), 0
    for turn in range(10):
        run = tmp_path / str(turn)
        process = context.Process(target=_save_for_ever, args=(run,))
        process.start()
        while not (run / "checkpoints/step-00000002").exists():
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(0.013 * turn)  # at other moments of a save, which takes about 0.05 s
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = checkpoint.newest(run)
        assert float(checkpoint.read_state(newest)["moments"][0]) == int(newest.name[5:])
        cut += bool(list((run / "checkpoints").glob(".step-*")))
        shutil.rmtree(run)
    assert cut > 0  # some of the ten were really cut in the middle


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_error_with_the_path_and_the_one_before_loads(
    command: Callable[..., list[str]], small_disk: Path, capsys: Any
) -> None:
    run = small_disk / "run"
    settings = command("autoencoder", run, 100, "checkpoint.keep=10")  # 11 MB each
    assert door(train, settings) == 2
    said = capsys.readouterr().err
    refused = re.search(rf"checkpoint {run}/checkpoints/step-(\d+) could not be written: No space left on dev", said)
    assert refused, said
    assert f"warning: the disk of {run}" in said  # and was foretold before the first step
    assert checkpoint.newest(run).name == f"step-{int(refused[1]) - 3:08d}"
    assert ldm.load_autoencoder(run)
    assert not list((run / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    damage: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert door(train, command("autoencoder", run, 6)) == 0
    file = run / "checkpoints/step-00000006/autoencoder.raw.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[-1000:]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    capsys.readouterr()
    assert door(train, [f"resume={run}", "trainer.max_steps=6"]) == 0
    said = capsys.readouterr().err
    assert f"note: {file} is damaged" in said
    assert "took step-00000003, 1 before the newest" in said
    assert door(train, command("autoencoder", tmp_path / "whole", 6)) == 0
    assert_identical(run, tmp_path / "whole")  # the damaged one was made again


def test_the_best_checkpoint_stays_when_the_last_k_move_on(command: Callable[..., list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("checkpoint.every=2", "checkpoint.keep=2", "validation.every=2", "optimizer.learning_rate=1e-3")
    assert door(train, command("autoencoder", run, 6, *more)) == 0
    scores = json.loads((run / "scores.json").read_text())
    best = max(scores, key=lambda name: scores[name])
    (run / "scores.json").write_text(json.dumps(scores | {best: 1e9}))  # no later one is better
    assert door(train, [f"resume={run}", "trainer.max_steps=14"]) == 0
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == sorted({best, "step-00000012", "step-00000014"})


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    contents = checkpoint.Contents({"autoencoder": Autoencoder(widths=(32, 64), num_blocks=1, stem=4)})
    state = {"optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([1.0, float("inf")])}}}]}
    with pytest.raises(ValueError, match="optimizer_states/0/state/0/exp_avg holds NaN"):
        checkpoint.save(tmp_path / "c", contents, state)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ discriminator


def test_the_adversarial_weight_makes_both_gradients_of_the_last_layer_alike() -> None:
    torch.manual_seed(0)
    adversarial = Adversarial((32, 64), weight=1.0, start=0)
    last, x = torch.nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 32, 32)
    reconstruction = last(x)
    nll = 7.0 * (x - reconstruction).square().mean()
    parts = adversarial(x, reconstruction, nll, last.weight, 0)
    pulls = [torch.autograd.grad(t, last.weight, retain_graph=True)[0].norm() for t in (nll, parts["generator"])]
    assert float(pulls[1] / pulls[0]) == pytest.approx(1.0, abs=1e-2)  # λ's 1e-4 in the denominator
    # The autoencoder's term does not move D, and D's does not move the autoencoder.
    assert torch.autograd.grad(parts["generator"], list(adversarial.parameters()), allow_unused=True)[0] is None
    assert torch.autograd.grad(parts["discriminator"], last.weight, allow_unused=True)[0] is None


def test_a_discriminator_learns_to_tell_noise_from_flat_images() -> None:
    torch.manual_seed(0)
    adversarial, last = Adversarial((32, 32)), torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.Adam(adversarial.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        x, noise = torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32), torch.randn(4, 3, 32, 32)
        loss = adversarial(x, noise, last.sum(), last, 0)["discriminator"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # hinge of two scores near 0
    assert losses[-1] < 0.3
