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
    max_detections: int
    """The most detections that it gives for an image."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar float32 losses by name; their sum is what training minimises. Raises if the batch has no targets."""
        ...

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the batch's canvas, best first."""
        ...


def require_proposals(detector: nn.Module, given: bool) -> None:
    """Check that proposals are given to a detector that needs them, and to no other.

    Raises:
        ValueError: they are missing, or have no use.
    """
    needed = bool(getattr(detector, "needs_proposals", False))
    if needed and not given:
        raise ValueError(
            "the model has no network for proposals, so they must be given: write them with boxwright propose and name "
            "the file with --proposals (in Python: proposals=)"
        )
    if given and not needed:
        raise ValueError("proposals are given, but the model makes its own: leave them out, or take a Fast R-CNN")


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
        pixels = torch.where((rows & columns)[:, None], pixels, 0.0)
        # Convolutions keep the order in memory that they are given, and are fastest where channels come last.
        return pixels.contiguous(memory_format=torch.channels_last)
