"""Feature Pyramid Network (Lin et al., 2017): maps of every scale, each with the meaning of the coarsest.

B images, L levels. P2 to P5 come from C2 to C5 of the body; P6 is P5 at every other position.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.resnet import Norm, ResNet, Style, make_norm


class FPN(nn.Module):
    """A body and the pyramid on it; itself a backbone."""

    def __init__(
        self,
        body: Backbone,
        *,
        channels: int = 256,
        extra: Literal["pool"] | None = "pool",
        norm: Literal["gn", "bn", "sync_bn"] | None = None,
    ) -> None:
        """Put a pyramid on a body.

        Args:
            body: gives the maps, each of twice the stride of the one before.
            channels: of every level.
            extra: "pool" adds a level above the last, that one at every other position; None adds none.
            norm: normalises after each convolution of the pyramid; None normalises nowhere (2018).
        """
        super().__init__()
        self.body = body
        self.extra = extra
        self.lateral = nn.ModuleList(_convolution(inputs, channels, 1, norm) for inputs in body.channels)
        self.output = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in body.channels)
        self.strides = list(body.strides)
        if extra == "pool":
            self.strides.append(2 * self.strides[-1])
        self.channels = [channels] * len(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> L of [B, channels, H / stride, W / stride], finest first."""
        inner = [lateral(feature) for lateral, feature in zip(self.lateral, self.body(images), strict=True)]
        for finer in range(len(inner) - 2, -1, -1):
            inner[finer] = inner[finer] + F.interpolate(inner[finer + 1], size=inner[finer].shape[-2:], mode="nearest")
        levels = [output(feature) for output, feature in zip(self.output, inner, strict=True)]
        if self.extra == "pool":
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return levels


def _convolution(inputs: int, outputs: int, size: int, norm: Norm | None) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=norm is None)
    # Caffe2's XavierFill, which looks at the inputs alone: uniform within sqrt(3 / fan_in).
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if norm is None:
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        return convolution
    return nn.Sequential(convolution, make_norm(norm, outputs))


def resnet_fpn(
    *,
    depth: int = 50,
    style: Style = "pytorch",
    norm: Norm = "frozen_bn",
    frozen_stages: int = 1,
    train_norm_affine: bool = True,
    channels: int = 256,
    fpn_norm: Literal["gn", "bn", "sync_bn"] | None = None,
) -> FPN:
    """P2 to P6 on a ResNet with random weights.

    Args:
        depth: 18, 34, 50 or 101.
        style: where a bottleneck has its stride: "pytorch" in the 3x3 convolution, "caffe" in the first 1x1.
        norm: of the ResNet: "frozen_bn", "bn", "sync_bn" or "gn".
        frozen_stages: the ResNet's stem and this many of its stages do not learn; 0 trains everything.
        train_norm_affine: whether the scales and biases of "frozen_bn" learn in the stages that do.
        channels: of every level.
        fpn_norm: normalises after each convolution of the pyramid; None normalises nowhere (2018).
    """
    body = ResNet(depth, style=style, norm=norm, frozen_stages=frozen_stages, train_norm_affine=train_norm_affine)
    return FPN(body, channels=channels, norm=fpn_norm)
