"""Seconds of a guidance step and of decoding at the size of SD 1.5, ours and diffusers', interleaved in one process.

    python -m tests.benchmarks.speed [32] [64] [decode] [picture] [overhead] [emoji]   # 30 minutes, 16 GB

Both have random weights of the same shapes: the time of a dense network does not hang on them.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ldm
from ldm.autoencoder import Autoencoder
from ldm.diffusion import Schedule
from ldm.evaluation.report import table
from ldm.pipeline import Defaults, LatentDiffusion
from ldm.prepack import prepack
from ldm.text import TextEncoder
from ldm.text.clip import clip_tokenizer
from ldm.unet import UNet
from ldm.winograd import accelerated
from tests.benchmarks.common import fill, gemm_peak, interleaved, machine, write

REPEATS = 5
PEER = "diffusers float32 (its default)"


def _empty(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = make()
    return fill(module.to_empty(device="cpu"))


def _peer_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def _peer_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
    )


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def flops(run: Callable[[], object]) -> float:
    """Floating-point operations of a call, as torch counts its products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def rows(variants: dict[str, Callable[[], object]], peaks: dict[str, float]) -> list[list[object]]:
    """Median seconds, ratio to diffusers' default, FLOP a second and its share of the peak, a row a variant."""
    seconds = interleaved(variants, REPEATS)
    work = flops(variants[PEER])
    result: list[list[object]] = []
    for name, each in seconds.items():
        peak = peaks["bfloat16" if "bfloat16" in name else "float32"]
        share = work / each / peak
        result.append([name, f"{each:.2f}", f"{seconds[PEER] / each:.2f}", f"{work / each / 1e9:.0f}", f"{share:.0%}"])
    return result


def steps(size: int, peaks: dict[str, float]) -> list[list[object]]:
    """A guidance step (two passes in a batch) at size × size latents."""
    z, t, context = torch.randn(2, 4, size, size), torch.tensor([500.0, 500.0]), torch.randn(2, 77, 768)
    z16, context16 = z.bfloat16(), context.bfloat16()
    ours, peer = _empty(UNet), _empty(_peer_unet)
    fast = accelerated(ours)
    ours16, peer16 = (copy.deepcopy(module).bfloat16() for module in (ours, peer))
    packed = prepack(copy.deepcopy(ours16))
    return rows(
        {
            PEER: lambda: peer(z, t, context),
            "diffusers bfloat16": lambda: peer16(z16, t, context16),
            "ours float32 (default)": lambda: ours(z, t, context),
            "ours float32_winograd": lambda: fast(z, t, context),
            "ours bfloat16": lambda: ours16(z16, t, context16),
            "ours precision=bfloat16": lambda: packed(z16, t, context16),
        },
        peaks,
    )


def decoding(peaks: dict[str, float]) -> list[list[object]]:
    """Decoding 64×64 latents to 512×512 pixels."""
    z = torch.randn(1, 4, 64, 64)
    ours, peer = _empty(Autoencoder), _empty(_peer_vae)
    ours.latent_std.fill_(1.0)
    ours.latent_mean.zero_()
    fast = accelerated(ours)
    ours16, peer16 = (copy.deepcopy(module).bfloat16() for module in (ours, peer))
    packed = prepack(copy.deepcopy(ours16))
    return rows(
        {
            PEER: lambda: peer.decode(z),
            "diffusers bfloat16": lambda: peer16.decode(z.bfloat16()),
            "ours float32 (default)": lambda: ours.decode(z),
            "ours float32_winograd": lambda: fast.decode(z),
            "ours bfloat16": lambda: ours16.decode(z.bfloat16()),
            "ours precision=bfloat16": lambda: packed.decode(z.bfloat16()),
        },
        peaks,
    )


