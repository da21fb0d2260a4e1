"""Pixels, boxes and masks follow the matrix of a placement."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from boxwright.data.augment import Augment
from boxwright.data.buckets import Resize
from boxwright.data.collate import PlacedSample, collate
from boxwright.data.dataset import Mask, Sample
from boxwright.data.masks import rle
from boxwright.data.masks.mask_grid import Grid, mask_grid
from boxwright.data.placement import Placement, place, place_affine, place_boxes, place_image, place_mask
from boxwright.geometry import affine


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth image: red increases with x, green with y."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image


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


def test_a_resize_equals_opencv() -> None:
    image = rng().integers(0, 256, (48, 64, 3), dtype=np.uint8)
    placement = Augment().draw((48, 64), Resize(80, 133), rng())
    assert placement.size == (80, 107)
    expected = cv2.resize(image, (107, 80), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(placed_image(image, placement), expected)


def test_boxes_scale_by_the_ratio_of_sizes_on_each_axis() -> None:
    placement = Augment().draw((48, 64), Resize(80, 133), rng())
    boxes, keep = place_boxes(np.array([[8, 6, 32, 24]], np.float32), placement)
    np.testing.assert_allclose(boxes, [[8 * 107 / 64, 10, 32 * 107 / 64, 40]], rtol=1e-6)
    assert keep.all()


def test_flip_mirrors_pixels_and_boxes() -> None:
    image = gradient(40, 60)
    unflipped, flipped = place((40, 60), (80, 120)), place((40, 60), (80, 120), flipped=True)
    np.testing.assert_array_equal(placed_image(image, flipped), placed_image(image, unflipped)[:, ::-1])
    boxes, _ = place_boxes(np.array([[0, 0, 10, 20]], np.float32), flipped)
    np.testing.assert_allclose(boxes, [[100, 0, 120, 40]])


@pytest.mark.parametrize("window", [None, (5, 11, 30, 40)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.6])
def test_pixels_follow_the_matrix(flipped: bool, scale: float, window: tuple[int, int, int, int] | None) -> None:
    image = cv2.GaussianBlur(rng().integers(0, 256, (60, 90, 3), dtype=np.uint8), (0, 0), 3)
    resized = (round(60 * scale), round(90 * scale))
    placement = place((60, 90), resized, flipped=flipped, window=window)
    # In OpenCV's coordinates the centre of the first pixel is 0; in the matrix it is 0.5.
    matrix = placement.matrix.astype(np.float64)
    matrix[:, 2] += matrix[:, :2].sum(1) * 0.5 - 0.5
    size = placement.size[::-1]
    warped = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    # OpenCV rounds positions to 1/32 pixels. An offset of half a pixel would give an error several times as large.
    assert np.abs(placed_image(image, placement).astype(int) - warped).max() <= 2


def test_a_crop_drops_objects_with_a_small_visible_fraction() -> None:
    placement = place((100, 100), (100, 100), window=(0, 50, 100, 50))
    boxes, keep = place_boxes(
        np.array([[0, 0, 50, 50], [0, 0, 53, 50], [40, 0, 60, 50], [60, 10, 70, 20]], np.float32), placement
    )
    np.testing.assert_array_equal(keep, [False, False, True, True])
    np.testing.assert_array_equal(boxes[2:], [[0, 0, 10, 50], [10, 10, 20, 20]])


def test_without_a_crop_small_and_clipped_objects_are_kept() -> None:
    boxes, keep = place_boxes(np.array([[0, 0, 0.1, 0.1], [-900, 0, 5, 10]], np.float32), place((10, 10), (20, 20)))
    assert keep.all()
    np.testing.assert_array_equal(boxes[1], [0, 0, 10, 20])


def test_no_boxes() -> None:
    boxes, keep = place_boxes(np.zeros((0, 4), np.float32), place((10, 10), (20, 20)))
    assert boxes.shape == (0, 4)
    assert keep.shape == (0,)


def test_the_matrix_of_a_flipped_and_cropped_placement() -> None:
    placement = place((10, 20), (30, 40), flipped=True, window=(1, 2, 20, 30))
    assert isinstance(placement, Placement)
    np.testing.assert_array_equal(placement.matrix, np.array([[-2, 0, 38], [0, 3, -1]], np.float32))


def rotation(degrees: float, original: tuple[int, int], size: tuple[int, int], *, scale: float = 1.0, shear: float = 0):
    """Matrix that rotates, shears and scales about the centre of the image, which moves to the centre of the canvas."""
    cos, sin = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    offset = np.array(size[::-1]) / 2 - linear @ (np.array(original[::-1]) / 2)
    return np.column_stack([linear, offset])


def mapped(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


MAPS = {
    "rotated 30": rotation(30, (60, 90), (100, 110)),
    "rotated -75, half size": rotation(-75, (60, 90), (70, 60), scale=0.5),
    "rotated 10, 1.7 times": rotation(10, (60, 90), (80, 100), scale=1.7),
    "sheared": rotation(0, (60, 90), (60, 120), shear=0.4),
    "quarter turn": rotation(90, (60, 90), (90, 60)),
    "upside down": np.array([[1.0, 0, 0], [0, -1, 60]]),
    "mirrored, rotated 200": rotation(200, (60, 90), (100, 110)) @ np.array([[-1, 0, 90], [0, 1, 0], [0, 0, 1]]),
    "fractional scale": np.array([[1.313, 0, 3.4], [0, 0.77, -2.1]]),
}
SIZES = {"rotated -75, half size": (70, 60), "quarter turn": (90, 60), "upside down": (60, 90)}


@pytest.mark.parametrize("name", MAPS)
def test_pixels_under_any_affine_map_equal_pillow(name: str) -> None:
    image = cv2.GaussianBlur(rng().integers(0, 256, (60, 90, 3), dtype=np.uint8), (0, 0), 3)
    size = SIZES.get(name, (100, 110))
    placement = place_affine((60, 90), MAPS[name], size)
    assert placement.resize_steps is None
    height, width = size
    inverse = np.linalg.inv(np.vstack([MAPS[name], [0, 0, 1]]))[:2]
    expected = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR
    )
    pixels = placed_image(image, placement)
    centres = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=2)
    source = mapped(centres.reshape(-1, 2), inverse).reshape(height, width, 2)
    inside = ((source > 1) & (source < np.array([89, 59]))).all(2)
    assert inside.mean() > 0.2
    # OpenCV rounds positions to 1/32 pixels. An offset of half a pixel would give differences of about 10.
    assert np.abs(pixels.astype(int) - np.asarray(expected))[inside].max() <= 2
    outside = ((source < -1) | (source > np.array([91, 61]))).any(2)
    assert (pixels[outside] == 0).all()


@pytest.mark.parametrize("name", MAPS)
def test_a_drawn_ellipse_follows_the_matrix(name: str) -> None:
    """Centre of mass and covariance follow the map exactly, independent of the interpolation."""
    centre, radii = np.array([47.3, 28.6]), np.array([14.0, 8.0])
    ys, xs = np.mgrid[0:480, 0:720] / 8 + 1 / 16
    fine = (((xs - centre[0]) / radii[0]) ** 2 + ((ys - centre[1]) / radii[1]) ** 2 <= 1).astype(np.float64)
    image = np.repeat((255 * fine.reshape(60, 8, 90, 8).mean((1, 3))).round().astype(np.uint8)[..., None], 3, axis=2)
    pixels = placed_image(image, place_affine((60, 90), MAPS[name], SIZES.get(name, (100, 110))))[..., 0].astype(float)
    ys, xs = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]] + 0.5
    points, weights = np.stack([xs.ravel(), ys.ravel()]), pixels.ravel()
    matrix = MAPS[name]
    np.testing.assert_allclose(np.average(points, axis=1, weights=weights), mapped(centre, matrix), atol=0.05)
    covariance = matrix[:, :2] @ np.diag(radii**2 / 4) @ matrix[:, :2].T
    np.testing.assert_allclose(np.cov(points, aweights=weights), covariance, rtol=0.03, atol=0.5)
    area = math.pi * radii.prod() * abs(np.linalg.det(matrix[:, :2]))
    assert pixels.sum() / 255 == pytest.approx(area, rel=0.01)


def test_resize_flip_and_crop_are_recovered_from_the_matrix() -> None:
    """So `place_affine` uses the resize of OpenCV for these matrices, and gives the same bits as `place`."""
    draws = rng(1)
    for _ in range(500):
        original = tuple(int(side) for side in np.exp(draws.uniform(0, math.log(65_535), 2)))
        resized = tuple(int(side) for side in np.exp(draws.uniform(0, math.log(4000), 2)))
        top, left = (int(draws.integers(side)) for side in resized)
        window = (top, left, int(draws.integers(resized[0] - top)) + 1, int(draws.integers(resized[1] - left)) + 1)
        flipped = bool(draws.integers(2))
        placement = place(original, resized, flipped=flipped, window=window)
        recovered = place_affine(original, placement.matrix.astype(np.float64), placement.size)
        assert recovered.resize_steps == placement.resize_steps == (resized, flipped, top, left)
        assert (recovered.flipped, placement.flipped) == (flipped, flipped)
        for each in (placement, recovered, replace(recovered, resize_steps=None)):
            assert each.cropped == (window[2:] != resized)
            assert each.keeps_boxes


def test_an_image_too_long_for_the_warp_is_downscaled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    warp, sides = cv2.warpAffine, []

    def record_side(image: np.ndarray, *arguments: object, **options: object) -> np.ndarray:
        sides.append(max(image.shape[:2]))
        return warp(image, *arguments, **options)

    monkeypatch.setattr(cv2, "warpAffine", record_side)
    image = np.zeros((20, 40_000, 3), np.uint8)
    image[..., 0] = (127.5 + 127 * np.sin(np.arange(40_000) / 600)).round()
    matrix = np.array([[0.01, 0, 0], [0.0001, 1, 0]])
    pixels = placed_image(image, place_affine((20, 40_000), matrix, (20, 400)))
    expected = np.interp((np.arange(400) + 0.5) * 100, np.arange(40_000) + 0.5, image[0, :, 0])
    np.testing.assert_allclose(pixels[10, 2:-2, 0], expected[2:-2], atol=2)
    assert sides == [32_766]


AFFINE_BOXES = json.loads((Path(__file__).parent / "expected" / "affine_boxes.json").read_text())


@pytest.mark.parametrize("case", AFFINE_BOXES["cases"], ids=lambda case: case["name"])
def test_boxes_under_any_affine_map_are_clipped_bounding_boxes(case: dict) -> None:
    width, height = case["inputs"]["size_wh"]
    placement = place_affine((height, width), np.array(case["inputs"]["matrix"]), (height, width))
    boxes = np.array(case["inputs"]["boxes"], np.float32)
    tolerance = {"rtol": AFFINE_BOXES["tolerance"], "atol": AFFINE_BOXES["tolerance"]}
    visible, keep = place_boxes(boxes, placement, case["inputs"]["min_visible"])
    np.testing.assert_allclose(visible, case["clipped"], **tolerance)
    assert keep.tolist() == case["kept"]


TRIANGLE = np.array([[20, 10], [70, 14], [30, 50]], np.float64)


def filled(polygon: np.ndarray, *, scale: int, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre is inside a polygon (even-odd rule), at `scale` times the resolution of the image."""
    ys, xs = np.mgrid[0 : size[0] * scale, 0 : size[1] * scale] / scale + 0.5 / scale
    inside = np.zeros(ys.shape, bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 <= ys) != (y2 <= ys)) & (xs < x1 + (ys - y1) / (y2 - y1) * (x2 - x1))
    return inside


