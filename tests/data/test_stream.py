"""Streaming is plain WebDataset, without its shell and without its pickles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shards import picture, samples, tar_of
from torch.utils.data import DataLoader

from ldm.data import BadSample, write_shard
from ldm.data.stream import StreamedSet, WebStream


def once(urls: str, shuffle: int = 0, **more: Any) -> StreamedSet:
    return StreamedSet(WebStream(urls, shuffle), 16, 16, passes=1, **more)


@pytest.fixture
def urls(tmp_path: Path) -> str:
    for number in range(4):
        write_shard(tmp_path / f"s-{number}.tar", samples(3, 3 * number))
    return str(tmp_path / "s-{0..3}.tar")


def test_a_stream_has_every_sample_once(urls: str) -> None:
    items = list(once(urls))
    assert [item["key"] for item in items] == [f"key{i:03d}" for i in range(12)]
    assert items[5]["caption"] == "caption 5"
    assert items[5]["image"].shape == (3, 16, 16)


def test_workers_share_the_shards(urls: str) -> None:
    loader = DataLoader(once(urls), batch_size=None, num_workers=2)
    assert sorted(item["key"] for item in loader) == [f"key{i:03d}" for i in range(12)]


def test_the_shuffle_is_seeded(urls: str) -> None:
    first, again, other = ([i["key"] for i in once(urls, shuffle=12, seed=s)] for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == [f"key{i:03d}" for i in range(12)]


def test_each_pass_mixes_anew_and_draws_other_numbers(urls: str) -> None:
    stream = WebStream(urls, 12)
    items = list(StreamedSet(stream, 16, 16, passes=2))
    first, second = items[:12], items[12:]
    assert sorted(i["key"] for i in first) == sorted(i["key"] for i in second)
    assert [i["key"] for i in first] != [i["key"] for i in second]
    assert len({i["position"] for i in items}) == 24
    again = list(StreamedSet(stream, 16, 16, first=1, passes=1))
    assert [(i["key"], i["position"]) for i in again] == [(i["key"], i["position"]) for i in second]


def test_ranks_and_their_workers_share_the_shards(urls: str) -> None:
    stream = WebStream(urls, 4)
    keys = []
    for rank in range(2):
        loader = DataLoader(StreamedSet(stream, 16, 16, passes=1, rank=rank, world=2), batch_size=None, num_workers=2)
        keys.append({item["key"] for item in loader})
    assert [len(some) for some in keys] == [6, 6]
    assert len(keys[0] | keys[1]) == 12


def test_captions_flips_and_crops_are_drawn_as_of_indexed_samples(tmp_path: Path) -> None:
    said = json.dumps({"captions": ["one", "two"]}).encode()
    write_shard(tmp_path / "a.tar", [(f"k{i}", {"webp": picture(i), "txt": b"one", "json": said}) for i in range(8)])
    plain, drawn = list(once(str(tmp_path / "a.tar"))), list(once(str(tmp_path / "a.tar"), flip=True, seed=3))
    assert {item["caption"] for item in drawn} == {"one", "two"}
    mirrored = [torch.equal(a["image"].flip(-1), b["image"]) for a, b in zip(plain, drawn, strict=True)]
    assert 0 < sum(mirrored) < 8
    assert all(m or torch.equal(a["image"], b["image"]) for m, a, b in zip(mirrored, plain, drawn, strict=True))


def test_what_is_no_picture_ends_it_or_is_skipped(tmp_path: Path) -> None:
    cut = {"webp": picture(0)[:40], "txt": b"x"}
    broken = [("k0", cut), *samples(2), ("z", cut)]
    write_shard(tmp_path / "a.tar", broken)
    with pytest.raises(BadSample, match="k0: not a readable"):
        list(once(str(tmp_path / "a.tar")))
    items = list(once(str(tmp_path / "a.tar"), on_bad="skip"))
    assert [(item["key"], item["substituted"]) for item in items] == [("key000", 1), ("key001", 0)]
    write_shard(tmp_path / "b.tar", broken[:1])
    with pytest.raises(ValueError, match=r"no sample that can be read in .*b\.tar"):
        next(iter(StreamedSet(WebStream(str(tmp_path / "b.tar")), 16, 16, on_bad="skip")))


@pytest.mark.parametrize("shuffle", [-1, True, 1.5, "many"])
def test_a_buffer_is_a_whole_number(shuffle: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.train\.shuffle=.*: the rule is a whole number"):
        WebStream("a.tar", shuffle)


def test_its_name_is_of_the_shards_and_keeps_no_key_of_an_address() -> None:
    names = [
        WebStream(url).index_hash for url in ("http://h/{a,b}.tar?k=1", "http://h/{a,b}.tar?k=2", "http://h/a.tar")
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "url",
    ["pipe:touch {0}", "a.tar::pipe:touch {0}", "PIPE:touch {0}", "file:///a.tar", "s3://a/b.tar", "ftp://a/b.tar"],
)
def test_only_paths_and_http_are_opened(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        WebStream(url.format(tmp_path / "owned"))
    assert not (tmp_path / "owned").exists()


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(once(str(tmp_path / "nowhere.tar")))


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pth", "a.b.webp"])
def test_members_outside_the_closed_list_are_refused(tmp_path: Path, name: str) -> None:
    tar = tar_of(tmp_path / "a.tar", [("a.webp", picture(0)), ("a.txt", b"x"), (name, b"x")])
    with pytest.raises(ValueError, match=r"a\.tar: (a\.p.. has an unknown extension|key 'a.b' is refused)"):
        list(once(str(tar)))


def test_incomplete_samples_are_refused(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", [("a.webp", picture(0))])
    with pytest.raises(ValueError, match=r"a\.tar: sample a has no caption"):
        list(once(str(tar)))
