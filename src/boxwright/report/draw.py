"""Draw boxes, masks and labels on images of any size."""

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
"""Images whose long side is smaller are enlarged to this size before drawing, so that labels are legible."""
MAX_LABELS = 60
"""With more objects, no labels are drawn, and no boxes for objects with masks: only colours indicate the classes."""
FEW_LABELS = 8
"""Up to this number, labels are always drawn."""
MAX_LABEL_SHARE = 0.4
"""More than `FEW_LABELS` labels are drawn only if their total area is at most this share of the total box area.
Otherwise the labels of many small objects would hide other objects."""
MASK_OPACITY = 0.4
OUTLINE_WHITE = 0.4
"""Share of white that is mixed into the colour of mask outlines, so that they are visible on dark backgrounds."""


class _TextStyle(NamedTuple):
    """Size of labels, in the units of OpenCV and supervision."""

    scale: float
    thickness: int
    padding: int


def class_colour(label: int) -> Colour:
    """Colour (red, green, blue) of a class. It only depends on the label, and is dark enough for white text."""
    # Hue steps of the golden ratio give consecutive labels clearly different colours, for any number of classes.
    hue = (0.6 + label * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.42, 0.34, 0.48)[label % 3], 0.85)
    # Limit the relative luminance, so that white text has enough contrast.
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = min(1.0, (0.22 / luminance) ** (1 / 2.2))
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
    """Draw labelled boxes and, optionally, masks on a copy of an image. The first box is drawn on top.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: [n, 4] xyxy in pixels of `image`.
        texts: n labels; no label is drawn for an empty text.
        colours: n colours (red, green, blue).
        masks: n masks in pixels of `image`, drawn half-transparent with an outline, smaller masks on top of larger
            ones. With more than `MAX_LABELS` objects, only the masks are drawn.
        scale: factor by which the image is resized; None enlarges small images to `MIN_LONG_SIDE`.

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
    # supervision selects colours by class id, so that each box gets its own id. It writes BGR, the image is RGB.
    palette = sv.ColorPalette([sv.Color(*colours[index][::-1]) for index in order])
    corners = np.asarray(boxes, dtype=np.float64)[order] * np.tile([width / image.shape[1], height / image.shape[0]], 2)
    detections = sv.Detections(xyxy=corners, class_id=np.arange(len(order)))
    # In a long, narrow image, the size of lines and text follows the short side, so that they do not cover the image.
    side = min(max(width, height), 4 * min(width, height))
    thickness = max(2, round(side / 400))
    if masks is not None:
        thickness = max(1, thickness // 2)
        # Large masks first: a large mask on top would tint the smaller masks inside it.
        sizes = corners[:, 2:] - corners[:, :2]
        for index in order[np.argsort(-sizes.prod(axis=1), kind="stable")]:
            _draw_mask(canvas, masks.region(index), masks.sizes[index], colours[index], thickness)
    if masks is None or len(boxes) <= MAX_LABELS:
        canvas = sv.BoxAnnotator(color=palette, thickness=thickness).annotate(canvas, detections)
    labelled = np.array([bool(texts[index]) for index in order])
    names = [texts[index] for index in order if texts[index]]
    style = _TextStyle(max(0.4, side / 1600), max(1, round(side / 1200)), max(2, round(side / 250)))
    if labelled.any() and len(boxes) <= MAX_LABELS and _labels_fit(names, corners[labelled], style):
        annotator = sv.LabelAnnotator(
            color=palette,
            text_scale=style.scale,
            text_thickness=style.thickness,
            text_padding=style.padding,
            smart_position=True,
        )
        labelled_boxes = sv.Detections(xyxy=corners[labelled], class_id=np.flatnonzero(labelled))
        canvas = annotator.annotate(canvas, labelled_boxes, labels=names)
    return canvas


def _labels_fit(names: Sequence[str], corners: np.ndarray, style: _TextStyle) -> bool:
    """Whether the labels cover at most `MAX_LABEL_SHARE` of the area of the boxes, `corners` [n, 4] xyxy."""
    if len(names) <= FEW_LABELS:
        return True
    sizes = [cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, style.scale, style.thickness)[0] for name in names]
    covered = (np.array(sizes) + 2 * style.padding).prod(axis=1).sum()
    return bool(covered <= MAX_LABEL_SHARE * (corners[:, 2:] - corners[:, :2]).prod(axis=1).sum())


def _draw_mask(
    canvas: np.ndarray, region: tuple[int, int, np.ndarray], size: np.ndarray, colour: Colour, thickness: int
) -> None:
    """Draw the filling and the outline of one mask on the canvas, in place.

    Only the pixels of the mask's region are processed; supervision's annotators need bitmaps of the full image.
    """
    x, y, pixels = region
    if not pixels.size:
        return
    scale_x, scale_y = canvas.shape[1] / size[1], canvas.shape[0] / size[0]
    left, right = round(x * scale_x), max(round(x * scale_x) + 1, round((x + pixels.shape[1]) * scale_x))
    top, bottom = round(y * scale_y), max(round(y * scale_y) + 1, round((y + pixels.shape[0]) * scale_y))
    left, top = min(left, canvas.shape[1] - 1), min(top, canvas.shape[0] - 1)
    interpolation = cv2.INTER_AREA if scale_x < 1 else cv2.INTER_LINEAR
    coverage = cv2.resize(pixels.astype(np.uint8) * 255, (right - left, bottom - top), interpolation=interpolation)
    mask = (coverage >= 128)[: canvas.shape[0] - top, : canvas.shape[1] - left]
    patch = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    filling = np.full_like(patch, colour)
    np.copyto(patch, cv2.addWeighted(patch, 1 - MASK_OPACITY, filling, MASK_OPACITY, 0), where=mask[..., None])
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    outline_colour = [round(value + OUTLINE_WHITE * (255 - value)) for value in colour]
    cv2.drawContours(canvas, contours, -1, outline_colour, thickness, cv2.LINE_AA)


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
    """Draw detections on a copy of an image, with one colour per class and the highest scores on top.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: [n, 4] xyxy in pixels of `image`, sorted by descending score.
        labels: [n] int.
        names: n class names.
        scores: [n] in 0..1.
        masks: n masks in pixels of `image`.
    """
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    return draw_boxes(image, boxes, texts, [class_colour(int(label)) for label in labels], masks=masks)


def encode_image(image: np.ndarray, suffix: str = ".jpg", *, quality: int = 90) -> bytes:
    """Encode an image in a file format.

    Args:
        image: uint8 [H, W, 3] RGB.
        suffix: file name extension of the format: .jpg, .png, .webp, .bmp, .tif or one of their variants.
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
            "per side, JPEG 65,500. Convert the input to PNG."
        )
    return content.tobytes()
