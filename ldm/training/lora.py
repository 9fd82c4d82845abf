"""Low-rank adaptation (LoRA: Hu et al., 2106.09685): a frozen weight W becomes W + B A, and B and A alone are trained.

By torch's parametrisation of ``weight``: modules, their forward pass and their names stay what they are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.checkpoint import check_finite
from ldm.convert.names import DIFFUSERS, naming
from ldm.unet import UNet


class LowRank(nn.Module):
    """W → W + B A (eq. 3). B starts at zero, so that training starts from W. α/r of the paper is 1."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use, of the shape of W."""
        return weight + (self.b @ self.a).view(weight.shape)


def adapt(unet: UNet, rank: int, targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out")) -> None:
    """Freeze a UNet, and give the linear maps and convolutions whose last name is a target factors to train.

    Raises:
        ValueError: for a rank below 1, or a target that none is called.
    """
    found = [(name.rpartition(".")[2], m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = {name for name, _ in found}
    if not isinstance(rank, int) or rank < 1 or not targets or not names.issuperset(targets):
        rule = f"a whole rank of 1 or more, and targets of {', '.join(sorted(names))}"
        raise ValueError(f"lora.rank={rank}, lora.targets={list(targets)}: the rule is {rule}")
    unet.requires_grad_(False)
    for name, module in found:
        if name in targets:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def factors(unet: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """Name of a module with factors, the module, its factors."""
    for name, module in unet.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            yield name, module, module.parametrizations.weight[0]


def merged(unet: UNet) -> UNet:
    """A copy with B A added to its weights, which knows of no factors; the UNet itself where it has none."""
    made = {f"{name}.weight": module.weight for name, module, _ in factors(unet)}
    if not made:
        return unet
    state = {name: value for name, value in unet.state_dict().items() if ".parametrizations." not in name} | made
    with torch.device("meta"):  # torch's removal of a parametrisation would take it from all copies of the module
        whole = UNet(**unet.arguments)
    whole.load_state_dict({name: value.detach() for name, value in state.items()}, assign=True)
    return whole.requires_grad_(False)


def export_lora(unet: UNet, path: Path) -> None:
    """Write the factors as a file that diffusers' ``load_lora_weights`` takes: A is lora.down there, B lora.up."""
    theirs, tensors = naming(unet, DIFFUSERS), {}
    for name, module, low_rank in factors(unet):
        weight: Any = module.weight
        shape, place = weight.shape[1:], f"unet.{theirs(f'{name}.weight').removesuffix('.weight')}.lora"
        tensors[f"{place}.down.weight"] = low_rank.a.unflatten(1, shape)  # a convolution's A has its kernel's shape
        tensors[f"{place}.up.weight"] = low_rank.b.reshape(*low_rank.b.shape, *[1] * (len(shape) - 1))
    check_finite(tensors, str(path))
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(on_cpu, path.with_suffix(".partial"), {"format": "pt"})
    path.with_suffix(".partial").rename(path)