def bitmap_of(polygon: np.ndarray) -> np.ndarray:
    return filled(polygon, scale=1, size=(60, 90))


def runs_of(bitmap: np.ndarray) -> bytes:
    flat = np.concatenate([[0], bitmap.T.ravel().astype(int), [2]])
    lengths = np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=0)
    return rle.compress(lengths if not bitmap[0, 0] else np.concatenate([[0], lengths]))


@pytest.mark.parametrize("form", ["polygon", "bitmap", "runs"])
@pytest.mark.parametrize("name", ["rotated 30", "sheared", "rotated -75, half size"])
def test_an_object_with_a_mask_gets_the_tight_box_under_rotation(name: str, form: str) -> None:
    masks: dict[str, Mask] = {
        "polygon": [TRIANGLE],
        "bitmap": bitmap_of(TRIANGLE),
        "runs": runs_of(bitmap_of(TRIANGLE)),
    }
    placement = place_affine((60, 90), MAPS[name], (200, 200))
    box = np.array([[20, 10, 70, 50]], np.float32)
    (tight,), _ = place_boxes(box, placement, masks=[masks[form]])
    corners = mapped(TRIANGLE, MAPS[name])
    atol = 1e-4 if form == "polygon" else 1.5
    np.testing.assert_allclose(tight, np.concatenate([corners.min(0), corners.max(0)]).clip(0), atol=atol)
    (loose,), _ = place_boxes(box, placement)
    assert (loose[2:] - loose[:2]).prod() > 1.2 * (tight[2:] - tight[:2]).prod()
    assert (tight[:2] >= loose[:2]).all()
    assert (tight[2:] <= loose[2:]).all()


