"""The ground truth equals the annotations, for every way in which a data set provides them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from boxwright.data.concat import ConcatDataset, RepeatDataset
from boxwright.data.dataset import Category, Dataset, Mask, Sample
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.masks import Masks
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.mistakes import find_mistakes
from boxwright.evaluation.proposals import proposal_recall
from boxwright.evaluation.results import Results, write_results
from boxwright.report.worst import worst_images
from coco_oracle import AnnotationFile, oracle
from generated_images import GeneratedImages

AREA_NAMES = ("APs", "APm", "APl", "ARs", "ARm", "ARl")


class Hidden:
    """A subset of a data set that hides its annotation file."""

    def __init__(self, dataset: Dataset, positions: range) -> None:
        self.dataset, self.positions, self.categories = dataset, positions, dataset.categories

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.positions[index]]


@pytest.fixture(scope="module")
def coco_mini(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """40 images of COCO, images with crowd regions first; categories in the order of the file."""
    source = data_dir / "coco_mini"
    document = json.loads((source / "annotations" / "instances_val2017.json").read_bytes())
    crowded = {thing["image_id"] for thing in document["annotations"] if thing["iscrowd"]}
    document["images"] = sorted(document["images"], key=lambda image: image["id"] not in crowded)[:40]
    kept_ids = {image["id"] for image in document["images"]}
    document["annotations"] = [thing for thing in document["annotations"] if thing["image_id"] in kept_ids]
    assert sum(thing["iscrowd"] for thing in document["annotations"]) > 10
    folder = tmp_path_factory.mktemp("coco_mini")
    (folder / "instances.json").write_text(json.dumps(document))
    return IndexedDataset(folder / "instances.json", source / "val2017", cache_dir=folder / "cache")


def shifted(dataset: Dataset) -> Results:
    """Detections with masks: every object of the data set, shifted by a few pixels."""
    truth = GroundTruth(dataset)
    objects = truth.coco.load_anns(truth.coco.get_ann_ids())
    labels = {category.id: label for label, category in enumerate(truth.categories)}
    rng = np.random.default_rng(0)
    shifts = rng.integers(0, 12, (len(objects), 2))
    moved = [np.roll(mask, shift, axis=(0, 1)) for mask, shift in zip(truth.masks(objects), shifts, strict=True)]
    runs = [coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8))) for pixels in moved]
    return Results(
        image_ids=np.array([thing["image_id"] for thing in objects]),
        boxes=np.array([thing["bbox"] for thing in objects]) + np.pad(shifts[:, ::-1], ((0, 0), (0, 2))),
        scores=rng.random(len(objects)),
        labels=np.array([labels[thing["category_id"]] for thing in objects]),
        evaluated=np.array(truth.coco.get_img_ids()),
        masks=Masks.of([one["counts"] for one in runs], [one["size"] for one in runs]),
    )


def test_ground_truth_from_samples_and_from_the_file_equals_pycocotools(
    coco_mini: IndexedDataset, tmp_path: Path
) -> None:
    """The samples provide polygons, several per object, and the RLE of crowd regions."""
    results = shifted(coco_mini)
    write_results(tmp_path / "results.json", results, coco_mini.categories)
    rows = json.loads((tmp_path / "results.json").read_text())
    for row in rows:
        del row["bbox"]  # pycocotools would use the area of the box for the mask
    (tmp_path / "results.json").write_text(json.dumps(rows))
    of_file = coco_metrics(coco_mini, results)
    of_samples = coco_metrics(Hidden(coco_mini, range(len(coco_mini))), results)
    assert of_file.masks is not None
    assert of_samples.masks is not None
    stats = oracle(coco_mini.annotations, tmp_path / "results.json", kind="segm").stats
    np.testing.assert_allclose(list(of_file.masks.summary.values()), stats, atol=1e-9)
    assert 0.1 < stats[0] < 0.9
    for name, value in of_file.masks.summary.items():
        # The file contains areas of polygons. Without the file, areas are counted in pixels.
        tolerance = 0.02 if name in AREA_NAMES else 1e-9
        assert of_samples.masks.summary[name] == pytest.approx(value, abs=tolerance)
    assert of_samples.masks.num_objects.tolist() == of_file.masks.num_objects.tolist()


def test_two_joined_halves_equal_the_whole(coco_mini: IndexedDataset, tmp_path: Path) -> None:
    """Areas, crowd regions and boxes beyond the image come from the files; classes and ids from the joined data set."""
    document = json.loads(coco_mini.annotations.read_bytes())
    document["annotations"][0]["bbox"][0] -= 7  # training clips this box
    parts = []
    for half in range(2):
        kept_ids = {image["id"] for image in document["images"][half::2]}
        other = {**document, "images": document["images"][half::2]}
        other["annotations"] = [thing for thing in document["annotations"] if thing["image_id"] in kept_ids]
        if half:  # other class ids in another order
            other["categories"] = [{**each, "id": 1000 - each["id"]} for each in document["categories"]]
            other["annotations"] = [
                {**thing, "category_id": 1000 - thing["category_id"]} for thing in other["annotations"]
            ]
        path = tmp_path / f"{half}.json"
        path.write_text(json.dumps(other))
        parts.append(IndexedDataset(path, coco_mini.images, cache_dir=tmp_path))
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(document))
    whole, joined = IndexedDataset(path, coco_mini.images, cache_dir=tmp_path), ConcatDataset(parts)
    results = shifted(whole)
    expected, metrics = coco_metrics(whole, results), coco_metrics(joined, results)
    assert metrics.numbers == expected.numbers
    assert metrics.num_objects.tolist() == expected.num_objects.tolist()
    assert proposal_recall(joined, results) == proposal_recall(whole, results)


def test_a_data_set_joined_with_itself_counts_twice_without_its_dropped_images(
    coco_mini: IndexedDataset, tmp_path: Path
) -> None:
    document = json.loads(coco_mini.annotations.read_bytes())
    document["images"] = document["images"][-20:]
    empty_id, *kept_ids = [image["id"] for image in document["images"]]
    document["annotations"] = [thing for thing in document["annotations"] if thing["image_id"] in kept_ids]
    (tmp_path / "a.json").write_text(json.dumps(document))
    full = IndexedDataset(tmp_path / "a.json", coco_mini.images, keep_empty=False, cache_dir=tmp_path)
    assert empty_id not in full.image_ids
    twice = ConcatDataset([full, full])
    results = shifted(twice)
    assert len(results.evaluated) == 2 * len(full)
    metrics = coco_metrics(twice, results)
    assert metrics.num_objects.tolist() == (2 * coco_metrics(full, shifted(full)).num_objects).tolist()


FORMS: dict[str, Callable[[np.ndarray], Mask]] = {
    "bitmap": lambda pixels: pixels,
    "runs": lambda pixels: coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"],
    "polygons": lambda _: [
        np.array([[10, 10], [30, 10], [30, 30], [10, 30]], np.float32),
        np.array([[40, 20], [50, 20], [50, 25], [40, 25]], np.float32),
    ],
}


@dataclass
class OneImage:
    """One image of 60 x 80 pixels with two objects; the tests pass a mask for the first object."""

    masks: list[Mask]
    categories = (Category(id=3, name="cell"),)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample(
            image=np.zeros((60, 80, 3), np.uint8),
            image_id=7,
            file_name="a.png",
            boxes=np.array([[10, 10, 50, 30], [60, 5, 75, 50]], np.float32),
            labels=np.zeros(2, np.int64),
            crowd=np.zeros(2, bool),
            object_ids=np.arange(2),
            masks=self.masks,
        )


def one_object() -> np.ndarray:
    pixels = np.zeros((60, 80), bool)
    pixels[10:30, 10:30] = pixels[20:25, 40:50] = True
    return pixels


@pytest.mark.parametrize("form", FORMS)
def test_every_mask_format_is_evaluated_and_defines_the_area(form: str) -> None:
    pixels = one_object()
    truth = GroundTruth(OneImage([FORMS[form](pixels), None]))
    objects = truth.coco.load_anns(truth.coco.get_ann_ids())
    assert [thing["area"] for thing in objects] == [pixels.sum(), 15 * 45]
    masks = truth.masks(objects)
    np.testing.assert_array_equal(masks[0], pixels)
    assert masks[1].sum() == 15 * 45
    detected = Masks.of([FORMS["runs"](pixels)], (60, 80))  # type: ignore[list-item]
    results = Results(
        image_ids=np.array([7]),
        boxes=np.array([[10.0, 10, 40, 20]]),
        scores=np.array([0.9]),
        labels=np.array([0]),
        evaluated=np.array([7]),
        masks=detected,
    )
    metrics = coco_metrics(truth, results).masks
    assert metrics is not None
    assert metrics.summary["AP"] == pytest.approx(1)
    assert metrics.num_objects.tolist() == [1]
    html = worst_images(OneImage([FORMS[form](pixels), None]), truth, find_mistakes(truth, results), 1)
    assert "1 right · 0 wrong · 1 missed" in html


def test_masks_with_wrong_sizes_or_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a.png: invalid mask of object 0: shape \(80, 60\)"):
        GroundTruth(OneImage([one_object().T, None]))
    with pytest.raises(ValueError, match=r"a.png: .* of object 0: run lengths of 20 pixels, expected 4800"):
        GroundTruth(OneImage([FORMS["runs"](np.ones((4, 5), bool)), None]))
    with pytest.raises(ValueError, match=r"a.png: 1 masks for 2 objects"):
        GroundTruth(OneImage([None]))


def test_detected_masks_of_another_size_are_refused() -> None:
    truth = GroundTruth(OneImage([one_object(), None]))
    results = Results(
        image_ids=np.array([7]),
        boxes=np.array([[10.0, 10, 40, 20]]),
        scores=np.array([0.8]),
        labels=np.array([0]),
        evaluated=np.array([7]),
        masks=Masks.of([FORMS["runs"](one_object().T)], [(80, 60)]),  # type: ignore[list-item]
    )
    with pytest.raises(ValueError, match=r"image 7: a mask has 80 x 60 pixels, but the image has 60 x 80"):
        coco_metrics(truth, results)


def test_duplicate_image_ids_are_refused() -> None:
    for dataset in (
        RepeatDataset(GeneratedImages(3), 2),
        ConcatDataset([GeneratedImages(2), RepeatDataset(GeneratedImages(3), 2)]),
    ):
        with pytest.raises(ValueError, match="2 images have the image id 10"):
            GroundTruth(dataset)


def test_objects_without_a_mask_do_not_count_for_mask_ap(tmp_path: Path) -> None:
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    objects = [{"bbox": [10, 10, 20, 20], "segmentation": polygon}, {"bbox": [50, 50, 20, 20]}]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{**o, "id": i, "image_id": 1, "category_id": 1} for i, o in enumerate(objects, start=1)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    dataset = AnnotationFile(tmp_path / "truth.json")
    pixels = np.zeros((2, 100, 100), np.uint8)
    pixels[0, 50:70, 50:70] = pixels[1, 10:30, 10:30] = 1
    results = Results(
        image_ids=np.array([1, 1]),
        boxes=np.array([[50.0, 50, 20, 20], [10, 10, 20, 20]]),
        scores=np.array([0.9, 0.8]),
        labels=np.array([0, 0]),
        evaluated=np.array([1]),
        masks=Masks.of([coco_mask.encode(np.asfortranarray(one))["counts"] for one in pixels], (100, 100)),
    )
    metrics = coco_metrics(dataset, results)
    assert metrics.masks is not None
    assert metrics.num_objects.tolist() == [2]
    assert metrics.masks.num_objects.tolist() == [1]
    assert metrics.masks.summary["AP"] == pytest.approx(1)
    truth = GroundTruth(dataset)
    masks = truth.masks(truth.coco.load_anns([1, 2]))
    assert [mask.sum() for mask in masks] == [400, 400]

    content["annotations"] = content["annotations"][1:]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    metrics = coco_metrics(dataset, results)
    assert metrics.masks is not None
    assert metrics.masks.summary["AP"] == -1


def test_joined_data_sets_are_measured_as_one() -> None:
    joined = ConcatDataset(
        [GeneratedImages(4), GeneratedImages(4)]
    )  # the ids of four images occur twice and must stay distinct
    samples = [joined[1], joined[7]]
    rows = [(each.image_id, box, label) for each in samples for box, label in zip(each.boxes, each.labels, strict=True)]
    corners = np.array([box for _, box, _ in rows], np.float64)
    results = Results(
        image_ids=np.array([image_id for image_id, _, _ in rows]),
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        scores=np.full(len(rows), 0.5),
        labels=np.array([label for _, _, label in rows]),
        evaluated=joined.image_ids,
    )
    metrics = coco_metrics(joined, results)
    # Label 0: images 1, 2 and 3 have one object each (a third object is a crowd region). Label 1: images 2 and 3.
    assert metrics.num_objects.tolist() == [6, 4]
    assert metrics.per_class[:, -1] == pytest.approx([2 / 6, 1 / 4])


def test_files_that_training_accepts_are_evaluated(tmp_path: Path) -> None:
    """A byte order mark, a licence by name, a missing area and unusual values in unused fields are no errors."""
    content = {
        "info": [],
        "licenses": "all mine",
        "images": [{"id": 0, "file_name": "a.png", "width": 60, "height": 40, "license": "CC0", "coco_url": 4}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [1, 2, 30, 20], "score": "high"}],
        "categories": [{"id": 0, "name": "cell", "supercategory": 3, "keypoints": 5}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content), "utf-8-sig")
    results = Results(
        image_ids=np.array([0]),
        boxes=np.array([[1.0, 2, 30, 20]]),
        scores=np.array([0.9]),
        labels=np.array([0]),
        evaluated=np.array([0]),
    )

    class Data(AnnotationFile):
        @property
        def categories(self) -> list[Category]:
            return [Category(id=0, name="cell")]

    assert coco_metrics(Data(path), results).summary["AP"] == pytest.approx(1)
