"""A bad sample has the same substitute whether images or cached latents are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data import BadSample, FixedSet, ShardDataset, TrainingSet, write_shard
from ldm.pipeline import LatentDiffusion
from ldm.training.cache import CachedSet, Encoding, LatentCache
from ldm.training.data import DataModule


@pytest.fixture
def spoilt(shapes: Path, tmp_path: Path) -> ShardDataset:
    """The shapes, two of them cut in the middle of the picture."""
    whole = ShardDataset(shapes)
    members = []
    for number in range(len(whole)):
        sample = whole[number]
        image = sample.image[:100] if number in (3, 10) else sample.image
        members.append((sample.key, {"png": image, "txt": sample.caption.encode()}))
    write_shard(tmp_path / "spoilt.tar", members)
    return ShardDataset(tmp_path / "spoilt.tar")


@pytest.fixture(params=["memory", "folder"])
def cache(request: pytest.FixtureRequest, spoilt: ShardDataset, model: LatentDiffusion, tmp_path: Path) -> LatentCache:
    made = Encoding(spoilt, model.autoencoder, model.text_encoder, 32, 32, True, "skip")
    if request.param == "memory":
        return made.in_memory()
    made.write(tmp_path / "cache")
    return made.open(tmp_path / "cache")


def test_the_cache_substitutes_as_images_do(spoilt: ShardDataset, model: LatentDiffusion, cache: LatentCache) -> None:
    for live in (TrainingSet(spoilt, 5, 32, 32, flip=True, on_bad="skip"), FixedSet(spoilt, 32, 32, "skip")):
        cached = CachedSet(live, cache)
        substituted = 0
        for position in range(24):
            image, latent = live[position], cached[position]
            for name in ("key", "position", "substituted"):
                assert image[name] == latent[name]
            posterior = model.autoencoder.posterior(image["image"][None])
            torch.testing.assert_close(latent["moments"][0], posterior.mean[0], rtol=1e-4, atol=1e-5)  # another batch
            expected = model.text_encoder([image["caption"]])[0]
            own = expected[: len(latent["context"])]
            assert not expected[len(own) :].any()
            torch.testing.assert_close(latent["context"], own, rtol=1e-4, atol=1e-5)  # another batch
            substituted += image["substituted"]
        assert substituted == 2


def test_a_training_that_skips_nothing_ends_at_what_the_cache_skipped(spoilt: ShardDataset, cache: LatentCache) -> None:
    strict = CachedSet(FixedSet(spoilt, 32, 32), cache)
    assert strict[2]["key"] == "0002"
    with pytest.raises(BadSample, match="0003 could not be read when the cache was made"):
        strict[3]


def test_under_error_the_cache_is_not_made(spoilt: ShardDataset, model: LatentDiffusion) -> None:
    with pytest.raises(BadSample, match="0003"):
        Encoding(spoilt, model.autoencoder, model.text_encoder, 32, 32, False).in_memory()


def test_the_data_module_passes_policy_and_count_on(spoilt: ShardDataset) -> None:
    data = DataModule(spoilt, spoilt, 32, 32, 4, on_bad="skip")
    data.prepare(seed=0)
    for items in (data.train_set, data.validation_set):
        assert items is not None
        batches = list(DataLoader(items, batch_size=4, sampler=range(24)))  # type: ignore[arg-type]
        assert sum(int(batch["substituted"].sum()) for batch in batches) == 2
