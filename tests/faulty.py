"""Data sets and transforms that raise errors. They are in a module, so that spawned workers can import them."""

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
    """Cannot be unpickled, because its constructor needs two arguments."""

    def __init__(self, column: str, row: int) -> None:
        super().__init__(f"no {column} in row {row}")


class UnpicklableError(Exception):
    """Cannot be pickled, because it holds a function."""

    def __init__(self) -> None:
        super().__init__("it holds a function")
        self.function = lambda: None


class NamelessError(Exception):
    """Cannot be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class NamelessValueError(ValueError):
    """Cannot be turned into text. Unlike other errors, a ValueError keeps its type."""

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
"""Functions that fail, by the name that the error message must contain."""


@dataclass(frozen=True)
class FaultyImages(GeneratedImagesWithInfo):
    """Images; reading the one at `POSITION` fails."""

    fault: str = "KeyError"

    def __getitem__(self, index: int) -> Sample:
        if index == POSITION:
            FAULTS[self.fault]()
        return super().__getitem__(index)


@dataclass(frozen=True)
class FaultyTransform:
    """A transform that fails on the sample at `POSITION`."""

    fault: str

    def __call__(self, sample: Sample) -> Sample:
        if sample.image_id == 100 + POSITION:
            FAULTS[self.fault]()
        return sample


class UnpicklableImages(GeneratedImagesWithInfo):
    """Images that cannot be sent to a spawned process, because pickling them fails."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a data set with an open file")
