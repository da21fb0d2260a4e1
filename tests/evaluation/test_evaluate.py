"""Running a detector over a data set brings every box back to its file, the same for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category
from boxwright.data.loader import EvaluationLoader
from boxwright.evaluation.evaluate import detect_dataset, evaluate
from boxwright.evaluation.results import Results, match_categories, read_results, write_results
from boxwright.structures import Batch, Detections
from pictures import Pictures

PICTURES = Pictures(11)


class Oracle(nn.Module):
    """Knows the objects of `PICTURES`, and puts them where they lie on the canvas."""

    num_classes = 2

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def detect(self, batch: Batch) -> Detections:
        assert not self.training
        num_images = len(batch.image_ids)
        boxes = torch.full((num_images, 4, 4), torch.nan)
        labels = torch.zeros(num_images, 4, dtype=torch.int64)
        valid = torch.zeros(num_images, 4, dtype=torch.bool)
        for b, image_id in enumerate(batch.image_ids.tolist()):
            sample = PICTURES[image_id - 100]
            count = len(sample.boxes)
            scale = batch.transforms[b, [0, 1, 0, 1], [0, 1, 0, 1]]
            boxes[b, :count] = torch.from_numpy(sample.boxes) * scale
            labels[b, :count] = torch.from_numpy(sample.labels)
            valid[b, :count] = True
        scores = torch.linspace(0.9, 0.6, 4).expand(num_images, 4)
        return Detections(boxes=boxes, scores=scores, labels=labels, valid=valid)


def loader(rank: int = 0, world_size: int = 1) -> EvaluationLoader:
    return EvaluationLoader(
        PICTURES, batch_size=2, resize=Resize(90, 120), num_workers=0, rank=rank, world_size=world_size
    )


def test_boxes_come_back_to_the_files() -> None:
    detector, seen = Oracle(), []
    results = detect_dataset(detector, loader(), device="cpu", progress=seen.append)
    assert detector.training
    assert sum(seen) == len(PICTURES)
    assert results.evaluated.tolist() == list(range(100, 111))
    for index in range(len(PICTURES)):
        sample = PICTURES[index]
        rows = results.image_ids == sample.image_id
        corners = results.boxes[rows]
        expected = np.minimum(sample.boxes, np.tile(sample.image.shape[1::-1], 2))
        np.testing.assert_allclose(corners[:, :2], expected[:, :2], atol=2e-3)
        np.testing.assert_allclose(corners[:, :2] + corners[:, 2:], expected[:, 2:], atol=2e-3)
        assert results.labels[rows].tolist() == sample.labels.tolist()


def test_the_best_of_an_image_can_be_all_that_is_kept() -> None:
    everything, best = (detect_dataset(Oracle(), loader(), device="cpu", limit=limit) for limit in (None, 2))
    assert len(best) < len(everything)
    for image_id in everything.evaluated:
        wanted = everything.boxes[everything.image_ids == image_id][:2]
        np.testing.assert_array_equal(best.boxes[best.image_ids == image_id], wanted)


def test_evaluate_maps_categories_by_name() -> None:
    _, metrics = evaluate(Oracle(), PICTURES, loader(), device="cpu")
    assert metrics.summary["AP"] == pytest.approx(1)
    turned = (Category(id=0, name="two"), Category(id=1, name="one"))
    _, metrics = evaluate(Oracle(), PICTURES, loader(), device="cpu", categories=turned)
    assert metrics.summary["AP50"] == pytest.approx(0, abs=0.5)
    assert match_categories(turned, PICTURES.categories) == [1, 0]
    with pytest.raises(ValueError, match=r"Only in the model \(1 categories\): dog.*Only in the data.*: one, two"):
        match_categories([Category(id=1, name="dog")], PICTURES.categories)


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results, metrics = evaluate(Oracle(), PICTURES, loader(rank, world_size), device="cpu")
    write_results(Path(folder) / f"results_{rank}.json", results, PICTURES.categories)
    (Path(folder) / f"metrics_{rank}.json").write_text(json.dumps([metrics.summary, metrics.per_class.tolist()]))
    dist.destroy_process_group()


def test_two_ranks_have_what_one_has(tmp_path: Path) -> None:
    multiprocessing.spawn(_on_rank, args=(2, str(tmp_path)), nprocs=2)
    results, metrics = evaluate(Oracle(), PICTURES, loader(), device="cpu")
    for rank in range(2):
        theirs = read_results(tmp_path / f"results_{rank}.json", PICTURES.categories, results.evaluated)
        for name in ("image_ids", "boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(results, name))
        summary, per_class = json.loads((tmp_path / f"metrics_{rank}.json").read_text())
        assert summary == metrics.summary
        assert per_class == metrics.per_class.tolist()


def test_results_files(tmp_path: Path) -> None:
    results = detect_dataset(Oracle(), loader(), device="cpu")
    path = tmp_path / "deep" / "results.json"
    write_results(path, results, PICTURES.categories)
    rows = json.loads(path.read_text())
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {row["category_id"] for row in rows} == {1, 5}
    again = read_results(path, PICTURES.categories, results.evaluated)
    assert isinstance(again, Results)
    np.testing.assert_array_equal(again.scores, results.scores)
    np.testing.assert_array_equal(again.boxes, results.boxes)
    assert list(path.parent.iterdir()) == [path]

    with pytest.raises(ValueError, match=r"category ids \[5\]"):
        read_results(path, PICTURES.categories[:1])
    path.write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match="not a COCO results file"):
        read_results(path, PICTURES.categories)
