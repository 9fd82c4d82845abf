"""Nothing that is read is run: configs, shards, pictures, pickles. Each attack has a canary that must not appear."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from PIL import Image

import ldm
from ldm import checkpoint
from ldm.cli import door, main, sample, train
from ldm.cli.settings import configs
from ldm.cli.targets import TARGETS, check_targets
from ldm.data import ShardDataset, build_index, decode_image
from ldm.data.stream import StreamedSet, WebStream
from ldm.pipeline import LatentDiffusion

ROOT = Path(ldm.__file__).parents[1]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path that must not exist at the end."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "something was run"


def small(output: Path, shapes: Path, *more: str) -> list[str]:
    return ["experiment=emoji/autoencoder", "data=shards", f"data.train.paths={shapes}",
            f"data.validation.paths={shapes}", "data.height=32", "data.width=32", "data.batch_size=4",
            "data.num_workers=0", "autoencoder.widths=[32,64]", f"output={output}", "trainer.max_steps=1",
            "validation.images=4", *more]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What a config may name


def yaml_targets() -> set[str]:
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["_target_"]] if "_target_" in node else []
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return {name for file in configs().rglob("*.yaml") for name in walk(yaml.safe_load(file.read_text()))}


def test_the_list_of_targets_is_what_the_configs_use_and_a_logger_more() -> None:
    from hydra.utils import get_object

    assert yaml_targets() | {"pytorch_lightning.loggers.CSVLogger"} == set(TARGETS)
    assert all(isinstance(get_object(name), type) or callable(get_object(name)) for name in TARGETS)


HOSTILE = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "webdataset.gopen",
    "hydra.utils.get_method",
    "pickle.load",
    "ldm.cli.commands.subprocess.run",
    "ldm.data.shards.write_atomically",
    "ldm.data.shards.os.system",
    "ldm.cli.main",
    "pytorch_lightning.loggers.os.system",
    "pytorch_lightning.loggers.csv_logs.os.system",
    "ldm.data.ShardDataset ",
    " ldm.data.ShardDataset",
    "ldm.data.sharddataset",
    "LDM.data.ShardDataset",
    "ldm.data.ShardDataset.__init__",
    "ldm.data.ShardDataset.__class__",
    "${oc.env:EVIL}",
    "",
]


@pytest.mark.parametrize("target", [*HOSTILE, None, 3, ["os.system"], {"a": 1}], ids=str)
@pytest.mark.parametrize("place", ["top", "nested", "list", "list in list"])
def test_a_target_outside_the_list_is_refused_wherever_it_stands(target: Any, place: str) -> None:
    node: Any = {"_target_": target}
    node = {"top": node, "nested": {"a": {"b": node}}, "list": {"a": [1, node]}, "list in list": [[node]]}[place]
    with pytest.raises(ValueError, match="is refused"):
        check_targets(node)


@pytest.mark.parametrize("key", ["_Target_", "_TARGET_", " _target_", "_target_ ", "\t_target_"])
def test_a_key_that_only_looks_like_a_target_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is refused"):
        check_targets({"a": {key: "ldm.data.ShardDataset"}})


def test_users_name_their_own_classes_in_the_environment_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "my.package.Thing"}
    with pytest.raises(ValueError, match=r"LDM_ALLOW_TARGETS=package\.Class"):
        check_targets(node)
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "my.package.Thing, my.Other")
    check_targets([node, {"_target_": "my.Other"}])
    for other in ("my.package.Things", "my.package", "my.package.Thing.run"):
        with pytest.raises(ValueError, match="is refused"):
            check_targets({"_target_": other})


@pytest.mark.parametrize(
    "override",
    [
        "optimizer._target_=os.system",
        "data._target_=ldm.cli.commands.subprocess.run",
        "+data.train.hook={{_target_:os.system,command:'touch {canary}'}}",
        "+logger.loggers=[{{_target_:subprocess.run,args:'touch {canary}',shell:true}}]",
        "logger.loggers=[{{_target_:os.system,command:'touch {canary}'}}]",
        "loss.beta={{_target_:os.system,command:'touch {canary}'}}",
        "loss.beta=${{oc.decode:'{{_target_: os.system, command: touch {canary}}}'}}",
        "loss.beta=${{oc.create:'{{_target_: os.system, command: touch {canary}}}'}}",
        "loss._target_=${{oc.env:EVIL_TARGET}}",
        "loss.beta=${{oc.env:EVIL_NODE}}",
        '+loss.a={{_target_:builtins.exec,_args_:[\'open("{canary}","w")\']}}',
        "+loss._partial_=true",
    ],
)
def test_a_hostile_override_runs_nothing(
    tmp_path: Path, shapes: Path, canary: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("EVIL_TARGET", "os.system")
    # What the environment gives is an interpolation again: it must not be resolved a second time.
    # Of a target that Hydra's own list lets through.
    monkeypatch.setenv("EVIL_NODE", f"${{oc.create:'{{_target_: webdataset.gopen, url: \"pipe:touch {canary}\"}}'}}")
    assert door(train, small(tmp_path / "run", shapes, override.format(canary=canary))) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_hostile_config_of_a_run_is_refused_when_the_run_is_resumed(
    tmp_path: Path, shapes: Path, canary: Path, capsys: Any
) -> None:
    with initialize_config_dir(str(configs()), version_base=None):
        cfg = compose("train", overrides=small(tmp_path / "run", shapes))
    (tmp_path / "run").mkdir()
    saved = tmp_path / "run/config.yaml"
    for text in (
        OmegaConf.to_yaml(cfg).replace("ldm.autoencoder.CalibratedLoss", "os.system"),
        OmegaConf.to_yaml(cfg).replace(str(shapes), f"pipe:touch {canary}"),
        OmegaConf.to_yaml(cfg) + f"\nhook: !!python/object/apply:os.system ['touch {canary}']\n",
    ):
        saved.write_text(text)
        assert door(train, [f"resume={tmp_path / 'run'}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_no_resolver_that_runs_things_is_registered() -> None:
    # Of OmegaConf and Hydra as pinned. A new name here must be read before it is added.
    harmless = {"oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select",
                "hydra", "now", "python_version"}  # fmt: skip
    assert set(BaseContainer._resolvers) <= harmless


def test_settings_of_wandb_that_name_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match="settings beside a _target_"):
        check_targets({"_target_": "pytorch_lightning.loggers.WandbLogger", "settings": {"x_executable": "/tmp/evil"}})


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_secret_of_the_environment_lands_in_no_file(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    secret = "hunter2-hunter2-hunter2"
    monkeypatch.setenv("MY_SECRET", secret)
    more = ["logger.mode=offline", "logger.loggers.0.project=ldm"] if logger == "wandb" else []
    run = tmp_path / "run"
    assert door(train, small(run, shapes, f"logger={logger}", *more, "samples.prompts=['${oc.env:MY_SECRET}']")) == 0
    if logger == "wandb":
        import wandb

        wandb.finish()  # else the next test of this process would go on with this run
    assert "${oc.env:MY_SECRET}" in (run / "config.yaml").read_text()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name if logger == "tensorboard" else path.suffix == ".wandb" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


# --------------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("url", ["pipe:touch {0}", "x.tar::pipe:touch {0}", "PIPE:touch {0}", " pipe:touch {0}",
                                 "file:///{0}", "http:pipe:touch {0}", "https://x/a.tar::pipe:touch {0}"])  # fmt: skip
def test_a_pipe_is_no_shard(canary: Path, tmp_path: Path, shapes: Path, capsys: Any, url: str) -> None:
    url = url.format(canary)
    for paths in (url, [url], ["https://127.0.0.1:1/a.tar", url], Path(url)):
        with pytest.raises(ValueError, match="is refused; the rule is a local path, http"):
            ShardDataset(paths)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is refused"):
            WebStream(paths if isinstance(paths, list) else str(paths))
    for value in (f"data.train.paths='{url}'", f"data.train.paths=['{url}']", f"data.train.urls='{url}'"):
        data = ["data=stream"] if "urls" in value else []
        given = [each for each in small(tmp_path / "run", shapes) if not (data and "train.paths" in each)]
        assert door(train, [*given, *data, value]) == 2
    assert main(["index", url]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert all("is refused" in line for line in said[:3]), said


def bomb(canary: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {canary}",))

    return pickle.dumps(Bomb())


@pytest.mark.parametrize("extension", ["pth", "pyd", "pkl", "pickle", "cbor", "npy", "mp", "gz"])
def test_a_member_that_a_decoder_could_run_is_refused(tmp_path: Path, canary: Path, extension: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a." + extension, bomb(canary)), ("a.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"a\.tar: a\.{extension} has an unknown extension"):
        build_index(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="unknown extension"):
        list(StreamedSet(WebStream(str(tmp_path / "a.tar")), 16, 16, passes=1))


# --------------------------------------------------------------------------------------------------------------------
# Bombs: what the process may grow by, measured in one of its own


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated(size: int) -> bytes:
    """So many zeros, small."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(2**20)) for _ in range(size // 2**20)) + deflate.flush()


