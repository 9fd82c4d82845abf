"""The commands that need no training: sample, convert, pack, index."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.settings import parse, stamp


def sample(arguments: list[str]) -> None:
    """``ldm sample``."""
    import torch
    from tqdm import tqdm

    from ldm import precision, request
    from ldm.batch import draw, ranks, shared
    from ldm.loading import load

    own = {
        "model": "emoji", "prompt": None, "prompts_file": None, "weights": "ema", "device": None, "devices": 1,
        "compile": False, "offload": False, "output": None,
    }  # fmt: skip
    of_draw = {"negative_prompt": "", "num_images": 1, "seed": 0, "batch_size": 16}
    of_model = {
        "steps": None, "guidance_scale": None, "sampler": "ddim", "grid": None, "height": None, "width": None,
        "eta": 0.0, "guidance_interval": None, "guidance_rescale": 0.0, "init_image": None, "strength": None,
        "mask": None, "resize": "native", "tile": None, "precision": None, "safety": None,
    }  # fmt: skip
    texts = ("model", "prompt", "prompts_file", "negative_prompt", "output", "sampler", "grid", "weights", "device",
             "init_image", "mask", "resize", "precision", "safety")  # fmt: skip
    settings, prompts = parse(arguments, own | of_draw | of_model, texts)
    if settings["prompt"] is not None:
        prompts.append(settings["prompt"])
    if settings["prompts_file"] is not None:
        prompts += _lines(Path(settings["prompts_file"]))
    if not prompts:
        raise ValueError('no prompt came; give one: python sample.py "a red apple, noto style"')
    rank, world = ranks()
    if request.count("devices", settings["devices"]) > 1 and world == 1:
        launch("sample", settings["devices"], arguments)
        return
    if world > 1 and settings["device"] is None and torch.cuda.is_available():
        settings["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model = load(settings["model"], settings["weights"], settings["device"], settings["offload"])
    if settings["precision"] is not None:
        settings["precision"] = shared(precision.choose(settings["precision"], model.device))
    if settings["compile"]:
        _compile(model, prompts, settings)
    output = Path(shared(settings["output"] or f"outputs/samples/{stamp()}"))
    settings["seed"] = shared(secrets.randbelow(2**31) if settings["seed"] is None else settings["seed"])
    start = time.perf_counter()
    quiet = rank > 0 or not sys.stderr.isatty()
    with tqdm(desc="sampling", unit="picture", disable=quiet, bar_format=_BAR) as bar:

        def progress(done: float) -> None:
            bar.total, bar.n = len(prompts) * settings["num_images"], done
            bar.refresh()

        given = {key: settings[key] for key in of_draw}
        options = {key: settings[key] for key in of_model}
        drawn = draw(model, prompts, output, progress=progress, options=options, **given)
    for note in drawn.notes:
        sys.stderr.write(f"note: {note}\n")
    if rank == 0:
        sys.stdout.write(_account(drawn, time.perf_counter() - start))


def _compile(model: Any, prompts: Sequence[str], settings: dict[str, Any]) -> None:
    """Compile, and say how long the first batch took, which pays for it."""
    start = time.perf_counter()
    batch = min(settings["batch_size"], len(prompts) * settings["num_images"])
    same = {key: settings[key] for key in ("guidance_scale", "height", "width", "precision")}
    model.compile().sample(prompts[0], num_images=batch, steps=1, batch_size=batch, **same)
    sys.stderr.write(f"compiled in {time.perf_counter() - start:.0f} s\n")


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} pictures [{elapsed}<{remaining}]"


def _account(drawn: Any, seconds: float) -> str:
    """What was drawn, how long it took, and where it is."""
    there = len(drawn.paths) - drawn.fresh
    where = drawn.paths[0].parent / "grid.png" if len(drawn.paths) > 1 else drawn.paths[0]
    if not drawn.fresh:
        return f"all {there} pictures were there → {where}\n"
    said = drawn.settings
    a_step = seconds / (drawn.fresh * said["steps"])
    return (
        f"{drawn.fresh} pictures in {seconds:.1f} s ({a_step:.3f} s a step and picture)"
        f"{f', {there} were there' if there else ''}; {said['sampler']} on the grid {said['grid']}, "
        f"{said['steps']} steps, guidance {said['guidance_scale']:g}, {said['precision']} → {where}\n"
    )


def launch(command: str, devices: int, arguments: Sequence[str]) -> None:
    """The same command in several processes, which share its work."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    done = subprocess.run([*torchrun, "-m", "ldm.cli", command, *arguments], check=False)
    if done.returncode:
        raise ValueError(f"one of {devices} processes failed; what they said is above")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}; give a text file with one prompt a line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


# ------------------------------------------------------------------------------------------------------- pack, index


def pack(arguments: list[str]) -> None:
    """``ldm pack``."""
    from ldm.data.pack import pack as pack_shards

    settings, bare = parse(arguments, {"size": None}, ())
    if len(bare) != 2:
        raise ValueError(f"{len(bare)} paths came; the rule is: ldm pack SOURCE OUT [size=PIXELS]")
    pack_shards(Path(bare[0]), Path(bare[1]), size=settings["size"])
    sys.stdout.write(f"shards in {bare[1]}; train on them with: data=shards data.train.paths={bare[1]}\n")


def index(arguments: list[str]) -> None:
    """``ldm index``."""
    from ldm.data import build_index, find_tars, write_catalogue
    from ldm.data.shards import index_path

    settings, bare = parse(arguments, {"skip": False}, ())
    if not bare or not isinstance(settings["skip"], bool):
        raise ValueError("the rule is: ldm index TAR|FOLDER [TAR|FOLDER ...] [skip=true]")
    for path in map(Path, bare):
        for shard in find_tars(path) if path.is_dir() else [path]:
            built = build_index(shard, settings["skip"])
            left = built.get("skipped", [])
            note = f"; {len(left)} without a caption left out, the first is {left[0]}" if left else ""
            sys.stdout.write(f"{index_path(shard)}: {len(built['samples'])} samples{note}\n")
        if path.is_dir():
            sys.stdout.write(f"{write_catalogue(path)}: the list of them\n")


def convert(arguments: list[str]) -> None:
    """``ldm convert``."""
    defaults = {"half": False, "prediction": None, "weights": "ema"}
    settings, bare = parse(arguments, defaults, ("prediction", "weights"))
    if len(bare) != 2:
        raise ValueError(f"{len(bare)} paths came; the rule is: ldm convert SOURCE OUT [half=true] [prediction=v]")
    if not isinstance(settings["half"], bool):
        raise ValueError(f"half={settings['half']}: the rule is true or false")
    from ldm.convert import convert as convert_weights

    contents = convert_weights(bare[0], bare[1], **settings)
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in contents.components.items()]
    said = contents.settings
    detail = f"; {said['schedule']['name']}, {said['prediction']}, {said['height']}×{said['width']}" if said else ""
    sys.stdout.write(f"{bare[1]}: {', '.join(sizes)} parameters{detail}\n")
