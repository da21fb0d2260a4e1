"""Loss settings from the configuration text inside an mmdetection checkpoint.

The text is parsed as Python syntax and never run.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from boxwright.importers.source import Settings

_IOU_LOSSES = {"GIoULoss": "giou", "DIoULoss": "diou", "CIoULoss": "ciou"}


def with_losses(settings: Settings, text: str) -> Settings:
    """Replace box losses and loss weights by the values in a configuration.

    Settings that the configuration does not name keep their values, and so do settings of losses that Boxwright does
    not have, such as `IoULoss`.

    Args:
        settings: settings of the published models.
        text: the configuration; anything but an assignment `model = dict(...)` is skipped.
    """
    model = _model(text)
    roi_head = _mapping(model.get("roi_head")) or model  # mmdetection 2.x and later; up to 1.x there is no roi_head
    rpn_head, bbox_head = (_mapping(part.get(name)) for part, name in ((model, "rpn_head"), (roi_head, "bbox_head")))
    mask_weight = _number(_mapping(_mapping(roi_head.get("mask_head")).get("loss_mask")).get("loss_weight"))
    losses = _losses(bbox_head, "class_loss_weight")
    retina = bbox_head.get("type") == "RetinaHead"
    return replace(
        settings,
        rpn=replace(settings.rpn, **_losses(rpn_head, "objectness_loss_weight")),
        box=settings.box if retina else replace(settings.box, **losses),
        retina=replace(settings.retina, **losses) if retina else settings.retina,
        mask=settings.mask if mask_weight is None else replace(settings.mask, mask_loss_weight=mask_weight),
    )


def _losses(head: Mapping[str, Any], class_weight_name: str) -> dict[str, Any]:
    """Fields of Boxwright's head configuration that the mmdetection configuration sets."""
    class_loss, box_loss = _mapping(head.get("loss_cls")), _mapping(head.get("loss_bbox"))
    kind, decoded = box_loss.get("type"), head.get("reg_decoded_bbox") is True
    fields: dict[str, Any] = {class_weight_name: _number(class_loss.get("loss_weight"))}
    if kind in _IOU_LOSSES and decoded:
        fields |= {"box_loss": _IOU_LOSSES[kind], "box_loss_weight": _number(box_loss.get("loss_weight"))}
    elif kind in ("L1Loss", "SmoothL1Loss") and not decoded:
        beta = 0.0 if kind == "L1Loss" else _number(box_loss.get("beta", 1.0))
        fields |= {"smooth_l1_beta": beta, "box_loss_weight": _number(box_loss.get("loss_weight"))}
    return {name: value for name, value in fields.items() if value is not None}


def _model(text: str) -> dict[str, Any]:
    """The value of `model` at the top level; empty if there is none or the text is not Python."""
    try:
        statements = ast.parse(text).body
        for statement in statements:
            if isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == ["model"]:
                return _mapping(_value(statement.value))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return {}


def _value(node: ast.expr) -> Any:
    """A literal, a quotient of numbers, or a dictionary (`dict(...)` or braces) or list of these; else None."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        case ast.Dict():
            keys = [None if key is None else _value(key) for key in node.keys]
            return {key: _value(value) for key, value in zip(keys, node.values, strict=True) if isinstance(key, str)}
        case ast.List() | ast.Tuple():
            return [_value(element) for element in node.elts]
        case ast.BinOp(op=ast.Div()):
            numerator, denominator = _number(_value(node.left)), _number(_value(node.right))
            return numerator / denominator if numerator is not None and denominator else None
        case ast.Constant():
            return node.value
    return None


def _mapping(value: Any) -> dict[str, Any]:
    """A dictionary unchanged; for a list of cascade stages, their losses if all are equal; otherwise empty."""
    if isinstance(value, list) and value and all(isinstance(stage, dict) for stage in value):
        names = ("type", "loss_cls", "loss_bbox", "loss_mask", "reg_decoded_bbox")
        first, *others = ({name: stage.get(name) for name in names} for stage in value)
        return first if all(other == first for other in others) else {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number of at least 0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return None
    return float(value)
