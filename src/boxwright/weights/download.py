"""A file over HTTP, over several mirrors and several tries: whole and with the right hash, or not there at all.

What arrives is written to `NAME.part`, beside a page that says what it is the beginning of, so that a later try, of
this process or another, goes on where it stopped. The file gets its own name when its length and its hash are right.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import msgspec

from boxwright import __version__

_CHUNK = 1 << 18
# A connection that is cut after so many bytes more is no fault of the host, but the way of long downloads.
_GOOD_PIECE = 1 << 20
# Timed out, too early, too many requests: another time they may do.
_PASSING = {408, 425, 429}
# What the hub says of a private repository to those who may not read it.
_NOT_FOR_ALL = {401, 403, 404}

Show = Callable[[int, int | None], None]
"""Told the bytes that are there and those that there will be, if the host says so."""


class FetchError(OSError):
    """A file cannot be had; the message tells who was asked and what each said."""


class _Refused(Exception):
    """An answer that will not change."""


class _Failed(Exception):
    """A fault that may pass."""


class _OutOfRange(_Failed):
    """There is nothing behind what we have."""


class _Part(msgspec.Struct):
    """What `NAME.part` is the beginning of."""

    url: str
    validator: str
    """What tells this version of the file from others at its place, an ETag or a date; empty if there is neither."""
    length: int
    """Bytes of the whole file."""


def download(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str,
    md5: str = "",
    timeout: float,
    tries: int,
    pause: float,
    show: Show,
) -> None:
    """Download a file; the caller sees to it that nobody else does so at the same time.

    Args:
        urls: the mirrors, the first to ask first.
        target: the file's path; its folder exists.
        sha256: the hash, or its first digits, in lower-case hexadecimal; empty if unknown.
        md5: the same of the MD5 hash.
        timeout: seconds that a host may be silent.
        tries: how often a mirror is asked whose fault may pass.
        pause: seconds before the second round; doubled for each further one, up to half a minute.
        show: hears of the progress.

    Raises:
        FetchError: no mirror gave the file.
        OSError: it cannot be written.
    """
    work = _Download(target, sha256, md5, timeout, show)
    said: dict[str, str] = {}
    mirrors = list(urls)
    for number in range(tries):
        if number and mirrors:
            time.sleep(min(pause * 2 ** (number - 1), 30.0))
        for url in list(mirrors):
            fault = work.from_mirror(url)
            if fault is None:
                return
            said[url] = str(fault)
            if isinstance(fault, _Refused):
                mirrors.remove(url)
    tried = "".join(f"\n  {url}: {what}" for url, what in said.items())
    raise FetchError(
        f"{target.name} cannot be fetched. Mirrors tried:{tried}\n"
        f"Set HTTPS_PROXY if there is a proxy between, or get the file elsewhere and put it at {target}"
    )


def read_url(url: str, *, limit: int, timeout: float) -> bytes:
    """What a small page holds; nothing is kept.

    Raises:
        FetchError: it cannot be had, or is larger than `limit` bytes.
    """
    try:
        with _open(url, {}, timeout) as response:
            content = response.read(limit + 1)
    except (_Refused, _Failed, OSError, HTTPException) as error:
        raise FetchError(f"{url} cannot be read: {_reason(error)}") from error
    if len(content) > limit:
        raise FetchError(f"{url} is larger than {limit:,} bytes, and so not what belongs there")
    return content


def sha256_of(path: Path) -> str:
    """A file's hash, 64 hexadecimal digits."""
    return _hash_of(path, hashlib.sha256())


def md5_of(path: Path) -> str:
    """A file's MD5 hash, 32 hexadecimal digits: it tells damage, and not who made a file."""
    return _hash_of(path, hashlib.md5(usedforsecurity=False))


def _hash_of(path: Path, digest: hashlib._Hash) -> str:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


