"""Download weights files by URL into the cache folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from boxwright.cache import cache_folders
from boxwright.weights import download
from boxwright.weights.download import FetchError, ProgressCallback, md5_of, sha256_of

_FILE_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8}|[0-9a-f]{64})\.\w+$")
_DATE = re.compile(r"20\d\d[01]\d[0-3]\d")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file that can be downloaded."""

    name: str
    """File name without folders."""
    urls: tuple[str, ...]
    """http or https URLs of the mirrors, in order of preference."""
    sha256: str = ""
    """SHA-256 hash: 64 hexadecimal digits or at least the first 8; empty if unknown."""
    md5: str = ""
    """MD5 hash: 32 hexadecimal digits or the first few; empty if unknown. It is checked in addition to `sha256`."""


def remote_file(url: str) -> Remote:
    """The file at a URL, with the hash that the URL contains.

    The hash is the value of the fragment `#sha256=`, or the hexadecimal digits at the end of the file name, as in
    `NAME-0a1b2c3d.pth`. Eight digits that form a date, such as 20181010, are not taken as a hash.

    Raises:
        ValueError: the URL has no file name, or the value of `#sha256=` is not a hash.
    """
    address, _, fragment = url.partition("#")
    parts = urlsplit(address)
    name = unquote(parts.path.rpartition("/")[2])
    if not is_url(url) or not parts.hostname or not is_file_name(name):
        raise ValueError(f"{url} is not the URL of a file. Give a URL such as https://models.example/name.safetensors.")
    key, _, value = fragment.partition("=")
    if key == "sha256" and not is_hash(value):
        raise ValueError(f"{url}: #sha256= must be followed by 8 to 64 lower-case hexadecimal digits, got {value!r}")
    return Remote(name=name, urls=(address,), sha256=value if key == "sha256" else hash_in_name(name))


def is_url(text: str) -> bool:
    """Whether a text is an http or https URL and not a path."""
    return text.lower().startswith(("http://", "https://"))


def is_file_name(text: str) -> bool:
    """Whether a text is a file name that is valid on all operating systems."""
    return _FILE_NAME.fullmatch(text) is not None


def is_hash(text: str) -> bool:
    """Whether a text is a SHA-256 hash in lower-case hexadecimal digits, or at least its first 8 digits."""
    return re.fullmatch(r"[0-9a-f]{8,64}", text) is not None


def hash_in_name(name: str) -> str:
    """Digits of the SHA-256 hash at the end of a file name; empty if the name has none."""
    match = _HASH_IN_NAME.search(name)
    return match[1] if match and not _DATE.fullmatch(match[1]) else ""


def cached_path(remote: Remote) -> Path:
    """Path of a file in the cache. Files of the same name with different hashes or URLs have different paths."""
    key = remote.sha256[:8] or hashlib.sha256(remote.urls[0].encode()).hexdigest()[:16]
    return cache_folders()[0] / "weights" / key / remote.name


def fetch(remote: Remote, *, timeout: float = 20.0, tries: int = 4, pause: float = 1.0) -> Path:
    """Download a file into the cache, unless it is there already, and return its path.

    The hash, if known, is checked on every call, also for a cached file. Proxies are taken from the environment
    (`HTTPS_PROXY`, `NO_PROXY`). With `BOXWRIGHT_OFFLINE=1`, nothing is downloaded.

    Args:
        remote: the file to download.
        timeout: seconds without data after which a connection is given up.
        tries: maximum number of attempts per mirror.
        pause: seconds before the second round of attempts; doubled for each further round, up to 30 seconds.

    Raises:
        FetchError: the file is not in the cache, and no mirror delivered it or `BOXWRIGHT_OFFLINE` is set.
        OSError: the cache cannot be written.
    """
    target = cached_path(remote)
    if _is_valid(target, remote):
        return target
    if is_offline():
        raise FetchError(
            f"{target} is missing or damaged, and BOXWRIGHT_OFFLINE is set. Unset it, or copy the file there."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {target.parent} ({error}). Set BOXWRIGHT_CACHE to another folder.") from error
    try:
        # The operating system releases this lock when the process ends, even if it is killed.
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not _is_valid(target, remote):  # another process may have downloaded it in the meantime
                with _progress_bar(remote.name) as progress:
                    download.download(
                        remote.urls,
                        target,
                        sha256=remote.sha256,
                        md5=remote.md5,
                        timeout=timeout,
                        tries=tries,
                        pause=pause,
                        progress=progress,
                    )
    except FetchError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {target} ({error}). Free disk space or change permissions, and retry.") from error
    return target


def copy_into(path: Path, folder: Path) -> Path:
    """Copy a file into a folder atomically, creating the folder if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as temporary:
        shutil.copyfile(path, Path(temporary) / path.name).replace(target)
    return target


def read_remote(url: str, *, limit: int = 1 << 24, timeout: float = 20.0) -> bytes:
    """Return the content of a small file without caching it.

    Raises:
        FetchError: the file cannot be downloaded, is larger than `limit` bytes, or `BOXWRIGHT_OFFLINE` is set.
    """
    if is_offline():
        raise FetchError(f"cannot download {url}: BOXWRIGHT_OFFLINE is set. Unset it, or use a local file.")
    return download.read_url(url, limit=limit, timeout=timeout)


def is_offline() -> bool:
    """Whether the environment variable `BOXWRIGHT_OFFLINE` forbids network access."""
    return os.environ.get("BOXWRIGHT_OFFLINE", "0") not in ("", "0")


def _is_valid(path: Path, remote: Remote) -> bool:
    """Whether a file exists and has the known hashes."""
    return (
        path.is_file()
        and (not remote.sha256 or sha256_of(path).startswith(remote.sha256))
        and (not remote.md5 or md5_of(path).startswith(remote.md5))
    )


@contextmanager
def _progress_bar(name: str) -> Iterator[ProgressCallback]:
    """Show the progress of a download, if standard error is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
