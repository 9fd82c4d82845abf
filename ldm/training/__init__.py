"""Training of both stages; the only room that imports Lightning and wandb."""
