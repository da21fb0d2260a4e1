"""Element-wise losses, and the weighted mean that reduces all of them.

Losses are float32 (float64 for float64 input), also under autocast. Where `valid` is False, inputs are replaced before
any arithmetic. The loss is then 0, and a NaN in padding cannot reach the gradient; masking only the loss would let it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_share_denominators = False
"""Set only by `shared_denominators`. PyTorch 2.11 cannot trace a ContextVar."""


@contextmanager
def shared_denominators() -> Iterator[None]:
    """Context manager in which `weighted_mean` divides by the mean of its denominator over all ranks.

    Averaging gradients over ranks, as DDP does, then gives the gradient that a single process would compute on the
    images of all ranks. Every rank must enter the block and call `weighted_mean` the same number of times in it,
    because each call is a collective operation. Without an initialised process group the block has no effect.
    """
    global _share_denominators
    before, _share_denominators = _share_denominators, True
    try:
        yield
    finally:
        _share_denominators = before


def weighted_mean(loss: Tensor, weight: Tensor, *, over: Tensor | None = None) -> Tensor:
    """Sum of the weighted losses divided by the sum of the weights; a denominator below 1 is replaced by 1.

    The denominator is local to the process, except within `shared_denominators`.

    Args:
        loss: [...] finite losses.
        weight: [...] bool or float, not negative, of the same shape.
        over: [...] bool or float, not negative, of any shape. Its sum replaces the sum of the weights as denominator.
            Example: a loss over many easy negatives is divided by the number of positives.

    Returns:
        Scalar in the dtype of `loss`; 0 if all weights are 0.
    """
    weight = weight.to(loss.dtype)
    total = (weight if over is None else over.to(loss.dtype)).detach().sum()
    ranks = 1
    if _share_denominators and dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        ranks = dist.get_world_size()
    return (loss * weight).sum() / (total.clamp(min=1) / ranks)


def binary_cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of independent predictions, from logits.

    Args:
        logits: [...] unbounded.
        targets: [...] bool or float in 0..1.
        valid: [...] bool (broadcast), elements that count; None for all.

    Returns:
        [...] losses.
    """
    logits, targets = _keep_valid(at_least_float32(logits), valid), _keep_valid(targets, valid)
    return _keep_valid(F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none"), valid)


def cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy over C classes, from logits.

    Args:
        logits: [..., C] unbounded.
        labels: [...] int64 in 0..C-1.
        valid: [...] bool, rows that count; None for all.

    Returns:
        [...] losses.
    """
    logits = _keep_valid(at_least_float32(logits), None if valid is None else valid[..., None])
    labels = _keep_valid(labels, valid)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return _keep_valid(loss.view(labels.shape), valid)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, valid: Tensor | None = None, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss (Lin et al., 2017, arXiv 1708.02002, eq. 5) of C independent binary predictions, summed over classes.

    With q the probability of the wrong answer, the loss of a prediction is `alpha_t * q^gamma * -log(1 - q)`. The logit
    of q is `x` for a negative class and `-x` for the positive class, which is stable for any logit. Only `logits` and
    `labels` are kept for the backward pass, none of the temporary tensors of the forward pass.

    Args:
        logits: [..., C] unbounded.
        labels: [...] int64, the positive class, or C if all classes are negative.
        valid: [...] bool, rows that count; None for all.
        alpha: weight of the positive class; negative classes have weight 1 - alpha.
        gamma: focusing parameter: how strongly well-classified predictions are down-weighted; 0 for cross-entropy.

    Returns:
        [...] losses.
    """
    loss: Tensor = _FocalLoss.apply(logits, labels if valid is None else torch.where(valid, labels, -1), alpha, gamma)
    return loss


class _FocalLoss(torch.autograd.Function):
    """`sigmoid_focal_loss` for labels of which negative ones mark rows that do not count.

    At most one class of a row is positive. All classes are therefore computed as negative ones, and the positive class
    is then corrected. Operations are in place because these tensors are the largest of a detector.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.alpha, ctx.gamma = alpha, gamma
        x = at_least_float32(logits)
        positive_class, has_positive = _FocalLoss.find_positive(labels, x.shape[-1])
        negative = F.softplus(x).mul_(x.sigmoid().pow_(gamma))
        negative.scatter_(-1, positive_class, torch.where(has_positive, 0.0, negative.gather(-1, positive_class)))
        wrong = -x.gather(-1, positive_class)
        positive = torch.where(has_positive, F.softplus(wrong) * wrong.sigmoid().pow(gamma), 0.0)
        return torch.where(labels < 0, 0.0, (1 - alpha) * negative.sum(-1) + alpha * positive.squeeze(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        x, gradient = at_least_float32(logits), gradients[0][..., None]
        positive_class, has_positive = _FocalLoss.find_positive(labels, x.shape[-1])
        slope = _FocalLoss.slope(x, ctx.gamma).mul_((1 - ctx.alpha) * gradient)
        positive = -ctx.alpha * gradient * _FocalLoss.slope(-x.gather(-1, positive_class), ctx.gamma)
        slope.scatter_(-1, positive_class, torch.where(has_positive, positive, slope.gather(-1, positive_class)))
        return slope.masked_fill_(labels[..., None] < 0, 0.0).to(logits.dtype), None, None, None

    @staticmethod
    def find_positive(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """[..., 1] positive class (any class if there is none); [..., 1] bool, whether there is one."""
        labels = labels[..., None]
        return labels.clamp(0, num_classes - 1), (labels >= 0) & (labels < num_classes)

    @staticmethod
    def slope(wrong: Tensor, gamma: float) -> Tensor:
        """Derivative of q^gamma * softplus(wrong) with q = sigmoid(wrong), since dq = q * (1 - q) and dsoftplus = q."""
        q = wrong.sigmoid()
        return F.softplus(wrong).mul_(1 - q).mul_(gamma).add_(q).mul_(q.pow_(gamma))


def smooth_l1(predictions: Tensor, targets: Tensor, beta: float, valid: Tensor | None = None) -> Tensor:
    """Smooth L1 loss: quadratic for absolute errors below `beta`, else linear (Fast R-CNN, arXiv 1504.08083, eq. 3).

    Args:
        predictions: [...].
        targets: [...] of the same shape.
        beta: absolute error at which the loss changes from quadratic to linear; 1 in the paper, 0 for plain L1.
        valid: [...] bool (broadcast), elements that count; None for all.

    Returns:
        [...] losses.
    """
    predictions = _keep_valid(at_least_float32(predictions), valid)
    targets = _keep_valid(targets, valid).to(predictions.dtype)
    return F.smooth_l1_loss(predictions, targets, beta=beta, reduction="none")


def giou_loss(predictions: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Generalized IoU loss, 1 - GIoU (Rezatofighi et al., 2019, arXiv 1902.09630), in 0..2.

    Losses and gradients are finite for any finite boxes: a box whose x2 < x1 or y2 < y1 has no area.

    Args:
        predictions: [..., 4] xyxy.
        targets: [..., 4] xyxy.
        valid: [...] bool, boxes that count; None for all.

    Returns:
        [...] losses.
    """
    iou, union, enclosing, _ = _overlaps(predictions, targets, valid)
    width, height = enclosing.unbind(-1)
    return _keep_valid(1 - iou + _safe_ratio(width * height - union, width * height), valid)


def diou_loss(predictions: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Distance IoU loss (Zheng et al., 2020, arXiv 1911.08287, eq. 7), in 0..2; arguments as in `giou_loss`."""
    iou, _, enclosing, distance = _overlaps(predictions, targets, valid)
    return _keep_valid(1 - iou + _safe_ratio(distance, enclosing.square().sum(-1)), valid)


def ciou_loss(predictions: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Complete IoU loss (Zheng et al., 2020, arXiv 1911.08287, eq. 10); arguments as in `giou_loss`.

    The aspect ratio weight alpha is treated as a constant in the gradient, as in the authors' code.
    """
    iou, _, enclosing, distance = _overlaps(predictions, targets, valid)
    angles = _aspect_angle(_sizes(_keep_boxes(predictions, valid))), _aspect_angle(_sizes(_keep_boxes(targets, valid)))
    aspect = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        alpha = _safe_ratio(aspect, 1 - iou + aspect)
    return _keep_valid(1 - iou + _safe_ratio(distance, enclosing.square().sum(-1)) + alpha * aspect, valid)


def _overlaps(predictions: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """IoU [...], union [...], (width, height) of the enclosing box [..., 2], squared distance of the centres [...]."""
    predictions, targets = _keep_boxes(predictions, valid), _keep_boxes(targets, valid)
    upper_left = torch.maximum(predictions[..., :2], targets[..., :2])
    lower_right = torch.minimum(predictions[..., 2:], targets[..., 2:])
    shared = (lower_right - upper_left).clamp(min=0).prod(-1)
    union = _sizes(predictions).prod(-1) + _sizes(targets).prod(-1) - shared
    # Use the corners of both boxes in any order, so that the enclosing box also contains a box with x2 < x1.
    corners = torch.stack([predictions, targets]).unflatten(-1, (2, 2))
    enclosing = corners.amax((0, -2)) - corners.amin((0, -2))
    distance = (
        ((predictions[..., :2] + predictions[..., 2:] - targets[..., :2] - targets[..., 2:]) / 2).square().sum(-1)
    )
    return _safe_ratio(shared, union), union, enclosing, distance


def _keep_boxes(boxes: Tensor, valid: Tensor | None) -> Tensor:
    return _keep_valid(at_least_float32(boxes), None if valid is None else valid[..., None])


def _sizes(boxes: Tensor) -> Tensor:
    """[..., 2] width and height, not negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient; 0 without gradient if the denominator is (nearly) 0."""
    usable = denominator > torch.finfo(denominator.dtype).eps
    return torch.where(usable, numerator, 0.0) / torch.where(usable, denominator, 1.0)


def _aspect_angle(sizes: Tensor) -> Tensor:
    """atan(width / height); the angle of a square, without gradient, for boxes that are (nearly) a point."""
    usable = sizes.amax(-1, keepdim=True) > torch.finfo(sizes.dtype).eps
    width, height = torch.where(usable, sizes, 1.0).unbind(-1)
    return torch.atan2(width, height)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; other tensors are returned unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _keep_valid(tensor: Tensor, valid: Tensor | None) -> Tensor:
    return tensor if valid is None else torch.where(valid, tensor, torch.zeros_like(tensor))
