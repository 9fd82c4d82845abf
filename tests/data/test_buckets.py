"""Every step is of one bucket, every sample comes as often as any other, and position p is asked for alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_shards import picture
from torch.utils.data import DataLoader

from ldm.cli import main
from ldm.data import (
    Buckets,
    PositionSampler,
    ShardDataset,
    TrainingSet,
    build_index,
    dataset,
    write_catalogue,
    write_shard,
)
from ldm.data.buckets import check_sizes
from ldm.data.dataset import Index

SIZES = [[32, 32], [24, 40], [40, 24]]
PINNED = [6, 10, 7, 4, 8, 9, 3, 1, 2, 14, 12, 15]
PINNED_LARGE = 1_961_864


@dataclass
class Images:
    """What an order asks of a data set, without the data set."""

    sizes: np.ndarray  # (n, 2)
    shards: tuple[str, ...] = ("a", "b")
    indices_kept: int = 1

    def image_sizes(self) -> np.ndarray:
        return self.sizes


def images(wide: int, square: int, tall: int) -> Images:
    return Images(np.array([[60, 100]] * wide + [[90, 90]] * square + [[100, 60]] * tall, "i4"))


def order(counts: tuple[int, int, int], batch_size: int, seed: int = 0) -> Buckets:
    return Buckets(SIZES, images(*counts), batch_size, seed)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- which bucket it is


def test_an_image_is_of_the_bucket_whose_ratio_is_nearest_in_the_logarithm() -> None:
    drawn = np.random.default_rng(0).integers(1, 4000, (5000, 2))
    sizes = [[512, 512], [384, 640], [640, 384], [448, 576], [256, 1024]]
    buckets = Buckets(sizes, Images(drawn), 4, 0)  # type: ignore[arg-type]
    ratios = np.log(np.array([height / width for height, width in buckets.sizes]))
    distance = np.abs(np.log(drawn[:, 0] / drawn[:, 1])[:, None] - ratios)
    for bucket, members in enumerate(buckets.members):
        assert len(members) > 50
        assert (distance[members].argmin(1) == bucket).all()
    assert sorted(np.concatenate(buckets.members)) == list(range(5000))


def test_an_image_whose_header_cannot_be_read_counts_as_square() -> None:
    buckets = Buckets(SIZES, Images(np.array([[0, 0], [60, 100], [0, 7]])), 1, 0)  # type: ignore[arg-type]
    assert {tuple(size): members.tolist() for size, members in zip(buckets.sizes, buckets.members, strict=True)} == {
        (24, 40): [1], (32, 32): [0, 2], (40, 24): []}  # fmt: skip


def test_the_order_in_which_buckets_are_listed_changes_nothing() -> None:
    forwards, backwards = (Buckets(s, images(7, 30, 9), 4, 0) for s in (SIZES, SIZES[::-1]))  # type: ignore[arg-type]
    assert [forwards.at(p)[0] for p in range(80)] == [backwards.at(p)[0] for p in range(80)]
    assert [forwards[p] for p in range(80)] == [backwards[p] for p in range(80)]


# ------------------------------------------------------------------------------------------------------------ the order

COUNTS = [(40, 100, 60), (7, 30, 9), (1, 50, 3), (0, 11, 0), (2, 1, 2), (64, 64, 64)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 8, 13])
@pytest.mark.parametrize("seed", [0, 9])
def test_every_step_is_of_one_bucket_and_in_as_many_epochs_as_a_batch_has_samples_each_comes_as_often(
    counts: tuple[int, int, int], batch_size: int, seed: int
) -> None:
    buckets, n = order(counts, batch_size, seed), sum(counts)
    drawn = np.array([buckets[p] for p in range(n * batch_size)]).reshape(-1, batch_size)  # (step, row)
    which = np.searchsorted(np.cumsum(counts), drawn, "right")
    assert (which == which[:, :1]).all()
    sizes = [buckets.at(step * batch_size)[0] for step in range(n)]
    assert [buckets.sizes[bucket] for bucket in which[:, 0]] == sizes
    # E n_b / B is a whole number for E = B: nothing waits, and every sample was there B times.
    assert np.bincount(drawn.ravel(), minlength=n).tolist() == [batch_size] * n


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_after_each_epoch_no_sample_came_more_often_and_a_bucket_is_behind_by_less_than_a_batch(
    counts: tuple[int, int, int], batch_size: int
) -> None:
    buckets = order(counts, batch_size, 3)
    for epochs in range(1, 8):
        steps = sum(epochs * count // batch_size for count in counts)
        drawn = np.array([buckets[p] for p in range(steps * batch_size)], int)
        times = np.bincount(drawn, minlength=sum(counts))
        assert times.max(initial=0) <= epochs
        by_bucket = [int(part.sum()) for part in np.split(times, np.cumsum(counts)[:-1])]
        behind = [epochs * count - taken for count, taken in zip(counts, by_bucket, strict=True)]
        assert all(0 <= some < batch_size for some in behind)


def test_any_position_can_be_asked_for_first() -> None:
    kept = order((40, 100, 60), 8, 1)
    forwards = [(kept[p], kept.at(p)[0]) for p in range(1000)]
    assert [(kept[p], kept.at(p)[0]) for p in reversed(range(1000))][::-1] == forwards
    assert [(order((40, 100, 60), 8, 1)[p], kept.at(p)[0]) for p in range(0, 1000, 37)] == forwards[::37]


def test_steps_of_buckets_are_mixed_and_epochs_seeds_and_buckets_differ() -> None:
    batch, n = 4, 1200
    counts, steps = (400, 400, 400), 300

    def taken(seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of every step, and the samples, counted in their bucket."""
        buckets = order(counts, batch, seed)
        drawn = np.array([buckets[p] for p in range(2 * n)])
        return drawn[::batch] // 400, drawn % 400

    which, samples = taken(0)
    changes = (which[1:] != which[:-1]).sum()  # 2/3 of 599 expected
    assert abs(changes - 400) < 58  # five standard deviations
    for other in (which[steps:], taken(1)[0][:steps]):
        assert abs((which[:steps] == other).sum() - 100) < 41  # one in three, likewise
    assert (samples[:n] == taken(1)[1][:n]).mean() < 0.02  # 1/400 expected
    assert (samples[:n] == samples[n:]).mean() < 0.02
    own = [samples[:n].reshape(-1, batch)[which[:steps] == bucket].ravel() for bucket in range(3)]
    assert (own[0] == own[1]).mean() < 0.03  # 1/400 expected: equal buckets do not have one permutation


