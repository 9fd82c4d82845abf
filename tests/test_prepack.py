"""Prepacked layers are the layers; the folded upsampling is the upsampling."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.autoencoder.autoencoder import Upsample
from ldm.prepack import PackedConv2d, PackedLinear, PackedUpsample, prepack
from ldm.unet import UNet
from ldm.unet.attention import _in_blocks


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("size", [(1, 3), (8, 8), (63, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_convolution_is_the_convolution(
    kernel: int, stride: int, padding: int, size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    size = tuple(max(side, kernel) for side in size)  # type: ignore[assignment]
    model = nn.Sequential(nn.Conv2d(32, 48, kernel, stride, padding, bias=bias)).bfloat16()
    x = torch.randn(2, 32, *size).bfloat16()
    expected = model(x)
    packed = prepack(model)
    assert isinstance(packed[0], PackedLinear if kernel == 1 else PackedConv2d)
    # The products are the same; the order of the sums may be another: one rounding of bfloat16's 8 bits.
    torch.testing.assert_close(packed(x), expected, rtol=2**-7, atol=2**-9)


@torch.no_grad()
def test_a_packed_linear_map_is_the_linear_map() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8, bias=False)).bfloat16(), torch.randn(2, 5, 40)
    expected = model(x.bfloat16())
    torch.testing.assert_close(prepack(model)(x.bfloat16()), expected, rtol=2**-6, atol=2**-8)  # two roundings


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7)])
def test_upsampling_folded_into_its_convolution_is_the_same_function(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(32).bfloat16(), torch.randn(2, 32, *size).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    error = (PackedUpsample(layer.conv)(x).double() - exact).norm() / exact.norm()
    assert error < 4e-3  # measured 2.4e-3: a bfloat16 of the result and one of the added weights, 2⁻⁹ each
    plain = (layer(x).double() - exact).norm() / exact.norm()
    assert error < 2.0 * plain


@torch.no_grad()
def test_models_keep_their_results_and_lose_their_plain_weights() -> None:
    torch.manual_seed(0)
    unet = UNet((32, 64), (False, True), 1, 2, 16).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    inputs = torch.randn(2, 4, 9, 12), torch.tensor([3.0, 700.0]), torch.randn(2, 77, 16)
    exact, half = unet(*inputs), unet.bfloat16()
    plain = half(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()).float()
    packed = prepack(half)
    result = packed(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()).float()
    own, other = ((y - exact).norm() / exact.norm() for y in (result, plain))
    assert own < 1.5 * other < 0.05  # no further from float32 than bfloat16 is
    assert not any(isinstance(layer, nn.Conv2d | nn.Linear) for layer in packed.modules())

    autoencoder, z = Autoencoder((32, 64), num_blocks=1, stem=4).eval(), torch.randn(1, 4, 4, 4)
    autoencoder.set_latent_scale(torch.zeros(4), torch.ones(4))
    exact = autoencoder.decode(z)
    plain = autoencoder.bfloat16().decode(z.bfloat16()).float()
    result = prepack(autoencoder, Upsample).decode(z.bfloat16()).float()
    own, other = ((y - exact).norm() / exact.norm() for y in (result, plain))
    assert own < 1.5 * other < 0.05


@torch.no_grad()
@pytest.mark.parametrize(("n", "heads", "queries", "keys", "width"), [(2, 3, 700, 800, 40), (1, 1, 4096, 4096, 8)])
def test_attention_in_blocks_is_attention(n: int, heads: int, queries: int, keys: int, width: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, length, width).bfloat16() for length in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = (_in_blocks(q, k, v).double() - exact).norm() / exact.norm()
    assert error < 1e-2  # weights, scores and result in bfloat16; measured 5e-3
