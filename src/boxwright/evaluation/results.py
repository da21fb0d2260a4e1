"""What a detector found over a data set, as flat arrays, and its COCO results file.

N detections over M images; boxes here are COCO's (x, y, width, height) in pixels of the image file.
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
"""Masks of a file are checked in pieces, whose runs fit a processor's cache."""
_NOT_FINITE = re.compile(rb"(?<=[:,\[\s])-?(?:NaN|Infinity)\b")
_BOX_FORM = "give boxes as [x, y, width, height], where (x, y) is the upper left corner"


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
    masks: Masks | None = None
    """N masks in pixels of the files; None of a detector of boxes alone."""

    def __len__(self) -> int:
        """The number of detections."""
        return len(self.image_ids)

    def check(self, num_categories: int | None = None) -> None:
        """Check that every detection has a finite score, a finite box of width and height 0 or more, and a category.

        COCO's API measures anything: it ranks NaN last, ignores a box with one negative side, because the area is
        negative, and counts a box with two negative sides as a false positive.

        Args:
            num_categories: Number of categories that labels are rows of; None if labels play no part.

        Raises:
            ValueError: A detection has not; the first such row is named.
        """
        if num_categories is not None:
            faulty = np.flatnonzero((self.labels < 0) | (self.labels >= num_categories))
            if len(faulty):
                row = faulty[0]
                raise ValueError(
                    f"detection {row} has the label {self.labels[row]} ({len(faulty)} of {len(self)} detections are "
                    f"of no category): labels are rows of the categories, 0 to {num_categories - 1}"
                )
        for name, values in (("score", self.scores[:, None]), ("box", self.boxes)):
            faulty = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(faulty):
                row = faulty[0]
                raise ValueError(
                    f"detection {row} has the {name} {values[row].tolist()}, which is not finite ({len(faulty)} of "
                    f"{len(self)} detections): leave out what is no number, and look for the cause in the detector"
                )
        negative = np.flatnonzero((self.boxes[:, 2:] < 0).any(axis=1))
        if len(negative):
            row = negative[0]
            raise ValueError(
                f"detection {row} has the box {self.boxes[row].tolist()} of negative width or height ({len(negative)} "
                f"of {len(self)} detections): {_BOX_FORM}"
            )

    def select(self, rows: np.ndarray) -> Results:
        """The detections at `rows` ([N] bool or [K] int); the evaluated images stay the same."""
        return Results(
            image_ids=self.image_ids[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            evaluated=self.evaluated,
            masks=None if self.masks is None else self.masks.select(rows),
        )

    def relabel(self, new_labels: Sequence[int]) -> Results:
        """The same detections with label `l` replaced by `new_labels[l]` (see `match_categories`); -1 drops them."""
        relabelled = replace(self, labels=np.asarray(new_labels, dtype=np.int64)[self.labels])
        return relabelled if min(new_labels, default=0) >= 0 else relabelled.select(relabelled.labels >= 0)


class _Mask(msgspec.Struct):
    size: tuple[_Length, _Length]
    counts: str | list[_Run]


def join(parts: Sequence[Results]) -> Results:
    """The detections of several results over the same images, one after the other; all have masks or none has."""
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
    """One entry of a COCO results file; whatever else an entry holds is passed over.

    So are polygons: the COCO API puts the outline of each box there when it has read a file of boxes.
    """

    image_id: _Id
    category_id: _Id
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: _Mask | list[Any] | None = None


def match_categories(model: Sequence[Category], data: Sequence[Category]) -> list[int]:
    """For each category of the model, the row of the same-named one in the data set (see `match_by_name`).

    It is -1 for what the model has rows for and no name (`UNUSED`) and the data set has not.

    Raises:
        ValueError: The two sides do not have the same names; the message lists what each side alone has.
    """
    names = {category.name for category in data}
    used = [category for category in model if category.name in names or not category.name.startswith(UNUSED)]
    rows = match_by_name(
        used,
        data,
        sides=("the model", "the data set"),
        what="the data set's categories are not the model's",
        mend="Test on data with the model's categories, or train on this data set.",
    )
    row_of = dict(zip(map(id, used), rows, strict=True))
    return [row_of.get(id(category), -1) for category in model]


def write_results(path: Path, results: Results, categories: Sequence[Category]) -> None:
    """Write a COCO results file: `[{image_id, category_id, bbox: [x, y, width, height], score}, ...]`.

    Results with masks have `segmentation: {size: [height, width], counts}` as well, in COCO's compressed form. The file
    appears whole or not at all, and holds the numbers to the last digit: measuring the file gives what measuring
    `results` gives.
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
    """Read a COCO results file of boxes, masks or both, from any program.

    Where an entry has a mask alone, its box is the smallest one around the mask. Scores may be any finite numbers: only
    their order matters. Boxes of width or height 0 are kept, as false positives.

    Args:
        path: The file.
        categories: The data set's categories, whose ids the file uses; labels are rows of it.
        evaluated: The image ids that the detector has seen; left out, those that occur in the file.

    Raises:
        ValueError: The file is not in COCO results form, has a category that the data set does not have, NaN,
            infinity, or a box of negative width or height. `coco_metrics` refuses images that the data set does not
            have.
    """
    content = path.read_bytes()
    try:
        rows = msgspec.json.decode(content, type=list[_Row])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if word := _NOT_FINITE.search(content):
            raise ValueError(
                f"{path} holds {word[0].decode()} at byte {word.start()}: scores and boxes are finite numbers. "
                "Leave such detections out, and look for the cause in the program that wrote the file"
            ) from error
        raise ValueError(f"{path} is not a COCO results file of boxes or masks: {error}") from error
    labels = {category.id: label for label, category in enumerate(categories)}
    unknown = sorted({row.category_id for row in rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{path} has detections of category ids {unknown[:10]}, which the data set does not have: "
            "it belongs to another data set"
        )
    image_ids = np.array([row.image_id for row in rows], dtype=np.int64)
    masks = _masks(path, rows)
    boxes = [row.bbox for row in rows]
    if None in boxes:
        if masks is None:
            number = boxes.index(None) + 1
            raise ValueError(f"{path}: entry {number} has neither a bbox nor a segmentation: correct or remove it")
        around = hotcoco.mask.to_bbox(masks.to_coco()).tolist()
        boxes = [least if box is None else box for box, least in zip(boxes, around, strict=True)]
    box_array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    negative = np.flatnonzero((box_array[:, 2:] < 0).any(axis=1))
    if len(negative):
        raise ValueError(
            f"{path}: entry {negative[0] + 1} has the bbox {list(boxes[negative[0]])} of negative width or height "
            f"({len(negative)} of {len(rows)} entries): {_BOX_FORM}"
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
    """The masks of a results file, if it has any.

    Raises:
        ValueError: Some entries have a mask and others none, or one is not in COCO's form.
    """
    given = [row.segmentation for row in rows if isinstance(row.segmentation, _Mask)]
    if not given:
        return None
    if len(given) < len(rows):
        raise ValueError(
            f"{path}: {len(given)} of {len(rows)} entries have a segmentation: give one to each, or to none"
        )
    sizes = np.array([mask.size for mask in given], dtype=np.int64)
    written = [mask.counts.encode() if isinstance(mask.counts, str) else rle.compress(mask.counts) for mask in given]
    totals = np.zeros(len(written), np.int64)
    for start in range(0, len(written), _MASKS_AT_ONCE):
        try:
            runs, lengths = rle.decompress_all(written[start : start + _MASKS_AT_ONCE])
        except ValueError as error:
            raise ValueError(f"{path}: a segmentation is {error}: correct it, or write it anew") from error
        negative = np.flatnonzero(runs < 0)
        if len(negative):
            number = start + int(np.searchsorted(np.cumsum(lengths), negative[0], side="right")) + 1
            raise ValueError(f"{path}: the mask of entry {number} has a run of less than no pixels: write it anew")
        sums = np.concatenate([[0], np.cumsum(runs)])[np.cumsum(lengths)]
        totals[start : start + _MASKS_AT_ONCE] = np.diff(sums, prepend=0)
    wrong = np.flatnonzero(totals != sizes.prod(axis=1))
    if len(wrong):
        number, (height, width) = wrong[0], sizes[wrong[0]]
        raise ValueError(
            f"{path}: the mask of entry {number + 1} has runs of {totals[number]} pixels in all for a picture of "
            f"{height} x {width}: correct or remove it"
        )
    return Masks.of(written, sizes)


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
