"""Generated data set of circles, squares and triangles, on which a small detector trains in minutes.

Shaded shapes with soft shadows overlap on a muted background, are cut by the border, and differ in size and rotation.
Circles are reddish, squares greenish and triangles bluish, because learning outlines from random weights takes hours.
Faint pentagons and blurred discs are not annotated. Every image is a function of seed, split and index only.
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
_RADII = (9.0, 80.0)
_MAX_OBJECTS = 12
# Minimum visible part of a shape, in pixels and as a fraction of the part inside the image.
_MIN_PIXELS = 60
_MIN_VISIBLE = 0.35
# Minimum difference between a shape and the background in one colour channel.
_MIN_CONTRAST = 40
_SHADOW = {"offset": 0.09, "softness": 0.16, "strength": 0.35}
"""Shadow of a shape: offset to the lower right and width of its soft edge, relative to the radius; opacity."""


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
    canvas, ground = _background(rng, height, width)
    # 0 is the background; the shape with index i is i + 1.
    owner = np.zeros((height, width), np.uint8)
    shapes: list[tuple[int, Polygon]] = []
    sizes: list[int] = []
    for _ in range(int(rng.integers(1, _MAX_OBJECTS + 1))):
        category = int(rng.integers(len(NAMES)))
        centre, radius = _place(rng, height, width)
        whole = _outline(rng, NAMES[category], centre, radius)
        polygon = _cut(whole, height, width)
        covered = _fill(polygon, height, width)
        # The strongest of red, green and blue identifies the class.
        colour = rng.integers(50, 165, 3).astype(np.float32)
        colour[category] = rng.integers(175, 250)
        after = np.where(covered, np.uint8(len(shapes) + 1), owner)
        counts = np.bincount(after.ravel(), minlength=len(shapes) + 2)[1:]
        wholes = np.array([*sizes, np.count_nonzero(covered)])
        # Skip a shape that has too little contrast, is mostly outside the image, or hides another shape.
        vanishes = (counts < np.maximum(_MIN_PIXELS, _MIN_VISIBLE * wholes)).any()
        if vanishes or np.abs(colour - ground).max() < _MIN_CONTRAST:
            continue
        _paint(canvas, whole, radius, colour)
        owner = after
        shapes.append((category, polygon))
        sizes.append(int(wholes[-1]))
    if not shapes:
        # No shape was drawn: draw the image again with a different index.
        return draw_image(seed, split, index + 1_000_000_007)
    grain = rng.integers(-4, 5, (height, width, 1)).astype(np.float32)
    image = (canvas + grain).round().clip(0, 255).astype(np.uint8)
    return image, shapes


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Muted background [H, W, 3] with blurred discs and faint pentagons, and its mean colour."""
    brightness = rng.integers(40, 110) if rng.random() < 0.4 else rng.integers(150, 225)
    ground = (brightness + rng.integers(-18, 19, 3)).astype(np.float32)
    slope = (rng.random(2).astype(np.float32) - 0.5) * 70
    y, x = np.arange(height, dtype=np.float32) / height - 0.5, np.arange(width, dtype=np.float32) / width - 0.5
    canvas = ground + (slope[0] * y[:, None] + slope[1] * x)[..., None]
    for corners, strength, softness in (
        (32, 0.3, 0.5),
        (32, 0.3, 0.5),
        (32, 0.2, 0.9),
        (5, 0.45, 0.02),
        (5, 0.3, 0.02),
    ):
        centre, radius = _place(rng, height, width)
        tint = ground + rng.integers(-60, 61, 3).astype(np.float32)
        if rng.random() < 0.7:
            polygon = _regular(corners, centre, radius, 2 * np.pi * rng.random())
            rows, columns, alpha = _coverage(canvas.shape, polygon, max(1.0, softness * radius))
            canvas[rows, columns] += strength * alpha[..., None] * (tint - canvas[rows, columns])
    return canvas, ground


def _paint(canvas: NDArray[np.float32], polygon: Polygon, radius: float, colour: NDArray[np.float32]) -> None:
    """Draw the shadow of a convex polygon, then the polygon with light from the upper left."""
    shadow = polygon + _SHADOW["offset"] * radius
    rows, columns, alpha = _coverage(canvas.shape, shadow, max(2.0, _SHADOW["softness"] * radius))
    canvas[rows, columns] *= 1 - _SHADOW["strength"] * alpha[..., None]
    rows, columns, alpha = _coverage(canvas.shape, polygon, 1.0)
    x, y = np.arange(columns.start, columns.stop), np.arange(rows.start, rows.stop)[:, None]
    centre = polygon.mean(0)
    light = 1 - 0.16 * ((x - centre[0]) + (y - centre[1])).astype(np.float32) / np.float32(radius)
    canvas[rows, columns] += alpha[..., None] * (light[..., None] * colour - canvas[rows, columns])


def _coverage(shape: tuple[int, ...], polygon: Polygon, softness: float) -> tuple[slice, slice, NDArray[np.float32]]:
    """Rows and columns around a convex polygon, and the opacity there: 0 outside to 1 inside.

    The edge is `softness` pixels wide; a width of 1 is an antialiased edge.
    """
    (left, top), (right, bottom) = polygon.min(0) - softness / 2, polygon.max(0) + softness / 2
    rows = slice(max(0, int(top)), min(shape[0], int(bottom) + 1))
    columns = slice(max(0, int(left)), min(shape[1], int(right) + 1))
    x, y = np.arange(columns.start, columns.stop) + 0.5, np.arange(rows.start, rows.stop)[:, None] + 0.5
    inside = np.full((max(0, rows.stop - rows.start), max(0, columns.stop - columns.start)), np.inf)
    distance = np.empty_like(inside)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        length = np.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)
        np.subtract((x2 - x1) / length * (y - y1), (y2 - y1) / length * (x - x1), out=distance)
        np.minimum(inside, distance, out=inside)
    return rows, columns, (inside.astype(np.float32) / np.float32(softness) + np.float32(0.5)).clip(0, 1)


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


def _place(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.float64], float]:
    """Random centre (x, y) inside the image, and radius in pixels."""
    centre = rng.random(2) * (width, height)
    return centre, _RADII[0] * (_RADII[1] / _RADII[0]) ** rng.random()


def _outline(rng: np.random.Generator, name: str, centre: NDArray[np.float64], radius: float) -> Polygon:
    """[points, 2] x, y of a slightly rotated shape, by ascending angle."""
    lean = _LARGEST_LEAN * (2 * rng.random() - 1)
    return _regular(_CORNERS[name], centre, radius, _UPRIGHT[name] + lean)


def _regular(corners: int, centre: NDArray[np.float64], radius: float, first: float) -> Polygon:
    """[corners, 2] regular polygon whose first corner is in the direction `first`."""
    angles = first + 2 * np.pi * np.arange(corners) / corners
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


def _write_png(path: Path, image: Image) -> None:
    written, data = cv2.imencode(".png", image[..., ::-1])
    assert written
    path.write_bytes(data.tobytes())
