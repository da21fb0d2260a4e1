"""The report has all its sections, the right values, and no references to other files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.results import Results, read_results
from boxwright.report.html import write_report


def test_report_of_real_detections(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "coco_mini"
    dataset = IndexedDataset(*find_layout(folder)["val"], cache_dir=tmp_path / "cache")
    path = folder / "annotations" / "yolox_nano_val2017_subset_bbox_results.json"
    results = read_results(path, dataset.categories, dataset.image_ids.tolist())
    metrics = coco_metrics(dataset, results)
    lines = [
        {"kind": "train", "step": 1, "total": 2.0, "losses": {"a": 1.5, "b": 0.5}, "learning_rate": 0.01},
        {"kind": "train", "step": 2, "total": 1.0, "losses": {"a": 0.6, "b": 0.4}, "learning_rate": 0.02},
        {"kind": "evaluation", "step": 2, "metrics": {"AP": 0.3, "AP50": 0.5}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path, dataset, results, metrics, title="run <1>", num_images=3).read_text()

    assert "run &lt;1&gt;" in page
    assert f"<b>{100 * metrics.summary['AP']:.1f}</b>" in page
    for heading in ("Metrics", "Training", "Classes", "Precision and recall", "Confusion", "Worst images"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('<th scope="row">') == 80
    assert page.count("data:image/jpeg;base64,") == 6
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert [float(value) for value in re.findall(r"F1 (\d\.\d+)", page)] == [0, 0, 0]


def test_report_of_masks(data_dir: Path, tmp_path: Path) -> None:
    """The results are the annotated objects of half of COCO's images."""
    folder = data_dir / "coco_mini"
    dataset = IndexedDataset(*find_layout(folder)["val"], cache_dir=tmp_path / "cache")
    truth = GroundTruth(dataset)
    objects = truth.coco.load_anns(truth.coco.get_ann_ids(img_ids=dataset.image_ids[::2].tolist(), iscrowd=False))
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    results = Results(
        image_ids=np.array([annotation["image_id"] for annotation in objects]),
        boxes=np.array([annotation["bbox"] for annotation in objects]),
        scores=np.linspace(1, 0.4, len(objects)),
        labels=np.array([labels[annotation["category_id"]] for annotation in objects]),
        evaluated=dataset.image_ids,
        masks=truth.masks(objects),
    )
    metrics = coco_metrics(truth, results)
    assert metrics.masks is not None
    assert metrics.masks.summary["AP"] == pytest.approx(metrics.summary["AP"], abs=0.02)
    line = {"kind": "evaluation", "step": 2, "metrics": metrics.numbers}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report(tmp_path, dataset, results, metrics, num_images=2).read_text()
    assert "<h3>Masks</h3>" in page
    assert page.count(f"<b>{100 * metrics.masks.summary['AR1']:.1f}</b>") >= 1
    assert "<th>mask AP50</th>" in page
    assert "mean over the classes: masks" in page
    assert "mask_AP" in page
    assert page.count("data:image/jpeg;base64,") == 4


def test_report_of_proposals(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "coco_mini"
    dataset = IndexedDataset(*find_layout(folder)["val"], cache_dir=tmp_path / "cache")
    path = folder / "annotations" / "yolox_nano_val2017_subset_bbox_results.json"
    results = read_results(path, dataset.categories)
    recall = {"AR@100": 0.4, "AR@1000": -1.0, "ARs@100": 0.2}
    line = {"kind": "evaluation", "step": 2, "metrics": recall}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report(tmp_path, dataset, results, recall).read_text()
    assert "<b>40.0</b><span>AR@100</span>" in page
    assert "<b>-</b>" in page
    assert "<h2>Classes</h2>" not in page
    assert "AR on the validation split, %" in page
    assert page.count("ARs@100") == 1, "the training curves should only have AR over all sizes"
    assert "precision" not in page


def test_a_class_without_masks_is_excluded_from_the_mask_curve(data_dir: Path, tmp_path: Path) -> None:
    """The results are all annotated objects of COCO's images; the masks of class person are removed beforehand."""
    folder = data_dir / "coco_mini"
    source = find_layout(folder)["val"]
    document = json.loads(source.annotations.read_text())
    for annotation in document["annotations"]:
        if annotation["category_id"] == 1:
            del annotation["segmentation"]
    annotations = tmp_path / "instances_val.json"
    annotations.write_text(json.dumps(document))
    dataset = IndexedDataset(annotations, source.images, cache_dir=tmp_path / "cache")
    truth = GroundTruth(dataset)
    objects = truth.coco.load_anns(truth.coco.get_ann_ids(img_ids=dataset.image_ids.tolist(), iscrowd=False))
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    results = Results(
        image_ids=np.array([annotation["image_id"] for annotation in objects]),
        boxes=np.array([annotation["bbox"] for annotation in objects]),
        scores=np.linspace(1, 0.4, len(objects)),
        labels=np.array([labels[annotation["category_id"]] for annotation in objects]),
        evaluated=dataset.image_ids,
        masks=truth.masks(objects),
    )
    metrics = coco_metrics(truth, results)
    assert metrics.masks is not None
    assert metrics.masks.per_class[0, 0] == -1
    page = write_report(tmp_path, dataset, results, metrics, num_images=0).read_text()
    chart = page.split("mean over the classes: masks")[-1].split("</svg>")[0]
    for points in re.findall(r'points="([^"]*)"', chart):
        assert {point.split(",")[1] for point in points.split()} == {"8.0"}, "precision should be 1 at every recall"
    assert "<polyline" in chart
