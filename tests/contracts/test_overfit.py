"""A detector must be able to overfit four real images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.loader import EvaluationLoader, TrainingLoader
from boxwright.detectors.rcnn import mask_rcnn
from boxwright.evaluation.evaluate import evaluate
from boxwright.heads.mask_head import MaskConfig
from factory import SMALL_BOX, SMALL_RPN, small_backbone

RESIZE = Resize(short=96, long=160)
NUM_STEPS = 180
PEAK_LEARNING_RATE = 2.5e-3


def four_images(folder: Path, annotations: Path) -> IndexedDataset:
    """The first images of `coco_mini` that contain one to three objects, all of them large."""
    document = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    objects: dict[int, list[dict]] = {}
    for annotation in document["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    images = [
        image
        for image in document["images"]
        if image["width"] > image["height"]
        and 1 <= len(objects.get(image["id"], ())) <= 3
        and all(o["area"] > 6000 and not o["iscrowd"] for o in objects[image["id"]])
    ][:4]
    objects_kept = [o for image in images for o in objects[image["id"]]]
    annotations.write_text(json.dumps({**document, "images": images, "annotations": objects_kept}))
    return IndexedDataset(annotations, folder / "train2017")


def test_boxes_and_masks_of_four_real_images_are_overfitted(data_dir: Path, tmp_path: Path) -> None:
    """End to end for boxes and masks: from polygons in a file to masks pasted into the images."""
    dataset = four_images(data_dir / "coco_mini", tmp_path / "four.json")
    torch.manual_seed(0)
    detector = mask_rcnn(
        backbone=small_backbone(),
        num_classes=len(dataset.categories),
        rpn=SMALL_RPN,
        box=SMALL_BOX,
        mask=MaskConfig(width=64, num_convs=2),
    )
    optimizer = torch.optim.AdamW(detector.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, NUM_STEPS)
    loader = TrainingLoader(
        dataset,
        augmentation=Augmentation(resize=RESIZE, flip=0.0),
        batch_size=4,
        masks=True,
        seed=0,
        num_workers=0,
    )
    batch = next(loader.batches())
    for step in range(NUM_STEPS):
        losses = detector.losses(replace(batch, seeds=batch.seeds + step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    images = EvaluationLoader(dataset, batch_size=4, resize=RESIZE, num_workers=0)
    _, metrics = evaluate(detector, dataset, images, device="cpu")
    assert metrics.masks is not None
    assert metrics.summary["AP"] > 0.85
    assert metrics.masks.summary["AP"] > 0.7
