"""Which model some tensors are: found from their names and shapes alone, under our names."""

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
from boxwright.importers.source import Settings

Tensors = Mapping[str, Tensor]


def is_backbone(tensors: Tensors) -> bool:
    """Whether there is nothing beyond a backbone's body."""
    return all(name.startswith("backbone.body.") for name in tensors)


def model_of(tensors: Tensors, settings: Settings) -> Any:
    """The call that makes the detector.

    Args:
        tensors: Under our names.
        settings: What the tensors do not say.

    Raises:
        ValueError: There is no such model here.
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
        box = _box(tensors, settings, "box_heads.0")
        return partial(cascade_mask_rcnn if masks else cascade_rcnn, **common, rpn=settings.rpn, box=box)
    if "box_head" in parts:
        common["box"] = _box(tensors, settings, "box_head")
        if "rpn" in parts:
            return partial(mask_rcnn if masks else faster_rcnn, **common, rpn=settings.rpn)
        return partial(fast_mask_rcnn if masks else fast_rcnn, **common)
    if "rpn" in parts:
        return partial(proposal_network, **common, rpn=settings.rpn)
    raise ValueError(f"the tensors make no detector that is known here: there are {', '.join(sorted(parts))}")


def num_classes_of(tensors: Tensors) -> int | None:
    """Classes without background, by the last layers' shapes; None of an RPN, which takes all of them for one."""
    for name in ("box_head.class_logits.bias", "box_heads.0.class_logits.bias"):
        if name in tensors:
            return tensors[name].shape[0] - 1
    if "head.class_logits.bias" in tensors:
        # Four deltas and as many logits as classes for each anchor.
        return 4 * tensors["head.class_logits.bias"].shape[0] // _size(tensors, "head.box_deltas.bias", 0)
    return None


def _backbone(tensors: Tensors, settings: Settings) -> Any:
    body = {name.removeprefix("backbone.body."): t for name, t in tensors.items() if name.startswith("backbone.body.")}
    bottleneck = "layer1.0.conv3.weight" in body
    blocks = tuple(_count(body, f"layer{stage}.{{}}.conv1.weight") for stage in range(1, 5))
    depths = {d: b for d, b in BLOCKS_PER_STAGE.items() if b == blocks and (d >= 50) == bottleneck}
    if not depths:
        raise ValueError(
            f"the backbone has {blocks} {'bottlenecks' if bottleneck else 'basic blocks'} in its stages, which no "
            f"ResNet here has: there are depths {', '.join(map(str, BLOCKS_PER_STAGE))}"
        )
    num_laterals = _count(tensors, "backbone.lateral.{}.weight")
    if not num_laterals:
        raise ValueError("the detector has no feature pyramid: only detectors on one can be built here")
    extra = "pool"
    if "backbone.extra_output.0.weight" in tensors:
        inputs = _size(tensors, "backbone.extra_output.0.weight", 1)
        extra = "p5" if inputs == _size(tensors, "backbone.lateral.0.weight", 0) else "c5"
    arguments: dict[str, Any] = {
        "depth": next(iter(depths)),
        "style": settings.style,
        "train_norm_affine": settings.train_norm_affine,
        "out_stages": tuple(range(6 - num_laterals, 6)),
        "channels": _size(tensors, "backbone.lateral.0.weight", 0),
        "extra": extra,
        "extra_relu": settings.extra_relu,
    }
    if bottleneck:
        inner, of_group = (_size(body, "layer1.0.conv2.weight", axis) for axis in (0, 1))
        arguments |= {"groups": inner // of_group, "width_per_group": of_group}
    return partial(resnet_fpn, **arguments)


def _box(tensors: Tensors, settings: Settings, prefix: str) -> Any:
    agnostic = _size(tensors, f"{prefix}.box_deltas.bias", 0) == 4
    return replace(settings.box, width=_size(tensors, f"{prefix}.fc1.bias", 0), class_agnostic=agnostic)


def _mask(tensors: Tensors, settings: Settings) -> Any:
    prefix = "mask_head" if any(name.startswith("mask_head.") for name in tensors) else "mask_heads.0"
    return replace(
        settings.mask,
        width=_size(tensors, f"{prefix}.mask_logits.weight", 1),
        num_convs=_count(tensors, f"{prefix}.convs.{{}}.weight"),
    )


def _retina(tensors: Tensors, settings: Settings) -> Any:
    weights = [t for name, t in tensors.items() if re.fullmatch(r"head\.class_convs\.\d+\.weight", name)]
    norm: Literal["gn"] | None = "gn" if any(weight.ndim == 1 for weight in weights) else None
    return replace(settings.retina, num_convs=sum(weight.ndim == 4 for weight in weights), norm=norm)


def _count(tensors: Tensors, template: str) -> int:
    """How many of the names numbered from 0 there are."""
    count = 0
    while template.format(count) in tensors:
        count += 1
    return count


def _size(tensors: Tensors, name: str, axis: int) -> int:
    if name not in tensors:
        raise ValueError(f"the file has no tensor for {name}, without which the model cannot be told")
    return tensors[name].shape[axis]
