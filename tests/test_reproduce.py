"""A picture made again from its file, on a batch of another size; and files that anybody may have written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ldm
from ldm.cli import main, research
from ldm.pipeline import LatentDiffusion
from ldm.provenance import CHUNK, environment, open_png, read_png
from tests.conftest import tiny_model

PROMPTS = ["a red square", "a green disc", "blue", "a, style"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reproduce") / "model"
    tiny_model().save(path)
    return path


@pytest.fixture(scope="module")
def picture(saved: Path) -> Path:
    """The third of a batch of four."""
    folder = saved.parent / "pictures"
    ldm.load(saved).sample(PROMPTS, "green", steps=3, seed=5, sampler="dpmpp_2m_sde").save(folder)
    return folder / "00002.png"


def rewritten(path: Path, target: Path, **changes: Any) -> Path:
    """The same picture with other settings in its file; a value of ... takes a key away."""
    capsule, pixels = open_png(path)
    capsule = {key: value for key, value in {**capsule, **changes}.items() if value is not ...}
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(capsule))
    pixels.save(target, pnginfo=info)
    return target


def test_a_picture_of_a_batch_is_reproduced_from_its_file_alone(picture: Path, capsys: Any, monkeypatch: Any) -> None:
    assert read_png(picture)["batch"] == [2, 4]
    monkeypatch.setattr(research, "_source", lambda digest: str(picture.parents[1] / "model"))
    assert main(["reproduce", str(picture)]) == 0
    assert capsys.readouterr().out.startswith(f"bit-identical: {picture}, drawn ")


def test_where_rounding_hangs_on_the_batch_the_batch_is_made_again(
    saved: Path, picture: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    plain = LatentDiffusion.sample

    def rounding(self: LatentDiffusion, prompt: list[str], *args: Any, **options: Any) -> Any:
        """Kernels that round otherwise for one picture than for four."""
        out = plain(self, prompt, *args, **options)
        if options.get("precision") is None:  # else it has called itself
            return out
        sizes.append(len(prompt))
        if len(prompt) == 1:
            out.images[0, 0, 0, 0] += 0.1
        return out

    monkeypatch.setattr(LatentDiffusion, "sample", rounding)
    assert main(["reproduce", str(picture), f"model={saved}"]) == 0
    assert sizes == [1, 4]
    assert "bit-identical" in capsys.readouterr().out


def test_a_model_is_found_by_its_hash(
    saved: Path, picture: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", str(picture)]) == 2
    assert re.search(r"no model of hash '[0-9a-f]{16}' is bundled or under outputs/", capsys.readouterr().err)
    run = tmp_path / "outputs/run/checkpoints/step-00000001"
    run.parent.mkdir(parents=True)
    shutil.copytree(saved, run)
    assert main(["reproduce", str(picture), "output=again"]) == 0
    assert "bit-identical" in capsys.readouterr().out
    assert read_png(tmp_path / "again/00000.png")["prompt"] == PROMPTS[2]


def test_what_differs_is_named_and_measured(model: LatentDiffusion, picture: Path, tmp_path: Path, capsys: Any) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias += 0.5
    model.save(tmp_path / "other")
    older = rewritten(picture, tmp_path / "older.png", versions={"ldm": "0.0.1", "torch": "1.0"})
    assert main(["reproduce", str(older), f"model={tmp_path / 'other'}"]) == 0
    said = capsys.readouterr().out
    assert re.match(
        r"differs: [\d,]+ of 1,024 pixels, at most \d+ of 255, \d+\.\d dB PSNR, drawn in a batch of 4", said
    )
    assert "  versions torch: 1.0 then, " in said
    assert "  versions ldm: 0.0.1 then, " in said
    assert re.search(r"  model: [0-9a-f]{16} then, [0-9a-f]{16} now", said)
    assert "machine cpu" not in said  # it is the same


def test_a_picture_made_from_another_asks_for_it(saved: Path, tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    ldm.load(saved).sample("blue", init_image=tmp_path / "red.png", steps=4, strength=0.5).save(tmp_path / "out")
    made = str(tmp_path / "out/00000.png")
    assert main(["reproduce", made, f"model={saved}"]) == 2
    assert "not in it; give init_image=FILE" in capsys.readouterr().err
    assert main(["reproduce", made, f"model={saved}", f"init_image={tmp_path / 'red.png'}"]) == 0
    assert "bit-identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ...}, "prompt is 'None'"),
        ({"prompt": ["a", "b"]}, "settings are damaged (prompt is"),
        ({"seed": True}, "seed is 'True'"),
        ({"seed": 1e300}, "settings are damaged (seed is"),
        ({"steps": 10**9}, "from 1 to 1000"),
        ({"steps": "5"}, "steps is '5'"),
        ({"height": 1 << 40, "width": 1 << 40}, "has 32×32 pixels, its settings say"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_interval": [900, 100]}, "low <= high"),
        ({"guidance_interval": {"a": 1}}, "guidance_interval is"),
        ({"sampler": "__import__"}, "choose one of"),
        ({"grid": "../../etc/passwd"}, "choose one of"),
        ({"precision": "int3"}, "choose one of"),
        ({"resize": "evil"}, "choose one of"),
        ({"safety": "given"}, "which cannot be called from here"),
        ({"safety": "rm"}, "choose nsfw"),
        ({"init_image": "/dev/zero"}, "not in it; give init_image=FILE"),
        ({"latents": "given"}, "was made with latents"),
        ({"callback": "x"}, "was made with callback"),
        ({"tile": -3}, "tile"),
    ],
)
def test_hostile_settings_end_with_2_and_one_line(
    saved: Path, picture: Path, tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    bad = rewritten(picture, tmp_path / "bad.png", **changes)
    assert main(["reproduce", str(bad), f"model={saved}", f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch", [[0, 10**9], [5, 4], [-1, 4], ["0", "4"], "all", [True, 2], None])
def test_a_hostile_batch_is_drawn_alone(saved: Path, picture: Path, tmp_path: Path, capsys: Any, batch: Any) -> None:
    bad = rewritten(picture, tmp_path / "bad.png", batch=batch, model="0" * 16)
    assert main(["reproduce", str(bad), f"model={saved}"]) == 0
    assert "drawn alone" in capsys.readouterr().out


def test_what_is_no_picture_of_ours_ends_with_2_and_one_line(picture: Path, tmp_path: Path, capsys: Any) -> None:
    plain, jpeg, text, cut, deep = (tmp_path / n for n in ("plain.png", "a.jpg", "a.txt", "cut.png", "deep.png"))
    Image.new("RGB", (8, 8)).save(plain)
    Image.new("RGB", (8, 8)).save(jpeg)
    text.write_text("x")
    cut.write_bytes(picture.read_bytes()[:-400])
    info = PngInfo()
    info.add_itxt(CHUNK, "[" * 100_000)
    Image.new("RGB", (8, 8)).save(deep, pnginfo=info)
    for path, message in ((plain, "carries no settings"), (jpeg, "cannot be read as a PNG"), (text, "as a PNG"),
                          (cut, "as a PNG"), (deep, "as a PNG"), (tmp_path / "none.png", "no picture at"),
                          (picture.parent / "grid.png", "sheet of several")):  # fmt: skip
        assert main(["reproduce", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert main(["reproduce"]) == 2
    assert "0 pictures came" in capsys.readouterr().err
    assert main(["reproduce", str(picture), "modle=x"]) == 2
    assert main(["reproduce", "--help"]) == 0


def test_the_environment_is_plain_and_names_no_person_host_or_folder() -> None:
    import getpass
    import socket

    text = json.dumps(environment())
    assert json.loads(text) == environment()
    assert environment()["versions"]["torch"] == torch.__version__
    git = environment()["git"]
    assert git is None or (re.fullmatch("[0-9a-f]{40}", git["commit"]) and isinstance(git["dirty"], bool))
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), f'"{getpass.getuser()}"'):
        assert private not in text
