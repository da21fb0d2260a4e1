"""Export weights to torchvision: the state dict of its detector, and the Python code that builds the detector.

The names are renamed back by the rules of `torchvision.py`. The Python code passes all settings to torchvision's
constructors. A setting that they do not support is an error, so that the exported model gives the same detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxwright.data.dataset import Category
from boxwright.geometry.anchors import octave_sizes
from boxwright.importers.rules import rename_back
from boxwright.importers.torchvision import SETTINGS, rules
from boxwright.training.experiment import Experiment
from boxwright.training.parts import arguments_of, call_name, replaced_parts
from boxwright.weights.ours import atomic_file

_CLASSES = {
    "boxwright.detectors.rcnn.faster_rcnn": "FasterRCNN",
    "boxwright.detectors.rcnn.mask_rcnn": "MaskRCNN",
    "boxwright.detectors.retinanet.retinanet": "RetinaNet",
}
_BODIES = {
    (18, 1, 64): "resnet18",
    (34, 1, 64): "resnet34",
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
}
"""torchvision's ResNets by depth, groups and width per group."""
_CHANNELS = 256
"""Number of channels of torchvision's pyramids."""
_NORMALISED = {"head.classification_head.conv.0.1.weight"}
"""Tensor by which the rules recognise norm layers in RetinaNet's head."""

_SUPPORTED = {
    "conventions": {"anchor_rounding", "anchor_strides_from_canvas", "roi_align_plus_one"},
    "rpn": {"anchor_scale", "ratios", "test_pre_nms_per_level", "test_num_proposals", "nms_iou"},
    "box": {"width", "output_size", "sampling_ratio", "num_levels", "stds"}
    | {"score_threshold", "nms_iou", "max_detections"},
    "mask": {"width", "num_convs", "output_size", "sampling_ratio", "num_levels"},
    "retina": {"norm", "anchor_scale", "scales_per_octave", "ratios"}
    | {"pre_nms_per_level", "score_threshold", "nms_iou", "max_detections"},
}
"""Settings that torchvision's model supports with any value."""
_TRAINING = {
    "rpn": {"positive_iou", "negative_iou", "low_quality", "border", "num_sampled", "positive_fraction"}
    | {"smooth_l1_beta", "box_loss", "objectness_loss_weight", "box_loss_weight", "pre_nms_per_level", "num_proposals"},
    "box": {"positive_iou", "num_sampled", "positive_fraction", "smooth_l1_beta", "hard_examples", "nms_sigma"}
    | {"box_loss", "class_loss_weight", "box_loss_weight"},
    "mask": {"mask_loss_weight"},
    "retina": {"positive_iou", "negative_iou", "low_quality", "prior", "focal_alpha", "focal_gamma", "smooth_l1_beta"}
    | {"box_loss", "class_loss_weight", "box_loss_weight"},
}
"""Settings for training, which do not affect detections."""
_FIXES = {
    "roi_align_aligned": "train with --set model.conventions.roi_align_aligned=false to export",
    "extra_relu": "train with --set model.backbone.extra_relu=true to export",
}


@dataclass(frozen=True)
class Exported:
    """A model exported to torchvision."""

    tensors: dict[str, Tensor]
    """Tensors by torchvision's names."""
    code: str
    """Python code that builds `model` without its weights."""
    names: list[str]
    """Class names by label."""

    def save(self, path: Path) -> str:
        """Write the state dict atomically. Returns the Python code that builds the model and loads the file."""
        with atomic_file(path) as temporary:
            torch.save({name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}, temporary)
        return f"{self.code}model.load_state_dict(torch.load({str(path)!r}, weights_only=True))\nmodel.eval()\n" + (
            f"names = {self.names!r}"
        )


def export(detector: nn.Module, experiment: Experiment, categories: Sequence[Category]) -> Exported:
    """Export a detector to torchvision.

    Args:
        detector: Detector with its weights.
        experiment: Experiment of the detector.
        categories: Classes by label.

    Raises:
        ValueError: torchvision has no such model; the message lists all reasons.
    """
    kind = _CLASSES.get(call_name(experiment.model))
    if kind is None:
        made = call_name(experiment.model).rpartition(".")[2]
        raise ValueError(
            f"{made} cannot be exported to torchvision; supported are Faster R-CNN, Mask R-CNN and RetinaNet"
        )
    replaced = replaced_parts(experiment.model)
    if replaced:
        raise ValueError(
            f"torchvision's model does not support {', '.join(replaced.values())} instead of Boxwright's tensors heads"
        )
    model = {name: arguments_of(value) for name, value in arguments_of(experiment.model).items()}
    faults = _faults(call_name(arguments_of(experiment.model)["backbone"]), model, kind)
    if faults:
        raise ValueError("torchvision's model does not support these settings: " + "; ".join(faults))
    tensors = {
        name: tensor for name, tensor in detector.state_dict().items() if not name.endswith(".num_batches_tracked")
    }
    normalised = kind == "RetinaNet" and model["retina"]["norm"] is not None
    names = [category.name for category in categories]
    return Exported(
        tensors=rename_back(tensors, rules(_NORMALISED if normalised else set())),
        code=_code(kind, model, experiment, tensors, len(names)),
        names=names if kind == "RetinaNet" else ["__background__", *names],
    )


