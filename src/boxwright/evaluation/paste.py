"""Paste masks: convert masks on the grids of their boxes to masks in pixels of the images.

n masks, S x S cells per box; an image has H x W pixels.

A mask is sampled bilinearly at pixel centres (the value of a cell is at the centre of the cell; outside the grid it is
0) and thresholded at 0.5 (Mask R-CNN, arXiv 1703.06870, section 3.1; `paste_masks_in_image` in Detectron2). Along a
column of pixels, the sampled mask is linear between the centres of two cells. It therefore crosses 0.5 at most once
between them, at a position that one division computes. These positions are COCO's run lengths: individual pixels are
never computed, so the time depends on the number of columns instead of pixels. Unpasted masks are small, so this runs
on the CPU for all detectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boxwright.data.masks import Masks, rle

THRESHOLD = 0.5
_COLUMNS_AT_ONCE = 2**16
"""Number of pixel columns, over all masks, that are processed at once; this bounds memory to about 30 MB."""


def paste_masks(probabilities: NDArray[np.float32], boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> Masks:
    """Paste masks into their images.

    Args:
        probabilities: [n, S, S] float32 in 0..1, indexed by row, then column.
        boxes: [n, 4] finite xyxy in pixels of the images. The mask of a box that contains no pixel centre of the image
            is empty.
        sizes: [n, 2] int64, (height, width) of the image of each mask.

    Returns:
        n masks with the sizes of their images.
    """
    reach = boxes[:, ::2].clip(0, sizes[:, 1:])
    totals = np.cumsum(np.ceil(reach[:, 1] - reach[:, 0]))
    bounds = [0, *(np.flatnonzero(np.diff(totals // _COLUMNS_AT_ONCE)) + 1).tolist(), len(boxes)]
    counts: list[bytes] = []
    for piece in map(slice, bounds[:-1], bounds[1:]):
        counts += _paste(probabilities[piece], boxes[piece], sizes[piece])
    return Masks.of(counts, sizes)


def _paste(probabilities: NDArray[np.float32], boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[bytes]:
    """Compressed run lengths of a chunk of masks."""
    owners, columns, values = _columns(probabilities, boxes, sizes[:, 1])
    owners, changes = _changes(owners, columns, values, boxes, sizes[:, 0], num_cells=probabilities.shape[1])
    # The last run ends at the end of the image, whether or not the mask reaches it.
    totals = sizes.prod(axis=1)
    inside = changes < totals[owners]
    owners, changes = owners[inside], changes[inside]
    counts = np.bincount(owners, minlength=len(boxes))
    starts = np.cumsum(counts + 1) - (counts + 1)
    ends = np.insert(changes, np.cumsum(counts), totals)
    runs = np.diff(ends, prepend=0)
    runs[starts] = ends[starts]
    return rle.compress_all(runs, counts + 1)


def _columns(
    probabilities: NDArray[np.float32], boxes: NDArray[np.float64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Sample each mask at the pixel columns whose centres are inside its box.

    Returns:
        owners: [K] int64 ascending, index of the mask of each column.
        columns: [K] int64 ascending within a mask, index of the column in the image.
        values: [K, S + 2] float32, mask along the column: at the centres of the S cells, and 0 one cell before and
            after.
    """
    num_cells = probabilities.shape[2]
    sides = boxes[:, 2:] - boxes[:, :2]
    first = np.ceil(boxes[:, 0] - 0.5).clip(0).astype(np.int64)
    last = np.minimum(np.floor(boxes[:, 2] - 0.5).astype(np.int64), widths - 1)
    counts = np.where((sides > 0).all(axis=1), last - first + 1, 0).clip(0)
    owners = np.repeat(np.arange(len(boxes)), counts)
    columns = first[owners] + np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Position of the column among the cell centres; 0 is the centre of the padding cell before the grid.
    positions = (columns + 0.5 - boxes[owners, 0]) * (num_cells / sides[owners, 0]) + 0.5
    left = np.floor(positions).astype(np.int64).clip(0, num_cells)
    share = (positions - left).astype(np.float32)[:, None]
    padded = np.pad(probabilities, ((0, 0), (1, 1), (1, 1))).swapaxes(1, 2).copy()
    before, after = padded[owners, left], padded[owners, left + 1]
    return owners, columns, before + share * (after - before)


def _changes(
    owners: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    boxes: NDArray[np.float64],
    heights: NDArray[np.int64],
    *,
    num_cells: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute where masks begin and end along their columns.

    Args:
        owners: [K] int64, from `_columns`.
        columns: [K] int64, from `_columns`.
        values: [K, S + 2] float32, from `_columns`.
        boxes: [n, 4] xyxy.
        heights: [n] int64, heights of the images.
        num_cells: S.

    Returns:
        owners: [R] int64 ascending, index of the mask of each change.
        changes: [R] int64 ascending within a mask, pixel indices in COCO's order (column by column, from top to bottom)
            at which the mask changes, alternately from off to on and from on to off.
    """
    on = values >= THRESHOLD
    rows, cells = np.nonzero(on[:, 1:] != on[:, :-1])
    owners, columns = owners[rows], columns[rows]
    above, below = values[rows, cells].astype(np.float64), values[rows, cells + 1].astype(np.float64)
    begins = above < below
    cell = (boxes[owners, 3] - boxes[owners, 1]) / num_cells
    crossing = boxes[owners, 1] + (cells + (THRESHOLD - above) / (below - above) - 0.5) * cell - 0.5
    pixels = np.where(begins, np.ceil(crossing), np.floor(crossing) + 1).astype(np.int64)
    changes = columns * heights[owners] + pixels.clip(0, heights[owners])
    # Two changes at the same pixel cancel: the mask is on only between two pixel centres, or it reaches the end of one
    # column and continues at the start of the next.
    new = np.flatnonzero(np.diff(changes, prepend=-1).astype(bool) | np.diff(owners, prepend=-1).astype(bool))
    odd = new[np.diff(new, append=len(changes)) % 2 == 1]
    return owners[odd], changes[odd]
