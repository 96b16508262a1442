"""An HTTP server that answers every POST with 200, and keeps what was sent. No tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import NamedTuple


class Sink(NamedTuple):
    """A running server.

    Attributes:
        url: Its address.
        received: The path and the body of each request that was answered.
    """

    url: str
    received: list[tuple[str, bytes]]


@contextmanager
def http_sink(answer: bytes = b"") -> Iterator[Sink]:
    """Run a server whose answers all have the same body."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            received.append((self.path, body))

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield Sink(f"http://127.0.0.1:{server.server_port}", received)
        server.shutdown()
        thread.join()
