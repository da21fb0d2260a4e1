"""Small detectors and random batches for tests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from boxwright.backbones.fpn import FPN, resnet_fpn
from boxwright.detectors.cascade_rcnn import CascadeConfig, cascade_mask_rcnn, cascade_rcnn
from boxwright.detectors.detector import Detector
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import fast_mask_rcnn, fast_rcnn, faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.structures import Batch, MaskGrids, Proposals, Targets
from extension.stranger.fcos import FCOSConfig, fcos

SMALL_RPN = RPNConfig(
    border=None,
    num_sampled=64,
    pre_nms_per_level=100,
    num_proposals=100,
    test_pre_nms_per_level=100,
    test_num_proposals=50,
)
NUM_PROPOSALS = 40
SMALL_BOX = BoxConfig(width=64, num_sampled=32, max_detections=20)
# A low threshold, so that an untrained head detects something.
SMALL_RETINA = RetinaConfig(num_convs=1, pre_nms_per_level=100, score_threshold=0.001, max_detections=20)

# Objects of 12 to 40 pixels, spread over the three levels of the small backbone.
SMALL_FCOS = FCOSConfig(num_convs=1, finest_limit=16.0, score_threshold=0.001, pre_nms_per_level=100, max_detections=20)

OHEM_BOX = replace(SMALL_BOX, hard_examples=True, class_agnostic=True, nms="gaussian")
CASCADE_BOX = replace(SMALL_BOX, class_agnostic=True)
SMALL_MASK = MaskConfig(width=16, num_convs=2)
NORMED_BOX = replace(SMALL_BOX, num_convs=2, conv_width=16, norm="gn", num_fcs=1)
ONE_MASK_HEAD = CascadeConfig(mean_of="probabilities", mask_in_all_stages=False)

DETECTORS = (
    "rpn",
    "fast_rcnn",
    "fast_mask_rcnn",
    "faster_rcnn",
    "mask_rcnn",
    "normed_mask_rcnn",
    "ohem_rcnn",
    "cascade_rcnn",
    "cascade_mask_rcnn",
    "cascade_one_mask_rcnn",
    "retinanet",
)
CONTRACT_DETECTORS = (*DETECTORS, "fcos")
"""The detectors of Boxwright, and one of an outside package."""


def small_backbone(*, recompute: bool = False) -> FPN:
    """P2 to P5 of 32 channels; P5 is P4 at every second position."""
    return resnet_fpn(depth=18, norm="gn", frozen_stages=0, out_stages=(2, 3, 4), channels=32, recompute=recompute)


def small_detector(kind: str, num_classes: int = 3, *, recompute: bool = False) -> Detector:
    """Build a small detector with the same weights in every call: one of CONTRACT_DETECTORS or "ohem_cascade_rcnn"."""
    torch.manual_seed(0)
    backbone = small_backbone(recompute=recompute)
    build = {
        "rpn": partial(proposal_network, rpn=SMALL_RPN),
        "fast_rcnn": partial(fast_rcnn, box=SMALL_BOX),
        "fast_mask_rcnn": partial(fast_mask_rcnn, box=SMALL_BOX, mask=SMALL_MASK),
        "faster_rcnn": partial(faster_rcnn, rpn=SMALL_RPN, box=SMALL_BOX),
        "retinanet": partial(retinanet, retina=SMALL_RETINA),
        "mask_rcnn": partial(mask_rcnn, rpn=SMALL_RPN, box=SMALL_BOX, mask=SMALL_MASK),
        "normed_mask_rcnn": partial(
            mask_rcnn,
            rpn=replace(SMALL_RPN, num_convs=2),
            box=NORMED_BOX,
            mask=replace(SMALL_MASK, norm="frozen_bn"),
        ),
        "fcos": partial(fcos, config=SMALL_FCOS),
        "ohem_rcnn": partial(faster_rcnn, rpn=SMALL_RPN, box=OHEM_BOX),
        "cascade_rcnn": partial(cascade_rcnn, rpn=SMALL_RPN, box=CASCADE_BOX),
        "ohem_cascade_rcnn": partial(cascade_rcnn, rpn=SMALL_RPN, box=replace(CASCADE_BOX, hard_examples=True)),
        "cascade_mask_rcnn": partial(cascade_mask_rcnn, rpn=SMALL_RPN, box=CASCADE_BOX, mask=SMALL_MASK),
        "cascade_one_mask_rcnn": partial(
            cascade_mask_rcnn, rpn=SMALL_RPN, box=CASCADE_BOX, cascade=ONE_MASK_HEAD, mask=SMALL_MASK
        ),
    }[kind]
    return build(backbone=backbone, num_classes=num_classes)


def random_targets(
    num_images: int, num_slots: int, num_objects: int, canvas: tuple[int, int], num_classes: int
) -> Targets:
    """Random boxes, classes and masks in the first `num_objects` slots; NaN boxes and frames in the other slots."""
    height, width = canvas
    corner = torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.6, height * 0.6])
    side = 12 + torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.3, height * 0.3])
    valid = (torch.arange(num_slots) < num_objects).expand(num_images, num_slots)
    boxes = torch.where(valid[..., None], torch.cat([corner, corner + side], -1), torch.nan)
    return Targets(
        boxes=boxes,
        labels=torch.randint(num_classes, (num_images, num_slots)),
        valid=valid.clone(),
        crowd=torch.zeros_like(valid),
        masks=MaskGrids(
            bitmaps=torch.randint(256, (num_images, num_slots, 8, 8), dtype=torch.uint8),
            frames=boxes + torch.tensor([-2.0, 1.0, 3.0, -4.0]),
            valid=valid.clone(),
        ),
    )


def random_proposals(targets: Targets, num_slots: int, canvas: tuple[int, int]) -> Proposals:
    """Boxes near objects in the first half of the slots, then random boxes; every fifth slot is invalid (NaN)."""
    height, width = canvas
    num_images = len(targets.valid)
    chosen = torch.arange(num_slots) % targets.valid.shape[1]
    near = targets.boxes[:, chosen] + 6 * torch.rand(num_images, num_slots, 4) - 3
    corner = torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.6, height * 0.6])
    side = 8 + torch.rand(num_images, num_slots, 2) * torch.tensor([width * 0.3, height * 0.3])
    around = targets.valid[:, chosen] & (torch.arange(num_slots) < num_slots // 2)
    valid = (torch.arange(num_slots) % 5 != 4).expand(num_images, num_slots)
    boxes = torch.where(around[..., None], near, torch.cat([corner, corner + side], -1))
    return Proposals(
        boxes=torch.where(valid[..., None], boxes, torch.nan),
        scores=torch.where(valid, torch.linspace(0.9, 0.1, num_slots), torch.nan),
        valid=valid.clone(),
        sources=torch.arange(num_slots).repeat(num_images, 1),
    )


def random_batch(
    *,
    num_images: int = 2,
    canvas: tuple[int, int] = (64, 96),
    num_slots: int = 8,
    num_objects: int = 3,
    num_classes: int = 3,
) -> Batch:
    """Noise images that fill the canvas except its last rows and columns, with objects and proposals."""
    height, width = canvas
    targets = random_targets(num_images, num_slots, num_objects, (height - 8, width - 16), num_classes)
    sizes = torch.tensor([[height - 8, width - 16]]).repeat(num_images, 1)
    return Batch(
        images=torch.randint(256, (num_images, 3, height, width), dtype=torch.uint8),
        image_sizes=sizes,
        original_sizes=sizes.clone(),
        transforms=torch.eye(2, 3).repeat(num_images, 1, 1),
        image_ids=torch.arange(num_images),
        seeds=torch.arange(num_images) + 11,
        targets=targets,
        proposals=random_proposals(targets, NUM_PROPOSALS, (height - 8, width - 16)),
    )
