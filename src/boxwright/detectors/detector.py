"""What the rest of Boxwright asks of a detector, and the one thing that all of them do first."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PixelStats
from boxwright.structures import Batch, Detections


@runtime_checkable
class Detector(Protocol):
    """An `nn.Module` that learns from a batch and detects in a batch; no mode changes what a call returns.

    One with an attribute `needs_masks` that is true finds masks in the targets of its batches.
    """

    num_classes: int

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar float32 losses by name; their sum is what training minimises. Raises if the batch has no targets."""
        ...

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the batch's canvas, best first."""
        ...


class PixelNormalizer(nn.Module):
    """Brings uint8 RGB pixels to the scale and colour order that a backbone was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, stats: PixelStats) -> None:
        super().__init__()
        self.reverse_colours = stats.order == "bgr"
        self.register_buffer("mean", torch.tensor(stats.mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stats.std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Normalise pictures and blank what lies beside them.

        Args:
            images: [B, 3, H, W] uint8 RGB.
            image_sizes: [B, 2] int64 (height, width) of the picture on the canvas.

        Returns:
            [B, 3, H, W] float32 in the backbone's colour order; 0 outside the picture, whatever the canvas held there.
        """
        if self.reverse_colours:
            images = images.flip(1)
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        rows = torch.arange(images.shape[2], device=images.device)[None, :, None] < image_sizes[:, 0, None, None]
        columns = torch.arange(images.shape[3], device=images.device)[None, None, :] < image_sizes[:, 1, None, None]
        return torch.where((rows & columns)[:, None], pixels, 0.0)
