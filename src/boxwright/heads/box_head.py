"""Box head of a two-stage detector: classifies each proposal and refines its box.

B images, P proposals, S sampled proposals, C classes, K boxes per proposal (C, or 1 if class-agnostic), G object slots,
D detections.

Source: Girshick, Fast R-CNN (2015); on a pyramid: Lin et al., Feature Pyramid Networks (2017), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.assign.match import POSITIVE
from boxwright.assign.sample import hardest, sample
from boxwright.checks import check_choice, check_counts, check_numbers
from boxwright.geometry import boxes as box_geometry
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_loss import BoxLoss, box_regression_loss, check_box_loss
from boxwright.heads.box_sample import Candidates, SampledBoxes, candidates, gather_sampled
from boxwright.heads.class_rows import ClassRows
from boxwright.heads.grid_convs import GridNorm, grid_convs, init_relu_convs
from boxwright.heads.slots import used_slots
from boxwright.heads.suppression import Suppression
from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.packed_linear import linear_on_grid
from boxwright.losses import at_least_float32, cross_entropy, weighted_mean
from boxwright.ops.roi_align import multilevel_roi_align
from boxwright.precision import without_gradients
from boxwright.structures import Detections, Proposals, Targets, take_slots

SAMPLING_SALT = 2  # See `rpn_head.SAMPLING_SALT`.


@dataclass(frozen=True, kw_only=True)
class BoxConfig:
    """Hyperparameters of a box head; the defaults follow mmdetection 0.5 (2018)."""

    num_convs: int = 0
    """Number of 3x3 convolutions before the fully connected layers."""
    conv_width: int = 256
    """Number of channels of each convolution."""
    norm: GridNorm | None = None
    """Normalisation layer after each convolution; None for no normalisation."""
    num_fcs: int = 2
    """Number of hidden fully connected layers, at least 1."""
    width: int = 1024
    """Number of units of each hidden fully connected layer."""
    output_size: int = 7
    """RoIAlign output size: 7 gives 7x7 features per RoI."""
    sampling_ratio: int = 2
    """RoIAlign sampling ratio: number of sampling points per side of each cell; 0 adapts it to the size of the RoI."""
    num_levels: int = 4
    """Number of pyramid levels that RoIs are pooled from, starting with the finest: 4 for P2 to P5."""
    positive_iou: float = 0.5
    """IoU threshold for positives: a proposal with at least this IoU with an object is positive, any other negative."""
    num_sampled: int = 512
    """Number of proposals per image that are sampled for the losses."""
    positive_fraction: float = 0.25
    """Maximum fraction of positives among the sampled proposals."""
    box_loss: BoxLoss = "smooth_l1"
    """Box regression loss: "smooth_l1" on box deltas, or "giou", "diou", "ciou" or a function on decoded boxes."""
    smooth_l1_beta: float = 1.0
    """Smooth L1 beta: the absolute error at which the loss changes from quadratic to linear."""
    class_loss_weight: float = 1.0
    """Weight of the classification loss."""
    box_loss_weight: float = 1.0
    """Weight of the box loss. IoU losses are smaller than smooth L1 and usually get a higher weight, such as 10."""
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Standard deviations (x, y, width, height) by which box deltas are divided, so that the box loss is about as large
    as the classification loss."""
    class_agnostic: bool = False
    """Whether the head predicts one refined box per proposal, shared by all classes, instead of one box per class."""
    hard_examples: bool = False
    """Online hard example mining (OHEM): sample the positives and negatives with the highest classification loss
    instead of random ones. Costs one extra forward pass of the head over all proposals."""
    score_threshold: float = 0.05
    """Score threshold: detections with a score of at most this are discarded."""
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    """NMS method: "hard" removes overlapping detections of a class; "linear" and "gaussian" Soft-NMS lower scores."""
    nms_iou: float = 0.5
    """NMS IoU threshold, applied within each class. With "gaussian" any overlap lowers the score."""
    nms_sigma: float = 0.5
    """Gaussian Soft-NMS sigma: the larger, the less overlapping detections lose of their scores."""
    max_detections: int = 100
    """Maximum number of detections per image."""
    min_size: float = 1e-2
    """Minimum side of a detection, in pixels of the canvas; smaller detections are discarded."""

    def __post_init__(self) -> None:
        check_counts(
            self, "conv_width", "num_fcs", "width", "output_size", "num_levels", "num_sampled", "max_detections"
        )
        check_counts(self, "num_convs", "sampling_ratio", least=0)
        check_numbers(self, "positive_iou", "positive_fraction", "score_threshold", "nms_iou", least=0, most=1)
        check_numbers(self, "stds", "nms_sigma", least=0, above=True)
        check_numbers(self, "smooth_l1_beta", "min_size", least=0)
        check_choice("nms", self.nms, ("hard", "linear", "gaussian"))
        check_choice("norm", self.norm, (None, *get_args(GridNorm)))
        check_box_loss(self.box_loss)
        check_numbers(self, "class_loss_weight", "box_loss_weight", least=0)

    @property
    def max_positives(self) -> int:
        """Number of leading sampled slots that may hold positives."""
        return int(self.num_sampled * self.positive_fraction)


