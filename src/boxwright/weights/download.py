"""Download a file over HTTP from several mirrors, with retries, resumption and hash checks.

The data is written to `NAME.part`. `NAME.part.json` records the URL, version and length of the file, so that a later
attempt of this or another process can resume the download. `NAME.part` is renamed to `NAME` after its length and hash
have been checked, so that `NAME` is never incomplete.
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
# Interruptions are normal in long downloads. One after at least this many new bytes does not count as a failed attempt.
_MIN_PROGRESS = 1 << 20
# Request timeout, too early, too many requests.
_TRANSIENT_STATUS = {408, 425, 429}
# Statuses with which the hub answers requests for a private repository without read access.
_ACCESS_STATUS = {401, 403, 404}

ProgressCallback = Callable[[int, int | None], None]
"""Called with the number of bytes downloaded and the total number of bytes (None if the host does not state it)."""


class FetchError(OSError):
    """A file cannot be downloaded. The message lists the mirrors and the error of each."""


class _PermanentError(Exception):
    """An error for which a retry is pointless."""


class _TransientError(Exception):
    """An error that may not occur again in a retry."""


class _OutOfRange(_TransientError):
    """HTTP 416: the file has no bytes after the part that we have."""


class _Part(msgspec.Struct):
    """Contents of `NAME.part.json`: the file that `NAME.part` is the beginning of."""

    url: str
    validator: str
    """ETag or Last-Modified date of the file's version; empty if the host sent neither."""
    length: int
    """Length of the complete file in bytes."""


def download(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str,
    md5: str = "",
    timeout: float,
    tries: int,
    pause: float,
    progress: ProgressCallback,
) -> None:
    """Download a file. The caller must ensure that no other process downloads to the same target.

    Args:
        urls: mirrors in order of preference.
        target: path of the file; its folder must exist.
        sha256: SHA-256 hash, or its first digits, in lower-case hexadecimal; empty if unknown.
        md5: MD5 hash, or its first digits; empty if unknown.
        timeout: seconds without data after which a connection is given up.
        tries: maximum number of attempts per mirror.
        pause: seconds before the second round of attempts; doubled for each further round, up to 30 seconds.
        progress: called as data arrives.

    Raises:
        FetchError: no mirror delivered the file.
        OSError: the file cannot be written.
    """
    transfer = _Download(target, sha256, md5, timeout, progress)
    errors: dict[str, str] = {}
    mirrors = list(urls)
    for attempt in range(tries):
        if attempt and mirrors:
            time.sleep(min(pause * 2 ** (attempt - 1), 30.0))
        for url in list(mirrors):
            error = transfer.from_mirror(url)
            if error is None:
                return
            errors[url] = str(error)
            if isinstance(error, _PermanentError):
                mirrors.remove(url)
    attempts = "".join(f"\n  {url}: {error}" for url, error in errors.items())
    raise FetchError(
        f"cannot download {target.name}. Mirrors tried:{attempts}\n"
        f"If this machine needs a proxy, set HTTPS_PROXY. Or download the file elsewhere and save it as {target}"
    )