def huge_webp() -> bytes:
    """A header of 16383×16383 before nothing."""
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16383 - 1).to_bytes(3, "little")
    body += b"VP8 " + struct.pack("<I", 10) + b"\x30\x01\x00\x9d\x01\x2a\xff\x3f\xff\x3f"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


PICTURES = {
    "169 megapixels": lambda: png(13_000, 13_000, data=deflated(2**24)),
    "2 gigapixels": lambda: png(46_000, 46_000),
    "huge webp": huge_webp,
    "a text of 256 MB": lambda: png(4, 4, chunk(b"zTXt", b"k\0\0" + deflated(2**28)), data=zlib.compress(bytes(52))),
    "many texts": lambda: png(4, 4, *[chunk(b"zTXt", b"k%d\0\0" % i + deflated(2**20)) for i in range(200)]),
    "a profile of 256 MB": lambda: png(4, 4, chunk(b"iCCP", b"k\0\0" + deflated(2**28)), data=zlib.compress(bytes(52))),
    "gzip": lambda: gzip.compress(bytes(2**28), 1),
}


def tar_header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo("a.png")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


TARS = {
    "gzip of a tar": lambda: gzip.compress(tar_header(2**28) + bytes(2**28 + 1024), 1),
    "a header of 8 GB": lambda: tar_header(2**33 - 1) + bytes(2**27),
    "a pax header of 8 GB": lambda: tar_header(2**33 - 1, tarfile.XHDTYPE) + bytes(2**27),
    "a long name of 8 GB": lambda: tar_header(2**33 - 1, tarfile.GNUTYPE_LONGNAME) + bytes(2**27),
    "a sparse file": lambda: tar_header(2**33 - 1, tarfile.GNUTYPE_SPARSE) + bytes(2**27),
    "a negative size": lambda: tar_header(-(2**20)) + bytes(2**27),
    "pixels": lambda: tar_header(len(png(13_000, 13_000))) + png(13_000, 13_000).ljust(512, b"\0") + bytes(1024),
}

