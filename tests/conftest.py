"""What all tests share: where the real images are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images and annotations, from BOXWRIGHT_DATA or beside the project."""
    folder = Path(os.environ.get("BOXWRIGHT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no real data at {folder}: set BOXWRIGHT_DATA to a folder that holds coco_mini, bccd, nuclei and coco_eval"
        )
    return folder
