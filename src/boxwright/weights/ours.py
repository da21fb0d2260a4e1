"""Boxwright's weights files: named tensors and a JSON page, in one safetensors file. No code, nothing unpickled.

The page is the string `boxwright` of the safetensors metadata::

    {"format": "boxwright-1",
     "experiment": {"call": "boxwright.training.experiment.Experiment", "arguments": {...}},
     "categories": [{"id": 1, "name": "person"}, ...],
     "versions": {"boxwright": "0.1.0", ...}, ...}

Any safetensors reader can read the tensors; they are named as in the detector's `state_dict`.
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
    """Write a weights file, whole or not at all: whatever happens, `path` is the old file or the new one.

    Args:
        path: of the file; its folder is made if it is not there.
        tensors: by name, on any device.
        metadata: what `json` can write: "experiment", "categories", "versions" and what else is worth keeping.
    """
    page = json.dumps({"format": FORMAT, **metadata})
    # Tensors that share memory are refused by safetensors, and so are views with gaps.
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(own, temporary, {_KEY: page})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write at that becomes `path` when all is well: whatever happens, that is the old file or the new one.

    Args:
        path: of the file; its folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a file can be renamed into place only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        # safetensors lets the owner alone read its files; these are for whoever may read what is written here.
        usual = Path(folder) / "usual"
        usual.touch()
        shutil.copymode(usual, temporary)
        _flush(temporary)
        temporary.replace(path)
    _flush(path.parent)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weights file.

    Args:
        path: of the file.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        ValueError: the file is cut short, or no safetensors file, or not Boxwright's.
        OSError: it cannot be read.
    """
    with path.open("rb"):  # for the usual OSError where safetensors has its own
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _page(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except ValueError:
        raise
    except Exception as error:  # such as the AttributeError of a number type that torch lacks
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it may be cut short (copy or fetch it again) or of "
            "another kind (give one that boxwright train wrote)"
        ) from None


def is_ours(path: Path) -> bool:
    """Whether a file is a whole safetensors file with a page of Boxwright's, of whatever version.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def _page(path: Path, strings: Mapping[str, str] | None) -> dict[str, Any]:
    """The metadata in a safetensors file's own."""
    text = (strings or {}).get(_KEY)
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file, but not one of Boxwright's: give one that boxwright train wrote"
        )
    try:
        page = json.loads(text)
    except (ValueError, RecursionError) as error:  # of no JSON, a number of thousands of digits, or endless nesting
        raise ValueError(f"{path} has metadata that is no JSON ({error})") from None
    if not isinstance(page, dict) or page.get("format") != FORMAT:
        found = page.get("format") if isinstance(page, dict) else page
        raise ValueError(f"{path} is of format {found!r}; this version reads {FORMAT!r}: update boxwright")
    for name, kind in (("experiment", dict), ("categories", list)):
        if name in page and not isinstance(page[name], kind):
            raise ValueError(f"{path} has {name!r} metadata that is no {'object' if kind is dict else 'list'}")
    return page


def _flush(path: Path) -> None:
    """Have the system write a file, or what a folder lists, to the disk now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
