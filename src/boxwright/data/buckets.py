"""The few canvas shapes that pictures are padded into, so that shapes do not depend on data.

Sizes and canvases are (height, width) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from boxwright.checks import check_choice, check_counts

STRIDE = 32
"""Canvas sides are multiples of this, the stride of the coarsest feature map that a detector halves its way down to."""

MAX_SIDE = 65_535
"""The longest side that a JPEG file can have."""

Canvas = tuple[int, int]

Canvases = tuple[Canvas, ...]
"""The canvases of one bucket, one for each scale."""

ScaleMode = Literal["list", "range"]

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
        check_counts(self, "short", "long")
        if not 1 <= self.short <= self.long <= MAX_SIDE:
            raise ValueError(f"{self}: give 1 <= short <= long <= {MAX_SIDE}")

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


@dataclass(frozen=True)
class Scale:
    """The sizes from one to another, of which each picture draws its own; one size where both are the same."""

    low: Resize
    """The smallest."""
    high: Resize
    """The largest, whose canvases hold all others."""

    def draw(self, seed: int) -> Resize:
        """The size of a picture, by its 63-bit seed: every whole short side is as likely as any other."""
        count = self.high.short - self.low.short + 1
        return self.at(self.low.short + (seed * count >> 63))

    def at(self, short: int) -> Resize:
        """The size with a given short side; the long limit rises with it from end to end."""
        way = (short - self.low.short) / max(self.high.short - self.low.short, 1)
        return Resize(short, round(self.low.long + way * (self.high.long - self.low.long)))


def plan_scales(sizes: Sequence[tuple[int, int]], mode: ScaleMode, *, cut: int = 2 * STRIDE) -> list[Scale]:
    """What a step draws from, so that each has canvases of its own.

    Args:
        sizes: (short, long) each.
        mode: "list" takes each of the sizes for itself. "range" takes all sizes between two, cut where the short side
            passes a multiple of 64: few canvases with little padding, as `docs/benchmarks/padding.md` has it.
        cut: of what the short sides are multiples between the pieces of a range.

    Raises:
        ValueError: a size is not 1 <= short <= long, or a range has not two ends that rise.
    """
    check_choice("scale_mode", mode, get_args(ScaleMode))
    ends = [Resize(short, long) for short, long in sizes]
    if mode == "list":
        if not ends:
            raise ValueError("scales hold no size: give (short, long) of at least one, or none")
        return [Scale(size, size) for size in ends]
    if len(ends) != 2 or ends[0].short >= ends[1].short or ends[0].long > ends[1].long:
        raise ValueError(
            f"scales={tuple(sizes)} are no range: give two, the smaller first, such as ((640, 1333), (800, 1333))"
        )
    whole = Scale(*ends)
    ends_of_pieces = [*range(whole.low.short // cut * cut + cut, whole.high.short, cut), whole.high.short]
    starts = [whole.low.short, *(end + 1 for end in ends_of_pieces[:-1])]
    return [Scale(whole.at(start), whole.at(end)) for start, end in zip(starts, ends_of_pieces, strict=True)]


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


def holds(canvases: Canvases, others: Canvases) -> bool:
    """Whether everything that fits `others` fits `canvases`, at each scale."""
    return all(one[0] >= two[0] and one[1] >= two[1] for one, two in zip(canvases, others, strict=True))


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


def plan_buckets(scales: Sequence[Scale], original_sizes: np.ndarray) -> tuple[np.ndarray, list[Canvases]]:
    """Buckets whose pictures share a canvas at every scale, so that what makes up a batch does not depend on its scale.

    Args:
        scales: what a step draws from.
        original_sizes: [N, 2] (height, width) of the pictures in their files.

    Returns:
        int64 [N], each picture's bucket, and the buckets' canvases [K], one for each scale.
    """
    canvases = [buckets_for(scale.high, original_sizes) for scale in scales]
    homes = [
        assign_buckets(scale.high.sizes(original_sizes), each) for scale, each in zip(scales, canvases, strict=True)
    ]
    combinations, buckets = np.unique(np.stack(homes, axis=1), axis=0, return_inverse=True)
    planned = [tuple(each[k] for each, k in zip(canvases, row, strict=True)) for row in combinations.tolist()]
    return buckets.reshape(-1), planned
