"""VOC's AP equals the devkit's formulas, implemented in this file for integer boxes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from boxwright.data.dataset import Category, Sample
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.results import Results, read_results
from boxwright.evaluation.voc import average_precision, voc_metrics
from voc_files import Object, write_voc

CATEGORIES = [Category(id=7, name="ant"), Category(id=3, name="zebra"), Category(id=5, name="none")]


@dataclass
class Objects:
    """Images 0, 1, ... with objects in VOC's coordinates: rows of label, xmin, ymin, xmax, ymax, difficult."""

    images: list[np.ndarray]
    categories = CATEGORIES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Sample:
        rows = self.images[position]
        return Sample(
            image=np.zeros((2, 2, 3), np.uint8),
            image_id=position,
            file_name=f"{position}.jpg",
            boxes=(rows[:, 1:5] - [1, 1, 0, 0]).astype(np.float32),
            labels=rows[:, 0].astype(np.int64),
            crowd=rows[:, 5].astype(bool),
            object_ids=np.arange(len(rows)),
        )


def as_results(detections: np.ndarray, num_images: int) -> Results:
    """Convert rows of image, label, score, xmin, ymin, xmax, ymax in VOC's coordinates."""
    detections = np.asarray(detections, np.float64).reshape(-1, 7)
    corner = detections[:, 3:5] - 1
    return Results(
        image_ids=detections[:, 0].astype(np.int64),
        boxes=np.concatenate([corner, detections[:, 5:7] - corner], axis=1),
        scores=detections[:, 2],
        labels=detections[:, 1].astype(np.int64),
        evaluated=np.arange(num_images),
    )


def devkit(images: list[np.ndarray], detections: np.ndarray, label: int, interpolation: str) -> float:
    """AP after VOCevaldet.m (voc07: eleven-point interpolation), with exact fractions for overlaps and recalls."""
    matched: set[tuple[int, int]] = set()
    num_objects = sum(int(row[0] == label and not row[5]) for rows in images for row in rows)
    if num_objects == 0:
        return -1.0
    rows = [row for row in detections if row[1] == label]
    true, false = [], []
    for image, _, _, *box in sorted(rows, key=lambda row: -row[2]):
        highest, match = Fraction(-1), None
        for k, (other, *theirs, _) in enumerate(images[int(image)]):
            width = min(box[2], theirs[2]) - max(box[0], theirs[0]) + 1
            height = min(box[3], theirs[3]) - max(box[1], theirs[1]) + 1
            if other != label or width <= 0 or height <= 0:
                continue
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, theirs)]
            overlap = Fraction(int(width * height), int(sum(areas) - width * height))
            if overlap > highest:
                highest, match = overlap, k
        hit = highest >= Fraction(1, 2)
        if hit and images[int(image)][match][5]:
            continue
        first = hit and (int(image), match) not in matched
        if first:
            matched.add((int(image), match))
        true.append(int(first))
        false.append(int(not first))
    recalls = [Fraction(sum(true[: k + 1]), num_objects) for k in range(len(true))]
    precisions = [Fraction(sum(true[: k + 1]), k + 1) for k in range(len(true))]
    if interpolation == "voc07":
        points = [Fraction(k, 10) for k in range(11)]
        best = [max((p for p, r in zip(precisions, recalls, strict=True) if r >= t), default=0) for t in points]
        return float(sum(best) / Fraction(11))
    mrec, mpre = [Fraction(0), *recalls, Fraction(1)], [Fraction(0), *precisions, Fraction(0)]
    for k in reversed(range(len(mpre) - 1)):
        mpre[k] = max(mpre[k], mpre[k + 1])
    return float(sum((mrec[k] - mrec[k - 1]) * mpre[k] for k in range(1, len(mrec))))


