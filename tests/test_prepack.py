"""Prepacked layers are the layers; the folded upsampling is the upsampling; attention in blocks is attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.autoencoder import Autoencoder
from ldm.autoencoder.autoencoder import Upsample
from ldm.prepack import PackedConv2d, PackedFeedForward, PackedLinear, PackedUpsample, prepack
from ldm.unet import UNet, layers
from ldm.unet.attention import LONG, FeedForward, _fused, _in_blocks, _plain, attend


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("size", [(1, 3), (8, 8), (63, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_convolution_is_the_convolution(
    kernel: int, stride: int, padding: int, size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    size = tuple(max(side, kernel) for side in size)  # type: ignore[assignment]
    model = nn.Sequential(nn.Conv2d(32, 64, kernel, stride, padding, bias=bias)).bfloat16()
    x = torch.randn(2, 32, *size).bfloat16()
    expected = model(x)
    packed = prepack(model)
    assert isinstance(packed[0], PackedLinear if kernel == 1 else PackedConv2d)
    # The products are the same; the order of the sums may be another: one rounding of bfloat16's 8 bits.
    torch.testing.assert_close(packed(x), expected, rtol=2**-7, atol=2**-9)


def test_multiples_of_48_channels_whose_blocks_fit_one_size_alone_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(64, 192, 3), nn.Conv2d(192, 224, 3)).bfloat16()
    assert [type(layer) for layer in prepack(model)] == [nn.Conv2d, PackedConv2d]


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
    error = (PackedUpsample(layer)(x).double() - exact).norm() / exact.norm()
    assert error < 4e-3  # measured 2.4e-3: a bfloat16 of the result and one of the added weights, 2⁻⁹ each
    plain = (layer(x).double() - exact).norm() / exact.norm()
    assert error < 2.0 * plain


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 24), (15, 24), (15, 23)])
def test_folded_upsampling_comes_to_an_odd_size_too(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = layers.Upsample(32).bfloat16(), torch.randn(2, 32, 8, 12).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double(), size)
    result = PackedUpsample(layer)(x, torch.Size(size)).double()
    assert (result - exact).norm() < 4e-3 * exact.norm()  # as above; zeros in the wrong border would be 0.1


@torch.no_grad()
def test_a_packed_feed_forward_is_no_further_from_the_exact_one_than_the_plain_one() -> None:
    torch.manual_seed(0)
    layer, x = FeedForward(64).bfloat16(), torch.randn(2, 50, 64).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    own, plain = ((y.double() - exact).norm() / exact.norm() for y in (PackedFeedForward(layer)(x), layer(x)))
    assert own < 1.05 * plain < 1e-2  # it rounds once less: the gate, before gelu


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
    kinds = {type(layer) for layer in packed.modules()}
    assert {PackedConv2d, PackedLinear, PackedFeedForward, PackedUpsample} <= kinds

    autoencoder, z = Autoencoder((32, 64), num_blocks=1, stem=4).eval(), torch.randn(1, 4, 4, 4)
    autoencoder.set_latent_scale(torch.zeros(4), torch.ones(4))
    exact = autoencoder.decode(z)
    plain = autoencoder.bfloat16().decode(z.bfloat16()).float()
    result = prepack(autoencoder).decode(z.bfloat16()).float()
    own, other = ((y - exact).norm() / exact.norm() for y in (result, plain))
    assert own < 1.5 * other < 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    ("n", "heads", "queries", "keys", "width"),
    [(2, 3, 700, 800, 40), (1, 1, 4096, 4096, 8), (1, 2, LONG, LONG + 33, 40), (1, 1, LONG + 1, LONG, 80)],
)
def test_attention_in_blocks_is_attention(n: int, heads: int, queries: int, keys: int, width: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, length, width).bfloat16() for length in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = (_in_blocks(q, k, v).double() - exact).norm() / exact.norm()
    assert error < 1e-2  # weights, scores and result in bfloat16; measured 5e-3


def _long(scale: float = 1.0) -> list[torch.Tensor]:
    """q, k, v of one head, (LONG, 40); the scores have the standard deviation ``scale``."""
    torch.manual_seed(0)
    return [torch.randn(LONG, 40).mul(size).bfloat16() for size in (scale, 1.0, 1.0)]


def _errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """Relative distance from float64 attention: of the exponentials in the product, and of the plain softmax."""
    exact = F.scaled_dot_product_attention(q.double()[None], k.double()[None], v.double()[None])[0]
    fused, plain = _fused(q, k, v), _plain(q, k, v)
    assert fused is not None
    return tuple(float((y.double() - exact).norm() / exact.norm()) for y in (fused, plain))  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0, 8.0])
def test_exponentials_in_the_product_are_as_exact_as_softmax(scale: float) -> None:
    own, plain = _errors(*_long(scale))
    assert own < max(plain, 4e-3)  # the sum, too, is rounded to bfloat16 (2⁻⁹), but the scores are not


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_exponentials_in_the_product_do_not_lose_small_or_large_values(size: float) -> None:
    q, k, v = _long()
    assert _errors(q, k, v * size)[0] < 5e-3  # as at size 1: the products stay normal numbers


@torch.no_grad()
@pytest.mark.parametrize("common", [-30.0, 30.0])
def test_what_all_keys_have_in_common_changes_nothing(common: float) -> None:
    q, k, v = _long()
    q = q + 1.0  # q · common: scores of about ±190, where bfloat16 has steps of 1
    own, plain = _errors(q, k + common, v)
    assert own < 1e-2 < plain


@torch.no_grad()
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, float("inf"), float("nan")])
def test_scores_too_large_for_exponentials_take_the_plain_way(size: float) -> None:
    q, k, v = _long()
    for part in (slice(None), slice(LONG - 1, None)):  # all queries, or the very last one
        large = q.clone()
        large[part] *= size
        assert _fused(large, k, v) is None
    expected = _plain(q * size, k, v)
    torch.testing.assert_close(
        _in_blocks(*(y[None, None] for y in (q * size, k, v)))[0, 0], expected, rtol=0, atol=2**-6, equal_nan=True
    )  # the order of the sums may be another
    assert expected.isfinite().all() == math.isfinite(size)  # large is not infinite, and NaN stays NaN


@torch.no_grad()
@pytest.mark.parametrize("queries", [(1e4, -1e4), (60.0, 80.0), (75.0, 200.0)])
def test_one_key_against_all_others_gives_finite_weights(queries: tuple[float, float]) -> None:
    q, k, v = (torch.zeros(LONG, 40, dtype=torch.bfloat16) for _ in range(3))
    q[:, 0], k[5, 0], v[5], v[6] = 40**0.5, 1.0, 1.0, -1.0
    q[0, 0], q[1, 0] = queries[0] * 40**0.5, queries[1] * 40**0.5
    y = _in_blocks(*(part[None, None] for part in (q, k, v)))[0, 0]
    exact = F.scaled_dot_product_attention(q.double()[None], k.double()[None], v.double()[None])[0]
    torch.testing.assert_close(y.double(), exact, rtol=2**-6, atol=1e-6)  # three roundings


@torch.no_grad()
def test_a_head_does_not_see_which_others_are_in_its_batch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, LONG, 40).bfloat16() for _ in range(3))
    q[0, 1] *= 1000.0
    alone = torch.cat([_in_blocks(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(3)], dim=1)
    assert torch.equal(_in_blocks(q, k, v), alone)


def test_attention_over_many_places_keeps_the_gradients_of_keys_alone() -> None:
    q, k, v = (y[None, None] for y in _long())
    attend(q, k.requires_grad_(), v).float().square().sum().backward()
    assert k.grad is not None
    assert k.grad.any()
