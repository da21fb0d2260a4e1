"""Boxwright's weights format: a safetensors file with tensors and JSON metadata. Reading it executes no code.

The tensors have the names of the detector's `state_dict`, and any safetensors reader can read them. The metadata is the
string `boxwright` in the safetensors metadata::

    {"format": "boxwright-1",
     "experiment": {"call": "boxwright.training.experiment.Experiment", "arguments": {...}},
     "categories": [{"id": 1, "name": "person"}, ...],
     "versions": {"boxwright": "0.1.0", ...}, ...}
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "boxwright-1"
_KEY = "boxwright"


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a weights file atomically: after a failure, `path` still holds the old file, if there was one.

    Args:
        path: path of the file; missing folders are created.
        tensors: tensors by name, on any device.
        metadata: JSON-serialisable values: "experiment", "categories", "versions" and others.
    """
    text = json.dumps({"format": FORMAT, **metadata})
    # safetensors rejects tensors that share memory or are not contiguous.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(copies, temporary, {_KEY: text})


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends without an exception.

    Args:
        path: path of the file; missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is next to the target, since a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        # safetensors creates files that only the owner can read. Copy the mode of a normally created file.
        reference = Path(folder) / "reference"
        reference.touch()
        shutil.copymode(reference, temporary)
        _flush(temporary)
        temporary.replace(path)
    _flush(path.parent)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weights file.

    Args:
        path: path of the file.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        ValueError: the file is truncated, not a safetensors file, or not written by Boxwright.
        OSError: the file cannot be read.
    """
    with path.open("rb"):  # raises the usual OSError for a missing file; safetensors raises its own errors
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _read_metadata(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except ValueError:
        raise
    except Exception as error:  # such as the AttributeError of a number type that torch lacks
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}). If it is truncated, copy or download it again. "
            "Otherwise give a file that boxwright train wrote."
        ) from None


def is_ours(path: Path) -> bool:
    """Whether a file is a valid safetensors file with Boxwright's metadata, of any format version.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def _read_metadata(path: Path, strings: Mapping[str, str] | None) -> dict[str, Any]:
    """Decode and check Boxwright's metadata, one of the strings in the safetensors metadata."""
    text = (strings or {}).get(_KEY)
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file without Boxwright's metadata. Give a file that boxwright train wrote."
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested JSON
        raise ValueError(f"{path}: the metadata is not valid JSON ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        actual = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {actual!r}. Update boxwright.")
    for name, expected in (("experiment", dict), ("categories", list)):
        if name in metadata and not isinstance(metadata[name], expected):
            actual_type = type(metadata[name]).__name__
            raise ValueError(f"{path}: metadata {name!r}: expected {expected.__name__}, got {actual_type}")
    return metadata


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
