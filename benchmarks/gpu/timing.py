"""Time of calls, and of the parts of a detector within one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.scale import Scale

PARTS = {
    "normalize": "normalize",
    "backbone.body": "backbone",
    "backbone": "FPN",
    "rpn": "RPN",
    "head": "dense head",
    "box_head": "box head",
    "box_heads.*": "box head",
    "mask_head": "mask head",
    "mask_heads.*": "mask head",
}
"""Part of each module of a detector, by the module's name."""
REST = "rest"


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    if scale.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(scale: Scale, *calls: Callable[[], object]) -> list[list[float]]:
    """Seconds per call, `scale.rounds` times each, in alternating order; each call is warmed up once."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(scale.rounds):
        for call, times in zip(calls, seconds, strict=True):
            synchronize(scale)
            start = time.perf_counter()
            for _ in range(scale.calls):
                call()
            synchronize(scale)
            times.append((time.perf_counter() - start) / scale.calls)
    return seconds


@contextmanager
def peak_memory(scale: Scale) -> Iterator[dict[str, int]]:
    """Peak bytes on the GPU within the block; empty on the CPU."""
    peak: dict[str, int] = {}
    if scale.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield peak
    if scale.device == "cuda":
        peak["allocated"] = torch.cuda.max_memory_allocated()
        peak["reserved"] = torch.cuda.max_memory_reserved()


def parts_of(
    scale: Scale, detector: nn.Module, call: Callable[[], object], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, float]:
    """Seconds of each part of one call, without the parts nested in it. They sum to the whole call.

    On a GPU, CUDA events at the boundaries of the parts measure the time on the stream, and the host does not wait
    between them. Time in which the GPU waits for the host counts for the part that launches too slowly.
    """
    watch = _Watch(on_gpu=scale.device == "cuda")
    places: list[tuple[Any, str, str]] = [(torch.autograd, "backward", "backward")]
    if optimizer is not None:
        places.append((optimizer, "step", "optimizer"))
    for name, module in detector.named_modules():
        part = next((part for pattern, part in PARTS.items() if _is_part(name, pattern)), None)
        if part is not None and not isinstance(module, nn.ModuleList):
            places += [(module, method, part) for method in _methods(module)]
    originals = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    try:
        for owner, name, part in places:
            setattr(owner, name, watch.wrap(getattr(owner, name), part))
        with watch.part(REST):
            call()
    finally:
        for owner, name, original in originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
    synchronize(scale)
    return watch.seconds()


def _is_part(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")


def _methods(module: nn.Module) -> list[str]:
    """Names of the public methods that the module's own classes define."""
    skipped = set(dir(nn.Module)) - {"forward"}
    methods = {
        name
        for kind in type(module).__mro__
        if kind.__module__.startswith("boxwright")
        for name, value in vars(kind).items()
        if callable(value) and not isinstance(value, (type, staticmethod, classmethod))
    }
    return sorted(name for name in methods if not name.startswith("_") and name not in skipped)


class _Watch:
    """Marks at the boundaries of nested parts: CUDA events, or times of the host."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._stack: list[str] = []
        self._marks: list[tuple[Any, str]] = []
        """Each mark ends one stretch and begins the next, of the part that it names ("" after the last)."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return measured

    def seconds(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for (start, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    def _mark(self) -> None:
        name = self._stack[-1] if self._stack else ""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, name))
        else:
            self._marks.append((time.perf_counter(), name))
