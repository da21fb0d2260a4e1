"""What the rest of Boxwright asks of a backbone, and what backbones ask of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Backbone(Protocol):
    """An `nn.Module` that turns pictures into feature maps; a class of your own needs no more than this."""

    channels: list[int]
    """Channels of each map, finest map first."""
    strides: list[int]
    """Pixels that a position of each map stands for, finest map first."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The feature maps.

        Args:
            images: [B, 3, H, W] float, normalised pixels; H and W are multiples of 32.

        Returns:
            L of [B, channels[l], H / strides[l], W / strides[l]] (rounded up), finest first.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PixelStats:
    """The scale and colour order of pixels that a backbone was trained with."""

    mean: tuple[float, float, float]
    """Taken from each channel, in 0..255 and in the order of `order`."""
    std: tuple[float, float, float]
    """Each channel is divided by this after the mean is taken, in 0..255 and in the order of `order`."""
    order: Literal["rgb", "bgr"] = "rgb"
    """The order of the channels."""


PYTORCH = PixelStats(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""ImageNet weights of torchvision and of most timm models."""
CAFFE = PixelStats(mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), order="bgr")
"""ImageNet weights of the original, Caffe-trained ResNets (and of Detectron)."""
