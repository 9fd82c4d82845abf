"""The documents hold: links lead somewhere, commands parse, worked examples apply and run, pages are up to date."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ldm.cli
from ldm.cli import door, main, sample, train
from ldm.cli.training import compose
from ldm.diffusion import GRIDS, SAMPLERS
from ldm.request import RESIZE
from tests.tools import configs_reference

ROOT = Path(ldm.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def outside_fences(text: str) -> str:
    """A page without its code blocks, so that nothing in them is taken for a link or a heading."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page: small letters, blanks to hyphens, signs left out."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#{1,6} (.+)$", outside_fences(page.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if i == 0 else f"{name}-{i}" for name, last in found.items() for i in range(last + 1)}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(text, target) of the links and pictures of a page."""
    yield from re.findall(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", outside_fences(page.read_text("utf-8")))


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    broken = []
    for _, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def test_names_that_link_to_source_are_defined_there() -> None:
    missing = []
    for page in PAGES:
        for text, target in links(page):
            if target.endswith(".py") and re.fullmatch(r"`[\w.]+`", text) and not text.endswith(".py`"):
                name = text.strip("`").rpartition(".")[2]
                source = (page.parent / target).read_text("utf-8")
                if not re.search(rf"^\s*(def|class) {name}\b|^{name}\b", source, re.MULTILINE):
                    missing.append(f"{page.name}: {text} in {target}")
    assert missing == []


def test_a_broken_anchor_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# One, `two`: *three*\n\n## Same\n\n## Same\n\n```\n# no heading\n[no](link)\n```\n\n[x](b.md#c)\n"
    )
    assert anchors(page) == {"one-two-three", "same", "same-1"}
    assert list(links(page)) == [("x", "b.md#c")]


# ------------------------------------------------------------------------------------------------------------ commands

DOORS = {"sample.py": sample, "train.py": train}
COMMAND = re.compile(
    r"(?:\.venv/bin/)?(?:python (sample\.py|train\.py|-m [\w.]+)|(ldm|pytest|make)(?= ))(.*)", re.DOTALL
)


def commands(page: Path) -> Iterator[str]:
    """Command lines of a page: lines of its code blocks, and what stands in backticks; continued lines are joined."""
    text = page.read_text("utf-8")
    text = re.sub(r"^```diff.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^```(?!\n?diff)\w*\n(.*?)^```$", joined, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^ {4,}(.+)$", joined, re.MULTILINE)]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", joined, flags=re.MULTILINE | re.DOTALL))
    for line in [*lines, *(re.sub(r"\s+", " ", span) for span in spans)]:
        if COMMAND.match(line):
            yield line


ALL = list(dict.fromkeys((str(page.relative_to(ROOT)), line) for page in PAGES for line in commands(page)))


class ParsedError(BaseException):
    """Carries what a command understood, and ends it there: past every ``except Exception``."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command ends once it has read its arguments."""
    from ldm.cli.settings import parse

    def parsed(*given: Any) -> Any:
        raise ParsedError(*parse(*given))

    def composed(arguments: list[str]) -> Any:
        raise ParsedError(*compose(arguments))

    for found in pkgutil.iter_modules(ldm.cli.__path__, "ldm.cli."):  # wherever a command may have taken it
        if not found.name.endswith("__main__") and vars(importlib.import_module(found.name)).get("parse") is parse:
            monkeypatch.setattr(f"{found.name}.parse", parsed)
    monkeypatch.setattr("ldm.cli.training.compose", composed)
    monkeypatch.chdir(tmp_path)


