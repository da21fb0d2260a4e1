"""Compressed run lengths equal the output of the COCO API."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from boxwright.data.masks import rle


@pytest.mark.parametrize("seed", range(20))
def test_compression_equals_the_coco_api(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 200, 2)
    mask = rng.random((height, width)) < rng.random() ** 3
    columns = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], columns])))
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert rle.compress(runs) == expected
    np.testing.assert_array_equal(rle.decompress(expected), runs)


def test_many_masks_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(0, 9)) for _ in range(40)]
    lengths = [len(runs) for runs in masks]
    assert 0 in lengths
    written = rle.compress_all(np.concatenate(masks), lengths)
    assert written == [rle.compress(runs) for runs in masks]
    runs, decompressed_lengths = rle.decompress_all(written)
    assert decompressed_lengths.tolist() == lengths
    np.testing.assert_array_equal(runs, np.concatenate(masks))
    assert rle.compress_all([], []) == []
    assert [len(part) for part in rle.decompress_all([])] == [0, 0]
    with pytest.raises(ValueError, match="invalid COCO compressed RLE"):
        rle.decompress_all([b"1", b"X", b"1"])


@pytest.mark.parametrize("characters", [b"X", b"0 1", "0ä".encode(), b"ooooooooooo0"])
def test_invalid_characters_are_an_error(characters: bytes) -> None:
    with pytest.raises(ValueError, match="invalid COCO compressed RLE"):
        rle.decompress(characters)


def test_a_mask_without_runs() -> None:
    assert rle.compress([]) == b""
    assert len(rle.decompress(b"")) == 0
