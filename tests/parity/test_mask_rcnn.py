"""Mask R-CNN equals torchvision's with the same weights, on real images with their real objects and masks.

The mask targets differ on purpose. torchvision samples the bitmap with RoIAlign, half a pixel off, and gets fractional
targets. Boxwright's targets are binary values at the cell centres, as in Detectron2; `tests/ops/test_mask_target.py`
compares them with pycocotools. The tests of losses and gradients therefore pass Boxwright's targets to torchvision's
model, and a separate test compares the targets of both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN, roi_heads

from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.detectors.rcnn import RCNN, mask_rcnn
from boxwright.geometry.conventions import TORCHVISION
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.ops.mask_target import mask_target
from boxwright.structures import Batch, map_tensors
from parity.peer import (
    NUM_CLASSES,
    converted,
    converted_gradients,
    in_float64,
    peer_inputs,
    peer_mask_rcnn,
    real_objects,
)

# numpy 2 warns about pycocotools' arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NUM_PROPOSALS = 100
POSITIVE_IOU = 0.1
NUM_SLOTS = NUM_PROPOSALS + 8
SIZE = 28


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_objects(data_dir)


@pytest.fixture(scope="module")
def bitmaps(data_dir: Path, batch: Batch) -> list[Tensor]:
    """Masks per image at the size of the resized image, rasterised by pycocotools from the polygons of the file."""
    index = IndexedDataset(*find_layout(data_dir / "coco_mini")["val"]).index
    drawn = []
    for image_id, matrix, (height, width) in zip(
        batch.image_ids.tolist(), batch.transforms.numpy(), batch.image_sizes.tolist(), strict=True
    ):
        objects = index.objects(int(np.flatnonzero(index.image_ids == image_id)[0]))
        masks = []
        for row in range(objects.start, objects.stop):
            polygons = [(p @ matrix[:, :2].T + matrix[:, 2]).ravel().tolist() for p in index.polygons(row)]
            runs = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            masks.append(torch.from_numpy(coco_mask.decode(runs)))
        drawn.append(torch.stack(masks))
    return drawn


@pytest.fixture(scope="module")
def peer(batch: Batch) -> MaskRCNN:
    return peer_mask_rcnn(batch, NUM_PROPOSALS, POSITIVE_IOU)


@pytest.fixture(scope="module")
def detector(peer: MaskRCNN) -> RCNN:
    detector = mask_rcnn(
        backbone=resnet_fpn(depth=50, frozen_stages=0, train_norm_affine=False),
        num_classes=NUM_CLASSES,
        conventions=TORCHVISION,
        rpn=RPNConfig(
            border=None,
            low_quality=0.0,
            num_proposals=NUM_PROPOSALS,
            test_pre_nms_per_level=1000,
            test_num_proposals=1000,
        ),
        # Every RoI is sampled, and every RoI may be positive.
        box=BoxConfig(num_sampled=NUM_SLOTS, positive_fraction=1.0, positive_iou=POSITIVE_IOU, smooth_l1_beta=1 / 9),
    )
    detector = in_float64(detector)
    missing, unexpected = detector.load_state_dict(converted(peer.state_dict()), strict=False)
    assert not unexpected
    assert not missing
    return detector


@torch.inference_mode()
def test_masks_of_detections_equal(
    batch: Batch, peer: MaskRCNN, detector: RCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer.transform, "postprocess", lambda detections, *_: detections)  # before pasting
    expected = peer.eval()(peer_inputs(batch)[0])
    actual = detector.detect(batch)
    for index, theirs in enumerate(expected):
        valid = actual.valid[index]
        assert len(theirs["boxes"]) == valid.sum() > 50, "too few detections for a meaningful comparison"
        assert len(theirs["labels"].unique()) > 3
        assert torch.equal(actual.labels[index][valid] + 1, theirs["labels"])
        assert theirs["masks"].std() > 0.1, "the masks are too uniform for a meaningful comparison"
        assert (actual.masks[index][valid] - theirs["masks"].squeeze(1)).abs().max() < 1e-9
        assert (actual.masks[index][~valid] == 0).all()


def test_losses_and_gradients_equal(
    batch: Batch, bitmaps: list[Tensor], peer: MaskRCNN, detector: RCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_positive = []

    def our_targets(_: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
        image = len(num_positive)
        num_positive.append(len(boxes))
        masks = map_tensors(batch.targets.masks, lambda t: t[image : image + 1])
        valid = torch.ones(1, len(boxes), dtype=torch.bool)
        return mask_target(masks, boxes[None], matched[None], valid, output_size=size)[0].double()

    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", our_targets)
    peer.train().backbone.eval()
    images, targets = peer_inputs(batch)
    expected = peer(images, [{**target, "masks": masks} for target, masks in zip(targets, bitmaps, strict=True)])
    actual = detector.losses(batch)
    assert len(num_positive) == 2
    num_objects = batch.targets.valid.sum(1).tolist()
    assert all(n > m for n, m in zip(num_positive, num_objects, strict=True)), (
        "proposals must be positive too, not only the ground-truth boxes"
    )
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "box_class": "loss_classifier",
        "box_regression": "loss_box_reg",
        "mask": "loss_mask",
    }
    for ours, theirs in names.items():
        assert actual[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-6), ours
        assert actual[ours] > 0
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    gradients = converted_gradients(peer)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-6, f"{name}: {error:.1e}"


def test_mask_targets_agree_after_the_half_pixel_shift(batch: Batch, bitmaps: list[Tensor]) -> None:
    for image, pixels in enumerate(bitmaps):
        count = len(pixels)
        boxes, matched = batch.targets.boxes[image, :count], torch.arange(count)
        masks = map_tensors(batch.targets.masks, lambda t, image=image: t[image : image + 1])
        ours = mask_target(masks, boxes[None], matched[None], torch.ones(1, count).bool(), output_size=SIZE)[0]
        # Shift boxes by half a pixel to undo the offset of RoIAlign with aligned=False.
        theirs = roi_heads.project_masks_on_boxes(pixels, boxes - 0.5, matched, SIZE) >= 0.5
        assert count >= 4
        ious = (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))
        assert ious.mean() > 0.95
