"""mmdetection 3.x's own R-FPN models for `serve`: its published configurations of the 1x schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mmcv
import mmdet
import numpy as np
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import Tensor, nn

if TYPE_CHECKING:
    from serve import Image

CONFIGURATIONS = {
    "rpn": "rpn/rpn_r{depth}_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r{depth}_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r{depth}_fpn_1x_coco.py",
    "retinanet": "retinanet/retinanet_r{depth}_fpn_1x_coco.py",
}
WEAK = ("backbone.*.bn3.weight",)
SPREAD = {
    # A lone RPN has its head where single-stage detectors have theirs.
    "*_head.rpn_cls": 1.0,
    "*_head.rpn_reg": 0.1,
    # With the scores so spread about 100 detections of a 640 x 640 image are left, as of ours.
    "*.bbox_head.fc_cls": 1.2,
    "*.bbox_head.fc_reg": 0.5,
    "bbox_head.retina_cls": 0.5,
    "bbox_head.retina_reg": 0.1,
}
BACKGROUND = "*.bbox_head.fc_cls"


def versions() -> dict[str, str]:
    """Of mmdetection and of the operators that it runs."""
    return {"mmdet": mmdet.__version__, "mmcv": mmcv.__version__}


def build(family: str, depth: int, num_classes: int, device: str) -> nn.Module:
    """The model of a published configuration."""
    if family not in CONFIGURATIONS:
        raise ValueError(f"there is no adapter of mmdetection's {family}, only of {', '.join(CONFIGURATIONS)}")
    # Otherwise mmdetection logs the initialisation of every tensor.
    MMLogger.get_current_instance().setLevel("WARNING")
    register_all_modules()
    config = get_config("mmdet::" + CONFIGURATIONS[family].format(depth=depth)).model
    config.backbone.init_cfg = None
    if family in ("faster_rcnn", "mask_rcnn"):
        config.roi_head.bbox_head.num_classes = num_classes
    if family == "mask_rcnn":
        config.roi_head.mask_head.num_classes = num_classes
    if family == "retinanet":
        config.bbox_head.num_classes = num_classes
    model = MODELS.build(config)
    model.init_weights()
    return model


def inputs(images: Sequence[Image], device: str) -> dict[str, Any]:
    """Images in BGR and data samples."""
    samples = []
    for image in images:
        height, width = image.image.shape[-2:]
        scale = (width / image.file_size[1], height / image.file_size[0])
        sample = DetDataSample(
            metainfo={"img_shape": (height, width), "ori_shape": image.file_size, "scale_factor": scale}
        )
        objects = InstanceData(bboxes=image.boxes, labels=image.labels)
        if image.masks is not None:
            objects.masks = BitmapMasks(image.masks.numpy().astype(np.uint8), height, width)
        sample.gt_instances = objects
        sample.ignored_instances = InstanceData(bboxes=image.boxes[:0], labels=image.labels[:0])
        samples.append(sample.to(device))
    return {"inputs": [image.image.flip(0).to(device) for image in images], "data_samples": samples}


def losses(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The sum of what the model gives in training."""
    prepared = model.data_preprocessor(given, True)
    return model.parse_losses(model(**prepared, mode="loss"))[0]


def infer(model: nn.Module, given: dict[str, Any]) -> Any:
    """The model's instances, on the host."""
    prepared = model.data_preprocessor(given, False)
    return [sample.pred_instances.to("cpu") for sample in model(**prepared, mode="predict")]
