"""What a detector found over a data set, as flat arrays, and its COCO results file.

N detections over M images; boxes here are COCO's (x, y, width, height) in pixels of the image file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from boxwright.data.categories import match_by_name
from boxwright.data.dataset import Category


@dataclass(frozen=True, kw_only=True)
class Results:
    """Detections over a data set, one row each, ordered by image and within an image as the detector gave them."""

    image_ids: np.ndarray
    """[N] int64, the data set's own image ids."""
    boxes: np.ndarray
    """[N, 4] float64, (x, y, width, height) in pixels of the file."""
    scores: np.ndarray
    """[N] float64 in 0..1."""
    labels: np.ndarray
    """[N] int64, rows of the categories that belong to these results."""
    evaluated: np.ndarray
    """[M] int64, every image the detector has seen, those without a detection included."""

    def __len__(self) -> int:
        """The number of detections."""
        return len(self.image_ids)

    def select(self, rows: np.ndarray) -> Results:
        """The detections at `rows` ([N] bool or [K] int); the evaluated images stay the same."""
        return Results(
            image_ids=self.image_ids[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            evaluated=self.evaluated,
        )

    def relabel(self, new_labels: Sequence[int]) -> Results:
        """The same detections with label `l` replaced by `new_labels[l]` (see `match_categories`)."""
        return replace(self, labels=np.asarray(new_labels, dtype=np.int64)[self.labels])


class _Row(msgspec.Struct):
    """One entry of a COCO results file; whatever else an entry holds (a mask, say) is passed over."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


def match_categories(model: Sequence[Category], data: Sequence[Category]) -> list[int]:
    """For each category of the model, the row of the same-named one in the data set (see `match_by_name`).

    Raises:
        ValueError: The two sides do not have the same names; the message lists what each side alone has.
    """
    return match_by_name(
        model,
        data,
        sides=("the model", "the data set"),
        what="the data set's categories are not the model's",
        mend="Test on data with the model's categories, or train on this data set.",
    )


def write_results(path: Path, results: Results, categories: Sequence[Category]) -> None:
    """Write a COCO results file: `[{image_id, category_id, bbox: [x, y, width, height], score}, ...]`.

    The file appears whole or not at all, and holds the numbers to the last digit: measuring the file gives what
    measuring `results` gives.
    """
    category_ids = np.array([category.id for category in categories], dtype=np.int64)[results.labels]
    rows = zip(
        results.image_ids.tolist(),
        category_ids.tolist(),
        results.boxes.tolist(),
        results.scores.tolist(),
        strict=True,
    )
    write_json(path, [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows])


def read_results(path: Path, categories: Sequence[Category], evaluated: Sequence[int] | None = None) -> Results:
    """Read a COCO results file of boxes, from whatever program.

    Args:
        path: The file.
        categories: The data set's categories, whose ids the file uses; labels are rows of it.
        evaluated: The image ids that the detector has seen; left out, those that occur in the file.

    Raises:
        ValueError: The file is not in COCO results form, or names a category that the data set does not have.
    """
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[_Row])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a COCO results file of boxes: {error}") from error
    labels = {category.id: label for label, category in enumerate(categories)}
    unknown = sorted({row.category_id for row in rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{path} has detections of category ids {unknown[:10]}, which the data set does not have: "
            "it belongs to another data set"
        )
    image_ids = np.array([row.image_id for row in rows], dtype=np.int64)
    return Results(
        image_ids=image_ids,
        boxes=np.array([row.bbox for row in rows], dtype=np.float64).reshape(-1, 4),
        scores=np.array([row.score for row in rows], dtype=np.float64),
        labels=np.array([labels[row.category_id] for row in rows], dtype=np.int64),
        evaluated=np.unique(image_ids) if evaluated is None else np.asarray(evaluated, dtype=np.int64),
    )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; the file appears whole or not at all."""
    write_whole(path, msgspec.json.encode(value))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that no reader and no crash meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:  # of a full disk, Python does not say which file
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
