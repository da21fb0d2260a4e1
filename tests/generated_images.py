"""A data set in memory: images of several sizes, each a smooth gradient with bright rectangles as objects.

This is a separate module, so that workers with the start method "spawn" can import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from boxwright.data.dataset import Category, Sample

SIZES = ((40, 60), (60, 40), (30, 64), (50, 50), (64, 33), (45, 60))


@dataclass(frozen=True)
class GeneratedImages:
    """`count` images. Image i has the id 100 + i and i % 4 objects; a third object is a crowd region."""

    count: int
    sizes: Sequence[tuple[int, int]] = SIZES
    broken: int | None = None
    """Index of an image that raises when it is read."""
    categories: Sequence[Category] = field(default=(Category(id=1, name="one"), Category(id=5, name="two")))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise ValueError(f"broken/{index}.jpg: cannot be decoded")
        rng = np.random.default_rng(index)
        height, width = self.sizes[index % len(self.sizes)]
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0] = np.linspace(0, 100, width)
        image[..., 1] = np.linspace(0, 100, height)[:, None]
        num = index % 4
        corners = rng.integers(0, [width // 2, height // 2], (num, 2))
        boxes = np.concatenate([corners, corners + rng.integers(8, 16, (num, 2))], axis=1).astype(np.float32)
        for x1, y1, x2, y2 in boxes.astype(int):
            image[y1:y2, x1:x2] = 255
        return Sample(
            image=image,
            image_id=100 + index,
            file_name=f"{index}.jpg",
            boxes=boxes,
            labels=np.arange(num, dtype=np.int64) % 2,
            crowd=np.arange(num) == 2,
            object_ids=np.arange(num, dtype=np.int64),
            masks=[[box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)] for box in boxes],
        )


class GeneratedImagesWithInfo(GeneratedImages):
    """The same data set with the attributes that save the loader a pass over all samples (see `DatasetInfo`)."""

    @property
    def image_sizes(self) -> np.ndarray:
        """[N, 2] (height, width)."""
        return np.array([self.sizes[index % len(self.sizes)] for index in range(self.count)])

    @property
    def max_objects(self) -> int:
        """Maximum number of objects per image."""
        return 3
