"""A hand-written backbone, and common changes to the layers of a ResNet: LoRA and pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from boxwright.backbones.fpn import FPN, resnet_fpn


class PlainNet(nn.Module):
    """Feature maps at strides 4, 8 and 16, each made by one strided convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.channels = [width, 2 * width, 4 * width]
        self.strides = [4, 8, 16]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 8, stride=4, padding=2), nn.GroupNorm(4, width), nn.ReLU())
        self.stages = nn.ModuleList(nn.Conv2d(c, 2 * c, 4, stride=2, padding=1) for c in self.channels[:-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> three maps, finest first."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps


class PlainFPN(FPN):
    """A feature pyramid on a `PlainNet`, passed to a detector as a class."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(PlainNet(width), channels=32)


class LowRankConv2d(nn.Module):
    """A frozen convolution plus a trained update of low rank (LoRA, Hu et al., 2021)."""

    def __init__(self, base: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.normal_(self.up.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the frozen convolution plus the update."""
        return self.base(x) + self.up(self.down(x))


def small_resnet_fpn() -> FPN:
    """P2 to P5 of 32 channels."""
    return resnet_fpn(depth=18, norm="gn", frozen_stages=0, out_stages=(2, 3, 4), channels=32)


def lora_resnet_fpn() -> FPN:
    """A ResNet whose last stage trains low-rank updates of its convolutions."""
    fpn = small_resnet_fpn()
    body: Any = fpn.body
    for block in body.layer3:
        block.conv1 = LowRankConv2d(block.conv1)
        block.conv2 = LowRankConv2d(block.conv2)
    return fpn


def pruned_resnet_fpn() -> FPN:
    """A ResNet with half of the weights of one convolution pruned, and all weights of another."""
    fpn = small_resnet_fpn()
    body: Any = fpn.body
    prune.l1_unstructured(body.layer2[0].conv1, "weight", amount=0.5)
    # Prune all weights of a second convolution, so that the effect is large.
    prune.custom_from_mask(body.layer3[0].conv2, "weight", torch.zeros_like(body.layer3[0].conv2.weight))
    return fpn
