"""Streaming is plain WebDataset, without its shell and without its pickles."""

from pathlib import Path

import pytest
from test_shards import picture, samples, tar_of
from torch.utils.data import DataLoader

from ldm.data import write_shard
from ldm.data.stream import web_stream


@pytest.fixture
def urls(tmp_path: Path) -> str:
    for number in range(4):
        write_shard(tmp_path / f"s-{number}.tar", samples(3, 3 * number))
    return str(tmp_path / "s-{0..3}.tar")


def test_a_stream_has_every_sample_once(urls: str) -> None:
    items = list(web_stream(urls, 16, 16))
    assert [item["key"] for item in items] == [f"key{i:03d}" for i in range(12)]
    assert items[5]["caption"] == "caption 5"
    assert items[5]["image"].shape == (3, 16, 16)


def test_workers_share_the_shards(urls: str) -> None:
    loader = DataLoader(web_stream(urls, 16, 16), batch_size=None, num_workers=2)
    assert sorted(item["key"] for item in loader) == [f"key{i:03d}" for i in range(12)]


def test_the_shuffle_is_seeded(urls: str) -> None:
    first, again, other = ([i["key"] for i in web_stream(urls, 16, 16, shuffle=12, seed=s)] for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == [f"key{i:03d}" for i in range(12)]


@pytest.mark.parametrize(
    "url",
    ["pipe:touch {0}", "a.tar::pipe:touch {0}", "PIPE:touch {0}", "file:///a.tar", "s3://a/b.tar", "ftp://a/b.tar"],
)
def test_only_paths_and_http_are_opened(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        web_stream(url.format(tmp_path / "owned"), 16, 16)
    assert not (tmp_path / "owned").exists()


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(web_stream(str(tmp_path / "nowhere.tar"), 16, 16))


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pth", "a.b.webp"])
def test_members_outside_the_closed_list_are_refused(tmp_path: Path, name: str) -> None:
    tar = tar_of(tmp_path / "a.tar", [("a.webp", picture(0)), ("a.txt", b"x"), (name, b"x")])
    with pytest.raises(ValueError, match=r"a\.tar: (a\.p.. has an unknown extension|key 'a.b' is refused)"):
        list(web_stream(str(tar), 16, 16))


def test_incomplete_samples_are_refused(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "a.tar", [("a.webp", picture(0))])
    with pytest.raises(ValueError, match=r"a\.tar: sample a has no caption"):
        list(web_stream(str(tar), 16, 16))
