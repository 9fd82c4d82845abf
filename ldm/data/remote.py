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
from urllib.parse import urlsplit, urlunsplit

from ldm.data.transforms import BadSample

TRIES = 4  # of a request; a network that fails for longer ends the training, with what was saved
TIMEOUT = 30  # seconds without a byte
PAUSE = 0.5  # seconds before the second try, twice as many before the third, and so on
MAX_INDEX_BYTES = 2**28
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what a server may get over

# urllib's own opener reads file:, ftp: and data: as well, also where a server redirects to them.
_OPENER = urllib.request.OpenerDirector()
for _kind in ("ProxyHandler", "UnknownHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler",
              "HTTPRedirectHandler", "HTTPErrorProcessor"):  # fmt: skip
    _OPENER.add_handler(getattr(urllib.request, _kind)())


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


def _request(url: str, size: int, first: int | None) -> bytes:
    with open_url(url, {} if first is None else {"Range": f"bytes={first}-{first + size - 1}"}) as answer:
        if first is not None and answer.status != 206:
            raise ValueError(
                f"{shown(url)}: the server ignores byte ranges, and a whole tar is not fetched for every sample; "
                "put the shards on one that knows them, or copy them here"
            )
        data = answer.read(size + 1)
        promised = int(answer.headers.get("Content-Length", len(data))) if first is None else size
    if not len(data) == promised <= size:
        raise http.client.IncompleteRead(data, promised - len(data))
    return data


class Remote:
    """Reads files behind http(s), and keeps what has a known sha256 in a folder, under that name.

    Files are written beside and renamed, so that processes may share the folder; the one not read for longest goes
    first. A process looks at the whole only after it has written a sixteenth of the limit, and then leaves seven
    eighths: with more than two writers the limit may be passed, by a sixteenth each.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder, self.limit = Path(folder or Path(home, "ldm", "shards")), limit
        self._written = limit  # what lies there already is counted at the first write

    def read(
        self,
        url: str,
        size: int,  # bytes; without ``first`` the most that the file may have
        first: int | None = None,  # byte, of a range request
        digest: bytes | None = None,  # sha256, where it is known
        name: str = "",  # what is read, for the message
        remedy: str = "check the address and the network",
    ) -> bytes:
        """Part of a file or all of it; tried a few times, which also mends what was changed on the way.

        Raises:
            BadSample: if its sha256 is another.
            ConnectionError: if the server does not give it.
            ValueError: if it gives the whole file where a part was asked for.
        """
        kept = self._kept(digest)
        if kept is not None:
            return kept
        fault: Exception | None = None
        for attempt in range(TRIES):
            time.sleep(PAUSE * attempt)
            try:
                data = _request(url, size, first)
                if digest in (None, hashlib.sha256(data).digest()):
                    self._keep(digest, data)
                    return data
                fault = BadSample(f"{shown(url)}: {name} is damaged (its sha256 is not the index's); copy the tar anew")
            except (OSError, http.client.HTTPException) as error:
                fault = error
                if isinstance(error, urllib.error.HTTPError) and error.code not in _AGAIN:
                    break
        if isinstance(fault, BadSample):
            raise fault
        raise ConnectionError(f"{shown(url)} cannot be read: {fault!r}; {remedy}") from fault

    def _kept(self, digest: bytes | None) -> bytes | None:
        if digest is not None:
            path = self.folder / digest.hex()
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                if hashlib.sha256(data).digest() == digest:
                    os.utime(path)
                    return data
        return None

    def _keep(self, digest: bytes | None, data: bytes) -> None:
        if digest is None:
            return
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
