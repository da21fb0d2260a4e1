"""A web server on this machine that behaves as badly as it is told to."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


@dataclass
class Host:
    """What the server holds, and what it was asked."""

    url: str
    """Where it is, with a slash at the end."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """For each path, what to do with each request in turn; the last stays."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and headers of each request that came."""

    def answer(self, path: str, *answers: Answer) -> str:
        """Set what a path answers, and return its URL."""
        self.answers[path] = list(answers)
        return self.url + path

    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Does what the host's answers say."""

    protocol_version = "HTTP/1.1"
    host: Host

    def do_GET(self) -> None:
        """Give the next answer of the path; of a whole URL, which a proxy is asked for, that of its last part."""
        self.close_connection = True
        path = self.path.rpartition("/")[2] if "://" in self.path else self.path.lstrip("/")
        self.host.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        answers = self.host.answers.get(path) or [status(404)]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def send(self, code: int, content: bytes = b"", **headers: str | int) -> None:
        """Send an answer; header names have _ for -."""
        self.send_response(code)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def whole(content: bytes, etag: str = '"1"', ranges: bool = True, **headers: str | int) -> Answer:
    """The file, or the part that was asked for, as a good server sends it."""

    def answer(handler: Handler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range", etag)
        if not asked or not ranges or condition != etag:
            return handler.send(200, content, **{"ETag": etag, **headers})
        start = int(asked[1])
        if start >= len(content):
            return handler.send(416, Content_Range=f"bytes */{len(content)}")
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send(206, content[start:], **{"Content_Range": span, "ETag": etag, **headers})

    return answer


def cut(content: bytes, after: int, etag: str = '"1"') -> Answer:
    """A connection that is reset after some bytes of the answer."""

    def answer(handler: Handler) -> None:
        inner = handler.wfile
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        span = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        handler.send(206 if asked else 200, b"", **{"Content_Length": len(content) - start, "ETag": etag, **span})
        inner.write(content[start : start + after])
        inner.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return answer


def stall(content: bytes, after: int, released: threading.Event) -> Answer:
    """Some bytes, and then silence."""

    def answer(handler: Handler) -> None:
        handler.send(200, b"", Content_Length=len(content), ETag='"1"')
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        released.wait(20)

    return answer


def status(code: int) -> Answer:
    """An error page."""
    return lambda handler: handler.send(code, b"<html>no</html>")


def redirect(url: str) -> Answer:
    """Somewhere else."""
    return lambda handler: handler.send(302, Location=url)


@contextmanager
def serve() -> Iterator[Host]:
    """A server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host = Host(f"http://127.0.0.1:{server.server_address[1]}/")
    server.RequestHandlerClass = type("HostHandler", (Handler,), {"host": host})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
