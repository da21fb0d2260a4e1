"""Average recall of proposals, classes ignored: how much of what is there the best 100, 300, 1000 boxes cover.

The numbers are COCO's with `useCats = 0`. Recall needs no ranking over the data set, so that images are counted one by
one and nothing of them is kept. n proposals and g objects of one image; A areas, T IoU thresholds, M limits.
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
"""The rank of a proposal, an object that it overlaps, and their IoU."""


class RecallCounter:
    """Counts, image by image, the objects that the best proposals cover."""

    def __init__(self, dataset: Dataset, limits: Sequence[int] = LIMITS) -> None:
        """Read the objects of a data set.

        Args:
            dataset: Its objects are read as for other measures (see `read_objects`).
            limits: Rising numbers of best-scored boxes an image that are looked at.
        """
        assert list(limits) == sorted(limits)
        self.limits = tuple(limits)
        objects = read_objects(dataset)
        self.image_ids = frozenset(image["id"] for image in objects.images)
        """Of all images of the data set."""
        columns = objects.columns
        order = np.argsort(columns["image_ids"], kind="stable")
        # What lies in crowd regions is neither right nor wrong.
        order = order[~columns["iscrowd"][order].astype(bool)]
        self._object_images, self._boxes, areas = (columns[name][order] for name in ("image_ids", "boxes", "area"))
        low, high = np.array(_AREAS).T[..., None]
        self._in_area: NDArray[np.bool_] = (areas >= low) & (areas <= high)
        self.counts = np.zeros((len(_AREAS), 1 + len(THRESHOLDS) * len(limits)), np.int64)
        """[A, 1 + T x M] int64, the objects of the images so far and those covered; of several ranks, to be summed."""

    def add(self, image_id: int, boxes: NDArray[np.float64]) -> None:
        """Count an image.

        Args:
            image_id: Of an image of the data set; each is counted once.
            boxes: [n, 4] (x, y, width, height) in pixels of the file, best first.

        Raises:
            ValueError: The data set does not have the image.
        """
        if image_id not in self.image_ids:
            raise ValueError(
                f"image id {image_id} was evaluated but is not in the ground truth: the proposals belong to another "
                "data set or split"
            )
        objects = slice(*np.searchsorted(self._object_images, [image_id, image_id + 1]).tolist())
        in_area = self._in_area[:, objects]
        self.counts[:, 0] += in_area.sum(1)
        ious = _iou(boxes[: self.limits[-1]], self._boxes[objects])
        rows, things = np.nonzero(ious >= THRESHOLDS[0])
        edges: list[_Edge] = list(zip(rows.tolist(), things.tolist(), ious[rows, things].tolist(), strict=True))
        ranks = np.full((len(_AREAS), len(THRESHOLDS), ious.shape[1]), _NEVER)
        for t, threshold in enumerate(THRESHOLDS):
            edges = [edge for edge in edges if edge[2] >= threshold]
            if len({rank for rank, _, _ in edges}) == len(edges):  # no proposal has a choice, so areas do not matter
                ranks[:, t] = np.where(in_area, _match(edges, in_area[0].tolist()), _NEVER)
            else:
                ranks[:, t] = [_match(edges, members) for members in in_area.tolist()]
        self.counts[:, 1:] += (ranks[..., None] < self.limits).sum(2).reshape(len(_AREAS), -1)

    def recall(self) -> dict[str, float]:
        """Recall averaged over IoU 0.50:0.95 (see `recall_names`), in 0..1; -1 where there is no such object."""
        total = self.counts[:, :1, None]
        covered = self.counts[:, 1:].reshape(len(_AREAS), len(THRESHOLDS), len(self.limits))
        recall = np.where(total > 0, covered / np.maximum(total, 1), -1.0)
        values = [mean_measured(recall[area, :, m]) for area in range(len(_AREAS)) for m in range(len(self.limits))]
        return dict(zip(recall_names(self.limits), values, strict=True))


def recall_names(limits: Sequence[int] = LIMITS) -> list[str]:
    """The names of recalls: `AR@100` ... over all objects, then `ARs@...`, `ARm@...`, `ARl@...` by their area."""
    return [f"AR{suffix}@{limit}" for suffix in AREA_SUFFIXES for limit in limits]


def proposal_recall(dataset: Dataset, results: Results, *, limits: Sequence[int] = LIMITS) -> dict[str, float]:
    """Recall of the proposals in a data set's results.

    Args:
        dataset: The ground truth.
        results: The proposals, over whose `evaluated` images recall is measured; their labels play no part.
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
    """Give each proposal, best first, the free object that it overlaps most.

    Args:
        edges: Overlaps that are enough, by rank and then by object.
        members: Whether each object counts.

    Returns:
        For each object the rank of the proposal that it is given to, `_NEVER` where to none.
    """
    ranks = [_NEVER] * len(members)
    current, chosen, most = _NEVER, -1, 0.0
    for rank, thing, overlap in edges:
        if rank != current:
            if chosen >= 0:
                ranks[chosen] = current
            current, chosen, most = rank, -1, 0.0
        # Of equal overlaps pycocotools takes the last.
        if members[thing] and ranks[thing] == _NEVER and overlap >= most:
            chosen, most = thing, overlap
    if chosen >= 0:
        ranks[chosen] = current
    return ranks


def _iou(proposals: NDArray[np.float64], objects: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, g] IoU of (x, y, width, height), in the order of operations of COCO's own, to the last bit."""
    px, py, pw, ph = (column[:, None] for column in proposals.T)
    ox, oy, ow, oh = objects.T
    width = np.minimum(px + pw, ox + ow) - np.maximum(px, ox)
    height = np.minimum(py + ph, oy + oh) - np.maximum(py, oy)
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    union = pw * ph + ow * oh - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
