"""The doors: ``ldm``, ``train.py`` and ``sample.py``. Hydra and OmegaConf stop here; what lies behind gets objects."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

from ldm.cli.commands import convert, index, pack, sample
from ldm.cli.help import MAIN_HELP
from ldm.cli.research import evaluate, reproduce
from ldm.cli.training import train

__all__ = ["door", "main", "sample", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """``ldm COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "sample": sample,
        "evaluate": evaluate,
        "reproduce": reproduce,
        "pack": pack,
        "index": index,
        "convert": convert,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(MAIN_HELP)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        return _fail(f"unknown command {name!r}; choose one of {', '.join(commands)}")
    return door(commands[name], rest)


def door(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; an invalid request becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        command(arguments)
        return 0
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(_hydra_message(error))
    except (ValueError, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{error or 'stopped'}\n")
        return 130


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
