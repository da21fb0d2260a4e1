"""Times what systems do, in turns, so that a machine that is now fast and now slow is so to all of them."""

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
    """What the clock said of one system."""

    seconds: list[float]
    """Of one step or batch, a time each."""
    first: float
    """The very first one's."""
    data_wait: list[float]
    """Of each, the wait for the loader; none without one."""


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
    """Let systems do the same batches in turns: A, B, A, B, ...

    Args:
        systems: of which each takes its turn in each round.
        batches: the round's batch is the next of these, from the first again after the last.
        task: what they do.
        iterations: rounds that count.
        warmup: rounds before them.
        steps_per_time: steps in a turn, at whose end the host waits for the device.
        device: that it waits for.
    """
    prepared = [[system.prepare(batch) for batch in batches] for system in systems]
    firsts: list[float] = []
    turns: list[list[float]] = [[] for _ in systems]
    for number in range(-warmup, iterations):
        for which, system in enumerate(systems):
            given = prepared[which][number % len(batches)]
            work = system.train_step if task == "train" else system.infer
            if len(firsts) == which:
                firsts.append(_seconds(work, given, 1, device))
            seconds = _seconds(work, given, steps_per_time, device)
            if number >= 0:
                turns[which].append(seconds)
    return [Times(seconds, first, []) for seconds, first in zip(turns, firsts, strict=True)]


def train_with_loader(
    system: BoxwrightSystem, loader: TrainingLoader, *, iterations: int, warmup: int, device: torch.device
) -> Times:
    """Steps as a training run does them: the loader's processes build the next batches meanwhile."""
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
    """`detect_dataset` over a loader, which is passed over again where it has too few batches."""
    clock = _Clock()

    def batches() -> Any:
        while True:
            yield from loader

    found = islice(batches(), 1 + warmup + iterations)
    detect_dataset(system.detector, found, device=device, precision=precision, progress=clock.mark)
    seconds = clock.seconds
    return Times(seconds[1 + warmup :], seconds[0], [])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock:
    """The seconds from mark to mark."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def mark(self, _: int) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _seconds(work: Callable[[Any], None], given: Any, times: int, device: torch.device) -> float:
    """Of one of several calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work(given)
    synchronize(device)
    return (time.perf_counter() - start) / times
