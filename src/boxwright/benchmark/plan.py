"""Benchmark plan: what to measure, as a value that can be sent to another process."""

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
    "train": "training steps on images in memory",
    "infer": "forward pass and post-processing of images in memory",
    "train-loader": "training steps with data loading",
    "infer-loader": "data loading, forward pass and post-processing",
    "memory": "peak memory of training and of inference, each in a separate process",
    "parts": "time per part of a training step and of an inference",
    "flops": "floating-point operations of a training step and of an inference, and the device's best rate",
}
"""Measurements by name, in the order in which they run."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One recipe and how to measure it."""

    recipe: str
    """Name of a built-in recipe, or `package.module:function`."""
    settings: list[str] = []
    """Changes of the recipe, each `name=value`."""
    size: tuple[int, int] | None = None
    """(height, width) that images are resized to; None uses the recipe's resize."""
    batch: int | None = None
    """Batch size; None uses the recipe's batch size for training and 1 for inference."""
    iterations: int = 10
    """Number of measured times."""
    warmup: int = 2
    """Number of unmeasured iterations before them."""
    precision: Precision | None = None
    """Precision of Boxwright's detector; None uses the recipe's."""
    peer_precision: Precision | None = None
    """Precision of the peer; None uses the same as Boxwright's."""
    threads: int | None = None
    """Number of CPU threads of torch; None keeps torch's default."""
    device: str = "cpu"
    """cpu or cuda."""
    workers: int = 2
    """Number of data loading processes."""
    data: str = ""
    """Dataset folder; empty for generated images."""
    weights: str = ""
    """Weights file of the model; empty for random weights."""
    peer: str = ""
    """Peer to compare with; empty for none."""
    peer_python: str = ""
    """Path of the interpreter that has the peer installed; empty if the peer runs in this interpreter."""

    def experiment(self) -> Experiment:
        """Build the experiment: the recipe with the plan's settings, size and precision.

        Raises:
            ValueError: the recipe does not exist, or a setting is invalid.
        """
        experiment = find_recipe(self.recipe)()
        if not isinstance(experiment, Experiment):
            raise ValueError(f"recipe {self.recipe}: expected an Experiment, got {type(experiment).__name__}")
        experiment = with_settings(experiment, self.settings)
        if self.size is not None:
            # Scale jitter and crops would change the size again.
            resize = Resize(short=min(self.size), long=max(self.size))
            experiment = replace(
                experiment, resize=resize, scales=None, scale_mode="list", scale_jitter=None, crop=None
            )
        return replace(experiment, precision=self.precision or experiment.precision)

    def batch_size(self, experiment: Experiment, *, training: bool) -> int:
        """Number of images per batch."""
        return self.batch or (experiment.images_per_device if training else 1)

    @property
    def steps_per_time(self) -> int:
        """Training steps per measured time. It is 5 on a GPU, since a training run does not synchronize each step."""
        return 5 if self.device.startswith("cuda") else 1


def resolve_precision(device: torch.device, precision: Precision) -> Precision:
    """The precision that "auto" selects on a device; other precisions are returned unchanged."""
    with autocast(device, precision):
        return "bfloat16" if torch.is_autocast_enabled(device.type) else "float32"


def parse_size(text: str) -> tuple[int, int]:
    """Parse (height, width) from a text such as 640x640.

    Raises:
        ValueError: the text is not HEIGHTxWIDTH, or a side is below 32 pixels.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(height, width) < 32:
        raise ValueError(
            f"--size: expected HEIGHTxWIDTH with sides of at least 32 pixels, such as 640x640 or 800x1333, got {text!r}"
        )
    return height, width


def parse_precision(text: str | None, option: str = "--precision") -> Precision | None:
    """Check the name of a precision; None is returned unchanged.

    Args:
        text: name of the precision, or None.
        option: name of the option, for the error message.

    Raises:
        ValueError: there is no precision of this name.
    """
    precisions = get_args(Precision)
    if text is not None and text not in precisions:
        raise ValueError(f"{option}: there is no precision {text!r}{nearest(text, precisions)}")
    return cast("Precision | None", text)


def parse_phases(text: str) -> list[str]:
    """Parse a comma-separated list of phases, such as `train,infer`.

    Returns:
        The phases in the order of `PHASES`; all phases if `text` is empty.

    Raises:
        ValueError: A name is not a phase.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PHASES:
            raise ValueError(f"--phases: there is no phase {name!r}{nearest(name, PHASES)}")
    return [name for name in PHASES if not names or name in names]


def require_file(path: str, description: str) -> None:
    """Check that a file exists, unless the path is empty.

    Raises:
        ValueError: the file does not exist.
    """
    if path and not Path(path).exists():
        raise ValueError(f"{path}: {description} not found. Check the path.")
