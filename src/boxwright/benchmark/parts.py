"""Profile a training step or inference by part: backbone, RPN head, NMS and so on.

The methods and functions of the parts are wrapped with a timer during the measurement. Times are exclusive: the time of
a part does not include parts that it calls, so that all parts and "rest" sum to the total. The backward pass is a
single part, since autograd does not run it part by part.
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
"""(module name pattern, method, part). A detector has only some of these modules."""
_FUNCTIONS: tuple[tuple[Callable[..., Any], str], ...] = ((multilevel_roi_align, "RoIAlign"), (nms, "NMS"))
"""(function, part). A function is wrapped in every Boxwright module that imports it."""


class Stopwatch:
    """Exclusive seconds of nested parts."""

    def __init__(self, device: torch.device) -> None:
        """Synchronize with `device` at the start and end of each part."""
        self.seconds: dict[str, float] = {}
        self._device = device
        self._nested: list[float] = []
        """For each open part, the seconds spent in parts inside it."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part, excluding nested parts."""
        synchronize(self._device)
        self._nested.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._nested.pop()
            if self._nested:
                self._nested[-1] += elapsed

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function that adds its time to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def time_parts(
    system: BoxwrightSystem, batch: Batch, task: Task, *, iterations: int, warmup: int, device: torch.device
) -> tuple[list[float], dict[str, list[float]]]:
    """Time training steps or inferences and their parts.

    Args:
        system: must not be compiled, since wrapped methods do not run inside a compiled graph.
        batch: used in every iteration.
        task: "train" or "infer".
        iterations: number of measured steps or inferences.
        warmup: number of unmeasured ones before them.
        device: the device that the system runs on.

    Returns:
        Seconds of each iteration, and for each part its exclusive seconds in each iteration.
    """
    inputs = system.prepare(batch)
    step = system.train_step if task == "train" else system.infer
    # In inference, the code around `detector.detect` is the conversion to the pixel coordinates of the files.
    outermost = REST if task == "train" else "post-processing"
    rounds: list[dict[str, float]] = []
    for index in range(warmup + iterations):
        watch = Stopwatch(device)
        with _wrapped(system, watch), watch.part(outermost):
            step(inputs)
        if index >= warmup:
            rounds.append(watch.seconds)
    names = dict.fromkeys(name for seconds in rounds for name in seconds)
    parts = {name: [seconds.get(name, 0.0) for seconds in rounds] for name in names}
    return [sum(seconds.values()) for seconds in rounds], parts


@contextmanager
def _wrapped(system: BoxwrightSystem, watch: Stopwatch) -> Iterator[None]:
    """Inside the context, `watch` times the parts of a system."""
    targets: list[tuple[Any, str, str]] = [(system.detector, "detect", REST), (torch.autograd, "backward", "backward")]
    for path, module in system.detector.named_modules():
        for pattern, method, part in _METHODS:
            if fnmatchcase(path, pattern) and not isinstance(module, nn.ModuleList) and _is_part(path, pattern):
                targets += [(module, method, part)] if hasattr(module, method) else []
    if hasattr(system, "optimizer"):
        targets.append((system.optimizer, "step", "optimizer"))
    for function, part in _FUNCTIONS:
        targets += [(module, name, part) for module, name in _importers(function)]
    restorers: list[Callable[[], None]] = []
    try:
        for owner, name, part in targets:
            if isinstance(owner, nn.Module) and name not in vars(owner):
                restorers.append(_time_method(owner, name, watch, part))
            else:
                restorers.append(_replace(owner, name, watch.wrap(getattr(owner, name), part)))
        yield
    finally:
        for restore in reversed(restorers):
            restore()


def _is_part(path: str, pattern: str) -> bool:
    """Whether `path` is the module that `pattern` names, not a layer inside it.

    The heads of a cascade are in a list, so that their path ends with the number of the stage: `box_heads.0`.
    """
    in_list = pattern.endswith("*") and path.rpartition(".")[2].isdigit()
    return path.count(".") == pattern.count(".") + in_list


def _importers(function: Callable[..., Any]) -> list[tuple[ModuleType, str]]:
    """Boxwright modules that import a function, each with the name that it has there."""
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
    """Set an attribute and return a function that restores it (by deletion, if the attribute was inherited)."""
    previous = vars(owner).get(name)
    setattr(owner, name, value)
    return (lambda: delattr(owner, name)) if previous is None else (lambda: setattr(owner, name, previous))
