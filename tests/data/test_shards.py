"""Shards: what is written is read, and whatever is damaged says so."""

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from ldm.cli import main
from ldm.data import ShardDataset, build_index, write_shard


def picture(number: int, form: str = "WEBP", size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def samples(count: int, start: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"key{i:03d}", {"webp": picture(i), "txt": f"caption {i}".encode(), "json": json.dumps({"n": i}).encode()})
        for i in range(start, start + count)
    ]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "a.tar", samples(6))
    return tmp_path / "a.tar"


def test_what_is_written_is_read(shard: Path) -> None:
    data = ShardDataset(shard)
    assert len(data) == 6
    assert data.keys == [f"key{i:03d}" for i in range(6)]
    assert (data[4].key, data[4].image, data[4].caption, data[4].meta) == ("key004", picture(4), "caption 4", {"n": 4})


def test_tarfile_and_webdataset_read_our_shards(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 18
    stream = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    assert [sample["__key__"] for sample in stream] == ShardDataset(shard).keys


def test_the_same_samples_give_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", samples(6))
    assert shard.read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_index_names_the_place_and_hash_of_every_member(shard: Path) -> None:
    index = json.loads(shard.with_name("a.tar.index.json").read_text())
    raw = shard.read_bytes()
    assert (index["size"], index["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    for sample in index["samples"]:
        for offset, size, digest in sample["members"].values():
            assert hashlib.sha256(raw[offset : offset + size]).hexdigest() == digest


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key000"):
        write_shard(tmp_path / "a.tar", [*samples(1, 1), *samples(1)])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_replaces_the_old_one_only_when_whole(shard: Path) -> None:
    before = shard.read_bytes()
    with pytest.raises(ValueError, match="dot"):
        write_shard(shard, [("a.b", {"webp": picture(0), "txt": b"x"})])
    assert shard.read_bytes() == before
    assert ShardDataset(shard)[0].caption == "caption 0"


def test_a_tar_by_webdatasets_own_writer_is_indexed(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "webp": picture(0), "txt": "x"})
    assert ShardDataset(tmp_path)[0].image == picture(0)


def test_a_folder_as_img2dataset_leaves_it_is_indexed_and_read_as_it_is(tmp_path: Path) -> None:
    about = {"url": "https://host/a.jpg", "status": "success", "width": 48, "height": 32, "exif": "{}", "sha256": "00"}
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as tar:
            for row in range(3):
                key = f"{shard:05d}{row:04d}"
                written = {**about, "key": key, "caption": f"caption {key}"}
                data = {"jpg": picture(row, "JPEG", (48, 32)), "txt": f"caption {key}", "json": json.dumps(written)}
                tar.write({"__key__": key, **data})
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 3, "successes": 3}')
    assert main(["index", str(tmp_path)]) == 0
    found = ShardDataset(tmp_path)
    assert [sample.caption for sample in (found[i] for i in range(6))] == [f"caption {key}" for key in found.keys]
    assert found[4].meta["url"] == "https://host/a.jpg"
    assert found.image_sizes().tolist() == [[32, 48]] * 6


# --------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("extension", ["webp", "txt", "json"])
def test_zeroed_content_is_not_indexed(tmp_path: Path, extension: str) -> None:
    members = {"webp": picture(0), "txt": b"x", "json": b"{}"}
    tar = tar_of(tmp_path / "a.tar", [(f"a.{e}", bytes(len(d)) if e == extension else d) for e, d in members.items()])
    with pytest.raises(ValueError, match=rf"a\.tar: a\.{extension}"):
        build_index(tar)


def test_a_tar_without_its_last_zero_block_was_cut(shard: Path) -> None:
    raw = shard.read_bytes()
    end = len(raw.rstrip(b"\0"))
    shard.write_bytes(raw[: -(-end // 512) * 512 + 512])
    with pytest.raises(ValueError, match="cut"):
        build_index(shard)


def cut_inside_a_member(raw: bytearray) -> bytearray:
    return raw[: 512 + 100]


def cut_at_a_member_boundary(raw: bytearray) -> bytearray:
    return raw[: second_header(raw)]


def zeroed_header(raw: bytearray) -> bytearray:
    start = second_header(raw)
    raw[start : start + 512] = bytes(512)
    return raw


def zeroed_to_the_end_of_file_but_for_the_last_sample(raw: bytearray) -> bytearray:
    start = second_header(raw)
    raw[start : start + 4096] = bytes(4096)
    return raw


def garbage_header(raw: bytearray) -> bytearray:
    start = second_header(raw)
    raw[start : start + 512] = bytes(range(256)) * 2
    return raw


def a_flipped_bit_in_a_header(raw: bytearray) -> bytearray:
    raw[second_header(raw) + 3] ^= 1
    return raw


def second_header(raw: bytearray) -> int:
    size = tarfile.TarInfo.frombuf(bytes(raw[:512]), "utf-8", "strict").size
    return 512 + -(-size // 512) * 512


@pytest.mark.parametrize(
    "damage",
    [
        cut_inside_a_member,
        cut_at_a_member_boundary,
        zeroed_header,
        zeroed_to_the_end_of_file_but_for_the_last_sample,
        garbage_header,
        a_flipped_bit_in_a_header,
    ],
)
def test_a_damaged_tar_is_not_indexed(shard: Path, damage: Callable[[bytearray], bytearray]) -> None:
    shard.write_bytes(damage(bytearray(shard.read_bytes())))
    with pytest.raises(ValueError, match=r"a\.tar"):
        build_index(shard)


def test_every_cut_at_a_block_boundary_is_seen(shard: Path) -> None:
    raw = shard.read_bytes()
    last = max(offset + size for s in json.loads(shard.with_name("a.tar.index.json").read_text())["samples"]
               for offset, size, _ in s["members"].values())  # fmt: skip
    for end in range(512, last, 512):
        shard.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"a\.tar"):
            build_index(shard)


def test_a_changed_member_is_seen_when_it_is_read(shard: Path) -> None:
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"caption 3")] ^= 1
    shard.write_bytes(raw)
    data = ShardDataset(shard)
    assert data[2].caption == "caption 2"
    with pytest.raises(ValueError, match=r"a\.tar.*key003"):
        data[3]


def test_a_tar_of_another_size_than_its_index_is_refused(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match="ldm index"):
        ShardDataset(shard)


def test_an_index_that_is_none_is_refused(shard: Path) -> None:
    shard.with_name("a.tar.index.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json"):
        ShardDataset(shard)
    shard.with_name("a.tar.index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="99"):
        ShardDataset(shard)


IMAGE, TEXT = picture(0), b"a caption"


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([("a.b.webp", IMAGE), ("a.b.txt", TEXT)], id="dotted"),
        pytest.param([("b.webp", IMAGE), ("b.txt", TEXT), ("a.webp", IMAGE), ("a.txt", TEXT)], id="unsorted"),
        pytest.param([("a.webp", IMAGE), ("a.txt", TEXT), ("a.txt", TEXT)], id="doubled"),
        pytest.param([("a.webp", IMAGE), ("b.webp", IMAGE), ("b.txt", TEXT), ("a.txt", TEXT)], id="torn apart"),
        pytest.param([("../a.webp", IMAGE), ("../a.txt", TEXT)], id="climbing"),
        pytest.param([("/a.webp", IMAGE), ("/a.txt", TEXT)], id="absolute"),
        pytest.param([("a.pkl", IMAGE), ("a.txt", TEXT)], id="pickle"),
        pytest.param([("a", IMAGE)], id="no extension"),
        pytest.param([("a.webp", IMAGE)], id="no caption"),
        pytest.param([("a.txt", TEXT)], id="no image"),
        pytest.param([("a.webp", IMAGE), ("a.png", picture(0, "PNG")), ("a.txt", TEXT)], id="two images"),
        pytest.param([], id="empty"),
    ],
)
def test_a_tar_against_the_rules_is_not_indexed(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ValueError, match=r"a\.tar"):
        build_index(tar_of(tmp_path / "a.tar", members))
    assert not (tmp_path / "a.tar.index.json").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_members(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"a\.txt"):
        build_index(tmp_path / "a.tar")


def test_a_member_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.webp")
    info.size = 2**33 - 1
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"a\.webp"):
        build_index(tmp_path / "a.tar")


