"""``ldm evaluate`` and ``ldm reproduce``: from settings to a report, and from a picture to itself."""

import hashlib
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.cli.commands import launch
from ldm.cli.settings import parse, stamp, value_of


def evaluate(arguments: list[str]) -> None:
    """``ldm evaluate``."""
    defaults = {
        "model": "emoji", "data": "emoji200", "against": None, "sweep": None, "values": None, "samplers": None,
        "split": None, "seeds": 3, "limit": None, "steps": 50, "guidance_scale": None, "sampler": "ddim",
        "batch_size": 16, "devices": 1, "output": None,
    }  # fmt: skip
    texts = ("model", "data", "against", "sweep", "values", "samplers", "split", "sampler", "output")
    settings, bare = parse(arguments, defaults, texts)
    if bare:
        raise ValueError(f"{bare[0]!r} is no setting; write key=value, see ldm evaluate --help")
    axis, against = settings["sweep"], settings["against"]
    if axis is not None and against is not None:
        raise ValueError("sweep= and against= are two questions; ask one at a time")
    given = {key: settings[key] for key in ("values", "samplers", "split") if settings[key] is not None}
    if axis is None and given:
        raise ValueError(f"{min(given)}= belongs to sweep=guidance, steps or ema; give one, or leave it out")
    import torch

    from ldm import provenance, request
    from ldm.batch import ranks, shared
    from ldm.evaluation import Drawing, compare_losses, score, sweep

    for key in ("seeds", "batch_size", "devices", *(["limit"] if settings["limit"] is not None else [])):
        request.count(key, settings[key])
    rank, world = ranks()
    if settings["devices"] > 1 and world == 1:
        launch("evaluate", settings["devices"], arguments)
        return
    moment = shared(stamp())  # where the processes meet
    output = Path(settings["output"] or f"outputs/evaluation/{moment}")
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    drawing = Drawing(*(settings[key] for key in ("seeds", "steps", "guidance_scale", "sampler", "batch_size")))
    command = shlex.join(["ldm", "evaluate", *arguments])
    always = {"data": settings["data"], "limit": settings["limit"], "command": command}
    if axis is not None:
        lists = {key: value_of(key, f"[{given[key]}]") for key in ("values", "samplers") if key in given}
        lists = {"samplers": [settings["sampler"]], **lists}
        report = sweep(settings["model"], axis, split=given.get("split", "train"), drawing=drawing, **lists, **always)
    elif against is not None and not (Path(against) / "result.json").is_file():
        report = compare_losses(settings["model"], against, **always)
    else:
        report = score(settings["model"], drawing=drawing, against=against and Path(against), **always)
    report.result["environment"] = provenance.environment()
    if rank:
        return
    report.write(output)
    sys.stdout.write(f"{report.markdown()}\nwritten to {output}: report.html report.md result.json\n")


# ------------------------------------------------------------------------------------------------------- reproduce

# What a capsule must or may say, and its type: sample itself checks numbers and names, not types, sizes and paths.
_NUMBER = (int, float)
_NEEDED: dict[str, Any] = {"prompt": str, "negative_prompt": str, "seed": int, "steps": int, "guidance_scale": _NUMBER,
                           "sampler": str, "eta": _NUMBER, "grid": str, "height": int, "width": int, "precision": str,
                           "model": str}  # fmt: skip
_FILES = ("init_image", "mask")
_ALLOWED: dict[str, Any] = {"guidance_interval": list, "guidance_rescale": _NUMBER, "strength": _NUMBER, "resize": str,
                            "tile": int, "safety": str, **dict.fromkeys(_FILES, str)}  # fmt: skip
_ABOUT = ("evaluations", "batch", "device", "versions", "machine")  # what is said beside it
_MOST = 64  # pictures drawn at most, to have the batch that a picture was drawn in


