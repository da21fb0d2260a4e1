"""Generated data set of coloured circles, squares and triangles, on which a small detector trains in minutes.

Shapes overlap, are cut by the border, and are drawn on a textured background. Circles are reddish, squares greenish and
triangles bluish, because learning outlines from random weights takes hours. Every image is a function of seed, split
and index only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Polygon = NDArray[np.float64]

NAMES = ("circle", "square", "triangle")
_CORNERS = {"circle": 32, "square": 4, "triangle": 3}
# Direction of the first corner of an upright shape, and maximum rotation away from upright.
_UPRIGHT = {"circle": 0.0, "square": np.pi / 4, "triangle": -np.pi / 2}
_LARGEST_LEAN = np.pi / 12
_SPLITS = ("train", "val")
_RADII = (12.0, 80.0)
_MAX_OBJECTS = 8
# Minimum visible part of a shape, in pixels and as a fraction of the part inside the image.
_MIN_PIXELS = 60
_MIN_VISIBLE = 0.35
_MIN_CONTRAST = 64


def write_shapes(folder: Path, *, train: int = 400, val: int = 100, seed: int = 0) -> None:
    """Write the data set in COCO layout: `train/` and `val/` with PNG files, `annotations/instances_*.json`.

    Polygons, boxes and areas cover the whole shape inside the image, including parts hidden by other shapes.

    Args:
        folder: Target folder; it must not contain a data set.
        train: Number of training images.
        val: Number of validation images.
        seed: Random seed.

    Raises:
        ValueError: `train` or `val` is below 1, or `seed` is below 0.
        OSError: The folder contains a data set, or cannot be written.
    """
    if min(train, val) < 1 or seed < 0:
        raise ValueError(
            f"expected train and val of at least 1 and a seed of at least 0, got {train}, {val} and {seed}"
        )
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(zip(_SPLITS, (train, val), strict=True)):
        if any(folder.glob(f"annotations/instances_{split}.json")):
            raise FileExistsError(f"{folder} already contains a data set. Delete it, or use another folder")
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            image, objects = draw_image(seed, number, index)
            file_name = f"{index:06d}.png"
            _write_png(folder / split / file_name, image)
            height, width = image.shape[:2]
            images.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
            for category, polygon in objects:
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index + 1, **_annotation(category, polygon)}
                )
        categories = [{"id": position + 1, "name": name} for position, name in enumerate(NAMES)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        # The annotations are written last, so that they exist only if the split is complete.
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), "utf-8")


def draw_image(seed: int, split: int, index: int) -> tuple[Image, list[tuple[int, Polygon]]]:
    """Draw an image, [H, W, 3] RGB, and its shapes from back to front: index in `NAMES` and polygon [points, 2]."""
    rng = np.random.Generator(np.random.PCG64([seed, split, index]))
    long, short = int(rng.integers(288, 353)), int(rng.integers(208, 273))
    height, width = (short, long) if rng.random() < 0.6 else (long, short)
    ground = rng.integers(40, 216, 3)
    image = _texture(rng, height, width, ground, contrast=int(rng.integers(16, 64)))
    owner = np.full((height, width), -1)
    shapes: list[tuple[int, Polygon, NDArray[np.bool_]]] = []
    for _ in range(int(rng.integers(1, _MAX_OBJECTS + 1))):
        category = int(rng.integers(len(NAMES)))
        polygon = _cut(_outline(rng, category, height, width), height, width)
        covered = _fill(polygon, height, width)
        # The strongest of red, green and blue identifies the class.
        colour = rng.integers(0, 160, 3)
        colour[category] = rng.integers(160, 256)
        surface = _texture(rng, height, width, colour, contrast=int(rng.integers(0, 33)))
        after = np.where(covered, len(shapes), owner)
        counts = np.bincount(after[after >= 0], minlength=len(shapes) + 1)
        wholes = np.array([int(mask.sum()) for *_, mask in shapes] + [int(covered.sum())])
        # Skip a shape that has too little contrast, is mostly outside the image, or hides another shape.
        vanishes = (counts < np.maximum(_MIN_PIXELS, _MIN_VISIBLE * wholes)).any()
        if vanishes or np.abs(colour - ground).max() < _MIN_CONTRAST:
            continue
        image = np.where(covered[..., None], surface, image)
        owner = after
        shapes.append((category, polygon, covered))
    if not shapes:
        # No shape was drawn: draw the image again with a different index.
        return draw_image(seed, split, index + 1_000_000_007)
    return image, [(category, polygon) for category, polygon, _ in shapes]


def _annotation(category: int, polygon: Polygon) -> dict[str, Any]:
    # Round to hundredths of a pixel, like COCO. Box and area are computed from the rounded polygon.
    points = polygon.round(2)
    low, high = points.min(0), points.max(0)
    x, y = points.T
    area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return {
        "category_id": category + 1,
        "bbox": [round(float(value), 2) for value in (*low, *(high - low))],
        "area": round(area, 4),
        "iscrowd": 0,
        "segmentation": [points.ravel().tolist()],
    }


def _outline(rng: np.random.Generator, category: int, height: int, width: int) -> Polygon:
    """[points, 2] x, y of a rotated shape around a centre inside the image, by ascending angle."""
    name = NAMES[category]
    corners = _CORNERS[name]
    centre = rng.random(2) * (width, height)
    radius = _RADII[0] * (_RADII[1] / _RADII[0]) ** rng.random()
    lean = _LARGEST_LEAN * (2 * rng.random() - 1)
    angles = _UPRIGHT[name] + lean + 2 * np.pi * np.arange(corners) / corners
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _cut(polygon: Polygon, height: int, width: int) -> Polygon:
    """Clip a convex polygon that has a point inside the image to the image (Sutherland and Hodgman, 1974)."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = sign * (polygon[:, axis] - limit)
        points = []
        for i in range(len(polygon)):
            j = (i + 1) % len(polygon)
            if depth[i] >= 0:
                points.append(polygon[i])
            if (depth[i] >= 0) != (depth[j] >= 0):
                crossing = polygon[i] + (polygon[j] - polygon[i]) * depth[i] / (depth[i] - depth[j])
                crossing[axis] = limit
                points.append(crossing)
        polygon = np.array(points)
    return polygon


