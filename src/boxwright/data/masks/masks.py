"""Masks of many objects, stored as COCO run lengths and decoded to pixels one at a time.

n objects; H x W is the size of the image of an object. A hundred masks of a 12-megapixel image take 1.2 GB as pixels
and about 100 kB as run lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.data.masks import rle


@dataclass(frozen=True, slots=True)
class Masks:
    """n masks; `masks[i]` decodes mask i to pixels."""

    counts: NDArray[np.object_]
    """[n] bytes, run lengths in COCO's compressed form (see `boxwright.data.masks.rle`)."""
    sizes: NDArray[np.int64]
    """[n, 2] int64, (height, width) of the image of each mask."""

    @classmethod
    def of(cls, counts: Sequence[bytes], sizes: Any) -> Masks:
        """Masks from compressed run lengths, and from [n, 2] (height, width) or one (height, width) for all."""
        column = np.empty(len(counts), object)
        column[:] = counts
        return cls(column, np.broadcast_to(np.asarray(sizes, np.int64).reshape(-1, 2), (len(counts), 2)))

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.counts)

    def __getitem__(self, index: int) -> NDArray[np.bool_]:
        """One mask as pixels, [H, W] bool."""
        height, width = self.sizes[index].tolist()
        runs = rle.decompress(self.counts[index])
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        """Iterate over the masks as pixels."""
        return (self[index] for index in range(len(self)))

    def region(self, index: int) -> tuple[int, int, NDArray[np.bool_]]:
        """The smallest rectangle of pixels that contains a mask. Only its columns are decoded.

        Returns:
            x, y: Coordinates of the upper left pixel.
            pixels: [h, w] bool, or [0, 0] for an empty mask.
        """
        height = int(self.sizes[index, 0])
        runs = rle.decompress(self.counts[index])
        on = runs[1::2].nonzero()[0]
        if not len(on):
            return 0, 0, np.zeros((0, 0), bool)
        ends = np.cumsum(runs)
        first, last = int(ends[2 * on[0]]) // height, int(ends[2 * on[-1] + 1] - 1) // height
        # Clip the runs to these columns.
        bounds = np.clip(ends, first * height, (last + 1) * height)
        clipped = np.diff(bounds, prepend=first * height, append=(last + 1) * height)
        columns = np.repeat(np.arange(len(clipped)) % 2 == 1, clipped).reshape(-1, height)
        rows = columns.any(axis=0).nonzero()[0]
        return first, int(rows[0]), columns[:, rows[0] : rows[-1] + 1].T

    def select(self, rows: NDArray[Any]) -> Masks:
        """Masks at `rows` ([n] bool or [k] int)."""
        return Masks(self.counts[rows], self.sizes[rows])

    def to_coco(self) -> list[dict[str, Any]]:
        """Masks as JSON of COCO: `{"size": [height, width], "counts": "..."}`."""
        return [
            {"size": size, "counts": characters.decode()}
            for size, characters in zip(self.sizes.tolist(), self.counts, strict=True)
        ]
