"""Schedules, backbones and small configurations that the recipes share.

The 1x and 2x schedules are mmdetection's: 12 and 24 epochs on COCO at batch size 16 (for example 8 GPUs x 2 images). At
another batch size the learning rate is scaled linearly. The ResNets of these recipes need ImageNet weights (`--init`),
because the stem, the first stage and all batch norm statistics are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.buckets import Resize
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.training.experiment import AdamW, CosineSchedule, Experiment, StepSchedule

Model = Callable[..., nn.Module]


def one_x(model: Model) -> Experiment:
    """12 epochs; the learning rate drops after epochs 8 and 11."""
    return Experiment(model=model)


def two_x(model: Model) -> Experiment:
    """24 epochs; the learning rate drops after epochs 16 and 22."""
    return Experiment(model=model, schedule=StepSchedule(epochs=(16, 22)), epochs=24)


# Typed Any, because a type checker does not accept a factory where a backbone is expected.
R50: Any = partial(resnet_fpn, depth=50)
"""ResNet-50-FPN with levels P2 to P6; the stride of a bottleneck is in its 3x3 convolution."""
R50_CAFFE: Any = partial(resnet_fpn, depth=50, style="caffe")
"""`R50` with the stride in the first 1x1 convolution of a bottleneck."""
R101: Any = partial(resnet_fpn, depth=101)
"""ResNet-101-FPN with levels P2 to P6."""
R101_CAFFE: Any = partial(resnet_fpn, depth=101, style="caffe")
"""`R101` with the stride in the first 1x1 convolution of a bottleneck."""
X101_32X4D: Any = partial(resnet_fpn, depth=101, groups=32, width_per_group=4)
"""ResNeXt-101-FPN (32 groups of width 4) with levels P2 to P6."""
X101_64X4D: Any = partial(resnet_fpn, depth=101, groups=64, width_per_group=4)
"""ResNeXt-101-FPN (64 groups of width 4) with levels P2 to P6."""
SMALL_BACKBONE: Any = partial(resnet_fpn, depth=18, norm="gn", frozen_stages=0, channels=64, fpn_norm="gn")
"""ResNet-18-FPN with 64 channels, trained from random weights with nothing frozen.

It uses group norm, because batches are small and there are no pretrained statistics to freeze.
"""

SMALL_RPN = RPNConfig(
    border=None,
    num_sampled=128,
    pre_nms_per_level=500,
    num_proposals=300,
    test_pre_nms_per_level=500,
    test_num_proposals=300,
)
"""Fewer samples and proposals than the default.

Anchors that cross the image border are trained too, because most large anchors cross the border of a small image.
"""
SMALL_MASK = MaskConfig(width=64, num_convs=2)
"""Mask head with the 64 channels of the small pyramid and two convolutions instead of four."""


def small(model: Model) -> Experiment:
    """20 epochs from random weights at a short side of 240 pixels, for a few hundred images and two CPU cores."""
    return Experiment(
        model=model,
        resize=Resize(short=240, long=400),
        scale_jitter=(0.8, 1.25),
        optimizer=AdamW(lr=2e-3),
        schedule=CosineSchedule(warmup_steps=50, warmup_factor=0.1),
        epochs=20,
        images_per_device=4,
        ema_decay=0.99,
        evaluate_every=5,
    )
