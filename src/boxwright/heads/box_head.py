"""The second stage: the class of each proposal, and its box once more.

B images, P proposals, S sampled proposals, C classes, K boxes a proposal (C, or 1 where they are class-agnostic),
G object slots, D detections.

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
from boxwright.heads.box_sample import Candidates, SampledBoxes, candidates, taken
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

SAMPLING_SALT = 2


@dataclass(frozen=True, kw_only=True)
class BoxConfig:
    """The numbers of a box head; the defaults are the 2018 toolbox's."""

    num_convs: int = 0
    """3x3 convolutions before the fully connected layers."""
    conv_width: int = 256
    """Channels of each of them."""
    norm: GridNorm | None = None
    """Normalises after each of them; None normalises nowhere."""
    num_fcs: int = 2
    """Fully connected layers before the last ones, 1 or more."""
    width: int = 1024
    """Units of each of them."""
    output_size: int = 7
    """Side of the grid that RoIAlign gives."""
    sampling_ratio: int = 2
    """RoIAlign samples this many points a side in each cell of the grid."""
    num_levels: int = 4
    """The finest levels that proposals are pooled from; P2 to P5 of five."""
    positive_iou: float = 0.5
    """A proposal with at least this IoU with an object is positive, any other negative."""
    num_sampled: int = 512
    """Proposals an image that the losses look at."""
    positive_fraction: float = 0.25
    """At most this share of them is positive."""
    box_loss: BoxLoss = "smooth_l1"
    """Box regression loss: "smooth_l1" on box deltas, or "giou", "diou", "ciou" or a function on decoded boxes."""
    smooth_l1_beta: float = 1.0
    """Smooth L1 beta: the absolute error at which the loss changes from quadratic to linear."""
    class_loss_weight: float = 1.0
    """Weight of the classification loss."""
    box_loss_weight: float = 1.0
    """Weight of the box loss. IoU losses are smaller than smooth L1 and usually get a higher weight, such as 10."""
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Box deltas are divided by these, so that their loss weighs as much as the class's."""
    class_agnostic: bool = False
    """Whether a proposal gets one refined box for all classes, in place of one for each."""
    hard_examples: bool = False
    """Whether the losses look at the positives and negatives of highest classification loss (OHEM) rather than at
    random ones. Costs a pass of the head over all proposals."""
    score_threshold: float = 0.05
    """Detections must score more."""
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    """Of overlapping detections of a class, the worse goes ("hard"), or loses score (Soft-NMS, see `ops.soft_nms`)."""
    nms_iou: float = 0.5
    """Detections of a class that overlap more than this compete; "gaussian" takes any overlap."""
    nms_sigma: float = 0.5
    """How gently "gaussian" lowers scores."""
    max_detections: int = 100
    """Detections an image."""
    min_size: float = 1e-2
    """Detections with a shorter side, in pixels of the canvas, are dropped."""

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
        """The sampled slots that may hold positives, the first ones."""
        return int(self.num_sampled * self.positive_fraction)