def _faults(backbone: str, model: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Settings that torchvision's model does not support."""
    if backbone != "boxwright.backbones.fpn.resnet_fpn":
        return [f"the backbone is {backbone}, expected resnet_fpn"]
    body = model["backbone"]
    faults = []
    if (body["depth"], body["groups"], body["width_per_group"]) not in _BODIES:
        faults.append(f"torchvision has no ResNet with {body['groups']} groups of width {body['width_per_group']}")
    if body["style"] != "pytorch" and body["depth"] >= 50:
        faults.append("the style of the backbone is caffe, expected pytorch")
    if body["norm"] not in ("frozen_bn", "bn", "sync_bn"):
        faults.append(f"the norm of the backbone is {body['norm']}, expected a batch norm")
    if body["fpn_norm"] is not None:
        faults.append("the pyramid has norm layers, expected none")
    if body["channels"] != _CHANNELS:
        faults.append(f"the pyramid has {body['channels']} channels, expected {_CHANNELS}")
    if body["extra"] is None:
        faults.append("the pyramid has no extra level, expected P6")
    elif body["extra"] != "pool" and not body["extra_relu"]:
        faults.append(f"there is no ReLU between P6 and P7 ({_FIXES['extra_relu']})")
    if model["pixel_stats"]["order"] != "rgb":
        faults.append("the order of the pixels is bgr, expected rgb")
    for part, supported in _SUPPORTED.items():
        theirs = arguments_of(getattr(SETTINGS, part))
        free = supported | _TRAINING.get(part, set())
        if part == "conventions" and kind == "RetinaNet":
            free = free | {"roi_align_aligned", "level_epsilon"}  # Settings of RoIAlign, which RetinaNet does not have.
        for name, value in model.get(part, {}).items():
            if name not in free and value != theirs[name]:
                fix = f" ({_FIXES[name]})" if name in _FIXES else ""
                faults.append(f"{part}.{name} is {value}, expected {theirs[name]}{fix}")
    rounding = model["conventions"]["anchor_rounding"]
    if rounding not in ("none", "torchvision"):
        faults.append(f"conventions.anchor_rounding is {rounding}, expected none or torchvision")
    return faults


def _code(
    kind: str, model: dict[str, dict[str, Any]], experiment: Experiment, tensors: dict[str, Tensor], num_classes: int
) -> str:
    """Python code that builds torchvision's model. Values are written by `repr`, so that a file cannot inject code."""
    body, conventions, pixels = model["backbone"], model["conventions"], model["pixel_stats"]
    stages = list(body["out_stages"])
    # Stage 2 has stride 4, and P6 and P7 follow.
    strides = [2**stage for stage in stages]
    strides += [strides[-1] * 2**step for step in ((1,) if body["extra"] == "pool" else (1, 2))]
    levels = [*map(str, range(len(stages))), *(("pool",) if body["extra"] == "pool" else ("p6", "p7"))]
    backbone = {
        "backbone_name": _BODIES[body["depth"], body["groups"], body["width_per_group"]],
        "weights": None,
        "returned_layers": [stage - 1 for stage in stages],
    }
    extra = "torchvision.ops.feature_pyramid_network.LastLevelMaxPool()"
    if body["extra"] != "pool":
        inputs = tensors["backbone.extra_output.0.weight"].shape[1]
        extra = f"torchvision.ops.feature_pyramid_network.LastLevelP6P7({inputs}, {_CHANNELS})"
    grid = model["retina" if kind == "RetinaNet" else "rpn"]
    rounding = conventions["anchor_rounding"]
    octave = grid.get("scales_per_octave", 1)
    sizes = tuple(tuple(octave_sizes(grid["anchor_scale"] * stride, octave, rounding)) for stride in strides)
    own_strides = None if conventions["anchor_strides_from_canvas"] else strides
    anchors = "AnchorGenerator" if rounding == "torchvision" and own_strides is None else "Anchors"
    arguments: dict[str, str] = {
        "min_size": repr(experiment.resize.short),
        "max_size": repr(experiment.resize.long),
        # torchvision's pixels are in 0..1.
        "image_mean": repr([round(value / 255, 12) for value in pixels["mean"]]),
        "image_std": repr([round(value / 255, 12) for value in pixels["std"]]),
    }
    heads = _retina_arguments if kind == "RetinaNet" else _rcnn_arguments
    lines = [
        "import torch, torchvision",
        "from torchvision.models import detection",
        "from torchvision.models.detection.anchor_utils import AnchorGenerator",
        "",
        *(_anchor_class(rounding, own_strides) if anchors == "Anchors" else ()),
        "backbone = detection.backbone_utils.resnet_fpn_backbone(",
        *(f"    {name}={value!r}," for name, value in backbone.items()),
        f"    extra_blocks={extra},",
        ")",
        f"anchors = {anchors}({sizes!r}, {(tuple(grid['ratios']),) * len(strides)!r})",
        f"model = detection.{kind}(",
        "    backbone,",
        *(f"    {name}={value}," for name, value in {**arguments, **heads(model, levels, num_classes)}.items()),
        ")",
        *(_box_loss(model["retina"]) if kind == "RetinaNet" else ()),
    ]
    return "\n".join(lines) + "\n"


def _box_loss(retina: dict[str, Any]) -> list[str]:
    """Line that sets an IoU loss for training; no line for other losses, for which torchvision's L1 loss is kept."""
    if retina["box_loss"] not in ("giou", "diou", "ciou"):
        return []
    return [f"model.head.regression_head._loss_type = {retina['box_loss']!r}"]


def _anchor_class(rounding: str, strides: Sequence[int] | None) -> list[str]:
    """Lines of an anchor generator class. Strides are None if torchvision's are equal."""
    lines = ["", "class Anchors(AnchorGenerator):"]
    if rounding == "none":
        lines += [
            "    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None):",
            "        # torchvision rounds these to whole pixels.",
            "        sides, ratios = torch.tensor(scales), torch.tensor(aspect_ratios).sqrt()[:, None]",
            "        widths, heights = (1 / ratios * sides).flatten(), (ratios * sides).flatten()",
            "        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2",
            "",
        ]
    if strides is not None:
        lines += [
            "    def grid_anchors(self, grid_sizes, strides):",
            "        # torchvision divides the image size by the map size, which gives other strides after padding.",
            f"        return super().grid_anchors(grid_sizes, {[(stride, stride) for stride in strides]!r})",
            "",
        ]
    return [*lines, ""]


def _rcnn_arguments(model: dict[str, dict[str, Any]], levels: list[str], num_classes: int) -> dict[str, str]:
    rpn, box = model["rpn"], model["box"]

    def pool(part: dict[str, Any]) -> str:
        size, samples = part["output_size"], part["sampling_ratio"]
        return f"torchvision.ops.MultiScaleRoIAlign({levels[: part['num_levels']]!r}, {size!r}, {samples!r})"

    inputs, width = _CHANNELS * box["output_size"] ** 2, box["width"]
    arguments = {
        "rpn_anchor_generator": "anchors",
        "rpn_pre_nms_top_n_test": repr(rpn["test_pre_nms_per_level"]),
        "rpn_post_nms_top_n_test": repr(rpn["test_num_proposals"]),
        "rpn_nms_thresh": repr(rpn["nms_iou"]),
        "box_roi_pool": pool(box),
        "box_head": f"detection.faster_rcnn.TwoMLPHead({inputs!r}, {width!r})",
        "box_predictor": f"detection.faster_rcnn.FastRCNNPredictor({width!r}, {num_classes + 1!r})",
        "box_score_thresh": repr(box["score_threshold"]),
        "box_nms_thresh": repr(box["nms_iou"]),
        "box_detections_per_img": repr(box["max_detections"]),
        "bbox_reg_weights": repr(tuple(1 / std for std in box["stds"])),
    }
    if "mask" in model:
        mask = model["mask"]
        layers, width = [mask["width"]] * mask["num_convs"], mask["width"]
        arguments |= {
            "mask_roi_pool": pool(mask),
            "mask_head": f"detection.mask_rcnn.MaskRCNNHeads({_CHANNELS}, {layers!r}, 1)",
            "mask_predictor": "detection.mask_rcnn.MaskRCNNPredictor("
            f"{width if layers else _CHANNELS!r}, {width!r}, {num_classes + 1!r})",
        }
    return arguments


def _retina_arguments(model: dict[str, dict[str, Any]], levels: list[str], num_classes: int) -> dict[str, str]:
    retina = model["retina"]
    num_anchors = len(retina["ratios"]) * retina["scales_per_octave"]
    norm = ", norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)" if retina["norm"] else ""
    return {
        "num_classes": repr(num_classes),
        "anchor_generator": "anchors",
        "head": f"detection.retinanet.RetinaNetHead({_CHANNELS}, {num_anchors!r}, {num_classes!r}{norm})",
        "topk_candidates": repr(retina["pre_nms_per_level"]),
        "score_thresh": repr(retina["score_threshold"]),
        "nms_thresh": repr(retina["nms_iou"]),
        "detections_per_img": repr(retina["max_detections"]),
    }
