"""Settings from a command line: ``key=value``, and bare arguments to the letter."""

import difflib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][A-Za-z0-9_]*([./@:][A-Za-z0-9_]+)*=")


def configs() -> Path:
    """Where the YAML files are: in the installed package, or at the root of the repository."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def parse(arguments: Sequence[str], defaults: dict[str, Any], texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings ``key=value`` over ``defaults``, and the bare arguments; ``texts`` are kept to the letter.

    Raises:
        ValueError: for a key that is not in ``defaults``.
    """
    settings, bare = dict(defaults), []
    for argument in arguments:
        if not OVERRIDE.match(argument):
            bare.append(argument)
            continue
        key, value = argument.split("=", 1)
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"the settings are {', '.join(defaults)}"
            raise ValueError(f"unknown setting {key}=; {hint} (a prompt that begins so is given as prompt=...)")
        settings[key] = value if key in texts else value_of(key, value)
    return settings, bare


def value_of(key: str, value: str) -> Any:
    """A value as YAML reads it, numbers like 1e-3 included."""
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value}: not a value ({str(error).splitlines()[0]})") from error
    if isinstance(parsed, str):
        try:  # YAML 1.1 takes 1e-3 for text
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def stamp() -> str:
    """Date and time, for the name of a folder."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
