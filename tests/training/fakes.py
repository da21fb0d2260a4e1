"""A detector and a data set small enough that a training run takes milliseconds."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from boxwright.data.dataset import Category, Sample
from boxwright.structures import Batch, Detections

CATEGORIES = [Category(id=3, name="square"), Category(id=7, name="circle")]


class TinyDetector(nn.Module):
    """Outputs one box and one class per image. Like real detectors, it has a norm, dropout and frozen parameters."""

    def __init__(self, num_classes: int, *, dropout: float, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.max_detections = 1
        self.bad_image = -1
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.stem.requires_grad_(False)
        self.body = nn.Conv2d(width, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, num_classes)
        self.regress = nn.Linear(width, 4)

    def features(self, batch: Batch) -> Tensor:
        pixels = nn.functional.adaptive_avg_pool2d(batch.images.to(self.stem.weight.dtype) / 255, 8)
        return self.dropout(self.norm(self.body(self.stem(pixels))).relu().mean((2, 3)))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        features = self.features(batch)
        weight = batch.targets.valid.float()
        boxes = torch.where(batch.targets.valid[..., None], batch.targets.boxes, 0.0) / 64
        labels = nn.functional.one_hot(batch.targets.labels.clamp(min=0, max=self.num_classes - 1), self.num_classes)
        present = (labels * weight[..., None]).amax(1)
        logits = self.classify(features)
        errors = (self.regress(features)[:, None] - boxes).abs().sum(-1)
        # Means over images: halves of a batch, or of ranks, average to the mean of the whole batch.
        return {
            "class": nn.functional.binary_cross_entropy_with_logits(logits, present),
            "box": torch.where(batch.image_ids == self.bad_image, torch.nan, (errors * weight).sum(1)).mean(),
        }

    def detect(self, batch: Batch) -> Detections:
        scores = self.classify(self.features(batch)).sigmoid()
        size = len(scores)
        return Detections(
            boxes=self.regress(self.features(batch))[:, None].float() * 64,
            scores=scores.amax(1, keepdim=True),
            labels=scores.argmax(1, keepdim=True),
            valid=torch.ones(size, 1, dtype=torch.bool),
        )


def tiny_detector(num_classes: int, *, dropout: float = 0.1, norm: bool = True) -> TinyDetector:
    """Build a `TinyDetector`, with or without a batch norm."""
    detector = TinyDetector(num_classes, dropout=dropout)
    if not norm:
        detector.norm = nn.Identity()  # type: ignore[assignment]
    return detector


def float64_detector(num_classes: int) -> TinyDetector:
    """Build a detector in float64 without norm and dropout, so that two ranks compute the same as one process."""
    return tiny_detector(num_classes, dropout=0.0, norm=False).double()


def nan_detector(num_classes: int, *, bad_image: int) -> TinyDetector:
    """Build a detector without norm and dropout, whose loss is NaN for the image with the id `bad_image`."""
    detector = tiny_detector(num_classes, dropout=0.0, norm=False)
    detector.bad_image = bad_image
    return detector


class MaskedDetector(TinyDetector):
    """A detector that needs masks in the targets."""

    needs_masks = True

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        assert batch.targets.masks is not None
        assert torch.equal(batch.targets.masks.valid, batch.targets.valid)
        return super().losses(batch)


def masked_detector(num_classes: int) -> MaskedDetector:
    """Build a `MaskedDetector` without dropout."""
    return MaskedDetector(num_classes, dropout=0.0)


class FakeImages:
    """Random images with one or two objects each; images at positions in `empty` have none. Ids start at 100."""

    categories = CATEGORIES

    def __init__(self, num_images: int = 16, empty: frozenset[int] = frozenset()) -> None:
        self.num_images, self.empty = num_images, empty
        self.image_sizes = np.full((num_images, 2), 32)
        self.max_objects = 2

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, position: int) -> Sample:
        rng = np.random.default_rng(position)
        num_objects = 0 if position in self.empty else 1 + position % 2
        corner = rng.uniform(0, 16, (num_objects, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, 16, (num_objects, 2))], 1).astype(np.float32)
        return Sample(
            image=rng.integers(0, 255, (32, 32, 3), dtype=np.uint8),
            image_id=100 + position,
            file_name=f"{position}.png",
            boxes=boxes,
            labels=rng.integers(0, 2, num_objects),
            crowd=np.zeros(num_objects, bool),
            object_ids=np.arange(num_objects),
            masks=[ellipse(box) for box in boxes],
        )


def ellipse(box: np.ndarray) -> list[np.ndarray]:
    """Polygon of the ellipse that is inscribed in a box."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return [(box[:2] + box[2:]) / 2 + np.stack([np.cos(angles), np.sin(angles)], 1) * (box[2:] - box[:2]) / 2]


MODEL = partial(tiny_detector)
