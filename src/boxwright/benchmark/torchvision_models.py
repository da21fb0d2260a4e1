"""Build torchvision's equivalent of a Boxwright model, with the same architecture and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from boxwright.backbones.backbone import Backbone
from boxwright.backbones.resnet import BLOCKS_PER_STAGE
from boxwright.detectors.detector import Detector
from boxwright.geometry.anchors import octave_sizes
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.importers.rules import Rule, rename
from boxwright.layers.norm import make_norm
from boxwright.training.parts import arguments_of, call_name, replaced_parts

_FAMILIES = {
    "boxwright.detectors.proposal_network.proposal_network": "rpn",
    "boxwright.detectors.rcnn.faster_rcnn": "faster_rcnn",
    "boxwright.detectors.rcnn.mask_rcnn": "mask_rcnn",
    "boxwright.detectors.retinanet.retinanet": "retinanet",
}


def torchvision_model(model: Callable[..., nn.Module], ours: Detector) -> nn.Module:
    """Build torchvision's detector with the architecture and the weights of a Boxwright detector.

    It keeps torchvision's conventions (anchors, matching, sampling, RoIAlign, losses) and torchvision's frozen batch
    norm, which trains neither scale nor bias.

    Args:
        model: the experiment's model factory.
        ours: the detector that the factory built.

    Raises:
        ValueError: torchvision has no equivalent model.
    """
    family = family_of(model)
    arguments = arguments_of(model)
    backbone = _backbone(arguments["backbone"])
    strides = list(cast(Backbone, ours.backbone).strides)
    num_classes = ours.num_classes
    if family == "retinanet":
        peer: nn.Module = _retinanet(backbone, strides, num_classes, arguments["retina"])
    else:
        box = arguments.get("box", BoxConfig())
        if box.class_agnostic or box.hard_examples or box.nms != "hard":
            raise ValueError(
                "torchvision has no class-agnostic boxes, hard example mining or Soft-NMS. Compare with a recipe whose "
                f"box config has the defaults; got class_agnostic={box.class_agnostic}, "
                f"hard_examples={box.hard_examples}, nms={box.nms!r}."
            )
        mask = arguments.get("mask", MaskConfig())
        if box.num_convs or box.num_fcs != 2 or mask.norm is not None or arguments["rpn"].num_convs != 1:
            raise ValueError(
                "the torchvision peer has an RPN head with 1 convolution, a box head with 2 fully connected layers and "
                f"a mask head without norms; got rpn.num_convs={arguments['rpn'].num_convs}, "
                f"box.num_convs={box.num_convs}, box.num_fcs={box.num_fcs}, mask.norm={mask.norm!r}."
            )
        peer = _rcnn(backbone, strides, num_classes, arguments["rpn"], box, arguments.get("mask"))
    if family == "rpn":
        peer = ProposalsOnly(peer)
    stats = arguments["pixel_stats"]
    order = slice(None, None, -1) if stats.order == "bgr" else slice(None)
    mean, std = ([value / 255 for value in values[order]] for values in (stats.mean, stats.std))
    peer.transform = TransformWithoutResize(mean, std)
    copy_weights(ours, peer, flip_colour_order=stats.order == "bgr")
    return peer


def family_of(model: Callable[..., nn.Module]) -> str:
    """The family of a model that peers have: a value of `_FAMILIES`.

    Raises:
        ValueError: the peers have no equivalent model.
    """
    family = _FAMILIES.get(call_name(model))
    if family is None:
        raise ValueError(
            f"peers have no equivalent of {call_name(model).rpartition('.')[2]}. Supported models: "
            f"{', '.join(_FAMILIES.values())}."
        )
    replaced = replaced_parts(model)
    if replaced:
        raise ValueError(f"peers have no {', '.join(replaced.values())}: compare a model with Boxwright's own heads")
    return family


def copy_weights(ours: nn.Module, peer: nn.Module, *, flip_colour_order: bool = False) -> None:
    """Load Boxwright's weights into torchvision's model, whose background is the first class instead of the last.

    Args:
        ours: source of the weights.
        peer: torchvision's model, changed in place.
        flip_colour_order: reverse the input channels of the first convolution, for a model trained on BGR images.
    """
    names = ours.state_dict()
    tensors = rename(names, _rules(layers=3 if "head.class_convs.1.weight" in names else 2)).tensors
    if flip_colour_order:
        tensors["backbone.body.conv1.weight"] = tensors["backbone.body.conv1.weight"].flip(1)
    missing, unexpected = peer.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


class TransformWithoutResize(GeneralizedRCNNTransform):
    """Normalises and pads images that the loader has already resized, and maps detections to the image files."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std` are for pixel values in 0..1."""
        super().__init__(1, 1, list(mean), list(std))
        self.file_sizes: list[tuple[int, int]] | None = None
        """(height, width) of the image files of the next batch. If None, detections stay in resized coordinates."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> Any:
        """Return the image and target unchanged."""
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Run torchvision's post-processing with the sizes of the image files."""
        return super().postprocess(result, image_shapes, self.file_sizes or original_image_sizes)


