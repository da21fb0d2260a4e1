"""Every picture has a canvas, and the canvases are the few that were promised."""

from __future__ import annotations

import numpy as np
import pytest

from boxwright.data.buckets import Resize, assign_buckets, buckets_for


def test_the_standard_scale_gives_the_standard_canvases() -> None:
    landscape = [(800, 1088), (800, 1216), (800, 1344)]
    assert set(buckets_for(Resize(800, 1333))) == {*landscape, *((w, h) for h, w in landscape)}


@pytest.mark.parametrize(
    "resize", [Resize(800, 1333), Resize(240, 400), Resize(100, 100), Resize(64, 65), Resize(600, 1000)]
)
def test_any_picture_fits_into_its_bucket_and_any_smaller_bucket_is_too_small(resize: Resize) -> None:
    rng = np.random.default_rng(0)
    originals = np.concatenate(
        [rng.integers(1, 5000, (2000, 2)), [[1, 5000], [5000, 1], [1, 1], [480, 640], [640, 480]]]
    )
    sizes = resize.sizes(originals)
    canvases = buckets_for(resize)
    chosen = assign_buckets(sizes, canvases)
    assert all(side % 32 == 0 for canvas in canvases for side in canvas)
    for size, index in zip(sizes, chosen, strict=True):
        assert (size <= canvases[index]).all()
        assert not any((size <= canvas).all() for canvas in canvases[:index])


def test_size_is_rounded_as_in_2018() -> None:
    assert Resize(800, 1333).size(480, 640) == (800, 1067)
    assert Resize(800, 1333).size(427, 640) == (800, 1199)
    assert Resize(800, 1333).size(300, 1000) == (400, 1333)
    assert Resize(800, 1333).size(2, 4000) == (1, 1333)


def test_square_pictures_get_a_square_canvas_where_they_are_common() -> None:
    squares, wides = np.full((30, 2), 256), np.tile([480, 640], (70, 1))
    assert (800, 800) in buckets_for(Resize(), np.concatenate([squares, wides]))
    assert (800, 800) not in buckets_for(Resize(), np.concatenate([squares[:10], wides]))


def test_a_resize_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="short <= long"):
        Resize(800, 600)
