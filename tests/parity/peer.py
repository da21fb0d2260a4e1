"""torchvision's detectors with random weights that preserve the scale of activations and spread the scores.

Everything is computed in float64, so that rounding neither hides nor causes a difference: a single ReLU whose input
changes sign changes a gradient by 1e-3.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from boxwright.assign.match import IGNORED, NEGATIVE, POSITIVE
from boxwright.assign.sample import sample
from boxwright.backbones.backbone import PYTORCH
from boxwright.data.collate import PlacedSample, collate
from boxwright.data.formats import find_layout
from boxwright.data.indexed_dataset import IndexedDataset
from boxwright.data.placement import place
from boxwright.heads.rpn_head import SAMPLING_SALT, RPNConfig
from boxwright.importers.rules import rename
from boxwright.importers.torchvision import rules
from boxwright.structures import Batch, Targets

NUM_CLASSES = 20
SHORT_SIDE = 320
EVERYTHING = 10**7


def real_batch(folder: Path, num_images: int = 2) -> Batch:
    """The first landscape images of `coco_mini`'s val2017 on one canvas, with random overlapping objects."""
    generator = torch.Generator().manual_seed(5)
    resized = []
    for file in sorted((folder / "coco_mini" / "val2017").glob("*.jpg")):
        pixels = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        height, width = pixels.shape[:2]
        if height < width < 1.5 * height:
            size = (round(width * SHORT_SIDE / height), SHORT_SIDE)
            resized.append(torch.from_numpy(cv2.resize(pixels, size)).permute(2, 0, 1))
        if len(resized) == num_images:
            break
    sizes = torch.tensor([pixels.shape[1:] for pixels in resized])
    canvas = [-(-int(side) // 32) * 32 for side in sizes.max(0).values]
    images = torch.zeros(num_images, 3, *canvas, dtype=torch.uint8)
    for image, pixels in zip(images, resized, strict=True):
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    corners = torch.rand(num_images, 6, 2, generator=generator, dtype=torch.float64) * 200
    boxes = torch.cat([corners, corners + 20 + 100 * torch.rand(num_images, 6, 2, generator=generator)], -1)
    valid = torch.ones(num_images, 8, dtype=torch.bool)
    valid[:, 6:] = False
    return Batch(
        images=images,
        image_sizes=sizes,
        original_sizes=sizes,
        transforms=torch.eye(2, 3).repeat(num_images, 1, 1),
        image_ids=torch.arange(num_images),
        seeds=torch.arange(num_images),
        targets=Targets(
            boxes=nn.functional.pad(boxes, (0, 0, 0, 2)),
            labels=torch.randint(NUM_CLASSES, (num_images, 8), generator=generator),
            valid=valid,
            crowd=torch.zeros_like(valid),
        ),
    )


def real_objects(folder: Path, num_images: int = 2) -> Batch:
    """Landscape images of `coco_mini`'s val2017 on one canvas, with their 4 to 8 annotated objects and masks."""
    dataset = IndexedDataset(*find_layout(folder / "coco_mini")["val"])
    placed = []
    for row in range(len(dataset)):
        objects = dataset.index.objects(row)
        height, width = dataset.image_sizes[row].tolist()
        whole = dataset.index.has_mask[objects].all()
        if whole and 4 <= objects.stop - objects.start <= 8 and height < width < 1.5 * height:
            size = (SHORT_SIDE, round(width * SHORT_SIDE / height))
            placed.append(PlacedSample(dataset[row], place((height, width), size), seed=row))
    placed = placed[:num_images]
    canvas = (SHORT_SIDE, max(-(-item.placement.size[1] // 32) * 32 for item in placed))
    batch = collate(placed, num_images, canvas, 8, masks=True)
    return replace(batch, targets=replace(batch.targets, labels=batch.targets.labels % NUM_CLASSES))


def peer_inputs(
    batch: Batch, first_label: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Convert a batch to torchvision's inputs: float images (0 to 255) without padding, labels from `first_label`."""
    images = [
        image[:, :height, :width].to(dtype)
        for image, (height, width) in zip(batch.images, batch.image_sizes.tolist(), strict=True)
    ]
    targets = [
        {"boxes": boxes[valid].to(dtype), "labels": labels[valid] + first_label}
        for boxes, labels, valid in zip(batch.targets.boxes, batch.targets.labels, batch.targets.valid, strict=True)
    ]
    return images, targets


def peer_faster_rcnn(batch: Batch) -> FasterRCNN:
    """Faster R-CNN R-50-FPN in eval mode that neither resizes images nor subsamples RoIs."""
    return _peer(FasterRCNN, batch)


def peer_mask_rcnn(batch: Batch, num_proposals: int, positive_iou: float) -> MaskRCNN:
    """Like `peer_faster_rcnn` with a mask head. Few training proposals save time; a lower IoU makes more positive."""
    return _peer(
        MaskRCNN,
        batch,
        rpn_post_nms_top_n_train=num_proposals,
        box_fg_iou_thresh=positive_iou,
        box_bg_iou_thresh=positive_iou,
    )


def _peer(kind: type[FasterRCNN], batch: Batch, **settings: Any) -> Any:
    torch.manual_seed(3)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    ).double()
    _calibrate(backbone, peer_inputs(batch)[0])
    model = kind(
        backbone,
        num_classes=NUM_CLASSES + 1,
        min_size=SHORT_SIDE,
        max_size=EVERYTHING,
        image_mean=PYTORCH.mean,
        image_std=PYTORCH.std,
        box_batch_size_per_image=EVERYTHING,
        **settings,
    )
    with torch.no_grad():
        # Untrained output layers start near 0, so all scores would be nearly equal.
        model.rpn.head.cls_logits.weight.mul_(20)
        model.rpn.head.bbox_pred.weight.mul_(3)
        model.roi_heads.box_predictor.cls_score.weight.mul_(5)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(3)
    model.rpn.fg_bg_sampler = OurSample(batch)
    return model.double().eval()


def peer_retinanet(batch: Batch) -> RetinaNet:
    """RetinaNet R-50 (P3 to P7) in eval mode that does not resize images, built like `peer_faster_rcnn`."""
    torch.manual_seed(3)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=5,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    ).double()
    _calibrate(backbone, peer_inputs(batch)[0])
    model = RetinaNet(
        backbone,
        num_classes=NUM_CLASSES,
        min_size=SHORT_SIDE,
        max_size=EVERYTHING,
        image_mean=PYTORCH.mean,
        image_std=PYTORCH.std,
    )
    with torch.no_grad():
        for branch in (model.head.classification_head, model.head.regression_head):
            for layer in branch.conv:
                layer[0].weight.mul_(3)
        model.head.classification_head.cls_logits.weight.mul_(1.5)
        model.head.regression_head.bbox_reg.weight.mul_(0.5)
    return model.double().eval()


class OurSample:
    """Replaces torchvision's random anchor sampler by Boxwright's, applied to torchvision's anchor labels."""

    def __init__(self, batch: Batch) -> None:
        self.seeds = batch.seeds

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the sampled positive and negative anchors. Labels: 1 object, 0 background, -1 ignored."""
        theirs = torch.stack(labels)
        ours = torch.where(theirs == 1, POSITIVE, torch.where(theirs == 0, NEGATIVE, IGNORED))
        config = RPNConfig()
        sampled = sample(
            ours, self.seeds, num=config.num_sampled, positive_fraction=config.positive_fraction, salt=SAMPLING_SALT
        )

        def mask(slots: Tensor) -> list[Tensor]:
            chosen = torch.zeros_like(theirs)
            chosen.scatter_add_(1, sampled.indices, slots.to(chosen.dtype))
            return list(chosen > 0)

        return mask(sampled.positive), mask(sampled.valid & ~sampled.positive)


def _calibrate(backbone: nn.Module, images: list[Tensor]) -> None:
    """Set the running statistics of the norms to the statistics of the images."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            # Weak residual branches, as in a trained network: strong random branches amplify rounding a hundredfold.
            low, high = (0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)
            nn.init.uniform_(module.weight, low, high)
            nn.init.normal_(module.bias, std=0.1)
    backbone.train()
    with torch.no_grad():
        for image in images:
            backbone((image[None] - 115) / 57)
    backbone.eval()


def in_float64(detector: nn.Module) -> nn.Module:
    """Convert a detector to float64 and eval mode, including its exact pixel statistics."""
    detector = detector.double().eval()
    for buffer, values in ((detector.normalize.mean, PYTORCH.mean), (detector.normalize.std, PYTORCH.std)):
        buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer))
    return detector


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's weights to Boxwright's names."""
    return rename(state, rules(state.keys())).tensors


def converted_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return torchvision's gradients under Boxwright's names; zeros for tensors without a gradient."""
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[name].grad if name in parameters else None for name in model.state_dict()}
    return converted(
        {name: torch.zeros_like(model.state_dict()[name]) if g is None else g for name, g in gradients.items()}
    )
