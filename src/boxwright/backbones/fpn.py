"""Feature Pyramid Network (Lin et al., 2017): maps of every scale, each with the meaning of the coarsest.

B images, L levels. P2 to P5 come from C2 to C5 of the body. P6 is P5 at every other position; or, as in RetinaNet
(Lin et al., Focal Loss, 2017), P6 is a strided convolution of C5 or of P5, and P7 one of P6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.resnet import ResNet, Style
from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.norm import Norm, make_norm

Extra = Literal["pool", "c5", "p5"]


class FPN(nn.Module):
    """A body and the pyramid on it; itself a backbone."""

    def __init__(
        self,
        body: Backbone,
        *,
        channels: int = 256,
        extra: Extra | None = "pool",
        extra_relu: bool = False,
        norm: Literal["gn", "bn", "sync_bn"] | None = None,
    ) -> None:
        """Put a pyramid on a body.

        Args:
            body: gives the maps, each of twice the stride of the one before.
            channels: of every level.
            extra: "pool" adds a level above the last, that one at every other position. "c5" and "p5" add two, by 3x3
                convolutions of stride 2: of the body's last map or of the pyramid's, then of the first of the two.
                None adds none.
            extra_relu: whether a ReLU stands between these two: in the paper and in torchvision, not in 2018.
            norm: normalises after each convolution of the pyramid; None normalises nowhere (2018).
        """
        super().__init__()
        if extra not in ("pool", "c5", "p5", None):
            raise ValueError(f"FPN extra {extra!r} is none of 'pool', 'c5', 'p5', None")
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
            enlarged = F.interpolate(inner[0], size=feature.shape[-2:], mode="nearest")
            inner.insert(0, conv_norm(lateral, None, feature, enlarged))
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
    out_stages: Sequence[int] = (2, 3, 4, 5),
    groups: int = 1,
    width_per_group: int = 64,
    recompute: bool = False,
    channels: int = 256,
    extra: Extra | None = "pool",
    extra_relu: bool = False,
    fpn_norm: Literal["gn", "bn", "sync_bn"] | None = None,
) -> FPN:
    """A pyramid on a ResNet with random weights: P2 to P6, unless told otherwise.

    Args:
        depth: 18, 34, 50 or 101.
        style: where a bottleneck has its stride: "pytorch" in the 3x3 convolution, "caffe" in the first 1x1.
        norm: of the ResNet: "frozen_bn", "bn", "sync_bn" or "gn".
        frozen_stages: the ResNet's stem and this many of its stages do not learn; 0 trains everything.
        train_norm_affine: whether the scales and biases of "frozen_bn" learn in the stages that do.
        out_stages: the maps of the ResNet that levels are made of; (3, 4, 5) leaves out P2.
        groups: 32 or 64 for ResNeXt; see `ResNet`.
        width_per_group: 4 for ResNeXt-101 32x4d and 64x4d.
        recompute: whether blocks are computed again in the backward pass, to save memory; see `ResNet`.
        channels: of every level.
        extra: how levels above the last are made; see `FPN`. "c5" gives P6 and P7 for RetinaNet.
        extra_relu: whether a ReLU stands between P6 and P7.
        fpn_norm: normalises after each convolution of the pyramid; None normalises nowhere (2018).
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
