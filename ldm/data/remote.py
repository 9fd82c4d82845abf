"""Shards behind http(s): byte ranges of them, verified, and kept in a folder that processes may share."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from ldm.data.transforms import BadSample

TRIES = 4  # of a request; a network that fails for longer ends the training, with what was saved
TIMEOUT = 30  # seconds without a byte
PAUSE = 0.5  # seconds before the second try, twice as many before the third, and so on
MAX_SPAN = 2**28  # bytes, of an index and from the first byte of a sample to its last
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what a server may get over

# urllib's own opener reads file:, ftp: and data: as well, also where a server redirects to them.
_OPENER = urllib.request.OpenerDirector()
for _kind in ("ProxyHandler", "UnknownHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler",
              "HTTPRedirectHandler", "HTTPErrorProcessor"):  # fmt: skip
    _OPENER.add_handler(getattr(urllib.request, _kind)())


class Place(NamedTuple):
    """Where a member lies in its tar."""

    offset: int
    size: int  # bytes
    digest: bytes  # sha256


def is_remote(source: str | Path) -> bool:
    """Whether a shard is behind http(s); ValueError for what is neither that nor a path.

    webdataset reads ``pipe:`` as a shell command, and ``::`` as a list in which one may hide: neither is opened here.
    """
    text = str(source)
    remote = re.match(r"https?://[^/\s]", text, re.IGNORECASE)
    scheme = re.match(r"\s*[A-Za-z][A-Za-z0-9+.\-]*:", text)
    if "::" in text or "pipe:" in text.lower() or (scheme and not remote):
        raise ValueError(f"shard {text!r} is refused; the rule is a local path, http:// or https://, one shard each")
    return remote is not None


def file_name(source: str | Path) -> str:
    """The last part of a path or address."""
    return (source if isinstance(source, Path) else Path(urlsplit(source).path)).name


def beside(url: str, name: str) -> str:
    """The address of a file in the same folder, under the same query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def shown(source: str | Path) -> str:
    """A shard as a message may name it: without user and query, which hold keys."""
    parts = urlsplit(str(source))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="")) if parts.netloc else str(source)


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """A server's answer, to be read and closed."""
    answer: http.client.HTTPResponse = _OPENER.open(urllib.request.Request(url, headers=dict(headers)), timeout=TIMEOUT)
    return answer


def fetch(url: str, size: int, first: int | None = None, remedy: str = "check the address and the network") -> bytes:
    """A file of at most ``size`` bytes; or with ``first``, ``size`` bytes of it from there on, by a range request.

    Raises:
        ConnectionError: naming the address, after a few tries; at once where trying again is of no use.
    """
    headers = {} if first is None else {"Range": f"bytes={first}-{first + size - 1}"}
    fault: Exception | str = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        try:
            with open_url(url, headers) as answer:
                if headers and answer.status != 206:
                    fault = "the server ignores byte ranges, and a whole tar is not fetched for every sample"
                    remedy = "put the shards on a server that knows ranges, or copy them here"
                    break
                data = answer.read(size + 1)
                promised = size if headers else int(answer.headers.get("Content-Length", len(data)))
            if len(data) == promised <= size:
                return data
            fault = f"{len(data)} bytes came, not {min(size, promised)}"
        except urllib.error.HTTPError as error:
            fault = error
            if error.code not in _AGAIN:
                break
        except (OSError, http.client.HTTPException) as error:
            fault = error
    raise ConnectionError(f"{shown(url)} cannot be read: {fault}; {remedy}")


class Remote:
    """Members of shards behind http(s), each checked against its sha256 and kept under it in a folder.

    Files are written beside and renamed, so that processes may share the folder; the one not read for longest goes
    first. A process looks at the whole only after it has written a sixteenth of the limit, and then leaves seven
    eighths: with more than two writers the limit may be passed, by a sixteenth each.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder, self.limit = Path(folder or Path(home, "ldm", "shards")), limit
        self._written = limit  # what lies there already is counted at the first write

    def index(self, url: str, digest: str | None) -> bytes:
        """The index of a shard, from the folder if ``digest``, its sha256, is known."""
        kept = None if digest is None else self._get(bytes.fromhex(digest))
        if kept is None:
            kept = fetch(beside(url, f"{file_name(url)}.index.json"), MAX_SPAN,
                         remedy="is the index there? make it with: ldm index, and put it beside the shard")  # fmt: skip
            if hashlib.sha256(kept).hexdigest() == digest:
                self._put(bytes.fromhex(digest), kept)
        return kept

    def members(self, url: str, key: str, places: Mapping[str, Place]) -> dict[str, bytes]:
        """The members of a sample, by extension; if one is not in the folder, all come by one request.

        Raises:
            BadSample: if one is not what the index says.
            ConnectionError: if the server does not give it.
        """
        kept = {extension: self._get(place.digest) for extension, place in places.items()}
        found = {extension: data for extension, data in kept.items() if data is not None}
        if len(found) == len(places):
            return found
        first = min(place.offset for place in places.values())
        size = max(place.offset + place.size for place in places.values()) - first
        if size > MAX_SPAN:
            raise BadSample(f"{shown(url)}: {key} is spread over {size} bytes; the limit is {MAX_SPAN}")
        for _ in range(2):  # what was changed on the way is right the second time
            data = fetch(url, size, first)
            read = {e: data[place.offset - first :][: place.size] for e, place in places.items()}
            wrong = [e for e, place in places.items() if hashlib.sha256(read[e]).digest() != place.digest]
            if not wrong:
                for extension, place in places.items():
                    self._put(place.digest, read[extension])
                return read
        raise BadSample(f"{shown(url)}: {key}.{wrong[0]} is damaged (its sha256 is not the index's); copy the tar anew")

    def _get(self, digest: bytes) -> bytes | None:
        path = self.folder / digest.hex()
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            if hashlib.sha256(data).digest() == digest:
                os.utime(path)
                return data
        return None

    def _put(self, digest: bytes, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".partial-", delete=False) as file:
            file.write(data)
        os.replace(file.name, self.folder / digest.hex())
        self._written += len(data)
        if self._written > self.limit // 16:
            self._evict()

    def _evict(self) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process took it
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > self.limit * 7 // 8:
                Path(path).unlink(missing_ok=True)
                total -= size
        self._written = 0
