"""Adapter of a fake peer for `benchmarks/peers/serve.py`: its model is one convolution, and it checks its inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WEAK = ("norm.weight",)
SPREAD = {"layer": 3.0}
BACKGROUND = "layer"


class Model(nn.Module):
    """A convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.layer(image[None] / 255))


def versions() -> dict[str, str]:
    sys.stdout.write("output of the peer's library, which must not be mistaken for an answer\n")
    return {"fake": "1.0"}


def build(family: str, depth: int, num_classes: int, device: str) -> nn.Module:
    if depth != 18:
        raise ValueError(f"no {family} of depth {depth}")
    return Model()


def inputs(samples: Sequence[Any], device: str) -> Sequence[Any]:
    for sample in samples:
        assert sample.image.dtype == torch.uint8
        assert sample.boxes.shape == (len(sample.labels), 4)
        assert sample.masks is None or sample.masks.shape == (len(sample.labels), *sample.image.shape[1:])
    return samples


def losses(model: nn.Module, inputs: Sequence[Any]) -> Tensor:
    assert all(len(sample.boxes) and sample.masks is not None for sample in inputs), "training needs boxes and masks"
    return sum(model(sample.image.float()).square().mean() for sample in inputs)


def infer(model: Any, inputs: Sequence[Any]) -> None:
    with torch.no_grad():
        spread = model.layer(inputs[0].image[None].float() / 255).std((2, 3))
    # serve.py scales the random weights with the first call. All later calls must see scaled weights.
    if hasattr(model, "called"):
        assert model.norm.weight[0] == 0.2 * torch.ones(())
        assert model.layer.bias[-1] == 4.5
        assert 1 < spread.square().mean().sqrt() < 9
    model.called = True
