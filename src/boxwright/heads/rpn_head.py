"""Region proposal network (RPN) head: scores every anchor for containing an object of any class, and refines its box.

Shapes: B images, L levels, A anchors per position, N anchors of all levels, S sampled anchors, G object slots (padded
ground truth), P proposals.

Terms: objectness is the logit that an anchor contains an object; deltas (dx, dy, dw, dh) move an anchor to a box.

Source: Ren et al., Faster R-CNN (2015), section 3; on a pyramid: Lin et al., Feature Pyramid Networks (2017),
section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from boxwright.assign.match import match
from boxwright.assign.sample import sample
from boxwright.checks import check_counts, check_numbers
from boxwright.geometry import boxes as box_geometry
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.anchor_grid import DELTA_STDS, AnchorGrid, by_anchor
from boxwright.heads.box_loss import BoxLoss, box_regression_loss, check_box_loss
from boxwright.layers.conv_norm import CONVS, conv_norm, keeps_map_size
from boxwright.layers.stock import is_stock, is_unhooked
from boxwright.losses import at_least_float32, binary_cross_entropy, weighted_mean
from boxwright.ops.nms import nms
from boxwright.ops.patches import convolve_patches, gather_patches
from boxwright.precision import without_gradients
from boxwright.structures import Batch, Proposals, Targets, take_slots

SAMPLING_SALT = 1
"""Makes the random numbers of this head differ from other heads', which use the same seeds of images."""


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """Hyperparameters of a region proposal network; the defaults follow mmdetection 0.5 (2018)."""

    num_convs: int = 1
    """Number of 3x3 convolutions before the two 1x1 output convolutions, at least 1."""
    anchor_scale: float = 8.0
    """Side of the anchors of a level, in multiples of the stride of the level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor aspect ratios (height / width) at each position."""
    positive_iou: float = 0.7
    """IoU threshold for positives: an anchor with at least this IoU with an object is positive."""
    negative_iou: float = 0.3
    """IoU threshold for negatives: an anchor with less than this IoU with every object is negative. Anchors between the
    two thresholds are ignored."""
    low_quality: float | None = 0.3
    """Low-quality matches: the best anchors of each object are also positive if their IoU is at least this. None
    disables low-quality matches."""
    border: float | None = 0.0
    """Anchors that extend beyond the image by more than this many pixels are ignored in training; None keeps all."""
    num_sampled: int = 256
    """Number of anchors per image that are sampled for the losses."""
    positive_fraction: float = 0.5
    """Maximum fraction of positives among the sampled anchors."""
    box_loss: BoxLoss = "smooth_l1"
    """Box regression loss: "smooth_l1" on box deltas, or "giou", "diou", "ciou" or a function on decoded boxes."""
    smooth_l1_beta: float = 1 / 9
    """Smooth L1 beta: the absolute error at which the loss changes from quadratic to linear."""
    objectness_loss_weight: float = 1.0
    """Weight of the objectness loss."""
    box_loss_weight: float = 1.0
    """Weight of the box loss. IoU losses are smaller than smooth L1 and usually get a higher weight."""
    pre_nms_per_level: int = 2000
    """Number of highest-scoring anchors per level that are passed to NMS in training."""
    num_proposals: int = 2000
    """Maximum number of proposals per image after NMS in training."""
    test_pre_nms_per_level: int = 2000
    """Number of highest-scoring anchors per level that are passed to NMS at test time."""
    test_num_proposals: int = 2000
    """Maximum number of proposals per image after NMS at test time."""
    nms_iou: float = 0.7
    """NMS IoU threshold, applied within each pyramid level."""
    min_size: float = 1e-3
    """Minimum side of a proposal, in pixels; smaller proposals are discarded."""

    def __post_init__(self) -> None:
        check_counts(self, "num_convs", "num_sampled", "pre_nms_per_level", "num_proposals")
        check_counts(self, "test_pre_nms_per_level", "test_num_proposals")
        check_numbers(
            self, "positive_iou", "negative_iou", "low_quality", "positive_fraction", "nms_iou", least=0, most=1
        )
        check_numbers(self, "anchor_scale", "ratios", least=0, above=True)
        check_numbers(self, "border", "smooth_l1_beta", "min_size", least=0)
        check_box_loss(self.box_loss)
        check_numbers(self, "objectness_loss_weight", "box_loss_weight", least=0)


class RPNOutput(NamedTuple):
    """Output of the head for every anchor; the levels are concatenated, finest first."""

    objectness: Tensor
    """[B, N] float32 logits."""
    deltas: Tensor
    """[B, N, 4] float32 box deltas relative to the anchors."""
    anchors: Tensor
    """[N, 4] float32, xyxy in pixels of the canvas."""
    level_lengths: tuple[int, ...]
    """Number of anchors of each of the L levels; they sum to N."""


