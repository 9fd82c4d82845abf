"""``ldm plan``: work, memory, time and cost of a training before it is begun (docs/scale.md)."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder import Autoencoder
from ldm.training.ema import EMA
from ldm.training.speed import Layout
from ldm.unet import UNet
from ldm.unet.unet import Block

STATE = {"weights": 4, "gradients": 4, "Adam": 8, "average": 4}  # bytes a parameter, all in float32
TOWERS = {384: 22_565_376, 768: 123_060_480}  # parameters of MiniLM and of CLIP ViT-L/14, by width
BATCHES = (4, 16)  # of the probe, ten steps each
# FLOP/s of a device in published trainings, by pixels: mosaicml/diffusion's 137 images/s an A100 at 256² and 36 at 512²
# with SD's UNet, forward and backward; micro_diffusion's 380 an H100, of another network, over those 137.
PUBLISHED = {"a100": {256: 74e12, 512: 87e12}, "h100": {256: 205e12, 512: 241e12}}


@dataclass(frozen=True)
class Device:
    """How fast a device is, and what it adds to the memory."""

    source: str  # of the figures
    rate: float  # FLOP a second
    parameter: float = 0.0  # seconds that the optimiser takes for each parameter
    kept: float = 0.6  # bytes of activations for one that autograd saves in float32: half in bfloat16, and scratch
    base: float = 1e9  # bytes of the program itself


@dataclass(frozen=True)
class Training:
    """What is to be trained."""

    network: nn.Module  # UNet or Autoencoder, on the device "meta"
    frozen: int  # parameters beside it
    encode: float  # FLOP an image of frozen parts in every step; 0 from a cache
    size: tuple[int, int]  # height and width in pixels
    batch: int  # of an optimiser step, over all devices
    devices: int
    accumulation: int = 1
    sharded: bool = False  # FSDP

    def on(self, device: Device) -> tuple[float, dict[str, float], float]:
        """FLOP an image, bytes a device by part in a step, seconds of a step; devices add up without loss."""
        flops, saved = footprint(self.network, *self.size)
        parameters = sum(p.numel() for p in self.network.parameters())
        own, each = parameters / (self.devices if self.sharded else 1), self.batch / self.devices
        memory = {part: size * own for part, size in STATE.items()}
        memory["activations"] = device.kept * saved * each / self.accumulation
        memory |= {"frozen parts": 4.0 * self.frozen, "program": device.base}
        return flops, memory, (flops + self.encode) * each / device.rate + own * device.parameter


def loss(network: nn.Module, n: int, height: int, width: int, device: str | torch.device) -> Tensor:
    """A scalar to differentiate, from n made-up images."""
    if isinstance(network, UNet):
        z = torch.randn(n, network.in_channels, height // 8, width // 8, device=device)
        out = network(z, torch.full((n,), 500.0, device=device), torch.randn(n, 77, network.context_dim, device=device))
    else:
        assert isinstance(network, Autoencoder)
        out = network.decode_raw(network.posterior(torch.randn(n, 3, height, width, device=device)).mean)
    return out.float().square().mean()


def flops(run: Callable[[], object]) -> float:
    """Floating-point operations of a call, as torch counts its products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def footprint(network: nn.Module, height: int, width: int) -> tuple[float, float]:
    """FLOP of one image forward and backward, and bytes autograd saves for it in float32, of a network on "meta"."""
    weights, saved = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def note(value: Tensor) -> Tensor:
        if value.untyped_storage()._cdata not in weights:
            saved[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return value

    for block in network.modules() if isinstance(network, UNet) and network.gradient_checkpointing else ():
        if isinstance(block, Block):  # its inputs are kept, where no hook sees it; what it computes twice is left out
            block.register_forward_pre_hook(lambda module, inputs: (note(inputs[0]), None)[1])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        work = flops(lambda: loss(network.train(), 1, height, width, "meta").backward())
    return work, float(sum(saved.values()))


def probe(stage: str, precision: str, layout: Layout, device: torch.device) -> Device:
    """Twenty steps of the emoji UNet or autoencoder here: seconds = FLOP · n / rate + parameters · each."""

    def make() -> nn.Module:
        if stage == "autoencoder":
            return Autoencoder((96, 192), 1, stem=4)
        return UNet((64, 128, 256), (False, True, True), 1, (2, 4, 8), context_dim=384)

    with torch.device("meta"):
        work, saved = footprint(make(), 128, 128)
    times, peaks = [], []
    network = make().to(device, memory_format=torch.channels_last if layout.channels_last else None)  # type: ignore[call-overload]
    adam, ema = torch.optim.AdamW(network.parameters(), fused=True), EMA(network)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    for n in BATCHES:
        seconds = []
        for step in range(1, 11):
            start = time.perf_counter()
            with torch.autocast(device.type, half, enabled=half is not None):
                value = loss(network, n, 128, 128, device)
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
            adam.step()
            adam.zero_grad()
            ema.update(step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        times.append(statistics.median(seconds[2:]))
        peaks.append(_peak(device))
    count = sum(p.numel() for p in network.parameters())
    each = (times[1] - times[0]) / (BATCHES[1] - BATCHES[0])
    # By the difference: what does not grow with the batch, as half-precision copies of weights, is of the program.
    kept = max((peaks[1] - peaks[0]) / ((BATCHES[1] - BATCHES[0]) * saved), 0.1)
    base = max(peaks[0] - sum(STATE.values()) * count - kept * BATCHES[0] * saved, 0.0)
    left = max(0.0, times[0] - BATCHES[0] * each) / count
    return Device("by a probe of 20 steps here", work / each, left, kept, base)


def _peak(device: torch.device) -> float:
    """Bytes: the most so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def published(name: str, height: int, width: int) -> Device:
    """A device of :data:`PUBLISHED`, at the size in it that is nearest (ValueError for one that is not there)."""
    if name not in PUBLISHED:
        raise ValueError(f"on={name} is unknown; choose one of here, {', '.join(PUBLISHED)}")
    near = min(PUBLISHED[name], key=lambda side: abs(side**2 - height * width))
    return Device(f"{name}, by published trainings at {near}²", PUBLISHED[name][near])