def test_without_a_mask_inside_the_box_the_loose_box_is_used() -> None:
    placement = place_affine((60, 90), MAPS["rotated 30"], (200, 200))
    box = np.array([[2, 2, 9, 9]] * 3, np.float32)
    expected, _ = place_boxes(box, placement)
    boxes, _ = place_boxes(box, placement, masks=[[TRIANGLE], None, np.zeros((60, 90), bool)])
    np.testing.assert_array_equal(boxes, expected)


@pytest.mark.parametrize("matrix", [MAPS["quarter turn"], MAPS["upside down"], MAPS["fractional scale"]])
def test_masks_are_ignored_if_boxes_stay_axis_aligned(matrix: np.ndarray) -> None:
    placement = place_affine((60, 90), matrix, (100, 110))
    box = np.array([[15, 5, 75, 55]], np.float32)
    np.testing.assert_array_equal(place_boxes(box, placement, masks=[[TRIANGLE]])[0], place_boxes(box, placement)[0])


STAR = 30 + np.array([[25 * math.cos(0.3 + t * math.pi / 5), 25 * math.sin(0.3 + t * math.pi / 5)] for t in range(10)])
STAR[1::2] = 30 + 0.55 * (STAR[1::2] - 30)
BAR = np.array([[5, 28], [85, 28], [85, 33], [5, 33]], np.float64)


