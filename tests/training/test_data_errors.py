"""A run whose data set raises ends at once, with one process or several."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from training.runs import start_python

WAIT = 120
"""Seconds after which a run counts as hanging."""
CODE = """
import os
from pathlib import Path
from boxwright.training.distributed import process_group
from boxwright.training.loop import train
from training.fakes import FakeImages
from training.runs import tiny_experiment

class Faulty(FakeImages):
    def __getitem__(self, position):
        if position % 2 and os.environ.get("RANK", "1") == "1":
            raise KeyError("no such column")
        return super().__getitem__(position)

with process_group("cpu") as device:
    train(tiny_experiment(images_per_device={images}), Faulty(), Path({out!r}), device=device, num_workers=1)
"""


def errors_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=WAIT)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the run hangs")


def test_a_run_ends_with_the_error_of_its_data_set(tmp_path: Path) -> None:
    process = start_python(CODE.format(images=4, out=str(tmp_path / "run")))
    assert "SampleError: KeyError: 'no such column' (position" in errors_of(process)
    assert process.returncode == 1


def test_an_error_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    code = CODE.format(images=2, out=str(tmp_path / "run"))
    ranks = [start_python(code, RANK=str(i), LOCAL_RANK=str(i), **environment) for i in range(2)]
    # Wait for the failing rank first, as torchrun does before it stops the other ranks.
    errors = errors_of(ranks[1])
    assert "SampleError: KeyError: 'no such column'" in errors
    assert ranks[1].returncode == 1
    assert "closed by peer" in errors_of(ranks[0])
    assert ranks[0].returncode == 1
