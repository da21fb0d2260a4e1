"""Small detectors and batches for tests that need a whole one."""

from __future__ import annotations

import torch
from torch import Tensor

from boxwright.backbones.resnet import ResNet
from boxwright.structures import Batch, Targets


def random_targets(
    num_images: int, num_slots: int, num_objects: int, canvas: tuple[int, int], num_classes: int
) -> Targets:
    """Objects of random place and class in the first `num_objects` slots, NaN boxes in the others."""
    height, width = canvas
    corner = torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.6, height * 0.6])
    side = 12 + torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.3, height * 0.3])
    valid = (torch.arange(num_slots) < num_objects).expand(num_images, num_slots)
    return Targets(
        boxes=torch.where(valid[..., None], torch.cat([corner, corner + side], -1), torch.nan),
        labels=torch.randint(num_classes, (num_images, num_slots)),
        valid=valid.clone(),
        crowd=torch.zeros_like(valid),
    )


def random_batch(
    *,
    num_images: int = 2,
    canvas: tuple[int, int] = (128, 160),
    num_slots: int = 8,
    num_objects: int = 3,
    num_classes: int = 3,
) -> Batch:
    """Noise pictures that fill all of the canvas but its last rows and columns."""
    height, width = canvas
    sizes = torch.tensor([[height - 8, width - 16]]).repeat(num_images, 1)
    return Batch(
        images=torch.randint(256, (num_images, 3, height, width), dtype=torch.uint8),
        image_sizes=sizes,
        original_sizes=sizes.clone(),
        transforms=torch.eye(2, 3).repeat(num_images, 1, 1),
        image_ids=torch.arange(num_images),
        seeds=torch.arange(num_images) + 11,
        targets=random_targets(num_images, num_slots, num_objects, (height - 8, width - 16), num_classes),
    )
