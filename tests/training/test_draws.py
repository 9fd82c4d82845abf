"""What samples draw: made where they are read, the same whoever reads them."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ldm import randomness
from ldm.data import ShardDataset, TrainingSet
from ldm.diffusion import Objective
from ldm.pipeline import LatentDiffusion
from ldm.training import draws
from ldm.training.cache import CachedSet, Encoding
from ldm.training.data import drawn

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = Objective(timesteps="logit_normal", offset_noise=0.1, input_perturbation=0.1)


def batches(shapes: Path, model: LatentDiffusion, objective: Objective, workers: int, cached: bool) -> list[Any]:
    samples = ShardDataset(shapes)
    items: Any = TrainingSet(samples, 5, 32, 32)
    if cached:
        cache = Encoding(samples, model.autoencoder, model.text_encoder, 32, 32, True).in_memory()
        items = CachedSet(items, cache)
    draw = partial(draws.stage_two, 5, 4, objective, 1000, 0.5)
    return list(DataLoader(items, 6, sampler=range(100, 112), num_workers=workers, collate_fn=partial(drawn, draw)))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "images"])
def test_a_batch_brings_what_its_positions_draw(shapes: Path, model: LatentDiffusion, cached: bool) -> None:
    for batch, first in zip(batches(shapes, model, PLAIN, 0, cached), (100, 106), strict=True):
        z, positions = torch.empty(6, 4, 4, 4), torch.arange(first, first + 6)
        t, eps, added = PLAIN.draw(5, positions, z, 1000)
        assert [torch.equal(batch[k], x) for k, x in (("t", t), ("eps", eps), ("added", added))] == [True] * 3
        assert torch.equal(batch["posterior"], randomness.normals(5, "posterior", positions, z))
        rows = [randomness.uniform(5, "caption dropout", p)[0] < 0.5 for p in positions.tolist()]
        assert batch["dropped"].tolist() == rows


def test_workers_draw_what_one_process_draws(shapes: Path, model: LatentDiffusion) -> None:
    for here, there in zip(*(batches(shapes, model, PLAIN, n, True) for n in (0, 2)), strict=True):
        assert here.keys() == there.keys()
        tensors = [k for k, v in here.items() if isinstance(v, torch.Tensor)]
        assert all(torch.equal(here[k], there[k]) for k in tensors)


def test_contexts_travel_as_long_as_the_longest(shapes: Path, model: LatentDiffusion) -> None:
    batch = batches(shapes, model, PLAIN, 0, True)[0]
    used = batch["context"].any(-1).any(0)
    assert used[-1]  # by one of them at least, and so no longer than it must be
    assert batch["context"].shape[1] == len(used) < 77


def test_what_latents_decide_is_left_to_the_step(shapes: Path, model: LatentDiffusion) -> None:
    assert "eps" not in batches(shapes, model, Objective(immiscible=2), 0, True)[0]


def test_a_process_that_is_started_afresh_can_be_sent_them() -> None:
    draw = partial(drawn, partial(draws.stage_one, 5, 4, True))
    items = [{"image": torch.zeros(3, 16, 24), "position": 7}]
    sent, own = pickle.loads(pickle.dumps(draw))(items), draw(items)
    assert torch.equal(sent["latent_noise"], own["latent_noise"])
    assert (own["latent_noise"].shape, own["level"].shape) == ((1, 4, 2, 3), (1, 1, 1, 1))