# --------------------------------------------------------------------------------------------------------------------
# Reading


def test_keys_choose_samples_and_their_order_is_sorted(shard: Path) -> None:
    data = ShardDataset(shard, keys=["key004", "key001"])
    assert [sample.caption for sample in (data[0], data[1])] == ["caption 1", "caption 4"]
    with pytest.raises(ValueError, match="nokey"):
        ShardDataset(shard, keys=["key001", "nokey"])


def test_a_folder_a_list_and_a_tar_are_the_same_data(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", samples(2, 6))
    whole = ShardDataset(tmp_path)
    assert len(whole) == 8
    assert whole.index_hash == ShardDataset([tmp_path / "b.tar", str(shard)]).index_hash
    assert whole.index_hash != ShardDataset(shard).index_hash


def test_the_same_key_in_two_shards_is_refused(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", samples(1))
    with pytest.raises(ValueError, match="key000"):
        ShardDataset(tmp_path)


def test_the_index_hash_follows_content_and_keys(shard: Path, tmp_path: Path) -> None:
    changed = samples(6)
    changed[2][1]["txt"] = b"another"
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other/a.tar", changed)
    assert ShardDataset(shard).index_hash != ShardDataset(tmp_path / "other").index_hash
    assert ShardDataset(shard).index_hash != ShardDataset(shard, keys=["key000"]).index_hash


def test_the_index_hash_does_not_follow_where_samples_lie(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other/x.tar", samples(2))
    write_shard(tmp_path / "other/y.tar", samples(4, 2))
    assert ShardDataset(tmp_path / "other").index_hash == ShardDataset(shard).index_hash


def test_a_missing_index_is_made_from_the_tar(shard: Path) -> None:
    expected = ShardDataset(shard).index_hash
    shard.with_name("a.tar.index.json").unlink()
    assert ShardDataset(shard).index_hash == expected


@pytest.mark.parametrize("path", ["nowhere", "nowhere.tar", "."])
def test_missing_shards_are_named_with_a_remedy(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"tar"):
        ShardDataset(tmp_path / path)


def test_a_dataset_survives_pickling_and_workers(shard: Path) -> None:
    data = ShardDataset(shard)
    data[0]
    assert pickle.loads(pickle.dumps(data))[5].caption == "caption 5"
    loader = DataLoader(data, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert [sample.caption for sample in loader] == [f"caption {i}" for i in range(6)]
