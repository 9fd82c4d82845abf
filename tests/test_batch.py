"""Pictures of a request: the same however the work is split, stopped or gone on with; never half a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.batch import draw
from ldm.pipeline import LatentDiffusion
from ldm.provenance import read_png
from tests.conftest import tiny_model

PROMPTS = ["a red square", "a green disc", "a blue square"]


def _pixels(folder: Path) -> list[torch.Tensor]:
    paths = sorted(folder.glob("[0-9]*.png"))
    return [torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int() for path in paths]


def test_a_folder_holds_what_sampling_gives(model: LatentDiffusion, tmp_path: Path) -> None:
    drawn = draw(model, PROMPTS, tmp_path, num_images=2, seed=3, batch_size=6, options={"steps": 2})
    whole = model.sample(PROMPTS, num_images=2, seed=3, steps=2)
    assert [path.name for path in drawn.paths] == [f"{i:05d}.png" for i in range(6)]
    for path, image, i in zip(drawn.paths, whole.pil(), range(6), strict=True):
        assert Image.open(path).tobytes() == image.tobytes()
        assert (read_png(path)["seed"], read_png(path)["prompt"]) == (3 + i, whole.prompts[i])
    assert (tmp_path / "grid.png").is_file()


def test_a_stopped_run_goes_on_with_what_is_missing(model: LatentDiffusion, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2}
    calls = []

    def stop(done: float) -> None:
        calls.append(done)
        if done > 4.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, PROMPTS, tmp_path / "a", num_images=2, batch_size=2, options=options, progress=stop)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("[0-9]*.png")}
    assert len(before) == 4
    assert not list((tmp_path / "a").glob(".*.partial"))
    drawn = draw(model, PROMPTS, tmp_path / "a", num_images=2, batch_size=2, options=options)
    assert drawn.fresh == 2
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == at for name, at in before.items())
    draw(model, PROMPTS, tmp_path / "b", num_images=2, batch_size=2, options=options)
    assert all(torch.equal(a, b) for a, b in zip(_pixels(tmp_path / "a"), _pixels(tmp_path / "b"), strict=True))
    assert draw(model, PROMPTS, tmp_path / "a", num_images=2, batch_size=2, options=options).fresh == 0


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"num_images": 2}, {"options": {"steps": 3}}, {"negative_prompt": "a"}]
)
def test_another_requests_folder_is_refused_and_left_alone(
    model: LatentDiffusion, tmp_path: Path, change: dict[str, Any]
) -> None:
    draw(model, PROMPTS, tmp_path, options={"steps": 2})
    before = _pixels(tmp_path)
    with pytest.raises(ValueError, match="another request"):
        draw(model, PROMPTS, tmp_path, **{"options": {"steps": 2}, **change})
    assert all(torch.equal(a, b) for a, b in zip(before, _pixels(tmp_path), strict=True))


def test_pictures_of_unknown_origin_are_not_taken_for_ones_own(model: LatentDiffusion, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "00001.png")
    with pytest.raises(ValueError, match=r"no request\.json"):
        draw(model, PROMPTS, tmp_path, options={"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["00001.png"]


def test_a_killed_run_leaves_whole_pictures_and_goes_on(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "model")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ldm.cli", "sample", "a red square", f"output={out}", f"model={tmp_path}/model",
               "num_images=40", "batch_size=2", "steps=10"]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("[0-9]*.png"))) < 4 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    running.kill()
    _, said = running.communicate()
    there = sorted(out.glob("[0-9]*.png"))
    assert 4 <= len(there) < 40, said.decode()
    assert all(read_png(path)["seed"] == int(path.stem) for path in there)  # each opens, with its capsule
    assert not (out / "grid.png").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{40 - len(there)} pictures" in done.stdout
    assert len(_pixels(out)) == 40


def test_two_processes_draw_the_pictures_of_one(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    common = [f"model={tmp_path / 'model'}", f"prompts_file={tmp_path / 'prompts.txt'}", "num_images=3", "steps=3"]
    for devices, batch in ((1, 8), (2, 2)):
        command = [sys.executable, "-m", "ldm.cli", "sample", *common, f"devices={devices}", f"batch_size={batch}"]
        done = subprocess.run([*command, f"output={tmp_path / str(devices)}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = _pixels(tmp_path / "1"), _pixels(tmp_path / "2")
    assert len(one) == len(two) == 9
    # Kernels for another batch size may round differently: at most one grey level after three steps.
    assert max((a - b).abs().max().item() for a, b in zip(one, two, strict=True)) <= 1
    requests = [json.loads((tmp_path / name / "request.json").read_text()) for name in ("1", "2")]
    assert requests[0] == requests[1]
