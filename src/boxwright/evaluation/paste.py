"""Masks on the grids of their boxes, brought to the pixels of the pictures.

n masks, S x S cells on a box; a picture has H x W pixels.

A mask is sampled bilinearly at the centres of the pixels, a cell's value lying at the cell's centre and nothing
beyond the grid, and a pixel belongs to the object from 0.5 on (Mask R-CNN, arXiv 1703.06870, section 3.1; Detectron2's
`paste_masks_in_image`). Along a column of pixels such a mask is linear between the centres of two cells, so it crosses
0.5 at most once there, at a place that a division gives. Those places are COCO's runs: no pixel is ever computed, and
the time hangs on the number of columns, not of pixels. Masks have few numbers before they are pasted, so this runs on
the CPU whatever the detector runs on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boxwright.data.masks import Masks, rle

THRESHOLD = 0.5
_COLUMNS_AT_ONCE = 2**16
"""Masks are pasted in pieces of about this many columns of pixels, some 30 MB, however many masks and how wide."""


def paste_masks(probabilities: NDArray[np.float32], boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> Masks:
    """Paste masks into their pictures.

    Args:
        probabilities: [n, S, S] float32 in 0..1, rows first.
        boxes: [n, 4] finite xyxy in pixels of the pictures; where nothing of a box lies in the picture, or it holds no
            centre of a pixel, its mask is empty.
        sizes: [n, 2] int64, (height, width) of each mask's picture.

    Returns:
        n masks of those sizes.
    """
    reach = boxes[:, ::2].clip(0, sizes[:, 1:])
    totals = np.cumsum(np.ceil(reach[:, 1] - reach[:, 0]))
    bounds = [0, *(np.flatnonzero(np.diff(totals // _COLUMNS_AT_ONCE)) + 1).tolist(), len(boxes)]
    counts: list[bytes] = []
    for piece in map(slice, bounds[:-1], bounds[1:]):
        counts += _paste(probabilities[piece], boxes[piece], sizes[piece])
    return Masks.of(counts, sizes)


def _paste(probabilities: NDArray[np.float32], boxes: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[bytes]:
    """The compressed runs of masks, all at once."""
    owners, columns, values = _columns(probabilities, boxes, sizes[:, 1])
    owners, changes = _changes(owners, columns, values, boxes, sizes[:, 0], num_cells=probabilities.shape[1])
    # The last run ends with the picture, whether the mask reaches there or not.
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
    """Every mask at every column of pixels whose centres lie in its box.

    Returns:
        owners: [K] int64 rising, the mask of each column.
        columns: [K] int64 rising within a mask, which column of the picture it is.
        values: [K, S + 2] float32, the mask along it: at the centres of the S cells, and 0 a cell before and behind.
    """
    num_cells = probabilities.shape[2]
    sides = boxes[:, 2:] - boxes[:, :2]
    first = np.ceil(boxes[:, 0] - 0.5).clip(0).astype(np.int64)
    last = np.minimum(np.floor(boxes[:, 2] - 0.5).astype(np.int64), widths - 1)
    counts = np.where((sides > 0).all(axis=1), last - first + 1, 0).clip(0)
    owners = np.repeat(np.arange(len(boxes)), counts)
    columns = first[owners] + np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Where the column lies among the centres of the cells, counted from the one before the grid.
    places = (columns + 0.5 - boxes[owners, 0]) * (num_cells / sides[owners, 0]) + 0.5
    left = np.floor(places).astype(np.int64).clip(0, num_cells)
    share = (places - left).astype(np.float32)[:, None]
    padded = np.pad(probabilities, ((0, 0), (1, 1), (1, 1))).swapaxes(1, 2).copy()
    before, behind = padded[owners, left], padded[owners, left + 1]
    return owners, columns, before + share * (behind - before)


def _changes(
    owners: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    boxes: NDArray[np.float64],
    heights: NDArray[np.int64],
    *,
    num_cells: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the masks begin and end along their columns.

    Args:
        owners: [K] int64, as `_columns` gives it.
        columns: [K] int64, likewise.
        values: [K, S + 2] float32, likewise.
        boxes: [n, 4] xyxy.
        heights: [n] int64, of the pictures.
        num_cells: S.

    Returns:
        owners: [R] int64 rising, the mask of each change.
        changes: [R] int64 rising within a mask, the first pixel (in COCO's order: down the columns, then along the
            rows) that is on after one that is off, then the next that is off, and so on.
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
    # Changes at one pixel undo each other in pairs: what lies between two pixels' centres, or a mask that reaches the
    # end of one column and begins the next.
    new = np.flatnonzero(np.diff(changes, prepend=-1).astype(bool) | np.diff(owners, prepend=-1).astype(bool))
    odd = new[np.diff(new, append=len(changes)) % 2 == 1]
    return owners[odd], changes[odd]
