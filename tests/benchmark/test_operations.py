"""Counts of operations are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxwright.benchmark import operations
from boxwright.benchmark.measure import Task
from boxwright.benchmark.operations import best_rate, count_operations
from boxwright.layers.conv_norm import conv_norm

BATCH, INPUTS, OUTPUTS, KERNEL, HEIGHT, WIDTH = 2, 3, 5, 3, 10, 12
FORMULA = 2 * BATCH * INPUTS * OUTPUTS * KERNEL**2 * HEIGHT * WIDTH


class OneConvolution:
    """A system of one layer, in the modes that detectors run in."""

    def __init__(self) -> None:
        self.layer = nn.Conv2d(INPUTS, OUTPUTS, KERNEL, padding=1)

    def prepare(self, batch: Any) -> Tensor:
        return torch.rand(BATCH, INPUTS, HEIGHT, WIDTH)

    def infer(self, given: Tensor) -> None:
        with torch.inference_mode():
            self.layer(given)

    def train_step(self, given: Tensor) -> None:
        self.layer(given).sum().backward()


def test_a_convolutions_inference_is_the_formula() -> None:
    assert count_operations(OneConvolution(), None, "infer") == FORMULA  # type: ignore[arg-type]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("task", ["infer", "train"])
def test_a_fused_convolution_counts_as_much(task: Task, adds: bool) -> None:
    system = OneConvolution()
    added = torch.ones(BATCH, OUTPUTS, HEIGHT, WIDTH) if adds else None
    plain = system.layer
    system.layer = lambda given: conv_norm(plain, None, given, added, relu=True)  # type: ignore[assignment]
    assert count_operations(system, None, task) == (2 if task == "train" else 1) * FORMULA  # type: ignore[arg-type]


def test_its_training_step_adds_as_much_for_the_weights_and_nothing_for_the_picture() -> None:
    assert count_operations(OneConvolution(), None, "train") == 2 * FORMULA  # type: ignore[arg-type]


def test_the_best_rate_is_that_of_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SHAPES", ((INPUTS, OUTPUTS, KERNEL, HEIGHT, WIDTH), (1, 1, 1, 4, 4)))
    seconds = iter((0.5, 0.25))
    monkeypatch.setattr(operations, "_shortest", lambda *_: next(seconds))
    assert best_rate(torch.device("cpu"), "float32") == FORMULA / 0.5


def test_a_call_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SHAPES", ((8, 8, 3, 16, 16),))
    assert 1e6 < best_rate(torch.device("cpu"), "bfloat16") < 1e15
