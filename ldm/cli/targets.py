"""What a config may name: a closed list of classes, and those that this machine's user allows."""

import os
from typing import Any

ALLOW = "LDM_ALLOW_TARGETS"  # package.Class,package.Other: exact names, from the environment, never from a config
TARGETS = (
    "ldm.autoencoder.Adversarial",
    "ldm.autoencoder.Autoencoder",
    "ldm.autoencoder.CalibratedLoss",
    "ldm.data.ShardDataset",
    "ldm.data.emoji_dataset",
    "ldm.data.stream.WebStream",
    "ldm.diffusion.Flow",
    "ldm.diffusion.Objective",
    "ldm.diffusion.Schedule",
    "ldm.training.data.DataModule",
    "ldm.training.optimizer.Optimizer",
    "ldm.training.perceptual.Perceptual",
    "ldm.unet.UNet",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.WandbLogger",
)


def check_targets(node: Any, resolved: bool = False) -> None:
    """Refuse a config that names anything outside the list.

    Args:
        node: the config as plain dicts and lists.
        resolved: its interpolations have been resolved. What is an interpolation still, came out of one, and would be
            resolved once more where objects are made, behind this check.

    Raises:
        ValueError: naming the target.
    """
    if isinstance(node, dict):
        if "_target_" in node and "settings" in node:
            raise ValueError("settings beside a _target_ is refused: wandb's may name a program, or where keys go")
        for key, value in node.items():
            # Hydra's other keys of this kind call a class another way than it is called here.
            if str(key).strip().startswith("_") and (key != "_target_" or value not in _allowed()):
                raise ValueError(
                    f"{key}={value} is refused; a config may name only {', '.join(_allowed())}; "
                    f"classes of your own: {ALLOW}=package.Class in the environment"
                )
            check_targets(value, resolved)
    elif isinstance(node, list):
        for value in node:
            check_targets(value, resolved)
    elif resolved and isinstance(node, str) and "${" in node:
        raise ValueError(f"{node[:80]!r} is refused; an interpolation may not give another interpolation")


def _allowed() -> tuple[str, ...]:
    own = os.environ.get(ALLOW, "").split(",")
    return (*TARGETS, *(name.strip() for name in own if name.strip()))
