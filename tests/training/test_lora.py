from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch.nn.utils import parametrize

import ldm
from ldm.training.lora import adapt, export_lora, factors, merged
from ldm.unet import UNet
from tests.conftest import tiny_model
from tests.test_convert import pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out")
# Among them a linear map, 1×1 and 3×3 convolutions.
MANY = (*TARGETS, "proj_in", "proj_out", "conv1", "embedding")


def adapted(unet: UNet, rank: int = 4, targets: tuple[str, ...] = TARGETS, seed: int = 0) -> UNet:
    """The UNet with factors that do something."""
    torch.manual_seed(seed)
    adapt(unet, rank, targets)
    for _, _, low_rank in factors(unet):
        torch.nn.init.normal_(low_rank.b, std=0.05)
    return unet


def inputs(unet: UNet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, unet.in_channels, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 77, unet.context_dim)


def test_a_fresh_adaptation_changes_nothing_and_its_factors_alone_are_trained() -> None:
    unet = tiny_model().unet
    z = inputs(unet)
    before = unet(*z)
    adapt(unet, 4)
    assert torch.equal(unet(*z), before)
    names = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in unet.named_parameters() if n.endswith((".weight.0.a", ".weight.0.b"))}
    # Attention of two kinds at one level of three blocks and in the middle: four projections of two factors each.
    assert len(names) == 4 * 2 * 4 * 2
    unet(*z).square().mean().backward()
    assert all(low_rank.b.grad is not None and low_rank.b.grad.any() for _, _, low_rank in factors(unet))


def test_without_factors_the_merged_unet_is_itself() -> None:
    unet = tiny_model().unet
    assert merged(unet) is unet


@pytest.mark.parametrize("targets", [TARGETS, MANY], ids=["attention", "many"])
def test_merged_weights_are_w_plus_ba_and_draw_the_same(targets: tuple[str, ...]) -> None:
    plain = tiny_model().unet
    unet = adapted(copy.deepcopy(plain), targets=targets)
    whole = merged(unet)
    assert type(whole) is UNet
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert any(parametrize.is_parametrized(m) for m in unet.modules())  # it was a copy
    changed = 0
    for name, module, low_rank in factors(unet):
        old, new = plain.get_submodule(name).weight, whole.get_submodule(name).weight
        delta = (new - old).flatten(1)
        torch.testing.assert_close(delta, low_rank.b @ low_rank.a, rtol=0, atol=1e-6)  # roundings of W + BA
        assert torch.linalg.matrix_rank(delta.double(), rtol=1e-3) == 4
        assert new.shape == module.weight.shape
        changed += 1
    assert changed == sum(not torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (plain, whole)),
                                                               strict=True))  # fmt: skip
    torch.testing.assert_close(whole(*inputs(plain)), unet(*inputs(plain)), rtol=0, atol=1e-5)


def test_a_rank_or_target_that_means_nothing_is_refused() -> None:
    for rank, targets in ((0, TARGETS), (2.5, TARGETS), (4, ["to_q", "to_w"]), (4, [])):
        with pytest.raises(ValueError, match=r"the rule is a whole rank of 1 or more, and targets of .*to_q, to_v"):
            adapt(tiny_model().unet, rank, targets)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet]:
    """The file of a LoRA over a small Stable Diffusion, and its UNet."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline("sd1").save_pretrained(folder / "model")
    unet = adapted(ldm.load(folder / "model", device="cpu").unet, targets=MANY)
    export_lora(unet, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors", unet


def test_the_file_of_a_lora_has_the_names_and_shapes_of_diffusers_and_does_there_what_it_does_here(
    exported: tuple[Path, UNet],
) -> None:
    path, unet = exported
    found, alphas = StableDiffusionPipeline.lora_state_dict(path.parent, weight_name=path.name)
    assert not alphas
    assert len(found) == 2 * len(list(factors(unet)))
    assert all(name.startswith("unet.") for name in found)
    theirs = copy.deepcopy(pipeline("sd1").unet)
    table = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in found.items()})
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in table)
    for name in {name.rpartition(".lora_")[0] for name in table}:
        weight, a, b = theirs.get_submodule(name).weight, table[f"{name}.lora_A.weight"], table[f"{name}.lora_B.weight"]
        assert a.shape[1:] == weight.shape[1:]
        assert b.shape == (weight.shape[0], a.shape[0], *[1] * (weight.ndim - 2))
        with torch.no_grad():
            weight += (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    z, t, context = inputs(unet)
    expected = theirs(z, t, context).sample
    # Products in another order, as between the plain UNets (tests/test_convert.py).
    torch.testing.assert_close(unet(z, t, context), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_diffusers_loads_the_file_of_a_lora(exported: tuple[Path, UNet]) -> None:
    path, unet = exported
    theirs = copy.deepcopy(pipeline("sd1"))
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    z, t, context = inputs(unet)
    expected = theirs.unet(z, t, context).sample
    torch.testing.assert_close(unet(z, t, context), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
