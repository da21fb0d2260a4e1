"""Interface of a backbone, and the pixel statistics that a backbone was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Backbone(Protocol):
    """An `nn.Module` that computes feature maps from images. Any module with these three members can be a backbone."""

    channels: list[int]
    """Number of channels of each feature map, finest first."""
    strides: list[int]
    """Stride of each feature map in pixels, finest first."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images: [B, 3, H, W] float, normalised pixels; H and W are multiples of 32.

        Returns:
            L of [B, channels[l], H / strides[l], W / strides[l]] (rounded up), finest first.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PixelStats:
    """Pixel mean, standard deviation and colour order that a backbone was trained with."""

    mean: tuple[float, float, float]
    """Mean of each channel on the scale 0..255, in the order of `order`; it is subtracted."""
    std: tuple[float, float, float]
    """Standard deviation of each channel on the scale 0..255, in the order of `order`; it is divided by."""
    order: Literal["rgb", "bgr"] = "rgb"
    """Colour order of the channels."""


PYTORCH = PixelStats(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""Statistics for the ImageNet weights of torchvision and most timm models."""
CAFFE = PixelStats(mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), order="bgr")
"""Statistics for the ImageNet weights of the original, Caffe-trained ResNets (also used by Detectron)."""
