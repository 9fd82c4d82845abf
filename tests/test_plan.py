"""``ldm plan``: known answers, and what it says of the experiments that nobody here can run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder import Autoencoder
from ldm.cli import door
from ldm.cli.settings import configs
from ldm.cli.training import plan
from ldm.experiments.plan import Device, Training, footprint, loss, probe, published
from ldm.training.speed import Layout
from ldm.unet import UNet

EXPERIMENTS = sorted(path.relative_to(configs() / "experiment") for path in configs().glob("experiment/sd15/*.yaml"))
PARAMETERS = {"autoencoder": "83,653,863", "diffusion_256": "859,520,964", "diffusion_512": "859,520,964"}


def tiny(device: str = "meta") -> UNet:
    with torch.device(device):
        return UNet((32, 64), (False, True), 1, 2, context_dim=16)


def sd() -> UNet:
    with torch.device("meta"):
        return UNet()


def said(capsys: Any, *arguments: str) -> str:
    capsys.readouterr()
    assert door(plan, list(arguments)) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["unet", "autoencoder"])
def test_work_counted_on_no_device_is_that_of_a_real_pass(kind: str) -> None:
    def make(device: str) -> torch.nn.Module:
        with torch.device(device):
            return tiny(device) if kind == "unet" else Autoencoder((32, 64), 1, stem=4)

    real = make("cpu")
    with FlopCounterMode(display=False) as counter:
        loss(real, 1, 32, 32, "cpu").backward()
    work, saved = footprint(make("meta"), 32, 32)
    # Half a percent: the CPU's fused attention computes its scores again in the backward pass.
    assert work == pytest.approx(counter.get_total_flops(), rel=5e-3 if kind == "autoencoder" else 0)
    assert saved > 0


def test_sds_unet_has_the_published_work() -> None:
    # docs/speed.md and FACTS: 360 GFLOP for two images forward at 32×32 latents; backward is twice forward.
    assert footprint(sd(), 256, 256)[0] == pytest.approx(3 * 180e9, rel=0.01)


@pytest.mark.parametrize(("size", "rate"), [(256, 137), (512, 36)])
def test_a_published_rate_comes_out_as_it_went_in(size: int, rate: int) -> None:
    training = Training(sd(), 0, 0.0, (size, size), batch=2048, devices=8)
    seconds = training.on(published("a100", size, size))[2]
    assert 2048 / seconds / 8 == pytest.approx(rate, rel=0.01)  # FLOP/s are kept to two places


def test_time_and_memory_add_up() -> None:
    network = tiny()
    count = sum(p.numel() for p in network.parameters())
    work, saved = footprint(network, 64, 64)
    device = Device("", rate=1e9, parameter=1e-6, kept=0.5, base=7.0)
    one = Training(network, 100, 3e6, (64, 64), batch=8, devices=1).on(device)
    assert one[0] == work
    assert one[1] == {"weights": 4 * count, "gradients": 4 * count, "Adam": 8 * count, "average": 4 * count,
                      "activations": 0.5 * saved * 8, "frozen parts": 400.0, "program": 7.0}  # fmt: skip
    assert one[2] == pytest.approx((work + 3e6) * 8 / 1e9 + count * 1e-6)
    two = Training(network, 100, 3e6, (64, 64), batch=8, devices=2, accumulation=4, sharded=True).on(device)
    assert two[1]["Adam"] == 4 * count
    assert two[1]["activations"] == 0.5 * saved
    assert two[1]["frozen parts"] == 400.0  # whole on each device
    assert two[2] == pytest.approx(one[2] / 2)


def test_checkpointing_costs_another_forward_pass_and_saves_memory() -> None:
    work, saved = footprint(sd(), 256, 256)
    network = sd()
    network.gradient_checkpointing = True
    again, less = footprint(network, 256, 256)
    assert 1.25 * work < again < 4 / 3 * work  # all but the middle and both ends is computed again
    assert less < 0.5 * saved


@pytest.mark.parametrize("stage", ["diffusion", pytest.param("autoencoder", marks=pytest.mark.slow)])
def test_a_probe_gives_figures_to_plan_by(stage: str) -> None:
    found = probe(stage, "32-true", Layout(True, False, False), torch.device("cpu"))
    assert 1e8 < found.rate < 1e13  # FLOP a second of any CPU
    assert 0.0 <= found.parameter < 1e-6
    assert 0.1 <= found.kept < 20.0
    assert 1e8 < found.base < 1e11  # bytes: of a process with torch and its tests in it


@pytest.mark.parametrize("file", EXPERIMENTS, ids=str)
def test_the_time_at_the_head_of_an_experiment_is_what_its_plan_says(file: Path, capsys: Any) -> None:
    head = (configs() / "experiment" / file).read_text().split("defaults:")[0]
    out = said(capsys, f"experiment={file.with_suffix('')}", "on=a100", "price=2")
    assert out.startswith(f"{PARAMETERS[file.stem]} parameters, ")
    devices, hours = re.search(r"Planned for (\d+) A100: ([\d.]+) hours", head).groups()  # type: ignore[union-attr]
    assert f" on {devices} devices in bf16-mixed" in out
    assert f": {hours} hours" in out
    cost = re.search(r"cost ([\d,.]+)", out)[1].replace(",", "")  # type: ignore[index]
    assert float(cost) == pytest.approx(2 * int(devices) * float(hours), rel=0.01)
    assert re.search(r"memory a device: ([\d.]+) GB", out)[1] < "80"  # type: ignore[index]
    assert "Not run." in head
    assert "Expected:" in head


def test_devices_are_given_by_either_name(capsys: Any) -> None:
    short, long = (
        said(capsys, "experiment=sd15/autoencoder", "on=a100", f"{name}=4") for name in ("devices", "trainer.devices")
    )
    assert short == long
    assert " on 4 devices in " in short


def test_what_a_plan_does_not_count_is_said(capsys: Any) -> None:
    out = said(capsys, "experiment=sd15/diffusion_256", "on=a100", "ema.power=[0.05,0.1]", "repa=0.5")
    assert "not counted: repa, ema.power\n" in out
    assert "not counted: optimizer=muon\n" in said(capsys, "experiment=sd15/diffusion_256", "optimizer=muon", "on=a100")
    assert "not counted: adversarial\n" in said(capsys, "experiment=sd15/autoencoder", "on=a100")
    assert "not counted" not in said(capsys, "experiment=sd15/diffusion_256", "on=a100")


def test_live_encoding_is_work_too(capsys: Any) -> None:
    speeds = []
    for cache in ("true", "false"):
        out = said(capsys, "experiment=sd15/diffusion_256", "on=a100", f"cache={cache}")
        speeds.append(float(re.search(r"speed: ([\d,.]+)", out)[1].replace(",", "")))  # type: ignore[index]
    assert 1.3 < speeds[0] / speeds[1] < 1.7  # SD's encoder: 250 GFLOP at 256×256 beside the UNet's 540


def test_invalid_questions_are_refused(capsys: Any) -> None:
    for argument, reason in (("on=b200", "choose one of here, a100, h100"), ("price=-1", "at least 0")):
        assert door(plan, ["experiment=sd15/diffusion_256", argument]) == 2
        assert reason in capsys.readouterr().err
