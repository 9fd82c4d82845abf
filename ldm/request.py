"""What a caller of ``sample`` asks for, checked before any work: a value, or one line that says what came and the rule.

Shapes: n images, h × w pixels.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.autoencoder.autoencoder import DOWNSAMPLING
from ldm.diffusion import SAMPLERS, choose

Picture = Tensor | Image.Image | str | Path
STEPS, AUTO_STEPS = 50, 12  # by default, and of sampler=auto: less error than 50 of DDIM (docs/samplers.md)
RESIZE = ("native", "interpolate", "refine")
MAX_PIXELS = 64_000_000  # of a picture from a file: a small PNG can unfold to gigabytes


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value}: the rule is a whole number of at least {least}")
    return value


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, hint: str = "") -> float:
    """A finite number in [low, high]."""
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not good or not low <= value <= high:
        rule = f"a finite number >= {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name}={value}: the rule is {rule}{hint}")
    return float(value)


def texts(prompt: str | Sequence[str], negative: str | Sequence[str], num_images: int) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt an image, prompt-major."""
    count("num_images", num_images)
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


def seeds(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """A seed an image: seed + i, the given list, or drawn where None came."""
    drawn = secrets.randbelow(2**31) if seed is None else seed
    given: list[Any] = list(seed) if isinstance(seed, (list, tuple)) else [drawn]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"seed {value!r} is not a whole number; the rule is one, a list of one an image, or none")
    if not isinstance(seed, (list, tuple)):
        return [given[0] + i for i in range(n)]
    if len(given) != n:
        raise ValueError(f"{len(given)} seeds for {n} images; give one number, or one an image")
    return given


def guidance_scale(value: Any, default: float, negatives: Sequence[str]) -> float:
    """s >= 0, and no negative prompt beside s = 1, which would ignore it."""
    scale = number("guidance_scale", default if value is None else value, hint="; 1 is no guidance, 7.5 is usual")
    if scale == 1.0 and any(negatives):
        raise ValueError(
            "guidance_scale=1 makes one pass and would ignore the negative prompt; raise it, or drop the prompt"
        )
    return scale


def interval(value: Any, num_steps: int) -> tuple[float, float]:
    """Timesteps (low, high) between which guidance acts, both included."""
    if value is None:
        return (0.0, float(num_steps))
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"guidance_interval={value!r}: the rule is two timesteps, low and high, such as (200, 800)")
    low, high = (number("guidance_interval", bound, 0.0, num_steps) for bound in value)
    if low > high:
        raise ValueError(f"guidance_interval=({low:g}, {high:g}): the rule is low <= high")
    return low, high


def size(name: str, value: Any, default: int) -> int:
    """Pixels, a multiple of 8."""
    pixels = count(name, default if value is None else value, DOWNSAMPLING)
    if over := pixels % DOWNSAMPLING:
        nearest = f"{pixels - over} and {pixels - over + DOWNSAMPLING}"
        raise ValueError(f"{name}={pixels} is not a multiple of {DOWNSAMPLING}; the nearest are {nearest}")
    return pixels


def latents(value: Tensor, n: int, channels: int) -> Tensor:
    """Starting noise, float32 (n, channels, h/8, w/8) on the CPU."""
    if value.ndim != 4 or value.shape[:2] != (n, channels) or 0 in value.shape:
        raise ValueError(f"latents of shape {tuple(value.shape)}: the rule is ({n}, {channels}, height / 8, width / 8)")
    if not torch.isfinite(value).all():
        raise ValueError("the starting latents hold NaN or infinite values")
    return value.detach().float().cpu()


def agreed_size(what: str, height: Any, width: Any, shape: Sequence[int]) -> tuple[int, int]:
    """The size that latents or an image set, which a given height or width may not contradict."""
    for name, given, side in (("height", height, shape[0]), ("width", width, shape[1])):
        size(name, side, side)
        if given is not None and given != side:
            raise ValueError(f"{name}={given} contradicts the {what}, whose {name} is {side}; leave it out")
    return shape[0], shape[1]


def base_size(height: int, width: int, own_height: int, own_width: int) -> tuple[int, int]:
    """The size near the model's own area that has the proportions of (height, width); multiples of 8."""
    shrink = math.sqrt(own_height * own_width / (height * width))
    sides = [max(DOWNSAMPLING, round(side * shrink / DOWNSAMPLING) * DOWNSAMPLING) for side in (height, width)]
    return sides[0], sides[1]


