"""A peer of another interpreter is built, given batches, told to work, and tells what it lacks."""

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
from boxwright.benchmark.peer_process import PeerProcess, find_serve
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


def test_it_trains_and_infers_and_tells_its_memory() -> None:
    with closing(peer()) as given:
        assert given.versions == {"torch": str(torch.__version__), "fake": "1.0"}
        batches = [given.prepare(random_batch()) for _ in range(2)]
        assert batches == [0, 1]
        given.train_step(1)
        given.infer(0)
        assert 50e6 < given.memory()["peak_rss"] < 50e9
        with pytest.raises(ValueError, match="fake could not infer: IndexError"):
            given.infer(7)
        given.infer(1)  # a fault does not end it
    assert given._process.returncode == 0


def test_what_the_interpreter_lacks_is_told() -> None:
    with pytest.raises(ValueError, match=r"cannot run detectron2: .*No module named 'detectron2'"):
        peer(name="detectron2")


def test_a_process_that_ends_before_its_first_order_is_told_and_left_behind_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []

    def ended(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(*arguments, **options))
        time.sleep(0.5)  # It has ended, and nobody has asked it how.
        return started[-1]

    monkeypatch.setattr(peer_process, "subprocess", SimpleNamespace(Popen=ended, PIPE=subprocess.PIPE))
    with pytest.raises(ValueError, match="ended when it was to build"):
        peer(python="/bin/true")
    assert started[0].returncode == 0


def test_an_interpreter_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be started: No such file"):
        peer(python=str(tmp_path / "python"))
    with pytest.raises(ValueError, match="ended when it was to build"):
        peer(python="/bin/true")


def test_an_installed_package_says_where_the_adapters_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_serve().is_file()
    monkeypatch.setattr(peer_process.boxwright, "__file__", str(tmp_path / "site-packages" / "boxwright" / "x.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="clone of the repository"):
        find_serve()
