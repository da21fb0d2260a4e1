"""Train and evaluate object detectors and instance segmentation models on COCO-style data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxwright.backbones.backbone import Backbone as Backbone
    from boxwright.backbones.backbone import PixelStats as PixelStats
    from boxwright.data.buckets import Resize as Resize
    from boxwright.data.dataset import Category as Category
    from boxwright.data.dataset import Dataset as Dataset
    from boxwright.data.dataset import Sample as Sample
    from boxwright.detectors.detector import Detector as Detector
    from boxwright.evaluation.evaluate import evaluate as evaluate
    from boxwright.layers.optimize import optimize_for_cpu as optimize_for_cpu
    from boxwright.predictor import Prediction as Prediction
    from boxwright.predictor import Predictor as Predictor
    from boxwright.predictor import load as load
    from boxwright.structures import Batch as Batch
    from boxwright.structures import Detections as Detections
    from boxwright.structures import Proposals as Proposals
    from boxwright.structures import Targets as Targets
    from boxwright.training.experiment import SGD as SGD
    from boxwright.training.experiment import AdamW as AdamW
    from boxwright.training.experiment import CosineSchedule as CosineSchedule
    from boxwright.training.experiment import Experiment as Experiment
    from boxwright.training.experiment import StepSchedule as StepSchedule
    from boxwright.training.loop import train as train

__version__ = "0.1.0"
_MODULES = {
    "AdamW": "boxwright.training.experiment",
    "Backbone": "boxwright.backbones.backbone",
    "Batch": "boxwright.structures",
    "Category": "boxwright.data.dataset",
    "CosineSchedule": "boxwright.training.experiment",
    "Dataset": "boxwright.data.dataset",
    "Detections": "boxwright.structures",
    "Detector": "boxwright.detectors.detector",
    "Experiment": "boxwright.training.experiment",
    "PixelStats": "boxwright.backbones.backbone",
    "Prediction": "boxwright.predictor",
    "Predictor": "boxwright.predictor",
    "Proposals": "boxwright.structures",
    "Resize": "boxwright.data.buckets",
    "SGD": "boxwright.training.experiment",
    "Sample": "boxwright.data.dataset",
    "StepSchedule": "boxwright.training.experiment",
    "Targets": "boxwright.structures",
    "evaluate": "boxwright.evaluation.evaluate",
    "load": "boxwright.predictor",
    "optimize_for_cpu": "boxwright.layers.optimize",
    "train": "boxwright.training.loop",
}
"""Module that defines each public name. Modules are imported on first use, because most of them import torch."""
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted(__all__)
