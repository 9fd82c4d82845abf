"""Shards behind http: every sample verified, kept once, and no fault of a network or a server passes in silence."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hydra.utils import instantiate
from serving import Server, times
from test_shards import picture, samples, tar_of
from torch.utils.data import DataLoader

from ldm.cli.training import compose
from ldm.data import BadSample, ShardDataset, TrainingSet, build_index, sources, write_catalogue, write_shard
from ldm.data.stream import StreamedSet, WebStream

ENOUGH = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards/a.tar", samples(6))
    write_shard(tmp_path / "shards/b.tar", samples(4, 6))
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "PAUSE", 0.0)
    with Server(folder).running() as server:
        yield server


def opened(server: Server, cache: Path, limit: int = ENOUGH, names: Sequence[str] = ("a.tar", "b.tar")) -> ShardDataset:
    return ShardDataset([f"{server.url}/{name}" for name in names], cache=cache, cache_bytes=limit)


def test_remote_shards_are_the_same_data_as_local_ones(server: Server, folder: Path, tmp_path: Path) -> None:
    there, here = opened(server, tmp_path / "cache"), ShardDataset(folder)
    assert there.index_hash == here.index_hash
    assert [there[i] for i in range(10)] == [here[i] for i in range(10)]


def test_only_the_bytes_of_the_members_are_fetched(server: Server, folder: Path, tmp_path: Path) -> None:
    sample = opened(server, tmp_path / "cache")[2]
    assert all(wanted for path, wanted in server.asked if path.endswith(".tar"))
    indices = sum(path.stat().st_size for path in folder.glob("*.index.json"))
    assert server.sent == indices + len(sample.image) + len(sample.caption.encode()) + len(json.dumps(sample.meta))


def test_what_was_read_is_kept_and_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    first = [opened(server, tmp_path / "cache")[i] for i in range(10)]
    before = len(server.asked)
    again = opened(server, tmp_path / "cache")
    assert [again[i] for i in range(10)] == first
    assert [path for path, _ in server.asked[before:]] == ["/a.tar.index.json", "/b.tar.index.json"]


def test_a_file_of_the_cache_that_rots_is_fetched_again(server: Server, tmp_path: Path) -> None:
    data = opened(server, tmp_path / "cache")
    sample = data[0]
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"rot" + file.read_bytes()[3:])
    assert data[0] == sample


def test_the_cache_keeps_to_its_limit_and_the_oldest_go_first(server: Server, tmp_path: Path) -> None:
    whole = ShardDataset([f"{server.url}/a.tar"], cache=tmp_path / "all", cache_bytes=ENOUGH)
    sizes = [len(whole[i].image) for i in range(6)]
    limit = int(3.5 * max(sizes))
    data = opened(server, tmp_path / "cache", limit)
    for number in (0, 1, 0, 2, 3, 0, 4):
        data[number]
        time.sleep(0.01)  # the file system's clock
        held = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
        assert held <= limit
    before = len(server.asked)
    assert data[0].image == picture(0)  # read between the others
    assert len(server.asked) == before
    data[1]
    assert len(server.asked) > before


def test_workers_share_a_cache_that_is_too_small_for_them(server: Server, tmp_path: Path) -> None:
    data = opened(server, tmp_path / "cache", limit=2000)
    loader = DataLoader(data, batch_size=None, num_workers=2, sampler=list(range(10)) * 4)  # type: ignore[arg-type]
    assert [sample.key for sample in loader] == [f"key{i:03d}" for i in range(10)] * 4
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_leftovers_of_a_killed_process_are_counted_and_go(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/.partial-x").write_bytes(bytes(10**6))
    os.utime(tmp_path / "cache/.partial-x", (0, 0))
    opened(server, tmp_path / "cache", limit=10**6)[0]
    assert not (tmp_path / "cache/.partial-x").exists()


# --------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda data: None, id="hangs up"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncates"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="changes a bit"),
        pytest.param(lambda data: 503, id="is busy"),
    ],
)
def test_a_fault_that_passes_costs_a_try_and_nothing_else(server: Server, tmp_path: Path, answer: object) -> None:
    data = opened(server, tmp_path / "cache")
    server.fault = times(sources.TRIES - 1, answer)  # type: ignore[arg-type]
    assert data[3].caption == "caption 3"


@pytest.mark.parametrize("answer", [lambda data: None, lambda data: data[:-1], lambda data: 503])
def test_a_fault_that_stays_names_the_address_after_a_few_tries(server: Server, tmp_path: Path, answer: object) -> None:
    data = opened(server, tmp_path / "cache")
    server.fault = times(10**9, answer)  # type: ignore[arg-type]
    before = len(server.asked)
    with pytest.raises(ConnectionError, match=rf"{server.url}/a\.tar cannot be read.*check the address"):
        data[3]
    assert len(server.asked) == before + sources.TRIES


def test_a_byte_that_stays_changed_is_a_bad_sample_by_name(server: Server, folder: Path, tmp_path: Path) -> None:
    data = opened(server, tmp_path / "cache")
    raw = bytearray((folder / "a.tar").read_bytes())
    raw[raw.index(b"caption 3")] ^= 1
    (folder / "a.tar").write_bytes(raw)
    with pytest.raises(BadSample, match=rf"{server.url}/a\.tar: key003\.txt is damaged"):
        data[3]
    assert data[2].caption == "caption 2"


def test_a_network_that_is_down_is_no_bad_sample(server: Server, tmp_path: Path) -> None:
    items = TrainingSet(opened(server, tmp_path / "cache"), 0, 16, 16, on_bad="skip")
    server.fault = times(10**9, lambda data: None)
    with pytest.raises(ConnectionError):
        items[0]


def test_a_server_that_does_not_answer_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    data = opened(server, tmp_path / "cache")
    server.fault = lambda server, path, data: time.sleep(0.5)  # type: ignore[func-returns-value]
    with pytest.raises(ConnectionError, match=r"a\.tar cannot be read.*timed out"):
        data[0]


def test_a_server_without_ranges_is_refused_before_a_tar_is_read(folder: Path, tmp_path: Path) -> None:
    write_shard(folder / "big.tar", [("a", {"png": picture(0, "PNG", (1500, 1500)), "txt": b"x"})])
    with Server(folder, ranges=False).running() as server:
        data = opened(server, tmp_path / "cache", names=("big.tar",))
        with pytest.raises(ValueError, match=r"big\.tar: the server ignores byte ranges.*copy them here") as caught:
            data[0]
        assert not isinstance(caught.value, BadSample)  # on_bad=skip does not pass over it
        assert server.asked[1:] == [("/big.tar", server.asked[-1][1])]  # one try


def test_no_index_there_is_one_line_with_the_remedy(server: Server, folder: Path, tmp_path: Path) -> None:
    (folder / "a.tar.index.json").unlink()
    with pytest.raises(ConnectionError, match=r"a\.tar\.index\.json cannot be read.*404.*ldm index") as caught:
        opened(server, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path for path, _ in server.asked] == ["/a.tar.index.json"]


@pytest.mark.parametrize(
    "members", [{"webp": [0, 10**12, "00" * 32]}, {"webp": [-5, 3, "00" * 32]}, {"pkl": [512, 3, "00" * 32]},
                {"webp": [10**9, 5, "00" * 32]}, {"webp": [512, 3, "zz"]}, {"webp": "x"}]
)  # fmt: skip
def test_an_index_that_asks_for_too_much_is_refused(
    server: Server, folder: Path, tmp_path: Path, members: object
) -> None:
    index = {"format": 1, "size": 10**8, "samples": [{"key": "a", "members": members}]}
    (folder / "a.tar.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json: not an index"):
        opened(server, tmp_path / "cache")


def test_keys_in_an_address_reach_the_server_and_no_message(server: Server, folder: Path, tmp_path: Path) -> None:
    url = f"{server.url}/a.tar?token=S3CRET"
    data = ShardDataset([url], cache=tmp_path / "cache")
    assert server.asked[0][0] == "/a.tar.index.json?token=S3CRET"
    server.fault = times(10**9, lambda data: None)
    with pytest.raises(ConnectionError) as caught:
        data[0]
    assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:,x"])
def test_a_redirect_leads_nowhere_but_to_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(sources, "PAUSE", 0.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    redirecting = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=redirecting.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.raises(ConnectionError):
            ShardDataset([f"http://127.0.0.1:{redirecting.server_port}/a.tar"], cache=tmp_path / "cache")
    finally:
        redirecting.shutdown()
        thread.join()
        redirecting.server_close()


# --------------------------------------------------------------------------------------------------------------------
# Catalogues and streams


def test_a_remote_catalogue_opens_alone_and_its_indices_are_kept(server: Server, folder: Path, tmp_path: Path) -> None:
    write_catalogue(folder)
    data = ShardDataset(f"{server.url}/catalogue.json", cache=tmp_path / "cache")
    assert len(data) == 10
    assert [path for path, _ in server.asked] == ["/catalogue.json"]
    assert data.index_hash == ShardDataset(folder).index_hash
    assert data[7].key == "key007"
    before = len(server.asked)
    assert ShardDataset(f"{server.url}/catalogue.json", cache=tmp_path / "cache")[7].key == "key007"
    assert [path for path, _ in server.asked[before:]] == ["/catalogue.json"]


def test_an_index_that_is_not_the_catalogues_ends_the_training_also_under_skip(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    write_catalogue(folder)
    changed = samples(4, 6)
    changed[1][1]["txt"] = b"another"
    write_shard(folder / "b.tar", changed)
    data = ShardDataset(f"{server.url}/catalogue.json", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"b\.tar\.index\.json is not the index that catalogue\.json lists") as caught:
        data[9]
    assert not isinstance(caught.value, BadSample)


def test_a_stream_over_http_reads_the_same_and_sees_a_cut(server: Server, folder: Path) -> None:
    url = f"{server.url}/{{a,b}}.tar"
    read = StreamedSet(WebStream(url, 0), 16, 16, passes=1)
    assert [item["key"] for item in read] == [f"key{i:03d}" for i in range(10)]
    last = json.loads((folder / "b.tar.index.json").read_text())["samples"][-1]["members"]
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[: min(at for at, _, _ in last.values()) - 512])
    with pytest.raises(ValueError, match=r"b\.tar: cut at byte .*, after key008\.webp"):
        list(read)


def test_a_connection_that_breaks_in_a_stream_is_an_error(server: Server, folder: Path) -> None:
    server.fault = times(1, lambda data: data[:3000])
    with pytest.raises((ConnectionError, ValueError), match=r"a\.tar"):
        list(StreamedSet(WebStream(f"{server.url}/a.tar"), 16, 16, passes=1))


def test_addresses_come_through_the_command_line(server: Server, tmp_path: Path) -> None:
    a, b = f"{server.url}/a.tar", f"{server.url}/b.tar?token=x%3D1&v=2"
    given = ["data=shards", f"data.train.paths=[{a},'{b}']", f"data.validation.paths={a}",
             f"data.train.cache={tmp_path}/1", f"data.validation.cache={tmp_path}/2", "data.on_bad=skip"]  # fmt: skip
    data = instantiate(compose(given)[0].data, _convert_="all")
    assert (data.train.shards, data.validation.shards, data.on_bad) == ([a, b], [a], "skip")
    assert (data.train[9].key, data.validation[5].key) == ("key009", "key005")


def test_a_local_index_needs_no_network(tmp_path: Path) -> None:
    build_index(tar_of(tmp_path / "a.tar", [("a.webp", picture(0)), ("a.txt", b"x")]))
    assert ShardDataset(tmp_path, cache=tmp_path / "cache")[0].key == "a"
    assert not (tmp_path / "cache").exists()
