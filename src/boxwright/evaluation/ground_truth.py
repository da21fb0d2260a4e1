"""What detections are measured against: the objects of a data set in hotcoco's form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import hotcoco
import numpy as np

from boxwright.data.dataset import Dataset
from boxwright.data.masks import Masks
from boxwright.evaluation.objects import read_objects
from boxwright.evaluation.results import Results


class GroundTruth:
    """The objects to measure with: the annotation file's own, areas and crowd regions included.

    What training drops or clips stays as annotated here, so that the numbers are comparable with anyone's.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Read a data set's objects (see `read_objects`).

        Raises:
            ValueError: The data set has no categories; or as `read_objects`.
        """
        if not dataset.categories:
            raise ValueError("the data set has no categories, so there is nothing to measure")
        self.categories = list(dataset.categories)
        self._objects = read_objects(dataset)
        self.coco: hotcoco.COCO = self._objects.index()

    @cached_property
    def coco_of_masks(self) -> hotcoco.COCO:
        """The objects with their masks, the same otherwise.

        The box of an object without a mask is a crowd region here: what is found in it counts neither as right nor as
        wrong.
        """
        return self._objects.index(with_masks=True)

    def masks(self, objects: Sequence[dict[str, Any]]) -> Masks:
        """The masks of objects (from `coco`), the box for those without."""
        same = self.coco_of_masks.load_anns([thing["id"] for thing in objects])
        runs = [self.coco_of_masks.ann_to_rle(thing) for thing in same]
        return Masks.of([run["counts"] for run in runs], [run["size"] for run in runs])

    def require_images(self, results: Results) -> None:
        """Check that results are of images of this ground truth, and sound.

        Detections in images of the ground truth that were not evaluated are allowed: they do not count.

        Raises:
            ValueError: As `check_images`, for the evaluated images and the images of all detections; or as
                `Results.check`.
        """
        check_images(results, self.coco.get_img_ids())
        results.check(len(self.categories))

    def evaluator(
        self, results: Results, *, max_detections: Sequence[int], with_masks: bool = False
    ) -> hotcoco.COCOeval:
        """A hotcoco evaluator of `results` over the images that were evaluated, not yet run.

        Args:
            results: Labels are rows of the categories.
            max_detections: Rising limits of detections an image and category.
            with_masks: Whether masks are compared, in place of boxes.

        Raises:
            ValueError: As `require_images`; or a mask is not of its image's size.
        """
        self.require_images(results)
        category_ids = np.array([category.id for category in self.categories], dtype=np.int64)
        rows = np.column_stack([results.image_ids, results.boxes, results.scores, category_ids[results.labels]])
        rows = rows.reshape(-1, 7)
        if with_masks:
            assert results.masks is not None
            self._require_sizes(results, results.masks)
            runs: list[Any] = results.masks.to_coco()
            found = self.coco_of_masks.load_res(rows, segmentation=runs)
            # Small, medium and large go by a mask's own area, as they do for objects, not by its box's.
            found.update_anns(ids=np.arange(1, len(runs) + 1), area=hotcoco.mask.area(runs))
            evaluator = hotcoco.COCOeval(self.coco_of_masks, found, "segm")
        else:
            evaluator = hotcoco.COCOeval(self.coco, self.coco.load_res(rows), "bbox")
        evaluator.params.img_ids = results.evaluated.tolist()
        evaluator.params.cat_ids = category_ids.tolist()
        evaluator.params.max_dets = list(max_detections)
        return evaluator

    def _require_sizes(self, results: Results, masks: Masks) -> None:
        """Check that masks are of their pictures' sizes: hotcoco would take others for masks that overlap nothing.

        Raises:
            ValueError: One in an evaluated image is not.
        """
        sizes = {image["id"]: (image["height"], image["width"]) for image in self._objects.images}
        rows = np.flatnonzero(np.isin(results.image_ids, results.evaluated))
        image_ids = results.image_ids[rows].tolist()
        wanted = np.array([sizes[image_id] for image_id in image_ids], np.int64).reshape(-1, 2)
        wrong = np.flatnonzero((masks.sizes[rows] != wanted).any(axis=1))
        if len(wrong):
            first = wrong[0]
            raise ValueError(
                "a mask in image {} is {} x {} pixels, the picture {} x {} (height x width): masks are measured in "
                "pixels of the files".format(image_ids[first], *masks.sizes[rows[first]], *wanted[first])
            )


def check_images(results: Results, image_ids: Collection[int]) -> None:
    """Check that the evaluated images, and the images of all detections, are among `image_ids`.

    Raises:
        ValueError: No image was evaluated, or there are images that the ground truth does not have.
    """
    if not len(results.evaluated):
        raise ValueError("no image was evaluated, so there is nothing to measure")
    known = np.fromiter(image_ids, np.int64)
    fix = "the results belong to another data set or another split. Measure them with the split that they come from"
    unknown = np.setdiff1d(results.evaluated, known)
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} of {len(results.evaluated)} evaluated images are not in the ground truth "
            f"(image ids {_examples(unknown)}): {fix}"
        )
    outside = ~np.isin(results.image_ids, known)
    if outside.any():
        unknown = np.unique(results.image_ids[outside])
        raise ValueError(
            f"{int(outside.sum())} of {len(results)} detections are of {len(unknown)} images that the ground truth "
            f"does not have (image ids {_examples(unknown)}): {fix}"
        )


def _examples(image_ids: np.ndarray) -> str:
    """The first three."""
    return ", ".join(map(str, image_ids[:3].tolist())) + (", ..." if len(image_ids) > 3 else "")