def picture(name: str, value: Picture) -> Tensor:
    """An image, or several as a tensor: float32 (n, 3, h, w) in [-1, 1]."""
    if isinstance(value, Tensor):
        x = value.detach().float().cpu()
        x = x[None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: the rule is (n, 3, height, width)")
        if not torch.isfinite(x).all() or x.abs().max() > 1.0:
            raise ValueError(f"{name} must lie in [-1, 1], got values from {x.min():g} to {x.max():g}")
        return x
    image = _opened(name, value)
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (h, w, 3)
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0


def named(value: Picture | None) -> str:
    """What a capsule says of a picture: its path, if it has one."""
    return str(value) if isinstance(value, (str, Path)) else "given"


def mask(value: Picture, shape: Sequence[int]) -> Tensor:
    """A mask of an image's size, 1 where to paint anew: float32 (1 or n, 1, h, w), 0 or 1, cut at one half."""
    if isinstance(value, Tensor):
        x = value.detach().float().cpu()
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)  # (h, w) is one mask
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"mask of shape {tuple(value.shape)}: the rule is (h, w) or (n, 1, h, w), in pixels")
        if not ((x >= 0.0) & (x <= 1.0)).all():
            raise ValueError("the mask must lie in [0, 1]: 1 is painted anew, 0 is kept")
    else:
        x = torch.from_numpy(np.array(_opened("mask", value).convert("L")))[None, None].float() / 255.0
    height, width = x.shape[2:]
    if (height, width) != tuple(shape):
        sizes = f"the mask is {height}×{width} pixels, the image {shape[0]}×{shape[1]} (height × width)"
        raise ValueError(f"{sizes}; give them the same size")
    if not (x >= 0.5).any():
        raise ValueError("the mask keeps every pixel (none is 0.5 or above); mark with 1 what to paint anew")
    return (x >= 0.5).float()


def an_image(name: str, value: Tensor, num_images: int, n: int) -> Tensor:
    """One for all, or one a prompt → one an image, (n, ...)."""
    if len(value) == 1:
        return value.expand(n, *value.shape[1:])
    if len(value) * num_images != n:
        raise ValueError(f"{len(value)} of {name} for {n // num_images} prompts; give one, or one a prompt")
    return value.repeat_interleave(num_images, 0)


def strength(value: Any, masked: bool, steps: int) -> int:
    """Steps to take from an image: int(steps · strength), strength in (0, 1], by default 0.8, or 1 with a mask."""
    given = (1.0 if masked else 0.8) if value is None else value
    if number("strength", given, 0.0, 1.0, ", above 0") == 0.0:
        raise ValueError("strength=0 would change nothing: the rule is a number above 0, up to 1")
    taken = int(steps * given)
    if taken < 1:
        raise ValueError(f"strength={given} of {steps} steps leaves no step; the least is {1 / steps:g}")
    return taken


def plan(name: str, grid: str | None, steps: int | None, own_grid: str, flow: bool = False) -> tuple[str, str, int]:
    """The names of sampler and grid and the number of steps: what was given, or chosen by ``auto``."""
    if name != "auto":
        return name, own_grid if grid is None else grid, STEPS if steps is None else steps
    if grid is not None:
        raise ValueError(f"sampler=auto chooses the grid itself, and grid={grid} came; leave one out")
    steps = AUTO_STEPS if steps is None else count("steps", steps)
    return *choose(steps, flow), steps


def sampler(name: str, eta: float) -> Callable[..., Tensor]:
    """The sampler of a name, with its η."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose one of {', '.join(SAMPLERS)}, auto")
    eta = number("eta", eta)
    if eta and name != "ddim":
        raise ValueError(f"eta={eta} is a setting of ddim, and sampler={name} would ignore it; leave it out")
    return partial(SAMPLERS[name], eta=eta) if name == "ddim" else SAMPLERS[name]


def _opened(name: str, value: Image.Image | str | Path) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (str, Path)):
        raise ValueError(f"{name} is a {type(value).__name__}; give a tensor, a PIL image or the path of one")
    if not Path(value).is_file():
        raise FileNotFoundError(f"{name}={value}: no such file")
    try:
        image = Image.open(value, formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{name}={value} has {image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are read")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}={value} cannot be read as PNG, JPEG or WebP ({error})") from error
    return image
