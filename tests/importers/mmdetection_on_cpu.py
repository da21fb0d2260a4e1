"""Run mmdetection on a CPU without its compiled extensions: Python versions of the operators that detection needs.

Shapes: R boxes, C channels, feature maps of H x W cells.
"""

from __future__ import annotations

import collections
import importlib.machinery
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms, roi_align


class CompiledModules:
    """Import hook: supplies the peer's compiled modules, with the operators of this file as their contents."""

    def __init__(self, operators: dict[str, Callable[..., Any]]) -> None:
        self.operators = operators

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if re.fullmatch(r"mmcv\._ext|mmdet\.ops\..*(_cuda|_cpu|cpu_nms|gpu_nms|cpu_soft_nms|compiling_info)", name):
            return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = self._operator  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` has set up the module."""

    def _operator(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.operators.get(name, _missing)


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("compiled operator without a Python version in mmdetection_on_cpu.py")


def nms_2018(detections: Any, iou_threshold: float) -> Any:
    """NMS of 0.x and 1.x on GPUs: box sizes include the end pixel; IoU above the threshold suppresses."""
    rows = torch.as_tensor(detections)
    keep = nms(torch.cat([rows[:, :2], rows[:, 2:4] + 1], dim=1), rows[:, 4], iou_threshold)
    return keep if isinstance(detections, Tensor) else keep.numpy()


def nms_later(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """NMS of 2.x and 3.x."""
    return nms(torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1), scores, iou_threshold)


def roi_align_2018(layer: Any, features: Tensor, rois: Tensor) -> Tensor:
    """RoIAlign of 0.x and 1.x for one image, after their kernel: a RoI ends at (x2 + 1) * scale, no half-pixel offset.

    Bilinear sampling is separable, so one row of weights per axis and output cell is enough.

    Args:
        layer: the peer's RoIAlign layer, with `out_size`, `sample_num` and `spatial_scale`.
        features: [1, C, H, W].
        rois: [R, 5] image index and xyxy in pixels of the image.

    Returns:
        [R, C, out_size, out_size].
    """
    size, samples = int(np.max(layer.out_size)), layer.sample_num
    start = rois[:, 1:3] * layer.spatial_scale
    extent = ((rois[:, 3:] + 1) * layer.spatial_scale - start).clamp(min=0)
    steps = (torch.arange(size * samples) + 0.5) / (samples * size)

    def weights(axis: int, length: int) -> Tensor:
        points = start[:, axis, None] + steps * extent[:, axis, None]
        inside = (points >= -1) & (points <= length)
        points = points.clamp(min=0, max=length - 1)
        distance = (points[..., None] - torch.arange(length)).abs()
        rows = (1 - distance).clamp(min=0) * inside[..., None]
        return rows.unflatten(1, (size, samples)).mean(2)

    height, width = features.shape[2:]
    return torch.einsum("rih,chw,rjw->rcij", weights(1, height), features[0], weights(0, width))


def roi_align_later(features: Tensor, rois: Tensor, output: Tensor, *_: Any, **options: Any) -> None:
    """RoIAlign of 2.x and 3.x."""
    size = (options["aligned_height"], options["aligned_width"])
    scale, ratio = options["spatial_scale"], options["sampling_ratio"]
    output.copy_(roi_align(features, rois, size, scale, ratio, options["aligned"]))


def import_peer() -> tuple[str, int]:
    """Import mmdetection, replacing compiled operators, names that Python and numpy have dropped, and GPU defaults.

    Returns:
        Its version and its major version.
    """
    operators: dict[str, Callable[..., Any]] = {"nms": nms_2018, "cpu_nms": nms_2018}
    sys.meta_path.insert(0, CompiledModules(operators))  # type: ignore[arg-type]
    for name in ("Iterable", "Sequence", "Mapping"):
        setattr(collections, name, getattr(collections.abc, name))
    for kind in (int, float):
        setattr(np, kind.__name__, kind)
    import mmcv

    if int(mmcv.__version__.partition(".")[0]) > 0:
        operators |= {"nms": nms_later, "roi_align_forward": roi_align_later}
    import mmdet

    major = int(mmdet.__version__.partition(".")[0])
    if major < 2:
        from mmdet.core.anchor import AnchorGenerator
        from mmdet.models.backbones.resnet import BasicBlock
        from mmdet.ops import RoIAlign

        if major == 0:  # Its ResNet passes `dcn`, which its BasicBlock does not accept.
            init = BasicBlock.__init__
            BasicBlock.__init__ = lambda self, *rest, dcn=None, **options: init(self, *rest, **options)

        RoIAlign.forward = roi_align_2018
        AnchorGenerator.grid_anchors.__defaults__ = (16, "cpu")
        torch.cuda.FloatTensor = torch.FloatTensor  # type: ignore[misc]
    return mmdet.__version__, major
