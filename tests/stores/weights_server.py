"""An http server of one file on this machine: with parts, without, breaking off, or refusing."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WeightsServer(ThreadingHTTPServer):
    """Serves ``content`` at every address.

    Attributes:
        status: Of every answer.
        breaks: After so many bytes each of the next answers ends too early.
        gives_parts: Whether it understands ``Range``.
        tag: What it calls this state of the file.
        asked: Path and range of each request.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.status, self.breaks, self.gives_parts, self.tag = content, 200, [], True, '"one"'
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: WeightsServer

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if server.status != 200:
            self.send_error(server.status)
            return
        begin = 0
        if wanted and server.gives_parts and self.headers.get("If-Range") == server.tag:
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if begin and begin >= len(server.content):
            self.send_error(416)
            return
        body = server.content[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@contextmanager
def serving(content: bytes) -> Iterator[WeightsServer]:
    with WeightsServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
