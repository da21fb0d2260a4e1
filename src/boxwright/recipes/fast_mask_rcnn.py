"""Mask R-CNN (He et al., 2017) on a feature pyramid (Lin et al., 2017), trained on precomputed RPN proposals."""

from __future__ import annotations

from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.rcnn import fast_mask_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import (
    R50,
    R50_CAFFE,
    R101,
    R101_CAFFE,
    SMALL_BACKBONE,
    SMALL_MASK,
    X101_32X4D,
    X101_64X4D,
    one_x,
    small,
    two_x,
)
from boxwright.training.experiment import Experiment


def fast_mask_rcnn_r50_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 36.8, mask AP 34.1, 5.3 GB, 0.50 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_fpn_1x --data coco --out rpn_r50_fpn_1x.proposals
    boxwright train fast_mask_rcnn_r50_fpn_1x --data coco --proposals rpn_r50_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=R50))


def fast_mask_rcnn_r50_fpn_2x() -> Experiment:
    """Fast Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 37.9, mask AP 34.8, 5.3 GB, 0.50 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_fpn_2x --data coco --out rpn_r50_fpn_2x.proposals
    boxwright train fast_mask_rcnn_r50_fpn_2x --data coco --proposals rpn_r50_fpn_2x.proposals
    """
    return two_x(partial(fast_mask_rcnn, backbone=R50))


def fast_mask_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.5 (2018, 8 V100): box AP 37.3, mask AP 34.5, 5.4 GB, 0.47 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r50_caffe_fpn_1x --data coco --out rpn_r50_caffe_fpn_1x.proposals
    boxwright train fast_mask_rcnn_r50_caffe_fpn_1x --data coco --proposals rpn_r50_caffe_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def fast_mask_rcnn_r101_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 38.9, mask AP 35.8, 5.4 GB, 0.462 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_fpn_1x --data coco --out rpn_r101_fpn_1x.proposals
    boxwright train fast_mask_rcnn_r101_fpn_1x --data coco --proposals rpn_r101_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=R101))


def fast_mask_rcnn_r101_fpn_2x() -> Experiment:
    """Fast Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 39.9, mask AP 36.4. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_fpn_2x --data coco --out rpn_r101_fpn_2x.proposals
    boxwright train fast_mask_rcnn_r101_fpn_2x --data coco --proposals rpn_r101_fpn_2x.proposals
    """
    return two_x(partial(fast_mask_rcnn, backbone=R101))


def fast_mask_rcnn_r101_caffe_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, caffe-style R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    mmdetection 0.x (2019): box AP 39.4, mask AP 36.1, 5.2 GB, 0.429 s/iter. Boxwright: not measured yet.

    boxwright propose runs/rpn_r101_caffe_fpn_1x --data coco --out rpn_r101_caffe_fpn_1x.proposals
    boxwright train fast_mask_rcnn_r101_caffe_fpn_1x --data coco --proposals rpn_r101_caffe_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=R101_CAFFE, pixel_stats=CAFFE))


def fast_mask_rcnn_x101_32x4d_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_32x4d_fpn_1x --data coco --out rpn_x101_32x4d_fpn_1x.proposals
    boxwright train fast_mask_rcnn_x101_32x4d_fpn_1x --data coco --proposals rpn_x101_32x4d_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=X101_32X4D))


def fast_mask_rcnn_x101_32x4d_fpn_2x() -> Experiment:
    """Fast Mask R-CNN, X-101-32x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_32x4d_fpn_2x --data coco --out rpn_x101_32x4d_fpn_2x.proposals
    boxwright train fast_mask_rcnn_x101_32x4d_fpn_2x --data coco --proposals rpn_x101_32x4d_fpn_2x.proposals
    """
    return two_x(partial(fast_mask_rcnn, backbone=X101_32X4D))


def fast_mask_rcnn_x101_64x4d_fpn_1x() -> Experiment:
    """Fast Mask R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 12 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_64x4d_fpn_1x --data coco --out rpn_x101_64x4d_fpn_1x.proposals
    boxwright train fast_mask_rcnn_x101_64x4d_fpn_1x --data coco --proposals rpn_x101_64x4d_fpn_1x.proposals
    """
    return one_x(partial(fast_mask_rcnn, backbone=X101_64X4D))


def fast_mask_rcnn_x101_64x4d_fpn_2x() -> Experiment:
    """Fast Mask R-CNN, X-101-64x4d-FPN, COCO, 8 GPUs x 2 images, 24 epochs, on the proposals of a trained RPN.

    Not in the tables of mmdetection 0.5. Boxwright: not measured yet.

    boxwright propose runs/rpn_x101_64x4d_fpn_2x --data coco --out rpn_x101_64x4d_fpn_2x.proposals
    boxwright train fast_mask_rcnn_x101_64x4d_fpn_2x --data coco --proposals rpn_x101_64x4d_fpn_2x.proposals
    """
    return two_x(partial(fast_mask_rcnn, backbone=X101_64X4D))


def fast_mask_rcnn_r18_fpn_small() -> Experiment:
    """Fast Mask R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. Boxwright: not measured yet.

    boxwright propose runs/rpn_r18_fpn_small --data shapes --out shapes.proposals
    boxwright train fast_mask_rcnn_r18_fpn_small --data shapes --proposals shapes.proposals
    """
    box = BoxConfig(width=256, num_sampled=128)
    return small(partial(fast_mask_rcnn, backbone=SMALL_BACKBONE, box=box, mask=SMALL_MASK))