def test_the_order_does_not_change_with_releases() -> None:
    buckets = order((4, 7, 5), 3, 0)
    assert [buckets[p] for p in range(12)] == PINNED
    many = Images(np.repeat([[60, 100], [90, 90], [100, 60]], 2_000_000, axis=0))
    assert Buckets(SIZES, many, 2048, 42)[123_456_789_012] == PINNED_LARGE  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- items of a training


def members(number: int, size: tuple[int, int]) -> tuple[str, dict[str, bytes]]:
    texts = json.dumps({"captions": [f"one {number}", f"other {number}"]}).encode()
    return f"k{number:02d}", {"webp": picture(number, size=size), "txt": b"x", "json": texts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """19 images in two shards: wide, square, tall, by width and height."""
    shapes = ([(50, 30)] * 5 + [(45, 28)] * 2 + [(40, 40)] * 7 + [(20, 40)] * 5)[::-1]
    for name, part in (("a", range(9)), ("b", range(9, 19))):
        write_shard(tmp_path / f"{name}.tar", [members(i, shapes[i]) for i in part])
    return tmp_path


def training(folder: Path, batch_size: int = 4, **more: str) -> TrainingSet:
    how = {"flip": True, "random_crop": True, **more}
    return TrainingSet(ShardDataset(folder), 5, 32, 32, buckets=SIZES, batch_size=batch_size, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world_size", "accumulation", "workers"), [(1, 1, 0), (2, 1, 0), (1, 4, 2), (2, 2, 0)])
def test_ranks_micro_batches_and_workers_share_out_batches_of_one_size(
    folder: Path, world_size: int, accumulation: int, workers: int
) -> None:
    whole = [training(folder)[p] for p in range(12 * 4)]
    assert {tuple(item["image"].shape[1:]) for item in whole} == {tuple(size) for size in SIZES}
    read: dict[int, tuple] = {}
    for rank in range(world_size):
        sampler = PositionSampler(4, 5, 12, rank, world_size, accumulation)
        for batch in DataLoader(training(folder), sampler.micro, sampler=sampler, num_workers=workers):
            for row, position in enumerate(batch["position"].tolist()):
                read[position] = (batch["key"][row], batch["caption"][row], batch["image"][row])
    assert sorted(read) == list(range(20, 48))
    for position, (key, caption, image) in read.items():
        expected = whole[position]
        assert (key, caption) == (expected["key"], expected["caption"])
        assert image.equal(expected["image"])


def test_a_set_with_a_catalogue_gives_the_same_and_reads_each_index_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [training(folder)[p]["key"] for p in range(40)]
    write_catalogue(folder)
    data, read = ShardDataset(folder), []
    data.indices_kept = 1
    monkeypatch.setattr(dataset, "Index", lambda content, name: read.append(name) or Index(content, name))
    items = TrainingSet(data, 5, 32, 32, buckets=SIZES, batch_size=4)
    assert [items[p]["key"] for p in range(40)] == expected
    assert len(read) == 2


def test_a_subset_has_its_own_sizes(folder: Path) -> None:
    data = ShardDataset(folder)
    chosen = [18, 0, 7]
    assert data.subset(chosen).image_sizes().tolist() == data.image_sizes()[chosen].tolist()
    assert data.image_sizes()[[0, 18]].tolist() == [[40, 20], [30, 50]]


def test_a_bad_sample_is_replaced_by_one_of_its_bucket(folder: Path) -> None:
    raw = bytearray((folder / "b.tar").read_bytes())
    raw[raw.index(b"other 15")] ^= 1
    (folder / "b.tar").write_bytes(raw)
    items = training(folder, on_bad="skip")
    replaced = [item for item in (items[p] for p in range(19 * 8)) if item["substituted"]]
    assert len(replaced) == 8
    wide = {key for key, (height, width) in zip(items.samples.keys, items.samples.image_sizes(), strict=True)
            if height < width}  # fmt: skip
    assert "k15" in wide
    assert {item["key"] for item in replaced} <= wide - {"k15"}
    assert len({item["key"] for item in replaced}) > 1


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "sizes", [[], 5, "ab", [128, 128], [[128]], [[128, 128, 3]], [[128, 100]], [[128, 0]], [[-8, 8]], [[128.0, 128]],
              [[True, 8]], [["128", "128"]], [None], {"128": 128}],
)  # fmt: skip
def test_what_is_no_list_of_sizes_is_refused_in_one_line(sizes: object) -> None:
    with pytest.raises(ValueError, match=r"data\.buckets=.*: the rule is a list of \[height, width\].*multiple") as e:
        check_sizes(sizes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("sizes", [[[64, 64], [64, 64]], [[48, 80], [64, 64], [96, 160]]])
def test_two_buckets_of_one_shape_are_refused(sizes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"data\.buckets=.* two are of one shape"):
        check_sizes(sizes)


def test_a_batch_of_nothing_and_windows_are_refused(folder: Path) -> None:
    write_catalogue(folder)
    with pytest.raises(ValueError, match="batch_size=0: it must be at least 1"):
        training(folder, 0)
    with pytest.raises(ValueError, match=r"data\.window=2 with data\.buckets"):
        training(folder, window=2)  # type: ignore[arg-type]


def test_an_index_without_sizes_still_opens_and_buckets_ask_for_a_new_one(folder: Path) -> None:
    path = folder / "b.tar.index.json"
    index = json.loads(path.read_text())
    for sample in index["samples"]:
        del sample["height"], sample["width"]
    path.write_text(json.dumps(index))
    assert ShardDataset(folder)[18].key == "k18"
    before = ShardDataset(folder).index_hash
    with pytest.raises(ValueError, match=r"b\.tar: its index lacks the sizes of images; .*ldm index"):
        training(folder)
    assert main(["index", str(folder / "b.tar")]) == 0
    assert training(folder)[0]["image"].shape[0] == 3
    assert ShardDataset(folder).index_hash == before  # a run that is resumed knows its data again


def test_an_index_tells_every_images_size_and_0_where_the_header_is_broken(tmp_path: Path) -> None:
    broken = picture(2, "PNG", (30, 20))
    write_shard(tmp_path / "a.tar", [("a", {"webp": picture(1, size=(31, 20)), "txt": b"x"}),
                                     ("b", {"png": broken[:12] + b"\1" * 9 + broken[21:], "txt": b"x"})])  # fmt: skip
    sizes = [(sample["height"], sample["width"]) for sample in build_index(tmp_path / "a.tar")["samples"]]
    assert sizes == [(20, 31), (0, 0)]
    (tmp_path / "a.tar.index.json").unlink()
    assert ShardDataset(tmp_path).image_sizes().tolist() == [[20, 31], [0, 0]]


@pytest.mark.parametrize("height", ["x", [], 10**30, None])
def test_an_index_with_rubbish_for_a_size_is_none(folder: Path, height: object) -> None:
    path = folder / "a.tar.index.json"
    index = json.loads(path.read_text())
    index["samples"][3]["height"] = height
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json: not an index"):
        ShardDataset(folder)
