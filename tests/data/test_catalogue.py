"""Very large sets: a catalogue opens them without their indices, and windows keep few of those in memory."""

import json
from pathlib import Path

import pytest
from test_shards import picture, samples, tar_of

from ldm.cli import main
from ldm.data import BadSample, ShardDataset, TrainingSet, write_catalogue, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (start, count) in enumerate([(0, 4), (4, 2), (6, 5), (11, 1), (12, 3)]):
        write_shard(tmp_path / f"{number}.tar", samples(count, start))
    return tmp_path


def plain(folder: Path) -> ShardDataset:
    return ShardDataset(sorted(folder.glob("*.tar")))


def test_a_catalogue_lists_every_shard_with_its_count_and_hash(folder: Path) -> None:
    written = write_catalogue(folder)
    rows = json.loads(written.read_text())["shards"]
    assert [(name, count) for name, count, _ in rows] == [("0.tar", 4), ("1.tar", 2), ("2.tar", 5), ("3.tar", 1),
                                                        ("4.tar", 3)]  # fmt: skip
    assert len({digest for _, _, digest in rows}) == 5


def test_the_samples_are_those_of_the_shards_in_order(folder: Path) -> None:
    expected = [plain(folder)[i] for i in range(15)]
    write_catalogue(folder)
    data = ShardDataset(folder)
    assert data.counts == [4, 2, 5, 1, 3]
    assert [data[i] for i in reversed(range(15))][::-1] == expected
    assert data.keys == [sample.key for sample in expected]
    with pytest.raises(IndexError):
        data[15]


def test_opening_reads_no_index(folder: Path) -> None:
    write_catalogue(folder)
    for path in folder.glob("*.index.json"):
        path.rename(path.with_suffix(".away"))
    data = ShardDataset(folder)
    assert (len(data), len(data.index_hash)) == (15, 64)


def test_only_the_last_indices_are_kept(folder: Path) -> None:
    write_catalogue(folder)
    data = ShardDataset(folder)
    data.indices_kept = 2
    for number in (0, 4, 6, 11, 0, 14):
        data[number]
    assert list(data._indices) == [0, 4]


def test_keys_choose_samples_of_a_set_with_a_catalogue_too(folder: Path) -> None:
    expected = plain(folder)
    write_catalogue(folder)
    data = ShardDataset(folder, keys=["key012", "key003"])
    assert data.keys == ["key003", "key012"]
    assert data.index_hash == ShardDataset(expected.shards, keys=["key003", "key012"]).index_hash


def test_a_subset_is_what_its_numbers_say(folder: Path) -> None:
    write_catalogue(folder)
    for whole in (ShardDataset(folder), plain(folder)):
        part = whole.subset([13, 2])
        assert [part[0], part[1]] == [whole[13], whole[2]]
        assert part.keys == ["key013", "key002"]
        assert len(whole) == 15
        assert part.index_hash not in (whole.index_hash, whole.subset([2]).index_hash)


def test_the_hash_of_a_catalogue_follows_content_and_not_the_place(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_catalogue(folder)
    first = ShardDataset(folder).index_hash
    moved = tmp_path_factory.mktemp("moved") / "set"
    folder.rename(moved)
    assert ShardDataset(moved).index_hash == first
    changed = samples(2, 4)
    changed[0][1]["txt"] = b"another"
    write_shard(moved / "1.tar", changed)
    write_catalogue(moved)
    assert ShardDataset(moved).index_hash != first


def test_a_shard_that_changed_after_the_catalogue_is_refused_when_it_is_met(folder: Path) -> None:
    write_catalogue(folder)
    changed = samples(2, 4)
    changed[0][1]["txt"] = b"another"
    write_shard(folder / "1.tar", changed)
    data = ShardDataset(folder)
    assert data[0].key == "key000"
    with pytest.raises(ValueError, match=r"1\.tar\.index\.json is not the index that catalogue\.json lists; run") as e:
        TrainingSet(data.subset([4]), 0, 16, 16, on_bad="skip")[0]
    assert not isinstance(e.value, BadSample)


def test_a_catalogue_of_other_shards_than_are_there_is_refused(folder: Path) -> None:
    write_catalogue(folder)
    write_shard(folder / "5.tar", samples(1, 50))
    with pytest.raises(ValueError, match="lists other shards"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    "content",
    ["{", '{"format": 9, "shards": []}', "[]", '{"format": 1, "shards": [["../x.tar", 3, "00"]]}',
     '{"format": 1, "shards": [["a.tar", 0, "00"]]}', '{"format": 1, "shards": [["a.tar"]]}'],
)  # fmt: skip
def test_what_is_no_catalogue_is_refused(folder: Path, content: str) -> None:
    (folder / "catalogue.json").write_text(content)
    with pytest.raises(ValueError, match=r"catalogue\.json: not a catalogue"):
        ShardDataset(folder)


def test_a_key_in_two_shards_is_found_when_the_catalogue_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(4))
    write_shard(tmp_path / "b.tar", samples(2, 3))
    with pytest.raises(ValueError, match=r"key003 is in .*a\.tar and .*b\.tar"):
        write_catalogue(tmp_path)
    assert not (tmp_path / "catalogue.json").exists()


