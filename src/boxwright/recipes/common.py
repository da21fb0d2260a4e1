"""What recipes share: how long to train, and the small sizes.

1x and 2x are the 2018 toolbox's: 12 and 24 epochs of COCO in batches of 16, as 8 GPUs x 2 pictures or whatever comes to
that; for another batch the learning rate is scaled. Their ResNets are meant to start from ImageNet weights (`--init`),
since the stem, the first stage and all statistics stay as they are.
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
    """Twelve epochs, the learning rate falling after 8 and 11."""
    return Experiment(model=model)


def two_x(model: Model) -> Experiment:
    """Twenty-four epochs, the learning rate falling after 16 and 22."""
    return Experiment(model=model, schedule=StepSchedule(epochs=(16, 22)), epochs=24)


# Typed Any, because to a type checker a call that makes a backbone is none.
R50: Any = partial(resnet_fpn, depth=50)
"""ResNet-50 and P2 to P6, the bottleneck's stride in its 3x3 convolution."""
R50_CAFFE: Any = partial(resnet_fpn, depth=50, style="caffe")
"""The same with the stride in the first 1x1 convolution."""
R101: Any = partial(resnet_fpn, depth=101)
"""ResNet-101 and P2 to P6."""
R101_CAFFE: Any = partial(resnet_fpn, depth=101, style="caffe")
"""The same with the stride in the first 1x1 convolution."""
X101_32X4D: Any = partial(resnet_fpn, depth=101, groups=32, width_per_group=4)
"""ResNeXt-101 of 32 groups, 4 wide, and P2 to P6."""
X101_64X4D: Any = partial(resnet_fpn, depth=101, groups=64, width_per_group=4)
"""ResNeXt-101 of 64 groups, 4 wide, and P2 to P6."""
SMALL_BACKBONE: Any = partial(resnet_fpn, depth=18, norm="gn", frozen_stages=0, channels=64, fpn_norm="gn")
"""Trains whole, from random weights; group norm, because batches are small and there are no statistics to freeze."""

SMALL_RPN = RPNConfig(
    border=None,
    num_sampled=128,
    pre_nms_per_level=500,
    num_proposals=300,
    test_pre_nms_per_level=500,
    test_num_proposals=300,
)
"""Fewer of everything; and anchors over the border train too, as most large ones in a small picture are."""
SMALL_MASK = MaskConfig(width=64, num_convs=2)
"""As wide as the small pyramid, and half as deep."""


def small(model: Model) -> Experiment:
    """Twenty epochs at a short side of 240 from random weights, for a few hundred pictures and two CPU cores."""
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
