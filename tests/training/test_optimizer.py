"""Muon: what it makes of a gradient, what it leaves to Adam, and that a run of it goes on to the bit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm import checkpoint
from ldm.cli import door, train
from ldm.training.optimizer import Optimizer, orthogonal
from tests.training.test_scale import Steps, assert_same, in_processes, own_steps  # noqa: F401
from tests.training.test_trust import command  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
Command = Callable[..., list[str]]


def stepped(module: nn.Module, gradients: list[dict[str, torch.Tensor]], **settings: Any) -> dict[str, torch.Tensor]:
    """The weights after a step by each of the gradients; without warm-up."""
    built = Optimizer(warmup=0, **settings).build({"": [module]}, len(gradients))
    for each in gradients:
        for name, parameter in module.named_parameters():
            # In the layout of its parameter, as autograd leaves it.
            parameter.grad = torch.empty_like(parameter).copy_(each[name]) if name in each else None
        built["optimizer"].step()
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(96, 48), nn.Conv2d(64, 4, 3))


def gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{name: torch.randn_like(p) for name, p in network().named_parameters()} for _ in range(steps)]


@pytest.mark.parametrize("shape", [(3, 48, 200), (2, 200, 48), (1, 64, 64)])
def test_orthogonal_is_near_the_polar_factor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    got = orthogonal(matrices, 5)
    assert got.shape == matrices.shape
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(got)
    assert float(values.max()) < 1.3  # 1.2 by the polynomial, and bfloat16
    assert float(values[:, :-4].min()) > 0.6  # measured 0.685; a square matrix has a few that begin near 0
    alignment = (got * (u @ vh)).sum((1, 2)) / (got.flatten(1).norm(dim=1) * math.sqrt(min(shape[1:])))
    assert float(alignment.min()) > 0.95  # measured 0.979 to 0.987: the same directions, their lengths a bit off


def test_orthogonal_forgets_the_length_and_of_zero_makes_zero() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(1, 40, 60)
    torch.testing.assert_close(
        orthogonal(matrices * 1e-3, 5), orthogonal(matrices, 5), rtol=0, atol=0.02
    )  # one rounding: 0.0078
    assert float(orthogonal(torch.zeros(1, 40, 60), 5).abs().max()) == 0.0


def test_a_matrix_goes_as_torchs_own_muon_takes_it() -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(48, 96), [torch.randn(48, 96) for _ in range(4)]
    ours, theirs = nn.Linear(96, 48, bias=False), nn.Parameter(weight.clone())
    ours.weight.data.copy_(weight)
    peer = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        theirs.grad = grad.clone()
        peer.step()
    given = [{"weight": grad} for grad in grads]
    got = stepped(ours, given, method="muon", learning_rate=1e-2, weight_decay=0.1)["weight"]
    moved = (theirs.detach() - weight).square().mean().sqrt()
    assert float((got - theirs.detach()).square().mean().sqrt()) < 0.01 * float(
        moved
    )  # measured 0; a product of many may round otherwise
    assert float(moved) > 1e-3


def test_kernels_and_matrices_move_by_muon_and_the_rest_as_adamw_moves_it() -> None:
    before, few = dict(network().named_parameters()), gradients(1)
    muon = stepped(network(), few, method="muon", learning_rate=1e-2, weight_decay=0.0)
    adam = stepped(network(), few, learning_rate=1e-2, weight_decay=0.0)
    for name in ("0.weight", "1.weight"):  # a first step of Adam is ±lr everywhere
        step = (muon[name] - before[name]).detach()
        assert 0.15e-2 < float(step.square().mean().sqrt()) < 0.25e-2  # a fifth of the rate, as Adam's later steps have
        widest = float(torch.linalg.svdvals(step.flatten(1)).max() / step.norm()) * math.sqrt(step.shape[0])
        assert widest < 1.4  # measured 1.35 and 1.32; of Adam's step 1.45 and 1.67; of an orthogonal matrix 1
    for name in ("0.bias", "1.bias", "2.weight", "2.bias"):  # four channels are no matrix to speak of
        assert torch.equal(muon[name], adam[name])
        assert not torch.equal(muon[name], before[name])


def test_a_step_without_gradients_leaves_weights_and_momentum_alone() -> None:
    few = gradients(1)
    once = stepped(network(), few, method="muon", learning_rate=1e-2)
    assert all(torch.equal(once[name], value) for name, value in
               stepped(network(), [*few, {}], method="muon", learning_rate=1e-2).items())  # fmt: skip


def test_memory_layout_does_not_matter() -> None:
    few = gradients(2)
    plain = stepped(network(), few, method="muon", learning_rate=1e-2)
    last = stepped(network().to(memory_format=torch.channels_last), few, method="muon", learning_rate=1e-2)  # type: ignore[call-overload]
    assert all(torch.equal(plain[name], last[name]) for name in plain)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_run_that_was_stopped_is_the_uninterrupted_one_to_the_bit(
    command: Command,  # noqa: F811
    tmp_path: Path,
    stage: str,
) -> None:
    more = ("optimizer=muon", "optimizer.warmup=2", "optimizer.learning_rate=1e-3")
    for name, steps in (("whole", 9), ("parts", 4)):
        assert door(train, command(stage, tmp_path / name, steps, *more)) == 0
    assert door(train, [f"resume={tmp_path / 'parts'}", "trainer.max_steps=9"]) == 0
    states = [checkpoint.read_state(checkpoint.newest(tmp_path / name))["optimizer_states"][0]["state"]
              for name in ("whole", "parts")]  # fmt: skip
    assert sum("momentum" in state for state in states[0].values()) > 5
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], torch.Tensor))
    files = [checkpoint.newest(tmp_path / name) for name in ("whole", "parts")]
    raw = {"autoencoder": "autoencoder.raw.safetensors", "diffusion": "unet.raw.safetensors"}[stage]
    assert files[0].joinpath(raw).read_bytes() == files[1].joinpath(raw).read_bytes()


def test_two_processes_have_the_losses_of_one(
    command: Command,  # noqa: F811
    tmp_path: Path,
    own_steps: Steps,  # noqa: F811
) -> None:
    more = ("optimizer=muon", "optimizer.warmup=5", "optimizer.decay=cosine")
    assert door(train, command("diffusion", tmp_path / "one", 20, *more)) == 0
    expected = list(own_steps)
    assert expected[-1][0] < expected[0][0] - 0.1  # it has moved
    two = command("diffusion", tmp_path / "two", 20, *more, "trainer.devices=2", "trainer.strategy=ddp")
    assert_same(in_processes(tmp_path, two), expected)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.method=sgd", "choose adamw or muon"),
        ("trainer.strategy=fsdp", "take optimizer=adamw or trainer.strategy=ddp"),
        ("optimizer.newton_schulz=0", "a whole number from 1 to 10"),
        ("optimizer.newton_schulz=2.5", "a whole number from 1 to 10"),
    ],
)
def test_what_it_does_not_take_is_one_line(
    command: Command,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    said: str,
) -> None:
    assert door(train, command("diffusion", tmp_path / "run", 1, "optimizer=muon", setting)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