def test_shards_whose_keys_interleave_are_no_fault(tmp_path: Path) -> None:
    whole = samples(6)
    write_shard(tmp_path / "a.tar", whole[::2])
    write_shard(tmp_path / "b.tar", whole[1::2])
    write_catalogue(tmp_path)
    assert ShardDataset(tmp_path).keys == [f"key{i:03d}" for i in (0, 2, 4, 1, 3, 5)]


def test_a_training_set_by_windows_shows_every_sample_once_an_epoch(folder: Path) -> None:
    write_catalogue(folder)
    data = ShardDataset(folder)
    items = TrainingSet(data, 3, 16, 16, window=2)
    keys = [items[p]["key"] for p in range(30)]
    assert all(sorted(keys[e : e + 15]) == data.keys for e in (0, 15))
    assert TrainingSet(ShardDataset(folder), 3, 16, 16, window=2)[17]["key"] == keys[17]
    assert data.indices_kept >= 4


def test_windows_need_a_catalogue(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.window=2 needs .*ldm index FOLDER"):
        TrainingSet(plain(folder), 3, 16, 16, window=2)


# --------------------------------------------------------------------------------------------------------------------
# ldm index


def test_the_command_indexes_a_folder_and_says_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "a.tar", samples(3))
    write_shard(tmp_path / "b.tar", samples(2, 3))
    expected = ShardDataset(tmp_path).keys
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert main(["index", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}/a.tar.index.json: 3 samples", f"{tmp_path}/b.tar.index.json: 2 samples",
                    f"{tmp_path}/catalogue.json: the list of them"]  # fmt: skip
    assert ShardDataset(tmp_path).counts == [3, 2]
    assert ShardDataset(tmp_path).keys == expected


def test_a_damaged_shard_leaves_no_catalogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", samples(3))
    write_shard(tmp_path / "b.tar", samples(2, 3))
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1500])
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "b.tar: cut" in error
    assert not (tmp_path / "catalogue.json").exists()


def test_samples_without_a_caption_are_refused_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [("a.webp", picture(0)), ("a.txt", b"x"), ("b.webp", picture(1)), ("c.txt", b" \n"),
               ("c.webp", picture(2)), ("d.webp", picture(3)), ("d.txt", b"y")]  # fmt: skip
    tar = tar_of(tmp_path / "a.tar", members)
    assert main(["index", str(tar)]) == 2
    assert "a.tar: sample b has no caption" in capsys.readouterr().err
    assert not (tmp_path / "a.tar.index.json").exists()
    assert main(["index", str(tar), "skip=true"]) == 0
    assert "2 samples; 2 without a caption left out, the first is b" in capsys.readouterr().out
    assert ShardDataset(tar).keys == ["a", "d"]


@pytest.mark.parametrize("arguments", [[], ["skip=true"], ["x.tar", "skip=perhaps"], ["x.tar", "skp=true"], ["pipe:x"]])
def test_bad_requests_of_index_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
