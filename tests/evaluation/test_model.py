"""A whole model's report, as `ldm evaluate` writes it, with a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.evaluation import evaluate_model
from ldm.evaluation import model as room
from ldm.evaluation.pairs import PairScorer
from ldm.pipeline import LatentDiffusion


def test_a_report_of_a_model_has_both_splits_its_baselines_and_its_autoencoder(
    model: LatentDiffusion, scorer: PairScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PairScorer", lambda name: scorer)  # fitted once a session
    model.save(tmp_path / "model")
    report = evaluate_model(tmp_path / "model", seeds=1, limit=3, steps=2, guidance_scale=2.0, output=tmp_path / "out")
    assert report == (tmp_path / "out" / "report.md").read_text("utf-8")
    for words in ("heldout_pairs: 3 pairs", "train: 3 pairs", "real images", "dealt out at random", "chance", "PSNR"):
        assert words in report
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert result["heldout_pairs"]["generated"]["num_pictures"] == 3
    assert "ignores_style" not in result["heldout_pairs"]["reference"]
    assert result["autoencoder"]["heldout_pairs"]["num_images"] == 3
    assert len({row["key"] for row in result["train"]["table"]}) == 3
