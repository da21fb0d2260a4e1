"""An adapter for `benchmarks/peers/serve.py` of a code base that is one convolution, and checks what it is given."""

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
    """A layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.layer(image[None] / 255))


def versions() -> dict[str, str]:
    sys.stdout.write("what a code base prints does no harm\n")
    return {"fake": "1.0"}


def build(family: str, depth: int, num_classes: int, device: str) -> nn.Module:
    if depth != 18:
        raise ValueError(f"no {family} of depth {depth}")
    return Model()


def inputs(pictures: Sequence[Any], device: str) -> Sequence[Any]:
    for picture in pictures:
        assert picture.image.dtype == torch.uint8
        assert picture.boxes.shape == (len(picture.labels), 4)
        assert picture.masks is None or picture.masks.shape == (len(picture.labels), *picture.image.shape[1:])
    return pictures


def losses(model: nn.Module, given: Sequence[Any]) -> Tensor:
    assert all(len(picture.boxes) and picture.masks is not None for picture in given), "objects and masks to learn"
    return sum(model(picture.image.float()).square().mean() for picture in given)


def infer(model: Any, given: Sequence[Any]) -> None:
    with torch.no_grad():
        spread = model.layer(given[0].image[None].float() / 255).std((2, 3))
    # The first call settles the weights, all later ones find them settled.
    if hasattr(model, "called"):
        assert model.norm.weight[0] == 0.2 * torch.ones(())
        assert model.layer.bias[-1] == 4.5
        assert 1 < spread.square().mean().sqrt() < 9
    model.called = True
