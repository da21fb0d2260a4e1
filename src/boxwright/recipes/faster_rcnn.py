"""Faster R-CNN (Ren et al., 2015) on a feature pyramid (Lin et al., 2017)."""

from __future__ import annotations

from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import (
    R50,
    R50_CAFFE,
    R101,
    R101_CAFFE,
    SMALL_BACKBONE,
    SMALL_RPN,
    X101_32X4D,
    X101_64X4D,
    one_x,
    small,
    two_x,
)
from boxwright.training.experiment import Experiment


def faster_rcnn_r50_fpn_1x() -> Experiment:
    """Faster R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 36.4, 5.1 GB, 0.554 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_r50_fpn_1x --data coco --out runs/faster_rcnn_r50_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=R50))


def faster_rcnn_r50_fpn_2x() -> Experiment:
    """Faster R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 37.7, 5.1 GB, 0.554 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_r50_fpn_2x --data coco --out runs/faster_rcnn_r50_fpn_2x
    """
    return two_x(partial(faster_rcnn, backbone=R50))


def faster_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Faster R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 36.7, 4.9 GB, 0.525 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_r50_caffe_fpn_1x --data coco --out runs/faster_rcnn_r50_caffe_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def faster_rcnn_r101_fpn_1x() -> Experiment:
    """Faster R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 38.5, 5.7 GB, 0.474 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_r101_fpn_1x --data coco --out runs/faster_rcnn_r101_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=R101))


def faster_rcnn_r101_fpn_2x() -> Experiment:
    """Faster R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 39.4. Boxwright: not measured yet.

    boxwright train faster_rcnn_r101_fpn_2x --data coco --out runs/faster_rcnn_r101_fpn_2x
    """
    return two_x(partial(faster_rcnn, backbone=R101))


def faster_rcnn_r101_caffe_fpn_1x() -> Experiment:
    """Faster R-CNN, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 38.8, 5.5 GB, 0.465 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_r101_caffe_fpn_1x --data coco --out runs/faster_rcnn_r101_caffe_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=R101_CAFFE, pixel_stats=CAFFE))


def faster_rcnn_x101_32x4d_fpn_1x() -> Experiment:
    """Faster R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 40.1, 6.9 GB, 0.672 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_x101_32x4d_fpn_1x --data coco --out runs/faster_rcnn_x101_32x4d_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=X101_32X4D))


def faster_rcnn_x101_32x4d_fpn_2x() -> Experiment:
    """Faster R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 40.4. Boxwright: not measured yet.

    boxwright train faster_rcnn_x101_32x4d_fpn_2x --data coco --out runs/faster_rcnn_x101_32x4d_fpn_2x
    """
    return two_x(partial(faster_rcnn, backbone=X101_32X4D))


def faster_rcnn_x101_64x4d_fpn_1x() -> Experiment:
    """Faster R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 41.3, 9.8 GB, 1.040 s/iter. Boxwright: not measured yet.

    boxwright train faster_rcnn_x101_64x4d_fpn_1x --data coco --out runs/faster_rcnn_x101_64x4d_fpn_1x
    """
    return one_x(partial(faster_rcnn, backbone=X101_64X4D))


def faster_rcnn_x101_64x4d_fpn_2x() -> Experiment:
    """Faster R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 40.7. Boxwright: not measured yet.

    boxwright train faster_rcnn_x101_64x4d_fpn_2x --data coco --out runs/faster_rcnn_x101_64x4d_fpn_2x
    """
    return two_x(partial(faster_rcnn, backbone=X101_64X4D))


def faster_rcnn_r18_fpn_small() -> Experiment:
    """Faster R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps.
    Boxwright on BCCD: box AP 56.5, AP50 88.8 after 38 minutes on one core (docs/benchmarks/bccd.md).

    boxwright train faster_rcnn_r18_fpn_small --data bccd --out runs/faster_rcnn_r18_fpn_small
    """
    return small(
        partial(faster_rcnn, backbone=SMALL_BACKBONE, rpn=SMALL_RPN, box=BoxConfig(width=256, num_sampled=128))
    )
