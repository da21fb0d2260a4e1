"""Base class of all detectors, and the pixel normalisation that every detector applies first."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PixelStats
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections


class Detector(nn.Module):
    """A module with `losses(batch)` and `detect(batch)`. `train()` and `eval()` do not change what either returns.

    Subclass `Detector`, or write any `nn.Module` with `num_classes`, `max_detections`, `losses` and `detect`:
    `as_detector` then sets the optional attributes to the defaults below.
    """

    num_classes: int
    """Number of classes of the data set; labels are 0 to `num_classes` - 1."""
    max_detections: int
    """Maximum number of detections per image."""
    needs_masks: bool = False
    """Whether `losses` reads masks from the batch's targets."""
    needs_proposals: bool = False
    """Whether batches must contain proposals, because the detector has no RPN."""
    class_agnostic: bool = False
    """Whether detections are class-agnostic proposals (label 0). They are evaluated by recall instead of AP."""
    suppression: Suppression | None = None
    """NMS that selects detections; test-time augmentation uses it to merge the detections of several views of an image.
    None if unknown."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar float32 losses by name; training minimises their sum. Raises if the batch has no targets."""
        raise NotImplementedError

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the batch's canvas, best first."""
        raise NotImplementedError


def as_detector(module: nn.Module) -> Detector:
    """Check that a module is a detector, and set every optional attribute that it lacks to its default.

    Args:
        module: a `Detector`, or another `nn.Module` with the required attributes; changed in place.

    Raises:
        ValueError: `module` is no `nn.Module`, or lacks a required attribute.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ValueError(f"detector: expected an nn.Module, got a value of type {kind}")
    for name in ("losses", "detect"):
        method = getattr(module, name, None)
        if not callable(method) or getattr(method, "__func__", None) is getattr(Detector, name):
            raise ValueError(f"{kind} is not a detector: it has no method {name}(batch). See boxwright.Detector.")
    for name in ("num_classes", "max_detections"):
        value = getattr(module, name, None)
        if not isinstance(value, int) or value < 1:
            state = f"{name} is {value!r}" if hasattr(module, name) else f"it has no {name}"
            raise ValueError(
                f"{kind} is not a detector: {state}. Set self.{name} in __init__ to an integer of at least 1."
            )
    for name in ("needs_masks", "needs_proposals", "class_agnostic", "suppression"):
        if not hasattr(module, name):
            setattr(module, name, getattr(Detector, name))
    return cast(Detector, module)


def require_proposals(detector: Detector, has_proposals: bool) -> None:
    """Check that proposals are passed to a detector that needs them, and only to such a detector.

    Raises:
        ValueError: proposals are missing, or the detector does not use any.
    """
    if detector.needs_proposals and not has_proposals:
        raise ValueError(
            "this model has no RPN and needs proposals. Write them with boxwright propose, then pass the file with "
            "--proposals (in Python: proposals=)."
        )
    if has_proposals and not detector.needs_proposals:
        raise ValueError("proposals were passed, but this model has its own RPN: remove them, or use a Fast R-CNN")


class PixelNormalizer(nn.Module):
    """Converts uint8 RGB pixels to the scale and colour order that a backbone was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, stats: PixelStats) -> None:
        super().__init__()
        self.reverse_colours = stats.order == "bgr"
        self.register_buffer("mean", torch.tensor(stats.mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stats.std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Normalise images and set the padding to 0.

        Args:
            images: [B, 3, H, W] uint8 RGB.
            image_sizes: [B, 2] int64 (height, width) of each image within the padded canvas.

        Returns:
            [B, 3, H, W] float32 in the backbone's colour order, with 0 in the padding. The memory format is channels
            last, in which convolutions are fastest.
        """
        if self.reverse_colours:
            images = images.flip(1)
        height, width = images.shape[2:]
        # Rows of W x 3 values keep every operation on contiguous memory. The operations are in place because allocating
        # memory costs more than the arithmetic on a CPU.
        pixels = images.permute(0, 2, 3, 1).contiguous().to(self.mean.dtype, copy=True).flatten(2)
        pixels = pixels.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        rows = torch.arange(height, device=images.device)[:, None] < image_sizes[:, 0, None, None]
        columns = torch.arange(3 * width, device=images.device) < 3 * image_sizes[:, 1, None, None]
        return pixels.masked_fill_(~(rows & columns), 0.0).unflatten(2, (width, 3)).permute(0, 3, 1, 2)
