"""Weights files by URL, kept in the cache folder."""

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
from boxwright.weights.download import FetchError, Show, md5_of, sha256_of

_FILE_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8}|[0-9a-f]{64})\.\w+$")
_DATE = re.compile(r"20\d\d[01]\d[0-3]\d")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on the network."""

    name: str
    """The file's own name, without folders."""
    urls: tuple[str, ...]
    """Its mirrors, the first to ask first; http or https."""
    sha256: str = ""
    """64 hexadecimal digits, or the first 8 or more of them, as public file names carry them; empty if unknown."""
    md5: str = ""
    """32 hexadecimal digits of this other hash, or the first few, where its makers state no better; checked too."""


def remote_file(url: str) -> Remote:
    """The file of a URL, with the hash that the URL tells.

    That is what stands behind `#sha256=`, or else the hexadecimal digits at the end of its name, as in
    `NAME-0a1b2c3d.pth`; eight digits that read as a date are no hash.

    Raises:
        ValueError: It is no URL of a file, or what stands behind `#sha256=` is no hash.
    """
    address, _, fragment = url.partition("#")
    parts = urlsplit(address)
    name = unquote(parts.path.rpartition("/")[2])
    if not is_url(url) or not parts.hostname or not is_file_name(name):
        raise ValueError(f"{url} is no URL of a file: give one such as https://models.example/name.safetensors")
    key, _, stated = fragment.partition("=")
    if key == "sha256" and not is_hash(stated):
        raise ValueError(f"{url}: behind #sha256= come 64 hexadecimal digits, or at least the first 8 of them")
    return Remote(name=name, urls=(address,), sha256=stated if key == "sha256" else hash_in_name(name))


def is_url(text: str) -> bool:
    """Whether it is an address on the network rather than a path."""
    return text.lower().startswith(("http://", "https://"))


def is_file_name(text: str) -> bool:
    """Whether a file may have this name in any folder of any system."""
    return _FILE_NAME.fullmatch(text) is not None


def is_hash(text: str) -> bool:
    """Whether it is a SHA-256 hash in lower-case hexadecimal digits, or at least the first 8 of them."""
    return re.fullmatch(r"[0-9a-f]{8,64}", text) is not None


def hash_in_name(name: str) -> str:
    """The digits of the SHA-256 hash that a file's name ends in; empty if it carries none."""
    found = _HASH_IN_NAME.search(name)
    return found[1] if found and not _DATE.fullmatch(found[1]) else ""


def cached_path(remote: Remote) -> Path:
    """Where a file is kept; one of the same name with another hash, or from another place, is another file."""
    key = remote.sha256[:8] or hashlib.sha256(remote.urls[0].encode()).hexdigest()[:16]
    return cache_folders()[0] / "weights" / key / remote.name


def fetch(remote: Remote, *, timeout: float = 20.0, tries: int = 4, pause: float = 1.0) -> Path:
    """The path of a file, downloaded unless the cache has it.

    A known hash is checked every time, of a cached file too. A file without one is fetched once and then kept. Proxies
    are those of the environment (`HTTPS_PROXY`, `NO_PROXY`); with `BOXWRIGHT_OFFLINE=1` nobody is asked.

    Args:
        remote: What to fetch.
        timeout: Seconds that a host may be silent.
        tries: How often a mirror is asked whose fault may pass.
        pause: Seconds before the second round; doubled for each further one, up to half a minute.

    Raises:
        FetchError: It is not in the cache, and no mirror gave it, or none may be asked.
        OSError: The cache cannot be written.
    """
    target = cached_path(remote)
    if _is_whole(target, remote):
        return target
    if is_offline():
        raise FetchError(f"there is no whole {target}, and BOXWRIGHT_OFFLINE is set: unset it, or put the file there")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{target.parent} cannot be made ({error}): set BOXWRIGHT_CACHE to another folder") from error
    try:
        # The system drops this lock with its process, however that ends.
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not _is_whole(target, remote):  # unless another process fetched it meanwhile
                with _bar(remote.name) as show:
                    download.download(
                        remote.urls,
                        target,
                        sha256=remote.sha256,
                        md5=remote.md5,
                        timeout=timeout,
                        tries=tries,
                        pause=pause,
                        show=show,
                    )
    except FetchError:
        raise
    except OSError as error:
        raise OSError(f"{target} cannot be written ({error}): make room or give access, then ask again") from error
    return target


def copy_into(path: Path, folder: Path) -> Path:
    """Copy a file into a folder, which is made if need be; the copy appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.name}.") as draft:
        shutil.copyfile(path, Path(draft) / path.name).replace(target)
    return target


def read_page(url: str, *, limit: int = 1 << 24, timeout: float = 20.0) -> bytes:
    """What a page of at most `limit` bytes holds; nothing is kept.

    Raises:
        FetchError: It cannot be had, is larger, or may not be asked for.
    """
    if is_offline():
        raise FetchError(f"{url} cannot be read, because BOXWRIGHT_OFFLINE is set: unset it, or give a file")
    return download.read_url(url, limit=limit, timeout=timeout)


def is_offline() -> bool:
    """Whether the environment says that nothing may be asked of the network."""
    return os.environ.get("BOXWRIGHT_OFFLINE", "0") not in ("", "0")


def _is_whole(path: Path, remote: Remote) -> bool:
    return (
        path.is_file()
        and (not remote.sha256 or sha256_of(path).startswith(remote.sha256))
        and (not remote.md5 or md5_of(path).startswith(remote.md5))
    )


@contextmanager
def _bar(name: str) -> Iterator[Show]:
    """A line on the terminal, if there is one, that tells how far a download is."""
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
