"""Where a step or an inference spends its time: parts are timed by wrapping them while it is measured.

A part's seconds are those within it and within no other part inside it, so that all of them and "rest" sum to the
whole. The backward pass is one part: it runs the parts of the forward pass in another order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
from torch import nn

from boxwright.benchmark.measure import Task, synchronize
from boxwright.benchmark.system import BoxwrightSystem
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import multilevel_roi_align
from boxwright.structures import Batch

REST = "rest"
_METHODS = (
    ("normalize", "forward", "pixels"),
    ("backbone", "forward", "pyramid"),
    ("backbone.body", "forward", "backbone"),
    ("rpn", "forward", "RPN head"),
    ("rpn", "at_anchors", "RPN head"),
    ("rpn", "propose", "proposals"),
    ("rpn", "proposals", "proposals"),
    ("rpn", "losses", "RPN matching, sampling and losses"),
    ("head", "forward", "RetinaNet head"),
    ("head", "losses", "matching and losses"),
    ("head", "detect", "scores to detections"),
    ("box_head*", "sample", "matching and sampling"),
    ("box_head*", "forward", "box head"),
    ("box_head*", "losses_of", "box losses"),
    ("box_head*", "best_detections", "scores to detections"),
    ("mask_head*", "forward", "mask head"),
    ("mask_head*", "losses", "mask targets and losses"),
)
"""Modules of a detector by name, a method of each, and the part that it is; a detector has some of them."""
_FUNCTIONS: tuple[tuple[Callable[..., Any], str], ...] = ((multilevel_roi_align, "RoIAlign"), (nms, "NMS"))
"""Functions, wherever Boxwright calls them by their names."""


class Stopwatch:
    """Nested parts and the seconds of each."""

    def __init__(self, device: torch.device) -> None:
        """Every boundary waits for `device`."""
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block to a part, less what parts within it take."""
        synchronize(self._device)
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inside.pop()
            if self._inside:
                self._inside[-1] += elapsed

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def time_parts(
    system: BoxwrightSystem, batch: Batch, task: Task, *, iterations: int, warmup: int, device: torch.device
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of several steps or batches, and of their parts.

    Args:
        system: not compiled, since a graph has no parts.
        batch: the same each time.
        task: what it does.
        iterations: times that count.
        warmup: times before them.
        device: that it runs on.
    """
    given = system.prepare(batch)
    work = system.train_step if task == "train" else system.infer
    # What surrounds the detector in an inference brings its detections to the files' pixels.
    around = REST if task == "train" else "post-processing"
    rounds: list[dict[str, float]] = []
    for number in range(warmup + iterations):
        watch = Stopwatch(device)
        with _wrapped(system, watch), watch.part(around):
            work(given)
        if number >= warmup:
            rounds.append(watch.seconds)
    names = dict.fromkeys(name for seconds in rounds for name in seconds)
    parts = {name: [seconds.get(name, 0.0) for seconds in rounds] for name in names}
    return [sum(seconds.values()) for seconds in rounds], parts


@contextmanager
def _wrapped(system: BoxwrightSystem, watch: Stopwatch) -> Iterator[None]:
    """While it lasts, the parts of a system count their time."""
    places: list[tuple[Any, str, str]] = [(system.detector, "detect", REST), (torch.autograd, "backward", "backward")]
    for path, module in system.detector.named_modules():
        for pattern, method, part in _METHODS:
            # A head of a cascade has its stage's number behind its list's name.
            if fnmatchcase(path, pattern) and not isinstance(module, nn.ModuleList) and _depth(path, pattern):
                places += [(module, method, part)] if hasattr(module, method) else []
    if hasattr(system, "optimizer"):
        places.append((system.optimizer, "step", "optimizer"))
    for function, part in _FUNCTIONS:
        places += [(module, name, part) for module, name in _uses(function)]
    undo: list[Callable[[], None]] = []
    try:
        for owner, name, part in places:
            if isinstance(owner, nn.Module) and name not in vars(owner):
                undo.append(_time_method(owner, name, watch, part))
            else:
                undo.append(_replace(owner, name, watch.wrap(getattr(owner, name), part)))
        yield
    finally:
        for back in reversed(undo):
            back()


def _depth(path: str, pattern: str) -> bool:
    """Whether a module is the part itself rather than a layer in it."""
    stages = pattern.endswith("*") and path.rpartition(".")[2].isdigit()
    return path.count(".") == pattern.count(".") + stages


def _uses(function: Callable[..., Any]) -> list[tuple[ModuleType, str]]:
    """Where Boxwright's modules have a function under a name of theirs, but for the module that defines it."""
    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.startswith("boxwright.") and path not in (function.__module__, __name__)
        for name, value in list(vars(module).items())
        if value is function
    ]


def _time_method(module: nn.Module, name: str, watch: Stopwatch, part: str) -> Callable[[], None]:
    """Time a method of one module in its class; returns a function that restores it.

    A `forward` set on the module itself would make the module one that is not stock, see `layers.stock`.
    """
    owner = next(cls for cls in type(module).__mro__ if name in vars(cls))
    plain = vars(owner)[name]
    timed = watch.wrap(plain, part)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (timed if self is module else plain)(self, *args, **kwargs)

    return _replace(owner, name, method)


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; returns what puts things back, an inherited one by taking its cover away."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    return (lambda: delattr(owner, name)) if own is None else (lambda: setattr(owner, name, own))
