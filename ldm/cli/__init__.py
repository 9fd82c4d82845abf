"""The doors: ``ldm``, ``train.py`` and ``sample.py``. Hydra and OmegaConf stop here; what lies behind gets objects."""

import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ldm.cli.ablation import ablate
from ldm.cli.commands import convert, index, pack, sample
from ldm.cli.research import evaluate, reproduce
from ldm.cli.settings import configs
from ldm.cli.training import doctor, plan, precompute, train

Command = Callable[[list[str]], int | None]  # returns the exit code; None is 0

__all__ = ["door", "main", "sample", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """``ldm COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known: tuple[Command, ...] = (
        train, sample, evaluate, ablate, reproduce, doctor, plan, pack, index, precompute, convert,
    )  # fmt: skip
    commands = {command.__name__: command for command in known}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_of("ldm"))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        return _fail(f"unknown command {name!r}; choose one of {', '.join(commands)}")
    return door(commands[name], rest)


def door(command: Command, arguments: list[str]) -> int:
    """Run a command, or print its help; an invalid request is one line on stderr and exit code 2, Ctrl-C is 130."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_of(command.__name__))
        return 0
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    warnings.showwarning = _note  # type: ignore[assignment]
    try:
        return command(arguments) or 0
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        return _fail(_hydra_message(error))
    except (ValueError, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{error or 'stopped'}\n")
        return 130


def help_of(command: str) -> str:
    """What ``--help`` says of a command, or of ``ldm`` itself: a text of ``configs/help``, and the names there are."""
    text = (configs() / "help" / f"{command}.txt").read_text(encoding="utf-8")
    if command == "train":
        root = configs() / "experiment"
        names = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
        rows = textwrap.wrap(" ".join(names), 104, break_on_hyphens=False)
        return text.format(experiments=f"\n{'':14}".join(rows))
    if command == "sample":
        from ldm.diffusion import GRIDS, SAMPLERS
        from ldm.loading import BUNDLED

        names = [*SAMPLERS, "auto"]
        lines = {"samplers_1": " ".join(names[:9]), "samplers_2": " ".join(names[9:])}
        return text.format(models=" ".join(BUNDLED), grids=" ".join(GRIDS), **lines)
    return text


_SHOW = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Our own warnings as a line, without their place in the code."""
    if category.__module__.startswith("ldm."):
        sys.stderr.write(f"note: {message}\n")
    else:
        _SHOW(message, category, *where)


def _fail(message: str) -> int:
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    sys.stderr.write(f"error: {line}\n")
    return 2


def _hydra_message(error: Exception) -> str:
    """Hydra's words, the first sentence, and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(error).split("\n")[0].rstrip(".")
    detail = str(cause).split("\n")[0].rstrip(".")
    return f"{text}{'' if detail in text else f': {detail}'}; see --help, or configs/train.yaml for all settings"
