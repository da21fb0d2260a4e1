from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from boxwright.training.metrics import Log, Window, read_lines


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    complete = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (5, 10, 15))
    path.write_text(complete + '{"kind": "train", "step": 2')
    log = Log(tmp_path, step=10)
    log.write({"kind": "train", "step": 15}, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_lines(path)] == [5, 10, 15]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_window_records_one_row_per_step() -> None:
    window = Window(3, torch.device("cpu"))
    for value in (1.0, 2.0):
        window.record({"loss": torch.tensor(value), "finite": torch.tensor(1.0)})
    assert window.read().tolist() == [[1, 1], [2, 1]]
    other = Window(3, torch.device("cpu"))
    other.restore(window.names, window.read())
    other.record({"loss": torch.tensor(3.0), "finite": torch.tensor(1.0)})
    assert other.read()[:, 0].tolist() == [1, 2, 3]
    other.clear()
    assert len(other.read()) == 0


def test_a_restored_interval_may_be_longer_than_the_window() -> None:
    window = Window(2, torch.device("cpu"))
    window.restore(["loss"], torch.ones(5, 1))
    for _ in range(2):
        window.record({"loss": torch.tensor(2.0)})
    assert window.read()[:, 0].tolist() == [1, 1, 1, 1, 1, 2, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nrubbish\n{"unfinished')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not valid JSON.*Remove this line"):
        read_lines(tmp_path / "metrics.jsonl")
