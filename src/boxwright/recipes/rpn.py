"""Region proposal networks (Ren et al., 2015) on a feature pyramid (Lin et al., 2017), trained alone."""

from __future__ import annotations

from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.proposal_network import proposal_network
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


def rpn_r50_fpn_1x() -> Experiment:
    """RPN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): AR1000 57.1, 4.8 GB, 0.407 s/iter. Boxwright: not measured yet.

    boxwright train rpn_r50_fpn_1x --data coco --out runs/rpn_r50_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=R50))


def rpn_r50_fpn_2x() -> Experiment:
    """RPN, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.5 (2018, 8 V100): AR1000 57.6, 4.8 GB, 0.407 s/iter. Boxwright: not measured yet.

    boxwright train rpn_r50_fpn_2x --data coco --out runs/rpn_r50_fpn_2x
    """
    return two_x(partial(proposal_network, backbone=R50))


def rpn_r50_caffe_fpn_1x() -> Experiment:
    """RPN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.5 (2018, 8 V100): AR1000 58.2, 4.5 GB, 0.379 s/iter. Boxwright: not measured yet.

    boxwright train rpn_r50_caffe_fpn_1x --data coco --out runs/rpn_r50_caffe_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=R50_CAFFE, pixel_stats=CAFFE))


def rpn_r101_fpn_1x() -> Experiment:
    """RPN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): AR1000 58.6, 5.4 GB, 0.396 s/iter. Boxwright: not measured yet.

    boxwright train rpn_r101_fpn_1x --data coco --out runs/rpn_r101_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=R101))


def rpn_r101_fpn_2x() -> Experiment:
    """RPN, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): AR1000 59.1. Boxwright: not measured yet.

    boxwright train rpn_r101_fpn_2x --data coco --out runs/rpn_r101_fpn_2x
    """
    return two_x(partial(proposal_network, backbone=R101))


def rpn_r101_caffe_fpn_1x() -> Experiment:
    """RPN, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): AR1000 59.4, 5.2 GB, 0.379 s/iter. Boxwright: not measured yet.

    boxwright train rpn_r101_caffe_fpn_1x --data coco --out runs/rpn_r101_caffe_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=R101_CAFFE, pixel_stats=CAFFE))


def rpn_x101_32x4d_fpn_1x() -> Experiment:
    """RPN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): AR1000 59.4, 6.6 GB, 0.589 s/iter. Boxwright: not measured yet.

    boxwright train rpn_x101_32x4d_fpn_1x --data coco --out runs/rpn_x101_32x4d_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=X101_32X4D))


def rpn_x101_32x4d_fpn_2x() -> Experiment:
    """RPN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): AR1000 59.9. Boxwright: not measured yet.

    boxwright train rpn_x101_32x4d_fpn_2x --data coco --out runs/rpn_x101_32x4d_fpn_2x
    """
    return two_x(partial(proposal_network, backbone=X101_32X4D))


def rpn_x101_64x4d_fpn_1x() -> Experiment:
    """RPN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): AR1000 59.8, 9.5 GB, 0.955 s/iter. Boxwright: not measured yet.

    boxwright train rpn_x101_64x4d_fpn_1x --data coco --out runs/rpn_x101_64x4d_fpn_1x
    """
    return one_x(partial(proposal_network, backbone=X101_64X4D))


def rpn_x101_64x4d_fpn_2x() -> Experiment:
    """RPN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs.

    mmdetection 0.x (2019): AR1000 60.0. Boxwright: not measured yet.

    boxwright train rpn_x101_64x4d_fpn_2x --data coco --out runs/rpn_x101_64x4d_fpn_2x
    """
    return two_x(partial(proposal_network, backbone=X101_64X4D))


def rpn_r18_fpn_small() -> Experiment:
    """RPN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps.

    Boxwright on BCCD: AR@100 70.0 (docs/benchmarks/bccd.md).

    boxwright train rpn_r18_fpn_small --data bccd --out runs/rpn_r18_fpn_small
    """
    return small(partial(proposal_network, backbone=SMALL_BACKBONE, rpn=SMALL_RPN))