def drawn(grid: Grid, *, scale: int, size: tuple[int, int]) -> np.ndarray:
    """Draw a grid as pixels, at `scale` times the resolution of a canvas of `size`."""
    bitmap, frame = grid
    low, high = frame[:2] * scale, frame[2:] * scale
    xs, ys = np.arange(size[1] * scale) + 0.5, np.arange(size[0] * scale) + 0.5
    cells = len(bitmap)
    map_x = np.broadcast_to((xs - low[0]) / (high - low)[0] * cells - 0.5, (len(ys), len(xs)))
    map_y = np.broadcast_to(((ys - low[1]) / (high - low)[1] * cells - 0.5)[:, None], (len(ys), len(xs)))
    return cv2.remap(bitmap, map_x.astype(np.float32), map_y.astype(np.float32), cv2.INTER_LINEAR) >= 127.5


def iou(one: np.ndarray, two: np.ndarray) -> float:
    return (one & two).sum() / (one | two).sum()


@pytest.mark.parametrize("cells", [28, 128])
@pytest.mark.parametrize("shape", ["triangle", "star", "bar"])
@pytest.mark.parametrize("name", [name for name in MAPS if name != "rotated -75, half size"])
def test_mask_grids_follow_any_affine_map(name: str, shape: str, cells: int) -> None:
    polygon = {"triangle": TRIANGLE, "star": STAR, "bar": BAR}[shape]
    matrix = MAPS[name] + np.array([[0, 0, 60], [0, 0, 60]])
    placement = place_affine((60, 90), matrix, (260, 260))
    grid = mask_grid([polygon], (60, 90), size=cells)
    assert grid is not None
    placed = place_mask(grid, placement)
    assert placed[0].shape == (cells, cells)
    expected = filled(mapped(polygon, matrix), scale=4, size=placement.size)
    corners = mapped(polygon, matrix)
    cell = (corners.max(0) - corners.min(0)).max() / cells
    np.testing.assert_allclose(placed[1], np.concatenate([corners.min(0), corners.max(0)]), atol=max(cell, 0.1))
    assert iou(drawn(placed, scale=4, size=placement.size), expected) >= {28: 0.95, 128: 0.99}[cells]


