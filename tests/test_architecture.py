"""The rules of the house as tests: who may import whom, how long, how deep, and what is never written.

The checkers below read source with ``ast`` and run nothing. Each takes modules as (name, source) and returns the
breaches as text, so that the second half of the file can feed each a bad source and see it caught.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = ("text", "autoencoder", "unet", "diffusion")
CORE = (*SIBLINGS, "pipeline", "request", "samples", "checkpoint")
AROUND = ("precision", "winograd", "prepack", "safety")  # what a picture can do without
CORE_LINES = 3_000
PACKAGE_LINES = 8_000  # the aim; missed since the house has what issue after issue asked for
PACKAGE_LINES_TODAY = 11_472
DOORS = ("ldm.cli", "train", "sample")

# A room (the second word of a module's name) → the rooms it may import, itself besides. A room missing here has no
# rule yet, and the test says so. `ldm/__init__.py` is the room "".
_MODEL = frozenset({*CORE, *AROUND, "averages", "loading", "convert", "provenance", "randomness"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "randomness": frozenset(),
    "averages": frozenset(),
    **{room: frozenset({"randomness"}) for room in SIBLINGS},
    "provenance": frozenset(),
    "request": frozenset({"autoencoder", "diffusion"}),
    "samples": frozenset({"provenance"}),
    **{room: frozenset() for room in AROUND},
    "pipeline": frozenset({*CORE, *AROUND, "convert", "provenance", "randomness"}),  # convert: to export
    "checkpoint": frozenset({*CORE, "provenance", "randomness"}),
    "batch": frozenset({"pipeline", "samples", "request", "provenance"}),
    **{room: _MODEL for room in ("loading", "convert")},
    "": _MODEL,
    "data": frozenset({"randomness"}),
    "evaluation": frozenset(
        {"text", "autoencoder", "diffusion", "pipeline", "samples", "checkpoint", "loading", "data", "randomness"}
    ),
    "training": _MODEL | {"data", "evaluation"},
    "experiments": _MODEL | {"", "data", "evaluation", "training"},
    "cli": _MODEL | {"", "batch", "data", "evaluation", "training", "experiments"},
}

# An outside library → the rooms (or doors) that alone may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "pytorch_lightning": ("ldm.training",),
    "lightning": ("ldm.training",),
    "wandb": ("ldm.training",),
    "hydra": DOORS,
    "omegaconf": DOORS,
}


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its text, and whether it is a package's ``__init__``."""

    name: str
    source: str
    is_package: bool = False

    @property
    def room(self) -> str:
        """``ldm.unet.layers`` → ``unet``; ``ldm`` itself → the empty string; a door outside ldm → its own name."""
        head, _, rest = self.name.partition(".")
        return rest.split(".")[0] if head == "ldm" else head

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.name)