def picture() -> list[list[object]]:
    """A prompt to a 256×256 PNG with guidance: 50 DDIM steps of diffusers' parts in float32, and ours at that error.

    docs/samplers.md: with guidance 7.5, ``sampler=auto`` has the error of DDIM with 50 from 12 evaluations on, in RMS
    (8.4e-2, 9.1e-2) and in the median (1.3e-2, 2.7e-2). With 8 it has so without guidance alone.
    """
    from diffusers import DDIMScheduler

    text = TextEncoder("clip", clip_tokenizer())
    unet, autoencoder = _empty(UNet), _empty(Autoencoder)
    autoencoder.set_latent_scale(torch.zeros(4), torch.ones(4))
    model = LatentDiffusion(unet, autoencoder, text.eval(), Schedule(), "epsilon", Defaults("trailing", 7.5, 256, 256))
    peer, vae = _empty(_peer_unet), _empty(_peer_vae)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    with TemporaryDirectory() as folder:

        def theirs() -> None:
            scheduler.set_timesteps(50)
            context, z = text(["", "a cat on a sofa"]), torch.randn(1, 4, 32, 32)
            for t in scheduler.timesteps:
                without, with_text = peer(torch.cat([z, z]), t, context).sample.chunk(2)
                z = scheduler.step(without + 7.5 * (with_text - without), t, z).prev_sample
            pixels = ((vae.decode(z / 0.18215).sample[0].nan_to_num() + 1.0) * 127.5).clamp(0, 255).byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(Path(folder) / "theirs.png")

        def run(steps: int) -> Callable[[], object]:
            return lambda: model.sample(
                "a cat on a sofa", steps=steps, sampler="auto", precision="auto"
            ).save(Path(folder))  # fmt: skip

        seconds = interleaved(
            {"diffusers' parts, 50 DDIM steps, float32": theirs, "sampler=auto precision=auto, 12 steps": run(12),
             "the same, 8 steps (equal error without guidance)": run(8)}, REPEATS)  # fmt: skip
    first = next(iter(seconds.values()))
    return [[name, f"{each:.1f}", f"{first / each:.1f}"] for name, each in seconds.items()]


def overhead() -> list[list[object]]:
    """Milliseconds a step that are not the UNet's: sampler, guidance and loop, around a UNet that does nothing."""
    model = ldm.load("emoji", device="cpu")
    model.unet.forward = lambda z, t, context: z  # type: ignore[method-assign]
    result: list[list[object]] = []
    for sampler in ("ddim", "dpmpp_2m", "unipc", "auto"):
        row: list[object] = [sampler]
        for size in (256, 512):
            times: list[float] = []

            def tick(first: int, i: int, x0: torch.Tensor, times: list[float] = times) -> None:
                times.append(time.perf_counter())

            model.sample("a", steps=50, sampler=sampler, height=size, width=size, callback=tick, tile=16)
            steps = sorted(b - a for a, b in itertools.pairwise(times))
            row.append(f"{1000 * steps[len(steps) // 2]:.2f}")
        result.append(row)
    return result


def emoji() -> list[list[object]]:
    """The bundled model, loaded: a prompt to a PNG on the disk."""
    model = ldm.load("emoji", device="cpu")
    with TemporaryDirectory() as folder:

        def run(**options: object) -> Callable[[], object]:
            return lambda: model.sample("a red apple, noto style", **options).save(Path(folder))  # type: ignore[arg-type]

        seconds = interleaved(
            {
                "50 DDIM steps (default)": run(),
                "50 DDIM steps, precision=auto": run(precision="auto"),
                "sampler=auto": run(sampler="auto"),
                "sampler=auto, precision=auto": run(sampler="auto", precision="auto"),
            },
            REPEATS,
        )
    return [[name, f"{each:.2f}"] for name, each in seconds.items()]


@torch.inference_mode()
def main(parts: list[str]) -> None:
    """Measure the parts that are named, all of them by default, and write their tables."""
    parts = parts or ["32", "64", "decode", "picture", "overhead", "emoji"]
    peaks = {name: gemm_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    where = f"{machine()}; matrix product of 2048²: float32 {peaks['float32'] / 1e9:.0f} GFLOP/s, bfloat16 " + (
        f"{peaks['bfloat16'] / 1e9:.0f}. Medians of {REPEATS}, interleaved."
    )
    heads = ["", "seconds", "× diffusers float32", "GFLOP/s", "of the peak"]
    for part in parts:
        if part == "overhead":
            content = table(["sampler", "ms a step, 32×32 latents", "ms a step, 64×64"], overhead())
        elif part == "picture":
            content = table(["256×256 pixels at equal ODE error", "seconds", "times as fast"], picture())
        elif part == "emoji":
            content = table(["bundled model, one picture", "seconds"], emoji())
        else:
            content = table(heads, decoding(peaks) if part == "decode" else steps(int(part), peaks))
        sys.stdout.write(f"{part}: {where}\n\n{content}\n")
        sys.stdout.flush()
        write("speed.md", part, [where, "", content])


if __name__ == "__main__":
    main(sys.argv[1:])
