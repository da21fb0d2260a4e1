"""Short training runs, in this process and in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from boxwright.data.buckets import Resize
from boxwright.recipes.faster_rcnn import faster_rcnn_r18_fpn_small
from boxwright.recipes.mask_rcnn import mask_rcnn_r18_fpn_small
from boxwright.recipes.retinanet import retinanet_r18_fpn_small
from boxwright.recipes.rpn import rpn_r18_fpn_small
from boxwright.training.experiment import SGD, Experiment, StepSchedule, build
from training.fakes import MODEL

MEASURED = {
    "seconds_per_step",
    "images_per_second",
    "data_wait",
    "data_wait_share",
    "memory_mib",
    "eta_seconds",
    "seconds",
}
"""Fields of `metrics.jsonl` that differ between equal runs."""


def tiny_experiment(**changes: Any) -> Experiment:
    """An experiment of four steps per epoch on the 16 images of `FakeImages`, with flips, warm-up and EMA."""
    settings: dict[str, Any] = {
        "model": MODEL,
        "resize": Resize(32, 32),
        "images_per_device": 4,
        "batch_size": 4,
        "epochs": 5,
        "optimizer": SGD(lr=0.01),
        "schedule": StepSchedule(epochs=(3,), warmup_steps=6),
        "ema_decay": 0.9,
        "keep_checkpoints": 100,
    }
    return Experiment(**{**settings, **changes})


def curve(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without times and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_tensors(first: Path, second: Path) -> None:
    """Check that two safetensors files have the same tensors, bit for bit."""
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def assert_same_run(first: Path, second: Path) -> None:
    """Check that two runs logged the same metrics and ended in the same state, bit for bit."""
    assert curve(first) == curve(second)
    assert_same_tensors(first / "weights.safetensors", second / "weights.safetensors")
    last = max((first / "checkpoints").iterdir(), key=lambda path: int(path.name.split("_")[1])).name
    for file in ("model", "optimizer", "ema", "loop"):
        name = f"checkpoints/{last}/{file}.safetensors"
        assert_same_tensors(first / name, second / name)


def start_python(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that runs Python code with one thread and can import from the tests."""
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


RECIPES = {
    "rpn": rpn_r18_fpn_small,
    "faster_rcnn": faster_rcnn_r18_fpn_small,
    "retinanet": retinanet_r18_fpn_small,
    "mask_rcnn": mask_rcnn_r18_fpn_small,
}


def real_experiments(**changes: Any) -> dict[str, Experiment]:
    """Experiments with small detectors: one epoch of four steps on eight images, with two images per step."""
    settings = {
        "resize": Resize(64, 64),
        "scale_jitter": None,
        # Not AdamW: its first steps are as large for a gradient of rounding errors as for a real gradient.
        "optimizer": SGD(lr=0.02),
        "epochs": 1,
        "batch_size": 2,
        **changes,
    }
    return {name: replace(recipe(), **settings) for name, recipe in RECIPES.items()}


def float64_model(num_classes: int, *, recipe: str) -> nn.Module:
    """Build the model of one of `RECIPES` in float64."""
    return build(RECIPES[recipe]().model, num_classes=num_classes).double()


def float64_experiments(**changes: Any) -> dict[str, Experiment]:
    """`real_experiments` in float64, so that rounding errors are far below the precision of the log."""
    experiments = real_experiments(**changes)
    return {name: replace(e, model=partial(float64_model, recipe=name)) for name, e in experiments.items()}


FLOAT32_LOG = 1e-6
"""Relative tolerance for the logs of float64 runs. Logged values are float32: each rank rounds them by up to 6e-8, and
their sum and their mean over accumulated batches are rounded again."""