# Each attack on its own: the mark of the largest resident size is set back before it.
_MEASURE = """
import sys
from pathlib import Path
from ldm.data import build_index, decode_image
from ldm.data.stream import StreamedSet, WebStream
def size(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
doors = {
    "picture": lambda path: decode_image(path.read_bytes(), "bomb"),
    "index": build_index,
    "stream": lambda path: list(StreamedSet(WebStream(str(path)), 16, 16, passes=1)),
}
for line in sys.stdin:
    door, path = line.split()
    Path("/proc/self/clear_refs").write_text("5")
    before = size("VmRSS")
    try:
        doors[door](Path(path))
        outcome = "accepted"
    except ValueError:
        outcome = "refused"
    print(outcome, size("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, float]]:
    """By door and attack: what became of it, and by how many MB a process of its own grew meanwhile."""
    folder, asked = tmp_path_factory.mktemp("bombs"), []
    for kinds, doors in ((PICTURES, ("picture",)), (TARS, ("index", "stream"))):
        for number, (kind, make) in enumerate(kinds.items()):
            path = folder / f"{doors[0]}{number}"
            path.write_bytes(make())
            asked += [(door, kind, path) for door in doors]
    lines = "".join(f"{door} {path}\n" for door, _, path in asked)
    done = subprocess.run([sys.executable, "-c", _MEASURE], cwd=ROOT, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [(outcome, float(megabytes)) for outcome, megabytes in map(str.split, done.stdout.splitlines())]
    return {(door, kind): result for (door, kind, _), result in zip(asked, found, strict=True)}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_bomb_is_refused_and_takes_less_than_100_megabytes(
    grown: dict[tuple[str, str], tuple[str, float]], kind: str
) -> None:
    outcome, megabytes = grown["picture", kind]
    assert outcome == "refused"
    assert megabytes < 100


@pytest.mark.parametrize("kind", TARS)
@pytest.mark.parametrize("door", ["index", "stream"])
def test_a_tar_bomb_is_refused_and_takes_less_than_100_megabytes(
    grown: dict[tuple[str, str], tuple[str, float]], door: str, kind: str
) -> None:
    outcome, megabytes = grown[door, kind]
    assert outcome == "refused"
    assert megabytes < 100


def test_a_picture_after_the_bombs_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).size == (5, 4)


# --------------------------------------------------------------------------------------------------------------------
# Pickles


@pytest.fixture
def hostile(tmp_path: Path, canary: Path) -> Path:
    """A file as torch.save writes it, whose pickle runs a command."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {canary}",))

    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "evil": Bomb()}, path)
    return path


