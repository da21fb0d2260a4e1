"""Feature Pyramid Network (FPN; Lin et al., 2017): feature maps of several scales, all with strong semantics.

B images, L levels. P2 to P5 are computed from C2 to C5 of the body. P6 is P5 subsampled by 2. As in RetinaNet (Lin et
al., Focal Loss, 2017), P6 can instead be a strided convolution of C5 or P5, and P7 a strided convolution of P6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.resnet import ResNet, Style
from boxwright.layers.conv_norm import ConvNorm, conv_norm
from boxwright.layers.norm import Norm, make_norm

Extra = Literal["pool", "c5", "p5"]


class FPN(nn.Module):
    """A backbone that builds a feature pyramid on the feature maps of another backbone, its body."""

    def __init__(
        self,
        body: Backbone,
        *,
        channels: int = 256,
        extra: Extra | None = "pool",
        extra_relu: bool = False,
        norm: Literal["gn", "bn", "sync_bn"] | None = None,
    ) -> None:
        """Build a feature pyramid on a body.

        Args:
            body: backbone whose strides double from one feature map to the next.
            channels: number of channels of every level.
            extra: extra levels. "pool" adds one level, the last level subsampled by 2. "c5" and "p5" add two levels by
                3x3 convolutions with stride 2: the first is applied to the last feature map of the body ("c5") or of
                the pyramid ("p5"), the second to the output of the first. None adds no level.
            extra_relu: whether to apply ReLU between the two extra convolutions, as in the paper and torchvision but
                not in mmdetection 0.5 (2018).
            norm: normalisation layer after each convolution of the pyramid; None (as in 2018) for no normalisation.
        """
        super().__init__()
        if extra not in ("pool", "c5", "p5", None):
            raise ValueError(f"FPN extra: expected 'pool', 'c5', 'p5' or None, got {extra!r}")
        self.body = body
        self.extra = extra
        self.extra_relu = extra_relu
        self.lateral = nn.ModuleList(_convolution(inputs, channels, 1, norm) for inputs in body.channels)
        self.output = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in body.channels)
        inputs = body.channels[-1] if extra == "c5" else channels
        self.extra_output = nn.ModuleList(
            _convolution(size, channels, 3, norm, stride=2)
            for size in ((inputs, channels) if extra in ("c5", "p5") else ())
        )
        self.strides = list(body.strides)
        for _ in range(1 if extra == "pool" else len(self.extra_output)):
            self.strides.append(2 * self.strides[-1])
        self.channels = [channels] * len(self.strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels -> L of [B, channels, H / stride, W / stride], finest first."""
        maps = self.body(images)
        inner = [conv_norm(self.lateral[-1], None, maps[-1])]
        for lateral, feature in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            upsampled = F.interpolate(inner[0], size=feature.shape[-2:], mode="nearest")
            inner.insert(0, conv_norm(lateral, None, feature, upsampled))
        levels = [conv_norm(output, None, feature) for output, feature in zip(self.output, inner, strict=True)]
        if self.extra == "pool":
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        coarsest = maps[-1] if self.extra == "c5" else levels[-1]
        for index, output in enumerate(self.extra_output):
            levels.append(conv_norm(output, None, F.relu(coarsest) if self.extra_relu and index else coarsest))
            coarsest = levels[-1]
        return levels


def _convolution(inputs: int, outputs: int, size: int, norm: Norm | None, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=norm is None)
    # Caffe2's XavierFill, which uses fan-in only: uniform in +-sqrt(3 / fan_in).
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if norm is None:
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        return convolution
    return ConvNorm(convolution, make_norm(norm, outputs))


def resnet_fpn(
    *,
    depth: int = 50,
    style: Style = "pytorch",
    norm: Norm = "frozen_bn",
    frozen_stages: int = 1,
    train_norm_affine: bool = True,
    out_stages: Sequence[int] = (2, 3, 4, 5),
    groups: int = 1,
    width_per_group: int = 64,
    recompute: bool = False,
    channels: int = 256,
    extra: Extra | None = "pool",
    extra_relu: bool = False,
    fpn_norm: Literal["gn", "bn", "sync_bn"] | None = None,
) -> FPN:
    """Build an FPN on a ResNet with random weights. The levels are P2 to P6 by default.

    Args:
        depth: 18, 34, 50 or 101.
        style: which convolution of a bottleneck has the stride: "pytorch" the 3x3, "caffe" the first 1x1.
        norm: normalisation layer of the ResNet: "frozen_bn", "bn", "sync_bn" or "gn".
        frozen_stages: number of frozen stages of the ResNet, including the stem; 0 trains everything, the stem too.
        train_norm_affine: whether the scales and biases of "frozen_bn" are trained in the stages that are not frozen.
        out_stages: stages of the ResNet that the pyramid is built on; (3, 4, 5) omits P2.
        groups: 32 or 64 for ResNeXt; see `ResNet`.
        width_per_group: 4 for ResNeXt-101 32x4d and 64x4d.
        recompute: activation checkpointing: recompute blocks in the backward pass to save memory; see `ResNet`.
        channels: number of channels of every level.
        extra: extra levels above the last one, see `FPN`. "c5" adds P6 and P7 for RetinaNet.
        extra_relu: whether to apply ReLU between P6 and P7.
        fpn_norm: normalisation layer after each convolution of the pyramid; None (as in 2018) for no normalisation.
    """
    body = ResNet(
        depth,
        style=style,
        norm=norm,
        frozen_stages=frozen_stages,
        train_norm_affine=train_norm_affine,
        out_stages=out_stages,
        groups=groups,
        width_per_group=width_per_group,
        recompute=recompute,
    )
    return FPN(body, channels=channels, extra=extra, extra_relu=extra_relu, norm=fpn_norm)