def random_case(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Overlapping objects, a third of them difficult; detections near the objects, often with equal scores."""
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for image in range(8):
        num = rng.integers(0, 7)
        corners = rng.integers(1, 20, (num, 2))
        boxes = np.concatenate([corners, corners + rng.integers(3, 12, (num, 2))], axis=1)
        images.append(np.column_stack([rng.integers(0, 2, num), boxes, rng.random(num) < 0.33]))
        for _ in range(3):
            moved = boxes + rng.integers(-2, 3, boxes.shape)
            moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
            scores = rng.integers(0, 12, num) / 12
            detections.append(np.column_stack([np.full(num, image), rng.integers(0, 3, num), scores, moved]))
    return images, np.concatenate(detections)


@pytest.mark.parametrize("interpolation", ["voc07", "voc12"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_devkits_formulas(seed: int, interpolation) -> None:
    images, detections = random_case(seed)
    metrics = voc_metrics(Objects(images), as_results(detections, len(images)), interpolation=interpolation)
    expected = [devkit(images, detections, label, interpolation) for label in range(3)]
    np.testing.assert_allclose(metrics.per_class, expected, rtol=0, atol=1e-12)
    assert expected[2] == -1
    assert metrics.mean == pytest.approx(np.mean(expected[:2]), abs=1e-12)
    assert metrics.num_objects.tolist() == [
        sum(int(row[0] == label and not row[5]) for rows in images for row in rows) for label in range(3)
    ]


BOX = (1, 1, 10, 10)
HALF = (1, 1, 10, 5)  # IoU 1/2 with BOX in VOC's pixels


@pytest.mark.parametrize(
    ("objects", "detections", "voc07", "voc12"),
    [
        ([(0, *BOX, 0)], [(0, 0, 0.9, *BOX)], 1, 1),
        ([(0, *BOX, 0)], [], 0, 0),
        ([(0, *BOX, 0)], [(0, 0, 0.9, *HALF)], 1, 1),
        ([(0, *BOX, 0)], [(0, 0, 0.9, 1, 1, 10, 4)], 0, 0),
        ([(0, *BOX, 0)], [(0, 1, 0.9, *BOX)], 0, 0),
        # A duplicate detection is a false positive. It lowers AP only if full recall has not been reached.
        ([(0, *BOX, 0)], [(0, 0, 0.9, *BOX), (0, 0, 0.8, *BOX)], 1, 1),
        (
            [(0, *BOX, 0), (0, 21, 21, 30, 30, 0)],
            [(0, 0, 0.9, *BOX), (0, 0, 0.8, *BOX), (0, 0, 0.7, 21, 21, 30, 30)],
            (6 * 1 + 5 * 2 / 3) / 11,
            1 / 2 + 1 / 2 * 2 / 3,
        ),
        # One of two objects detected: recall reaches 0.5, which is six of the eleven points and half of the area.
        ([(0, *BOX, 0), (0, 21, 21, 30, 30, 0)], [(0, 0, 0.9, *BOX)], 6 / 11, 0.5),
        ([(0, *BOX, 0)], [(0, 0, 0.9, 40, 40, 50, 50), (0, 0, 0.8, *BOX)], 0.5, 0.5),
        # Detections of difficult objects are ignored.
        ([(0, *BOX, 0), (0, 21, 21, 30, 30, 1)], [(0, 0, 0.9, 21, 21, 30, 30), (0, 0, 0.8, *BOX)], 1, 1),
        ([(0, *BOX, 1)], [(0, 0, 0.9, *BOX)], -1, -1),
        # A detection is matched to the object with the highest IoU, even if that object is difficult and another fits.
        ([(0, *BOX, 1), (0, 1, 1, 10, 9, 0)], [(0, 0, 0.9, *BOX)], 0, 0),
        # Three of ten objects detected: recall 0.3, which is the fourth of the eleven points.
        (
            [(0, 20 * k + 1, 1, 20 * k + 10, 10, 0) for k in range(10)],
            [(0, 0, 0.9, 20 * k + 1, 1, 20 * k + 10, 10) for k in range(3)],
            4 / 11,
            0.3,
        ),
    ],
)
def test_hand_computed(objects: list, detections: list, voc07: float, voc12: float) -> None:
    dataset = Objects([np.array(objects, np.float64)])
    results = as_results(np.array(detections), 1)
    for interpolation, expected in (("voc07", voc07), ("voc12", voc12)):
        metrics = voc_metrics(dataset, results, interpolation=interpolation)
        assert metrics.per_class[0] == pytest.approx(expected, abs=1e-12)
        assert metrics.mean == metrics.per_class[0]


def test_only_evaluated_images_count() -> None:
    images = [np.array([[0, *BOX, 0]], np.float64)] * 2
    results = as_results(np.array([[0, 0, 0.9, *BOX], [1, 0, 0.8, 30, 30, 40, 40]]), 1)
    metrics = voc_metrics(Objects(images), results)
    assert (metrics.mean, metrics.num_objects[0]) == (1, 1)
    with pytest.raises(ValueError, match="no image was evaluated"):
        voc_metrics(Objects(images), as_results(np.zeros((0, 7)), 0))
    with pytest.raises(ValueError, match="evaluated images that are not in the ground truth: 1 of 3"):
        voc_metrics(Objects(images), as_results(np.zeros((0, 7)), 3))


def test_classes_of_the_file_that_the_data_set_leaves_out_do_not_count(tmp_path: Path) -> None:
    dataset = IndexedDataset(*write_voc(tmp_path), cache_dir=tmp_path)

    class OneClass:
        annotations = dataset.annotations
        categories = tuple(category for category in dataset.categories if category.name == "zebra")

    results = Results(
        image_ids=np.array([7]),
        boxes=np.array([[10.0, 5, 20, 10]]),
        scores=np.array([0.9]),
        labels=np.array([0]),
        evaluated=dataset.image_ids,
    )
    metrics = voc_metrics(OneClass(), results)  # type: ignore[arg-type]
    assert metrics.per_class.tolist() == [1]
    assert metrics.num_objects.tolist() == [1]


def test_no_object_at_all() -> None:
    empty = Objects([np.zeros((0, 6))])
    assert voc_metrics(empty, as_results(np.array([[0, 0, 0.9, *BOX]]), 1)).mean == -1
    assert average_precision(np.zeros(0, bool), 3, "voc07") == 0
    assert average_precision(np.zeros(0, bool), 3, "voc12") == 0


def test_difficult_objects_of_voc_files_are_ignored(tmp_path: Path) -> None:
    objects: list[Object] = [("ant", (1, 1, 10, 10), 0), ("ant", (31, 21, 40, 30), 1)]
    dataset = IndexedDataset(*write_voc(tmp_path, {"000000": objects}), cache_dir=tmp_path / "cache")
    detections = np.array([[0, 0, 0.9, 31, 21, 40, 30], [0, 0, 0.8, *HALF]])
    assert voc_metrics(dataset, as_results(detections, 1), interpolation="voc07").mean == 1


def test_voc_ap_is_close_to_coco_ap50(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "coco_mini"
    dataset = IndexedDataset(folder / "annotations" / "instances_val2017.json", folder / "val2017", cache_dir=tmp_path)
    path = folder / "annotations" / "yolox_nano_val2017_subset_bbox_results.json"
    results = read_results(path, dataset.categories, dataset.image_ids.tolist())
    coco = coco_metrics(dataset, results)
    voc = voc_metrics(dataset, results, interpolation="voc12")
    assert voc.num_objects.tolist() == coco.num_objects.tolist()
    assert voc.mean == pytest.approx(coco.summary["AP50"], abs=0.01)
    # COCO samples precision at 101 recalls. In dense images it can match a detection to the second-best object, and
    # it ignores detections inside crowd regions.
    crowded = np.isin(np.arange(80), dataset.index.labels[dataset.index.crowd])
    measured = (voc.num_objects > 0) & ~crowded
    differences = np.abs(voc.per_class[measured] - coco.per_class[measured, 1])
    assert np.quantile(differences, 0.95) < 0.01
    assert differences.max() < 0.07


def test_five_thousand_images_take_seconds() -> None:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(5000):
        corners = rng.integers(1, 500, (7, 2))
        images.append(
            np.column_stack(
                [rng.integers(0, 3, 7), corners, corners + rng.integers(20, 100, (7, 2)), corners[:, 0] < 20]
            )
        )
    detections = np.concatenate(
        [
            np.column_stack([np.full(70, k), np.tile(rows[:, 0], 10), rng.random(70), np.tile(rows[:, 1:5], (10, 1))])
            for k, rows in enumerate(images)
        ]
    )
    dataset, results = Objects(images), as_results(detections, 5000)
    start = time.perf_counter()
    assert voc_metrics(dataset, results).mean > 0.09
    assert time.perf_counter() - start < 10
