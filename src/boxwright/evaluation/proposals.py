"""Average recall of proposals, regardless of class: the fraction of objects covered by the best 100, 300, 1000 boxes.

The metrics equal COCO's with `useCats = 0`. Recall needs no ranking over the data set, so images are counted one by one
and not stored. n proposals and g objects of one image; A areas, T IoU thresholds, M limits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Dataset
from boxwright.evaluation.coco import AREA_SUFFIXES, mean_measured
from boxwright.evaluation.ground_truth import check_images
from boxwright.evaluation.objects import read_objects
from boxwright.evaluation.results import Results

LIMITS = (100, 300, 1000)
THRESHOLDS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
_AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))

_NEVER = 2**31
_Edge = tuple[int, int, float]
"""Rank of a proposal, index of an object that it overlaps, and their IoU."""


class RecallCounter:
    """Counts, image by image, the objects that are covered by the best proposals."""

    def __init__(self, dataset: Dataset, limits: Sequence[int] = LIMITS) -> None:
        """Read the objects of a data set.

        Args:
            dataset: Data set with the ground truth (see `read_objects`).
            limits: Ascending limits of proposals per image; the best proposals are used.
        """
        assert list(limits) == sorted(limits)
        self.limits = tuple(limits)
        objects = read_objects(dataset)
        self.image_ids = frozenset(image["id"] for image in objects.images)
        """Ids of all images of the data set."""
        columns = objects.columns
        order = np.argsort(columns["image_ids"], kind="stable")
        # Objects in crowd regions are neither true nor false positives.
        order = order[~columns["iscrowd"][order].astype(bool)]
        self._object_images, self._boxes, areas = (columns[name][order] for name in ("image_ids", "boxes", "area"))
        low, high = np.array(_AREAS).T[..., None]
        self._in_area: NDArray[np.bool_] = (areas >= low) & (areas <= high)
        self.counts = np.zeros((len(_AREAS), 1 + len(THRESHOLDS) * len(limits)), np.int64)
        """[A, 1 + T x M] int64, number of objects so far, and of those covered; sum over ranks for the total."""

    def add(self, image_id: int, boxes: NDArray[np.float64]) -> None:
        """Count an image.

        Args:
            image_id: Id of an image of the data set; each image must be added only once.
            boxes: [n, 4] (x, y, width, height) in pixels of the file, best first.

        Raises:
            ValueError: The image is not in the data set.
        """
        if image_id not in self.image_ids:
            raise ValueError(
                f"image id {image_id} is not in the ground truth: the proposals belong to another data set or split. "
                "Write proposals for this split with boxwright propose."
            )
        objects = slice(*np.searchsorted(self._object_images, [image_id, image_id + 1]).tolist())
        in_area = self._in_area[:, objects]
        self.counts[:, 0] += in_area.sum(1)
        ious = _iou(boxes[: self.limits[-1]], self._boxes[objects])
        rows, object_indices = np.nonzero(ious >= THRESHOLDS[0])
        edges: list[_Edge] = list(
            zip(rows.tolist(), object_indices.tolist(), ious[rows, object_indices].tolist(), strict=True)
        )
        ranks = np.full((len(_AREAS), len(THRESHOLDS), ious.shape[1]), _NEVER)
        for t, threshold in enumerate(THRESHOLDS):
            edges = [edge for edge in edges if edge[2] >= threshold]
            if len({rank for rank, _, _ in edges}) == len(edges):  # each proposal overlaps one object: no choice
                ranks[:, t] = np.where(in_area, _match(edges, in_area[0].tolist()), _NEVER)
            else:
                ranks[:, t] = [_match(edges, members) for members in in_area.tolist()]
        self.counts[:, 1:] += (ranks[..., None] < self.limits).sum(2).reshape(len(_AREAS), -1)

    def recall(self) -> dict[str, float]:
        """Recall averaged over IoU 0.50:0.95, by name (see `recall_names`), in 0..1; -1 if there is no object."""
        total = self.counts[:, :1, None]
        covered = self.counts[:, 1:].reshape(len(_AREAS), len(THRESHOLDS), len(self.limits))
        recall = np.where(total > 0, covered / np.maximum(total, 1), -1.0)
        values = [mean_measured(recall[area, :, m]) for area in range(len(_AREAS)) for m in range(len(self.limits))]
        return dict(zip(recall_names(self.limits), values, strict=True))


def recall_names(limits: Sequence[int] = LIMITS) -> list[str]:
    """Names of the recalls: `AR@100` ... over all objects, then `ARs@...`, `ARm@...`, `ARl@...` by area."""
    return [f"AR{suffix}@{limit}" for suffix in AREA_SUFFIXES for limit in limits]


def proposal_recall(dataset: Dataset, results: Results, *, limits: Sequence[int] = LIMITS) -> dict[str, float]:
    """Average recall of proposals.

    Args:
        dataset: Data set with the ground truth.
        results: Proposals; recall is computed on the `evaluated` images. Labels are ignored.
        limits: See `RecallCounter`.

    Raises:
        ValueError: As `check_images` and `Results.check`.
    """
    counter = RecallCounter(dataset, limits)
    check_images(results, counter.image_ids)
    results.check()
    order = np.lexsort([-results.scores, results.image_ids])
    image_ids, boxes = results.image_ids[order], results.boxes[order]
    starts = np.searchsorted(image_ids, results.evaluated)
    ends = np.searchsorted(image_ids, results.evaluated, side="right")
    for image_id, start, end in zip(results.evaluated.tolist(), starts.tolist(), ends.tolist(), strict=True):
        counter.add(image_id, boxes[start:end])
    return counter.recall()


def _match(edges: Sequence[_Edge], members: Sequence[bool]) -> list[int]:
    """Match each proposal, best first, with the unmatched object that it overlaps most.

    Args:
        edges: Overlaps above the IoU threshold, sorted by rank, then by object.
        members: Whether each object counts.

    Returns:
        Rank of the proposal that each object is matched with, or `_NEVER`.
    """
    ranks = [_NEVER] * len(members)
    current, best_object, best_iou = _NEVER, -1, 0.0
    for rank, object_index, overlap in edges:
        if rank != current:
            if best_object >= 0:
                ranks[best_object] = current
            current, best_object, best_iou = rank, -1, 0.0
        # Of equal overlaps pycocotools uses the last.
        if members[object_index] and ranks[object_index] == _NEVER and overlap >= best_iou:
            best_object, best_iou = object_index, overlap
    if best_object >= 0:
        ranks[best_object] = current
    return ranks


def _iou(proposals: NDArray[np.float64], objects: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, g] IoU of boxes (x, y, width, height), bitwise equal to COCO's: same order of operations."""
    px, py, pw, ph = (column[:, None] for column in proposals.T)
    ox, oy, ow, oh = objects.T
    width = np.minimum(px + pw, ox + ow) - np.maximum(px, ox)
    height = np.minimum(py + ph, oy + oh) - np.maximum(py, oy)
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    union = pw * ph + ow * oh - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
