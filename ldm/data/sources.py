"""Where shards lie: files here, or behind http(s) by range requests, with a folder that keeps what came."""

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
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

TRIES = 4  # of a request; a network that fails for longer ends the training, with what was saved
TIMEOUT = 30  # seconds without a byte
PAUSE = 0.5  # seconds before the second try, twice as many before the third, and so on
MAX_FILE_BYTES = 2**28  # of an index or a catalogue
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what a server may get over

# urllib's own opener reads file:, ftp: and data: as well, also where a server redirects to them.
_OPENER = urllib.request.OpenerDirector()
for _kind in ("ProxyHandler", "UnknownHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler",
              "HTTPRedirectHandler", "HTTPErrorProcessor"):  # fmt: skip
    _OPENER.add_handler(getattr(urllib.request, _kind)())

Source = Path | str  # a file here | an address


def as_source(name: str | Path) -> Source:
    """A Path for a file here, a str for an address; ValueError for what is neither a path nor http(s).

    webdataset reads ``pipe:`` as a shell command, and ``::`` as a list in which one may hide: neither is opened here.
    """
    text = str(name)
    remote = re.match(r"https?://[^/\s]", text, re.IGNORECASE)
    scheme = re.match(r"\s*[A-Za-z][A-Za-z0-9+.\-]*:", text)
    if "::" in text or "pipe:" in text.lower() or (scheme and not remote):
        raise ValueError(f"shard {text!r} is refused; the rule is a local path, http:// or https://, one shard each")
    return text if remote else Path(name)


def file_name(source: Source) -> str:
    """The last part of a path or address."""
    return source.name if isinstance(source, Path) else urlsplit(source).path.rpartition("/")[2]


def beside(source: Source, name: str) -> Source:
    """A file in the same folder; of an address under the same query."""
    if isinstance(source, Path):
        return source.with_name(name)
    parts = urlsplit(source)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def shown(source: Source) -> str:
    """A source as a message may name it: an address without user and query, which hold keys."""
    if isinstance(source, Path):
        return str(source)
    parts = urlsplit(source)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def open_url(url: str, span: str | None = None) -> http.client.HTTPResponse:
    """A server's answer, to be read and closed; ``span`` as "0-99" asks for these bytes."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={span}"} if span else {})
    answer: http.client.HTTPResponse = _OPENER.open(request, timeout=TIMEOUT)
    return answer


class Files:
    """Reads files here and behind http(s), and keeps what came from there and has a known sha256, under that name.

    Kept files are written beside and renamed, so that processes may share the folder; the one not read for longest goes
    first. A process looks at the whole only after it has written a sixteenth of the limit, and then leaves seven
    eighths: with more than two writers the limit may be passed, by a sixteenth each.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder, self.limit = Path(folder or Path(home, "ldm", "shards")), limit
        self._written = limit  # what lies there already is counted at the first write

    def read(
        self,
        source: Source,
        first: int = 0,
        size: int | None = None,  # bytes from ``first`` on; None reads the whole file
        digest: bytes | None = None,  # sha256, where it is known
        remedy: str = "check the address and the network",
    ) -> bytes:
        """A file or a part of it. Of an address, tried again where it fails or is not of its sha256.

        What is of another sha256 after all is returned: the caller knows what it is and what to say.

        Raises:
            ConnectionError: naming the address, if the server does not give it; OSError for files here.
        """
        if isinstance(source, Path):
            with open(source, "rb", buffering=0) as file:
                return file.read() if size is None else os.pread(file.fileno(), size, first)
        kept = self._kept(digest)
        if kept is not None:
            return kept
        data, fault = None, None
        for attempt in range(TRIES):
            time.sleep(PAUSE * attempt)
            try:
                data = _request(source, first, size)
                if digest is None:
                    return data
                if hashlib.sha256(data).digest() == digest:
                    self._keep(digest, data)
                    return data
            except (OSError, http.client.HTTPException) as error:
                fault = error
                if isinstance(error, urllib.error.HTTPError) and error.code not in _AGAIN:
                    break
        if data is None:
            raise ConnectionError(f"{shown(source)} cannot be read: {fault!r}; {remedy}") from fault
        return data

    def _kept(self, digest: bytes | None) -> bytes | None:
        if digest is not None:
            path = self.folder / digest.hex()
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                if hashlib.sha256(data).digest() == digest:
                    os.utime(path)
                    return data
        return None

    def _keep(self, digest: bytes, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".partial-", delete=False) as file:
            file.write(data)
        os.replace(file.name, self.folder / digest.hex())
        self._written += len(data)
        if self._written <= self.limit // 16:
            return
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


def _request(url: str, first: int, size: int | None) -> bytes:
    with open_url(url, None if size is None else f"{first}-{first + size - 1}") as answer:
        if size is not None and answer.status != 206:
            raise ValueError(
                f"{shown(url)}: the server ignores byte ranges, and a whole tar is not fetched for every sample; "
                "put the shards on one that knows them, or copy them here"
            )
        limit = size or MAX_FILE_BYTES
        data = answer.read(limit + 1)
        promised = size or int(answer.headers.get("Content-Length", len(data)))
    if not len(data) == promised <= limit:
        raise http.client.IncompleteRead(data, promised - len(data))
    return data