def check(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Raise AssertionError unless a command line is one that the program takes."""
    match = COMMAND.match(line)
    assert match is not None
    script, tool, rest = match.groups()
    # A remark ends a line after two blanks; "[key=value …]" and "…" stand for more of the same.
    rest = re.split(r"\s{2,}|\s#", rest.strip())[0]
    arguments = [a for a in shlex.split(re.sub(r"\[(\w+=[^\[\]]*)\]|…", r"\1", rest)) if a != "key=value"]
    if script and script.startswith("-m"):
        assert importlib.util.find_spec(script.removeprefix("-m ")), f"no module {script}"
    elif tool == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [a for a in arguments if "=" not in a and a not in targets] == [], "no such target"
    elif tool == "pytest":
        assert all((ROOT / a).exists() for a in arguments if a.startswith("tests")), "no such test"
    elif "--help" in arguments or len(arguments) < (2 if tool else 1):  # no more than its name
        assert (main([*arguments[:1], "--help"]) if tool else door(DOORS[script], ["--help"])) == 0
    else:
        try:
            code = main(arguments) if tool else door(DOORS[script], arguments)
        except ParsedError as parsed:
            settings, bare = parsed.args
            if "sampler" in settings:
                assert settings["sampler"] in (*SAMPLERS, "auto", "ab2"), "no such sampler"
            if "resize" in settings:
                assert settings["grid"] in (None, *GRIDS)
                assert settings["resize"] in RESIZE
                assert bare or settings["prompt"] or settings["prompts_file"], "no prompt"
            elif tool and arguments[0] in ("pack", "convert"):
                assert len(bare) == 2, "not two paths"
        else:
            error = capsys.readouterr().err
            assert code == 2, "it ran"
            assert re.search("no run there|no shard at", error), error  # the files of the example are not here


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}: {line[:60]}" for page, line in ALL])
def test_every_command_line_shown_is_one_that_the_program_takes(
    page: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    added = ("huber=", "data=shapes", "text=t5")  # what the worked examples add, and their own tests run
    if page == "docs/extending.md" and any(word in line for word in added):
        pytest.skip("a setting of a worked example")
    check(line, capsys)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(
    "line",
    [
        'python sample.py "a cat" stepps=3',
        'python sample.py "a cat" sampler=best',
        "python sample.py steps=3",
        "python train.py experiment=nothing",
        "python train.py trainer.max_stepps=3",
        "ldm pack one_path",
        "ldm paint a.png",
        "make nothing",
        "python -m tests.benchmarks.nothing",
    ],
)
def test_a_command_line_that_is_wrong_would_be_seen(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check(line, capsys)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(("target", "commands"), [("train-emoji", 2), ("bundle", 6)])
def test_what_make_trains_by_are_command_lines_that_the_program_takes(
    target: str, commands: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make = ["make", "-n", "-o", ".venv/.installed", "-C", str(ROOT), "PY=python", "ARGS=seed=1", target]
    lines = [line for line in subprocess.check_output(make, text=True).splitlines() if line.startswith("python ")]
    assert len(lines) == commands
    for line in lines:
        check(line, capsys)


def test_enough_command_lines_are_found() -> None:
    assert sum(page == "README.md" for page, _ in ALL) > 15
    assert {"sample.py", "train.py", "ldm", "make", "pytest"} <= {
        word for _, line in ALL for word in re.split(r"[ /]", line)
    }


# ------------------------------------------------------------------------------------------------------------- configs


def test_the_reference_of_the_configs_is_up_to_date() -> None:
    page = ROOT / "docs" / "configs.md"
    assert page.read_text("utf-8") == configs_reference.page(), "run: python -m tests.tools.configs_reference"


# ----------------------------------------------------------------------------------------------------- worked examples


def examples() -> list[str]:
    """The diffs of docs/extending.md."""
    return re.findall(
        r"^```diff\n(.*?)^```$", (ROOT / "docs/extending.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def apply(diff: str, root: Path) -> list[Path]:
    """Apply a diff to a tree; each hunk's old text must stand in its file exactly once. Returns the files."""
    touched = []
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        old, new, *hunks = re.split(r"\n\+\+\+ b/|^@@.*\n", part, flags=re.MULTILINE)
        path = root / new.strip()
        text = "" if old.strip() == "/dev/null" else path.read_text("utf-8")
        assert old.strip() != "/dev/null" or not path.exists(), f"{path} is there already"
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            if old.strip() == "/dev/null":
                text = after
            else:
                assert text.count(before) == 1, f"{new.strip()} has {text.count(before)} times:\n{before}"
                text = text.replace(before, after)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        touched.append(path)
    return touched


def copy_of_the_tree(target: Path) -> None:
    """What is needed to run tests: the assets, which are large, by a link."""
    leave = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("ldm", "configs", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=leave)
    for name in ("pyproject.toml", "train.py", "sample.py"):
        shutil.copy(ROOT / name, target / name)
    (target / "ldm/assets").symlink_to(ROOT / "ldm/assets")


def test_worked_examples_apply_alone_and_together_and_their_tests_pass(tmp_path: Path) -> None:
    diffs = examples()
    assert len(diffs) == 4
    copy_of_the_tree(tmp_path / "tree")
    for number, diff in enumerate(diffs):  # alone
        files = re.findall(r"^--- a/(.+)$", diff, re.MULTILINE)
        for file in files:
            (tmp_path / str(number) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / str(number) / file)
        apply(diff, tmp_path / str(number))
    changed = list(itertools.chain.from_iterable(apply(diff, tmp_path / "tree") for diff in diffs))
    tests = sorted({str(path) for path in changed if path.name.startswith("test_")})
    run = [sys.executable, "-m"]
    where: dict[str, Any] = {"cwd": tmp_path / "tree", "capture_output": True, "text": True}
    python = [str(path) for path in changed if path.suffix == ".py"]
    lint = subprocess.run([*run, "ruff", "check", *python], check=False, **where)
    assert lint.returncode == 0, lint.stdout
    # The line limit of the package is not theirs to keep.
    keep = "ab2 or test_huber or test_shapes or test_t5 or unknown_family or test_rooms or test_no_"
    done = subprocess.run(
        [*run, "pytest", "-q", "-p", "no:cacheprovider", "-k", keep, *tests, "tests/test_architecture.py"],
        check=False, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, **where,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 18, done.stdout  # none of them was left out by the choice above


def test_a_diff_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(AssertionError, match=r"a\.py has 0 times"):
        apply("--- a/a.py\n+++ b/a.py\n@@\n-y = 1\n+y = 2\n", tmp_path)
    apply("--- a/a.py\n+++ b/a.py\n@@\n x = 1\n+y = 2\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 2\n"
