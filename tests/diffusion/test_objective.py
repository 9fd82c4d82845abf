from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm import randomness
from ldm.diffusion import Draw, Objective

POSITIONS = torch.arange(4096)
EVERYTHING = Objective(5.0, "logit_normal", 0.5, 0.8, 0.1, 0.1, 4)


def draw(objective: Objective, positions: torch.Tensor = POSITIONS, seed: int = 3) -> Draw:
    z = torch.stack([randomness.normal(9, "latents", int(p), (4, 2, 2)) for p in positions])
    return objective.draw(seed, positions, z, 1000)


def test_without_recipes_times_and_noise_are_those_of_the_plain_loss() -> None:
    t, eps, added = draw(Objective(), POSITIONS[:8])
    assert t.tolist() == [randomness.integer(3, "timestep", p, 1000) for p in range(8)]
    assert torch.equal(eps, randomness.normals(3, "noise", range(8), torch.empty(8, 4, 2, 2)))
    assert added is eps


@pytest.mark.parametrize("objective", [Objective(), EVERYTHING], ids=["none", "all"])
def test_what_a_sample_gets_hangs_on_seed_and_position_alone(objective: Objective) -> None:
    whole, other = draw(objective, POSITIONS[:32]), draw(objective, POSITIONS[:32], seed=4)
    rows = torch.tensor([30, 7, 8])
    part = draw(objective, POSITIONS[rows])  # another batch, another order: as another rank has it
    assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_logit_normal_times_have_the_mean_and_spread_of_their_logit() -> None:
    t = draw(Objective(timesteps="logit_normal", logit_mean=0.5, logit_std=0.8)).t
    logit = torch.logit((t.double() + 0.5) / 1000)
    # Standard errors at n = 4096: 0.0125 of the mean, 0.009 of the deviation; whole steps add less.
    assert logit.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logit.std().item() == pytest.approx(0.8, abs=0.04)
    wide = draw(Objective(timesteps="logit_normal", logit_std=50.0)).t
    assert (wide.min().item(), wide.max().item()) == (0, 999)


def test_offset_noise_adds_one_number_a_channel() -> None:
    plain, moved = draw(Objective()), draw(Objective(offset_noise=0.5))
    added = moved.eps - plain.eps
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.5, abs=0.02)  # n = 16384: standard error 0.003
    assert torch.equal(moved.eps, moved.added)


def test_input_perturbation_changes_what_is_added_and_not_the_target() -> None:
    plain, moved = draw(Objective()), draw(Objective(input_perturbation=0.3))
    assert torch.equal(moved.eps, plain.eps)
    extra = moved.added - moved.eps
    assert extra.std().item() == pytest.approx(0.3, abs=0.005)  # n = 65536: standard error 0.0008
    assert abs((extra * moved.eps).mean().item()) < 0.01  # independent of ε: standard error 0.0012


def test_immiscible_noise_is_the_nearest_of_its_draws() -> None:
    z = torch.stack([randomness.normal(9, "latents", p, (4, 2, 2)) for p in range(64)])
    eps = Objective(immiscible=3).draw(3, POSITIONS[:64], z, 1000).eps
    draws = [randomness.normals(3, s, range(64), z) for s in ("noise", "noise 1", "noise 2")]
    distances = torch.stack([(d - z).flatten(1).norm(dim=1) for d in draws])
    torch.testing.assert_close((eps - z).flatten(1).norm(dim=1), distances.min(0).values)
    assert len(distances.argmin(0).unique()) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_snr": 0.0}, "min_snr=0.0 must be above 0"),
        ({"timesteps": "cosine"}, "choose uniform or logit_normal"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"offset_noise": -0.1}, "offset_noise and input_perturbation at least 0"),
        ({"input_perturbation": -1.0}, "offset_noise and input_perturbation at least 0"),
        ({"immiscible": 1}, "immiscible=1: the nearest of 2"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_rule(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Objective(**wrong)
