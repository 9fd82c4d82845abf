"""LatentDiffusion: prompt → context → latents → image, the first line of the picture in a few visible calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import randomness, request
from ldm.autoencoder import Autoencoder
from ldm.autoencoder.autoencoder import DOWNSAMPLING
from ldm.checkpoint import Contents
from ldm.checkpoint import save as save_checkpoint
from ldm.diffusion import Flow, Grid, NoisePath, Prediction, evaluations, guided, make_grid, to_x0
from ldm.diffusion.prediction import check_prediction
from ldm.precision import PRECISIONS, choose
from ldm.prepack import prepack
from ldm.request import Picture
from ldm.safety import Checker, blur_flagged, make_checker
from ldm.samples import Samples
from ldm.text import TextEncoder
from ldm.unet import UNet
from ldm.winograd import accelerated

Callback = Callable[[int, int, Tensor], None]
# resize="refine": the timestep whose noise is added at the target size. More lets a model that knows one size alone
# begin to draw several pictures again.
REFINE_FROM = 20.0


@dataclass(frozen=True)
class Defaults:
    """What a model recommends where a caller is silent; kept in its checkpoint."""

    grid: str = "trailing"  # the time grid that the weights came with
    guidance_scale: float = 7.5  # of classifier-free guidance
    height: int = 512  # pixels
    width: int = 512  # pixels


@dataclass(frozen=True)
class _Job:
    """What all trajectories of a call share."""

    contexts: Tensor  # of the distinct texts, (k, 77, d)
    positive: list[int]  # row of each image's prompt
    negative: list[int] | None  # row of each image's negative prompt; None where s = 1
    seeds: list[int]  # one an image
    scale: float  # s of guidance
    interval: tuple[float, float]  # timesteps between which it acts
    rescale: float  # its φ
    sampler: Callable[..., Tensor]
    batch_size: int
    callback: Callback | None


@dataclass(frozen=True)
class _Edit:
    """What an initial image gives, one row an image of the call."""

    z: Tensor  # its latents, (n, 4, h, w)
    mask: Tensor | None = None  # 1 where to paint anew, in latents, (n, 1, h, w); None paints everything
    channels: Tensor | None = None  # what an inpainting UNet reads beside the noisy latents, (n, 5, h, w)


class LatentDiffusion:
    """A text-to-image model: its parts, and how to sample from them."""

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        schedule: NoisePath,
        prediction: Prediction = "epsilon",  # what the UNet returns
        defaults: Defaults | None = None,
        null_context: Tensor | None = None,  # context of the empty prompt in training, (77, d); None computes it
        name: str = "",  # hash of the checkpoint, for provenance
        offload: bool = False,  # text tower and autoencoder wait on the CPU while they are idle: less GPU memory
    ) -> None:
        check_prediction(prediction)
        if unet.context_dim != text_encoder.width:
            raise ValueError(
                f"the UNet reads a context {unet.context_dim} wide, the text tower gives {text_encoder.width}; "
                "choose a unet and a text tower that fit"
            )
        if prediction == "epsilon" and schedule.zero_terminal:
            raise ValueError("zero terminal SNR begins with pure noise, where ε tells nothing; predict v, x0 or flow")
        if prediction == "v" and isinstance(schedule, Flow):
            raise ValueError("v is of paths with α² + σ² = 1, which diffusion=flow is not; predict flow or x0")
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.schedule, self.prediction, self.name, self.offload = schedule, prediction, name, offload
        self.defaults = Defaults() if defaults is None else defaults
        self.precision = ""  # a key of PRECISIONS where it is not that of the weights
        self._twin: tuple[Any, LatentDiffusion] | None = None
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
            idle = self.offload and module is not self.unet
            module.to(device="cpu" if idle else device, dtype=dtype)
        self.null_context = self.null_context.to(device=device, dtype=dtype)
        return self

    def compile(self) -> LatentDiffusion:
        """Compile the UNet by ``torch.compile``, with CUDA graphs on a GPU; the first batch of a size takes minutes."""
        self.unet.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default", dynamic=False)
        return self

    def context(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context of prompts (n, 77, d), and which were cut (n,). The empty prompt's is the one of training."""
        tokens = self.text_encoder.tokenize(prompts)
        with self._awake(self.text_encoder):
            context = self.text_encoder.encode(tokens)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=context.device)
        return torch.where(empty[:, None, None], self.null_context.to(context), context), tokens.truncated

    @torch.no_grad()
    def sample(
        self,
        prompt: str | Sequence[str],  # one, or a list
        negative_prompt: str | Sequence[str] = "",  # what to push away from: one for all, or one a prompt
        num_images: int = 1,  # a prompt; those of the first prompt come first
        steps: int | None = None,  # of the sampler, 1 to 1000; None is 50, or 12 for "auto"
        guidance_scale: float | None = None,  # s >= 0; 1 is no guidance; None takes what the model recommends
        sampler: str = "ddim",  # a key of SAMPLERS, or "auto": the most accurate, and its grid, for so few steps
        seed: int | Sequence[int] | None = 0,  # of the first image, the next has the next; or a list; None draws one
        height: int | None = None,  # pixels, a multiple of 8; None takes the model's, or the initial image's
        width: int | None = None,  # likewise
        *,
        latents: Tensor | None = None,  # starting noise, (n, 4, height / 8, width / 8); it sets the size
        grid: str | None = None,  # time grid, a key of ldm.diffusion.GRIDS; None takes the one of the weights
        eta: float = 0.0,  # DDIM's η >= 0; other samplers refuse it
        guidance_interval: tuple[float, float] | None = None,  # timesteps between which guidance acts (2404.07724)
        guidance_rescale: float = 0.0,  # φ in [0, 1] of 2305.08891, against the contrast that strong guidance adds
        init_image: Picture | None = None,  # to begin with: (n, 3, h, w) in [-1, 1], PIL or path; for all, or a prompt
        strength: float | None = None,  # part of the steps that change it, in (0, 1]; None is 0.8, or 1 with a mask
        mask: Picture | None = None,  # where to paint anew (1, white) and what to keep (0, black), of its size
        resize: str = "native",  # how a size that is not the model's is reached: see below
        batch_size: int = 16,  # images at a time; changes speed and memory alone
        tile: int | None = None,  # latents a side that are decoded at a time, for less memory; None takes all
        precision: str | None = None,  # a key of PRECISIONS, or "auto", the fastest that is exact enough; None keeps
        safety: str | Checker | None = None,  # "nsfw", or images (n, 3, h, w) → flags (n,); flagged ones are blurred
        callback: Callback | None = None,  # (images done before, step, estimate of the clean latents (b, 4, h, w))
    ) -> Samples:
        """Pictures of prompts. Image i is a pure function of (seed + i, prompt, settings), whatever its neighbours.

        Of a size that is not the model's, ``resize="native"`` denoises at that size; ``"interpolate"`` at the model's,
        and resizes the latents; ``"refine"`` resizes the pixels, adds a little noise, and takes the last steps at the
        target. What ``"auto"`` chose stands in the settings of the result.

        Raises:
            ValueError: for anything invalid, and if the result is not finite.
        """
        model = self if precision is None else self._in(precision)
        prompts, negatives = request.texts(prompt, negative_prompt, num_images)
        seeds = request.seeds(seed, len(prompts))
        scale = request.guidance_scale(guidance_scale, model.defaults.guidance_scale, negatives)
        interval = request.interval(guidance_interval, model.schedule.num_steps)
        rescale = request.number("guidance_rescale", guidance_rescale, 0.0, 1.0)
        flow, own = isinstance(model.schedule, Flow), model.defaults.grid
        sampler, grid, steps = request.plan(sampler, grid, steps, own, flow)
        run, times = request.sampler(sampler, eta), make_grid(grid, steps, model.schedule)
        checker = make_checker(safety)
        request.count("batch_size", batch_size)
        edit, size = model._canvas(init_image, mask, latents, (height, width), num_images, len(prompts))
        first = model._first_step(edit, strength, steps)
        base = model._base(resize, size, edit, latents)

        texts = sorted({*prompts, *negatives})
        contexts, cut = model.context(texts)
        row = {text: i for i, text in enumerate(texts)}
        positive = [row[text] for text in prompts]
        negative = None if scale == 1.0 else [row[text] for text in negatives]
        job = _Job(contexts, positive, negative, seeds, scale, interval, rescale, run, batch_size, callback)
        channels = model.autoencoder.latent_channels
        noise = model._noise(seeds, base) if latents is None else request.latents(latents, len(seeds), channels)
        z = model._trajectory(job, model._begin(noise, edit, times, first), times.tail(first), edit)
        if base != size:
            z = model._resize(job, z, size, times, resize)
        if not torch.isfinite(z).all():
            raise ValueError("the latents became NaN or infinite; check the weights, or take more steps")
        images, flagged = blur_flagged(model._decode(z, batch_size, tile), checker)
        settings = {  # without those that are None: what nobody asked for is not said
            "negative_prompts": negatives,
            "steps": steps,
            "evaluations": evaluations(sampler, times.tail(first)),
            "guidance_scale": scale,
            "sampler": sampler,
            "eta": eta,
            "grid": grid,
            "height": size[0],
            "width": size[1],
            "model": model.name,
            "precision": model.precision or str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "batch_size": batch_size,
            "guidance_interval": None if guidance_interval is None else list(interval),
            "guidance_rescale": rescale or None,
            "resize": None if base == size else resize,
            "init_image": None if edit is None else request.named(init_image),
            "strength": strength,
            "mask": None if mask is None else request.named(mask),
            "latents": None if latents is None else "given",
            "tile": tile,
            "safety": safety if safety is None or isinstance(safety, str) else "given",
        }
        said = {name: value for name, value in settings.items() if value is not None}
        return Samples(images, z, seeds, prompts, cut[positive], flagged, said)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder that ``ldm.load`` opens."""
        save_checkpoint(path, self.contents())

    def export_diffusers(self, path: str | Path) -> None:
        """Write a folder that diffusers' ``StableDiffusionPipeline.from_pretrained`` opens.

        Raises:
            ValueError: naming what that format cannot hold.
        """
        from ldm.convert import export_diffusers

        export_diffusers(self, path)

    def contents(self) -> Contents:
        """What a checkpoint of this model keeps."""
        components = {"unet": self.unet, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        said = {"prediction": self.prediction, "schedule": self.schedule.arguments, **asdict(self.defaults)}
        return Contents(dict(components), tensors={"null_context": self.null_context}, settings=said)

    # ------------------------------------------------------------------------------------------------ where it begins

    def _noise(self, seeds: Sequence[int], size: tuple[int, int], stream: str = "latents") -> Tensor:
        """Standard normal latents of a size in pixels, each a pure function of its seed, (n, 4, h/8, w/8)."""
        shape = (self.autoencoder.latent_channels, size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING)
        return torch.stack([randomness.normal(seed, stream, 0, shape) for seed in seeds])

    def _canvas(
        self,
        image: Picture | None,
        mask: Picture | None,
        latents: Tensor | None,
        sides: tuple[Any, Any],
        each: int,
        n: int,
    ) -> tuple[_Edit | None, tuple[int, int]]:
        """The size of the picture, which an image or latents set, and what an image gives."""
        paints = self.unet.in_channels != self.autoencoder.latent_channels
        if paints and (image is None or mask is None):
            raise ValueError("this is an inpainting model: give init_image= and mask=")
        if image is None:
            if mask is not None:
                raise ValueError("a mask needs the image that it belongs to; give init_image=")
            if latents is None:
                own = self.defaults
                return None, (request.size("height", sides[0], own.height), request.size("width", sides[1], own.width))
            shape = [DOWNSAMPLING * side for side in request.latents(latents, n, latents.shape[1]).shape[2:]]
            return None, request.agreed_size("latents", *sides, shape)
        x = request.picture("init_image", image)
        size = request.agreed_size("init_image", *sides, x.shape[2:])
        if latents is not None and tuple(latents.shape[2:]) != (size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING):
            raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit an image of {size} pixels")
        if mask is None:
            return _Edit(request.an_image("init_image", self._encode(x), each, n)), size
        full = request.mask(mask, size)
        if len({len(full), len(x), 1}) > 2:
            raise ValueError(f"{len(full)} masks for {len(x)} images; give one, or one an image")
        small = F.interpolate(full, scale_factor=1 / DOWNSAMPLING, mode="nearest")
        z, m = self._encode(x), request.an_image("mask", small, each, n)
        channels = None
        if paints:
            kept = self._encode(x * (1.0 - full))  # one of them may be for all
            channels = torch.cat([m, request.an_image("init_image", kept, each, n)], dim=1)
        return _Edit(request.an_image("init_image", z, each, n), None if paints else m, channels), size

    def _first_step(self, edit: _Edit | None, strength: float | None, steps: int) -> int:
        """Index of the grid where the trajectory begins: 0, or later for an image that is to be changed in part."""
        if edit is None:
            if strength is not None:
                raise ValueError(f"strength={strength} says how far an image is changed; give init_image= as well")
            return 0
        return steps - request.strength(strength, edit.mask is not None or edit.channels is not None, steps)

    def _base(self, resize: str, size: tuple[int, int], edit: _Edit | None, latents: Tensor | None) -> tuple[int, int]:
        """The size at which the trajectory begins."""
        if resize not in request.RESIZE:
            raise ValueError(f"resize={resize!r} is unknown; choose one of {', '.join(request.RESIZE)}")
        if resize == "native":
            return size
        if edit is not None or latents is not None:
            what = "init_image" if edit is not None else "latents"
            raise ValueError(f"resize={resize} begins at the model's own size, and {what} sets another; leave one out")
        return request.base_size(*size, self.defaults.height, self.defaults.width)

    @staticmethod
    def _begin(noise: Tensor, edit: _Edit | None, times: Grid, first: int) -> Tensor:
        """Pure noise, or an image with the noise of the first time; full strength begins from noise under a mask."""
        if edit is None:
            return noise
        z = times.alpha[first] * edit.z + times.sigma[first] * noise
        if first > 0 or (edit.mask is None and edit.channels is None):
            return z
        return noise if edit.mask is None else torch.where(edit.mask > 0, noise, z)

    # ------------------------------------------------------------------------------------------- from noise to latents

    def _trajectory(
        self, job: _Job, z: Tensor, times: Grid, edit: _Edit | None = None, stream: str = "sampler"
    ) -> Tensor:
        """Clean latents from noisy ones by the sampler, a batch at a time: (n, 4, h, w) → float32 on the CPU."""
        results = []
        for begin in range(0, len(z), job.batch_size):
            part = slice(begin, begin + job.batch_size)
            denoise = self._denoiser(job, times, part, edit)

            def noise(i: int, part: slice = part) -> Tensor:
                rows = [randomness.normal(seed, stream, i, z.shape[1:]) for seed in job.seeds[part]]
                return torch.stack(rows).to(self.device)

            end = job.sampler(denoise, z[part].to(self.device), times, noise).cpu()
            if edit is not None and edit.mask is not None:  # what is kept, is kept exactly
                end = torch.where(edit.mask[part] > 0, end, edit.z[part])
            results.append(end)
        return torch.cat(results)

    def _denoiser(self, job: _Job, times: Grid, part: slice, edit: _Edit | None) -> Callable[[Tensor, int], Tensor]:
        """(z, step) → the estimate of the clean latents, with guidance, for one batch."""
        contexts = job.contexts.to(self.device, self.dtype)
        positive = contexts[job.positive[part]]
        negative = None if job.negative is None else contexts[job.negative[part]]
        extra = None if edit is None or edit.channels is None else edit.channels[part].to(self.device, self.dtype)

        def network(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
            if extra is not None:
                z = torch.cat([z, extra.repeat(len(z) // len(extra), 1, 1, 1)], dim=1)
            return self.unet(z, t, context)

        pushed = guided(network, positive, negative, job.scale, job.rescale)
        plain = guided(network, positive, None, 1.0)
        known = None if edit is None or edit.mask is None else edit.z[part].to(self.device)
        keep = None if edit is None or edit.mask is None else edit.mask[part].to(self.device) == 0

        def denoise(z: Tensor, i: int) -> Tensor:
            t = torch.full((len(z),), times.times[i], device=z.device)
            predict = pushed if job.interval[0] <= times.times[i] <= job.interval[1] else plain
            x0 = to_x0(self.prediction, predict(z.to(self.dtype), t).float(), z, times.alpha[i], times.sigma[i])
            if known is not None and keep is not None:
                # The kept part is known: told so, any sampler carries it along with its own noise.
                x0 = torch.where(keep, known, x0)
            if job.callback is not None:
                job.callback(part.start, i, x0)
            return x0

        return denoise

    def _resize(self, job: _Job, z: Tensor, size: tuple[int, int], times: Grid, how: str) -> Tensor:
        """Latents of the model's own size → those of the target."""
        if how == "interpolate":
            shape = (size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING)
            return F.interpolate(z, shape, mode="bilinear", antialias=True)
        # Pixels can be resized without harm; latents cannot: between two of them lies no picture.
        pixels = self._decode(z, job.batch_size, None)
        z = self._encode(F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0))
        first = min(sum(t > REFINE_FROM for t in times.times), times.steps - 1)
        noise = self._noise(job.seeds, size, "refine")
        start = self._begin(noise, _Edit(z), times, first)
        return self._trajectory(job, start, times.tail(first), stream="refining")

    # ------------------------------------------------------------------------------------------------ images ↔ latents

    def _encode(self, x: Tensor) -> Tensor:
        """Latents of images, one at a time: (n, 3, h, w) → float32 (n, 4, h/8, w/8) on the CPU."""
        with self._awake(self.autoencoder):
            parts = [self.autoencoder.encode(row.to(self.device, self.dtype)).float().cpu() for row in x.split(1)]
        return torch.cat(parts)

    def _decode(self, z: Tensor, batch_size: int, tile: int | None) -> Tensor:
        with self._awake(self.autoencoder):
            parts = [
                self.autoencoder.decode(part.to(self.device, self.dtype), tile).float().cpu()
                for part in z.split(batch_size)
            ]
        images = torch.cat(parts)
        if not torch.isfinite(images).all():
            raise ValueError("the decoded images hold NaN or infinite values; check the autoencoder's weights")
        return images.clamp(-1.0, 1.0)

    @contextmanager
    def _awake(self, module: nn.Module) -> Iterator[None]:
        """A module on the device of the UNet while it works; back on the CPU afterwards if offload is asked for."""
        module.to(self.device)
        yield
        if self.offload:
            module.to("cpu")

    def _in(self, precision: str) -> LatentDiffusion:
        """This model in another precision. It is kept for the next call, until the weights change."""
        precision = choose(precision, self.device)
        weights = [*self.unet.parameters(), *self.autoencoder.parameters()]
        # Tensors made in inference mode count no versions.
        key = (precision, [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights])
        if self._twin is None or self._twin[0] != key:
            twin, dtype = copy.copy(self), PRECISIONS[precision]
            packs = precision == "bfloat16" and self.device.type == "cpu"
            if dtype != self.dtype or packs:
                twin.unet = copy.deepcopy(self.unet).to(dtype)
                twin.autoencoder = copy.deepcopy(self.autoencoder).to(dtype)
            if packs:
                twin.unet, twin.autoencoder = prepack(twin.unet), prepack(twin.autoencoder)
            if precision == "float32_winograd":
                twin.unet, twin.autoencoder = accelerated(twin.unet), accelerated(twin.autoencoder)
            twin.precision, twin._twin = precision, None
            self._twin = (key, twin)
        return self._twin[1]
