from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.data import FixedSet, ShardDataset
from ldm.training.alignment import Alignment
from tests.conftest import tiny_model


def test_the_middle_of_the_unet_comes_to_tell_the_clean_image_and_not_another(shapes: Path) -> None:
    model, items = tiny_model(), FixedSet(ShardDataset(shapes), 32, 32)
    x = torch.stack([items[i]["image"] for i in range(6)])  # squares and discs of three colours
    with torch.no_grad():
        z, context = model.autoencoder.encode(x), model.null_context.expand(6, -1, -1)
    unet, t = model.unet.train().requires_grad_(True), torch.full((6,), 10.0)
    torch.manual_seed(0)
    alignment = Alignment(unet, 0.5)
    optimizer = torch.optim.Adam([*unet.parameters(), *alignment.parameters()], lr=2e-3)

    def loss(images: torch.Tensor) -> torch.Tensor:
        unet(z, t, context)
        return alignment(images)

    first = loss(x)
    first.backward()
    assert first.item() == pytest.approx(0.5, abs=0.1)  # directions of 320 numbers: cos is 0 to 1/18
    assert unet.input_blocks[0].weight.grad.any()  # as far as the first convolution, through the noisy latents
    assert unet.conv_out.weight.grad is None
    for _ in range(60):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    with torch.no_grad():
        own, other = loss(x).item(), loss(x.roll(1, 0)).item()
    assert own < 0.7 * other, (own, other)


def test_a_weight_that_would_push_away_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 is usual"):
        Alignment(tiny_model().unet, -1.0)
