"""Boxes are drawn where they belong, in their colour, at any size."""

from __future__ import annotations

import numpy as np

from boxwright.report.draw import class_colour, draw_boxes, draw_detections


def test_a_box_is_drawn_in_its_colour_on_a_copy() -> None:
    image = np.full((600, 800, 3), 200, dtype=np.uint8)
    drawn = draw_boxes(image, np.array([[100, 200, 300, 400]]), [""], [(250, 20, 30)])
    assert drawn.shape == image.shape
    assert (image == 200).all()
    assert drawn[300, 100].tolist() == [250, 20, 30]
    assert drawn[300, 200].tolist() == [200, 200, 200]


def test_small_pictures_are_enlarged() -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    boxes = np.array([[1, 1, 9, 9], [3, 3, 29, 19]])
    drawn = draw_detections(image, boxes, np.array([0, 1]), ["é", "two"], np.array([0.9, 0.1]))
    assert drawn.shape == (320, 480, 3)
    assert draw_boxes(image, np.zeros((0, 4)), [], []).shape == (320, 480, 3)


def test_colours_of_classes_are_stable_and_apart() -> None:
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert class_colour(3) == colours[3]
    for red, green, blue in colours:  # contrast of white letters
        brightness = 0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2
        assert 1.05 / (brightness + 0.05) > 3.5


def test_labels_and_lines_do_not_cover_a_long_strip() -> None:
    image = np.full((40, 1500, 3), 128, np.uint8)
    drawn = draw_boxes(image, np.array([[100, 5, 700, 35]]), [""], [(255, 0, 0)])
    assert drawn.shape == image.shape
    assert 0 < (drawn[:, 400] != 128).any(axis=1).sum() <= 6
    labelled = draw_boxes(image, np.array([[100, 5, 700, 35]]), ["cell 0.90"], [(255, 0, 0)])
    assert (labelled != drawn).any(axis=2).sum() < 0.1 * 40 * 1500
