"""Winograd's convolutions are convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.unet import UNet
from ldm.winograd import WinogradConv2d, accelerated, best_m, convolve, transform_weight


@torch.no_grad()
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (63, 32), (64, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution_at_any_size(m: int, size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, padding=1, bias=bias)
    x = torch.randn(3, 24, *size)
    exact = conv.double()(x.double())
    conv.float()
    error = (convolve(x, transform_weight(conv.weight, m), conv.bias, m) - exact).norm() / exact.norm()
    assert error < (1e-6 if m == 2 else 6e-6)  # float32's 6e-8 times what the transforms amplify: measured 4e-7, 3e-6


def test_m_falls_to_two_where_reading_the_weights_takes_longer() -> None:
    assert best_m(2, 320, 320, 64, 64) == best_m(1, 128, 128, 512, 512) == 4
    assert best_m(2, 1280, 1280, 8, 8) == best_m(2, 1280, 1280, 16, 16) == 2


@torch.no_grad()
def test_a_unet_gives_the_same_and_shares_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = UNet((128, 160), (False, True), 1, 4, 16).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    fast = accelerated(unet)
    replaced = [module for module in fast.modules() if isinstance(module, WinogradConv2d)]
    assert len(replaced) == 17  # not the first and last convolution, the 1 × 1 skips and the one of stride 2
    assert not any(isinstance(module, WinogradConv2d) for module in unet.modules())
    shared = {parameter.data_ptr() for parameter in unet.parameters()}
    assert {parameter.data_ptr() for parameter in fast.parameters()} == shared
    inputs = torch.randn(2, 4, 9, 12), torch.tensor([3.0, 700.0]), torch.randn(2, 77, 16)
    expected = unet(*inputs)
    assert torch.equal(fast(*inputs), expected)  # too small to be worth it
    monkeypatch.setattr("ldm.winograd.LEAST_FLOP", 0.0)
    assert 0.0 < (fast(*inputs) - expected).norm() / expected.norm() < 1e-5
