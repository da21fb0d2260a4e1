"""Detectron2's own R-FPN models for `serve`: its published configurations of the 1x schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

if TYPE_CHECKING:
    from serve import Image

CONFIGURATIONS = {
    "rpn": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
WEAK = ("*.conv3.norm.weight",)
SPREAD = {
    "*.rpn_head.objectness_logits": 1.0,
    "*.rpn_head.anchor_deltas": 0.1,
    # With the scores so spread about 100 detections of a 640 x 640 image are left, as of ours.
    "*.box_predictor.cls_score": 1.3,
    "*.box_predictor.bbox_pred": 0.5,
    "head.cls_score": 0.5,
    "head.bbox_pred": 0.1,
}
BACKGROUND = "*.box_predictor.cls_score"


def versions() -> dict[str, str]:
    """Detectron2's version."""
    return {"detectron2": detectron2.__version__}


def build(family: str, depth: int, num_classes: int, device: str) -> nn.Module:
    """The model of a published configuration."""
    if family not in CONFIGURATIONS:
        raise ValueError(f"there is no adapter of detectron2's {family}, only of {', '.join(CONFIGURATIONS)}")
    package = Path(detectron2.__file__).parent
    # An installed package has them in itself, a clone beside it.
    folder = next(place for place in (package / "model_zoo" / "configs", package.parent / "configs") if place.is_dir())
    config = get_cfg()
    config.merge_from_file(str(folder / CONFIGURATIONS[family]))
    config.MODEL.DEVICE, config.MODEL.WEIGHTS = device, ""
    config.MODEL.RESNETS.DEPTH = depth
    config.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.RETINANET.NUM_CLASSES = num_classes
    config.INPUT.MASK_FORMAT = "bitmask"
    return build_model(config)


def inputs(images: Sequence[Image], device: str) -> list[dict[str, Any]]:
    """Detectron2's dictionaries, the image in BGR."""
    given = []
    for image in images:
        instances = Instances(tuple(image.image.shape[-2:]))
        instances.gt_boxes, instances.gt_classes = Boxes(image.boxes), image.labels
        if image.masks is not None:
            instances.gt_masks = BitMasks(image.masks)
        height, width = image.file_size
        image = image.image.flip(0).to(device)
        given.append({"image": image, "height": height, "width": width, "instances": instances.to(device)})
    return given


def losses(model: nn.Module, given: list[dict[str, Any]]) -> Tensor:
    """The sum of what the model gives in training."""
    with EventStorage():
        return torch.stack(list(model(given).values())).sum()


def infer(model: nn.Module, given: list[dict[str, Any]]) -> Any:
    """The model's instances, on the host."""
    found = model([{name: value for name, value in one.items() if name != "instances"} for one in given])
    return [next(iter(one.values())).to("cpu") for one in found]
