"""Folders and tables become shards, all of it or nothing."""

import csv
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_shards import picture

from ldm.data import ShardDataset, decode_image
from ldm.data.pack import pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a b.webp", "a_b.jpg", "sub/v1.2.png"]):
        form = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[name.rpartition(".")[2]]
        (root / name).write_bytes(picture(number, form))
        (root / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    return root


def test_a_folder_comes_back_whole(folder: Path, tmp_path: Path) -> None:
    shards = pack(folder, tmp_path / "out")
    data = ShardDataset(tmp_path / "out")
    assert shards == [tmp_path / "out/00000.tar"]
    assert sorted(s.caption for s in (data[i] for i in range(4))) == sorted(
        f"caption of {name}" for name in ["b.png", "a b.webp", "a_b.jpg", "sub/v1.2.png"]
    )
    by_caption = {data[i].caption: data[i].image for i in range(4)}
    assert by_caption["caption of b.png"] == (folder / "b.png").read_bytes()


def test_keys_are_safe_sorted_and_unique(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out")
    assert ShardDataset(tmp_path / "out").keys == ["a_b", "a_b-2", "b", "sub_v1_2"]


def test_shards_are_cut_by_size_and_images_reduced(folder: Path, tmp_path: Path) -> None:
    assert len(pack(folder, tmp_path / "out", size=8, shard_bytes=1)) == 4
    data = ShardDataset(tmp_path / "out")
    assert {decode_image(data[i].image).size for i in range(4)} == {(12, 8)}


def test_a_csv_and_a_parquet_with_paths_or_bytes_come_back(folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "b.png", "caption": "one, two"}, {"image": "a_b.jpg", "caption": 'a "quoted" one'}]
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
    raw = [{"image": {"bytes": (folder / r["image"]).read_bytes(), "path": None}, "text": r["caption"]} for r in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), folder / "raw.parquet")
    hashes = set()
    for name in ("t.csv", "t.parquet", "raw.parquet"):
        pack(folder / name, tmp_path / name)
        data = ShardDataset(tmp_path / name)
        assert [data[0].caption, data[1].caption] == ["one, two", 'a "quoted" one']
        hashes.add(data.index_hash)
    assert len(hashes) == 1


def broken_image(folder: Path) -> Path:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:100])
    return folder


def missing_caption(folder: Path) -> Path:
    (folder / "b.txt").unlink()
    return folder


def empty_caption(folder: Path) -> Path:
    (folder / "b.txt").write_text(" \n")
    return folder


def unread_format(folder: Path) -> Path:
    Image.new("RGB", (2, 2)).save(folder / "b.gif")
    (folder / "b.png").unlink()
    return folder


def missing_file(folder: Path) -> Path:
    (folder / "t.csv").write_text("image,caption\na_b.jpg,x\nb.png2,y\n")
    return folder / "t.csv"


@pytest.mark.parametrize("spoil", [broken_image, missing_caption, empty_caption, unread_format, missing_file])
def test_what_cannot_be_packed_is_named_and_nothing_is_left(folder: Path, tmp_path: Path, spoil: object) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"b\.(png|gif)"):
        pack(spoil(folder), tmp_path / "out")  # type: ignore[operator]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_columns_sources_and_targets_are_checked(folder: Path, tmp_path: Path) -> None:
    (folder / "t.csv").write_text("picture,caption\nb.png,x\n")
    with pytest.raises(ValueError, match="picture, caption"):
        pack(folder / "t.csv", tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        pack(folder, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        pack(tmp_path / "empty", tmp_path / "out")