def reproduce(arguments: list[str]) -> None:
    """``ldm reproduce``."""
    defaults = {"model": None, "weights": "ema", "device": None, "init_image": None, "mask": None, "output": None}
    settings, bare = parse(arguments, defaults, tuple(defaults))
    if len(bare) != 1:
        raise ValueError(f"{len(bare)} pictures came; the rule is: ldm reproduce IMAGE.png [model=PATH]")
    import numpy as np

    from ldm.loading import load
    from ldm.provenance import open_png, origin

    capsule, then = open_png(bare[0])
    asked = _asked(bare[0], capsule, then.size, settings)
    source = settings["model"] or _source(capsule["model"])
    model = load(source, settings["weights"], settings["device"])
    prompt, against, seed = (asked.pop(key) for key in ("prompt", "negative_prompt", "seed"))
    # Kernels may round otherwise in a batch of another size: alone first, which is cheap, then as it was.
    for place, size in dict.fromkeys([(0, 1), _batch(capsule.get("batch"))]):
        out = model.sample([prompt] * size, [against] * size, seed=[seed] * size, batch_size=size, **asked)
        off = np.abs(np.asarray(then, np.int16) - np.asarray(out.pil()[place], np.int16))  # (h, w, 3)
        if not off.any():
            break
    if settings["output"] is not None:
        out.save(settings["output"])
    drawn = f"drawn {'alone' if size == 1 else f'in a batch of {size}'} by {source}"
    if not off.any():
        sys.stdout.write(f"bit-identical: {bare[0]}, {drawn}\n")
        return
    here = {"model": model.name, "device": str(model.device), **origin()}
    other = _differences({key: capsule.get(key) for key in here}, here)
    psnr = 10 * np.log10(255**2 / (off.astype(np.float64) ** 2).mean())
    said = f"{off.any(2).sum():,} of {off[..., 0].size:,} pixels, at most {off.max()} of 255, {psnr:.1f} dB PSNR"
    other = other or ["code, weights, versions and machine are those of its settings"]
    sys.stdout.write(f"differs: {said}, {drawn}\n" + "".join(f"  {line}\n" for line in other))


def _asked(path: str, capsule: Mapping[str, Any], size: tuple[int, int], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``sample`` from a capsule, which may be anybody's: every key, type, size and path is checked."""
    kinds = {**_NEEDED, **_ALLOWED}
    unknown = ", ".join(sorted(capsule.keys() - {*kinds, *_ABOUT}))[:200]
    if "images" in capsule:
        raise ValueError(f"{path} is a sheet of several pictures; give one of the pictures beside it")
    if unknown:
        raise ValueError(f"{path} was made with {unknown}, which its file does not hold, or this version does not know")
    for key in [key for key in kinds if key in capsule or key in _NEEDED]:
        value = capsule.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            raise ValueError(f"{path}: its settings are damaged ({key} is {str(value)[:80]!r}); give an unchanged one")
    if (capsule["width"], capsule["height"]) != size:
        said = f"{capsule['width']}×{capsule['height']}"
        raise ValueError(f"{path} has {size[0]}×{size[1]} pixels, its settings say {said}; give an unchanged picture")
    if capsule.get("safety") == "given":
        raise ValueError(f"{path} went through a safety checker of its maker's own, which cannot be called from here")
    for key in _FILES:  # a path in a file by somebody else is not opened: whoever asks names it
        if key in capsule and given[key] is None:
            raise ValueError(f"{path} was made from {key}={capsule[key][:200]}, not in it; give {key}=FILE")
        if key not in capsule and given[key] is not None:
            raise ValueError(f"{path} was made without {key}=; leave it out")
    asked = {key: capsule[key] for key in kinds if key in capsule and key != "model"}
    return asked | {key: given[key] for key in _FILES if key in capsule}


def _source(digest: str) -> str:
    """The model whose manifest has a hash: a bundled one, or a checkpoint under outputs/."""
    from ldm.checkpoint import MANIFEST
    from ldm.loading import BUNDLED, find

    folders = [(name, find(name)) for name in BUNDLED]
    folders += [(str(path.parent), path.parent) for path in sorted(Path("outputs").rglob(MANIFEST))]
    for name, folder in folders:
        if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16] == digest:
            return name
    raise ValueError(f"no model of hash {digest[:40]!r} is bundled or under outputs/; name it with model=")


def _batch(value: Any) -> tuple[int, int]:
    """Place and size of the batch that a picture was drawn in; alone where the capsule says nothing that can be."""
    good = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
    return (value[0], value[1]) if good and 0 <= value[0] < value[1] <= _MOST else (0, 1)


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """``name: then, now`` for every plain value that is not the same."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = {**then, **now}
        return [line for key in keys for line in _differences(then.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if then == now else [f"{name}: {str(then)[:80]} then, {str(now)[:80]} now"]