def test_pixels_box_mask_and_transform_of_a_rotated_sample_agree() -> None:
    matrix, size = rotation(33, (60, 90), (128, 128), scale=1.2), (128, 128)
    image = np.repeat(255 * bitmap_of(TRIANGLE).astype(np.uint8)[..., None], 3, axis=2)
    sample = Sample(
        image=image,
        image_id=1,
        file_name="a.png",
        boxes=np.array([[20, 10, 70, 50]], np.float32),
        labels=np.zeros(1, np.int64),
        crowd=np.zeros(1, bool),
        object_ids=np.zeros(1, np.int64),
        masks=[[TRIANGLE]],
    )
    batch = collate([PlacedSample(sample, place_affine((60, 90), matrix, size), 0)], 1, size, 8, masks=True)
    pixels = batch.images[0, 0].numpy() > 127
    ys, xs = np.nonzero(pixels)
    from_pixels = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    # The tolerance is 2, because no pixel is more than half covered at the sharp tip of the triangle.
    np.testing.assert_allclose(batch.targets.boxes[0, 0], from_pixels, atol=2)
    masks = batch.targets.masks
    grid = masks.bitmaps[0, 0].numpy(), masks.frames[0, 0].numpy()
    assert iou(drawn(grid, scale=1, size=size), pixels) > 0.95
    np.testing.assert_allclose(batch.transforms[0], matrix, rtol=1e-6)


def test_the_inverse_maps_points_back_to_the_file() -> None:
    draws = rng(2)
    for _ in range(200):
        original = tuple(int(side) for side in draws.integers(50, 4000, 2))
        scale = draws.uniform(800, 1333) / max(original)
        matrix = rotation(draws.uniform(0, 360), original, (800, 1333), scale=scale, shear=draws.uniform(-0.5, 0.5))
        transforms = torch.tensor(place_affine(original, matrix, (800, 1333)).matrix)[None]
        points = draws.uniform(0, 1, (50, 2)) * original[::-1]
        file_boxes = torch.tensor(np.tile(points, 2), dtype=torch.float32)[None]
        canvas = affine.transform_boxes(file_boxes, transforms)
        in_file = affine.transform_boxes(canvas.double(), affine.invert(transforms.double()))
        np.testing.assert_allclose(in_file[0, :, :2], points, atol=1e-3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), "expected 2 x 3 finite numbers"),
        ([[1, 0, math.nan], [0, 1, 0]], "expected 2 x 3 finite numbers"),
        ([[1, 2, 0], [2, 4, 0]], r"expected an invertible map, got \[\[1.0, 2.0, 0.0\], .*maps the image to a line"),
    ],
)
def test_invalid_matrices_are_an_error(matrix: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_affine((60, 90), matrix, (60, 90))


@pytest.mark.parametrize("size", [(0, 90), (60, 0), (-1, 5)])
def test_a_size_below_1_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"size: expected height and width of at least 1, got \({size[0]}, {size[1]}\)"
    ):
        place_affine((60, 90), MAPS["sheared"], size)


def test_the_error_of_a_mask_of_another_size_names_the_file() -> None:
    sample = Sample(
        image=np.zeros((60, 90, 3), np.uint8),
        image_id=1,
        file_name="a.png",
        boxes=np.array([[20, 10, 70, 50]], np.float32),
        labels=np.zeros(1, np.int64),
        crowd=np.zeros(1, bool),
        object_ids=np.zeros(1, np.int64),
        masks=[np.ones((5, 5), bool)],
    )
    placed = PlacedSample(sample, place_affine((60, 90), MAPS["rotated 30"], (64, 64)), 0)
    with pytest.raises(
        ValueError, match=r"a\.png: invalid mask: expected the shape \(60, 90\) of the image, got \(5, 5\)"
    ):
        collate([placed], 1, (64, 64), 8)
