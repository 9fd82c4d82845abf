"""A wandb logger without a key is an error in the first second, not after an epoch."""

from __future__ import annotations

import os
from typing import Any

import wandb


def check_wandb(node: Any) -> None:
    """Raise ValueError if a config asks for wandb online and no key is there."""
    for logger in node["loggers"]:
        offline = logger.get("offline") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if logger["_target_"].endswith("WandbLogger") and not offline and not wandb.api.api_key:
            raise ValueError(
                "logger=wandb: no API key; run `wandb login`, set WANDB_API_KEY, or log offline with WANDB_MODE=offline"
            )
