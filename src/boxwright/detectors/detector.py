"""The base class of detectors, and the normalisation of pixels that comes first in each."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from boxwright.backbones.backbone import PixelStats
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections


class Detector(nn.Module):
    """A module with `losses(batch)` and `detect(batch)`; no mode changes what either returns.

    Subclass it, or write any `nn.Module` with `num_classes`, `max_detections`, `losses` and `detect`: `as_detector`
    gives the latter the defaults of the other attributes.
    """

    num_classes: int
    """Classes of the data set; labels are 0 to `num_classes` - 1."""
    max_detections: int
    """Upper bound of the number of detections per image."""
    needs_masks: bool = False
    """Whether `losses` reads masks from the batch's targets."""
    needs_proposals: bool = False
    """Whether batches must hold proposals, because the detector has no network that makes them."""
    class_agnostic: bool = False
    """Whether detections are objects of any class (label 0), as proposals are. They are measured by their recall."""
    suppression: Suppression | None = None
    """NMS that selects detections; with it the detections of several views of an image are merged. None if unknown."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar float32 losses by name; training minimises their sum. Raises if the batch has no targets."""
        raise NotImplementedError

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the batch's canvas, best first."""
        raise NotImplementedError


def as_detector(module: nn.Module) -> Detector:
    """Check that a module is a detector, and give it the default of each optional attribute that it lacks.

    Args:
        module: a `Detector`, or another `nn.Module` with its required attributes; changed in place.

    Raises:
        ValueError: it is no `nn.Module`, or lacks a required attribute.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ValueError(f"expected a detector (an nn.Module), got a value of type {kind}")
    for name in ("losses", "detect"):
        method = getattr(module, name, None)
        if not callable(method) or getattr(method, "__func__", None) is getattr(Detector, name):
            raise ValueError(f"{kind} is no detector: it has no method {name}(batch). See boxwright.Detector")
    for name in ("num_classes", "max_detections"):
        value = getattr(module, name, None)
        if not isinstance(value, int) or value < 1:
            state = f"{name} is {value!r}" if hasattr(module, name) else f"it has no {name}"
            raise ValueError(f"{kind} is no detector: {state}. Set self.{name} in __init__ to an integer of at least 1")
    for name in ("needs_masks", "needs_proposals", "class_agnostic", "suppression"):
        if not hasattr(module, name):
            setattr(module, name, getattr(Detector, name))
    return cast(Detector, module)


def require_proposals(detector: Detector, given: bool) -> None:
    """Check that proposals are given to a detector that needs them, and to no other.

    Raises:
        ValueError: they are missing, or have no use.
    """
    if detector.needs_proposals and not given:
        raise ValueError(
            "the model has no network for proposals, so they must be given: write them with boxwright propose and name "
            "the file with --proposals (in Python: proposals=)"
        )
    if given and not detector.needs_proposals:
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
        """Normalise images and set the padding to 0.

        Args:
            images: [B, 3, H, W] uint8 RGB.
            image_sizes: [B, 2] int64 (height, width) of the image on the canvas.

        Returns:
            [B, 3, H, W] float32 in the backbone's colour order, channels last in memory, as convolutions are fastest; 0
            in the padding.
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
