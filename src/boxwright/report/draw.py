"""Boxes, masks and labels on pictures, legible whatever the picture's size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import supervision as sv

from boxwright.data.masks import Masks

Colour = tuple[int, int, int]

MIN_LONG_SIDE = 480
"""Smaller pictures are enlarged before they are drawn on, or their labels could not be read."""
MAX_LABELS = 60
"""Beyond so many objects labels would hide the picture, and so would the boxes of masks: colours alone tell classes."""
FEW_LABELS = 8
"""So many labels are always drawn."""
MAX_LABEL_SHARE = 0.4
"""More labels than these few are left out where they would cover more than this share of the boxes' area: of many small
objects they would hide the neighbours."""
MASK_OPACITY = 0.4
OUTLINE_WHITE = 0.4
"""Outlines of masks are lighter than what they hold by this share, to stand out on dark ground and among neighbours."""


class _Letters(NamedTuple):
    """The size of labels, as OpenCV and supervision have it."""

    scale: float
    thickness: int
    padding: int


def class_colour(label: int) -> Colour:
    """The (red, green, blue) of a class: the same in every picture and run, dark enough for white letters on it."""
    # Steps of the golden ratio around the colour circle keep any number of neighbouring labels apart.
    hue = (0.6 + label * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.42, 0.34, 0.48)[label % 3], 0.85)
    # What the eye sees as bright (green above all) is darkened until white stands out.
    brightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = min(1.0, (0.22 / brightness) ** (1 / 2.2))
    return round(red * factor * 255), round(green * factor * 255), round(blue * factor * 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    *,
    masks: Masks | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """A copy of a picture with labelled boxes, and with masks where there are any; the first box lies on top.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: [n, 4] xyxy in pixels of `image`.
        texts: n labels; an empty one draws the box alone.
        colours: n (red, green, blue).
        masks: n, in pixels of `image`: filled so that the picture shows through, with an outline, the larger
            below the smaller. Of many objects they are drawn alone.
        scale: resizes the picture by this factor; None enlarges small ones until they are legible.

    Returns:
        uint8 [H * scale, W * scale, 3] RGB.
    """
    if scale is None:
        scale = max(1.0, MIN_LONG_SIDE / max(image.shape[:2]))
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    canvas: Any = np.ascontiguousarray(cv2.resize(image, (width, height), interpolation=_interpolation(scale)))
    if not len(boxes):
        return canvas
    order = np.arange(len(boxes))[::-1]
    # supervision looks a box's colour up by its class; here each box brings its own. It writes blue first, we red.
    palette = sv.ColorPalette([sv.Color(*colours[index][::-1]) for index in order])
    corners = np.asarray(boxes, dtype=np.float64)[order] * np.tile([width / image.shape[1], height / image.shape[0]], 2)
    detections = sv.Detections(xyxy=corners, class_id=np.arange(len(order)))
    # Of a long strip, what fits its short side: else lines and letters would cover it.
    side = min(max(width, height), 4 * min(width, height))
    thickness = max(2, round(side / 400))
    if masks is not None:
        thickness = max(1, thickness // 2)
        # A large one on top would tint all that lies within it.
        sides = corners[:, 2:] - corners[:, :2]
        for index in order[np.argsort(-sides.prod(axis=1), kind="stable")]:
            _draw_mask(canvas, masks.region(index), masks.sizes[index], colours[index], thickness)
    if masks is None or len(boxes) <= MAX_LABELS:
        canvas = sv.BoxAnnotator(color=palette, thickness=thickness).annotate(canvas, detections)
    labelled = np.array([bool(texts[index]) for index in order])
    names = [texts[index] for index in order if texts[index]]
    letters = _Letters(max(0.4, side / 1600), max(1, round(side / 1200)), max(2, round(side / 250)))
    if labelled.any() and len(boxes) <= MAX_LABELS and _leave_room(names, corners[labelled], letters):
        annotator = sv.LabelAnnotator(
            color=palette,
            text_scale=letters.scale,
            text_thickness=letters.thickness,
            text_padding=letters.padding,
            smart_position=True,
        )
        some = sv.Detections(xyxy=corners[labelled], class_id=np.flatnonzero(labelled))
        canvas = annotator.annotate(canvas, some, labels=names)
    return canvas


def _leave_room(names: Sequence[str], corners: np.ndarray, letters: _Letters) -> bool:
    """Whether labels leave the objects at [n, 4] xyxy to be seen."""
    if len(names) <= FEW_LABELS:
        return True
    sizes = [cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, letters.scale, letters.thickness)[0] for name in names]
    covered = (np.array(sizes) + 2 * letters.padding).prod(axis=1).sum()
    return bool(covered <= MAX_LABEL_SHARE * (corners[:, 2:] - corners[:, :2]).prod(axis=1).sum())


def _draw_mask(
    canvas: np.ndarray, region: tuple[int, int, np.ndarray], size: np.ndarray, colour: Colour, thickness: int
) -> None:
    """Fill and outline one mask on the canvas itself; only the pixels of its region are touched.

    supervision's annotators want every mask as a bitmap of the whole picture.
    """
    x, y, pixels = region
    if not pixels.size:
        return
    across, down = canvas.shape[1] / size[1], canvas.shape[0] / size[0]
    left, right = round(x * across), max(round(x * across) + 1, round((x + pixels.shape[1]) * across))
    top, bottom = round(y * down), max(round(y * down) + 1, round((y + pixels.shape[0]) * down))
    left, top = min(left, canvas.shape[1] - 1), min(top, canvas.shape[0] - 1)
    how = cv2.INTER_AREA if across < 1 else cv2.INTER_LINEAR
    share = cv2.resize(pixels.astype(np.uint8) * 255, (right - left, bottom - top), interpolation=how)
    on = (share >= 128)[: canvas.shape[0] - top, : canvas.shape[1] - left]
    patch = canvas[top : top + on.shape[0], left : left + on.shape[1]]
    filling = np.full_like(patch, colour)
    np.copyto(patch, cv2.addWeighted(patch, 1 - MASK_OPACITY, filling, MASK_OPACITY, 0), where=on[..., None])
    edges, _ = cv2.findContours(on.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    light = [round(value + OUTLINE_WHITE * (255 - value)) for value in colour]
    cv2.drawContours(canvas, edges, -1, light, thickness, cv2.LINE_AA)


def _interpolation(scale: float) -> int:
    return cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray,
    *,
    masks: Masks | None = None,
) -> np.ndarray:
    """A copy of a picture with what a detector found in it, each class in its own colour, best scores on top.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: [n, 4] xyxy in pixels of `image`, best first.
        labels: [n] int.
        names: n class names.
        scores: [n] in 0..1.
        masks: n, in pixels of `image`.
    """
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    return draw_boxes(image, boxes, texts, [class_colour(int(label)) for label in labels], masks=masks)


def encode_image(image: np.ndarray, suffix: str = ".jpg", *, quality: int = 90) -> bytes:
    """A picture as the content of a file.

    Args:
        image: uint8 [H, W, 3] RGB.
        suffix: Of the file, which tells the format: .jpg, .png, .webp, .bmp or .tif, or another name of these.
        quality: Of JPEG and WebP, at most 100.

    Raises:
        ValueError: The format cannot hold an image of this size.
    """
    options = {".webp": cv2.IMWRITE_WEBP_QUALITY, ".jpg": cv2.IMWRITE_JPEG_QUALITY, ".jpeg": cv2.IMWRITE_JPEG_QUALITY}
    chosen = [options[suffix.lower()], quality] if suffix.lower() in options else []
    try:
        encoded, content = cv2.imencode(suffix.lower(), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), chosen)
    except cv2.error:
        encoded, content = False, np.zeros(0, np.uint8)
    if not encoded:
        height, width = image.shape[:2]
        raise ValueError(
            f"an image of {width} x {height} pixels cannot be written as {suffix}: WebP holds at most 16,383 pixels "
            "per side, JPEG 65,500. Convert the input to PNG"
        )
    return content.tobytes()
