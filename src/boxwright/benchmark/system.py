"""Systems: detectors with a uniform interface for timing.

This module has Boxwright's system; the systems of peers are in `torchvision_peer` and `peer_process`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from boxwright.benchmark.plan import Plan
from boxwright.benchmark.random_weights import SEED, settle
from boxwright.data.dataset import Category
from boxwright.detectors.detector import Detector, as_detector
from boxwright.evaluation.evaluate import detect_dataset
from boxwright.layers.optimize import optimize_for_cpu
from boxwright.structures import Batch, pin_memory, to_device
from boxwright.training.experiment import Experiment, build
from boxwright.training.init_weights import load_init
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep


class System(Protocol):
    """A detector that can be timed. `train_step` and `infer` may return before the device has finished."""

    name: str

    def prepare(self, batch: Batch) -> Any:
        """Convert a batch to the inputs of `train_step` or `infer`. This is not timed."""
        ...

    def train_step(self, inputs: Any) -> None:
        """Compute losses and gradients and run the optimizer with learning rate 0, so that all steps do equal work."""
        ...

    def infer(self, inputs: Any) -> None:
        """Forward pass and post-processing: boxes and masks in the pixel coordinates of the image files."""
        ...

    def close(self) -> None:
        """Release resources outside this process."""
        ...


def build_detector(plan: Plan, experiment: Experiment, categories: Sequence[Category], batch: Batch) -> Detector:
    """Build the detector on the CPU, with the weights of the plan's file or with random weights.

    Args:
        plan: names the weights file, if any.
        experiment: holds the model to build.
        categories: classes in label order.
        batch: images on which random weights are scaled (see `random_weights.settle`).
    """
    torch.manual_seed(SEED)
    detector = as_detector(build(experiment.model, num_classes=len(categories)))
    if plan.weights:
        load_init(detector, Path(plan.weights), categories)
    else:
        settle(detector, batch)
    return detector


class BoxwrightSystem:
    """A Boxwright detector with the training step of `boxwright train` and the inference of `boxwright test`."""

    name = "boxwright"

    def __init__(
        self, detector: nn.Module, experiment: Experiment, *, device: torch.device, training: bool, compiled: bool
    ) -> None:
        """Set up either training or inference, so that the peak memory of each can be measured separately."""
        self.detector = detector.to(device).to(memory_format=torch.channels_last).train(training)
        if not training and device.type == "cpu":
            optimize_for_cpu(self.detector)
        self._device, self._precision = device, experiment.precision
        self._training = training
        if training:
            self.optimizer = build_optimizer(experiment.optimizer, self.detector)
            self.step = TrainStep(
                self.detector,
                self.optimizer,
                device=device,
                precision=experiment.precision,
                clip_norm=experiment.clip_norm,
                compile=compiled,
                cuda_graphs=compiled and experiment.cuda_graphs,
                allowed_non_finite=10**9,
            )

    def prepare(self, batch: Batch) -> Batch:
        """Move a training batch to the device. An inference batch stays in pinned memory: its copy is timed."""
        if self._device.type != "cuda":
            return batch
        return to_device(batch, self._device) if self._training else pin_memory(batch)

    def train_step(self, inputs: Batch) -> None:
        """Run `TrainStep` with learning rate 0."""
        self.step([inputs], 0.0)

    def infer(self, inputs: Batch) -> None:
        """Run `detect_dataset` on one batch: boxes clipped to the image, masks pasted and run-length encoded."""
        detect_dataset(self.detector, [inputs], device=self._device, precision=self._precision)

    def close(self) -> None:
        """Do nothing: there are no resources outside this process."""
