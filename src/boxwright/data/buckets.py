"""The few canvas shapes that pictures are padded into, so that shapes do not depend on data.

Sizes and canvases are (height, width) throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRIDE = 32
"""Canvas sides are multiples of this, the stride of the coarsest feature map that a detector halves its way down to."""

Canvas = tuple[int, int]

# Cameras make 4:3 and 3:2 pictures; what is longer shares the longest canvas.
_ASPECTS = (4 / 3, 3 / 2)


@dataclass(frozen=True)
class Resize:
    """Scale a picture, aspect kept, until its short side or its long side meets the limit, whichever comes first."""

    short: int = 800
    """The short side that pictures are scaled to, in pixels."""
    long: int = 1333
    """What the long side may not exceed, in pixels."""

    def __post_init__(self) -> None:
        if not 1 <= self.short <= self.long:
            raise ValueError(f"{self}: give 1 <= short <= long")

    def sizes(self, original_sizes: np.ndarray) -> np.ndarray:
        """Resized (height, width) of pictures, rounded as the 2018 toolbox does.

        Args:
            original_sizes: [..., 2] (height, width) in the file.

        Returns:
            int64 [..., 2] (height, width), at least 1.
        """
        original = np.asarray(original_sizes, dtype=np.float64)
        scale = np.minimum(self.long / original.max(-1), self.short / original.min(-1))
        return np.maximum((original * scale[..., None] + 0.5).astype(np.int64), 1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Resized (height, width) of one picture."""
        resized = self.sizes(np.array([height, width]))
        return int(resized[0]), int(resized[1])


def round_up(side: int) -> int:
    """The smallest multiple of the stride that holds a side."""
    return -(-side // STRIDE) * STRIDE


def buckets_for(resize: Resize, original_sizes: np.ndarray | None = None) -> list[Canvas]:
    """The canvases that hold every picture a resize can make, smallest first, landscape before portrait.

    Short 800 and long 1333 give 800x1088, 800x1216, 800x1344 and their transposes: 4:3, 3:2 and the longest allowed.

    Args:
        resize: the limits.
        original_sizes: [N, 2] sizes of a data set's pictures. Where a square canvas would be home to a quarter of
            them or more (microscopy, aerial tiles), it is added; elsewhere it is not worth one more shape.
    """
    short, long = round_up(resize.short), round_up(resize.long)
    lengths = {min(round_up(int(resize.short * aspect + 0.5)), long) for aspect in _ASPECTS} | {long}
    if original_sizes is not None and np.mean(resize.sizes(original_sizes).max(-1) <= short) >= 0.25:
        lengths.add(short)
    return [canvas for length in sorted(lengths) for canvas in dict.fromkeys(((short, length), (length, short)))]


def holds(canvas: Canvas, other: Canvas) -> bool:
    """Whether everything that fits `other` fits `canvas`."""
    return canvas[0] >= other[0] and canvas[1] >= other[1]


def assign_buckets(sizes: np.ndarray, canvases: list[Canvas]) -> np.ndarray:
    """The first canvas that holds each resized picture.

    Args:
        sizes: [N, 2] (height, width) after resizing.
        canvases: smallest first, as from `buckets_for`.

    Returns:
        int64 [N], indices of `canvases`.
    """
    fits = (sizes[:, None, :] <= np.array(canvases)[None, :, :]).all(-1)
    assert fits.any(-1).all(), "the buckets of a resize hold every picture it makes"
    return fits.argmax(-1)
