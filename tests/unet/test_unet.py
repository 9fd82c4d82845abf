from __future__ import annotations

import math

import pytest
import torch

from ldm.unet import UNet, attention
from ldm.unet.attention import PLAIN_LIMIT, Transformer, attend
from ldm.unet.layers import timestep_embedding


def tiny() -> UNet:
    torch.manual_seed(0)
    unet = UNet(widths=(32, 32, 64, 64), context_dim=16, num_heads=2)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    return unet.eval()


def test_sd15_unet_has_exactly_859520964_parameters_in_27_blocks() -> None:
    with torch.device("meta"):
        unet = UNet()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert (len(unet.input_blocks), len(unet.middle_blocks), len(unet.output_blocks)) == (12, 3, 12)


def test_sd15_attends_to_the_text_at_8_16_32_and_in_the_middle_64_times_below_the_pixels() -> None:
    unet, seen = tiny(), set()
    for module in unet.modules():
        if isinstance(module, Transformer):
            module.register_forward_hook(lambda _, inputs, __: seen.add(512 // inputs[0].shape[-1]))
    unet(torch.randn(1, 4, 64, 64), torch.tensor([10.0]), torch.randn(1, 77, 16))
    assert seen == {8, 16, 32, 64}


@pytest.mark.parametrize("size", [(8, 8), (63, 63), (9, 17), (5, 6)])
def test_any_size_of_latents_comes_back(size: tuple[int, int]) -> None:
    z = torch.randn(1, 4, *size)
    assert tiny()(z, torch.tensor([5.0]), torch.randn(1, 77, 16)).shape == z.shape


def test_prediction_depends_on_latents_time_and_text() -> None:
    unet = tiny()
    for module in unet.modules():  # open what starts at zero
        if isinstance(module, Transformer):
            torch.nn.init.normal_(module.proj_out.weight, std=0.1)
    for block in unet.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 77, 16)
    base = unet(z, t, context)
    for other in (unet(z + 0.1, t, context), unet(z, t + 0.5, context), unet(z, t, context + 0.1)):
        assert (other - base).abs().max() > 1e-4


def test_a_fresh_unet_predicts_zero() -> None:
    unet = UNet(widths=(32, 32), attention=(True, True), context_dim=16, num_heads=2)
    assert not unet(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 77, 16)).any()


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequency() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 3.5]), 8)
    assert embedding[0].tolist() == [1.0] * 4 + [0.0] * 4
    assert embedding[1, 1].item() == pytest.approx(math.cos(3.5 * 10_000 ** (-1 / 4)), abs=1e-6)
    assert embedding[1, 4].item() == pytest.approx(math.sin(3.5), abs=1e-6)


def test_plain_attention_equals_the_fused_kernel() -> None:
    q, k, v = torch.randn(3, 2, 4, 64, 16).unbind(0)
    assert q.shape[-2] * k.shape[-2] <= PLAIN_LIMIT
    torch.testing.assert_close(
        attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("limit", [PLAIN_LIMIT, 0])
def test_keys_and_values_of_zero_are_counted_not_multiplied(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PLAIN_LIMIT", limit)
    q, k, v = torch.randn(3, 2, 4, 20, 16).unbind(0)
    whole = [torch.nn.functional.pad(y, (0, 0, 0, 57)) for y in (k, v)]
    real = torch.nn.functional.scaled_dot_product_attention(q, *whole)
    torch.testing.assert_close(attend(q, k, v, padding=57), real, rtol=1e-5, atol=1e-6)
    assert (attend(q, k, v) - real).abs().max() > 0.05  # without their number it is another function


@pytest.mark.parametrize("length", [0, 1, 9, 77])
def test_text_padded_by_zeros_is_cut_and_gives_the_same_output_and_gradients(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, z, t = tiny().train(), torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0])
    for name, parameter in net.named_parameters():  # projections that begin at zero would hide the text
        torch.nn.init.normal_(parameter, std=0.1) if "proj_out" in name else None
    context = torch.randn(2, 77, 16)
    context[:, length:] = 0.0
    context[0, length // 2 :] = 0.0  # the shorter of the two
    cut, padding = attention.without_padding(context)
    assert (cut.shape[1], padding) == (max(1, length), 77 - max(1, length))
    outputs, gradients = [], []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("ldm.unet.unet.without_padding", lambda context: (context, 0))
        net.zero_grad()
        outputs.append(net(z, t, context))
        outputs[-1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_a_picture_does_not_hang_on_the_length_of_the_other_prompts_of_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ldm.unet.unet.without_padding", lambda context: pytest.fail("cut in sampling"))
    tiny()(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.zeros(2, 77, 16))


def test_text_that_gradients_are_wanted_of_and_text_elsewhere_is_left_whole() -> None:
    context = torch.zeros(2, 77, 16)
    assert attention.without_padding(context.clone().requires_grad_())[1] == 0
    assert attention.without_padding(context.to("meta"))[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_in_parts_attends_as_a_whole_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, g = (y.to(dtype).requires_grad_() for y in torch.randn(4, 5, 4, 64, 32))
    whole = attend(q, k, v)
    calls, plain = [], attention._plain
    monkeypatch.setattr(attention, "_plain", lambda *y: calls.append(len(y[0])) or plain(*y))
    monkeypatch.setattr(attention, "TOGETHER", 2 * 4 * 64 * 64)
    parts = attend(q, k, v)
    assert calls == [2, 2, 1]
    assert torch.equal(parts, whole)
    both = (torch.autograd.grad(y, (q, k, v), g) for y in (parts, whole))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 77, 16)
    gradients = []
    for checkpointing in (False, True):
        unet = tiny().train()
        unet.gradient_checkpointing = checkpointing
        unet(z, t, context).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):  # sums over skips may be taken in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (32, 40)}, "multiple of 32"),
        ({"widths": (32, 32), "attention": (True,)}, "one a level"),
        ({"widths": (32, 32), "num_heads": 5}, "does not divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{"attention": (True, True), "context_dim": 16, "num_heads": 2, **settings})


def pooling() -> UNet:
    torch.manual_seed(0)
    # Two channels a group: normalised alone, a channel would lose what an embedding adds to it.
    unet = UNet(widths=(64, 64), attention=(False, False), num_blocks=1, num_heads=2, context_dim=16, pooled_text=True)
    for name, parameter in unet.named_parameters():  # open what starts at zero, but for attention
        torch.nn.init.normal_(parameter, std=0.1) if "conv" in name else None
    return unet


def test_pooled_text_reaches_levels_without_attention() -> None:
    unet, z, t = pooling(), torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    context = torch.randn(2, 77, 16)
    base, other = unet(z, t, context), unet(z, t, context.roll(1, dims=0))
    assert (base - other).abs().max() > 1e-3
    unet.text_embedding = None  # the transformer of the middle starts at zero: no other way is open
    assert torch.equal(unet(z, t, context), unet(z, t, context.roll(1, dims=0)))


def test_pooled_text_does_not_hear_padding() -> None:
    unet, z, t, context = pooling(), torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 16)
    padded = torch.nn.functional.pad(context, (0, 0, 0, 72))
    torch.testing.assert_close(unet(z, t, padded), unet(z, t, context))
    torch.testing.assert_close(unet(z, t, context.mean(1, keepdim=True)), unet(z, t, context))
    assert unet(z, t, torch.zeros(2, 77, 16)).isfinite().all()


def test_pooled_text_changes_nothing_where_it_is_off() -> None:
    assert not any("text_embedding" in name for name in tiny().state_dict())
    assert not tiny().arguments["pooled_text"]
