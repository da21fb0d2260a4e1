"""Detections over a data set are in the coordinates of the original images, equal for any number of ranks."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category
from boxwright.data.loader import EvaluationLoader
from boxwright.data.masks import Masks, rle
from boxwright.evaluation import evaluate as evaluate_module
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.evaluate import detect_dataset, evaluate, file_masks
from boxwright.evaluation.propose import propose
from boxwright.evaluation.results import Results, match_categories, read_results, write_results
from boxwright.evaluation.voc import voc_metrics
from boxwright.structures import Batch, Detections
from generated_images import GeneratedImages

IMAGES = GeneratedImages(11)


class Oracle(nn.Module):
    """Returns the ground truth of `IMAGES`, in coordinates of the canvas."""

    num_classes = 2
    max_detections = 4

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def detect(self, batch: Batch) -> Detections:
        assert not self.training
        num_images = len(batch.image_ids)
        boxes = torch.full((num_images, 4, 4), torch.nan)
        labels = torch.zeros(num_images, 4, dtype=torch.int64)
        valid = torch.zeros(num_images, 4, dtype=torch.bool)
        for b, image_id in enumerate(batch.image_ids.tolist()):
            sample = IMAGES[image_id - 100]
            count = len(sample.boxes)
            scale = batch.transforms[b, [0, 1, 0, 1], [0, 1, 0, 1]]
            boxes[b, :count] = torch.from_numpy(sample.boxes) * scale
            labels[b, :count] = torch.from_numpy(sample.labels)
            valid[b, :count] = True
        scores = torch.linspace(0.9, 0.6, 4).expand(num_images, 4)
        return Detections(boxes=boxes, scores=scores, labels=labels, valid=valid)


class MaskOracle(Oracle):
    """Also returns an ellipse as the mask of every object."""

    def detect(self, batch: Batch) -> Detections:
        places = torch.linspace(-1, 1, 28)
        ellipse = (1.3 - (places[:, None] ** 2 + places**2) / 1.3).clamp(0, 1)
        detections = super().detect(batch)
        masks = ellipse.expand(*detections.valid.shape, 28, 28)
        return replace(detections, masks=torch.where(detections.valid[..., None, None], masks, torch.nan))


def loader(rank: int = 0, world_size: int = 1) -> EvaluationLoader:
    return EvaluationLoader(
        IMAGES, batch_size=2, resize=Resize(90, 120), num_workers=0, rank=rank, world_size=world_size
    )


def test_boxes_are_mapped_to_the_original_images() -> None:
    detector, steps = Oracle(), []
    results = detect_dataset(detector, loader(), device="cpu", progress=steps.append)
    assert detector.training
    assert sum(steps) == len(IMAGES)
    assert results.evaluated.tolist() == list(range(100, 111))
    for index in range(len(IMAGES)):
        sample = IMAGES[index]
        rows = results.image_ids == sample.image_id
        corners = results.boxes[rows]
        expected = np.minimum(sample.boxes, np.tile(sample.image.shape[1::-1], 2))
        np.testing.assert_allclose(corners[:, :2], expected[:, :2], atol=2e-3)
        np.testing.assert_allclose(corners[:, :2] + corners[:, 2:], expected[:, 2:], atol=2e-3)
        assert results.labels[rows].tolist() == sample.labels.tolist()


def test_masks_are_mapped_to_the_original_images() -> None:
    results = detect_dataset(MaskOracle(), loader(), device="cpu")
    masks = results.masks
    assert masks is not None
    assert len(masks) == len(results) > 10
    sizes = {sample.image_id: sample.image.shape[:2] for sample in (IMAGES[i] for i in range(len(IMAGES)))}
    for image_id, (x, y, width, height), mask in zip(results.image_ids.tolist(), results.boxes, masks, strict=True):
        assert mask.shape == sizes[image_id]
        inside = mask[max(0, round(y - 1)) : round(y + height + 1), max(0, round(x - 1)) : round(x + width + 1)]
        assert inside.sum() == mask.sum()
        assert mask.sum() == pytest.approx(0.73 * width * height, rel=0.15)
    selected = results.select(results.scores > 0.75).relabel([1, 0])
    assert selected.masks is not None
    assert selected.masks.to_coco() == masks.select(results.scores > 0.75).to_coco()


def test_masks_are_encoded_while_the_next_batch_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = detect_dataset(MaskOracle(), loader(), device="cpu")
    batches, started = list(loader()), []
    next_started = [threading.Event() for _ in batches]

    class Signalling(MaskOracle):
        def detect(self, batch: Batch) -> Detections:
            if started:
                next_started[len(started) - 1].set()
            started.append(batch)
            return super().detect(batch)

    def wait_for_next_batch(batch: Batch, detections: Detections) -> Masks:
        number = next(index for index, other in enumerate(batches) if other is batch)
        assert number == len(batches) - 1 or next_started[number].wait(timeout=30), (
            "the next batch must not wait for masks"
        )
        return file_masks(batch, detections)

    monkeypatch.setattr(evaluate_module, "file_masks", wait_for_next_batch)
    actual = detect_dataset(Signalling(), batches, device="cpu")
    assert len(started) == len(batches) > 2
    assert actual.masks is not None
    assert expected.masks is not None
    assert actual.masks.to_coco() == expected.masks.to_coco()


def test_an_error_while_encoding_masks_stops_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Masks:
        raise ValueError("no such size")

    steps: list[int] = []
    monkeypatch.setattr(evaluate_module, "file_masks", broken)
    with pytest.raises(ValueError, match="no such size"):
        detect_dataset(MaskOracle(), loader(), device="cpu", progress=steps.append)
    assert steps == [2]


def test_training_mode_is_restored_when_detection_is_interrupted() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    detector = Oracle()
    with pytest.raises(KeyboardInterrupt):
        detect_dataset(detector, loader(), device="cpu", progress=stop)
    assert detector.training


def test_the_limit_of_the_detector_is_the_default_limit_of_the_metrics() -> None:
    _, metrics = evaluate(Oracle(), IMAGES, loader(), device="cpu")
    assert "AR100" in metrics.summary
    crowded = Oracle()
    crowded.max_detections = 400
    _, metrics = evaluate(crowded, IMAGES, loader(), device="cpu")
    assert list(metrics.summary)[6:9] == ["AR1", "AR10", "AR400"]
    _, metrics = evaluate(crowded, IMAGES, loader(), device="cpu", max_detections=(1, 10, 100))
    assert "AR100" in metrics.summary


def test_limit_keeps_the_best_detections_of_each_image() -> None:
    everything, best = (detect_dataset(Oracle(), loader(), device="cpu", limit=limit) for limit in (None, 2))
    assert len(best) < len(everything)
    for image_id in everything.evaluated:
        expected = everything.boxes[everything.image_ids == image_id][:2]
        np.testing.assert_array_equal(best.boxes[best.image_ids == image_id], expected)


@pytest.mark.parametrize("label", [2, -1])
def test_labels_out_of_range_are_refused(label: int) -> None:
    """As an index into the categories, 2 would raise an IndexError and -1 would select the last class."""

    class OtherLabel(Oracle):
        def detect(self, batch: Batch) -> Detections:
            detections = super().detect(batch)
            return replace(detections, labels=torch.where(batch.image_ids[:, None] == 103, label, detections.labels))

    with pytest.raises(ValueError, match=rf"OtherLabel.detect: label of a detection: expected 0 to 1 .*, got {label}"):
        detect_dataset(OtherLabel(), loader(), device="cpu")


def test_labels_of_invalid_slots_may_be_anything() -> None:
    class AnyLabel(Oracle):
        def detect(self, batch: Batch) -> Detections:
            detections = super().detect(batch)
            return replace(detections, labels=torch.where(detections.valid, detections.labels, 99))

    expected = detect_dataset(Oracle(), loader(), device="cpu")
    assert detect_dataset(AnyLabel(), loader(), device="cpu").labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize("label", [2, -1])
def test_metrics_refuse_labels_out_of_range(label: int) -> None:
    results = detect_dataset(Oracle(), loader(), device="cpu")
    wrong = replace(results, labels=np.full_like(results.labels, label))
    for measure in (coco_metrics, voc_metrics):
        with pytest.raises(
            ValueError, match=rf"detection 0: label: expected an index of a category, 0 to 1, got {label}"
        ):
            measure(IMAGES, wrong)


def test_training_mode_is_restored_when_proposing_fails() -> None:
    detector = Oracle()
    with pytest.raises(ValueError, match="broken"):
        propose(detector, IMAGES, loader(), device="cpu", progress=_break)
    assert detector.training


def _break(_: int) -> None:
    raise ValueError("broken")


def test_evaluate_maps_categories_by_name() -> None:
    _, metrics = evaluate(Oracle(), IMAGES, loader(), device="cpu")
    assert metrics.summary["AP"] == pytest.approx(1)
    turned = (Category(id=0, name="two"), Category(id=1, name="one"))
    _, metrics = evaluate(Oracle(), IMAGES, loader(), device="cpu", categories=turned)
    assert metrics.summary["AP50"] == pytest.approx(0, abs=0.5)
    assert match_categories(turned, IMAGES.categories) == [1, 0]
    with pytest.raises(ValueError, match=r"Only in the model \(1 categories\): dog.*Only in the data.*: one, two"):
        match_categories([Category(id=1, name="dog")], IMAGES.categories)


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results, metrics = evaluate(MaskOracle(), IMAGES, loader(rank, world_size), device="cpu")
    write_results(Path(folder) / f"results_{rank}.json", results, IMAGES.categories)
    (Path(folder) / f"metrics_{rank}.json").write_text(json.dumps([metrics.numbers, metrics.per_class.tolist()]))
    _share_few_images(rank, world_size)
    dist.destroy_process_group()


def _share_few_images(rank: int, world_size: int) -> None:
    """Evaluate one image without objects (rank 1 gets no image), then two images, of which the second has an object."""
    for count in (1, 2):
        few = GeneratedImages(count)
        batches = EvaluationLoader(
            few, batch_size=2, resize=Resize(90, 120), num_workers=0, rank=rank, world_size=world_size
        )
        results, metrics = evaluate(MaskOracle(), few, batches, device="cpu")
        assert results.evaluated.tolist() == [100, 101][:count]
        assert len(results) == count - 1
        assert results.masks is not None
        assert len(results.masks) == len(results)
        assert metrics.masks is not None


def test_two_ranks_give_the_results_of_one_even_without_images_or_detections(tmp_path: Path) -> None:
    multiprocessing.spawn(_on_rank, args=(2, str(tmp_path)), nprocs=2)
    results, metrics = evaluate(MaskOracle(), IMAGES, loader(), device="cpu")
    assert results.masks is not None
    for rank in range(2):
        theirs = read_results(tmp_path / f"results_{rank}.json", IMAGES.categories, results.evaluated)
        for name in ("image_ids", "boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(results, name))
        assert theirs.masks is not None
        assert theirs.masks.to_coco() == results.masks.to_coco()
        summary, per_class = json.loads((tmp_path / f"metrics_{rank}.json").read_text())
        assert summary == metrics.numbers
        assert metrics.masks is not None
        assert per_class == metrics.per_class.tolist()


def test_results_files_of_masks(tmp_path: Path) -> None:
    results = detect_dataset(MaskOracle(), loader(), device="cpu")
    assert results.masks is not None
    path = tmp_path / "results.json"
    write_results(path, results, IMAGES.categories)
    again = read_results(path, IMAGES.categories, results.evaluated)
    assert again.masks is not None
    assert again.masks.to_coco() == results.masks.to_coco()

    rows = json.loads(path.read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    for row, mask in zip(rows, results.masks, strict=True):  # masks without boxes, uncompressed RLE
        del row["bbox"]
        runs = rle.decompress(row["segmentation"]["counts"].encode())
        row["segmentation"]["counts"] = runs.tolist()
        y, x = mask.nonzero()
        row["expected"] = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
    path.write_text(json.dumps(rows, default=int))
    alone = read_results(path, IMAGES.categories)
    assert alone.masks is not None
    assert alone.masks.to_coco() == results.masks.to_coco()
    np.testing.assert_array_equal(alone.boxes, [row["expected"] for row in rows])

    rows[1]["segmentation"]["counts"][0] += 1
    path.write_text(json.dumps(rows, default=int))
    with pytest.raises(ValueError, match="mask of entry 2 has run lengths of"):
        read_results(path, IMAGES.categories)
    rows[1]["segmentation"]["counts"] = "X"
    path.write_text(json.dumps(rows, default=int))
    with pytest.raises(ValueError, match="invalid COCO compressed RLE"):
        read_results(path, IMAGES.categories)
    rows[1] |= {"segmentation": None, "bbox": [1, 1, 2, 2]}
    path.write_text(json.dumps(rows, default=int))
    with pytest.raises(ValueError, match=f"{len(rows) - 1} of {len(rows)} entries have a segmentation"):
        read_results(path, IMAGES.categories)
    path.write_text('[{"image_id": 100, "category_id": 1, "score": 1}]')
    with pytest.raises(ValueError, match="entry 1 has neither"):
        read_results(path, IMAGES.categories)


MASK = {"size": [4, 5], "counts": [5, 10, 5]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"segmentation": {"size": [4, 5], "counts": [-5, 25]}}, "not a COCO"),
        (
            {"segmentation": {"size": [4, 5], "counts": rle.compress([5, 10, -10, 15]).decode()}},
            "entry 1 has a negative run length",
        ),
        ({"segmentation": {"size": [-4, -5], "counts": [5, 15]}}, "not a COCO"),
        ({"segmentation": {"size": [0, 5], "counts": []}}, "not a COCO"),
        ({"segmentation": {"size": [4, 2**70], "counts": [20]}}, "not a COCO"),
        ({"segmentation": {"size": [4, 5], "counts": [2**50]}}, "not a COCO"),
        ({"image_id": 2**70, "segmentation": MASK}, "not a COCO"),
        ({"image_id": -1, "segmentation": MASK}, "not a COCO"),
    ],
)
def test_results_files_with_invalid_masks_or_ids_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 100, "category_id": 1, "score": 0.5, **changed}]))
    with pytest.raises(ValueError, match=message):
        read_results(path, IMAGES.categories)


def test_boxes_are_computed_from_masks_only_if_missing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    entry = {"image_id": 100, "category_id": 1, "score": 0.5, "segmentation": MASK}
    path.write_text(json.dumps([{**entry, "bbox": [1, 1, 2, 2.5]}, entry]))
    assert read_results(path, IMAGES.categories).boxes.tolist() == [[1, 1, 2, 2.5], [1, 0, 3, 4]]


def test_results_files(tmp_path: Path) -> None:
    results = detect_dataset(Oracle(), loader(), device="cpu")
    path = tmp_path / "deep" / "results.json"
    write_results(path, results, IMAGES.categories)
    rows = json.loads(path.read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {row["category_id"] for row in rows} == {1, 5}
    again = read_results(path, IMAGES.categories, results.evaluated)
    assert isinstance(again, Results)
    np.testing.assert_array_equal(again.scores, results.scores)
    np.testing.assert_array_equal(again.boxes, results.boxes)
    assert list(path.parent.iterdir()) == [path]

    with pytest.raises(ValueError, match=r"category ids \[5\]"):
        read_results(path, IMAGES.categories[:1])
    path.write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match="not a COCO results file"):
        read_results(path, IMAGES.categories)
