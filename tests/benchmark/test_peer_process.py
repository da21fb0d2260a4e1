"""A peer process builds a detector, receives batches, trains and infers, and reports its errors."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from boxwright.benchmark import peer_process
from boxwright.benchmark.peer_process import PeerProcess, find_serve_script
from boxwright.recipes import find_recipe
from factory import random_batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def peer(recipe: str = "mask_rcnn_r18_fpn_small", name: str = "fake", **changes: Any) -> PeerProcess:
    options: dict[str, Any] = {
        "num_classes": 3,
        "device": CPU,
        "precision": "float32",
        "training": True,
        "python": sys.executable,
        **changes,
    }
    return PeerProcess(name, options.pop("python"), find_recipe(recipe)().model, **options)


def test_a_peer_trains_infers_and_reports_its_memory() -> None:
    with closing(peer()) as system:
        assert system.versions == {"torch": str(torch.__version__), "fake": "1.0"}
        batches = [system.prepare(random_batch()) for _ in range(2)]
        assert batches == [0, 1]
        system.train_step(1)
        system.infer(0)
        assert 50e6 < system.memory()["peak_rss"] < 50e9
        with pytest.raises(ValueError, match="fake failed at 'infer': IndexError"):
            system.infer(7)
        system.infer(1)  # the process goes on after an error
    assert system._process.returncode == 0


def test_a_package_missing_in_the_interpreter_is_reported() -> None:
    with pytest.raises(ValueError, match=r"cannot run detectron2: .*No module named 'detectron2'"):
        peer(name="detectron2")


def test_a_process_that_ends_before_its_first_request_is_reported_and_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def ended(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(*arguments, **options))
        time.sleep(0.5)  # The process has ended but has not been waited for.
        return started[-1]

    monkeypatch.setattr(peer_process, "subprocess", SimpleNamespace(Popen=ended, PIPE=subprocess.PIPE))
    with pytest.raises(ValueError, match="ended during 'build'"):
        peer(python="/bin/true")
    assert started[0].returncode == 0


def test_a_path_that_is_not_a_python_interpreter_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot start the interpreter: No such file"):
        peer(python=str(tmp_path / "python"))
    with pytest.raises(ValueError, match="ended during 'build'"):
        peer(python="/bin/true")


def test_a_missing_serve_script_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_serve_script().is_file()
    monkeypatch.setattr(peer_process.boxwright, "__file__", str(tmp_path / "site-packages" / "boxwright" / "x.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="clone of Boxwright's repository"):
        find_serve_script()
