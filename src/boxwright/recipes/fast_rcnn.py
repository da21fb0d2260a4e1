"""Fast R-CNN (Girshick, 2015) on a feature pyramid (Lin et al., 2017), trained on precomputed RPN proposals."""

from __future__ import annotations

from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.rcnn import fast_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import (
    R50,
    R50_CAFFE,
    R101,
    R101_CAFFE,
    SMALL_BACKBONE,
    X101_32X4D,
    X101_64X4D,
    one_x,
    small,
    two_x,
)
from boxwright.training.experiment import Experiment


def fast_rcnn_r50_fpn_1x() -> Experiment:
    """Fast R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 35.8, 4.0 GB, 0.38 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_fpn_1x --data coco --out rpn_r50_fpn_1x.proposals
    boxwright train fast_rcnn_r50_fpn_1x --data coco --proposals rpn_r50_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=R50))


def fast_rcnn_r50_fpn_2x() -> Experiment:
    """Fast R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 37.1, 4.0 GB, 0.38 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_fpn_2x --data coco --out rpn_r50_fpn_2x.proposals
    boxwright train fast_rcnn_r50_fpn_2x --data coco --proposals rpn_r50_fpn_2x.proposals
    """
    return two_x(partial(fast_rcnn, backbone=R50))


def fast_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Fast R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 36.6, 3.5 GB, 0.35 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_caffe_fpn_1x --data coco --out rpn_r50_caffe_fpn_1x.proposals
    boxwright train fast_rcnn_r50_caffe_fpn_1x --data coco --proposals rpn_r50_caffe_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def fast_rcnn_r101_fpn_1x() -> Experiment:
    """Fast R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 38.1, 5.4 GB, 0.388 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_fpn_1x --data coco --out rpn_r101_fpn_1x.proposals
    boxwright train fast_rcnn_r101_fpn_1x --data coco --proposals rpn_r101_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=R101))


def fast_rcnn_r101_fpn_2x() -> Experiment:
    """Fast R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 38.8. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_fpn_2x --data coco --out rpn_r101_fpn_2x.proposals
    boxwright train fast_rcnn_r101_fpn_2x --data coco --proposals rpn_r101_fpn_2x.proposals
    """
    return two_x(partial(fast_rcnn, backbone=R101))


def fast_rcnn_r101_caffe_fpn_1x() -> Experiment:
    """Fast R-CNN, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 38.6, 5.2 GB, 0.355 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_caffe_fpn_1x --data coco --out rpn_r101_caffe_fpn_1x.proposals
    boxwright train fast_rcnn_r101_caffe_fpn_1x --data coco --proposals rpn_r101_caffe_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=R101_CAFFE, pixel_stats=CAFFE))


def fast_rcnn_x101_32x4d_fpn_1x() -> Experiment:
    """Fast R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_32x4d_fpn_1x --data coco --out rpn_x101_32x4d_fpn_1x.proposals
    boxwright train fast_rcnn_x101_32x4d_fpn_1x --data coco --proposals rpn_x101_32x4d_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=X101_32X4D))


def fast_rcnn_x101_32x4d_fpn_2x() -> Experiment:
    """Fast R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_32x4d_fpn_2x --data coco --out rpn_x101_32x4d_fpn_2x.proposals
    boxwright train fast_rcnn_x101_32x4d_fpn_2x --data coco --proposals rpn_x101_32x4d_fpn_2x.proposals
    """
    return two_x(partial(fast_rcnn, backbone=X101_32X4D))


def fast_rcnn_x101_64x4d_fpn_1x() -> Experiment:
    """Fast R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_64x4d_fpn_1x --data coco --out rpn_x101_64x4d_fpn_1x.proposals
    boxwright train fast_rcnn_x101_64x4d_fpn_1x --data coco --proposals rpn_x101_64x4d_fpn_1x.proposals
    """
    return one_x(partial(fast_rcnn, backbone=X101_64X4D))


def fast_rcnn_x101_64x4d_fpn_2x() -> Experiment:
    """Fast R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_64x4d_fpn_2x --data coco --out rpn_x101_64x4d_fpn_2x.proposals
    boxwright train fast_rcnn_x101_64x4d_fpn_2x --data coco --proposals rpn_x101_64x4d_fpn_2x.proposals
    """
    return two_x(partial(fast_rcnn, backbone=X101_64X4D))


def fast_rcnn_r18_fpn_small() -> Experiment:
    """Fast R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. Boxwright on BCCD: box AP 56.9, AP50 87.4
    (docs/benchmarks/bccd.md).

    boxwright propose runs/rpn_r18_fpn_small --data bccd --out bccd.proposals
    boxwright train fast_rcnn_r18_fpn_small --data bccd --proposals bccd.proposals
    """
    return small(partial(fast_rcnn, backbone=SMALL_BACKBONE, box=BoxConfig(width=256, num_sampled=128)))
