"""Determine the model from the names and shapes of its tensors, after renaming to Boxwright's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from boxwright.backbones.fpn import resnet_fpn
from boxwright.backbones.resnet import BLOCKS_PER_STAGE
from boxwright.detectors.cascade_rcnn import cascade_mask_rcnn, cascade_rcnn
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import fast_mask_rcnn, fast_rcnn, faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.grid_convs import GridNorm
from boxwright.importers.source import Settings
from boxwright.layers.norm import Norm

Tensors = Mapping[str, Tensor]


def is_backbone(tensors: Tensors) -> bool:
    """Whether the tensors belong to the body of a backbone only."""
    return all(name.startswith("backbone.body.") for name in tensors)


def model_of(tensors: Tensors, settings: Settings) -> Any:
    """Return the factory of the detector.

    Args:
        tensors: Tensors by Boxwright's names.
        settings: Settings that the tensors do not determine.

    Raises:
        ValueError: Boxwright has no such model.
    """
    parts = {name.partition(".")[0] for name in tensors}
    common: dict[str, Any] = {
        "backbone": _backbone(tensors, settings),
        "conventions": settings.conventions,
        "pixel_stats": settings.pixel_stats,
    }
    if "head" in parts:
        return partial(retinanet, **common, retina=_retina(tensors, settings))
    masks = "mask_head" in parts or "mask_heads" in parts
    if masks:
        common["mask"] = _mask(tensors, settings)
    if "box_heads" in parts:
        common |= {"box": _box(tensors, settings, "box_heads.0"), "cascade": settings.cascade}
        return partial(cascade_mask_rcnn if masks else cascade_rcnn, **common, rpn=_rpn(tensors, settings))
    if "box_head" in parts:
        common["box"] = _box(tensors, settings, "box_head")
        if "rpn" in parts:
            return partial(mask_rcnn if masks else faster_rcnn, **common, rpn=_rpn(tensors, settings))
        return partial(fast_mask_rcnn if masks else fast_rcnn, **common)
    if "rpn" in parts:
        return partial(proposal_network, **common, rpn=_rpn(tensors, settings))
    raise ValueError(f"unknown detector with the parts {', '.join(sorted(parts))}")


def num_classes_of(tensors: Tensors) -> int | None:
    """Number of classes without background, from the shape of the last layer; None for an RPN."""
    for name in ("box_head.class_logits.bias", "box_heads.0.class_logits.bias"):
        if name in tensors:
            return tensors[name].shape[0] - 1
    if "head.class_logits.bias" in tensors:
        # Each anchor has four deltas and one logit per class.
        return 4 * tensors["head.class_logits.bias"].shape[0] // _size(tensors, "head.box_deltas.bias", 0)
    return None


def _backbone(tensors: Tensors, settings: Settings) -> Any:
    body = {name.removeprefix("backbone.body."): t for name, t in tensors.items() if name.startswith("backbone.body.")}
    bottleneck = "layer1.0.conv3.weight" in body
    blocks = tuple(_count(body, f"layer{stage}.{{}}.conv1.weight") for stage in range(1, 5))
    depths = {d: b for d, b in BLOCKS_PER_STAGE.items() if b == blocks and (d >= 50) == bottleneck}
    if not depths:
        raise ValueError(
            f"the backbone has {blocks} {'bottlenecks' if bottleneck else 'basic blocks'} per stage; supported are "
            f"ResNets of depth {', '.join(map(str, BLOCKS_PER_STAGE))}"
        )
    fpn_norm = _norm(tensors, "backbone.lateral.0")
    lateral = "backbone.lateral.{}.weight" if fpn_norm is None else "backbone.lateral.{}.0.weight"
    num_laterals = _count(tensors, lateral)
    if not num_laterals:
        raise ValueError("the detector has no feature pyramid; only detectors with a feature pyramid are supported")
    extra, channels = "pool", _size(tensors, lateral.format(0), 0)
    for name in ("backbone.extra_output.0.weight", "backbone.extra_output.0.0.weight"):
        if name in tensors:
            extra = "p5" if _size(tensors, name, 1) == channels else "c5"
    arguments: dict[str, Any] = {
        "depth": next(iter(depths)),
        "style": settings.style,
        "norm": _body_norm(body, fpn_norm),
        "train_norm_affine": settings.train_norm_affine,
        "out_stages": tuple(range(6 - num_laterals, 6)),
        "channels": channels,
        "extra": extra,
        "extra_relu": settings.extra_relu,
        "fpn_norm": fpn_norm,
    }
    if bottleneck:
        inner, of_group = (_size(body, "layer1.0.conv2.weight", axis) for axis in (0, 1))
        arguments |= {"groups": inner // of_group, "width_per_group": of_group}
    return partial(resnet_fpn, **arguments)


def _body_norm(body: Tensors, fpn_norm: str | None) -> Norm:
    """Norm of the body: GroupNorm without statistics; BatchNorm is trainable if the pyramid also has BatchNorm."""
    if not any(name.endswith("running_var") for name in body):
        return "gn"
    return "bn" if fpn_norm == "bn" else "frozen_bn"


def _rpn(tensors: Tensors, settings: Settings) -> Any:
    return replace(settings.rpn, num_convs=1 + _count(tensors, "rpn.more_convs.{}.weight"))


def _box(tensors: Tensors, settings: Settings, prefix: str) -> Any:
    num_convs, conv_width, norm = _grid_convs(tensors, f"{prefix}.convs")
    num_fcs = _count(tensors, f"{prefix}.fc{{}}.weight", first=1)
    return replace(
        settings.box,
        num_convs=num_convs,
        conv_width=conv_width or settings.box.conv_width,
        norm=norm,
        # A head without convolutions has two layers in every library. With only one, the file is incomplete.
        num_fcs=num_fcs if num_convs else max(2, num_fcs),
        width=_size(tensors, f"{prefix}.fc1.bias", 0),
        class_agnostic=_size(tensors, f"{prefix}.box_deltas.bias", 0) == 4,
    )


def _mask(tensors: Tensors, settings: Settings) -> Any:
    prefix = "mask_head" if any(name.startswith("mask_head.") for name in tensors) else "mask_heads.0"
    num_convs, _, norm = _grid_convs(tensors, f"{prefix}.convs")
    width = _size(tensors, f"{prefix}.mask_logits.weight", 1)
    return replace(settings.mask, width=width, num_convs=num_convs, norm=norm)


def _grid_convs(tensors: Tensors, prefix: str) -> tuple[int, int, GridNorm | None]:
    """Number of convolutions of a head on the RoI grid, their channels (0 without convolutions) and their norm."""
    norm_type = _norm(tensors, f"{prefix}.0")
    norm: GridNorm | None = "frozen_bn" if norm_type == "bn" else norm_type
    name = f"{prefix}.{{}}.weight" if norm is None else f"{prefix}.{{}}.0.weight"
    count = _count(tensors, name)
    return count, _size(tensors, name.format(0), 0) if count else 0, norm


def _retina(tensors: Tensors, settings: Settings) -> Any:
    weights = [t for name, t in tensors.items() if re.fullmatch(r"head\.class_convs\.\d+\.weight", name)]
    norm: Literal["gn"] | None = "gn" if any(weight.ndim == 1 for weight in weights) else None
    return replace(settings.retina, num_convs=sum(weight.ndim == 4 for weight in weights), norm=norm)


def _norm(tensors: Tensors, layer: str) -> Literal["bn", "gn"] | None:
    """Norm after a convolution: BatchNorm if it has statistics, otherwise GroupNorm; None without a norm."""
    if f"{layer}.1.weight" not in tensors:
        return None
    return "bn" if f"{layer}.1.running_var" in tensors else "gn"


def _count(tensors: Tensors, template: str, first: int = 0) -> int:
    """Number of consecutive names of a template, counted from `first`."""
    count = 0
    while template.format(first + count) in tensors:
        count += 1
    return count


def _size(tensors: Tensors, name: str, axis: int) -> int:
    if name not in tensors:
        raise ValueError(f"tensor missing: {name}, which is needed to determine the model")
    return tensors[name].shape[axis]
