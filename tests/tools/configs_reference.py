"""Writes docs/configs.md from configs/: every file, every key, its meaning.

    python -m tests.tools.configs_reference

What a key means is the remark beside it in the YAML, or else the gloss beside the argument of the class that
``_target_`` names. Arguments that no file sets are listed too, with their defaults.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "configs.md"
ABOUT = {
    "text": "The text tower (`ldm.text.TextEncoder`), read from a checkpoint.",
    "autoencoder": "The autoencoder of stage one; stage two takes its weights from `autoencoder.weights`.",
    "unet": "The denoiser of stage two.",
    "diffusion": "The schedule, what the UNet predicts, and what the model recommends to who samples from it.",
    "loss": "What is minimised: `gaussian` and `laplace` are of stage one, `diffusion` of stage two.",
    "adversarial": "Stage one: a discriminator beside the likelihood; none by default.",
    "perceptual": "Stage one: a perceptual distance beside the likelihood; none by default.",
    "optimizer": "The optimiser of either stage.",
    "data": "What is trained and validated on.",
    "trainer": "Where and how long: arguments of Lightning's `Trainer`; others are added with `+trainer.name=value`.",
    "logger": "Who is told, besides `metrics.csv`.",
}
# Where neither a remark nor a gloss says it.
MEANINGS = {
    "samples.prompts": "what the sample grids draw",
    "text.weights": "a bundled name, or the path of a checkpoint that holds a tower",
    "autoencoder.latent_channels": "of a latent",
    "diffusion.schedule.name": "how β goes",
    "diffusion.schedule.num_steps": "timesteps",
    "data.train.name": "a set of `ldm.data.emoji_dataset`",
    "data.train.split": "its part",
    "data.validation.name": "likewise",
    "data.validation.split": "likewise",
    "trainer.accelerator": "cpu, gpu",
    "trainer.devices": "of the machine",
    "trainer.precision": "of the computation",
    "trainer.accumulate_grad_batches": "micro-batches an optimiser step",
    "logger.loggers": "Lightning's",
}
HEAD = """\
# Configs, by reference

Written by `python -m tests.tools.configs_reference` from `configs/`; a test sees that it is up to date.

`python train.py` composes one config: `configs/train.yaml`, a file from each group, and an experiment over them. On the
command line

- `unet=sd15` takes another file of a group,
- `unet.num_blocks=2` sets a key that the file has, `+unet.dropout=0.1` adds an argument that it leaves at its default
  (in brackets in the tables),
- `experiment=emoji/autoencoder` takes a set of choices, whose keys may be overridden in turn.

A misspelt key is refused. A run keeps its config as `config.yaml`. A `_target_` names the class or function that is
built, and the keys beside it are its arguments; only those of `ldm` and Lightning's loggers are allowed.
"""


def page() -> str:
    """The page as it should be."""
    main = CONFIGS / "train.yaml"
    defaults = {
        name: value for entry in load(main)["defaults"] if isinstance(entry, dict) for name, value in entry.items()
    }
    known = MEANINGS | remarks(main)  # meanings by key of the whole config
    chosen = ", ".join(f"`{group}={value}`" for group, value in defaults.items())
    parts = [HEAD, "## `train.yaml`\n", opening(main), single(main, known), f"By default: {chosen}.\n"]
    for group in defaults:
        files = sorted((CONFIGS / group).rglob("*.yaml"))
        parts.append(f"## `{group}`\n")
        if group == "experiment":
            for file in files:
                name = file.relative_to(CONFIGS / group).with_suffix("")
                choices = [f"`{key.removeprefix('override /')}={value}`" for entry in load(file).get("defaults", [])
                           for key, value in entry.items()]  # fmt: skip
                parts += [f"### `experiment={name}`\n", opening(file), f"Takes {', '.join(choices)}, and sets\n"]
                parts.append(single(file, known))
        else:
            parts += [ABOUT[group] + "\n", *(f"- `{group}={f.stem}`: {opening(f, one_line=True)}" for f in files), ""]
            parts.append(together(group, files, known))
    prompts = sorted(path.name for path in (CONFIGS / "prompts").glob("*.txt"))
    parts += [
        "## `prompts`\n",
        f"Lists for `sample.py prompts_file=`: {', '.join(f'`configs/prompts/{p}`' for p in prompts)}.",
    ]
    return "\n".join(parts) + "\n"


def load(file: Path) -> dict[str, Any]:
    """A YAML as it stands, nothing composed."""
    loaded: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return loaded


def opening(file: Path, one_line: bool = False) -> str:
    """The remark that a file opens with; commands in it as code."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    if one_line:
        return " ".join(lines)
    return "\n".join(f"    {line}\n" if line.startswith("python ") else line for line in lines) + "\n"


