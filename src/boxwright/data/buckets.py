"""Canvas shapes ("buckets") that images are padded to. There are few of them, so that shapes do not depend on data.

Sizes and canvases are (height, width) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from boxwright.checks import check_choice, check_counts

STRIDE = 32
"""Canvas sides are multiples of this: the stride of the coarsest feature map that is computed by halving."""

MAX_SIDE = 65_535
"""Maximum side of a JPEG file, in pixels."""

Canvas = tuple[int, int]

Canvases = tuple[Canvas, ...]
"""Canvases of one bucket, one per scale."""

ScaleMode = Literal["list", "range"]

# Cameras produce 4:3 and 3:2 images; longer images share the longest canvas.
_ASPECTS = (4 / 3, 3 / 2)


@dataclass(frozen=True)
class Resize:
    """Scale an image, keeping its aspect ratio, until its short side or its long side reaches its limit."""

    short: int = 800
    """Target length of the short side, in pixels."""
    long: int = 1333
    """Maximum length of the long side, in pixels."""

    def __post_init__(self) -> None:
        check_counts(self, "short", "long")
        if not 1 <= self.short <= self.long <= MAX_SIDE:
            raise ValueError(f"resize: expected 1 <= short <= long <= {MAX_SIDE}, got {self}")

    def sizes(self, original_sizes: np.ndarray) -> np.ndarray:
        """Resized (height, width) of images, rounded as in mmdetection 0.5 (2018).

        Args:
            original_sizes: [..., 2] (height, width) in the file.

        Returns:
            int64 [..., 2] (height, width), at least 1.
        """
        original = np.asarray(original_sizes, dtype=np.float64)
        scale = np.minimum(self.long / original.max(-1), self.short / original.min(-1))
        return np.maximum((original * scale[..., None] + 0.5).astype(np.int64), 1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Resized (height, width) of one image."""
        resized = self.sizes(np.array([height, width]))
        return int(resized[0]), int(resized[1])


@dataclass(frozen=True)
class Scale:
    """A range of sizes from which each image draws its own; a single size if both ends are equal."""

    low: Resize
    """Smallest size."""
    high: Resize
    """Largest size; its canvases also fit all smaller sizes."""

    def draw(self, seed: int) -> Resize:
        """Draw the size of an image from its 63-bit seed. All integer short sides are equally likely."""
        count = self.high.short - self.low.short + 1
        return self.at(self.low.short + (seed * count >> 63))

    def at(self, short: int) -> Resize:
        """Size with a given short side; the limit of the long side is interpolated linearly between both ends."""
        fraction = (short - self.low.short) / max(self.high.short - self.low.short, 1)
        return Resize(short, round(self.low.long + fraction * (self.high.long - self.low.long)))


def plan_scales(sizes: Sequence[tuple[int, int]], mode: ScaleMode, *, cut: int = 2 * STRIDE) -> list[Scale]:
    """Scales that training steps draw from; each scale has its own canvases.

    Args:
        sizes: (short, long) of each size.
        mode: "list" uses each size as a scale. "range" uses all sizes between two, split where the short side passes a
            multiple of `cut`: few canvases with little padding (see `docs/benchmarks/padding.md`).
        cut: Step of the short side, in pixels, at which a range is split.

    Raises:
        ValueError: A size is not 1 <= short <= long, or a range does not consist of two ascending sizes.
    """
    check_choice("scale_mode", mode, get_args(ScaleMode))
    ends = [Resize(short, long) for short, long in sizes]
    if mode == "list":
        if not ends:
            raise ValueError("scales: expected at least one (short, long), got none")
        return [Scale(size, size) for size in ends]
    if len(ends) != 2 or ends[0].short >= ends[1].short or ends[0].long > ends[1].long:
        raise ValueError(
            f"scales: expected two ascending sizes for a range, such as ((640, 1333), (800, 1333)), got {tuple(sizes)}"
        )
    whole = Scale(*ends)
    piece_ends = [*range(whole.low.short // cut * cut + cut, whole.high.short, cut), whole.high.short]
    starts = [whole.low.short, *(end + 1 for end in piece_ends[:-1])]
    return [Scale(whole.at(start), whole.at(end)) for start, end in zip(starts, piece_ends, strict=True)]


def round_up(side: int) -> int:
    """Round a side up to a multiple of `STRIDE`."""
    return -(-side // STRIDE) * STRIDE


def buckets_for(resize: Resize, original_sizes: np.ndarray | None = None) -> list[Canvas]:
    """Canvases that fit every image after a resize, smallest first, landscape before portrait.

    Short 800 and long 1333 give 800x1088, 800x1216, 800x1344 and their transposes, for the aspect ratios 4:3 and 3:2
    and the maximum length.

    Args:
        resize: Limits of the sides.
        original_sizes: [N, 2] image sizes of a data set. A square canvas is added if at least a quarter of the images
            fit it (microscopy, aerial tiles); otherwise it is not worth an additional shape.
    """
    short, long = round_up(resize.short), round_up(resize.long)
    lengths = {min(round_up(int(resize.short * aspect + 0.5)), long) for aspect in _ASPECTS} | {long}
    if original_sizes is not None and np.mean(resize.sizes(original_sizes).max(-1) <= short) >= 0.25:
        lengths.add(short)
    return [canvas for length in sorted(lengths) for canvas in dict.fromkeys(((short, length), (length, short)))]


def contains(canvases: Canvases, others: Canvases) -> bool:
    """Whether all images that fit `others` also fit `canvases`, at every scale."""
    return all(one[0] >= two[0] and one[1] >= two[1] for one, two in zip(canvases, others, strict=True))


def assign_buckets(sizes: np.ndarray, canvases: list[Canvas]) -> np.ndarray:
    """Index of the first canvas that fits each resized image.

    Args:
        sizes: [N, 2] (height, width) after resizing.
        canvases: Canvases, smallest first, as returned by `buckets_for`.

    Returns:
        int64 [N], indices into `canvases`.
    """
    fits = (sizes[:, None, :] <= np.array(canvases)[None, :, :]).all(-1)
    assert fits.any(-1).all(), "the buckets of a resize fit every resized image"
    return fits.argmax(-1)


def plan_buckets(scales: Sequence[Scale], original_sizes: np.ndarray) -> tuple[np.ndarray, list[Canvases]]:
    """Buckets of images that share a canvas at every scale, so a batch has the same images at every scale.

    Args:
        scales: Scales that training steps draw from.
        original_sizes: [N, 2] (height, width) of the images in their files.

    Returns:
        int64 [N], bucket of each image, and the canvases of the K buckets, one per scale.
    """
    canvases = [buckets_for(scale.high, original_sizes) for scale in scales]
    bucket_per_scale = [
        assign_buckets(scale.high.sizes(original_sizes), each) for scale, each in zip(scales, canvases, strict=True)
    ]
    combinations, buckets = np.unique(np.stack(bucket_per_scale, axis=1), axis=0, return_inverse=True)
    planned = [tuple(each[k] for each, k in zip(canvases, row, strict=True)) for row in combinations.tolist()]
    return buckets.reshape(-1), planned
