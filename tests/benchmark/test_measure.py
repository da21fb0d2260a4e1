"""Systems take turns on the same batches, and each one's time is its own."""

from __future__ import annotations

import time

import pytest
import torch

from boxwright.benchmark.measure import Times, alternate
from boxwright.structures import Batch
from factory import random_batch

CPU = torch.device("cpu")


class Sleeper:
    """Does nothing for a while, and keeps a diary that all share."""

    def __init__(self, name: str, seconds: float, diary: list[tuple[str, str, int]]) -> None:
        self.name, self._seconds, self._diary = name, seconds, diary

    def prepare(self, batch: Batch) -> int:
        return int(batch.image_ids[0])

    def train_step(self, given: int) -> None:
        self._diary.append((self.name, "train", given))
        time.sleep(self._seconds)

    def infer(self, given: int) -> None:
        self._diary.append((self.name, "infer", given))

    def close(self) -> None: ...


@pytest.fixture
def batches() -> list[Batch]:
    found = [random_batch(num_images=1) for _ in range(2)]
    found[1].image_ids[0] = 1
    return found


def run(batches: list[Batch], **given: int | str) -> tuple[list[tuple[str, str, int]], list[Times]]:
    diary: list[tuple[str, str, int]] = []
    systems = [Sleeper("A", 0.002, diary), Sleeper("B", 0.02, diary)]
    options = {"task": "train", "iterations": 3, "warmup": 1, "steps_per_time": 1, **given}
    return diary, alternate(systems, batches, device=CPU, **options)  # type: ignore[arg-type]


def test_they_alternate_after_a_first_call_each(batches: list[Batch]) -> None:
    diary, times = run(batches)
    turns = [(name, batch) for name, _, batch in diary]
    assert turns[:4] == [("A", 1), ("A", 1), ("B", 1), ("B", 1)]  # warm-up, with the first call of each before it
    assert turns[4:] == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("A", 0), ("B", 0)]
    assert [len(one.seconds) for one in times] == [3, 3]


def test_each_time_is_the_systems_own_and_of_one_step(batches: list[Batch]) -> None:
    diary, (fast, slow) = run(batches, steps_per_time=4, iterations=2)
    assert [name for name, _, _ in diary[-8:]] == ["A"] * 4 + ["B"] * 4
    assert all(0.02 <= seconds < 0.08 for seconds in (*slow.seconds, slow.first))
    assert min(fast.seconds) < 0.02


def test_inference_infers(batches: list[Batch]) -> None:
    diary, _ = run(batches, task="infer")
    assert {task for _, task, _ in diary} == {"infer"}
