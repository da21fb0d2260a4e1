"""Time training steps and inference.

Systems that are compared take turns, so that a change in the speed of the machine affects all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch

from boxwright.benchmark.system import BoxwrightSystem, System
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.evaluation.evaluate import detect_dataset
from boxwright.precision import Precision
from boxwright.structures import Batch, to_device

Task = Literal["train", "infer"]


class Times(NamedTuple):
    """Measured times of one system, in seconds."""

    seconds: list[float]
    """Time of one step or batch, one value per measurement."""
    first: float
    """Time of the very first step or batch."""
    data_wait: list[float]
    """Part of each value of `seconds` that was spent waiting for the training loader; empty if none was used."""


def alternate(
    systems: Sequence[System],
    batches: Sequence[Batch],
    task: Task,
    *,
    iterations: int,
    warmup: int,
    steps_per_time: int,
    device: torch.device,
) -> list[Times]:
    """Time systems on the same batches in alternation: A, B, A, B, ...

    Args:
        systems: each system has one turn per round.
        batches: each round uses the next batch, starting again after the last.
        task: "train" or "infer".
        iterations: number of measured rounds.
        warmup: number of unmeasured rounds before them.
        steps_per_time: steps per turn; the host synchronizes with the device only at the end of a turn.
        device: the device that the systems run on.
    """
    prepared = [[system.prepare(batch) for batch in batches] for system in systems]
    firsts: list[float] = []
    turns: list[list[float]] = [[] for _ in systems]
    for round_index in range(-warmup, iterations):
        for index, system in enumerate(systems):
            inputs = prepared[index][round_index % len(batches)]
            step = system.train_step if task == "train" else system.infer
            if len(firsts) == index:
                firsts.append(_seconds_per_call(step, inputs, 1, device))
            seconds = _seconds_per_call(step, inputs, steps_per_time, device)
            if round_index >= 0:
                turns[index].append(seconds)
    return [Times(seconds, first, []) for seconds, first in zip(turns, firsts, strict=True)]


def train_with_loader(
    system: BoxwrightSystem, loader: TrainingLoader, *, iterations: int, warmup: int, device: torch.device
) -> Times:
    """Time training steps including the wait for the loader, whose worker processes run at the same time."""
    seconds, waits = [], []
    batches = loader.batches()
    try:
        for _ in range(1 + warmup + iterations):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            system.train_step(to_device(batch, device))
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    finally:
        batches.close()
    return Times(seconds[1 + warmup :], seconds[0], waits[1 + warmup :])


def infer_with_loader(
    system: BoxwrightSystem,
    loader: EvaluationLoader,
    *,
    iterations: int,
    warmup: int,
    device: torch.device,
    precision: Precision,
) -> Times:
    """Time `detect_dataset` over a loader, which is restarted when it runs out of batches."""
    clock = _Clock()

    def batches() -> Any:
        while True:
            yield from loader

    measured = islice(batches(), 1 + warmup + iterations)
    detect_dataset(system.detector, measured, device=device, precision=precision, progress=clock.mark)
    seconds = clock.seconds
    return Times(seconds[1 + warmup :], seconds[0], [])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """Records the seconds between calls of `mark`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def mark(self, _: int) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _seconds_per_call(step: Callable[[Any], None], inputs: Any, num_calls: int, device: torch.device) -> float:
    """Mean seconds per call over `num_calls` calls without synchronization in between."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        step(inputs)
    synchronize(device)
    return (time.perf_counter() - start) / num_calls
