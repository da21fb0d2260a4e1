"""Cache folders for annotation indexes, proposals and downloaded weights."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folders() -> list[Path]:
    """Folders for cached files, preferred first: `BOXWRIGHT_CACHE`, otherwise the user's cache folder.

    The temporary folder is the last choice.
    """
    temporary = Path(tempfile.gettempdir()) / f"boxwright-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    if os.environ.get("BOXWRIGHT_CACHE"):
        return [Path(os.environ["BOXWRIGHT_CACHE"]), temporary]
    home_cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return [Path(home_cache) / "boxwright", temporary]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, as 32 hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    # Half a second for COCO's 448 MB: cheap enough to detect every edit.
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()[:32]