class BoxHead(nn.Module):
    """Fully connected layers on RoI features that predict class logits and box deltas, per class or class-agnostic.

    Convolutions may precede them, as in Wu & He, Group Normalization (2018): four convolutions and one hidden layer.
    """

    class_rows = MappingProxyType({"class_logits": ClassRows(background=1), "box_deltas": ClassRows(values=4)})
    output_stds = MappingProxyType({"class_logits": 1.1, "box_deltas": 0.55})
    grid_linears = ("fc1",)
    """Linear layers on flattened RoI features, which `optimize_for_cpu` packs."""

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        config: BoxConfig = BoxConfig(),
        conventions: Conventions = MODERN,
    ) -> None:
        """Build the head.

        Args:
            channels: number of channels of every feature level.
            strides: stride of each level in pixels of the canvas, finest first.
            num_classes: C. Background is the last class of the logits, with index C.
            config: hyperparameters of the head.
            conventions: box geometry that the weights were (or will be) trained with.
        """
        super().__init__()
        self.config = config
        self.strides = tuple(strides)[: config.num_levels]
        self.num_classes = num_classes
        self.conventions = conventions
        self.convs = grid_convs(channels, config.conv_width, config.num_convs, config.norm)
        inputs = (config.conv_width if config.num_convs else channels) * config.output_size**2
        for number in range(1, config.num_fcs + 1):
            self.add_module(f"fc{number}", nn.Linear(inputs, config.width))
            inputs = config.width
        self.class_logits = nn.Linear(inputs, num_classes + 1)
        self.num_boxes = 1 if config.class_agnostic else num_classes
        self.box_deltas = nn.Linear(inputs, self.num_boxes * 4)
        init_relu_convs(self)
        for layer in self._fcs:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        for layer in (*self._fcs, self.class_logits, self.box_deltas):
            nn.init.zeros_(layer.bias)

    @property
    def _fcs(self) -> list[nn.Linear]:
        return [cast(nn.Linear, self.get_submodule(f"fc{number + 1}")) for number in range(self.config.num_fcs)]

    def forward(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Classify and refine boxes.

        Args:
            features: L of [B, channels, H_l, W_l], finest first; the first `num_levels` are used.
            boxes: [B, P, 4] xyxy in pixels of the canvas.
            valid: [B, P] bool; outputs for invalid slots are meaningless.

        Returns:
            logits: [B, P, C + 1] float32, background last.
            deltas: [B, P, K, 4] float32, relative to `boxes`, in units of `stds`.
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
        grid = grid.flatten(0, 1)
        for conv in self.convs:
            grid = conv_norm(conv, None, grid, relu=True)
        if self.convs and torch.compiler.is_compiling():
            # The compiler assumes that GroupNorm changes the memory format, although it keeps it; flattening is then
            # wrong.
            grid = grid.clone(memory_format=torch.contiguous_format)
        first, *others = self._fcs
        hidden = linear_on_grid(first, grid).relu().unflatten(0, boxes.shape[:2])
        for layer in others:
            hidden = layer(hidden).relu()
        logits, deltas = at_least_float32(self.class_logits(hidden)), at_least_float32(self.box_deltas(hidden))
        return logits, deltas.unflatten(-1, (self.num_boxes, 4))

    def sample(
        self,
        proposals: Proposals,
        targets: Targets,
        seeds: Tensor,
        features: Sequence[Tensor] | None = None,
        stage: int = 0,
    ) -> SampledBoxes:
        """Sample the boxes that the losses are computed on, from the proposals and the ground-truth boxes.

        Args:
            proposals: P slots per image.
            targets: ground truth.
            seeds: [B] int64 random seeds of the batch.
            features: L of [B, channels, H_l, W_l], finest first; required only with `hard_examples`.
            stage: index of the cascade stage; each stage draws an independent sample.
        """
        config = self.config
        pool = candidates(proposals, targets, positive_iou=config.positive_iou, plus_one=self.conventions.plus_one)
        if config.hard_examples:
            assert features is not None, "hard_examples needs features"
            sampled = hardest(
                pool.matches.labels,
                self._class_losses(features, pool, targets),
                pool.sources,
                num=config.num_sampled,
                positive_fraction=config.positive_fraction,
            )
        else:
            sampled = sample(
                pool.matches.labels,
                seeds,
                num=config.num_sampled,
                positive_fraction=config.positive_fraction,
                salt=SAMPLING_SALT + stage,
                identities=pool.sources,
            )
        return gather_sampled(pool, sampled)

    def _class_losses(self, features: Sequence[Tensor], pool: Candidates, targets: Targets) -> Tensor:
        """[B, P + G] current classification loss of every candidate, without gradients."""
        with without_gradients():
            logits, _ = self(features, pool.boxes, pool.valid)
        objects = take_slots(targets.labels, pool.matches.matched)
        labels = torch.where(pool.matches.labels == POSITIVE, objects, self.num_classes)
        return cross_entropy(logits, labels, pool.valid)

    def losses(self, features: Sequence[Tensor], sampled: SampledBoxes, targets: Targets) -> dict[str, Tensor]:
        """Cross-entropy of the classes and box regression loss, both averaged over the sampled boxes.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            sampled: from `sample`; no gradient flows into the boxes.
            targets: ground truth of the batch.

        Returns:
            Scalars `box_class` and `box_regression`. Without objects, all boxes are background and `box_regression`
            is 0.
        """
        logits, deltas = self(features, sampled.boxes, sampled.valid)
        return self.losses_of(logits, deltas, sampled, targets)

    def losses_of(self, logits: Tensor, deltas: Tensor, sampled: SampledBoxes, targets: Targets) -> dict[str, Tensor]:
        """Losses from the head's outputs for the sampled boxes: logits [B, S, C + 1], deltas [B, S, K, 4]."""
        config = self.config
        boxes, matched, positive, valid, _ = sampled
        labels = torch.where(positive, take_slots(targets.labels, matched), self.num_classes)
        class_loss = cross_entropy(logits, labels, valid)
        class_index = labels.clamp(max=self.num_boxes - 1)[..., None, None].expand(*labels.shape, 1, 4)
        box_loss = box_regression_loss(
            config.box_loss,
            deltas.gather(2, class_index).squeeze(2),
            boxes,
            take_slots(targets.boxes, matched),
            positive,
            stds=config.stds,
            smooth_l1_beta=config.smooth_l1_beta,
            plus_one=self.conventions.plus_one,
        )
        return {
            "box_class": config.class_loss_weight * weighted_mean(class_loss, valid),
            "box_regression": config.box_loss_weight * weighted_mean(box_loss, valid),
        }

    def refine(self, boxes: Tensor, deltas: Tensor, image_sizes: Tensor) -> Tensor:
        """Apply the predicted box deltas and clip the boxes to their images.

        Args:
            boxes: [B, P, 4] xyxy in pixels of the canvas.
            deltas: [B, P, K, 4] from `forward`.
            image_sizes: [B, 2] (height, width).

        Returns:
            [B, P, K, 4] xyxy in pixels of the canvas.
        """
        plus_one = self.conventions.plus_one
        refined = box_geometry.decode(deltas, boxes[:, :, None], self.config.stds, plus_one=plus_one)
        return box_geometry.clip(refined, image_sizes, plus_one=plus_one)

    def detect(self, features: Sequence[Tensor], proposals: Proposals, image_sizes: Tensor) -> Detections:
        """Classify every proposal, then apply NMS within each class.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            proposals: P slots per image.
            image_sizes: [B, 2] (height, width), to which boxes are clipped.

        Returns:
            Detections in D = min(`max_detections`, P * C) slots.
        """
        boxes = torch.where(proposals.valid[..., None], proposals.boxes, 0.0)
        num_slots = used_slots(proposals.valid)
        logits, deltas = self(features, boxes[:, :num_slots], proposals.valid[:, :num_slots])
        num_unused = boxes.shape[1] - num_slots
        logits, deltas = F.pad(logits, (0, 0, 0, num_unused)), F.pad(deltas, (0, 0, 0, 0, 0, num_unused))
        return self.best_detections(logits.softmax(-1), self.refine(boxes, deltas, image_sizes), proposals.valid)

    def best_detections(self, probabilities: Tensor, boxes: Tensor, valid: Tensor) -> Detections:
        """Select the detections from class probabilities and refined boxes.

        Args:
            probabilities: [B, P, C + 1] class probabilities, background last.
            boxes: [B, P, K, 4] from `refine`.
            valid: [B, P] bool.
        """
        scores = probabilities[..., :-1].flatten(1)
        boxes = boxes.expand(-1, -1, self.num_classes, -1).flatten(1, 2)
        sides = boxes[..., 2:] - boxes[..., :2] + self.conventions.plus_one
        labels = torch.arange(self.num_classes, device=scores.device).repeat(valid.shape[1]).expand_as(scores)
        candidates = valid.repeat_interleave(self.num_classes, 1) & (sides >= self.config.min_size).all(-1)
        return self.suppression(boxes, scores, labels, candidates)

    @property
    def suppression(self) -> Suppression:
        """Score threshold and NMS that turn scored boxes into detections."""
        config = self.config
        return Suppression(
            score_threshold=config.score_threshold,
            iou_threshold=config.nms_iou,
            max_detections=config.max_detections,
            method=config.nms,
            sigma=config.nms_sigma,
            plus_one=self.conventions.plus_one,
        )