def modules_of(root: Path) -> list[Module]:
    """All files of ldm/ and the doors at the root."""
    found = []
    for path in sorted((root / "ldm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append(Module(".".join(parts[:-1] if is_package else parts), path.read_text("utf-8"), is_package))
    for door in ("train", "sample"):
        if (root / f"{door}.py").is_file():
            found.append(Module(door, (root / f"{door}.py").read_text("utf-8")))
    return found


def imports(module: Module) -> Iterator[tuple[int, str, str]]:
    """(line, dotted name, name in this file) of all that is imported, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                parts = parts[: len(parts) - node.level + module.is_package]
                base = ".".join([*parts, base] if base else parts)
            # `from ldm import unet` names a room in its second half: each alias counts.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", alias.asname or alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # importlib.import_module("…") and __import__("…") are imports too.
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, ""


def wrong_rooms(modules: list[Module], rooms: frozenset[str] | None = None) -> list[str]:
    """Imports from one room of ldm into another that MAY_IMPORT does not list."""
    known = rooms if rooms is not None else frozenset(m.room for m in modules if m.name.startswith("ldm."))
    breaches = []
    for module in modules:
        if not (module.name == "ldm" or module.name.startswith("ldm.")):
            continue
        if module.room not in MAY_IMPORT:
            breaches.append(f"{module.name}: the room {module.room!r} has no rule: add it to MAY_IMPORT")
            continue
        for line, name, _ in imports(module):
            parts = name.split(".")
            if parts[0] != "ldm":
                continue
            # `from ldm import load` names no room: it is ldm/__init__.py, the room "".
            target = parts[1] if len(parts) > 1 and parts[1] in known else ""
            if target != module.room and target not in MAY_IMPORT[module.room]:
                breaches.append(f"{module.name}:{line} imports {name}, which {module.room or 'ldm'} may not")
    return breaches


def wrong_libraries(modules: list[Module]) -> list[str]:
    """Imports of an outside library outside the rooms of ONLY_IN."""
    breaches = []
    for module in modules:
        for line, name, _ in imports(module):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is not None and not any(module.name == a or module.name.startswith(a + ".") for a in allowed):
                breaches.append(f"{module.name}:{line} imports {name}, allowed in {', '.join(allowed)} only")
    return breaches


def deep_inheritance(modules: list[Module]) -> list[str]:
    """Classes of ldm that derive from a class of ldm, in the same file or imported."""
    breaches = []
    for module in modules:
        # A bare name is ours where this file defines it or takes it from ldm: torch too has a Sampler and a Module.
        ours = {node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
        ours |= {alias for _, name, alias in imports(module) if name.startswith("ldm.")}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases]
                breaches += [
                    f"{module.name}:{node.lineno} class {node.name} derives from ldm's {base}"
                    for base in bases
                    if base in ours or base.startswith("ldm.") or base.split(".")[0] in ours
                ]
    return breaches


def forbidden_words(modules: list[Module]) -> list[str]:
    """hasattr, print outside the command line, ``**kwargs`` in constructors, torch.load without weights_only=True."""
    breaches = []
    for module in modules:
        if not (module.name == "ldm" or module.name.startswith("ldm.")):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                where = f"{module.name}:{node.lineno}"
                if called == "hasattr":
                    breaches.append(f"{where} hasattr(")
                if called == "print" and module.room != "cli":
                    breaches.append(f"{where} print(")
                if called == "torch.load" and not any(
                    k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                    for k in node.keywords
                ):
                    breaches.append(f"{where} torch.load without weights_only=True")
            elif isinstance(node, ast.ClassDef):
                breaches += [
                    f"{module.name}:{f.lineno} {node.name}.__init__ takes **{f.args.kwarg.arg}"
                    for f in node.body
                    if isinstance(f, ast.FunctionDef) and f.name == "__init__" and f.args.kwarg is not None
                ]
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                breaches += [
                    f"{module.name}:{node.lineno} from torch import load: write torch.load, so that it is seen"
                    for alias in node.names
                    if alias.name == "load"
                ]
    return breaches


def lines_of(modules: list[Module], rooms: tuple[str, ...] | None = None) -> int:
    """Lines of ldm, or of the given rooms of it, docstrings and blanks included."""
    chosen = [m for m in modules if m.name == "ldm" or m.name.startswith("ldm.")]
    return sum(len(m.source.splitlines()) for m in chosen if rooms is None or m.room in rooms)


# ----------------------------------------------------------------------------- the package keeps the rules

MODULES = modules_of(ROOT)


def test_rooms_import_only_what_they_may() -> None:
    assert wrong_rooms(MODULES) == []


def test_lightning_wandb_hydra_and_omegaconf_stay_in_their_rooms() -> None:
    assert wrong_libraries(MODULES) == []


def test_no_class_of_ldm_derives_from_another() -> None:
    assert deep_inheritance(MODULES) == []


def test_no_hasattr_print_kwargs_or_unsafe_load() -> None:
    assert forbidden_words(MODULES) == []


def test_the_core_stays_small() -> None:
    assert lines_of(MODULES, CORE) < CORE_LINES


def test_the_package_does_not_grow() -> None:
    assert lines_of(MODULES) < PACKAGE_LINES_TODAY


@pytest.mark.xfail(strict=True, reason="missed: 11,471 lines; becomes an error as soon as it is met")
def test_the_package_is_small() -> None:
    assert lines_of(MODULES) < PACKAGE_LINES


# None in sys.modules: an import fails, and looking whether a package is there (accelerate does) finds none.
_BLOCKED = """
import importlib, sys
names = {"pytorch_lightning", "lightning", "wandb", "hydra", "omegaconf", "webdataset", "torchmetrics"}
sys.modules |= dict.fromkeys(names)
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {name for name, module in sys.modules.items() if module is not None and name.split(".")[0] in names}
assert not loaded, loaded
"""


def test_sampling_imports_without_lightning_wandb_and_hydra() -> None:
    names = ["ldm", *(f"ldm.{room}" for room in CORE)]
    done = subprocess.run([sys.executable, "-c", _BLOCKED, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- and the checkers catch each breach

_ROOMS = frozenset(MAY_IMPORT) - {""}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ldm.unet.layers", "from ldm.text import tokens"),
        ("ldm.unet.layers", "import ldm.diffusion.schedule as s"),
        ("ldm.unet.layers", "from ldm import autoencoder"),
        ("ldm.unet.layers", "from ..text import tokens"),
        ("ldm.unet.layers", "def f():\n    from ldm.pipeline import LatentDiffusion"),
        ("ldm.unet.layers", "import importlib\nimportlib.import_module('ldm.data')"),
        ("ldm.unet.layers", "from ldm import load"),
        ("ldm.data.index", "from ldm.autoencoder import Autoencoder"),
        ("ldm.evaluation.pairs", "from ldm.training import module"),
        ("ldm.training.module", "import ldm.experiments.plan"),
        ("ldm.pipeline", "from ldm.evaluation import report"),
        ("ldm.randomness", "import ldm.text"),
        ("ldm.newroom", "import torch"),
    ],
)
def test_an_import_across_rooms_is_caught(name: str, source: str) -> None:
    assert len(wrong_rooms([Module(name, source)], _ROOMS)) == 1


def test_relative_imports_are_resolved_from_files_and_from_packages() -> None:
    assert wrong_rooms([Module("ldm.unet.layers", "from .attention import A\nfrom . import attention")], _ROOMS) == []
    assert wrong_rooms([Module("ldm.unet", "from .attention import A", is_package=True)], _ROOMS) == []
    assert len(wrong_rooms([Module("ldm.unet", "from ..text import t", is_package=True)], _ROOMS)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ldm.unet.layers", "import pytorch_lightning as pl"),
        ("ldm.evaluation.report", "from wandb import Table"),
        ("ldm.training.module", "from omegaconf import OmegaConf"),
        ("ldm.pipeline", "def f():\n    import hydra.utils"),
        ("ldm.client", "import hydra"),
    ],
)
def test_a_library_out_of_its_room_is_caught(name: str, source: str) -> None:
    assert len(wrong_libraries([Module(name, source)])) == 1


def test_libraries_in_their_rooms_pass() -> None:
    good = [("ldm.training.module", "import wandb"), ("ldm.cli", "import hydra"), ("train", "import hydra")]
    assert wrong_libraries([Module(name, source) for name, source in good]) == []


@pytest.mark.parametrize(
    "source",
    [
        "class A: ...\nclass B(A): ...",
        "class A: ...\nclass B(A[int]): ...",
        "import ldm.unet\nclass B(ldm.unet.UNet): ...",
        "from ldm.unet import UNet as U\nclass B(U): ...",
        "from ldm import unet\nclass B(unet.UNet): ...",
    ],
)
def test_inheritance_within_ldm_is_caught(source: str) -> None:
    assert len(deep_inheritance([Module("ldm.unet.layers", source)])) == 1


def test_a_library_class_of_the_same_name_is_no_inheritance() -> None:
    other = Module("ldm.diffusion.samplers", "class Sampler: ...\nclass Module: ...")
    source = "from torch.utils.data import Sampler\nclass A(Sampler[int]): ...\nclass B(nn.Module): ..."
    assert deep_inheritance([other, Module("ldm.training.data", source)]) == []


@pytest.mark.parametrize(
    "source",
    [
        "hasattr(x, 'y')",
        "print(1)",
        "class A:\n    def __init__(self, **kwargs): ...",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
    ],
)
def test_a_forbidden_word_is_caught(source: str) -> None:
    assert len(forbidden_words([Module("ldm.unet.layers", source)])) == 1


def test_print_is_for_the_command_line() -> None:
    assert forbidden_words([Module("ldm.cli", "print(1)")]) == []
    assert forbidden_words([Module("ldm.unet", "torch.load(p, weights_only=True)")]) == []


def test_lines_count_the_rooms_asked_for() -> None:
    two = [Module("ldm.unet.layers", "a\n\nb\n"), Module("ldm.data.index", "a\n"), Module("train", "a\nb\n")]
    assert lines_of(two, CORE) == 3
    assert lines_of(two) == 4
