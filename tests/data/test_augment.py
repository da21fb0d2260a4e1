"""Augmentations stay on the canvas, are repeatable, and move pixels and boxes alike."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from boxwright.data.augment import Augment, Photometric, seeded
from boxwright.data.buckets import Resize
from boxwright.data.placement import Placement, place_boxes, place_image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def placed_image(image: np.ndarray, placement: Placement) -> np.ndarray:
    """Visible pixels of a placed image; checks that no pixel outside the visible part is written."""
    height, width = placement.size
    canvas = np.full((height + 3, width + 5, 3), 77, np.uint8)
    place_image(image, placement, canvas)
    assert (canvas[height:] == 77).all()
    assert (canvas[:, width:] == 77).all()
    return canvas[:height, :width]


def test_objects_stay_inside_their_boxes_under_flip_jitter_and_crop() -> None:
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
        visible = placed_image(image, placement)
        assert visible.shape[:2] == placement.size
        boxes, keep = place_boxes(np.array([[30, 20, 50, 35]], np.float32), placement)
        ys, xs = np.nonzero(visible[..., 0] > 127)
        if keep[0]:
            expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(boxes[0], expected, atol=1.01)
    assert 60 < flips < 140
    assert cropped > 100


def test_enabling_one_augmentation_does_not_change_the_others() -> None:
    def flips(augment: Augment) -> list[bool]:
        return [augment.draw((40, 60), Resize(80, 133), rng(seed)).flipped for seed in range(50)]

    assert flips(Augment(flip=0.5)) == flips(Augment(flip=0.5, scale_jitter=(0.5, 2), crop=0.5))


def test_photometric_is_repeatable_and_within_its_strength() -> None:
    image = np.full((20, 30, 3), (200, 120, 40), np.uint8)
    original = image.copy()
    change = Photometric(brightness=0.3, contrast=0.3, saturation=0.5)
    np.testing.assert_array_equal(change(image, rng(3)), change(image, rng(3)))
    assert (change(image, rng(3)) != change(image, rng(4))).any()
    np.testing.assert_array_equal(image, original)
    np.testing.assert_array_equal(Photometric(0, 0, 0)(image, rng()), image)
    # A constant image equals its mean, so contrast does not change it and brightness scales it.
    brighter = Photometric(0.3, 1, 0)(np.full((4, 4, 3), 100, np.uint8), rng(1))
    factor = 1 + 0.3 * rng(1).uniform(-1, 1, 3)[0]
    np.testing.assert_allclose(brighter, 100 * factor, atol=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, r"flip\S*: expected a number in 0\.\.1"),
        ({"scale_jitter": (0, 1)}, "scale_jitter"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter"),
        ({"crop": 0.0}, "crop: expected .* got 0.0"),
    ],
)
def test_augment_settings_out_of_range_are_an_error(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


def test_photometric_settings_out_of_range_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"brightness\S*: expected a number in 0\.\.1"):
        Photometric(brightness=2)


def test_seeded_is_repeatable_and_restores_the_generators() -> None:
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
