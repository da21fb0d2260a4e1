"""Systems alternate on the same batches, and each has its own times."""

from __future__ import annotations

import time

import pytest
import torch

from boxwright.benchmark.measure import Times, alternate
from boxwright.structures import Batch
from factory import random_batch

CPU = torch.device("cpu")


class Sleeper:
    """A system that sleeps, and appends (name, task, batch) to a list that all systems share."""

    def __init__(self, name: str, seconds: float, calls: list[tuple[str, str, int]]) -> None:
        self.name, self._seconds, self._calls = name, seconds, calls

    def prepare(self, batch: Batch) -> int:
        return int(batch.image_ids[0])

    def train_step(self, inputs: int) -> None:
        self._calls.append((self.name, "train", inputs))
        time.sleep(self._seconds)

    def infer(self, inputs: int) -> None:
        self._calls.append((self.name, "infer", inputs))

    def close(self) -> None: ...


@pytest.fixture
def batches() -> list[Batch]:
    pair = [random_batch(num_images=1) for _ in range(2)]
    pair[1].image_ids[0] = 1
    return pair


def run(batches: list[Batch], **changes: int | str) -> tuple[list[tuple[str, str, int]], list[Times]]:
    calls: list[tuple[str, str, int]] = []
    systems = [Sleeper("A", 0.002, calls), Sleeper("B", 0.02, calls)]
    options = {"task": "train", "iterations": 3, "warmup": 1, "steps_per_time": 1, **changes}
    return calls, alternate(systems, batches, device=CPU, **options)  # type: ignore[arg-type]


def test_systems_alternate_after_one_first_call_each(batches: list[Batch]) -> None:
    calls, times = run(batches)
    turns = [(name, batch) for name, _, batch in calls]
    assert turns[:4] == [("A", 1), ("A", 1), ("B", 1), ("B", 1)]  # first call of A, warm-up of A, the same for B
    assert turns[4:] == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("A", 0), ("B", 0)]
    assert [len(result.seconds) for result in times] == [3, 3]


def test_times_are_per_system_and_per_step(batches: list[Batch]) -> None:
    calls, (fast, slow) = run(batches, steps_per_time=4, iterations=2)
    assert [name for name, _, _ in calls[-8:]] == ["A"] * 4 + ["B"] * 4
    assert all(0.02 <= seconds < 0.08 for seconds in (*slow.seconds, slow.first))
    assert min(fast.seconds) < 0.02


def test_inference_task_calls_infer_only(batches: list[Batch]) -> None:
    calls, _ = run(batches, task="infer")
    assert {task for _, task, _ in calls} == {"infer"}