class _Download:
    """One file on its way."""

    def __init__(self, target: Path, sha256: str, md5: str, timeout: float, show: Show) -> None:
        self._target, self._sha256, self._timeout, self._show = target, sha256, timeout, show
        self._md5 = md5
        self._file = target.with_name(f"{target.name}.part")
        self._page = target.with_name(f"{target.name}.part.json")

    def from_mirror(self, url: str) -> _Refused | _Failed | None:
        """Fetch from one mirror, going on at once where a connection is cut after a good piece.

        Returns:
            What went wrong, or None.
        """
        while True:
            before = self._size()
            try:
                self._fetch(url)
                return None
            except _Refused as fault:
                return fault
            except _Failed as fault:
                if self._size() - before < _GOOD_PIECE:
                    return fault

    def _fetch(self, url: str) -> None:
        part = self._usable_part(url)
        have = self._size() if part else 0
        if part is None or have < part.length:
            self._receive(url, part, have)
        for name, hash_of, stated in (("SHA-256", sha256_of, self._sha256), ("MD5", md5_of, self._md5)):
            actual = hash_of(self._file) if stated else ""
            if not actual.startswith(stated):
                self._drop()
                what = f"the file's {name} hash begins with {actual[: len(stated)]}, not {stated}"
                # Pieces of two versions may have met: begun anew, the same mirror may well give the right file.
                raise _Failed(what) if have else _Refused(what)
        with self._file.open("rb+") as file:
            os.fsync(file.fileno())
        self._file.replace(self._target)
        self._page.unlink(missing_ok=True)

    def _receive(self, url: str, part: _Part | None, have: int) -> None:
        """Append what is missing of a part, or begin anew where the host does not give just that."""
        headers = {}
        if part is not None:
            headers["Range"] = f"bytes={have}-"
            if part.url == url and part.validator:
                headers["If-Range"] = part.validator
        try:
            response = _open(url, headers, self._timeout)
        except _OutOfRange:
            self._drop()
            raise
        with response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _Refused(f"sends the file as {response.headers['Content-Encoding']}, which was not asked for")
            if response.status == 206 and part is not None:
                expected = f"bytes {have}-{part.length - 1}/{part.length}"
                if response.headers.get("Content-Range") != expected:
                    self._drop()
                    raise _Failed(f"sends {response.headers.get('Content-Range')}, not {expected}")
                length: int | None = part.length
            elif response.status == 200:
                have, length = 0, self._begin(url, response)
            else:
                raise _Refused(f"HTTP {response.status} is no answer to a request for a file")
            self._append(response, have, length)

    def _begin(self, url: str, response: HTTPResponse) -> int | None:
        """Write the page of a file that comes from its start, in place of what there was of it.

        Returns:
            Bytes of the whole file; None if the host does not tell, and then there is no page to go on by.
        """
        self._drop()
        stated = response.headers.get("Content-Length", "")
        if not stated.isdecimal():
            return None
        length = int(stated)
        etag = response.headers.get("ETag", "")
        # A weak ETag stands for files that mean the same, not for the same bytes.
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        self._page.write_bytes(msgspec.json.encode(_Part(url, validator, length)))
        return length

    def _append(self, response: HTTPResponse, have: int, length: int | None) -> None:
        with self._file.open("ab") as file:
            while True:
                self._show(have, length)
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, HTTPException) as error:
                    raise _Failed(f"stopped after {have:,} of {_bytes(length)}: {_reason(error)}") from error
                if not chunk:
                    break
                file.write(chunk)
                have += len(chunk)
        if length is not None and have < length:
            raise _Failed(f"closed the connection after {have:,} of {_bytes(length)}")
        if length is not None and have > length:
            self._drop()
            raise _Failed(f"sent more than the {_bytes(length)} that it had told")

    def _usable_part(self, url: str) -> _Part | None:
        """What there is already, if it can only be the beginning of what this mirror has, or the hash will tell."""
        try:
            part = msgspec.json.decode(self._page.read_bytes(), type=_Part)
        except (OSError, msgspec.MsgspecError):
            return None
        same = part.url == url and part.validator
        return part if 0 < self._size() <= part.length and (same or self._sha256) else None

    def _size(self) -> int:
        return self._file.stat().st_size if self._file.exists() else 0

    def _drop(self) -> None:
        # The part first: a page without its part means nothing, a part with the page of another would be taken for it.
        self._file.unlink(missing_ok=True)
        self._page.unlink(missing_ok=True)


def hub() -> str:
    """The URL of the Hugging Face hub, without a slash behind it; `HF_ENDPOINT` may name another host."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _is_of_hub(url: str) -> bool:
    """Whether a URL is of the hub's own host and port, over https."""
    asked, own = urlsplit(url), urlsplit(hub())
    same = (asked.hostname, asked.port or 443) == (own.hostname, own.port or 443)
    return same and asked.scheme == own.scheme == "https"


def _with_token(request: Request) -> Request:
    """The request, with `HF_TOKEN` if it goes to the hub; the token goes nowhere else, by a redirect neither.

    Raises:
        _Refused: what `HF_TOKEN` holds cannot be one.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and _is_of_hub(request.full_url):
        if not re.fullmatch(r"[!-~]+", token):
            raise _Refused("HF_TOKEN holds more than letters, digits and signs: set it to the token alone")
        # Those that are not "unredirected" urllib sends on to wherever a host points.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class _Redirects(HTTPRedirectHandler):
    """Follows no redirect away from HTTP, and none from https to http; a token goes to the hub alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            fp.close()
            raise _Refused(f"redirects to {newurl}, which is less safe and not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        return None if request is None else _with_token(request)


def _open(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    """The answer to a request, if it is one of success. Proxies are those of the environment."""
    own = {"User-Agent": f"boxwright/{__version__}", "Accept-Encoding": "identity"}
    try:
        request = _with_token(Request(url, headers={**own, **headers}))
        response: HTTPResponse = build_opener(_Redirects()).open(request, None, timeout)
    except HTTPError as error:
        error.close()
        passing = error.code >= 500 or error.code in _PASSING
        kind = _OutOfRange if error.code == 416 else _Failed if passing else _Refused
        private = error.code in _NOT_FOR_ALL and _is_of_hub(url)
        hint = "; if it is private, set HF_TOKEN to a token that may read it" if private else ""
        raise kind(f"HTTP {error.code} {error.reason}{hint}") from error
    except URLError as error:
        raise _Failed(str(error.reason)) from error
    except (InvalidURL, ValueError) as error:
        raise _Refused(f"this URL cannot be asked for: {error}") from error
    except (OSError, HTTPException) as error:
        raise _Failed(_reason(error)) from error
    return response


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _bytes(length: int | None) -> str:
    return "bytes of an unknown number" if length is None else f"{length:,} bytes"
