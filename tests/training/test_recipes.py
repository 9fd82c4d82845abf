"""The recipes of stage two reach the training from one line, learn, and are kept in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.cli import door, train
from ldm.cli.training import build, compose
from ldm.diffusion import Objective

SMALL = ["data=emoji48", "cache=false", "unet.widths=[32,64]", "unet.attention=[false,true]", "unet.num_heads=2"]


def test_every_recipe_of_the_loss_reaches_the_training() -> None:
    more = ["loss.min_snr=5", "loss.timesteps=logit_normal", "loss.logit_mean=0.5", "loss.logit_std=0.7",
            "loss.offset_noise=0.1", "loss.input_perturbation=0.2", "loss.immiscible=4"]  # fmt: skip
    module, _, _ = build(compose([*SMALL, *more])[0])
    assert module.objective == Objective(5, "logit_normal", 0.5, 0.7, 0.1, 0.2, 4)


def test_eps_is_short_for_epsilon() -> None:
    module, _, _ = build(compose([*SMALL, "diffusion.prediction=eps"])[0])
    assert module.model.prediction == "epsilon"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss=gaussian"], "stage=diffusion with a loss of the other stage, ldm.autoencoder.CalibratedLoss"),
        (["experiment=emoji/autoencoder", "loss=diffusion"], "choose loss=gaussian or loss=laplace"),
    ],
)
def test_a_loss_of_the_other_stage_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert door(train, [*arguments, f"output={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_the_version_before_the_group_of_losses_goes_on_with_its_min_snr(tmp_path: Path) -> None:
    cfg, _ = compose([*SMALL, f"output={tmp_path}"])
    old: Any = OmegaConf.to_container(cfg)
    old |= {"min_snr": 5.0, "loss": {"_target_": "ldm.autoencoder.CalibratedLoss", "beta": 0.18}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(old))
    again, _ = compose([f"resume={tmp_path}"])
    module, _, _ = build(again)
    assert module.objective == Objective(min_snr=5.0)
