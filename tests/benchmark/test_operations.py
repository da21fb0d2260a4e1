"""Operation counts of a convolution equal the formula 2 * N * Cin * Cout * k^2 * H * W."""

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
    """A system of one convolution, which runs in the same grad modes as a detector."""

    def __init__(self) -> None:
        self.layer = nn.Conv2d(INPUTS, OUTPUTS, KERNEL, padding=1)

    def prepare(self, batch: Any) -> Tensor:
        return torch.rand(BATCH, INPUTS, HEIGHT, WIDTH)

    def infer(self, inputs: Tensor) -> None:
        with torch.inference_mode():
            self.layer(inputs)

    def train_step(self, inputs: Tensor) -> None:
        self.layer(inputs).sum().backward()


def test_inference_of_a_convolution_equals_the_formula() -> None:
    assert count_operations(OneConvolution(), None, "infer") == FORMULA  # type: ignore[arg-type]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("task", ["infer", "train"])
def test_a_fused_convolution_has_the_same_count(task: Task, adds: bool) -> None:
    system = OneConvolution()
    added = torch.ones(BATCH, OUTPUTS, HEIGHT, WIDTH) if adds else None
    plain = system.layer
    system.layer = lambda x: conv_norm(plain, None, x, added, relu=True)  # type: ignore[assignment]
    assert count_operations(system, None, task) == (2 if task == "train" else 1) * FORMULA  # type: ignore[arg-type]


def test_training_adds_the_weight_gradient_but_no_image_gradient() -> None:
    assert count_operations(OneConvolution(), None, "train") == 2 * FORMULA  # type: ignore[arg-type]


def test_the_best_rate_is_the_highest_of_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SHAPES", ((INPUTS, OUTPUTS, KERNEL, HEIGHT, WIDTH), (1, 1, 1, 4, 4)))
    seconds = iter((0.5, 0.25))
    monkeypatch.setattr(operations, "_shortest_seconds", lambda *_: next(seconds))
    assert best_rate(torch.device("cpu"), "float32") == FORMULA / 0.5


def test_the_best_rate_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SHAPES", ((8, 8, 3, 16, 16),))
    assert 1e6 < best_rate(torch.device("cpu"), "bfloat16") < 1e15
