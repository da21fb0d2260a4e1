"""Cascade R-CNN (Cai & Vasconcelos, 2018) on a feature pyramid, with and without masks.

The figures of mmdetection 0.x are from its tables of 2019, measured on 8 V100.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from boxwright.backbones.backbone import CAFFE
from boxwright.detectors.cascade_rcnn import cascade_mask_rcnn, cascade_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import R50, R50_CAFFE, R101, SMALL_BACKBONE, SMALL_MASK, SMALL_RPN, Model, one_x, small
from boxwright.training.experiment import Experiment, StepSchedule

_SMALL_BOX = BoxConfig(class_agnostic=True, width=256, num_sampled=128)


def _twenty_epochs(model: Model) -> Experiment:
    """20 epochs; the learning rate drops after epochs 16 and 19. This is mmdetection's longer schedule for cascades."""
    return replace(one_x(model), schedule=StepSchedule(epochs=(16, 19)), epochs=20)


def cascade_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Cascade R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 40.5, 3.9 GB, 0.464 s/iter. Boxwright: not measured yet.

    boxwright train cascade_rcnn_r50_caffe_fpn_1x --data coco --out runs/cascade_rcnn_r50_caffe_fpn_1x
    """
    return one_x(partial(cascade_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def cascade_rcnn_r50_fpn_1x() -> Experiment:
    """Cascade R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 40.4, 4.1 GB, 0.455 s/iter. Boxwright: not measured yet.

    boxwright train cascade_rcnn_r50_fpn_1x --data coco --out runs/cascade_rcnn_r50_fpn_1x
    """
    return one_x(partial(cascade_rcnn, backbone=R50))


def cascade_rcnn_r50_fpn_20e() -> Experiment:
    """Cascade R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 20 epochs.

    mmdetection 0.x (2019): box AP 41.1. Boxwright: not measured yet.

    boxwright train cascade_rcnn_r50_fpn_20e --data coco --out runs/cascade_rcnn_r50_fpn_20e
    """
    return _twenty_epochs(partial(cascade_rcnn, backbone=R50))


def cascade_rcnn_r101_fpn_1x() -> Experiment:
    """Cascade R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 42.0, 6.0 GB, 0.584 s/iter. Boxwright: not measured yet.

    boxwright train cascade_rcnn_r101_fpn_1x --data coco --out runs/cascade_rcnn_r101_fpn_1x
    """
    return one_x(partial(cascade_rcnn, backbone=R101))


def cascade_rcnn_r101_fpn_20e() -> Experiment:
    """Cascade R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 20 epochs.

    mmdetection 0.x (2019): box AP 42.5. Boxwright: not measured yet.

    boxwright train cascade_rcnn_r101_fpn_20e --data coco --out runs/cascade_rcnn_r101_fpn_20e
    """
    return _twenty_epochs(partial(cascade_rcnn, backbone=R101))


def cascade_rcnn_r18_fpn_small() -> Experiment:
    """Cascade R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: for a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. Boxwright on BCCD: box AP 59.3, AP50 88.6
    (docs/benchmarks/bccd.md).

    boxwright train cascade_rcnn_r18_fpn_small --data bccd --out runs/cascade_rcnn_r18_fpn_small
    """
    return small(partial(cascade_rcnn, backbone=SMALL_BACKBONE, rpn=SMALL_RPN, box=_SMALL_BOX))


def cascade_mask_rcnn_r50_caffe_fpn_1x() -> Experiment:
    """Cascade Mask R-CNN, caffe-style R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 40.9, mask AP 35.5, 5.1 GB, 0.692 s/iter. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r50_caffe_fpn_1x --data coco --out runs/cascade_mask_rcnn_r50_caffe_fpn_1x
    """
    return one_x(partial(cascade_mask_rcnn, backbone=R50_CAFFE, pixel_stats=CAFFE))


def cascade_mask_rcnn_r50_fpn_1x() -> Experiment:
    """Cascade Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 41.2, mask AP 35.7, 5.3 GB, 0.683 s/iter. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r50_fpn_1x --data coco --out runs/cascade_mask_rcnn_r50_fpn_1x
    """
    return one_x(partial(cascade_mask_rcnn, backbone=R50))


def cascade_mask_rcnn_r50_fpn_20e() -> Experiment:
    """Cascade Mask R-CNN, R-50-FPN, COCO, 8 GPUs x 2 images, 20 epochs.

    mmdetection 0.x (2019): box AP 42.3, mask AP 36.6. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r50_fpn_20e --data coco --out runs/cascade_mask_rcnn_r50_fpn_20e
    """
    return _twenty_epochs(partial(cascade_mask_rcnn, backbone=R50))


def cascade_mask_rcnn_r101_fpn_1x() -> Experiment:
    """Cascade Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 12 epochs.

    mmdetection 0.x (2019): box AP 42.6, mask AP 37.0, 7.2 GB, 0.807 s/iter. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r101_fpn_1x --data coco --out runs/cascade_mask_rcnn_r101_fpn_1x
    """
    return one_x(partial(cascade_mask_rcnn, backbone=R101))


def cascade_mask_rcnn_r101_fpn_20e() -> Experiment:
    """Cascade Mask R-CNN, R-101-FPN, COCO, 8 GPUs x 2 images, 20 epochs.

    mmdetection 0.x (2019): box AP 43.3, mask AP 37.6. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r101_fpn_20e --data coco --out runs/cascade_mask_rcnn_r101_fpn_20e
    """
    return _twenty_epochs(partial(cascade_mask_rcnn, backbone=R101))


def cascade_mask_rcnn_r18_fpn_small() -> Experiment:
    """Cascade Mask R-CNN, R-18-FPN of 64 channels from random weights, short side 240, 20 epochs: a first try on a CPU.

    Sized for a few hundred images: 200 images take about 1,000 steps. Boxwright: not measured yet.

    boxwright train cascade_mask_rcnn_r18_fpn_small --data shapes --out runs/cascade_mask_rcnn_r18_fpn_small
    """
    return small(partial(cascade_mask_rcnn, backbone=SMALL_BACKBONE, rpn=SMALL_RPN, box=_SMALL_BOX, mask=SMALL_MASK))
