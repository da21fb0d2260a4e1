"""RetinaNet (Lin et al., Focal Loss for Dense Object Detection, 2017) on P3 to P7."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.retina_head import RetinaConfig
from boxwright.recipes.common import (
    R50,
    R50_CAFFE,
    R101,
    R101_CAFFE,
    SMALL_BACKBONE,
    X101_32X4D,
    X101_64X4D,
    Model,
    one_x,
    small,
    two_x,
)
from boxwright.training.experiment import SGD, Experiment


def _retinanet(backbone: Any, **arguments: Any) -> Model:
    """RetinaNet on P3 to P7; P6 and P7 are computed from C5."""
    p3_to_p7: Any = partial(backbone, out_stages=(3, 4, 5), extra="c5")
    return partial(retinanet, backbone=p3_to_p7, **arguments)


def _one_x(model: Model) -> Experiment:
    """1x with half the usual learning rate, as in mmdetection 0.5."""
    return replace(one_x(model), optimizer=SGD(lr=0.01))


def _two_x(model: Model) -> Experiment:
    """2x with half the usual learning rate."""
    return replace(two_x(model), optimizer=SGD(lr=0.01))


def retinanet_r50_fpn_1x() -> Experiment:
    """RetinaNet, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 35.6, 3.6 GB, 0.308 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_r50_fpn_1x --data coco --out runs/retinanet_r50_fpn_1x
    """
    return _one_x(_retinanet(R50))


def retinanet_r50_fpn_2x() -> Experiment:
    """RetinaNet, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 36.4. Boxwright: not measured yet.

    boxwright train retinanet_r50_fpn_2x --data coco --out runs/retinanet_r50_fpn_2x
    """
    return _two_x(_retinanet(R50))


def retinanet_r50_caffe_fpn_1x() -> Experiment:
    """RetinaNet, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 35.8, 3.4 GB, 0.285 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_r50_caffe_fpn_1x --data coco --out runs/retinanet_r50_caffe_fpn_1x
    """
    return _one_x(_retinanet(R50_CAFFE, pixel_stats=CAFFE))


def retinanet_r101_fpn_1x() -> Experiment:
    """RetinaNet, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 37.7, 5.5 GB, 0.429 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_r101_fpn_1x --data coco --out runs/retinanet_r101_fpn_1x
    """
    return _one_x(_retinanet(R101))


def retinanet_r101_fpn_2x() -> Experiment:
    """RetinaNet, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 38.1. Boxwright: not measured yet.

    boxwright train retinanet_r101_fpn_2x --data coco --out runs/retinanet_r101_fpn_2x
    """
    return _two_x(_retinanet(R101))


def retinanet_r101_caffe_fpn_1x() -> Experiment:
    """RetinaNet, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 37.8, 5.3 GB, 0.410 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_r101_caffe_fpn_1x --data coco --out runs/retinanet_r101_caffe_fpn_1x
    """
    return _one_x(_retinanet(R101_CAFFE, pixel_stats=CAFFE))


def retinanet_x101_32x4d_fpn_1x() -> Experiment:
    """RetinaNet, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 39.0, 6.7 GB, 0.632 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_x101_32x4d_fpn_1x --data coco --out runs/retinanet_x101_32x4d_fpn_1x
    """
    return _one_x(_retinanet(X101_32X4D))


def retinanet_x101_32x4d_fpn_2x() -> Experiment:
    """RetinaNet, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 39.3. Boxwright: not measured yet.

    boxwright train retinanet_x101_32x4d_fpn_2x --data coco --out runs/retinanet_x101_32x4d_fpn_2x
    """
    return _two_x(_retinanet(X101_32X4D))


def retinanet_x101_64x4d_fpn_1x() -> Experiment:
    """RetinaNet, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 40.0, 9.6 GB, 0.993 s/iter. Boxwright: not measured yet.

    boxwright train retinanet_x101_64x4d_fpn_1x --data coco --out runs/retinanet_x101_64x4d_fpn_1x
    """
    return _one_x(_retinanet(X101_64X4D))


def retinanet_x101_64x4d_fpn_2x() -> Experiment:
    """RetinaNet, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 39.6. Boxwright: not measured yet.

    boxwright train retinanet_x101_64x4d_fpn_2x --data coco --out runs/retinanet_x101_64x4d_fpn_2x
    """
    return _two_x(_retinanet(X101_64X4D))


def retinanet_r18_fpn_small() -> Experiment:
    """RetinaNet, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. The levels are P2 to P6, with
    anchors from 16 pixels, because small images contain small objects.

    Boxwright on BCCD: box AP 55.4, AP50 88.3 (docs/benchmarks/bccd.md).

    boxwright train retinanet_r18_fpn_small --data bccd --out runs/retinanet_r18_fpn_small
    """
    return small(partial(retinanet, backbone=SMALL_BACKBONE, retina=RetinaConfig(num_convs=2, norm="gn")))
