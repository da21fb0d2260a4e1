"""Random weights under which a detector does as much work as a trained one.

Fresh layers score everything alike: nothing passes a threshold, and a detector that looks at survivors alone would be
timed at doing nothing. So residual branches get weak, as training makes them, and the last layers are scaled until
their answers to a picture spread as a trained model's do.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from boxwright.detectors.detector import PixelNormalizer
from boxwright.heads.box_head import BoxHead
from boxwright.heads.retina_head import RetinaHead
from boxwright.heads.rpn_head import RPNHead
from boxwright.structures import Batch

SEED = 0
_CORNER = 384
_BRANCH = 0.2
"""Scale of the last norm of a residual branch."""
_OBJECTNESS, _RPN_DELTAS = 1.0, 0.1
_CLASS_LOGITS, _BOX_DELTAS, _BACKGROUND = 1.0, 0.5, 4.5
"""With these, about a third as many pairs of box and class as there are proposals pass a score of 0.05."""
_RETINA_LOGITS, _RETINA_DELTAS = 0.4, 0.1
"""With these, about 100 pairs of anchor and class of a 640 x 640 picture pass a score of 0.05."""


@torch.no_grad()
def settle(detector: nn.Module, batch: Batch) -> None:
    """Change a fresh detector's weights in place; of a detector of a foreign kind only the norms.

    Args:
        detector: on the CPU.
        batch: on the CPU; its first picture is looked at.
    """
    for name, tensor in detector.state_dict().items():
        last = name.endswith("bn3.weight") or (name.endswith("bn2.weight") and _is_basic(detector, name))
        if last:
            tensor.fill_(_BRANCH)
    heads = [module for module in detector.modules() if isinstance(module, (RPNHead, BoxHead, RetinaHead))]
    normalize, backbone = (getattr(detector, name, None) for name in ("normalize", "backbone"))
    if not heads or not isinstance(normalize, PixelNormalizer) or backbone is None:
        return
    # A corner of one picture will do, and takes less memory than what is to be measured.
    images, sizes = batch.images[:1, :, :_CORNER, :_CORNER], batch.image_sizes[:1].clamp(max=_CORNER)
    features = cast("list[Tensor]", backbone(normalize(images, sizes)))
    canvas = cast("tuple[int, int]", tuple(images.shape[-2:]))
    boxes, valid = _some_boxes(canvas)
    for head in heads:
        if isinstance(head, RPNHead):
            output = head(features, canvas)
            _scale(head.objectness, output.objectness, _OBJECTNESS)
            _scale(head.deltas, output.deltas, _RPN_DELTAS)
        elif isinstance(head, RetinaHead):
            answer = head(features, canvas)
            _scale(head.class_logits, torch.cat([level.flatten() for level in answer.logits]), _RETINA_LOGITS)
            _scale(head.box_deltas, answer.deltas, _RETINA_DELTAS)
        else:
            logits, deltas = head(features, boxes, valid)
            _scale(head.class_logits, logits, _CLASS_LOGITS)
            _scale(head.box_deltas, deltas, _BOX_DELTAS)
            head.class_logits.bias[-1] = _BACKGROUND


def _is_basic(detector: nn.Module, name: str) -> bool:
    """Whether a norm bn2 is the last of its block, as in ResNet-18 and 34."""
    block = detector.get_submodule(name.rpartition(".bn2")[0])
    return not hasattr(block, "bn3")


def _scale(layer: nn.Conv2d | nn.Linear, answer: Tensor, spread: float) -> None:
    """Make the layer's answers spread that much."""
    layer.weight.mul_(spread / answer.float().std().clamp(min=1e-6))


def _some_boxes(canvas: tuple[int, int], count: int = 64) -> tuple[Tensor, Tensor]:
    """[1, count, 4] boxes of any size in a canvas, and that all are valid."""
    generator = torch.Generator().manual_seed(SEED)
    height, width = canvas
    limits = torch.tensor([float(width), float(height)])
    sides = 16 * (limits / 16) ** torch.rand(1, count, 2, generator=generator)
    corners = torch.rand(1, count, 2, generator=generator) * (limits - sides)
    return torch.cat([corners, corners + sides], -1), torch.ones(1, count, dtype=torch.bool)
