"""A generated data set that a small detector learns in minutes: coloured circles, squares and triangles.

They overlap, are cut by the border, and lie on textured ground. Circles are reddish, squares greenish and triangles
bluish, since from random weights outlines take hours to learn. Every picture is a function of seed, split and number
alone.
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
# The direction of a first corner where the shape stands upright, and how far shapes lean from that.
_UPRIGHT = {"circle": 0.0, "square": np.pi / 4, "triangle": -np.pi / 2}
_LARGEST_LEAN = np.pi / 12
_SPLITS = ("train", "val")
_RADII = (12.0, 80.0)
_MAX_OBJECTS = 8
# What must be left of a shape to be worth finding, in pixels and as a share of the part inside the picture.
_MIN_PIXELS = 60
_MIN_VISIBLE = 0.35
_MIN_CONTRAST = 64


def write_shapes(folder: Path, *, train: int = 400, val: int = 100, seed: int = 0) -> None:
    """Write the data set in COCO's layout: `train/` and `val/` with PNGs, `annotations/instances_*.json`.

    Polygons, boxes and areas are those of the whole shape inside the picture, also where another covers it.

    Args:
        folder: Where to; must not hold a data set yet.
        train: Number of pictures to learn from.
        val: Number of pictures to measure with.
        seed: What the pictures are drawn from.

    Raises:
        ValueError: A number is below 1, or the seed below 0.
        OSError: There is a data set already, or it cannot be written.
    """
    if min(train, val) < 1 or seed < 0:
        raise ValueError(f"train={train}, val={val}, seed={seed}: give one picture or more a split, and a seed from 0")
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(zip(_SPLITS, (train, val), strict=True)):
        if any(folder.glob(f"annotations/instances_{split}.json")):
            raise FileExistsError(f"{folder}: holds a data set already: delete it, or choose another folder")
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            image, objects = draw_picture(seed, number, index)
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
        # Last, so that a split is only ever there as a whole.
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), "utf-8")


def draw_picture(seed: int, split: int, index: int) -> tuple[Image, list[tuple[int, Polygon]]]:
    """One picture, [H, W, 3] RGB, and its shapes from back to front: position in `NAMES` and [points, 2] polygon."""
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
        # Of red, green and blue the one that leads is the class's.
        colour = rng.integers(0, 160, 3)
        colour[category] = rng.integers(160, 256)
        surface = _texture(rng, height, width, colour, contrast=int(rng.integers(0, 33)))
        after = np.where(covered, len(shapes), owner)
        counts = np.bincount(after[after >= 0], minlength=len(shapes) + 1)
        wholes = np.array([int(mask.sum()) for *_, mask in shapes] + [int(covered.sum())])
        # A shape that would melt into the ground, vanish at the border, or hide another, is not drawn.
        vanishes = (counts < np.maximum(_MIN_PIXELS, _MIN_VISIBLE * wholes)).any()
        if vanishes or np.abs(colour - ground).max() < _MIN_CONTRAST:
            continue
        image = np.where(covered[..., None], surface, image)
        owner = after
        shapes.append((category, polygon, covered))
    if not shapes:
        # By chance nothing fitted: draw again from numbers of its own.
        return draw_picture(seed, split, index + 1_000_000_007)
    return image, [(category, polygon) for category, polygon, _ in shapes]


def _annotation(category: int, polygon: Polygon) -> dict[str, Any]:
    # Hundredths of a pixel, like COCO; the box and area are those of the polygon as written.
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
    """[points, 2] x, y of a leaning shape around a centre in the picture, in rising angle."""
    name = NAMES[category]
    corners = _CORNERS[name]
    centre = rng.random(2) * (width, height)
    radius = _RADII[0] * (_RADII[1] / _RADII[0]) ** rng.random()
    lean = _LARGEST_LEAN * (2 * rng.random() - 1)
    angles = _UPRIGHT[name] + lean + 2 * np.pi * np.arange(corners) / corners
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _cut(polygon: Polygon, height: int, width: int) -> Polygon:
    """The part of a convex polygon inside the picture (Sutherland and Hodgman 1974); it has a point inside."""
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
    """[H, W] whether a pixel's centre lies in a convex polygon of rising angle."""
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
    """[H, W, 3] a colour under blotches and grain."""
    cell = int(rng.integers(8, 40))
    coarse = rng.integers(-contrast, contrast + 1, (height // cell + 2, width // cell + 2, 3)).astype(np.int16)
    # The exact form gives the same pixels on every machine.
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
