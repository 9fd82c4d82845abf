"""LatentDiffusion: prompt → context → latents → image, the first line of the picture in a few visible calls."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import provenance, randomness
from ldm.autoencoder import Autoencoder
from ldm.autoencoder.autoencoder import DOWNSAMPLING
from ldm.checkpoint import Contents
from ldm.checkpoint import save as save_checkpoint
from ldm.diffusion import SAMPLERS, Prediction, Schedule, guided, make_grid, to_x0
from ldm.diffusion.prediction import check_prediction
from ldm.text import TextEncoder
from ldm.unet import UNet

Callback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Defaults:
    """What a model recommends where a caller is silent; kept in its checkpoint.

    Attributes:
        grid: the time grid that the weights came with.
        guidance_scale: of classifier-free guidance.
        height: pixels.
        width: pixels.
    """

    grid: str = "trailing"
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512


@dataclass(frozen=True)
class Samples:
    """Pictures, prompt-major: image i has the i-th seed.

    Attributes:
        images: float32 (n, 3, h, w) in [-1, 1].
        latents: what they were decoded from, scaled to unit variance, float32 (n, 4, h/8, w/8).
        seeds: one an image.
        prompts: one an image.
        truncated: whether an image's prompt was cut to 77 tokens, bool (n,).
        settings: everything else that made them.
    """

    images: Tensor
    latents: Tensor
    seeds: list[int]
    prompts: list[str]
    truncated: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL images, 8 bits."""
        pixels = ((self.images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]

    def grid(self, columns: int | None = None, gap: int = 4) -> Image.Image:
        """All pictures in one, row by row, on white."""
        images = self.pil()
        columns = columns or math.ceil(math.sqrt(len(images)))
        width, height = images[0].size
        rows = math.ceil(len(images) / columns)
        sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
        for i, image in enumerate(images):
            sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
        return sheet

    def capsule(self, i: int) -> dict[str, Any]:
        """What made image i: its prompt, seed and settings."""
        own = {"negative_prompt": self.settings["negative_prompts"][i]}
        rest = {name: value for name, value in self.settings.items() if name != "negative_prompts"}
        return {"prompt": self.prompts[i], **own, "seed": self.seeds[i], **rest}

    def save(self, folder: str | Path) -> list[Path]:
        """Write 00000.png, … and grid.png (of several), each whole or not at all; returns their paths.

        Each picture carries what made it in a text chunk.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        paths = [root / f"{i:05d}.png" for i in range(len(self.images))]
        for i, (path, image) in enumerate(zip(paths, self.pil(), strict=True)):
            provenance.write_png(path, image, self.capsule(i))
        if len(paths) > 1:
            paths.append(root / "grid.png")
            provenance.write_png(paths[-1], self.grid(), {"images": [self.capsule(i) for i in range(len(self.images))]})
        return paths


class LatentDiffusion:
    """A text-to-image model: its parts, and how to sample from them."""

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        schedule: Schedule,
        prediction: Prediction = "epsilon",  # what the UNet returns
        defaults: Defaults | None = None,
        null_context: Tensor | None = None,  # context of the empty prompt in training, (77, d); None computes it
        name: str = "",  # hash of the checkpoint, for provenance
    ) -> None:
        check_prediction(prediction)
        if unet.context_dim != text_encoder.width:
            raise ValueError(
                f"the UNet reads a context {unet.context_dim} wide, the text tower gives {text_encoder.width}; "
                "choose a unet and a text tower that fit"
            )
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.schedule, self.prediction, self.name = schedule, prediction, name
        self.defaults = Defaults() if defaults is None else defaults
        self.null_context = text_encoder([""])[0] if null_context is None else null_context

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusion:
        """Move all parts to a device, a type, or both; the schedule stays in float64 on the CPU."""
        for module in (self.unet, self.autoencoder, self.text_encoder):
            module.to(device=device, dtype=dtype)
        self.null_context = self.null_context.to(device=device, dtype=dtype)
        return self

    def context(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context of prompts (n, 77, d), and which were cut (n,). The empty prompt's is the one of training."""
        tokens = self.text_encoder.tokenize(prompts)
        context = self.text_encoder.encode(tokens)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=context.device)
        return torch.where(empty[:, None, None], self.null_context.to(context), context), tokens.truncated

    @torch.no_grad()
    def sample(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str = "ddim",
        seed: int | Sequence[int] | None = 0,
        height: int | None = None,
        width: int | None = None,
        *,
        latents: Tensor | None = None,
        grid: str | None = None,
        eta: float = 0.0,
        batch_size: int = 16,
        callback: Callback | None = None,
    ) -> Samples:
        """Pictures of prompts. Image i is a pure function of (seed + i, prompt, settings), whatever its neighbours.

        Args:
            prompt: one, or a list.
            negative_prompt: what to push away from: one for all, or one a prompt.
            num_images: pictures a prompt; those of the first prompt come first.
            steps: of the sampler, 1 to 1000.
            guidance_scale: s >= 0; 1 is no guidance; None takes what the model recommends.
            sampler: a key of :data:`ldm.diffusion.SAMPLERS`.
            seed: of the first image, the next has the next; a list gives one an image; None draws one.
            height: pixels, a multiple of 8; None takes the model's.
            width: likewise.
            latents: starting noise, shape (n, 4, height / 8, width / 8); it sets the size.
            grid: time grid, a key of :data:`ldm.diffusion.GRIDS`; None takes the one the weights came with.
            eta: DDIM's η >= 0; other samplers refuse it.
            batch_size: images at a time; changes speed and memory alone.
            callback: called as (images done before, step, estimate of the clean latents (b, 4, h, w)).

        Raises:
            ValueError: for anything invalid, and if the result is not finite.
        """
        prompts, negatives = self._prompts(prompt, negative_prompt, num_images)
        scale = self._scale(guidance_scale, negatives)
        run = _sampler(sampler, eta)
        times = make_grid(self.defaults.grid if grid is None else grid, steps, self.schedule)
        z, seeds = self._start(len(prompts), seed, height, width, latents)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: the rule is a whole number of at least 1")

        distinct = sorted({*prompts, *negatives})
        contexts, cut = self.context(distinct)
        row = {text: i for i, text in enumerate(distinct)}
        results = []
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            positive = contexts[[row[text] for text in prompts[part]]]
            negative = None if scale == 1.0 else contexts[[row[text] for text in negatives[part]]]
            predict = guided(self.unet, positive, negative, scale)

            def denoise(z: Tensor, i: int, predict: Any = predict, first: int = first) -> Tensor:
                t = torch.full((len(z),), times.times[i], device=z.device)
                prediction = predict(z.to(self.dtype), t).float()
                x0 = to_x0(self.prediction, prediction, z, times.alpha[i], times.sigma[i])
                if callback is not None:
                    callback(first, i, x0)
                return x0

            def noise(i: int, part: slice = part) -> Tensor:
                rows = [randomness.normal(s, "sampler", i, z.shape[1:]) for s in seeds[part]]
                return torch.stack(rows).to(self.device)

            results.append(run(denoise, z[part].to(self.device), times, noise).cpu())
        final = torch.cat(results)
        if not torch.isfinite(final).all():
            raise ValueError("the latents became NaN or infinite; check the weights, or take more steps")
        settings = {
            "negative_prompts": negatives,
            "steps": steps,
            "guidance_scale": scale,
            "sampler": sampler,
            "eta": eta,
            "grid": self.defaults.grid if grid is None else grid,
            "height": z.shape[2] * DOWNSAMPLING,
            "width": z.shape[3] * DOWNSAMPLING,
            "model": self.name,
            "precision": str(self.dtype).removeprefix("torch."),
        }
        if latents is not None:
            settings["latents"] = "given"
        truncated = cut[[row[text] for text in prompts]]
        return Samples(self._decode(final, batch_size), final, seeds, prompts, truncated, settings)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder that ``ldm.load`` opens."""
        save_checkpoint(path, self.contents())

    def contents(self) -> Contents:
        """What a checkpoint of this model keeps."""
        components = {"unet": self.unet, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        settings = {
            "prediction": self.prediction,
            "schedule": self.schedule.arguments,
            "grid": self.defaults.grid,
            "guidance_scale": self.defaults.guidance_scale,
            "height": self.defaults.height,
            "width": self.defaults.width,
        }
        return Contents(dict(components), tensors={"null_context": self.null_context}, settings=settings)

    def _decode(self, z: Tensor, batch_size: int) -> Tensor:
        parts = [self.autoencoder.decode(part.to(self.device, self.dtype)) for part in z.split(batch_size)]
        images = torch.cat([part.float().cpu() for part in parts])
        if not torch.isfinite(images).all():
            raise ValueError("the decoded images hold NaN or infinite values; check the autoencoder's weights")
        return images.clamp(-1.0, 1.0)

    def _prompts(
        self, prompt: str | Sequence[str], negative: str | Sequence[str], num_images: int
    ) -> tuple[list[str], list[str]]:
        """One prompt and one negative prompt an image."""
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images={num_images}: the rule is a whole number of at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("the list of prompts is empty; give at least one")
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one a prompt")
        for text in (*prompts, *negatives):
            if not isinstance(text, str):
                raise ValueError(f"a prompt must be text, got {type(text).__name__}: {text!r}")
        return [p for p in prompts for _ in range(num_images)], [p for p in negatives for _ in range(num_images)]

    def _scale(self, guidance_scale: float | None, negatives: Sequence[str]) -> float:
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.0 <= scale < math.inf:
            raise ValueError(
                f"guidance_scale={scale}: the rule is a finite number >= 0; 1 is no guidance, 7.5 is usual"
            )
        if scale == 1.0 and any(negatives):
            raise ValueError(
                "guidance_scale=1 makes one pass and would ignore the negative prompt; raise it, or drop the prompt"
            )
        return float(scale)

    def _start(
        self, n: int, seed: int | Sequence[int] | None, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """Starting noise (n, 4, h/8, w/8) on the CPU, and a seed an image."""
        if seed is None:
            seed = secrets.randbelow(2**31)
        if isinstance(seed, int) and not isinstance(seed, bool):
            seeds = [seed + i for i in range(n)]
        elif isinstance(seed, (list, tuple)):
            seeds = list(seed)
        else:
            raise ValueError(f"seed={seed!r}: the rule is a whole number, a list of one an image, or none")
        if len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} images; give one number, or one an image")
        for value in seeds:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"seed {value!r} is not a whole number")
        channels = self.autoencoder.latent_channels
        if latents is None:
            sizes = [
                self._size("height", height, self.defaults.height),
                self._size("width", width, self.defaults.width),
            ]
            shape = (channels, sizes[0] // DOWNSAMPLING, sizes[1] // DOWNSAMPLING)
            return torch.stack([randomness.normal(s, "latents", 0, shape) for s in seeds]), seeds
        if latents.ndim != 4 or latents.shape[0] != n or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: the rule is ({n}, {channels}, height / 8, width / 8)"
            )
        for name, given, side in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
            if given is not None and given != side * DOWNSAMPLING:
                raise ValueError(
                    f"{name}={given} contradicts the latents, whose {name} is {side * DOWNSAMPLING}; leave it out"
                )
        if not torch.isfinite(latents).all():
            raise ValueError("the starting latents hold NaN or infinite values")
        return latents.detach().float().cpu(), seeds

    @staticmethod
    def _size(name: str, value: int | None, default: int) -> int:
        size: Any = default if value is None else value
        if isinstance(size, bool) or not isinstance(size, int) or size < DOWNSAMPLING:
            raise ValueError(f"{name}={size}: the rule is a multiple of {DOWNSAMPLING}, at least {DOWNSAMPLING}")
        if size % DOWNSAMPLING:
            below = size // DOWNSAMPLING * DOWNSAMPLING
            raise ValueError(
                f"{name}={size} is not a multiple of {DOWNSAMPLING}; the nearest are {below} and {below + DOWNSAMPLING}"
            )
        return size


def _sampler(name: str, eta: float) -> Callable[..., Tensor]:
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta < math.inf:
        raise ValueError(f"eta={eta}: the rule is a finite number >= 0")
    if eta and name != "ddim":
        raise ValueError(f"eta={eta} is a setting of ddim, and sampler={name} would ignore it; leave it out")
    sampler = SAMPLERS[name]
    return partial(sampler, eta=eta) if name == "ddim" else sampler
