"""Mask R-CNN (He et al., 2017) on a feature pyramid (Lin et al., 2017)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.data.buckets import Resize
from boxwright.detectors.rcnn import mask_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import (
    R50,
    R50_CAFFE,
    R101,
    R101_CAFFE,
    SMALL_BACKBONE,
    SMALL_MASK,
    SMALL_RPN,
    X101_32X4D,
    X101_64X4D,
    one_x,
    small,
    two_x,
)
from boxwright.training.experiment import Experiment


def mask_rcnn_r50_fpn_1x() -> Experiment:
    """Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 37.3, mask AP 34.2, 5.8 GB, 0.690 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_r50_fpn_1x --data coco --out runs/mask_rcnn_r50_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=R50))


def mask_rcnn_r50_fpn_2x() -> Experiment:
    """Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 38.6, mask AP 35.1, 5.8 GB, 0.690 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_r50_fpn_2x --data coco --out runs/mask_rcnn_r50_fpn_2x
    """
    return two_x(partial(mask_rcnn, backbone=R50))


def mask_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Mask R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): box AP 37.5, mask AP 34.4, 5.9 GB, 0.658 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_r50_caffe_fpn_1x --data coco --out runs/mask_rcnn_r50_caffe_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def mask_rcnn_r101_fpn_1x() -> Experiment:
    """Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 39.4, mask AP 35.9, 5.8 GB, 0.571 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_r101_fpn_1x --data coco --out runs/mask_rcnn_r101_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=R101))


def mask_rcnn_r101_fpn_2x() -> Experiment:
    """Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 40.3, mask AP 36.5. Boxwright: not measured yet.

    boxwright train mask_rcnn_r101_fpn_2x --data coco --out runs/mask_rcnn_r101_fpn_2x
    """
    return two_x(partial(mask_rcnn, backbone=R101))


def mask_rcnn_r101_caffe_fpn_1x() -> Experiment:
    """Mask R-CNN, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 39.9, mask AP 36.1, 5.7 GB, 0.534 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_r101_caffe_fpn_1x --data coco --out runs/mask_rcnn_r101_caffe_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=R101_CAFFE, pixel_stats=CAFFE))


def mask_rcnn_x101_32x4d_fpn_1x() -> Experiment:
    """Mask R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 41.1, mask AP 37.1, 7.1 GB, 0.759 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_x101_32x4d_fpn_1x --data coco --out runs/mask_rcnn_x101_32x4d_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=X101_32X4D))


def mask_rcnn_x101_32x4d_fpn_2x() -> Experiment:
    """Mask R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 41.4, mask AP 37.1. Boxwright: not measured yet.

    boxwright train mask_rcnn_x101_32x4d_fpn_2x --data coco --out runs/mask_rcnn_x101_32x4d_fpn_2x
    """
    return two_x(partial(mask_rcnn, backbone=X101_32X4D))


def mask_rcnn_x101_64x4d_fpn_1x() -> Experiment:
    """Mask R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 42.1, mask AP 38.0, 10.0 GB, 1.102 s/iter. Boxwright: not measured yet.

    boxwright train mask_rcnn_x101_64x4d_fpn_1x --data coco --out runs/mask_rcnn_x101_64x4d_fpn_1x
    """
    return one_x(partial(mask_rcnn, backbone=X101_64X4D))


def mask_rcnn_x101_64x4d_fpn_2x() -> Experiment:
    """Mask R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): box AP 42.0, mask AP 37.7. Boxwright: not measured yet.

    boxwright train mask_rcnn_x101_64x4d_fpn_2x --data coco --out runs/mask_rcnn_x101_64x4d_fpn_2x
    """
    return two_x(partial(mask_rcnn, backbone=X101_64X4D))


def mask_rcnn_r18_fpn_small() -> Experiment:
    """Mask R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. Boxwright: not measured yet.

    boxwright train mask_rcnn_r18_fpn_small --data shapes --out runs/mask_rcnn_r18_fpn_small
    """
    box = BoxConfig(width=256, num_sampled=128)
    return small(partial(mask_rcnn, backbone=SMALL_BACKBONE, rpn=SMALL_RPN, box=box, mask=SMALL_MASK))


def mask_rcnn_r18_fpn_dense() -> Experiment:
    """Small Mask R-CNN for hundreds of small objects per image, such as cells: short side 256, anchors from 16 pixels.

    At most 512 detections per image, from at most 1,000 proposals.

    Boxwright on nuclei: box AP 48.5, mask AP 48.9, mask AP50 79.9 (docs/benchmarks/nuclei.md).

    boxwright train mask_rcnn_r18_fpn_dense --data nuclei --out runs/mask_rcnn_r18_fpn_dense
    """
    rpn = replace(
        SMALL_RPN,
        anchor_scale=4.0,
        num_sampled=256,
        pre_nms_per_level=1500,
        num_proposals=1000,
        test_pre_nms_per_level=1500,
        test_num_proposals=1000,
    )
    box = BoxConfig(width=256, num_sampled=256, max_detections=512)
    model = partial(mask_rcnn, backbone=SMALL_BACKBONE, rpn=rpn, box=box, mask=SMALL_MASK)
    return replace(small(model), resize=Resize(short=256, long=384), epochs=6)
