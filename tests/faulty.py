"""Data sets and transforms that raise, each in a way of its own; a module, so that spawned workers can import it."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import cv2
import numpy as np

from boxwright.data.dataset import Sample
from generated_images import GeneratedImagesWithInfo

POSITION = 3
"""Position of the image that cannot be read."""


class TwoArgumentsError(Exception):
    """Its constructor needs two arguments, so that unpickling it fails."""

    def __init__(self, column: str, row: int) -> None:
        super().__init__(f"no {column} in row {row}")


class UnpicklableError(Exception):
    """Holds a function, so that pickling it fails."""

    def __init__(self) -> None:
        super().__init__("it holds a function")
        self.function = lambda: None


class NamelessError(Exception):
    """Cannot be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class NamelessValueError(ValueError):
    """Cannot be turned into text, and is of a type that keeps its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _opencv() -> None:
    cv2.cvtColor(np.zeros((0, 0, 3), np.uint8), cv2.COLOR_RGB2GRAY)


def _raise(error: BaseException) -> NoReturn:
    raise error


FAULTS: dict[str, Any] = {
    "KeyError": lambda: _raise(KeyError("no such column")),
    "MemoryError": lambda: _raise(MemoryError()),
    "TypeError": lambda: _raise(TypeError("not a number")),
    "error": _opencv,
    "TwoArgumentsError": lambda: _raise(TwoArgumentsError("box", 3)),
    "UnpicklableError": lambda: _raise(UnpicklableError()),
    "NamelessError": lambda: _raise(NamelessError()),
    "NamelessValueError": lambda: _raise(NamelessValueError()),
    "SystemExit": lambda: sys.exit(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
"""Ways to fail, by what the message names."""


@dataclass(frozen=True)
class FaultyImages(GeneratedImagesWithInfo):
    """Images of which the one at `POSITION` cannot be read."""

    fault: str = "KeyError"

    def __getitem__(self, index: int) -> Sample:
        if index == POSITION:
            FAULTS[self.fault]()
        return super().__getitem__(index)


@dataclass(frozen=True)
class FaultyTransform:
    """Fails on the sample at `POSITION`."""

    fault: str

    def __call__(self, sample: Sample) -> Sample:
        if sample.image_id == 100 + POSITION:
            FAULTS[self.fault]()
        return sample


class UnpicklableImages(GeneratedImagesWithInfo):
    """Cannot be sent to a process that is started by spawn."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a data set with an open file")