class ProposalsOnly(nn.Module):
    """The RPN of a torchvision Faster R-CNN as a detector."""

    def __init__(self, model: nn.Module) -> None:
        """Use the backbone and the RPN of `model`."""
        super().__init__()
        self.transform: Any = model.transform
        self.backbone: Any = model.backbone
        self.rpn: RegionProposalNetwork = model.rpn

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training mode; proposals with score 1 and label 1 in evaluation mode."""
        sizes = [tuple(image.shape[-2:]) for image in images]
        padded, targets = self.transform(images, targets)
        proposals, losses = self.rpn(padded, self.backbone(padded.tensors), targets)
        if self.training:
            return losses
        ones = [torch.ones_like(boxes[:, 0]) for boxes in proposals]
        detections = [{"boxes": b, "scores": s, "labels": s.long()} for b, s in zip(proposals, ones, strict=True)]
        return self.transform.postprocess(detections, padded.image_sizes, sizes)


def _backbone(factory: Callable[..., Any]) -> BackboneWithFPN:
    if call_name(factory) != "boxwright.backbones.fpn.resnet_fpn":
        raise ValueError(f"torchvision has no equivalent of the backbone {call_name(factory)}. Use resnet_fpn.")
    arguments = arguments_of(factory)
    depth, norm, fpn_norm = arguments["depth"], arguments["norm"], arguments["fpn_norm"]
    body = resnet.ResNet(
        resnet.BasicBlock if depth < 50 else resnet.Bottleneck,
        list(BLOCKS_PER_STAGE[depth]),
        groups=arguments["groups"],
        width_per_group=arguments["width_per_group"],
        norm_layer=FrozenBatchNorm2d if norm == "frozen_bn" else partial(make_norm, norm),
    )
    if arguments["style"] == "caffe":
        for block in body.modules():
            if isinstance(block, resnet.Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    for name, parameter in body.named_parameters():
        stage = int(name[5]) if name.startswith("layer") else 0
        if arguments["frozen_stages"] and stage <= arguments["frozen_stages"]:
            parameter.requires_grad_(False)
    stages, channels = arguments["out_stages"], arguments["channels"]
    widths = [body.inplanes // 2 ** (5 - stage) for stage in stages]
    extras = {
        "pool": LastLevelMaxPool,
        "c5": partial(LastLevelP6P7, widths[-1], channels),
        "p5": partial(LastLevelP6P7, channels, channels),
    }
    if arguments["extra"] not in extras:
        raise ValueError(
            f"torchvision's FPN always has an extra level: backbone.extra must be one of {', '.join(extras)}, got "
            f"{arguments['extra']!r}."
        )
    return BackboneWithFPN(
        body,
        {f"layer{stage - 1}": str(index) for index, stage in enumerate(stages)},
        widths,
        channels,
        extras[arguments["extra"]](),
        None if fpn_norm is None else partial(make_norm, fpn_norm),
    )


def _rcnn(
    backbone: BackboneWithFPN,
    strides: Sequence[int],
    num_classes: int,
    rpn: RPNConfig,
    box: BoxConfig,
    mask: MaskConfig | None,
) -> FasterRCNN:
    anchors = AnchorGenerator(tuple((int(rpn.anchor_scale * s),) for s in strides), (rpn.ratios,) * len(strides))
    channels = backbone.out_channels
    model_class = FasterRCNN if mask is None else MaskRCNN
    model = model_class(
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
    heads = model.roi_heads
    heads.box_head = TwoMLPHead(channels * box.output_size**2, box.width)
    heads.box_predictor = FastRCNNPredictor(box.width, num_classes + 1)
    if mask is not None:
        heads.mask_head = MaskRCNNHeads(channels, (mask.width,) * mask.num_convs, 1)
        heads.mask_predictor = MaskRCNNPredictor(mask.width, mask.width, num_classes + 1)
    return model


def _retinanet(backbone: BackboneWithFPN, strides: Sequence[int], num_classes: int, config: RetinaConfig) -> RetinaNet:
    sizes = [octave_sizes(config.anchor_scale * s, config.scales_per_octave, "torchvision") for s in strides]
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), (config.ratios,) * len(sizes))
    num_anchors = anchors.num_anchors_per_location()[0]
    norm = None if config.norm is None else partial(make_norm, config.norm)
    head = RetinaNetHead(backbone.out_channels, num_anchors, num_classes, norm_layer=norm)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[: config.num_convs]
    return RetinaNet(
        backbone,
        num_classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_iou,
        detections_per_img=config.max_detections,
        fg_iou_thresh=config.positive_iou,
        bg_iou_thresh=config.negative_iou,
        topk_candidates=config.pre_nms_per_level,
    )


def _rules(layers: int) -> Sequence[Rule]:
    """Rules that map Boxwright's parameter names to torchvision's.

    Args:
        layers: modules per convolution in RetinaNet's branches: 3 with a norm (convolution, norm, ReLU), 2 without.
    """
    branches = [
        Rule(f"head.{ours}_convs.{layers * index + part}.*", f"head.{theirs}_head.conv.{index}.{part}.*")
        for ours, theirs in (("class", "classification"), ("box", "regression"))
        for index in range(4)
        for part in range(layers - 1)
    ]
    return (
        Rule("backbone.body.*", "backbone.body.*"),
        Rule("backbone.lateral.{i}.{j}.*", "backbone.fpn.inner_blocks.{i}.{j}.*"),
        Rule("backbone.output.{i}.{j}.*", "backbone.fpn.layer_blocks.{i}.{j}.*"),
        Rule("backbone.lateral.{i}.*", "backbone.fpn.inner_blocks.{i}.0.*"),
        Rule("backbone.output.{i}.*", "backbone.fpn.layer_blocks.{i}.0.*"),
        Rule("backbone.extra_output.0.*", "backbone.fpn.extra_blocks.p6.*"),
        Rule("backbone.extra_output.1.*", "backbone.fpn.extra_blocks.p7.*"),
        Rule("rpn.conv.*", "rpn.head.conv.0.0.*"),
        Rule("rpn.objectness.*", "rpn.head.cls_logits.*"),
        Rule("rpn.deltas.*", "rpn.head.bbox_pred.*"),
        Rule("box_head.fc1.*", "roi_heads.box_head.fc6.*"),
        Rule("box_head.fc2.*", "roi_heads.box_head.fc7.*"),
        Rule("box_head.class_logits.*", "roi_heads.box_predictor.cls_score.*", lambda rows: rows.roll(1, 0)),
        Rule("box_head.box_deltas.*", "roi_heads.box_predictor.bbox_pred.*", partial(_with_rows, count=4)),
        Rule("mask_head.convs.{i}.*", "roi_heads.mask_head.{i}.0.*"),
        Rule("mask_head.upsample.*", "roi_heads.mask_predictor.conv5_mask.*"),
        Rule("mask_head.mask_logits.*", "roi_heads.mask_predictor.mask_fcn_logits.*", partial(_with_rows, count=1)),
        Rule("head.class_logits.*", "head.classification_head.cls_logits.*"),
        Rule("head.box_deltas.*", "head.regression_head.bbox_reg.*"),
        *branches,
    )


def _with_rows(rows: Tensor, count: int) -> Tensor:
    """Prepend `count` rows of zeros for torchvision's background class, which Boxwright's box and mask layers lack."""
    return torch.cat([torch.zeros_like(rows[:count]), rows])
