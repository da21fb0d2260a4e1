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
"""Limit on the size of a file."""
SAFE_TORCH = (2, 6)
"""First version of PyTorch whose weights-only loader cannot be made to run code (CVE-2025-32434)."""

_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files that PyTorch before 1.6 wrote: its magic number, pickled."""
_INSIDE = ("state_dict", "model", "blobs")
"""Keys under which checkpoints have their tensors, if not at the top level."""


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """Content of a weights file."""

    path: Path
    """Path of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal digits."""
    tensors: dict[str, Tensor]
    """Tensors by their names in the file, on the CPU."""
    about: dict[str, Any]
    """Metadata of the file: plain data."""


def read_foreign(path: Path, *, sha256: str | None = None) -> ForeignFile:
    """Read a weights file of another library.

    Args:
        path: the file.
        sha256: expected SHA-256 hash in hexadecimal digits; checked before the content is read.

    Raises:
        ValueError: the file is too large, has another hash, is damaged, or contains more than tensors and plain data.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: the file has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    with path.open("rb") as file:
        start = file.read(len(_OLD_TORCH))
        file.seek(0)
        actual = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if sha256 is not None and sha256.lower() != actual:
        raise ValueError(
            f"{path}: expected SHA-256 {sha256.lower()}, got {actual}. The file is damaged or another file. Download "
            "it again, or correct the hash."
        )
    if start.startswith(_ZIP) or start == _OLD_TORCH:
        if start.startswith(_ZIP):
            _require_stored(path)
        content = _read_torch(path)
    elif start[8:9] == b"{":
        content = _read_safetensors(path)
    else:
        content = read_pickle(path)
    tensors, about = _split(path, content)
    return ForeignFile(path=path, sha256=actual, tensors=tensors, about=about)


def _digest(file: Any) -> str:
    """SHA-256 hash of an open file, for Python 3.10, which has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def require_safe_torch(version: str) -> None:
    """Check that the weights-only loader of this version of PyTorch is safe.

    Raises:
        ValueError: the version has a known vulnerability.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None
    if (int(numbers[1]), int(numbers[2])) < SAFE_TORCH:
        raise ValueError(
            f"torch {version}: a weights file can make this version run code (CVE-2025-32434), so Boxwright reads no "
            "weights files of other libraries with it. Install torch 2.6 or later."
        )


def _read_torch(path: Path) -> Any:
    require_safe_torch(torch.__version__)
    try:
        with warnings.catch_warnings():
            # Old files have typed storages; files of other programs have other pickle protocols. Both can be read.
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = name[1] if name else "an object"
        raise ValueError(
            f"{path}: the file contains {what}, which is neither a tensor nor plain data and could run code. If you "
            "trust the file, load it with the library that wrote it, and save only the tensors: "
            "torch.save({'state_dict': model.state_dict()}, FILE)"
        ) from None
    except Exception as error:  # Damaged files raise many types of errors in torch, AssertionError among them.
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a torch file ({text}). Copy or download it again.") from None


def _require_stored(path: Path) -> None:
    """Check that a zip file is complete and not compressed, as in files that PyTorch writes.

    A file that is compressed, or whose entries overlap, could need far more memory than its size.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except Exception as error:  # such as UnicodeDecodeError for a damaged name
        raise ValueError(f"{path} is damaged or not a torch file ({error}). Copy or download it again.") from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(
            f"{path}: the file is compressed, but PyTorch writes uncompressed files. Save it with torch.save."
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {"state_dict": tensors, "metadata": file.metadata() or {}}
    except Exception as error:  # such as KeyError for a data type that this version does not support
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Copy or download it again.") from None


def _split(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a checkpoint into its tensors and its metadata."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: expected a dict of tensors by name, got {type(content).__name__}. Save the state dict of the "
            "model."
        )
    inside = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
    tensors: dict[str, Tensor] = {}
    for name, value in inside.items():
        tensor = _tensor(value)
        if isinstance(name, str) and tensor is not None:
            tensors[name] = tensor
    if not tensors:
        raise ValueError(
            f"{path}: expected tensors by name at the top level or under {', '.join(_INSIDE)}, got the entries "
            f"{', '.join(map(str, list(content)[:5])) or '(none)'}. Save the state dict of the model."
        )
    about = {key: value for key, value in content.items() if value is not inside and _tensor(value) is None}
    prefix = "module."  # added by DataParallel and DistributedDataParallel
    if all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, about


def _tensor(value: Any) -> Tensor | None:
    """Convert a dense tensor or an array to a tensor; None for other values."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        # PyTorch only supports the machine's byte order.
        return torch.from_numpy(np.asarray(value, value.dtype.newbyteorder("="), order="C"))
    return value.detach() if isinstance(value, Tensor) and value.layout == torch.strided else None
