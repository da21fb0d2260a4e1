"""A detector that cannot learn four real pictures by heart cannot learn at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from boxwright.data.buckets import Resize
from boxwright.data.coco import CocoDataset
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.evaluation.evaluate import evaluate
from factory import small_detector

RESIZE = Resize(short=128, long=192)
NUM_STEPS = 220
PEAK_LEARNING_RATE = 1e-3


def four_pictures(folder: Path, annotations: Path) -> CocoDataset:
    """The first pictures of `coco_mini` with one to three large objects each and nothing else."""
    page = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    objects: dict[int, list[dict]] = {}
    for annotation in page["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    chosen = [
        image
        for image in page["images"]
        if image["width"] > image["height"]
        and 1 <= len(objects.get(image["id"], ())) <= 3
        and all(o["area"] > 6000 and not o["iscrowd"] for o in objects[image["id"]])
    ][:4]
    kept = [o for image in chosen for o in objects[image["id"]]]
    annotations.write_text(json.dumps({**page, "images": chosen, "annotations": kept}))
    return CocoDataset(annotations, folder / "train2017")


def test_four_real_pictures_are_learnt_by_heart(data_dir: Path, tmp_path: Path) -> None:
    dataset = four_pictures(data_dir / "coco_mini", tmp_path / "four.json")
    detector = small_detector("faster_rcnn", num_classes=len(dataset.categories))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, NUM_STEPS)
    loader = TrainingLoader(dataset, batch_size=4, resize=RESIZE, flip=0.0, seed=0, num_workers=0)
    batch = next(loader.batches())
    for step in range(NUM_STEPS):
        losses = detector.losses(replace(batch, seeds=batch.seeds + step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    pictures = EvaluationLoader(dataset, batch_size=4, resize=RESIZE, num_workers=0)
    _, metrics = evaluate(detector, dataset, pictures, device="cpu")
    assert metrics.summary["AP"] > 0.9
