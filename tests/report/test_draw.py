"""Boxes and masks are drawn at the right position and in the right colour, at any image size."""

from __future__ import annotations

import cv2
import numpy as np

from boxwright.data.masks import Masks, rle
from boxwright.report.draw import class_colour, draw_boxes, draw_detections


def test_a_box_is_drawn_in_its_colour_on_a_copy_of_the_image() -> None:
    image = np.full((600, 800, 3), 200, dtype=np.uint8)
    drawn = draw_boxes(image, np.array([[100, 200, 300, 400]]), [""], [(250, 20, 30)])
    assert drawn.shape == image.shape
    assert (image == 200).all()
    assert drawn[300, 100].tolist() == [250, 20, 30]
    assert drawn[300, 200].tolist() == [200, 200, 200]


def test_small_images_are_enlarged() -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    boxes = np.array([[1, 1, 9, 9], [3, 3, 29, 19]])
    drawn = draw_detections(image, boxes, np.array([0, 1]), ["é", "two"], np.array([0.9, 0.1]))
    assert drawn.shape == (320, 480, 3)
    assert draw_boxes(image, np.zeros((0, 4)), [], []).shape == (320, 480, 3)


def test_class_colours_are_distinct_and_dark_enough_for_white_text() -> None:
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert class_colour(3) == colours[3]
    for red, green, blue in colours:  # WCAG contrast ratio of white text
        luminance = 0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2
        assert 1.05 / (luminance + 0.05) > 3.5


def test_labels_and_lines_do_not_cover_a_long_narrow_image() -> None:
    image = np.full((40, 1500, 3), 128, np.uint8)
    drawn = draw_boxes(image, np.array([[100, 5, 700, 35]]), [""], [(255, 0, 0)])
    assert drawn.shape == image.shape
    assert 0 < (drawn[:, 400] != 128).any(axis=1).sum() <= 6
    labelled = draw_boxes(image, np.array([[100, 5, 700, 35]]), ["cell 0.90"], [(255, 0, 0)])
    assert (labelled != drawn).any(axis=2).sum() < 0.1 * 40 * 1500


def as_masks(pixels: np.ndarray) -> Masks:
    """Convert [n, H, W] bool to `Masks`."""
    counts = []
    for mask in pixels:
        columns = mask.T.ravel()
        changes = np.flatnonzero(np.diff(columns, prepend=False))
        counts.append(rle.compress(np.diff(np.concatenate([[0], changes, [columns.size]]))))
    return Masks.of(counts, pixels.shape[1:])


def test_a_mask_is_transparent_and_changes_no_other_pixels() -> None:
    image = np.full((600, 800, 3), 200, dtype=np.uint8)
    image[:, 400:] = 100
    mask = np.zeros((1, 600, 800), bool)
    mask[0, 200:400, 300:500] = True
    mask[0, 280:320, 380:420] = False  # a hole
    boxes = np.array([[300, 200, 500, 400]])
    drawn = draw_boxes(image, boxes, [""], [(250, 20, 30)], masks=as_masks(mask))
    assert drawn[250, 350].tolist() == [220, 128, 132]
    assert drawn[250, 450].tolist() == [160, 68, 72]
    np.testing.assert_array_equal(drawn[300, [395, 405]], image[300, [395, 405]])
    outside = np.ones((600, 800), bool)
    outside[196:404, 296:504] = False
    np.testing.assert_array_equal(drawn[outside], image[outside])
    assert (drawn[300, 299:302] != 200).any()
    assert (image[300, 300] == 200).all()


def test_small_masks_are_drawn_on_top_of_large_ones() -> None:
    image = np.full((500, 500, 3), 100, np.uint8)
    masks = np.zeros((2, 500, 500), bool)
    masks[0, 100:400, 100:400] = masks[1, 200:300, 200:300] = True
    boxes = np.array([[100, 100, 400, 400], [200, 200, 300, 300]])
    drawn = draw_boxes(image, boxes, ["", ""], [(200, 0, 0), (0, 200, 0)], masks=as_masks(masks))
    assert drawn[150, 250].tolist() == [140, 60, 60]
    assert drawn[250, 250].tolist() == [84, 116, 36]


def test_masks_have_the_right_position_on_resized_images() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((90, 120, 3), np.uint8)
    masks = np.zeros((12, 90, 120), bool)
    for mask, (x, y) in zip(masks, rng.integers(0, 80, (12, 2)), strict=True):
        mask[y : y + 15, x : x + 30] = True
    masks[0] = False
    boxes = np.tile(np.array([[0.0, 0, 120, 90]]), (12, 1))
    for scale in (0.37, 1.0, 3.3):
        for index in range(12):
            mask = as_masks(masks[index : index + 1])
            drawn = draw_boxes(image, boxes[:1] + 500, [""], [(200, 200, 200)], masks=mask, scale=scale)
            actual = (drawn > 0).any(axis=2)
            expected = cv2.resize(masks[index].astype(np.uint8), actual.shape[::-1], interpolation=cv2.INTER_NEAREST)
            tolerance = np.ones((5, 5))
            assert not (actual & (cv2.dilate(expected, tolerance) == 0)).any()
            assert not (~actual & (cv2.erode(expected, tolerance) > 0)).any()


def test_with_many_objects_only_the_masks_are_drawn() -> None:
    image = np.zeros((500, 500, 3), np.uint8)
    corners = np.stack(np.meshgrid(np.arange(10) * 50, np.arange(10) * 50), axis=-1).reshape(-1, 2)
    boxes = np.concatenate([corners + 5, corners + 45], axis=1)
    masks = np.zeros((100, 500, 500), bool)
    for mask, (x, y) in zip(masks, corners, strict=True):
        mask[y + 15 : y + 35, x + 15 : x + 35] = True
    labels, names, scores = np.zeros(100, int), ["cell"] * 100, np.ones(100)
    drawn = draw_detections(image, boxes, labels, names, scores, masks=as_masks(masks))
    actual, expected = (drawn > 0).any(axis=2), masks.any(axis=0)
    assert actual[expected].all()
    assert not actual[cv2.dilate(expected.astype(np.uint8), np.ones((5, 5))) == 0].any()
    few = draw_detections(image, boxes[:20], labels[:20], names[:20], scores[:20], masks=as_masks(masks[:20]))
    assert (few[25, 5] > 0).any()


def test_labels_of_many_small_objects_are_omitted() -> None:
    image = np.zeros((500, 500, 3), np.uint8)
    corners = np.stack(np.meshgrid(np.arange(4) * 120, np.arange(4) * 120), axis=-1).reshape(-1, 2)
    white = [(255, 255, 255)] * 16

    def label_pixels(size: int, count: int) -> int:
        """Number of pixels covered by labels, for `count` boxes of `size` x `size`."""
        boxes = np.concatenate([corners, corners + size], axis=1)[:count] + 15
        plain = draw_boxes(image, boxes, [""] * count, white[:count])
        return int((draw_boxes(image, boxes, ["cell 0.90"] * count, white[:count]) != plain).any(axis=2).sum())

    assert label_pixels(25, 16) == 0
    assert label_pixels(25, 3) > 1000, "the labels of few objects should be drawn"
    assert label_pixels(100, 16) > 10_000, "the labels of large objects should be drawn"
