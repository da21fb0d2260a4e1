"""What is to be measured, as a value that a fresh process can be given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import msgspec
import torch

from boxwright.data.buckets import Resize
from boxwright.precision import Precision, autocast
from boxwright.recipes import find_recipe
from boxwright.training.experiment import Experiment, nearest
from boxwright.training.settings import with_settings

PHASES = {
    "train": "training steps on pictures that are in memory",
    "infer": "forward and post-processing of pictures that are in memory",
    "train-loader": "training steps with the loader beside them",
    "infer-loader": "loading, forward and post-processing",
    "memory": "peak memory of training and of inference, each in a process of its own",
    "parts": "how a step and an inference divide into parts",
    "flops": "floating-point operations of a step and of an inference, and the rate that the device can do",
}
"""What can be measured, in the order in which it is."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One recipe and how to measure it."""

    recipe: str
    """A built-in one, or `package.module:function`."""
    settings: list[str] = []
    """Changes of it, `name=value` each."""
    size: tuple[int, int] | None = None
    """(height, width) that pictures are brought to; None leaves it to the recipe."""
    batch: int | None = None
    """Images at a time; None trains with the recipe's number and infers one."""
    iterations: int = 10
    """Times that count."""
    warmup: int = 2
    """Times before them that do not."""
    precision: Precision | None = None
    """Of the arithmetic; None leaves it to the recipe."""
    peer_precision: Precision | None = None
    """The same of a peer; None takes what the recipe has."""
    threads: int | None = None
    """Threads of the arithmetic on the CPU; None leaves it to torch."""
    device: str = "cpu"
    """cpu or cuda."""
    workers: int = 2
    """Processes that load pictures."""
    data: str = ""
    """Folder of a data set; empty for generated pictures."""
    weights: str = ""
    """A weights file of the model; empty for random weights."""
    peer: str = ""
    """A peer to measure alternately; empty for none."""
    peer_python: str = ""
    """The interpreter that has the peer; empty for this one."""

    def experiment(self) -> Experiment:
        """The recipe with all changes.

        Raises:
            ValueError: there is no such recipe, or a change is none.
        """
        experiment = find_recipe(self.recipe)()
        if not isinstance(experiment, Experiment):
            raise ValueError(f"{self.recipe} is no recipe: it gives {type(experiment).__name__}, not an Experiment")
        experiment = with_settings(experiment, self.settings)
        if self.size is not None:
            # Jitter and crops would change the size again.
            sides = Resize(short=min(self.size), long=max(self.size))
            experiment = replace(experiment, resize=sides, scales=None, scale_mode="list", scale_jitter=None, crop=None)
        return replace(experiment, precision=self.precision or experiment.precision)

    def batch_size(self, experiment: Experiment, *, training: bool) -> int:
        """Images at a time."""
        return self.batch or (experiment.images_per_device if training else 1)

    @property
    def steps_per_time(self) -> int:
        """Training steps in one time, at whose end the host waits: on a GPU several, as no training run waits each."""
        return 5 if self.device.startswith("cuda") else 1


def computes_in(device: torch.device, precision: Precision) -> Precision:
    """What "auto" comes to on a device."""
    with autocast(device, precision):
        return "bfloat16" if torch.is_autocast_enabled(device.type) else "float32"


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of a text such as 640x640.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(sides) < 32:
        raise ValueError(f"--size {text}: give height and width of 32 pixels or more, such as 640x640 or 800x1333")
    return sides


def parse_precision(text: str | None) -> Precision | None:
    """A precision by name; None stays.

    Raises:
        ValueError: there is none of that name.
    """
    known = get_args(Precision)
    if text is not None and text not in known:
        raise ValueError(f"there is no precision {text!r}{nearest(text, known)}")
    return cast("Precision | None", text)


def parse_phases(text: str) -> list[str]:
    """The phases of a text such as train,infer, in their own order; all of them where it is empty.

    Raises:
        ValueError: one is none.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in PHASES:
            raise ValueError(f"--phases: there is no {name!r}{nearest(name, PHASES)}")
    return [name for name in PHASES if not named or name in named]


def require_file(path: str, what: str) -> None:
    """Check before the work that a file is there.

    Raises:
        ValueError: it is not.
    """
    if path and not Path(path).exists():
        raise ValueError(f"{path}: there is no such {what}")
