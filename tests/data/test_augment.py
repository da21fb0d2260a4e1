"""Pixels and boxes go through the same map, and nothing outgrows the canvas."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
import torch

from boxwright.data.augment import Augment, Photometric, Placement, place, place_boxes, place_image, seeded
from boxwright.data.buckets import Resize


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture whose red and green tell x and y."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def placed_image(image: np.ndarray, placement: Placement) -> np.ndarray:
    """The visible pixels, from a canvas beyond which nothing may be written."""
    height, width = placement.size
    canvas = np.full((height + 3, width + 5, 3), 77, np.uint8)
    place_image(image, placement, canvas)
    assert (canvas[height:] == 77).all()
    assert (canvas[:, width:] == 77).all()
    return canvas[:height, :width]


def test_a_plain_resize_is_opencvs() -> None:
    image = rng().integers(0, 256, (48, 64, 3), dtype=np.uint8)
    placement = Augment().draw((48, 64), Resize(80, 133), rng())
    assert placement.size == (80, 107)
    expected = cv2.resize(image, (107, 80), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(placed_image(image, placement), expected)


def test_boxes_scale_by_new_over_old_on_each_axis() -> None:
    placement = Augment().draw((48, 64), Resize(80, 133), rng())
    boxes, kept = place_boxes(np.array([[8, 6, 32, 24]], np.float32), placement)
    np.testing.assert_allclose(boxes, [[8 * 107 / 64, 10, 32 * 107 / 64, 40]], rtol=1e-6)
    assert kept.all()


def test_flip_mirrors_pixels_and_boxes() -> None:
    image = picture(40, 60)
    plain, flipped = place((40, 60), (80, 120)), place((40, 60), (80, 120), flipped=True)
    np.testing.assert_array_equal(placed_image(image, flipped), placed_image(image, plain)[:, ::-1])
    boxes, _ = place_boxes(np.array([[0, 0, 10, 20]], np.float32), flipped)
    np.testing.assert_allclose(boxes, [[100, 0, 120, 40]])


@pytest.mark.parametrize("window", [None, (5, 11, 30, 40)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.6])
def test_pixels_go_where_the_matrix_says(flipped: bool, scale: float, window: tuple[int, int, int, int] | None) -> None:
    image = cv2.GaussianBlur(rng().integers(0, 256, (60, 90, 3), dtype=np.uint8), (0, 0), 3)
    resized = (round(60 * scale), round(90 * scale))
    placement = place((60, 90), resized, flipped=flipped, window=window)
    # OpenCV's warp counts from the middle of the first pixel, half a pixel away from the origin of the matrix.
    matrix = placement.matrix.astype(np.float64)
    matrix[:, 2] += matrix[:, :2].sum(1) * 0.5 - 0.5
    size = placement.size[::-1]
    warped = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    # It rounds to 1/32 pixels; half a pixel of misplacement would show as an error of several times this.
    assert np.abs(placed_image(image, placement).astype(int) - warped).max() <= 2


def test_the_whole_chain_keeps_an_object_inside_its_box() -> None:
    augment = Augment(flip=0.5, scale_jitter=(0.6, 1.7), crop=0.6)
    resize = Resize(100, 160)
    flips = cropped = 0
    for seed in range(200):
        image = np.zeros((50, 70, 3), np.uint8)
        image[20:35, 30:50] = 255
        placement = augment.draw((50, 70), resize, rng(seed))
        flips, cropped = flips + placement.flipped, cropped + placement.cropped
        assert placement.size[0] <= 100
        assert placement.size[1] <= 140
        seen = placed_image(image, placement)
        assert seen.shape[:2] == placement.size
        boxes, kept = place_boxes(np.array([[30, 20, 50, 35]], np.float32), placement)
        ys, xs = np.nonzero(seen[..., 0] > 127)
        if kept[0]:
            found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(boxes[0], found, atol=1.01)
    assert 60 < flips < 140
    assert cropped > 100


def test_objects_that_a_crop_leaves_little_of_are_dropped() -> None:
    placement = place((100, 100), (100, 100), window=(0, 50, 100, 50))
    boxes, kept = place_boxes(
        np.array([[0, 0, 50, 50], [0, 0, 53, 50], [40, 0, 60, 50], [60, 10, 70, 20]], np.float32), placement
    )
    np.testing.assert_array_equal(kept, [False, False, True, True])
    np.testing.assert_array_equal(boxes[2:], [[0, 0, 10, 50], [10, 10, 20, 20]])


def test_without_a_crop_tiny_and_sticking_out_objects_stay() -> None:
    boxes, kept = place_boxes(np.array([[0, 0, 0.1, 0.1], [-900, 0, 5, 10]], np.float32), place((10, 10), (20, 20)))
    assert kept.all()
    np.testing.assert_array_equal(boxes[1], [0, 0, 10, 20])


def test_no_boxes() -> None:
    boxes, kept = place_boxes(np.zeros((0, 4), np.float32), place((10, 10), (20, 20)))
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)


def test_switching_a_change_on_moves_no_other() -> None:
    def flips(augment: Augment) -> list[bool]:
        return [augment.draw((40, 60), Resize(80, 133), rng(seed)).flipped for seed in range(50)]

    assert flips(Augment(flip=0.5)) == flips(Augment(flip=0.5, scale_jitter=(0.5, 2), crop=0.5))


def test_photometric_changes_colour_within_its_strength_and_repeats() -> None:
    image = np.full((20, 30, 3), (200, 120, 40), np.uint8)
    original = image.copy()
    change = Photometric(brightness=0.3, contrast=0.3, saturation=0.5)
    np.testing.assert_array_equal(change(image, rng(3)), change(image, rng(3)))
    assert (change(image, rng(3)) != change(image, rng(4))).any()
    np.testing.assert_array_equal(image, original)
    np.testing.assert_array_equal(Photometric(0, 0, 0)(image, rng()), image)
    # A constant picture is its own mean: contrast leaves it, brightness scales it.
    brighter = Photometric(0.3, 1, 0)(np.full((4, 4, 3), 100, np.uint8), rng(1))
    factor = 1 + 0.3 * rng(1).uniform(-1, 1, 3)[0]
    np.testing.assert_allclose(brighter, 100 * factor, atol=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "flip=1.5"),
        ({"scale_jitter": (0, 1)}, "scale_jitter"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter"),
        ({"crop": 0.0}, "crop=0.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


def test_an_impossible_photometric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"brightness=2: expected a number in 0..1"):
        Photometric(brightness=2)


def test_seeded_repeats_and_leaves_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    untouched = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    with seeded(1 << 62):
        inside = draw()
    assert draw() == untouched
    with seeded(1 << 62):
        assert draw() == inside
    assert inside != untouched


def test_placement_is_small_enough_to_reason_about() -> None:
    placement = place((10, 20), (30, 40), flipped=True, window=(1, 2, 20, 30))
    assert isinstance(placement, Placement)
    np.testing.assert_array_equal(placement.matrix, np.array([[-2, 0, 38], [0, 3, -1]], np.float32))