def remarks(file: Path) -> dict[str, str]:
    """Remarks beside keys, by dotted key."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in file.read_text("utf-8").splitlines():
        match = re.match(r"( *)([\w.]+):(.*)$", line)
        if match:
            above = [*above[: len(match[1]) // 2], match[2]]
            remark = re.search(r"\s# (.+)$", match[3])
            if remark:
                found[".".join(above)] = remark[1]
    return found


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; an object of its own, without keys that anybody sets, is one value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("defaults", "_target_"):
            continue
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def targets(node: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``_target_`` by the dotted key that it stands under, with a dot at its end."""
    found = {prefix: node["_target_"]} if "_target_" in node else {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= targets(value, f"{prefix}{key}.")
    return found


def glosses(target: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Of a class or function of ldm: the gloss of each argument, and the defaults of those that have one."""
    if not target.startswith("ldm."):
        return {}, {}
    module, _, name = target.rpartition(".")
    built: Any = getattr(importlib.import_module(module), name)
    written = inspect.isclass(built) and not dataclasses.is_dataclass(built)  # a data class' constructor has no source
    code = inspect.getsource(built.__init__ if written else built)
    found = {key: gloss for key, gloss in re.findall(r"^ {4,8}(\w+): [^#\n]*?,?\s+# (.+)$", code, re.MULTILINE)}
    section = re.search(r"(?:Attributes|Args):\n(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(built) or "", re.DOTALL)
    for key, text in re.findall(r"^ {4}(\w+): ((?:.|\n {5,})+)$", section[1] if section else "", re.MULTILINE):
        found.setdefault(key, re.sub(r"\s+", " ", text).rstrip(".").replace("``", "`"))
    parameters = inspect.signature(built).parameters.values()
    return found, {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def single(file: Path, known: dict[str, str]) -> str:
    """The table of one file over the whole config."""
    meaning = known | remarks(file)
    rows = [[f"`{key}`", shown(value), meaning.get(key, "")] for key, value in leaves(load(file)).items()]
    return table(["key", "value", "meaning"], rows)


def together(group: str, files: list[Path], known: dict[str, str]) -> str:
    """The table of a group: a column a file. What is learnt of its keys is added to ``known``."""
    nodes = [load(file) for file in files]
    values = [leaves(node) for node in nodes]
    meaning = {key.removeprefix(f"{group}."): text for key, text in known.items() if key.startswith(f"{group}.")}
    for file, node in zip(files, nodes, strict=True):
        meaning |= {key: text for key, text in remarks(file).items() if key not in meaning}
        for prefix, target in targets(node).items():
            gloss, defaults = glosses(target)
            meaning |= {prefix + key: text for key, text in gloss.items() if prefix + key not in meaning}
            column = values[nodes.index(node)]
            for key, default in defaults.items():
                nested = any(name.startswith(f"{prefix}{key}.") for name in column)
                if not nested:
                    column.setdefault(prefix + key, (default,))
    keys = list(dict.fromkeys(key for column in values for key in column))
    known |= {f"{group}.{key}": text for key, text in meaning.items()}
    # What no file sets comes last.
    keys.sort(key=lambda key: all(isinstance(column.get(key, ()), tuple) for column in values))
    rows = [[f"`{key}`", *(shown(c[key]) if key in c else "" for c in values), meaning.get(key, "")] for key in keys]
    return table(["key", *(file.stem for file in files), "meaning"], rows)


def shown(value: Any) -> str:
    """A value as it is written in YAML; a default that no file sets, which comes as a tuple of one, in brackets."""
    if isinstance(value, tuple) and len(value) == 1:
        inner = list(value[0]) if isinstance(value[0], tuple) else value[0]
        return f"({shown(inner)})"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"`{entry['_target_'].rpartition('.')[2]}`" for entry in value)
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} of them"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()
    return f"`{text}`" if text != "''" else "``''``"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
