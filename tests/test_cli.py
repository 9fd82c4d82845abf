from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import ldm
from ldm.cli import door, main, sample, train
from ldm.cli.settings import configs, parse
from ldm.cli.targets import check_targets
from ldm.pipeline import LatentDiffusion
from ldm.provenance import read_png
from tests.conftest import tiny_model

ROOT = Path(ldm.__file__).parents[1]


@pytest.fixture
def saved(model: LatentDiffusion, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "prompt",
    [
        "a red square",
        "50% = half",
        "=",
        "x =1 has a blank before its equals sign",
        "{curly} [square] $HOME ${oc.env:HOME} 'single' \"double\" \\ back, comma; semi: colon",
        "line one\nline two",
        "ein Äpfelchen 林檎 🍎",
        "-- --flag",
        "1=2",
    ],
)
def test_a_bare_prompt_reaches_the_model_to_the_letter(saved: Path, tmp_path: Path, prompt: str) -> None:
    out = tmp_path / "out"
    assert door(sample, [prompt, f"model={saved}", "steps=1", f"output={out}"]) == 0
    assert read_png(out / "00000.png")["prompt"] == prompt


def test_prompt_settings_and_files_are_to_the_letter_too(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("steps=3\n\n[a, b]: c\n", encoding="utf-8")
    given = ["first", "prompt=seed=4", "negative_prompt=[not, a, list] 1e3", f"prompts_file={tmp_path / 'prompts.txt'}"]
    assert door(sample, [*given, f"model={saved}", "steps=1", f"output={tmp_path / 'out'}"]) == 0
    capsules = read_png(tmp_path / "out/grid.png")["images"]
    assert [c["prompt"] for c in capsules] == ["first", "seed=4", "steps=3", "[a, b]: c"]
    assert capsules[0]["negative_prompt"] == "[not, a, list] 1e3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeed=3"], "did you mean seed=?"),
        (["foo.bar=3"], "unknown setting foo.bar="),
        (["+steps=3"], "unknown setting +steps="),
        (["~steps=3"], "unknown setting ~steps="),
        (["sampler=dimm"], "choose one of"),
        (["grid=none"], "choose one of"),
        (["steps=0"], "from 1 to 1000"),
        (["steps=1001"], "from 1 to 1000"),
        (["steps=many"], "from 1 to 1000"),
        (["steps=", "sampler=auto", "grid=karras"], "chooses the grid itself"),
        (["guidance_scale=nan"], "guidance_scale=nan"),
        (["guidance_scale=-1"], "guidance_scale=-1"),
        (["guidance_scale=1", "negative_prompt=blurry"], "would ignore the negative prompt"),
        (["height=500"], "the nearest are 496 and 504"),
        (["height=0"], "at least 8"),
        (["seed=[1,2]"], "2 seeds for 1 images"),
        (["seed=x"], "a whole number"),
        (["num_images=0"], "num_images=0"),
        (["batch_size=0"], "batch_size=0"),
        (["model=nowhere"], "no model at nowhere"),
        (["weights=best"], "choose ema or raw"),
        (["prompts_file=nowhere.txt"], "no prompts file at"),
        (["eta=[1"], "not a value"),
        (["device=tpu9"], "choose cpu"),
        (["device=cuda:99"], "device=cuda:99"),
    ],
)
def test_bad_requests_of_sample_end_with_2_one_line_and_no_file(
    saved: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    code = door(sample, ["a red square", f"model={saved}", "steps=1", f"output={out}", *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_no_prompt_and_an_empty_prompt_file_are_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert door(sample, []) == 2
    assert "no prompt came" in capsys.readouterr().err
    assert door(sample, [f"prompts_file={tmp_path / 'empty.txt'}"]) == 2
    assert "holds no prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fooo=3"], "fooo"),
        (["trainer.max_step=3"], "max_step"),
        (["experiment=nothing"], "nothing"),
        (["unet=huge"], "huge"),
        (["a bare word"], "is no setting"),
        (["resume=nowhere"], "no run there"),
        (["optimizer.learning_rate=0"], "above 0"),
        (["optimizer.decay=step"], "choose constant"),
        (["data.batch_size=0", "data=emoji200"], "batch_size=0"),
        (["diffusion.prediction=noise", "cache=false"], "choose one of"),
        (["caption_dropout=1.5", "cache=false"], "0 <= rate < 1"),
        (["autoencoder.weights=nowhere"], "no model at nowhere"),
        (["init=nowhere", "cache=false"], "no model at nowhere"),
        (["data=shards", "data.train.paths=nowhere", "data.validation.paths=nowhere"], "no shard at"),
        (["init=emoji", "cache=false"], "init=emoji has another unet: widths [128, 192, 224], here [64, 128, 256]"),
        (["experiment=emoji/autoencoder", "init=emoji"], "give its size, which is autoencoder=emoji"),
        (["data=shards"], "data.train.paths"),
        (["optimizer._target_=os.system"], "is refused"),
        (["checkpoint.every=0"], "at least 1"),
        (["ema_decay=1", "cache=false"], "0 <= decay < 1"),
        (["guard.active_units=2", "cache=false"], "active_units in [0, 1]"),
        (["stage=both"], "choose autoencoder or diffusion"),
        (["trainer=gpu", "trainer.devices=99"], "trainer.devices=99 of accelerator gpu: torch sees"),
        (["caption_dropout=some"], "caption_dropout=some must be a number"),
        (["lora.rank=[2]"], "lora.rank=[2] must be a number"),
        (["ema.power=0.05"], "ema.power=0.05 must be a list in brackets"),
        (["lora.rank=2.5", "init=emoji", "unet=emoji", "cache=false"], "a whole rank of 1 or more"),
        (["trainer.accelerator=quantum", "cache=false"], "quantum"),
    ],
)
def test_bad_requests_of_train_end_with_2_one_line_and_no_file(
    tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    code = door(train, [f"output={out}", "trainer.max_steps=1", *arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (out / "checkpoints").exists()


def test_an_output_that_holds_a_run_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert door(train, [f"output={tmp_path}"]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_help_fits_on_a_screen_and_lists_what_there_is(program: str) -> None:
    text = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    expected = ["emoji/autoencoder", "emoji/diffusion"] if program == "train.py" else ["ddim", "ddpm", "emoji", "seed"]
    assert all(word in text for word in expected)


def test_unknown_commands_and_help(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert main(["smaple"]) == 2
    assert "unknown command" in capsys.readouterr().err
    for command in ("evaluate", "pack", "index"):
        assert main([command, "--help"]) == 0


def test_index_of_a_missing_or_cut_shard_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["index", str(tmp_path / "no.tar")]) == 2
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    assert main(["index", str(tmp_path / "cut.tar")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "cut.tar" in error


def test_values_are_read_as_yaml_and_texts_are_not() -> None:
    settings, bare = parse(
        ["seed=[1, 2]", "name=[1]", "word", "eta=1e-3"], {"seed": 0, "name": "", "eta": 0.0}, ("name",)
    )
    assert settings == {"seed": [1, 2], "name": "[1]", "eta": 0.001}
    assert bare == ["word"]


# Ablations are settings of a command, not a group: tests/test_ablate.py.
FILES = sorted(path.relative_to(configs()) for path in configs().rglob("*.yaml") if path.parent.name != "ablation")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_is_used_and_what_it_names_is_built(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    group, name = str(file.parent), file.stem
    override = [] if group == "." else [f"{group.split('/')[0]}={'/'.join(file.with_suffix('').parts[1:])}"]
    with initialize_config_dir(str(configs()), version_base=None):
        cfg = compose("train", overrides=[*override, "output=somewhere"])
    check_targets(OmegaConf.to_container(cfg))
    assert (configs() / file).read_text().startswith("#"), "a config opens with what it is"
    if group == "perceptual":
        assert instantiate(cfg[group], _convert_="all").weight == 1.0
    elif group in ("autoencoder", "unet", "loss", "optimizer"):
        settings = {key: value for key, value in cfg[group].items() if key != "weights"}
        with torch.device("meta"):
            built = instantiate(settings, _convert_="all")
        sizes = {("unet", "sd15"): 859_520_964, ("autoencoder", "sd"): 83_653_863}
        if (group, name) in sizes:
            assert sum(p.numel() for p in built.parameters()) == sizes[group, name]
    elif group == "diffusion":
        assert len(instantiate(cfg.diffusion.schedule).alpha_bar) == 1000
    elif group == "data" and name not in ("shards", "stream"):
        size = {"emoji48": 179, "emoji200": 731, "emoji": 5969, "emoji_mixed": 10_560, "emoji200_mixed": 11_481}
        assert len(instantiate(cfg.data, _convert_="all").train) == size[name]
    elif group == "trainer":
        import pytorch_lightning as pl

        from ldm.training.run import _strategy
        from ldm.training.speed import Layout, resolve_precision

        settings = OmegaConf.to_container(cfg.trainer)  # type: ignore[assignment]
        settings["precision"] = resolve_precision(settings["precision"], "cpu")
        Layout.of(settings)
        pl.Trainer(
            **{
                **_strategy(settings),
                "accelerator": "cpu",
                "devices": 1,
                "num_nodes": 1,
                "logger": False,
                "enable_checkpointing": False,
            }
        )
    elif group == "logger":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        for logger in cfg.logger.loggers:
            instantiate(logger)


def test_every_key_of_the_main_config_has_its_comment() -> None:
    for line in (configs() / "train.yaml").read_text().splitlines():
        if line and line[0] not in "# " and line not in ("defaults:", "checkpoint:", "validation:", "samples:"):
            assert "#" in line, line
    assert yaml.safe_load((configs() / "train.yaml").read_text())["seed"] == 0


def test_a_config_may_not_name_what_is_not_ours() -> None:
    for target in ("os.system", "torch.load", "builtins.eval", "webdataset.gopen", "ldmx.evil"):
        with pytest.raises(ValueError, match="is refused"):
            check_targets({"a": [{"_target_": target}]})


def test_sampling_needs_neither_a_clone_nor_the_current_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "model")
    command = [sys.executable, "-m", "ldm.cli", "sample", "a red square", "model=model", "steps=1", "output=out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out/00000.png").is_file()
