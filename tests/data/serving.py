"""A file server on the loopback that knows byte ranges, counts what it is asked, and misbehaves on request."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Fault = Callable[["Server", str, bytes], bytes | int | None]  # other bytes, a status, or None: hang up


class Server:
    """``url`` is its root; ``asked`` the (path, Range header) of every request; ``fault`` is called for each answer."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.fault: Fault | None = None
        self.sent = 0  # bytes of bodies
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, wanted = self.path.partition("?")[0], self.headers.get("Range")
                server.asked.append((self.path, wanted))
                file = folder / path.lstrip("/")
                if not file.is_file():
                    return self.send_error(404)
                data, status = file.read_bytes(), 200
                if wanted and ranges:
                    first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())  # type: ignore[union-attr]
                    data, status = data[first : last + 1], 206
                body: bytes | int | None = data if server.fault is None else server.fault(server, path, data)
                if body is None:
                    self.close_connection = True
                    return self.connection.close()
                if isinstance(body, int):
                    return self.send_error(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/*")
                self.end_headers()
                server.sent += len(body)  # before the client can have it, and look
                with suppress(OSError):  # the client has heard enough
                    self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a connection cut on purpose
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def times(count: int, answer: Callable[[bytes], bytes | int | None], only: str = ".tar") -> Fault:
    """The first so many answers about such files are spoilt."""
    left = [count]

    def fault(server: Server, path: str, data: bytes) -> bytes | int | None:
        if path.endswith(only) and left[0] > 0:
            left[0] -= 1
            return answer(data)
        return data

    return fault
