"""A data set of an outside package: discs on a plain background, drawn when they are read."""

from __future__ import annotations

import cv2
import numpy as np

from boxwright.data.dataset import Category, Sample


class Discs:
    """Images with one to three discs; the class is the colour. Only the three members of the protocol."""

    categories = (Category(id=1, name="red"), Category(id=2, name="blue"))

    def __init__(self, num_images: int = 4) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, position: int) -> Sample:
        rng = np.random.default_rng(position)
        image = np.full((64, 64, 3), 230, np.uint8)
        num_objects = 1 + position % 3
        labels = rng.integers(0, 2, num_objects)
        boxes = np.empty((num_objects, 4), np.float32)
        for index, label in enumerate(labels):
            radius = int(rng.integers(5, 12))
            x, y = (int(rng.integers(radius, 64 - radius)) for _ in range(2))
            cv2.circle(image, (x, y), radius, (200, 30, 30) if label == 0 else (30, 30, 200), -1)
            boxes[index] = x - radius, y - radius, x + radius + 1, y + radius + 1
        return Sample(
            image=image,
            image_id=position,
            file_name=f"disc_{position}",
            boxes=boxes,
            labels=labels,
            crowd=np.zeros(num_objects, bool),
            object_ids=np.arange(num_objects),
        )
