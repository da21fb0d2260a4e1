"""The section of the report with the worst images: ground truth and predictions side by side."""

from __future__ import annotations

import base64
from html import escape

import numpy as np

from boxwright.data.dataset import Dataset, DatasetInfo
from boxwright.data.masks import Masks
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.mistakes import ImageMistakes, Mistakes
from boxwright.report.draw import Colour, draw_boxes, encode_image

RIGHT: Colour = (31, 111, 214)
WRONG: Colour = (214, 78, 12)
NEUTRAL: Colour = (105, 105, 105)
IMAGE_SIDE = 640


def worst_images(dataset: Dataset, truth: GroundTruth, mistakes: Mistakes, num_images: int) -> str:
    """HTML section with the worst images, ground truth and predictions side by side."""
    worst = mistakes.images[:num_images]
    positions = _positions(dataset, {image.image_id for image in worst})
    rows_of: dict[int, list[int]] = {image.image_id: [] for image in worst}
    for row, image_id in enumerate(mistakes.results.image_ids.tolist()):
        if image_id in rows_of:
            rows_of[image_id].append(row)
    cards = "".join(
        _card(dataset, positions[image.image_id], truth, mistakes, image, rows_of[image.image_id]) for image in worst
    )
    note = (
        f"The {len(worst)} worst of {len(mistakes.images):,} images, by ascending F1 (box IoU {mistakes.iou:g}, score "
        f"threshold {mistakes.score:g}), then by descending number of mistakes. Left: annotated objects. Right: "
        "predictions."
    )
    keys = (
        f'<span class="key"><i style="background:rgb{RIGHT}"></i>matched</span>'
        f'<span class="key"><i style="background:rgb{WRONG}"></i>missed (left) or wrong (right)</span>'
        f'<span class="key"><i style="background:rgb{NEUTRAL}"></i>crowd region, not counted</span>'
    )
    return (
        f'<section><h2>Worst images</h2><p class="note">{note}</p><div class="legend">{keys}</div>'
        f'<div class="cards">{cards}</div></section>'
    )


def _positions(dataset: Dataset, selected_ids: set[int]) -> dict[int, int]:
    """Positions of the selected images in the dataset, by image id."""
    ids = DatasetInfo(dataset).image_ids.tolist()
    return {image_id: position for position, image_id in enumerate(ids) if image_id in selected_ids}


def _card(
    dataset: Dataset, position: int, truth: GroundTruth, mistakes: Mistakes, image: ImageMistakes, rows: list[int]
) -> str:
    """HTML figure of one image, with its ground truth and its predictions."""
    sample = dataset[position]
    names = {category.id: category.name for category in truth.categories}
    objects = truth.coco.load_anns(truth.coco.get_ann_ids(img_ids=[image.image_id]))
    objects = [annotation for annotation in objects if annotation["category_id"] in names]
    object_colours = [
        NEUTRAL if annotation.get("iscrowd") else WRONG if annotation["id"] in mistakes.missed else RIGHT
        for annotation in objects
    ]
    pred_masks = mistakes.results.masks
    annotated = _image_html(
        sample.image,
        np.array([annotation["bbox"] for annotation in objects], dtype=np.float64).reshape(-1, 4),
        [names[annotation["category_id"]] for annotation in objects],
        object_colours,
        None if pred_masks is None else truth.masks(objects),
    )
    rows = sorted(rows, key=lambda row: -mistakes.results.scores[row])
    labels = [truth.categories[label].name for label in mistakes.results.labels[rows]]
    predicted = _image_html(
        sample.image,
        mistakes.results.boxes[rows],
        [f"{name} {score:.2f}" for name, score in zip(labels, mistakes.results.scores[rows], strict=True)],
        [NEUTRAL if mistakes.ignored[row] else RIGHT if mistakes.right[row] else WRONG for row in rows],
        None if pred_masks is None else pred_masks.select(np.array(rows, dtype=np.int64)),
    )
    counts = f"{image.num_right} right · {image.num_wrong} wrong · {image.num_missed} missed"
    caption = f"<b>{escape(sample.file_name)}</b><span>F1 {image.f1:.2f} · {counts}</span>"
    pair = f'<div class="pair">{annotated}{predicted}</div>'
    return f'<figure class="card">{pair}<figcaption>{caption}</figcaption></figure>'


def _image_html(
    image: np.ndarray, boxes: np.ndarray, texts: list[str], colours: list[Colour], masks: Masks | None
) -> str:
    """HTML image with embedded pixel data, on which boxes (x, y, width, height) and masks are drawn."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    drawn = draw_boxes(image, corners, texts, colours, masks=masks, scale=IMAGE_SIDE / max(image.shape[:2]))
    content = base64.b64encode(encode_image(drawn, quality=80)).decode()
    height, width = drawn.shape[:2]
    return f'<img loading="lazy" alt="" width="{width}" height="{height}" src="data:image/jpeg;base64,{content}">'
