"""The evaluator reproduces published results and pycocotools, for boxes and for masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from boxwright.data.dataset import Category, Sample
from boxwright.data.masks import Masks
from boxwright.evaluation.coco import CLASS_COLUMNS, CocoMetrics, coco_metrics
from boxwright.evaluation.proposals import proposal_recall
from boxwright.evaluation.results import Results, match_categories, read_results
from coco_oracle import AnnotationFile, oracle, silent


@pytest.fixture(scope="module")
def yolox(data_dir: Path) -> tuple[AnnotationFile, Path]:
    folder = data_dir / "coco_mini" / "annotations"
    results = folder / "yolox_nano_val2017_subset_bbox_results.json"
    return AnnotationFile(folder / "instances_val2017.json"), results


def test_published_results(data_dir: Path) -> None:
    dataset = AnnotationFile(data_dir / "coco_eval" / "instances_val2014_100.json")
    path = data_dir / "coco_eval" / "instances_val2014_fakebbox100_results.json"
    metrics = coco_metrics(dataset, read_results(path, dataset.categories, dataset.image_ids))
    expected = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(value, 3) for value in metrics.summary.values()] == expected


def test_published_results_of_masks(data_dir: Path) -> None:
    dataset = AnnotationFile(data_dir / "coco_eval" / "instances_val2014_100.json")
    path = data_dir / "coco_eval" / "instances_val2014_fakesegm100_results.json"
    metrics = coco_metrics(dataset, read_results(path, dataset.categories, dataset.image_ids))
    expected = [0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381]
    assert metrics.masks is not None
    assert [round(value, 3) for value in metrics.masks.summary.values()] == expected
    evaluator = oracle(dataset.annotations, path, kind="segm")
    np.testing.assert_allclose(list(metrics.masks.summary.values()), evaluator.stats, atol=1e-9)
    assert metrics.numbers == {
        **metrics.summary,
        **{f"mask_{name}": value for name, value in metrics.masks.summary.items()},
    }


def test_masks_beside_crowd_regions_equal_pycocotools(data_dir: Path, tmp_path: Path) -> None:
    """The detections are shifted annotated objects; the ground truth contains polygons and RLE crowd regions."""
    dataset = AnnotationFile(data_dir / "coco_mini" / "annotations" / "instances_val2017.json")
    with silent():
        truth = COCO(str(dataset.annotations))
    rng = np.random.default_rng(0)
    rows = []
    for annotation in truth.anns.values():
        runs = truth.annToRLE(annotation)
        pixels = np.roll(Masks.of([runs["counts"]], runs["size"])[0], rng.integers(0, 12, 2), axis=(0, 1))
        runs = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": rng.random()}
        rows.append(row | {"segmentation": {"size": runs["size"], "counts": runs["counts"].decode()}})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    assert sum(annotation["iscrowd"] for annotation in truth.anns.values()) > 10
    metrics = coco_metrics(dataset, read_results(path, dataset.categories, dataset.image_ids))
    assert metrics.masks is not None
    evaluator = oracle(dataset.annotations, path, kind="segm")
    np.testing.assert_allclose(list(metrics.masks.summary.values()), evaluator.stats, atol=1e-9)
    assert 0.1 < metrics.masks.summary["AP"] < 0.9


def test_size_ranges_of_masks_use_the_mask_area(tmp_path: Path) -> None:
    """A thin ring has a large box but few pixels, so both the object and its detection count as small."""
    ring = np.zeros((200, 200), np.uint8)
    ring[20:180, 20:180] = 1
    ring[21:179, 21:179] = 0
    runs = coco_mask.encode(np.asfortranarray(ring))
    segmentation = {"size": [200, 200], "counts": runs["counts"].decode()}
    one = {"image_id": 1, "category_id": 1, "bbox": [20, 20, 160, 160], "segmentation": segmentation}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "ring"}],
        "annotations": [{**one, "id": 1, "area": int(ring.sum())}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    dot = coco_mask.encode(np.asfortranarray(np.pad(np.ones((9, 9), np.uint8), ((90, 101), (90, 101)))))
    wrong = {**one, "segmentation": {"size": [200, 200], "counts": dot["counts"].decode()}, "score": 0.9}
    (tmp_path / "results.json").write_text(json.dumps([{**one, "score": 0.5}, wrong]))
    dataset = AnnotationFile(tmp_path / "truth.json")
    masks = coco_metrics(dataset, read_results(tmp_path / "results.json", dataset.categories)).masks
    assert masks is not None
    # By box area, the wrong detection would be large and ignored in APs.
    assert masks.summary["APs"] == pytest.approx(0.5, abs=0.01)


def test_equals_pycocotools(yolox: tuple[AnnotationFile, Path]) -> None:
    dataset, path = yolox
    metrics = coco_metrics(dataset, read_results(path, dataset.categories, dataset.image_ids))
    evaluator = oracle(dataset.annotations, path)
    np.testing.assert_allclose(list(metrics.summary.values()), evaluator.stats, atol=1e-6)

    precision = evaluator.eval["precision"]
    assert CLASS_COLUMNS[0] == "AP"
    for row in range(len(dataset.categories)):
        measured = precision[:, :, row, 0, -1]
        expected = measured[measured > -1].mean() if (measured > -1).any() else -1
        assert metrics.per_class[row, 0] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(metrics.precision[1], precision[0, :, :, 0, -1], atol=1e-6)
    np.testing.assert_allclose(metrics.precision[2], precision[5, :, :, 0, -1], atol=1e-6)
    num_objects = [len(evaluator.cocoGt.getAnnIds(catIds=[c.id], iscrowd=False)) for c in dataset.categories]
    assert metrics.num_objects.tolist() == num_objects


def test_a_subset_and_other_limits_equal_pycocotools(yolox: tuple[AnnotationFile, Path]) -> None:
    dataset, path = yolox
    subset = dataset.image_ids[::3]
    results = read_results(path, dataset.categories, subset)
    metrics = coco_metrics(dataset, results, max_detections=(1, 5, 20))
    assert list(metrics.summary)[6:9] == ["AR1", "AR5", "AR20"]
    expected = oracle(dataset.annotations, path, imgIds=subset, maxDets=[1, 5, 20])
    assert metrics.summary["AP50"] == pytest.approx(expected.stats[1], abs=1e-6)
    assert metrics.summary["AR20"] == pytest.approx(expected.stats[8], abs=1e-6)
    assert metrics.summary["APs"] == pytest.approx(expected.stats[3], abs=1e-6)
    assert metrics.num_objects.sum() == len(expected.cocoGt.getAnnIds(imgIds=subset, iscrowd=False))


def test_metrics_do_not_depend_on_the_order_of_categories(yolox: tuple[AnnotationFile, Path]) -> None:
    dataset, path = yolox
    metrics = coco_metrics(dataset, read_results(path, dataset.categories))

    class Reversed(AnnotationFile):
        @property
        def categories(self) -> list[Category]:
            return super().categories[::-1]

    other = Reversed(dataset.annotations)
    turned = coco_metrics(other, read_results(path, other.categories))
    assert turned.summary == pytest.approx(metrics.summary, abs=1e-12)
    np.testing.assert_allclose(turned.per_class[::-1], metrics.per_class)
    assert turned.num_objects[::-1].tolist() == metrics.num_objects.tolist()


def test_more_than_a_hundred_objects_in_an_image_count() -> None:
    corners = np.stack(np.meshgrid(np.arange(20) * 20, np.arange(15) * 20), axis=-1).reshape(-1, 2)
    dataset = InMemory([np.concatenate([corners, corners + 10], axis=1)])
    results = detections(np.concatenate([corners, np.full_like(corners, 10)], axis=1))
    assert coco_metrics(dataset, results).summary["AR100"] == pytest.approx(1 / 3, abs=1e-3)
    metrics = coco_metrics(dataset, results, max_detections=(1, 10, 500))
    assert metrics.summary["AP"] == pytest.approx(1)
    assert metrics.summary["AR500"] == pytest.approx(1)


def test_undefined_metrics_are_minus_one() -> None:
    dataset = InMemory([np.array([[0, 0, 10, 10]])])
    metrics = coco_metrics(dataset, detections(np.array([[0, 0, 10, 10]])))
    assert metrics.summary["APs"] == pytest.approx(1)
    assert metrics.summary["APl"] == -1
    assert metrics.per_class[1, 0] == -1

    no_detections = coco_metrics(dataset, detections(np.zeros((0, 4))))
    assert no_detections.summary["AP"] == 0
    with pytest.raises(ValueError, match="no image"):
        coco_metrics(dataset, detections(np.zeros((0, 4)), evaluated=[]))


def test_metrics_survive_packing(yolox: tuple[AnnotationFile, Path]) -> None:
    dataset, path = yolox
    metrics = coco_metrics(dataset, read_results(path, dataset.categories))
    again = CocoMetrics.blank(dataset.categories).unpack(metrics.pack())
    assert again.summary == metrics.summary
    np.testing.assert_array_equal(again.num_objects, metrics.num_objects)
    np.testing.assert_array_equal(again.per_class, metrics.per_class)
    np.testing.assert_array_equal(again.precision, metrics.precision)
    both = replace(metrics, masks=replace(metrics, num_objects=metrics.num_objects + 1))
    again = CocoMetrics.blank(dataset.categories, with_masks=True).unpack(both.pack())
    assert again.numbers == both.numbers
    assert again.masks is not None
    np.testing.assert_array_equal(again.masks.num_objects, metrics.num_objects + 1)


def test_proposal_recall_equals_pycocotools(yolox: tuple[AnnotationFile, Path]) -> None:
    dataset, path = yolox
    results = read_results(path, dataset.categories, dataset.image_ids)
    recalls = proposal_recall(dataset, results)
    evaluator = oracle(dataset.annotations, path, use_cats=False, maxDets=[100, 300, 1000])
    names = iter(recalls.items())
    for area, suffix in enumerate(("", "s", "m", "l")):
        for m, limit in enumerate((100, 300, 1000)):
            recall = evaluator.eval["recall"][:, :, area, m]
            name, value = next(names)
            assert name == f"AR{suffix}@{limit}"
            assert value == pytest.approx(recall[recall > -1].mean(), abs=1e-6)


class InMemory:
    """A data set without an annotation file: two categories, objects of the first category only."""

    categories = (Category(id=7, name="cell"), Category(id=3, name="dust"))

    def __init__(self, boxes: list[np.ndarray]) -> None:
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> Sample:
        boxes = self.boxes[index].astype(np.float32)
        return Sample(
            image=np.zeros((500, 500, 3), dtype=np.uint8),
            image_id=index + 1,
            file_name=f"{index}.png",
            boxes=boxes,
            labels=np.zeros(len(boxes), dtype=np.int64),
            crowd=np.zeros(len(boxes), dtype=bool),
            object_ids=np.arange(len(boxes)),
        )


def detections(boxes: np.ndarray, evaluated: list[int] | None = None) -> Results:
    """Detections of the first category in image 1."""
    return Results(
        image_ids=np.ones(len(boxes), dtype=np.int64),
        boxes=boxes.astype(np.float64),
        scores=np.linspace(1, 0.5, len(boxes)),
        labels=np.zeros(len(boxes), dtype=np.int64),
        evaluated=np.array([1] if evaluated is None else evaluated, dtype=np.int64),
    )


def test_categories_that_share_a_name_keep_their_order() -> None:
    names = ("cell", "cell", "dust")
    categories = [Category(id=position, name=name) for position, name in enumerate(names)]
    assert match_categories(categories, categories) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"Only in the model \(3 categories\): cell\."):
        match_categories(categories, categories[1:])


def test_proposal_recall_of_many_boxes_equals_pycocotools_to_the_last_bit(data_dir: Path, tmp_path: Path) -> None:
    """Proposals on 30 images, mostly with crowd regions; they overlap each other, and groups of four share a score."""
    document = json.loads((data_dir / "coco_mini" / "annotations" / "instances_val2017.json").read_bytes())
    crowded = {thing["image_id"] for thing in document["annotations"] if thing["iscrowd"]}
    document["images"].sort(key=lambda image: image["id"] not in crowded)
    document["images"] = document["images"][:30]
    kept_ids = {image["id"] for image in document["images"]}
    document["annotations"] = [thing for thing in document["annotations"] if thing["image_id"] in kept_ids]
    rng = np.random.default_rng(0)
    rows = []
    for image in document["images"]:
        boxes = np.array([thing["bbox"] for thing in document["annotations"] if thing["image_id"] == image["id"]])
        for number in range(320):
            x, y, width, height = boxes[rng.integers(len(boxes))] * np.exp(rng.normal(0, 0.15, 4))
            bbox = [round(x, 2), round(y, 2), round(width, 2), round(height, 2)]
            row = {"image_id": image["id"], "category_id": 1, "bbox": bbox, "score": 1 - number // 4 / 100}
            rows.append(row)
    annotations, path = tmp_path / "annotations.json", tmp_path / "results.json"
    annotations.write_text(json.dumps(document))
    path.write_text(json.dumps(rows))
    dataset = AnnotationFile(annotations)
    recalls = proposal_recall(dataset, read_results(path, dataset.categories, dataset.image_ids))
    recall = oracle(annotations, path, use_cats=False, maxDets=[100, 300, 1000]).eval["recall"][:, 0]
    expected = [recall[:, area, m].mean() for area in range(4) for m in range(3)]
    assert list(recalls.values()) == expected
    assert 0.1 < recalls["AR@100"] < recalls["AR@300"] < 0.9
