"""A training item is a pure function of (seed, position); ranks share every batch out exactly."""

import json
from pathlib import Path

import pytest
import torch
from test_shards import picture
from torch.utils.data import DataLoader

from ldm.data import FixedSet, PositionSampler, ShardDataset, TrainingSet, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> ShardDataset:
    write_shard(
        tmp_path / "a.tar",
        [
            (
                f"k{i}",
                {
                    "webp": picture(i, size=(30, 20)),
                    "txt": b"first",
                    "json": json.dumps({"captions": ["first", "second", "third"]}).encode(),
                },
            )
            for i in range(5)
        ],
    )
    return ShardDataset(tmp_path)


def training(shards: ShardDataset, seed: int = 0) -> TrainingSet:
    return TrainingSet(shards, seed=seed, height=16, width=16, flip=True, random_crop=True)


def same(a: dict, b: dict) -> bool:
    return a["key"] == b["key"] and a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])


def test_an_item_has_the_promised_form(shards: ShardDataset) -> None:
    item = training(shards)[7]
    assert (item["image"].shape, item["image"].dtype, item["position"]) == ((3, 16, 16), torch.float32, 7)
    assert item["image"].min() >= -1
    assert item["image"].max() <= 1


def test_an_item_depends_on_seed_and_position_alone(shards: ShardDataset) -> None:
    forwards = [training(shards)[p] for p in range(12)]
    backwards = [training(shards)[p] for p in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    other = [training(shards, seed=1)[p] for p in range(12)]
    assert not all(same(a, b) for a, b in zip(forwards, other, strict=True))


def test_an_epoch_shows_every_sample_once(shards: ShardDataset) -> None:
    keys = [training(shards)[p]["key"] for p in range(15)]
    assert all(sorted(keys[e : e + 5]) == shards.keys for e in (0, 5, 10))


def test_variants_flips_and_crops_all_occur(shards: ShardDataset) -> None:
    data = training(shards)
    choices = [data.choose(p, 3) for p in range(600)]
    for variant in range(3):
        assert abs(sum(c.variant == variant for c in choices) - 200) < 60  # five standard deviations
    assert abs(sum(c.flip for c in choices) - 300) < 62
    assert {0, 9} == {int(10 * edge(c.crop[1] for c in choices)) for edge in (min, max)}


def test_without_flip_and_random_crop_an_item_is_the_fixed_one(shards: ShardDataset) -> None:
    item = TrainingSet(shards, seed=0, height=16, width=16)[0]
    fixed = FixedSet(shards, 16, 16)[shards.keys.index(item["key"])]
    assert torch.equal(item["image"], fixed["image"])


def test_the_fixed_set_is_in_order_with_first_captions(shards: ShardDataset) -> None:
    fixed = FixedSet(shards, 16, 16)
    assert [fixed[i]["key"] for i in range(len(fixed))] == shards.keys
    assert {fixed[i]["caption"] for i in range(len(fixed))} == {"first"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_goes_on_as_if_never_stopped(shards: ShardDataset, num_workers: int) -> None:
    def keys(start: int) -> list[tuple]:
        loader = DataLoader(
            training(shards), batch_size=4, sampler=PositionSampler(4, start, 6), num_workers=num_workers
        )
        return [(b["key"], b["caption"], b["image"].sum().item()) for b in loader]

    assert keys(3) == keys(0)[3:]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3)])
def test_ranks_and_micro_batches_share_out_every_batch_exactly(world_size: int, accumulation: int) -> None:
    samplers = [PositionSampler(12, 2, 5, rank, world_size, accumulation) for rank in range(world_size)]
    positions = [list(sampler) for sampler in samplers]
    share = 12 // world_size
    assert all(len(p) == 3 * share for p in positions)
    assert all(len(sampler) == 5 * share for sampler in samplers)  # counted from step 0
    for step in range(3):
        batch = [p for each in positions for p in each[step * share : (step + 1) * share]]
        assert sorted(batch) == list(range((2 + step) * 12, (3 + step) * 12))


def test_a_batch_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        PositionSampler(32, 0, 1, 0, 3, 2)
