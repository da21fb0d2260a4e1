"""Rank and world size have one definition, which all layers of the package use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

import boxwright
from boxwright import distributed
from boxwright.training import distributed as training_distributed

PACKAGE = Path(boxwright.__file__).parent
EXCEPTIONS = {"distributed.py", "losses.py"}
"""`losses.py` reads the world size inside the compiled graph of the losses."""


def test_single_process_is_rank_0_of_1() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_values_come_from_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert (distributed.rank(), distributed.world_size()) == (2, 4)


def test_training_exports_the_same_functions() -> None:
    assert training_distributed.rank is distributed.rank
    assert training_distributed.world_size is distributed.world_size


def test_no_other_file_reads_rank_or_world_size_from_torch() -> None:
    readers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if re.search(r"\bget_(rank|world_size)\(", file.read_text(encoding="utf-8"))
    }
    assert readers == EXCEPTIONS