class BoxHead(nn.Module):
    """Fully connected layers on RoIAlign's grid, then class logits and box deltas for each class or for all.

    Convolutions may come first, as in the heads of Wu & He, Group Normalization (2018): four of them, and one layer.
    """

    class_rows = MappingProxyType({"class_logits": ClassRows(background=1), "box_deltas": ClassRows(values=4)})
    output_stds = MappingProxyType({"class_logits": 1.1, "box_deltas": 0.55})
    grid_linears = ("fc1",)
    """Layers that `optimize_for_cpu` packs in the order of RoIAlign's grids."""

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
            channels: channels of every level.
            strides: pixels of the canvas a feature position stands for, one a level, finest first.
            num_classes: C; background is class C of the logits, the last.
            config: the numbers.
            conventions: the geometry that the weights were or will be trained with.
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
            valid: [B, P] bool; the others give numbers without meaning.

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
            # A compiler believes that GroupNorm changes the order in memory, which it keeps, and flattens accordingly.
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
        """Choose what the losses look at, among the proposals and the ground truth itself.

        Args:
            proposals: P slots an image.
            targets: ground truth.
            seeds: [B] int64 of the batch.
            features: L of [B, channels, H_l, W_l], finest first; wanted only with `hard_examples`.
            stage: tells the stages of a cascade apart, so that they draw independently.
        """
        config = self.config
        found = candidates(proposals, targets, positive_iou=config.positive_iou, plus_one=self.conventions.plus_one)
        if config.hard_examples:
            assert features is not None, "hard examples are found by looking at features"
            sampled = hardest(
                found.matches.labels,
                self._class_losses(features, found, targets),
                found.sources,
                num=config.num_sampled,
                positive_fraction=config.positive_fraction,
            )
        else:
            sampled = sample(
                found.matches.labels,
                seeds,
                num=config.num_sampled,
                positive_fraction=config.positive_fraction,
                salt=SAMPLING_SALT + stage,
                identities=found.sources,
            )
        return taken(found, sampled)

    def _class_losses(self, features: Sequence[Tensor], found: Candidates, targets: Targets) -> Tensor:
        """[B, P + G] current classification loss of every candidate, without gradients."""
        with without_gradients():
            logits, _ = self(features, found.boxes, found.valid)
        objects = take_slots(targets.labels, found.matches.matched)
        labels = torch.where(found.matches.labels == POSITIVE, objects, self.num_classes)
        return cross_entropy(logits, labels, found.valid)

    def losses(self, features: Sequence[Tensor], sampled: SampledBoxes, targets: Targets) -> dict[str, Tensor]:
        """Cross-entropy of classes and the box loss, both over the number of sampled boxes.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            sampled: from `sample`; no gradient flows into the boxes.
            targets: the batch's ground truth.

        Returns:
            `box_class` and `box_regression`, scalars. Without objects every box is background and the second is 0.
        """
        logits, deltas = self(features, sampled.boxes, sampled.valid)
        return self.losses_of(logits, deltas, sampled, targets)

    def losses_of(self, logits: Tensor, deltas: Tensor, sampled: SampledBoxes, targets: Targets) -> dict[str, Tensor]:
        """`losses` from the head's outputs for the sampled boxes: logits [B, S, C + 1], deltas [B, S, K, 4]."""
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
        """Move boxes as the head said, and clip them to their pictures.

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
        """Score every proposal for every class, then NMS within each class.

        Args:
            features: L of [B, channels, H_l, W_l], finest first.
            proposals: P slots an image.
            image_sizes: [B, 2] (height, width), to which boxes are clipped.

        Returns:
            Detections in D = `max_detections` slots (fewer where there are fewer than D proposals x classes).
        """
        boxes = torch.where(proposals.valid[..., None], proposals.boxes, 0.0)
        num_slots = used_slots(proposals.valid)
        logits, deltas = self(features, boxes[:, :num_slots], proposals.valid[:, :num_slots])
        num_unused = boxes.shape[1] - num_slots
        logits, deltas = F.pad(logits, (0, 0, 0, num_unused)), F.pad(deltas, (0, 0, 0, 0, 0, num_unused))
        return self.best_detections(logits.softmax(-1), self.refine(boxes, deltas, image_sizes), proposals.valid)

    def best_detections(self, probabilities: Tensor, boxes: Tensor, valid: Tensor) -> Detections:
        """The detections that refined boxes come to.

        Args:
            probabilities: [B, P, C + 1] of the classes, background last.
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
        """How scored boxes become detections."""
        config = self.config
        return Suppression(
            score_threshold=config.score_threshold,
            iou_threshold=config.nms_iou,
            max_detections=config.max_detections,
            method=config.nms,
            sigma=config.nms_sigma,
            plus_one=self.conventions.plus_one,
        )
