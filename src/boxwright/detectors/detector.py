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
            [B, 3, H, W] float32 in the backbone's colour order, channels last in memory, as convolutions are fastest; 0
            outside the picture, whatever the canvas held there.
        """
        if self.reverse_colours:
            images = images.flip(1)
        height, width = images.shape[2:]
        # On rows of W x 3 values every operation runs along contiguous memory, and in place, because fresh memory
        # costs a CPU more than the arithmetic does.
        pixels = images.permute(0, 2, 3, 1).contiguous().to(self.mean.dtype, copy=True).flatten(2)
        pixels = pixels.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        rows = torch.arange(height, device=images.device)[:, None] < image_sizes[:, 0, None, None]
        columns = torch.arange(3 * width, device=images.device) < 3 * image_sizes[:, 1, None, None]
        return pixels.masked_fill_(~(rows & columns), 0.0).unflatten(2, (width, 3)).permute(0, 3, 1, 2)
