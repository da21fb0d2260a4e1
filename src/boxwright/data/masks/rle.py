"""COCO run-length encoding (RLE) of masks.

The pixels of a mask, column by column, form runs that are alternately off and on; the first run is off. In the
compressed form, the first three runs are written as they are, and each further run as its difference to the run two
positions before. A value is split into groups of 5 bits, lowest bits first; a sixth bit marks that another group
follows. Each group plus 48 is a printable character. Source: `rleToString` and `rleFrString` of the COCO API
(common/maskApi.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MAX_GROUPS = 8  # 40 bits, more than the number of pixels of any image


def compress(runs: ArrayLike) -> bytes:
    """Compress the runs of one mask to COCO's characters."""
    return compress_all(runs, [np.size(runs)])[0]


def compress_all(runs: ArrayLike, lengths: ArrayLike) -> list[bytes]:
    """Compress the runs of many masks to COCO's characters.

    Args:
        runs: [R] runs of all masks, concatenated.
        lengths: [n] number of runs of each mask.
    """
    values = np.array(runs, np.int64)
    counts = np.asarray(lengths, np.int64)
    ends = np.cumsum(counts)
    later = np.flatnonzero(np.arange(len(values)) - np.repeat(ends - counts, counts) >= 3)
    values[later] -= values[later - 2]  # NumPy computes the right side before it writes
    characters = np.zeros((len(values), _MAX_GROUPS), np.uint8)
    pending = np.ones(len(values), bool)
    for group in range(_MAX_GROUPS):
        bits = values & 0x1F
        values >>= 5
        # The highest bit of the last group is the sign.
        more = pending & (values != np.where(bits & 0x10, -1, 0))
        characters[:, group] = np.where(pending, bits + 48 + np.where(more, 0x20, 0), 0)
        pending = more
        if not pending.any():
            break
    assert not pending.any()
    written = characters > 0
    text = characters[written].tobytes()
    cuts = np.concatenate([[0], np.cumsum(written.sum(axis=1))])[np.concatenate([[0], ends])].tolist()
    return [text[start:end] for start, end in pairwise(cuts)]


def decompress(characters: bytes) -> NDArray[np.int64]:
    """Decompress the runs of one mask from COCO's characters.

    Raises:
        ValueError: The characters are not a compressed mask.
    """
    return decompress_all([characters])[0]


def decompress_all(masks: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decompress the runs of many masks from COCO's characters.

    Returns:
        runs: [R] runs of all masks, concatenated.
        lengths: [n] number of runs of each mask.

    Raises:
        ValueError: The characters of a mask are not a compressed mask.
    """
    codes = np.frombuffer(b"".join(masks), np.uint8).astype(np.int64) - 48
    ends = np.cumsum([len(mask) for mask in masks], dtype=np.int64)
    if not len(codes):
        return codes, ends
    last = (codes & 0x20) == 0
    if codes.min() < 0 or codes.max() > 0x3F or not last[ends[ends > 0] - 1].all():
        raise ValueError("invalid COCO compressed RLE")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    groups = np.diff(starts, append=len(codes))
    if groups.max() > _MAX_GROUPS:
        raise ValueError("invalid COCO compressed RLE: a run is too long")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, groups))
    values = np.add.reduceat((codes & 0x1F) << shifts, starts)
    negative = (codes[starts + groups - 1] & 0x10) != 0
    values -= np.where(negative, np.int64(1) << (5 * groups), 0)
    lengths = np.diff(np.searchsorted(starts, ends), prepend=0)
    positions = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # From the fourth run on, values are differences to the run two before. Cumulative sums over every second run of
    # each mask restore the runs.
    for first in (1, 2):
        every_second = np.flatnonzero((positions >= first) & (positions % 2 == first % 2))
        begins = np.flatnonzero(positions[every_second] == first)
        sums = np.cumsum(values[every_second])
        before = np.repeat(np.concatenate([[0], sums])[begins], np.diff(begins, append=len(every_second)))
        values[every_second] = sums - before
    return values, lengths


def crop_columns(characters: bytes, image_size: tuple[int, int]) -> tuple[NDArray[np.uint8], int, int]:
    """Decode the columns of an image that a mask covers.

    Args:
        characters: The mask in the compressed form.
        image_size: (height, width) of the image.

    Returns:
        uint8 [height, columns], 0 or 1; the index of the first column; and the index of the first row, which is 0.

    Raises:
        ValueError: The characters are not a compressed mask, or the mask does not have the size of the image.
    """
    height, width = image_size
    runs = decompress(characters)
    if runs.sum() != height * width:
        raise ValueError(
            f"RLE mask: expected runs of {height} x {width} = {height * width} pixels in total (the image size), got "
            f"{runs.sum()}"
        )
    filled = 2 * np.flatnonzero(runs[1::2]) + 1
    if not len(filled):
        return np.zeros((height, 0), np.uint8), 0, 0
    ends = runs.cumsum()
    start, end = int(ends[filled[0] - 1]), int(ends[filled[-1]])
    left, right = start // height, -(-end // height)
    pixels = np.zeros((right - left) * height, np.uint8)
    inner = slice(filled[0], filled[-1] + 1)
    pixels[start - left * height : end - left * height] = np.repeat((np.arange(len(runs)) & 1)[inner], runs[inner])
    return pixels.reshape(-1, height).T, left, 0