class RPNHead(nn.Module):
    """One or more 3x3 convolutions and two 1x1 ones, shared by all levels, with their losses and proposals."""

    output_stds = MappingProxyType({"objectness": 1.0, "deltas": 0.1})

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        config: RPNConfig = RPNConfig(),
        conventions: Conventions = MODERN,
    ) -> None:
        """Build the head.

        Args:
            channels: number of channels of every feature level.
            strides: stride of each level in pixels of the canvas, finest first.
            config: hyperparameters of the head.
            conventions: box geometry that the weights were (or will be) trained with.
        """
        super().__init__()
        self.config = config
        self.conventions = conventions
        num_anchors = len(config.ratios)
        sizes = [[config.anchor_scale * stride] for stride in strides]
        self.anchors = AnchorGrid(strides, sizes, config.ratios, conventions)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.more_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_convs - 1)
        )
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in (*self._convs, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    @property
    def _convs(self) -> list[nn.Conv2d]:
        return [self.conv, *cast(Iterable[nn.Conv2d], self.more_convs)]

    def forward(self, features: Sequence[Tensor], canvas: tuple[int, int]) -> RPNOutput:
        """Score and refine every anchor.

        Args:
            features: L of [B, C, H_l, W_l], finest first.
            canvas: (height, width) of the canvas that the features were computed from, in pixels.
        """
        objectness, deltas = [], []
        for feature in features:
            hidden = feature
            for conv in self._convs:
                hidden = conv_norm(conv, None, hidden, relu=True)
            objectness.append(at_least_float32(by_anchor(self.objectness(hidden), 1).squeeze(2)))
            deltas.append(at_least_float32(by_anchor(self.deltas(hidden), 4)))
        anchors = self.anchors(features, canvas)
        return RPNOutput(
            objectness=torch.cat(objectness, 1),
            deltas=torch.cat(deltas, 1),
            anchors=torch.cat(anchors),
            level_lengths=tuple(len(level) for level in anchors),
        )

    def losses(
        self, features: Sequence[Tensor], canvas: tuple[int, int], batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of objectness and box regression loss, both averaged over the sampled anchors.

        The losses use a few hundred of about a hundred thousand anchors, and the sample does not depend on the head's
        output. The head, and its gradient, is therefore computed at the sampled anchors only; the gradient of all
        other anchors is 0.

        Args:
            features: L of [B, C, H_l, W_l], finest first.
            canvas: (height, width) of the canvas that the features were computed from, in pixels.
            batch: provides image sizes and seeds.
            targets: ground truth of the batch; its classes are not used.

        Returns:
            Scalars `rpn_objectness` and `rpn_box`. Without objects, all anchors are negative and `rpn_box` is 0.
        """
        config, plus_one = self.config, self.conventions.plus_one
        all_anchors = torch.cat(self.anchors(features, canvas))
        matches = match(
            all_anchors,
            targets,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            low_quality=config.low_quality,
            candidates_valid=self._inside(all_anchors, batch.image_sizes),
            plus_one=plus_one,
        )
        sampled = sample(
            matches.labels,
            batch.seeds,
            num=config.num_sampled,
            positive_fraction=config.positive_fraction,
            salt=SAMPLING_SALT,
        )
        objectness, deltas = self.at_anchors(features, canvas, sampled.indices)
        anchors = all_anchors[sampled.indices]
        matched = take_slots(targets.boxes, take_slots(matches.matched, sampled.indices))
        box_loss = box_regression_loss(
            config.box_loss,
            deltas,
            anchors,
            matched,
            sampled.positive,
            stds=DELTA_STDS,
            smooth_l1_beta=config.smooth_l1_beta,
            plus_one=plus_one,
        )
        objectness_loss = binary_cross_entropy(objectness, sampled.positive, sampled.valid)
        return {
            "rpn_objectness": config.objectness_loss_weight * weighted_mean(objectness_loss, sampled.valid),
            "rpn_box": config.box_loss_weight * weighted_mean(box_loss, sampled.valid),
        }

    def at_anchors(self, features: Sequence[Tensor], canvas: tuple[int, int], indices: Tensor) -> tuple[Tensor, Tensor]:
        """The output of `forward` for selected anchors.

        The stock head with stock layers is computed at the positions of these anchors only. Otherwise (a subclass with
        its own `forward`, replaced layers, hooks) the whole head is applied and its output is gathered.

        Args:
            features: L of [B, C, H_l, W_l], finest first.
            canvas: (height, width) of the canvas that the features were computed from, in pixels.
            indices: [B, S] int64 indices into the N anchors.

        Returns:
            objectness: [B, S] float32 logits.
            deltas: [B, S, 4] float32.
        """
        if self._is_stock:
            return self._at_positions(features, indices)
        output = self(features, canvas)
        return output.objectness.gather(1, indices), take_slots(output.deltas, indices)

    @property
    def _is_stock(self) -> bool:
        """Whether `_at_positions` equals `forward`: no replaced `forward`, no replaced layer, no hooks."""
        return (
            type(self).forward is RPNHead.forward
            and is_unhooked(self)
            and all(is_stock(conv, *CONVS) and keeps_map_size(conv, kernel=3) for conv in self._convs)
            and all(
                is_stock(conv, *CONVS) and keeps_map_size(conv, kernel=1) for conv in (self.objectness, self.deltas)
            )
        )

    def _at_positions(self, features: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """`at_anchors`, computed from the neighbourhoods of the anchors' positions that the 3x3 convolutions read."""
        num_anchors = len(self.config.ratios)
        level, offset, start = torch.zeros_like(indices), indices, 0
        for feature in features[:-1]:
            start += feature.shape[-2] * feature.shape[-1] * num_anchors
            level = level + (indices >= start)
            offset = torch.where(indices >= start, indices - start, offset)
        hidden, inside = gather_patches(
            features, level, torch.div(offset, num_anchors, rounding_mode="floor"), radius=len(self._convs)
        )
        hidden, inside = hidden.flatten(0, 1), inside.flatten(0, 1)[:, None]
        for conv in self._convs:
            # Outside the map, the next convolution must read its zero padding, not the output of this convolution.
            inside = inside[..., 1:-1, 1:-1]
            hidden = torch.where(inside, convolve_patches(hidden, conv.weight, conv.bias).relu(), 0.0)
        anchor_index = (offset % num_anchors)[..., None, None]
        objectness = self.objectness(hidden).view(*indices.shape, num_anchors, 1)
        deltas = self.deltas(hidden).view(*indices.shape, num_anchors, 4)
        return (
            at_least_float32(objectness.gather(2, anchor_index).flatten(1)),
            at_least_float32(deltas.gather(2, anchor_index.expand(*indices.shape, 1, 4)).squeeze(2)),
        )

    def _inside(self, anchors: Tensor, image_sizes: Tensor) -> Tensor | None:
        """[B, N] bool, anchors that extend at most `border` pixels beyond their image; None if `border` is None."""
        border = self.config.border
        if border is None:
            return None
        height, width = image_sizes.to(anchors.dtype)[:, :, None].unbind(1)
        x1, y1, x2, y2 = anchors.unbind(-1)
        return (x1 >= -border) & (y1 >= -border) & (x2 <= width + border) & (y2 <= height + border)

    def propose(
        self, features: Sequence[Tensor], canvas: tuple[int, int], image_sizes: Tensor, *, training: bool
    ) -> Proposals:
        """Apply the head without gradients, and select `proposals` from its output. Only `losses` trains the head."""
        with without_gradients():
            return self.proposals(self(features, canvas), image_sizes, training=training)

    @torch.no_grad()
    def proposals(self, output: RPNOutput, image_sizes: Tensor, *, training: bool) -> Proposals:
        """Select the best boxes of each level and apply NMS within each level.

        Args:
            output: output of the head.
            image_sizes: [B, 2] (height, width), to which boxes are clipped (see `Conventions`).
            training: whether to use the hyperparameters for training instead of those for testing.

        Returns:
            Proposals in P slots; P is the configured number of proposals, or the number of candidates if that is lower.
        """
        config, plus_one = self.config, self.conventions.plus_one
        per_level = config.pre_nms_per_level if training else config.test_pre_nms_per_level
        objectness = torch.where(output.objectness.isfinite(), output.objectness, -torch.inf)
        indices, levels, start = [], [], 0
        for level, length in enumerate(output.level_lengths):
            best = objectness[:, start : start + length].topk(min(per_level, length)).indices
            indices.append(best + start)
            levels.append(torch.full_like(best, level))
            start += length
        candidates = torch.cat(indices, 1)
        boxes = box_geometry.decode(
            take_slots(output.deltas, candidates), output.anchors[candidates], DELTA_STDS, plus_one=plus_one
        )
        multiple = 1 if training else self.conventions.proposal_clip_multiple
        boxes = box_geometry.clip(boxes, (image_sizes + multiple - 1) // multiple * multiple, plus_one=plus_one)
        logits = take_slots(objectness, candidates)
        scores = logits.sigmoid()
        sides = boxes[..., 2:] - boxes[..., :2] + plus_one
        num_proposals = config.num_proposals if training else config.test_num_proposals
        kept, valid = nms(
            boxes,
            scores,
            torch.cat(levels, 1),
            logits.isfinite() & (sides >= config.min_size).all(-1),
            iou_threshold=config.nms_iou,
            max_keep=min(num_proposals, candidates.shape[1]),
            plus_one=plus_one,
        )
        return Proposals(
            boxes=take_slots(boxes, kept),
            scores=take_slots(scores, kept),
            valid=valid,
            sources=take_slots(candidates, kept),
        )
