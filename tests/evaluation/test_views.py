"""Test-time augmentation: the detections of several views of an image are merged by NMS, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from boxwright.data.buckets import Resize
from boxwright.data.dataset import Sample
from boxwright.data.loader import EvaluationLoader
from boxwright.evaluation.evaluate import detect_dataset, evaluate
from boxwright.evaluation.results import Results, read_results, write_results
from boxwright.evaluation.views import View, evaluate_views, merge_views, view_suppression, views_of
from boxwright.geometry.affine import transform_boxes
from boxwright.geometry.boxes import iou
from boxwright.heads.suppression import Suppression
from boxwright.structures import Batch, Detections
from factory import small_detector
from generated_images import GeneratedImages

IMAGES = GeneratedImages(11)
SUPPRESSION = Suppression(score_threshold=0.05, iou_threshold=0.5, max_detections=20)
FIELDS = ("image_ids", "labels", "scores", "boxes", "evaluated")


class HalfBlind(nn.Module):
    """Returns the ground truth of `IMAGES`: objects in even slots for plain views, in odd slots for mirrored views."""

    num_classes = 2
    max_detections = 4
    suppression = SUPPRESSION

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def detect(self, batch: Batch) -> Detections:
        num_images = len(batch.image_ids)
        boxes = torch.full((num_images, 4, 4), torch.nan)
        labels = torch.zeros(num_images, 4, dtype=torch.int64)
        valid = torch.zeros(num_images, 4, dtype=torch.bool)
        for b, image_id in enumerate(batch.image_ids.tolist()):
            sample = IMAGES[image_id - 100]
            count = len(sample.boxes)
            boxes[b, :count] = transform_boxes(torch.from_numpy(sample.boxes)[None], batch.transforms[b : b + 1])[0]
            labels[b, :count] = torch.from_numpy(sample.labels)
            valid[b, :count] = torch.arange(count) % 2 == int(batch.transforms[b, 0, 0] < 0)
        scores = torch.linspace(0.9, 0.6, 4).expand(num_images, 4)
        return Detections(boxes=boxes, scores=scores, labels=labels, valid=valid)


def loaders(rank: int = 0, world_size: int = 1) -> list[EvaluationLoader]:
    return [
        EvaluationLoader(
            IMAGES,
            batch_size=2,
            resize=view.resize,
            flipped=view.flipped,
            num_workers=0,
            rank=rank,
            world_size=world_size,
        )
        for view in views_of(Resize(90, 120), (60, 90))
    ]


def random_results(seed: int, count: int = 400) -> Results:
    """Detections in 66 of 100 images."""
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(20, 40, (count, 2))
    return Results(
        image_ids=np.sort(rng.integers(0, 66, count)) + 7,
        boxes=np.concatenate([corner, side], axis=1).round(3),
        scores=rng.uniform(0, 1, count),
        labels=rng.integers(0, 2, count),
        evaluated=np.arange(100),
    )


def test_sizes_and_mirrored_views() -> None:
    assert views_of(Resize(800, 1333)) == [View(Resize(800, 1333)), View(Resize(800, 1333), True)]
    assert views_of(Resize(800, 1333), flip=False) == [View(Resize(800, 1333))]
    sizes = [Resize(640, 1066), Resize(960, 1600)]
    assert views_of(Resize(800, 1333), (640, 960)) == [View(size, flip) for size in sizes for flip in (False, True)]


def test_merging_is_nms_over_the_detections_of_all_views() -> None:
    views = [random_results(seed) for seed in range(3)]
    merged = merge_views(views, SUPPRESSION)
    assert merged.evaluated.tolist() == list(range(100))
    num_dropped = 0
    for image_id in range(100):
        of_image = [view.select(view.image_ids == image_id) for view in views]
        scores, labels, boxes = (
            np.concatenate([getattr(view, name) for view in of_image]) for name in ("scores", "labels", "boxes")
        )
        candidates = [row for row in zip(-scores, range(len(scores)), labels, boxes, strict=True) if row[0] < -0.05]
        kept: list = []
        for candidate in sorted(candidates, key=lambda row: row[:2]):
            corners = [torch.tensor([*box[:2], *(box[:2] + box[2:])])[None] for *_, box in [candidate, *kept]]
            rivals = [corner for corner, row in zip(corners[1:], kept, strict=True) if row[2] == candidate[2]]
            if all(iou(corners[0], rival) <= 0.5 for rival in rivals):
                kept.append(candidate)
        num_dropped += len(candidates) - len(kept)
        rows = merged.image_ids == image_id
        assert merged.scores[rows].tolist() == [-row[0] for row in kept[:20]]
        assert merged.labels[rows].tolist() == [row[2] for row in kept[:20]]
        assert merged.boxes[rows].tolist() == [row[3].tolist() for row in kept[:20]]
    assert num_dropped > 100


def test_soft_nms_lowers_the_scores_of_detections_in_several_views() -> None:
    view = random_results(0, count=50)
    apart = replace(view, image_ids=np.arange(50))
    merged = merge_views([apart, apart], replace(SUPPRESSION, method="linear", score_threshold=0.0))
    # The IoU with the copy is 1, so the score of the copy drops to 0.
    np.testing.assert_array_equal(merged.scores, apart.scores)
    gaussian = merge_views([apart, apart], replace(SUPPRESSION, method="gaussian", score_threshold=0.0))
    assert gaussian.scores[1::2] == pytest.approx(apart.scores * np.exp(-1 / 0.5))


KINDS = ("faster_rcnn", "mask_rcnn", "retinanet")


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_one_view_equals_plain_detection_and_a_duplicate_view_has_no_effect(kind: str) -> None:
    detector = small_detector(kind, num_classes=2)
    plain, metrics = evaluate(detector, IMAGES, loaders()[0], device="cpu")
    assert len(plain) > 20
    for num_views in (1, 2):
        results, theirs = evaluate_views(detector, IMAGES, [loaders()[0]] * num_views, device="cpu")
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(results, name), getattr(plain, name))
        assert theirs.summary == metrics.summary
        assert (results.masks is None) == (kind != "mask_rcnn")
        if results.masks is not None:
            assert results.masks.to_coco() == plain.masks.to_coco()


class Mirrored(GeneratedImages):
    """The same images with left and right swapped."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, image=sample.image[:, ::-1].copy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mirrored_view_of_a_mirrored_image_gives_the_mirrored_detections(kind: str) -> None:
    detector = small_detector(kind, num_classes=2)
    common = {"batch_size": 2, "native": True, "num_workers": 0}
    plain = detect_dataset(detector, EvaluationLoader(IMAGES, **common), device="cpu")
    turned = detect_dataset(detector, EvaluationLoader(Mirrored(11), flipped=True, **common), device="cpu")
    assert len(plain) > 20
    for name in ("image_ids", "labels", "scores", "evaluated"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(plain, name))
    widths = np.array([IMAGES[image_id - 100].image.shape[1] for image_id in plain.image_ids])
    np.testing.assert_allclose(turned.boxes[:, 0] + turned.boxes[:, 2], widths - plain.boxes[:, 0], atol=2e-3)
    np.testing.assert_allclose(turned.boxes[:, 1:], plain.boxes[:, 1:], atol=2e-3)
    if kind == "mask_rcnn":
        assert max(mask.mean() for mask in plain.masks) > 0.05
        for mask, other in zip(plain.masks, turned.masks, strict=True):
            assert (mask != other[:, ::-1]).mean() < 0.002


def test_views_complement_each_other() -> None:
    _, alone = evaluate(HalfBlind(), IMAGES, loaders()[0], device="cpu")
    _, together = evaluate_views(HalfBlind(), IMAGES, loaders(), device="cpu")
    assert alone.summary["AP"] < 0.6
    assert together.summary["AP"] == pytest.approx(1)


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results, _ = evaluate_views(HalfBlind(), IMAGES, loaders(rank, world_size), device="cpu")
    write_results(Path(folder) / f"results_{rank}.json", results, IMAGES.categories)
    dist.destroy_process_group()


def test_two_ranks_give_the_results_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_on_rank, args=(2, str(tmp_path)), nprocs=2)
    results, _ = evaluate_views(HalfBlind(), IMAGES, loaders(), device="cpu")
    for rank in range(2):
        theirs = read_results(tmp_path / f"results_{rank}.json", IMAGES.categories, results.evaluated)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(theirs, name), getattr(results, name))


def test_detectors_without_suppression_are_refused() -> None:
    with pytest.raises(ValueError, match="ProposalNetwork has no `suppression`"):
        view_suppression(small_detector("rpn"))
