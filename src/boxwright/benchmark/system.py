"""A detector as the thing that is timed: Boxwright's own here, peers' in `torchvision_peer` and `peer_process`."""

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
    """What can be timed. `train_step` and `infer` may return before the device is done."""

    name: str

    def prepare(self, batch: Batch) -> Any:
        """What the two take of a batch, made beforehand and not timed."""
        ...

    def train_step(self, given: Any) -> None:
        """Losses, gradients, optimizer. Learns nothing: the rate is 0, so that every step does the same work."""
        ...

    def infer(self, given: Any) -> None:
        """Forward and post-processing, to boxes and masks in the pixels of the files."""
        ...

    def close(self) -> None:
        """Give back what it holds outside of this process."""
        ...


def build_detector(plan: Plan, experiment: Experiment, categories: Sequence[Category], batch: Batch) -> Detector:
    """The detector on the CPU, with the weights of the plan's file or random ones.

    Args:
        plan: says where weights come from.
        experiment: what to build.
        categories: the classes by label.
        batch: what random weights are settled on.
    """
    torch.manual_seed(SEED)
    detector = as_detector(build(experiment.model, num_classes=len(categories)))
    if plan.weights:
        load_init(detector, Path(plan.weights), categories)
    else:
        settle(detector, batch)
    return detector


class BoxwrightSystem:
    """The detector in the step that `boxwright train` does and the detection that `boxwright test` does."""

    name = "boxwright"

    def __init__(
        self, detector: nn.Module, experiment: Experiment, *, device: torch.device, training: bool, compiled: bool
    ) -> None:
        """Set up training or inference, so that the memory of one is not that of both."""
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
        """On the device to train; to infer in the memory that a loader would give, since the copy is timed."""
        if self._device.type != "cuda":
            return batch
        return to_device(batch, self._device) if self._training else pin_memory(batch)

    def train_step(self, given: Batch) -> None:
        """`TrainStep` with a learning rate of 0."""
        self.step([given], 0.0)

    def infer(self, given: Batch) -> None:
        """`detect_dataset` of one batch: boxes clipped to the file, masks pasted and run-length encoded."""
        detect_dataset(self.detector, [given], device=self._device, precision=self._precision)

    def close(self) -> None:
        """Nothing is held elsewhere."""
