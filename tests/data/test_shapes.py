"""The generated data set: the same for a seed, sound, and annotated to the pixel."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from boxwright.data.formats import find_layout
from boxwright.data.formats.check import check
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.shapes import NAMES, draw_image, write_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "deep"
    write_shapes(folder, train=12, val=5, seed=3)
    return folder


def test_is_sound(folder: Path, tmp_path: Path) -> None:
    layout = find_layout(folder)
    assert list(layout) == ["train", "val"]
    assert [check(*split) for split in layout.values()] == [[], []]
    datasets = [IndexedDataset(*split, cache_dir=tmp_path) for split in layout.values()]
    assert [len(dataset) for dataset in datasets] == [12, 5]
    assert tuple(category.name for category in datasets[0].categories) == NAMES
    assert 1 < datasets[0].max_objects <= 12
    heights, widths = datasets[0].image_sizes.T
    assert (heights > widths).any()
    assert (heights < widths).any()


def test_boxes_and_areas_are_those_of_the_polygons(folder: Path, tmp_path: Path) -> None:
    index = IndexedDataset(*find_layout(folder)["train"], cache_dir=tmp_path).index
    for row, box in enumerate(index.boxes):
        (polygon,) = index.polygons(row)
        np.testing.assert_allclose(np.concatenate([polygon.min(0), polygon.max(0)]), box, atol=1e-3)
        np.testing.assert_allclose(cv2.contourArea(polygon), index.areas[row], rtol=1e-3)


def test_is_the_same_for_a_seed(folder: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, train=3, val=1, seed=3)
    for name in ("train/000002.png", "val/000000.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    image, _ = draw_image(4, 0, 2)
    assert image.shape != cv2.imread(str(folder / "train/000002.png")).shape or not np.array_equal(
        image, cv2.imread(str(folder / "train/000002.png"), cv2.IMREAD_COLOR_RGB)
    )


def test_pixels_are_the_same_everywhere() -> None:
    image, objects = draw_image(0, 0, 0)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "77169b15dd2314e5"
    assert [NAMES[category] for category, _ in objects] == [
        "circle",
        "square",
        "circle",
        "triangle",
        "triangle",
        "square",
    ]


def test_shapes_are_drawn_where_they_are_said_to_be() -> None:
    image, objects = draw_image(0, 0, 8)
    _, polygon = objects[-1]
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1)
    inside = cv2.erode(mask, np.ones((5, 5), np.uint8)) > 0
    ring = (cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0) & (cv2.dilate(mask, np.ones((5, 5), np.uint8)) == 0)
    difference = np.abs(image[inside].mean(0) - image[ring].mean(0))
    assert difference.max() > 40


def test_refuses_to_overwrite_and_bad_numbers(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="already contains a data set"):
        write_shapes(folder)
    with pytest.raises(ValueError, match="train and val of at least 1"):
        write_shapes(folder, train=0)