def read_url(url: str, *, limit: int, timeout: float) -> bytes:
    """Return the content of a small file without storing it.

    Raises:
        FetchError: the file cannot be downloaded, or is larger than `limit` bytes.
    """
    try:
        with _open(url, {}, timeout) as response:
            content = response.read(limit + 1)
    except (_PermanentError, _TransientError, OSError, HTTPException) as error:
        raise FetchError(f"cannot download {url}: {_reason(error)}") from error
    if len(content) > limit:
        raise FetchError(f"{url} is larger than the limit of {limit:,} bytes. Check the URL.")
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 hash of a file, 64 hexadecimal digits."""
    return _hash_of(path, hashlib.sha256())


def md5_of(path: Path) -> str:
    """MD5 hash of a file, 32 hexadecimal digits. It detects damage but not a file that was forged on purpose."""
    return _hash_of(path, hashlib.md5(usedforsecurity=False))


def _hash_of(path: Path, digest: hashlib._Hash) -> str:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


class _Download:
    """The download of one file."""

    def __init__(self, target: Path, sha256: str, md5: str, timeout: float, progress: ProgressCallback) -> None:
        self._target, self._timeout, self._progress = target, timeout, progress
        self._sha256, self._md5 = sha256, md5
        self._part_file = target.with_name(f"{target.name}.part")
        self._metadata_file = target.with_name(f"{target.name}.part.json")

    def from_mirror(self, url: str) -> _PermanentError | _TransientError | None:
        """Download from one mirror. If a connection is interrupted after `_MIN_PROGRESS` bytes, resume at once.

        Returns:
            The error, or None on success.
        """
        while True:
            before = self._size()
            try:
                self._fetch(url)
                return None
            except _PermanentError as error:
                return error
            except _TransientError as error:
                if self._size() - before < _MIN_PROGRESS:
                    return error

    def _fetch(self, url: str) -> None:
        part = self._usable_part(url)
        start = self._size() if part else 0
        if part is None or start < part.length:
            self._receive(url, part, start)
        for name, hash_of, expected in (("SHA-256", sha256_of, self._sha256), ("MD5", md5_of, self._md5)):
            actual = hash_of(self._part_file) if expected else ""
            if not actual.startswith(expected):
                self._discard_part()
                message = f"{name} mismatch: expected a hash that starts with {expected}, got {actual[: len(expected)]}"
                # A resumed file may mix two versions of the file: a fresh download from this mirror may be right.
                raise _TransientError(message) if start else _PermanentError(message)
        with self._part_file.open("rb+") as file:
            os.fsync(file.fileno())
        self._part_file.replace(self._target)
        self._metadata_file.unlink(missing_ok=True)

    def _receive(self, url: str, part: _Part | None, start: int) -> None:
        """Append the missing bytes to the part; download the whole file if the host ignores or refuses the range."""
        headers = {}
        if part is not None:
            headers["Range"] = f"bytes={start}-"
            if part.url == url and part.validator:
                headers["If-Range"] = part.validator
        try:
            response = _open(url, headers, self._timeout)
        except _OutOfRange:
            self._discard_part()
            raise
        with response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise _PermanentError(f"the host sends Content-Encoding {encoding}, but identity was requested")
            if response.status == 206 and part is not None:
                expected = f"bytes {start}-{part.length - 1}/{part.length}"
                actual = response.headers.get("Content-Range")
                if actual != expected:
                    self._discard_part()
                    raise _TransientError(f"the host sends Content-Range {actual}, but {expected} was requested")
                length: int | None = part.length
            elif response.status == 200:
                start, length = 0, self._begin(url, response)
            else:
                raise _PermanentError(f"unexpected HTTP status {response.status}")
            self._append(response, start, length)

    def _begin(self, url: str, response: HTTPResponse) -> int | None:
        """Discard the old part and write the metadata of a new one.

        Returns:
            Length of the file in bytes. It is None if the host does not state it; the download cannot be resumed then.
        """
        self._discard_part()
        content_length = response.headers.get("Content-Length", "")
        if not content_length.isdecimal():
            return None
        length = int(content_length)
        etag = response.headers.get("ETag", "")
        # A weak ETag (W/"...") does not guarantee identical bytes.
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        self._metadata_file.write_bytes(msgspec.json.encode(_Part(url, validator, length)))
        return length

    def _append(self, response: HTTPResponse, received: int, length: int | None) -> None:
        with self._part_file.open("ab") as file:
            while True:
                self._progress(received, length)
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, HTTPException) as error:
                    raise _TransientError(
                        f"interrupted after {received:,} of {_bytes(length)}: {_reason(error)}"
                    ) from error
                if not chunk:
                    break
                file.write(chunk)
                received += len(chunk)
        if length is not None and received < length:
            raise _TransientError(f"the host closed the connection after {received:,} of {_bytes(length)}")
        if length is not None and received > length:
            self._discard_part()
            raise _TransientError(f"the host sent more than the announced {_bytes(length)}")

    def _usable_part(self, url: str) -> _Part | None:
        """Metadata of the existing part, or None if it cannot be resumed.

        A part can be resumed if it has the same URL and a validator, which the host checks. With another URL, a known
        SHA-256 hash is required: it detects if the mirrors have different files.
        """
        try:
            part = msgspec.json.decode(self._metadata_file.read_bytes(), type=_Part)
        except (OSError, msgspec.MsgspecError):
            return None
        same_file = part.url == url and part.validator
        return part if 0 < self._size() <= part.length and (same_file or self._sha256) else None

    def _size(self) -> int:
        return self._part_file.stat().st_size if self._part_file.exists() else 0

    def _discard_part(self) -> None:
        # The part is deleted first: metadata without a part is harmless, but a part with wrong metadata is not.
        self._part_file.unlink(missing_ok=True)
        self._metadata_file.unlink(missing_ok=True)


def hub_url() -> str:
    """URL of the Hugging Face Hub without a trailing slash: `HF_ENDPOINT`, or https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _is_on_hub(url: str) -> bool:
    """Whether a URL has the hub's host and port, and https."""
    parts, hub_parts = urlsplit(url), urlsplit(hub_url())
    same_host = (parts.hostname, parts.port or 443) == (hub_parts.hostname, hub_parts.port or 443)
    return same_host and parts.scheme == hub_parts.scheme == "https"


def _with_token(request: Request) -> Request:
    """Add `HF_TOKEN` to a request to the hub. Requests to other hosts, including redirects, never carry the token.

    Raises:
        _PermanentError: the value of `HF_TOKEN` cannot be a token.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and _is_on_hub(request.full_url):
        if not re.fullmatch(r"[!-~]+", token):
            raise _PermanentError(
                "HF_TOKEN contains whitespace, control or non-ASCII characters. Set it to the token only."
            )
        # urllib sends all other headers to the target of a redirect as well.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class _Redirects(HTTPRedirectHandler):
    """Refuses redirects from https to http and to other protocols, and adds the token only for the hub."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            fp.close()
            raise _PermanentError(f"refused the redirect to {newurl}: it changes the protocol from {req.type}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        return None if request is None else _with_token(request)


def _open(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    """Open a URL through the proxies of the environment and return the response, if its status is a success."""
    defaults = {"User-Agent": f"boxwright/{__version__}", "Accept-Encoding": "identity"}
    try:
        request = _with_token(Request(url, headers={**defaults, **headers}))
        response: HTTPResponse = build_opener(_Redirects()).open(request, None, timeout)
    except HTTPError as error:
        error.close()
        transient = error.code >= 500 or error.code in _TRANSIENT_STATUS
        error_class = _OutOfRange if error.code == 416 else _TransientError if transient else _PermanentError
        maybe_private = error.code in _ACCESS_STATUS and _is_on_hub(url)
        hint = "; if the repository is private, set HF_TOKEN to a token with read access" if maybe_private else ""
        raise error_class(f"HTTP {error.code} {error.reason}{hint}") from error
    except URLError as error:
        raise _TransientError(str(error.reason)) from error
    except (InvalidURL, ValueError) as error:
        raise _PermanentError(f"invalid URL: {error}") from error
    except (OSError, HTTPException) as error:
        raise _TransientError(_reason(error)) from error
    return response


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _bytes(length: int | None) -> str:
    return "an unknown number of bytes" if length is None else f"{length:,} bytes"
