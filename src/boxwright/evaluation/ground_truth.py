"""Ground truth for evaluation: the objects of a data set in hotcoco's format."""

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
from boxwright.text import plural


class GroundTruth:
    """The objects of a data set as annotated, with the areas and crowd regions of the annotation file.

    Objects that training drops or clips stay as annotated, so that metrics are comparable with other programs.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Read the objects of a data set with `read_objects`.

        Raises:
            ValueError: The data set has no categories; or as `read_objects`.
        """
        if not dataset.categories:
            raise ValueError(
                "the data set has no categories, so there is nothing to evaluate. Add categories to its annotations."
            )
        self.categories = list(dataset.categories)
        self._objects = read_objects(dataset)
        self.coco: hotcoco.COCO = self._objects.index()

    @cached_property
    def coco_of_masks(self) -> hotcoco.COCO:
        """The objects with their masks.

        The box of an object without a mask becomes a crowd region: detections inside count neither as true nor as false
        positives.
        """
        return self._objects.index(with_masks=True)

    def masks(self, objects: Sequence[dict[str, Any]]) -> Masks:
        """Masks of objects (entries of `coco`); the mask of an object without one is its box."""
        same = self.coco_of_masks.load_anns([item["id"] for item in objects])
        runs = [self.coco_of_masks.ann_to_rle(item) for item in same]
        return Masks.of([run["counts"] for run in runs], [run["size"] for run in runs])

    def require_images(self, results: Results) -> None:
        """Check that results are valid and belong to images of this ground truth.

        Detections in images that are in the ground truth but were not evaluated are allowed, and are ignored.

        Raises:
            ValueError: As `check_images`, for the evaluated images and the images of all detections; or as
                `Results.check`.
        """
        check_images(results, self.coco.get_img_ids())
        results.check(len(self.categories))

    def evaluator(
        self, results: Results, *, max_detections: Sequence[int], with_masks: bool = False
    ) -> hotcoco.COCOeval:
        """A hotcoco evaluator of `results` on the evaluated images; it has not been run yet.

        Args:
            results: Detections; labels are indices into the categories.
            max_detections: Ascending limits of detections per image and category.
            with_masks: Whether to evaluate masks instead of boxes.

        Raises:
            ValueError: As `require_images`; or a mask does not have the size of its image.
        """
        self.require_images(results)
        category_ids = np.array([category.id for category in self.categories], dtype=np.int64)
        rows = np.column_stack([results.image_ids, results.boxes, results.scores, category_ids[results.labels]])
        rows = rows.reshape(-1, 7)
        if with_masks:
            assert results.masks is not None
            self._require_sizes(results, results.masks)
            runs: list[Any] = results.masks.to_coco()
            detections = self.coco_of_masks.load_res(rows, segmentation=runs)
            # The area ranges (small, medium, large) use the area of the mask, as for objects, instead of the box.
            detections.update_anns(ids=np.arange(1, len(runs) + 1), area=hotcoco.mask.area(runs))
            evaluator = hotcoco.COCOeval(self.coco_of_masks, detections, "segm")
        else:
            evaluator = hotcoco.COCOeval(self.coco, self.coco.load_res(rows), "bbox")
        evaluator.params.img_ids = results.evaluated.tolist()
        evaluator.params.cat_ids = category_ids.tolist()
        evaluator.params.max_dets = list(max_detections)
        return evaluator

    def _require_sizes(self, results: Results, masks: Masks) -> None:
        """Check that masks have the sizes of their images; hotcoco treats masks of other sizes as without overlap.

        Raises:
            ValueError: A mask in an evaluated image has a different size.
        """
        sizes = {image["id"]: (image["height"], image["width"]) for image in self._objects.images}
        rows = np.flatnonzero(np.isin(results.image_ids, results.evaluated))
        image_ids = results.image_ids[rows].tolist()
        expected = np.array([sizes[image_id] for image_id in image_ids], np.int64).reshape(-1, 2)
        wrong = np.flatnonzero((masks.sizes[rows] != expected).any(axis=1))
        if len(wrong):
            first = wrong[0]
            raise ValueError(
                "image {}: a mask has {} x {} pixels, but the image has {} x {} (height x width). Masks must have the "
                "size of the image file.".format(image_ids[first], *masks.sizes[rows[first]], *expected[first])
            )


def check_images(results: Results, image_ids: Collection[int]) -> None:
    """Check that the evaluated images, and the images of all detections, are in `image_ids`.

    Raises:
        ValueError: No image was evaluated, or images are not in the ground truth.
    """
    if not len(results.evaluated):
        raise ValueError("no image was evaluated, so there are no metrics. Use a split that has images.")
    known = np.fromiter(image_ids, np.int64)
    fix = "The results belong to another data set or split. Evaluate them on the split that they come from."
    unknown = np.setdiff1d(results.evaluated, known)
    if len(unknown):
        raise ValueError(
            f"evaluated images that are not in the ground truth: {len(unknown)} of {len(results.evaluated)} "
            f"(image ids {_examples(unknown)}). {fix}"
        )
    outside = ~np.isin(results.image_ids, known)
    if outside.any():
        unknown = np.unique(results.image_ids[outside])
        raise ValueError(
            f"detections in images that are not in the ground truth: {int(outside.sum())} of {len(results)}, "
            f"in {plural(len(unknown), 'image')} (image ids {_examples(unknown)}). {fix}"
        )


def _examples(image_ids: np.ndarray) -> str:
    """The first three ids, for a message."""
    return ", ".join(map(str, image_ids[:3].tolist())) + (", ..." if len(image_ids) > 3 else "")
