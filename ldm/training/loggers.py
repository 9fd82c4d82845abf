"""A wandb logger without a key is an error in the first second, not after an epoch."""

from typing import Any

import wandb


def check_wandb(node: Any) -> None:
    """Raise ValueError if a config asks for wandb online and no key is there."""
    online = any(logger.get("mode") == "online" for logger in node["loggers"])
    if online and not wandb.api.api_key:
        raise ValueError(
            "logger=wandb: no API key; run `wandb login`, set WANDB_API_KEY, or log offline with logger.mode=offline"
        )
