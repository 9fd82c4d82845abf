"""Tiled decoding: where tiles meet they agree, and the whole differs from decoding in one piece by statistics alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ldm
from ldm.autoencoder import Autoencoder, tiling
from ldm.data import FixedSet, emoji_dataset


def _autoencoder(norm: bool = True) -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(widths=(32, 32, 64, 64), num_blocks=2).eval()
    if not norm:  # without group norms nothing reaches further than the margin
        for module in autoencoder.decoder.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
    return autoencoder


@torch.no_grad()
def test_the_margin_is_as_wide_as_the_growing_part_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = _autoencoder(norm=False).double()
    z = torch.randn(1, 4, 40, 33, generator=torch.Generator().manual_seed(0)).double()
    whole = autoencoder.decode(z)
    assert tiling.MARGIN == 8
    error = {}
    for margin in (8, 7, 5):
        monkeypatch.setattr(tiling, "MARGIN", margin)
        error[margin] = (autoencoder.decode(z, tile=16) - whole).abs().max().item()
    # 6.25 latents: 7 suffice to the last bits, and the check itself sees 5 (measured 6e-11 of 5).
    assert error[8] <= 1e-14
    assert error[7] <= 1e-14
    assert error[5] > 1e-12


@torch.no_grad()
def test_tiles_of_real_pictures_leave_no_seams() -> None:
    """Sixteen emoji side by side, the hard case: each tile has statistics of its own."""
    pictures = FixedSet(emoji_dataset("emoji200"), 128, 128)
    rows = [torch.cat([pictures[4 * i + j]["image"] for j in range(4)], dim=2) for i in range(4)]
    autoencoder = ldm.load_autoencoder("emoji")
    z = autoencoder.encode(torch.cat(rows, dim=1)[None])  # (1, 4, 64, 64)
    error = autoencoder.decode(z, tile=32) - autoencoder.decode(z)
    assert error.abs().max() < 0.06  # of [-1, 1]; measured 0.043, and 0.0024 on average
    assert error.abs().mean() < 0.004
    jump = error.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # of the error, between neighbouring columns
    assert jump[255] < 2 * jump.mean()  # where the tiles meet


@torch.no_grad()
def test_one_tile_is_the_whole() -> None:
    autoencoder = _autoencoder()
    z = torch.randn(2, 4, 20, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoencoder.decode(z, tile=20), autoencoder.decode(z))


def test_a_tile_narrower_than_its_margins_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 latents"):
        _autoencoder().decode(torch.zeros(1, 4, 64, 64), tile=8)


@torch.no_grad()
def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = _autoencoder()
    z = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.decode(z)
    monkeypatch.setattr("ldm.autoencoder.autoencoder.QUERIES", 50)
    torch.testing.assert_close(autoencoder.decode(z), whole, rtol=1e-5, atol=1e-5)