@pytest.fixture(params=["as it is", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as it is":
        monkeypatch.setenv(request.param, "1")


@pytest.fixture
def served(hostile: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the hostile file on a real server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(hostile.parent))

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hostile.ckpt", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("where", ["file", "http"])
@pytest.mark.parametrize("setting", ["model", "init", "resume", "autoencoder.weights", "text.weights"])
def test_a_hostile_checkpoint_is_refused_by_every_setting_that_takes_one(
    tmp_path: Path, hostile: Path, served: tuple[str, list[str]], capsys: Any, where: str, setting: str
) -> None:
    path = str(hostile) if where == "file" else served[0]
    out = tmp_path / "out"
    if setting == "model":
        code = door(sample, ["a red apple", f"model={path}", "steps=1", f"output={out}"])
    else:
        experiment = [] if setting == "resume" else ["experiment=emoji/diffusion", "cache=false", f"output={out}"]
        code = door(train, [*experiment, f"{setting}={path}"])
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert served[1] == []
    assert not (out / "checkpoints").exists()


@pytest.mark.usefixtures("environment")
def test_a_hostile_pickle_is_named_by_convert_and_not_run(tmp_path: Path, hostile: Path, capsys: Any) -> None:
    assert main(["convert", str(hostile), str(tmp_path / "out")]) == 2
    assert "system" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("environment")
def test_a_hostile_training_state_whose_hashes_fit_is_refused_and_an_honest_one_is_read(
    tmp_path: Path, model: LatentDiffusion, hostile: Path
) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, model.contents(), {"optimizer": [torch.arange(3.0)], "step": 7})
    assert checkpoint.read_state(folder)["step"] == 7
    data = hostile.read_bytes()
    (folder / "state.pt").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoint._describe(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(folder)
    with pytest.raises(ValueError, match=r"state\.pt is refused, and nothing in it was run: .*system") as caught:
        checkpoint.read_state(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("where", ["file", "http"])
def test_lightnings_own_loading_is_refused(hostile: Path, served: tuple[str, list[str]], where: str) -> None:
    from ldm.training.autoencoder import AutoencoderTraining
    from ldm.training.data import DataModule
    from ldm.training.diffusion import DiffusionTraining

    for kind in (AutoencoderTraining, DiffusionTraining, DataModule):
        with pytest.raises(ValueError, match=rf"{kind.__name__}.*use ldm\.load"):
            kind.load_from_checkpoint(str(hostile) if where == "file" else served[0])
    assert served[1] == []
