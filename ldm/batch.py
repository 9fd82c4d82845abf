"""Many pictures into a folder: by one process or several, at once or in instalments.

Picture i is the same however the work is split: its seed is seed + i, and nothing else of it hangs on its neighbours.
A picture is there whole or not at all, so a run that was stopped goes on with those that are missing.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from torch import Tensor

from ldm import provenance, request
from ldm.pipeline import LatentDiffusion
from ldm.samples import sheet

REQUEST = "request.json"
IN_GRID = 64  # pictures at most in grid.png
Progress = Callable[[float], None]  # pictures done, of all processes, in parts


@dataclass(frozen=True)
class Drawn:
    """What a call did."""

    paths: list[Path]  # of all pictures of the request, in order
    fresh: int  # how many of them this process drew now
    notes: list[str]  # lines about single pictures: cut prompts, flags of the safety checker
    settings: dict[str, Any]  # of a picture drawn now; empty if none was


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def shared(value: Any) -> Any:
    """The first process's value, in every process: what is drawn, measured or read from a clock must not differ."""
    box = [value]
    if ranks()[1] > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.broadcast_object_list(box, src=0)
    return box[0]


def draw(
    model: LatentDiffusion,
    prompts: Sequence[str],
    output: Path,  # folder; made if it is not there
    *,
    negative_prompt: str | Sequence[str] = "",  # one for all, or one a prompt
    num_images: int = 1,  # a prompt
    seed: int | Sequence[int] = 0,  # of the first picture, or one a picture
    batch_size: int = 16,  # pictures at a time
    progress: Progress | None = None,  # called after every step
    options: dict[str, Any] | None = None,  # what else LatentDiffusion.sample takes
) -> Drawn:
    """Draw what is missing of prompts × num_images pictures in a folder, this process's share of it.

    Raises:
        ValueError: for an invalid request, and if the folder holds pictures of another.
    """
    options = options or {}
    request.count("batch_size", batch_size)
    texts, negatives = request.texts(prompts, negative_prompt, num_images)
    seeds = request.seeds(seed, len(texts))
    rank, world = ranks()
    asked = {"prompts": texts, "negative_prompts": negatives, "seeds": seeds, "model": model.name, **options}
    asked = json.loads(json.dumps(asked, default=str))  # as it will be read again
    paths = [output / f"{i:05d}.png" for i in range(len(texts))]
    _claim(output, asked, paths, rank)
    steps = request.plan(options.get("sampler", "ddim"), None, options.get("steps"), "")[2]
    fresh, notes, settings = 0, [], {}
    for first in range(rank * batch_size, len(paths), world * batch_size):  # every world-th batch
        missing = [i for i in range(first, min(first + batch_size, len(paths))) if not paths[i].exists()]
        if not missing:
            continue

        def step(begin: int, i: int, x0: Tensor, some: int = len(missing)) -> None:
            if progress is not None:
                done = sum(path.exists() for path in paths)
                progress(done + some * min(1.0, (i + 1) / steps))

        own, against = [texts[i] for i in missing], [negatives[i] for i in missing]
        own_seeds = [seeds[i] for i in missing]
        out = model.sample(own, against, seed=own_seeds, batch_size=batch_size, callback=step, **options)
        output.mkdir(parents=True, exist_ok=True)
        _claim(output, asked, paths, rank, write=True)
        for k, (i, image) in enumerate(zip(missing, out.pil(), strict=True)):
            provenance.write_png(paths[i], image, out.capsule(k))
        fresh, settings = fresh + len(missing), out.settings
        for flags, what in ((out.truncated, "has a prompt of more than 77 tokens, which was cut"),
                            (out.flagged, "was flagged by the safety checker and blurred")):  # fmt: skip
            notes += [f"picture {missing[i]} {what}" for i in flags.nonzero()[:, 0].tolist()]
    if world > 1:
        dist.barrier()
    if rank == 0 and len(paths) > 1:
        first_ones = paths[:IN_GRID]
        capsules = {"images": [provenance.read_png(path) for path in first_ones]}
        grid = sheet([Image.open(path).convert("RGB") for path in first_ones])
        provenance.write_png(output / "grid.png", grid, capsules)
    return Drawn(paths, fresh, notes, settings)


def _claim(output: Path, asked: dict[str, Any], paths: Sequence[Path], rank: int, write: bool = False) -> None:
    """The folder is this request's: refuse another's pictures, and write the request beside the first own one."""
    there = output / REQUEST
    if there.is_file():
        try:
            found = json.loads(there.read_text())
        except json.JSONDecodeError:
            found = {}
        differ = sorted(key for key in asked.keys() | found.keys() if asked.get(key) != found.get(key))
        if other := ", ".join(differ):
            raise ValueError(f"output={output} holds pictures of another request (other: {other}); name another folder")
    elif any(path.exists() for path in paths):
        raise ValueError(f"output={output} holds pictures, and no {REQUEST} says whose; name another folder")
    elif write:
        part = output / f".{REQUEST}.{rank}"
        part.write_text(json.dumps(asked, ensure_ascii=False, indent=1))
        os.replace(part, there)
