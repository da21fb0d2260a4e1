"""Torchvision's detectors behind Boxwright's protocol, so that both train, test and are timed by the same code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxwright.backbones.norm import Norm, make_norm
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.structures import Batch, Detections


class NoResize(GeneralizedRCNNTransform):
    """Normalises and pads; the loader has resized already."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> Any:
        """Leaves both as they are."""
        return image, target


class TorchvisionDetector(nn.Module):
    """A torchvision detector with `losses` and `detect`."""

    def __init__(self, model: nn.Module, num_classes: int, max_detections: int = 100) -> None:
        """Wrap a model whose label 0 is background."""
        super().__init__()
        model.transform = NoResize(1, 1, model.transform.image_mean, model.transform.image_std)
        self.model = model
        self.num_classes = num_classes
        self.max_detections = max_detections

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The model's own losses."""
        self.model.train()
        assert batch.targets is not None
        wanted = batch.targets.valid & ~batch.targets.crowd
        targets = [
            {"boxes": boxes[use], "labels": labels[use] + 1}
            for boxes, labels, use in zip(batch.targets.boxes, batch.targets.labels, wanted, strict=True)
        ]
        return self.model(self._pictures(batch), targets)

    def detect(self, batch: Batch) -> Detections:
        """The model's own detections, padded to as many slots as it can give."""
        self.model.eval()
        found = self.model(self._pictures(batch))

        def padded(name: str) -> Tensor:
            rows = [one[name] for one in found]
            return torch.stack(
                [F.pad(row, (0, 0) * (row.ndim - 1) + (0, self.max_detections - len(row))) for row in rows]
            )

        labels = padded("labels")
        return Detections(
            boxes=padded("boxes"), scores=padded("scores"), labels=(labels - 1).clamp(min=0), valid=labels > 0
        )

    @staticmethod
    def _pictures(batch: Batch) -> list[Tensor]:
        sizes = batch.image_sizes.tolist()
        return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)]


def torchvision_faster_rcnn(
    *,
    num_classes: int,
    depth: int = 50,
    norm: Norm = "frozen_bn",
    channels: int = 256,
    fpn_norm: Norm | None = None,
    frozen_stages: int = 1,
    rpn: RPNConfig = RPNConfig(),
    box: BoxConfig = BoxConfig(),
) -> TorchvisionDetector:
    """Torchvision's Faster R-CNN of the given sizes, in its own conventions and with its own initialisation.

    Args:
        num_classes: object classes, background not counted.
        depth: of the ResNet.
        norm: of the ResNet, as `boxwright.backbones.resnet.make_norm` makes it.
        channels: of the pyramid.
        fpn_norm: of the pyramid.
        frozen_stages: the stem and this many stages do not learn.
        rpn: numbers of the first stage; `border` and the minimum of `low_quality` do not exist there.
        box: numbers of the second stage; the pooling's are torchvision's.
    """
    body = getattr(resnet, f"resnet{depth}")(weights=None, norm_layer=lambda width: make_norm(norm, width))
    for name, parameter in body.named_parameters():
        stage = int(name[5]) if name.startswith("layer") else 0
        if frozen_stages and stage <= frozen_stages:
            parameter.requires_grad_(False)
    width = body.inplanes // 8
    backbone = BackboneWithFPN(
        body,
        {f"layer{stage}": str(stage - 1) for stage in range(1, 5)},
        [width, width * 2, width * 4, width * 8],
        channels,
        LastLevelMaxPool(),
        None if fpn_norm is None else lambda outputs: make_norm(fpn_norm, outputs),
    )
    strides = (4, 8, 16, 32, 64)
    anchors = AnchorGenerator(tuple((int(rpn.anchor_scale * stride),) for stride in strides), (rpn.ratios,) * 5)
    model = FasterRCNN(
        backbone,
        num_classes + 1,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=rpn.pre_nms_per_level,
        rpn_post_nms_top_n_train=rpn.num_proposals,
        rpn_pre_nms_top_n_test=rpn.test_pre_nms_per_level,
        rpn_post_nms_top_n_test=rpn.test_num_proposals,
        rpn_nms_thresh=rpn.nms_iou,
        rpn_fg_iou_thresh=rpn.positive_iou,
        rpn_bg_iou_thresh=rpn.negative_iou,
        rpn_batch_size_per_image=rpn.num_sampled,
        rpn_positive_fraction=rpn.positive_fraction,
        box_batch_size_per_image=box.num_sampled,
        box_positive_fraction=box.positive_fraction,
        box_score_thresh=box.score_threshold,
        box_nms_thresh=box.nms_iou,
        box_detections_per_img=box.max_detections,
    )
    if box.width != 1024:
        model.roi_heads.box_head.fc6 = nn.Linear(channels * 49, box.width)
        model.roi_heads.box_head.fc7 = nn.Linear(box.width, box.width)
        model.roi_heads.box_predictor.cls_score = nn.Linear(box.width, num_classes + 1)
        model.roi_heads.box_predictor.bbox_pred = nn.Linear(box.width, (num_classes + 1) * 4)
    return TorchvisionDetector(model, num_classes, box.max_detections)


def torchvision_rpn(*, num_classes: int = 1, depth: int = 50) -> TorchvisionDetector:
    """Torchvision's region proposal network alone, its proposals given as detections."""
    whole = torchvision_faster_rcnn(num_classes=num_classes, depth=depth)
    return TorchvisionDetector(ProposalsOnly(whole.model), 1, max_detections=2000)


class ProposalsOnly(nn.Module):
    """The first stage of a torchvision Faster R-CNN."""

    def __init__(self, model: FasterRCNN) -> None:
        """Keep the model's backbone and first stage."""
        super().__init__()
        self.transform = model.transform
        self.backbone = model.backbone
        self.rpn: RegionProposalNetwork = model.rpn

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, else proposals with label 1."""
        padded, targets = self.transform(images, targets)
        proposals, losses = self.rpn(padded, self.backbone(padded.tensors), targets)
        if self.training:
            return losses
        ones = [torch.ones_like(boxes[:, 0]) for boxes in proposals]
        return [{"boxes": b, "scores": s, "labels": s.long()} for b, s in zip(proposals, ones, strict=True)]
