"""A local web server whose answers, including faulty ones, are set by the test."""

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
    """The answers of the server and the requests that it received."""

    url: str
    """URL of the server with a trailing slash."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """Answers to successive requests for each path; the last one is repeated."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and headers of each received request."""

    def answer(self, path: str, *answers: Answer) -> str:
        """Set the answers of a path and return its URL."""
        self.answers[path] = list(answers)
        return self.url + path

    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Sends the host's answers."""

    protocol_version = "HTTP/1.1"
    host: Host

    def do_GET(self) -> None:
        """Send the next answer of the path. For a full URL, as sent to a proxy, the path is its last component."""
        self.close_connection = True
        path = self.path.rpartition("/")[2] if "://" in self.path else self.path.lstrip("/")
        self.host.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        answers = self.host.answers.get(path) or [status(404)]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_: Any) -> None:
        """Print no log."""

    def send(self, code: int, content: bytes = b"", **headers: str | int) -> None:
        """Send an answer. In the names of headers, _ stands for -."""
        self.send_response(code)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def whole(content: bytes, etag: str = '"1"', ranges: bool = True, **headers: str | int) -> Answer:
    """Answer of a correct server: the file or the requested range of it."""

    def answer(handler: Handler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range", etag)
        if not match or not ranges or condition != etag:
            return handler.send(200, content, **{"ETag": etag, **headers})
        start = int(match[1])
        if start >= len(content):
            return handler.send(416, Content_Range=f"bytes */{len(content)}")
        content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send(206, content[start:], **{"Content_Range": content_range, "ETag": etag, **headers})

    return answer


def cut(content: bytes, after: int, etag: str = '"1"') -> Answer:
    """Answer whose connection is reset after `after` bytes of content."""

    def answer(handler: Handler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if match else {}
        handler.send(206 if match else 200, b"", **{"Content_Length": len(content) - start, "ETag": etag, **headers})
        handler.wfile.write(content[start : start + after])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    return answer


def stall(content: bytes, after: int, released: threading.Event) -> Answer:
    """Answer that sends `after` bytes of content and then nothing until `released` is set."""

    def answer(handler: Handler) -> None:
        handler.send(200, b"", Content_Length=len(content), ETag='"1"')
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        released.wait(20)

    return answer


def status(code: int) -> Answer:
    """Error answer with an HTML body."""
    return lambda handler: handler.send(code, b"<html>no</html>")


def redirect(url: str) -> Answer:
    """Redirect (302) to a URL."""
    return lambda handler: handler.send(302, Location=url)


@contextmanager
def serve() -> Iterator[Host]:
    """Run a server on a free local port."""
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
