"""Detections over a data set as flat arrays, and COCO results files.

N detections in M images; boxes are COCO's (x, y, width, height) in pixels of the image file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

from boxwright.data.categories import UNUSED, match_by_name
from boxwright.data.dataset import Category
from boxwright.data.masks import Masks, rle

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Run = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_MASKS_AT_ONCE = 500
"""Number of masks of a file that are checked at once; their runs fit into the CPU's cache."""
_NOT_FINITE = re.compile(rb"(?<=[:,\[\s])-?(?:NaN|Infinity)\b")
_BOX_FORM = "Write boxes as [x, y, width, height], where (x, y) is the upper left corner."


@dataclass(frozen=True, kw_only=True)
class Results:
    """Detections over a data set, one per row, sorted by image and, within an image, in the order of the detector."""

    image_ids: np.ndarray
    """[N] int64, image ids of the data set."""
    boxes: np.ndarray
    """[N, 4] float64, (x, y, width, height) in pixels of the file."""
    scores: np.ndarray
    """[N] float64 in 0..1."""
    labels: np.ndarray
    """[N] int64, indices into the categories that belong to these results."""
    evaluated: np.ndarray
    """[M] int64, ids of all images that the detector was applied to, including images without detections."""
    masks: Masks | None = None
    """N masks in pixels of the files, or None for a detector without masks."""

    def __len__(self) -> int:
        """The number of detections."""
        return len(self.image_ids)

    def check(self, num_categories: int | None = None) -> None:
        """Check that every detection has a finite score, a finite box of non-negative size, and a category.

        The COCO API accepts anything: it ranks NaN last, ignores a box with one negative side, because the area is
        negative, and counts a box with two negative sides as a false positive.

        Args:
            num_categories: Number of categories that labels are rows of; None if labels play no part.

        Raises:
            ValueError: A detection is invalid; the message has the index of the first.
        """
        if num_categories is not None:
            faulty = np.flatnonzero((self.labels < 0) | (self.labels >= num_categories))
            if len(faulty):
                row = faulty[0]
                raise ValueError(
                    f"detection {row}: label: expected an index of a category, 0 to {num_categories - 1}, got "
                    f"{self.labels[row]} (invalid labels: {len(faulty)} of {len(self)}). Correct the detector's labels."
                )
        for name, values in (("score", self.scores[:, None]), ("box", self.boxes)):
            faulty = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(faulty):
                row = faulty[0]
                raise ValueError(
                    f"detection {row}: {name} {values[row].tolist()} is not finite ({len(faulty)} of {len(self)} "
                    "detections). Remove such detections, and find the cause in the detector."
                )
        negative = np.flatnonzero((self.boxes[:, 2:] < 0).any(axis=1))
        if len(negative):
            row = negative[0]
            raise ValueError(
                f"detection {row}: box {self.boxes[row].tolist()} has a negative width or height ({len(negative)} of "
                f"{len(self)} detections). {_BOX_FORM}"
            )

    def select(self, rows: np.ndarray) -> Results:
        """Detections at `rows` ([N] bool or [K] int); the evaluated images are unchanged."""
        return Results(
            image_ids=self.image_ids[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            evaluated=self.evaluated,
            masks=None if self.masks is None else self.masks.select(rows),
        )

    def relabel(self, new_labels: Sequence[int]) -> Results:
        """Replace each label `l` by `new_labels[l]` (see `match_categories`); -1 drops the detections."""
        relabelled = replace(self, labels=np.asarray(new_labels, dtype=np.int64)[self.labels])
        return relabelled if min(new_labels, default=0) >= 0 else relabelled.select(relabelled.labels >= 0)


class _Mask(msgspec.Struct):
    size: tuple[_Length, _Length]
    counts: str | list[_Run]


def join(parts: Sequence[Results]) -> Results:
    """Concatenate results on the same images; either all have masks or none has."""
    first, masks = parts[0], [part.masks for part in parts if part.masks is not None]
    assert len(masks) in (0, len(parts))
    return Results(
        image_ids=np.concatenate([part.image_ids for part in parts]),
        boxes=np.concatenate([part.boxes for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        evaluated=first.evaluated,
        masks=Masks(np.concatenate([part.counts for part in masks]), np.concatenate([part.sizes for part in masks]))
        if masks
        else None,
    )


class _Row(msgspec.Struct):
    """One entry of a COCO results file; other fields of an entry are ignored.

    Polygons are ignored too: the COCO API adds the outline of each box when it reads a file of boxes.
    """

    image_id: _Id
    category_id: _Id
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: _Mask | list[Any] | None = None


def match_categories(model: Sequence[Category], data: Sequence[Category]) -> list[int]:
    """For each category of the model, the index of the category of the same name in the data set (see `match_by_name`).

    The index is -1 for placeholder categories of the model (`UNUSED`) that the data set does not have.

    Raises:
        ValueError: The model and the data set have different category names; the message lists the differences.
    """
    names = {category.name for category in data}
    used = [category for category in model if category.name in names or not category.name.startswith(UNUSED)]
    rows = match_by_name(
        used,
        data,
        sides=("the model", "the data set"),
        what="the data set's categories are not the model's",
        fix="Test on data with the model's categories, or train on this data set.",
    )
    row_of = dict(zip(map(id, used), rows, strict=True))
    return [row_of.get(id(category), -1) for category in model]


def write_results(path: Path, results: Results, categories: Sequence[Category]) -> None:
    """Write a COCO results file: `[{image_id, category_id, bbox: [x, y, width, height], score}, ...]`.

    Results with masks also have `segmentation: {size: [height, width], counts}`, in COCO's compressed form. The file is
    written atomically, and with all digits: evaluating the file gives the same metrics as evaluating `results`.
    """
    category_ids = np.array([category.id for category in categories], dtype=np.int64)[results.labels]
    rows = zip(
        results.image_ids.tolist(),
        category_ids.tolist(),
        results.boxes.tolist(),
        results.scores.tolist(),
        strict=True,
    )
    entries: list[dict[str, Any]] = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
    if results.masks is not None:
        for entry, mask in zip(entries, results.masks.to_coco(), strict=True):
            entry["segmentation"] = mask
    write_json(path, entries)


def read_results(path: Path, categories: Sequence[Category], evaluated: Sequence[int] | None = None) -> Results:
    """Read a COCO results file of boxes, masks or both, written by any program.

    The box of an entry with only a mask is the bounding box of the mask. Scores may be any finite numbers, since only
    their order matters. Boxes with width or height 0 are kept, as false positives.

    Args:
        path: Results file.
        categories: Categories of the data set, whose ids the file uses; labels are indices into them.
        evaluated: Ids of the images that the detector was applied to; None for the images in the file.

    Raises:
        ValueError: The file is not in COCO results format, has a category that the data set does not have, NaN,
            infinity, or a box with negative width or height. `coco_metrics` rejects images that the data set does not
            have.
    """
    content = path.read_bytes()
    try:
        rows = msgspec.json.decode(content, type=list[_Row])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if word := _NOT_FINITE.search(content):
            raise ValueError(
                f"{path} contains {word[0].decode()} at byte {word.start()}, but scores and boxes must be finite. "
                "Remove such detections, and find the cause in the program that wrote the file."
            ) from error
        raise ValueError(f"{path} is not a COCO results file of boxes or masks: {error}") from error
    labels = {category.id: label for label, category in enumerate(categories)}
    unknown = sorted({row.category_id for row in rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{path}: category ids {unknown[:10]} are not in the data set, so the file belongs to another data set. "
            "Evaluate it on the data set that it comes from."
        )
    image_ids = np.array([row.image_id for row in rows], dtype=np.int64)
    masks = _masks(path, rows)
    boxes = [row.bbox for row in rows]
    if None in boxes:
        if masks is None:
            number = boxes.index(None) + 1
            raise ValueError(f"{path}: entry {number} has neither a bbox nor a segmentation. Correct or remove it.")
        around = hotcoco.mask.to_bbox(masks.to_coco()).tolist()
        boxes = [least if box is None else box for box, least in zip(boxes, around, strict=True)]
    box_array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    negative = np.flatnonzero((box_array[:, 2:] < 0).any(axis=1))
    if len(negative):
        raise ValueError(
            f"{path}: entry {negative[0] + 1}: bbox {list(boxes[negative[0]])} has a negative width or height "
            f"({len(negative)} of {len(rows)} entries). {_BOX_FORM}"
        )
    return Results(
        image_ids=image_ids,
        boxes=box_array,
        scores=np.array([row.score for row in rows], dtype=np.float64),
        labels=np.array([labels[row.category_id] for row in rows], dtype=np.int64),
        evaluated=np.unique(image_ids) if evaluated is None else np.asarray(evaluated, dtype=np.int64),
        masks=masks,
    )


def _masks(path: Path, rows: Sequence[_Row]) -> Masks | None:
    """Masks of a results file; None if it has none.

    Raises:
        ValueError: Only some entries have a mask, or a mask is not in COCO's format.
    """
    entries = [row.segmentation for row in rows if isinstance(row.segmentation, _Mask)]
    if not entries:
        return None
    if len(entries) < len(rows):
        raise ValueError(
            f"{path}: {len(entries)} of {len(rows)} entries have a segmentation. Either all or none must have one."
        )
    sizes = np.array([mask.size for mask in entries], dtype=np.int64)
    written = [mask.counts.encode() if isinstance(mask.counts, str) else rle.compress(mask.counts) for mask in entries]
    totals = np.zeros(len(written), np.int64)
    for start in range(0, len(written), _MASKS_AT_ONCE):
        try:
            runs, lengths = rle.decompress_all(written[start : start + _MASKS_AT_ONCE])
        except ValueError as error:
            raise ValueError(
                f"{path}: mask of an entry from {start + 1} to {min(start + _MASKS_AT_ONCE, len(written))}: "
                f"{error}. Write the file again."
            ) from error
        negative = np.flatnonzero(runs < 0)
        if len(negative):
            number = start + int(np.searchsorted(np.cumsum(lengths), negative[0], side="right")) + 1
            raise ValueError(f"{path}: mask of entry {number} has a negative run length. Write the file again.")
        sums = np.concatenate([[0], np.cumsum(runs)])[np.cumsum(lengths)]
        totals[start : start + _MASKS_AT_ONCE] = np.diff(sums, prepend=0)
    wrong = np.flatnonzero(totals != sizes.prod(axis=1))
    if len(wrong):
        number, (height, width) = wrong[0], sizes[wrong[0]]
        raise ValueError(
            f"{path}: mask of entry {number + 1} has run lengths of {totals[number]} pixels in total, but its size is "
            f"{height} x {width}. Correct or remove it."
        )
    return Masks.of(written, sizes)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_whole(path, msgspec.json.encode(value))


def write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that readers never see, and crashes never leave, an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:  # for a full disk, Python's message does not contain the path
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
