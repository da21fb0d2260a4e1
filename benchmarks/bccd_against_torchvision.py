"""The small Faster R-CNN trained by torchvision's detector: same architecture, first weights, pictures and schedule.

    boxwright train faster_rcnn_r18_fpn_small --data bccd --out runs/ours
    boxwright train benchmarks.bccd_against_torchvision:experiment --data bccd --out runs/torchvision

The second run differs from the first by all that lies between pixels and losses: torchvision's anchors, matching,
sampling, RoIAlign, losses and post-processing. `--set seed=1` and so on repeats both. Figures: docs/benchmarks/bccd.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.torchvision_peer import TorchvisionDetector, torchvision_faster_rcnn
from boxwright.recipes.faster_rcnn import faster_rcnn_r18_fpn_small
from boxwright.training.experiment import Experiment, build


def experiment() -> Experiment:
    """The small recipe with torchvision's model in it."""
    return replace(faster_rcnn_r18_fpn_small(), model=partial(torchvision_small))


def torchvision_small(*, num_classes: int) -> TorchvisionDetector:
    """Torchvision's detector with the small recipe's sizes and the weights that the recipe would start from."""
    recipe = faster_rcnn_r18_fpn_small().model
    ours = build(recipe, num_classes=num_classes)
    assert isinstance(recipe, partial)
    sizes = recipe.keywords["backbone"].keywords
    peer = torchvision_faster_rcnn(
        num_classes=num_classes, rpn=recipe.keywords["rpn"], box=recipe.keywords["box"], **sizes
    )
    copy_weights(ours, peer.model)
    return peer


def copy_weights(ours: nn.Module, peer: nn.Module) -> None:
    """Give torchvision's model our weights; its background, first of the classes, gets ours, the last."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        theirs = next(
            their_prefix + name.removeprefix(our) for our, their_prefix in KEYS.items() if name.startswith(our)
        )
        renamed[theirs] = tensor
    for suffix in ("weight", "bias"):
        logits = renamed[f"roi_heads.box_predictor.cls_score.{suffix}"]
        deltas = renamed[f"roi_heads.box_predictor.bbox_pred.{suffix}"]
        renamed[f"roi_heads.box_predictor.cls_score.{suffix}"] = torch.cat([logits[-1:], logits[:-1]])
        renamed[f"roi_heads.box_predictor.bbox_pred.{suffix}"] = torch.cat([torch.zeros_like(deltas[:4]), deltas])
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert not unexpected
    # The ResNet's classifier, which BackboneWithFPN drops, and nothing else may be without a value.
    assert not missing, missing


KEYS = {
    "backbone.body.": "backbone.body.",
    **{f"backbone.lateral.{i}.": f"backbone.fpn.inner_blocks.{i}." for i in range(4)},
    **{f"backbone.output.{i}.": f"backbone.fpn.layer_blocks.{i}." for i in range(4)},
    "rpn.conv.": "rpn.head.conv.0.0.",
    "rpn.objectness.": "rpn.head.cls_logits.",
    "rpn.deltas.": "rpn.head.bbox_pred.",
    "box_head.fc1.": "roi_heads.box_head.fc6.",
    "box_head.fc2.": "roi_heads.box_head.fc7.",
    "box_head.class_logits.": "roi_heads.box_predictor.cls_score.",
    "box_head.box_deltas.": "roi_heads.box_predictor.bbox_pred.",
}
