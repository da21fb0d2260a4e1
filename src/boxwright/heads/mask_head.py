"""Mask head: predicts the mask of each object on a grid over the object's box.

B images, P boxes (sampled positives, or detections), C classes, G object slots, S cells per side of a mask.

Source: He et al., Mask R-CNN (2017), section 3 and the right half of figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.checks import check_choice, check_counts, check_numbers
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_sample import SampledBoxes
from boxwright.heads.class_rows import ClassRows
from boxwright.heads.grid_convs import GridNorm, grid_convs, init_relu_convs
from boxwright.heads.slots import used_slots
from boxwright.layers.conv_norm import CONVS, conv_norm, keeps_map_size
from boxwright.layers.stock import is_stock
from boxwright.losses import at_least_float32, binary_cross_entropy, weighted_mean
from boxwright.ops.mask_target import mask_target
from boxwright.ops.roi_align import multilevel_roi_align
from boxwright.structures import Detections, Targets, take_slots


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Hyperparameters of a mask head; the defaults follow mmdetection 0.5 (2018)."""

    width: int = 256
    """Number of channels of every layer."""
    num_convs: int = 4
    """Number of 3x3 convolutions before the upsampling layer."""
    norm: GridNorm | None = None
    """Normalisation layer after each convolution; None for no normalisation."""
    output_size: int = 14
    """RoIAlign output size: side of the grid of features per RoI, in cells. Masks have twice as many cells per side."""
    sampling_ratio: int = 2
    """RoIAlign sampling ratio: number of sampling points per side of each cell; 0 adapts it to the size of the RoI."""
    num_levels: int = 4
    """Number of pyramid levels that RoIs are pooled from, starting with the finest: 4 for P2 to P5."""
    mask_loss_weight: float = 1.0
    """Weight of the mask loss."""

    def __post_init__(self) -> None:
        check_counts(self, "width", "output_size", "num_levels")
        check_counts(self, "num_convs", "sampling_ratio", least=0)
        check_numbers(self, "mask_loss_weight", least=0)
        check_choice("norm", self.norm, (None, *get_args(GridNorm)))


class MaskHead(nn.Module):
    """Convolutions on RoI features, a transposed convolution that doubles their size, and one mask logit per class."""

    class_rows = MappingProxyType({"mask_logits": ClassRows()})

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        config: MaskConfig = MaskConfig(),
        conventions: Conventions = MODERN,
    ) -> None:
        """Build the head.

        Args:
            channels: number of channels of every feature level.
            strides: stride of each level in pixels of the canvas, finest first.
            num_classes: C, without background.
            config: hyperparameters of the head.
            conventions: box geometry that the weights were (or will be) trained with.
        """
        super().__init__()
        self.config = config
        self.strides = tuple(strides)[: config.num_levels]
        self.conventions = conventions
        self.convs = grid_convs(channels, config.width, config.num_convs, config.norm)
        self.upsample = nn.ConvTranspose2d(config.width if self.convs else channels, config.width, 2, stride=2)
        self.mask_logits = nn.Conv2d(config.width, num_classes, 1)
        init_relu_convs(self)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Predict the mask of each box for the class in `labels`.

        Args:
            features: L of [B, channels, H_l, W_l], finest first; the first `num_levels` are used.
            boxes: [B, P, 4] xyxy in pixels of the canvas.
            labels: [B, P] int64, class of each box, 0 <= label < C.
            valid: [B, P] bool; outputs for invalid slots are meaningless.

        Returns:
            [B, P, S, S] float32 logits.
        """
        grid = multilevel_roi_align(
            list(features[: len(self.strides)]),
            boxes,
            valid,
            strides=self.strides,
            output_size=self.config.output_size,
            sampling_ratio=self.config.sampling_ratio,
            aligned=self.conventions.roi_align_aligned,
            plus_one=self.conventions.plus_one,
            pool_plus_one=self.conventions.roi_align_plus_one,
            level_epsilon=self.conventions.level_epsilon,
        )
        hidden = grid.flatten(0, 1)
        for conv in self.convs:
            hidden = conv_norm(conv, None, hidden, relu=True)
        hidden = conv_norm(self.upsample, None, hidden, relu=True)
        if not self._last_layer_is_stock:
            all_logits = self.mask_logits(hidden)
            one_class = labels.view(-1, 1, 1, 1).expand(-1, 1, *all_logits.shape[-2:])
            return at_least_float32(all_logits.gather(1, one_class)).view(*labels.shape, *all_logits.shape[-2:])
        # Select the rows of the last layer by class before applying it: one mask per box instead of C.
        weight = F.embedding(labels.flatten(), self.mask_logits.weight.flatten(1))
        assert self.mask_logits.bias is not None
        bias = self.mask_logits.bias[labels]
        logits = at_least_float32(torch.bmm(weight[:, None].to(hidden.dtype), hidden.flatten(2)))
        return logits.view(*labels.shape, *hidden.shape[-2:]) + bias[..., None, None]

    @property
    def _last_layer_is_stock(self) -> bool:
        """Whether the last layer is an unmodified 1x1 convolution with a bias and without hooks."""
        layer = self.mask_logits
        return is_stock(layer, *CONVS) and keeps_map_size(layer, kernel=1) and layer.bias is not None

    def losses(
        self, features: Sequence[Tensor], sampled: SampledBoxes, targets: Targets, *, max_positives: int
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of the masks of the positives, each for the class of its matched object.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            sampled: from `BoxHead.sample`; no gradient flows into the boxes.
            targets: ground truth of the batch, with masks.
            max_positives: number of leading slots of `sampled` that may hold positives.

        Returns:
            Scalar `mask`: the mean over all cells of the positives whose object has a mask; 0 if there are none.
        """
        assert targets.masks is not None, "a mask head needs masks in its targets"
        num_slots = used_slots(sampled.positive[:, :max_positives])
        boxes, matched, positive = (field[:, :num_slots] for field in sampled[:3])
        positive = positive & take_slots(targets.masks.valid, matched)
        labels = torch.where(positive, take_slots(targets.labels, matched), 0)
        logits = self(features, boxes, labels, positive)
        mask_targets = mask_target(
            targets.masks,
            boxes,
            matched,
            positive,
            output_size=logits.shape[-1],
            plus_one=self.conventions.plus_one,
        )
        loss = binary_cross_entropy(logits, mask_targets, positive[..., None, None]).mean((2, 3))
        return {"mask": self.config.mask_loss_weight * weighted_mean(loss, positive)}

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """Add to each detection the mask for its class; masks are 0 in invalid slots.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            detections: D slots per image.
        """
        valid = detections.valid
        num_slots = used_slots(valid)
        logits = self(features, detections.boxes[:, :num_slots], detections.labels[:, :num_slots], valid[:, :num_slots])
        unused = (0, 0, 0, 0, 0, valid.shape[1] - num_slots)
        masks = F.pad(logits.sigmoid(), unused)
        return replace(detections, masks=torch.where(valid[..., None, None], masks, 0.0))
