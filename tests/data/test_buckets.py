"""Every image fits a canvas, and there are only a few canvases."""

from __future__ import annotations

import numpy as np
import pytest

from boxwright.data.buckets import Resize, Scale, ScaleMode, assign_buckets, buckets_for, plan_buckets, plan_scales


def test_canvases_of_the_default_size() -> None:
    landscape = [(800, 1088), (800, 1216), (800, 1344)]
    assert set(buckets_for(Resize(800, 1333))) == {*landscape, *((w, h) for h, w in landscape)}


@pytest.mark.parametrize(
    "resize", [Resize(800, 1333), Resize(240, 400), Resize(100, 100), Resize(64, 65), Resize(600, 1000)]
)
def test_every_image_gets_the_smallest_canvas_that_fits(resize: Resize) -> None:
    rng = np.random.default_rng(0)
    originals = np.concatenate(
        [rng.integers(1, 5000, (2000, 2)), [[1, 5000], [5000, 1], [1, 1], [480, 640], [640, 480]]]
    )
    sizes = resize.sizes(originals)
    canvases = buckets_for(resize)
    buckets = assign_buckets(sizes, canvases)
    assert all(side % 32 == 0 for canvas in canvases for side in canvas)
    for size, index in zip(sizes, buckets, strict=True):
        assert (size <= canvases[index]).all()
        assert not any((size <= canvas).all() for canvas in canvases[:index])


def test_sizes_are_rounded_as_in_mmdetection_0_5() -> None:
    assert Resize(800, 1333).size(480, 640) == (800, 1067)
    assert Resize(800, 1333).size(427, 640) == (800, 1199)
    assert Resize(800, 1333).size(300, 1000) == (400, 1333)
    assert Resize(800, 1333).size(2, 4000) == (1, 1333)


def test_a_quarter_of_square_images_adds_a_square_canvas() -> None:
    squares, wides = np.full((30, 2), 256), np.tile([480, 640], (70, 1))
    assert (800, 800) in buckets_for(Resize(), np.concatenate([squares, wides]))
    assert (800, 800) not in buckets_for(Resize(), np.concatenate([squares[:10], wides]))


def test_a_short_side_above_the_long_side_is_an_error() -> None:
    with pytest.raises(ValueError, match="short <= long"):
        Resize(800, 600)


def test_a_list_of_sizes_gives_one_scale_per_size() -> None:
    scales = plan_scales(((640, 1333), (800, 1333)), "list")
    assert scales == [Scale(Resize(640, 1333), Resize(640, 1333)), Scale(Resize(800, 1333), Resize(800, 1333))]
    assert scales[0].draw(2**63 - 1) == Resize(640, 1333)


@pytest.mark.parametrize("ends", [((640, 1333), (800, 1333)), ((600, 1000), (801, 1400)), ((10, 20), (11, 20))])
def test_a_range_is_split_into_scales_that_cover_all_sizes(ends: tuple[tuple[int, int], tuple[int, int]]) -> None:
    scales = plan_scales(ends, "range")
    shorts = [short for scale in scales for short in range(scale.low.short, scale.high.short + 1)]
    assert shorts == list(range(ends[0][0], ends[1][0] + 1))
    assert all(scale.high.short % 64 == 0 for scale in scales[:-1])
    assert (scales[0].low.long, scales[-1].high.long) == (ends[0][1], ends[1][1])
    for scale in scales:
        count = scale.high.short - scale.low.short + 1
        drawn = [scale.draw((2**63 * k + 2**62) // count) for k in range(count)]
        assert [size.short for size in drawn] == list(range(scale.low.short, scale.high.short + 1))
        assert all(scale.low.long <= size.long <= scale.high.long for size in drawn)
        assert (scale.draw(0), scale.draw(2**63 - 1)) == (scale.low, scale.high)


def test_a_range_has_few_canvases() -> None:
    sizes = np.array([[480, 640], [640, 480], [427, 640], [640, 427], [360, 640], [640, 360]])
    _, canvases = plan_buckets(plan_scales(((640, 1333), (800, 1333)), "range"), sizes)
    assert len({canvas for bucket in canvases for canvas in bucket}) == 18


@pytest.mark.parametrize(
    ("sizes", "mode", "message"),
    [
        ((), "list", "at least one"),
        (((800, 640),), "list", "1 <= short <= long"),
        (((640, 1333),), "range", "two ascending sizes for a range"),
        (((800, 1333), (640, 1333)), "range", "two ascending sizes for a range"),
        (((640, 1333), (800, 1000)), "range", "two ascending sizes for a range"),
    ],
)
def test_invalid_scales_are_an_error(sizes: tuple[tuple[int, int], ...], mode: ScaleMode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_scales(sizes, mode)
