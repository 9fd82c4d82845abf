"""A training item is a pure function of (seed, position); ranks share every batch out exactly."""

import json
from pathlib import Path

import pytest
import torch
from test_shards import picture
from torch.utils.data import DataLoader

from ldm.data import BadSample, FixedSet, PositionSampler, ShardDataset, TrainingSet, write_shard


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


# --------------------------------------------------------------------------------------------------------------------
# Five shards on two ranks, and bad samples


@pytest.mark.parametrize("num_workers", [0, 1])
def test_five_shards_of_unequal_size_give_two_ranks_equal_steps(tmp_path: Path, num_workers: int) -> None:
    start = 0
    for number, count in enumerate([3, 1, 4, 2, 1]):
        members = [(f"k{i:02d}", {"webp": picture(i), "txt": b"x"}) for i in range(start, start + count)]
        write_shard(tmp_path / f"{number}.tar", members)
        start += count
    loaders = [
        DataLoader(
            TrainingSet(ShardDataset(tmp_path), 0, 16, 16),
            batch_size=2,
            sampler=PositionSampler(4, 0, 11, rank, 2),
            num_workers=num_workers,
        )
        for rank in range(2)
    ]
    batches = [[batch["key"] for batch in loader] for loader in loaders]
    assert len(batches[0]) == len(batches[1]) == 11
    seen = [key for step in zip(*batches, strict=True) for keys in step for key in keys]
    assert all(sorted(seen[e : e + 11]) == sorted(set(seen)) for e in range(0, 44, 11))  # four whole epochs


@pytest.fixture
def spoilt(tmp_path: Path) -> ShardDataset:
    """Twelve samples, of which k02 and k07 do not decode and k09 has a bit flipped on the disk."""
    members = []
    for i in range(12):
        image = picture(i, "PNG")
        if i in (2, 7):
            image = image[:200] + b"\1" * (len(image) - 200)
        members.append((f"k{i:02d}", {"png": image, "txt": f"caption {i}".encode()}))
    write_shard(tmp_path / "a.tar", members)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[raw.index(b"caption 9")] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    return ShardDataset(tmp_path)


BAD = {"k02", "k07", "k09"}


def test_under_error_a_bad_sample_ends_the_reading_by_name(spoilt: ShardDataset) -> None:
    items = TrainingSet(spoilt, 0, 16, 16)
    ends = {}
    for position in range(12):
        try:
            ends[items[position]["key"]] = None
        except BadSample as error:
            ends[next(key for key in BAD if key in str(error))] = str(error)
    assert {key for key, error in ends.items() if error} == BAD
    assert "a.tar" in (ends["k09"] or "")


def test_under_skip_a_substitute_stands_in_the_same_however_it_is_read(spoilt: ShardDataset) -> None:
    def read(order: list[int]) -> list[tuple]:
        items = TrainingSet(spoilt, 0, 16, 16, flip=True, on_bad="skip")
        found = {p: items[p] for p in order}
        return [(found[p]["key"], found[p]["caption"], found[p]["substituted"], found[p]["position"],
                 found[p]["image"].sum().item()) for p in sorted(order)]  # fmt: skip

    forwards = read(list(range(36)))
    assert read(list(reversed(range(36)))) == forwards
    plain = TrainingSet(spoilt, 0, 16, 16).order
    for position, (key, _, substituted, at, _) in enumerate(forwards):
        own = spoilt.keys[plain[position]]
        assert at == position
        assert (key == own, substituted) == ((False, 1) if own in BAD else (True, 0))
        assert key not in BAD
    assert sum(substituted for _, _, substituted, _, _ in forwards) == 9
    loader = DataLoader(TrainingSet(spoilt, 0, 16, 16, on_bad="skip"), sampler=PositionSampler(4, 0, 9), batch_size=4,
                        num_workers=2)  # fmt: skip
    assert [key for batch in loader for key in batch["key"]] == [key for key, *_ in forwards]


def test_other_seeds_draw_other_substitutes(spoilt: ShardDataset) -> None:
    def stand_ins(seed: int) -> list[list[int]]:
        return [TrainingSet(spoilt, seed, 16, 16, on_bad="skip").candidates(p)[1:] for p in range(40)]

    assert stand_ins(0) != stand_ins(1)
    assert stand_ins(0) == stand_ins(0)


def test_the_fixed_set_substitutes_too(spoilt: ShardDataset) -> None:
    fixed = FixedSet(spoilt, 16, 16, on_bad="skip")
    items = [fixed[i] for i in range(12)]
    assert [item["substituted"] for item in items] == [int(key in BAD) for key in spoilt.keys]
    assert not {item["key"] for item in items} & BAD
    with pytest.raises(BadSample):
        FixedSet(spoilt, 16, 16)[2]


def test_where_everything_is_bad_a_few_tries_end_in_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(f"k{i}", {"webp": picture(i)[:60], "txt": b"x"}) for i in range(3)])
    with pytest.raises(BadSample, match="4 samples in a row cannot be read, the first: k"):
        TrainingSet(ShardDataset(tmp_path), 0, 16, 16, on_bad="skip")[0]


def test_an_unknown_policy_is_refused(shards: ShardDataset) -> None:
    with pytest.raises(ValueError, match=r"data\.on_bad=ignore is unknown; choose one of error, skip"):
        TrainingSet(shards, 0, 16, 16, on_bad="ignore")[0]


def test_a_missing_file_is_no_bad_sample(spoilt: ShardDataset, tmp_path: Path) -> None:
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError):
        TrainingSet(spoilt, 0, 16, 16, on_bad="skip")[0]
