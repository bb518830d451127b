"""A web server of one file, in a thread, which can be told to misbehave."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HTTPFile:
    """The file and how it is served; ``asked`` has the Range header of every request, "" where there was none."""

    body: bytes
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    # Bytes after which the connection breaks, a number for each of the next responses.
    cuts: list[int] = field(default_factory=list)
    # Statuses that come before any other answer, a number for each.
    failures: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    # Body and ETag from the first request with a Range on.
    later: tuple[bytes, str] | None = None
    says_size: bool = True
    # How many bytes too early an answer to a Range begins.
    early: int = 0
    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(body: bytes) -> Iterator[HTTPFile]:
    """Serve ``body`` under ``HTTPFile.url`` while the block runs."""
    file = HTTPFile(body)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            file.asked.append(wanted)
            if wanted and file.later:
                file.body, file.etag = file.later
            if file.failures:
                self.send_error(file.failures.pop(0))
                return
            begin = 0
            if wanted and file.ranges:
                match = re.fullmatch(r"bytes=(\d+)-", wanted)
                assert match is not None
                begin = int(match[1]) - file.early
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(file.body) - 1}/{len(file.body)}")
            else:
                self.send_response(200)
            if file.says_size:
                self.send_header("Content-Length", str(len(file.body) - begin))
            for name, value in {"ETag": file.etag, "Last-Modified": file.modified, **file.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            rest = file.body[begin:]
            # A client that wants the headers alone closes the connection before the body is sent.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(rest[: file.cuts.pop(0)] if file.cuts else rest)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    file.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield file
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
