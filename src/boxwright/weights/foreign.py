"""Read the weights files of other libraries without executing code in them.

Three formats, recognised by the first bytes: torch files (read by torch's weights-only loader), plain pickles of arrays
(read by `restricted_pickle`), and safetensors.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from boxwright.weights.restricted_pickle import read_pickle

MAX_BYTES = 8 * 2**30
"""Of a file, and of what is packed in it."""
SAFE_TORCH = (2, 6)
"""Before it, torch's weights-only loader could be made to run code (CVE-2025-32434)."""

_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that torch wrote first, pickled, before 1.6."""
_INSIDE = ("state_dict", "model", "blobs")
"""Where checkpoints keep their tensors, if not at the top."""


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """What a file holds."""

    path: Path
    """Of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal digits."""
    tensors: dict[str, Tensor]
    """Tensors by their names in the file, on the CPU."""
    about: dict[str, Any]
    """Metadata of the file: plain data."""


def read_foreign(path: Path, *, sha256: str | None = None) -> ForeignFile:
    """Read a weights file of another code base.

    Args:
        path: Of the file.
        sha256: What its bytes must hash to, in hex; checked before anything else is looked at.

    Raises:
        ValueError: It is too large, has another hash, is damaged, or holds more than tensors and plain data.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is refused: {size:,} bytes are over the limit of {MAX_BYTES:,}")
    with path.open("rb") as file:
        start = file.read(len(_OLD_TORCH))
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if sha256 is not None and sha256.lower() != found:
        raise ValueError(f"{path} has sha256 {found}, not {sha256.lower()}: it is another file, or damaged")
    if start.startswith(_ZIP) or start == _OLD_TORCH:
        if start.startswith(_ZIP):
            _require_stored(path)
        page = _read_torch(path)
    elif start[8:9] == b"{":
        page = _read_safetensors(path)
    else:
        page = read_pickle(path)
    tensors, about = _split(path, page)
    return ForeignFile(path=path, sha256=found, tensors=tensors, about=about)


def _digest(file: Any) -> str:
    """What Python 3.10 has no `hashlib.file_digest` for."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def require_safe_torch(version: str) -> None:
    """Check that torch's weights-only loader is sound.

    Raises:
        ValueError: it is of a version with a known hole.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None
    if (int(numbers[1]), int(numbers[2])) < SAFE_TORCH:
        raise ValueError(
            f"torch {version} can be made to run code by a weights file (CVE-2025-32434), so none is read with it: "
            "install torch 2.6 or later"
        )


def _read_torch(path: Path) -> Any:
    require_safe_torch(torch.__version__)
    try:
        with warnings.catch_warnings():
            # Of old files with storages of types, and of files that torch did not write.
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{name[1]}, which" if name else "what"
        raise ValueError(
            f"{path} is refused: it holds {what} is neither a tensor nor plain data and may be a program. If you trust "
            "it, write it again with its own code base as torch.save({'state_dict': model.state_dict()}, FILE)"
        ) from None
    except Exception as error:  # Damaged files raise many types of errors in torch, AssertionError among them.
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or no torch file ({text}): copy or fetch it again") from None


def _require_stored(path: Path) -> None:
    """Check that a zip file is whole and unpacks to no more than its own size, as torch's do, which pack nothing."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except Exception as error:  # such as the UnicodeDecodeError of a damaged name
        raise ValueError(f"{path} is damaged or no torch file ({error}): copy or fetch it again") from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(f"{path} is refused: it is packed, which torch's own files never are")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {"state_dict": tensors, "metadata": file.metadata() or {}}
    except Exception as error:  # such as the KeyError of a number type that this version of safetensors lacks
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): copy or fetch it again") from None


def _split(path: Path, page: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a checkpoint into its tensors and its metadata."""
    if not isinstance(page, Mapping):
        raise ValueError(f"{path} holds a {type(page).__name__}, not tensors by name")
    inside = next((page[key] for key in _INSIDE if isinstance(page.get(key), Mapping)), page)
    tensors: dict[str, Tensor] = {}
    for name, value in inside.items():
        tensor = _tensor(value)
        if isinstance(name, str) and tensor is not None:
            tensors[name] = tensor
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither at its top nor under {', '.join(_INSIDE)}")
    about = {key: value for key, value in page.items() if value is not inside and _tensor(value) is None}
    prefix = "module."  # of a model that was saved inside its wrapper for several devices
    if all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, about


def _tensor(value: Any) -> Tensor | None:
    """A dense tensor, of an array too; None of anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        # torch knows no foreign byte order.
        return torch.from_numpy(np.asarray(value, value.dtype.newbyteorder("="), order="C"))
    return value.detach() if isinstance(value, Tensor) and value.layout == torch.strided else None