def _fill(polygon: Polygon, height: int, width: int) -> NDArray[np.bool_]:
    """[H, W] whether the centre of each pixel is inside a convex polygon with ascending angles."""
    left, top = np.floor(polygon.min(0)).astype(int)
    right, bottom = np.ceil(polygon.max(0)).astype(int)
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
    covered = np.zeros((height, width), bool)
    inside = covered[top:bottom, left:right]
    inside[:] = True
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        inside &= (x2 - x1) * (y - y1) >= (y2 - y1) * (x - x1)
    return covered


def _texture(rng: np.random.Generator, height: int, width: int, colour: NDArray[np.int64], *, contrast: int) -> Image:
    """[H, W, 3] texture of one colour with blotches and grain."""
    cell = int(rng.integers(8, 40))
    coarse = rng.integers(-contrast, contrast + 1, (height // cell + 2, width // cell + 2, 3)).astype(np.int16)
    # INTER_LINEAR_EXACT gives the same pixels on every machine.
    size = (coarse.shape[1] * cell, coarse.shape[0] * cell)
    blotches = cv2.resize((coarse + 128).astype(np.uint8), size, interpolation=cv2.INTER_LINEAR_EXACT)
    grain = rng.integers(-2, 3, (height, width, 1), np.int16) * 3
    return (
        (blotches[:height, :width].astype(np.int16) - 128 + grain + colour.astype(np.int16))
        .clip(0, 255)
        .astype(np.uint8)
    )


def _write_png(path: Path, image: Image) -> None:
    written, data = cv2.imencode(".png", image[..., ::-1])
    assert written
    path.write_bytes(data.tobytes())
