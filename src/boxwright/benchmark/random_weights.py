"""Random weights under which a detector does as much work as a trained one.

Fresh layers score everything alike: nothing passes the score threshold, and a detector that skips what does not pass
would be timed at doing nothing. So residual branches are made weak, as training makes them, and the last layers are
scaled until their outputs spread as a trained model's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from boxwright.detectors.class_rows import HasClassRows
from boxwright.detectors.detector import Detector
from boxwright.heads.class_rows import ClassRows
from boxwright.structures import Batch, map_tensors

SEED = 0
_CORNER = 384
_BRANCH = 0.2
"""Scale of the last norm of a residual branch."""
_BACKGROUND = 4.5
"""Bias of the background logit. With it, about a third as many pairs of box and class as there are proposals pass a
score of 0.05; of a RetinaNet, about 100 pairs of anchor and class of a 640 x 640 image."""


@runtime_checkable
class HasOutputStds(Protocol):
    """A module whose last layers have outputs of a known spread once it is trained."""

    output_stds: Mapping[str, float]
    """Standard deviation of the outputs of each last layer, by the attribute that holds it."""


@torch.no_grad()
def settle(detector: Detector, batch: Batch) -> None:
    """Change the weights of a fresh detector in place: residual norms, and the last layers that heads declare.

    Args:
        detector: on the CPU.
        batch: on the CPU; the detector is run on a corner of its first image.
    """
    for name, tensor in detector.state_dict().items():
        last = name.endswith("bn3.weight") or (name.endswith("bn2.weight") and _is_basic(detector, name))
        if last:
            tensor.fill_(_BRANCH)
    outputs: dict[Any, list[Tensor]] = {}
    was_training = detector.training
    with ExitStack() as stack:
        declared = [
            (layer, std, rows)
            for head in detector.modules()
            if isinstance(head, HasOutputStds)
            for layer, std, rows in _last_layers(head)
        ]
        for layer, _, _ in declared:
            outputs[layer] = []
            hook = layer.register_forward_hook(lambda layer, _, output: outputs[layer].append(output.flatten().float()))
            stack.callback(hook.remove)
        detector.eval().detect(_corner(batch))
    detector.train(was_training)
    for layer, std, rows in declared:
        layer.weight.mul_(std / torch.cat(outputs[layer]).std().clamp(min=1e-6))
        if rows is not None and rows.background:
            layer.bias[-rows.background :] = _BACKGROUND


def _last_layers(head: HasOutputStds) -> list[tuple[Any, float, ClassRows | None]]:
    """Each layer whose outputs have a known spread, the spread, and its rows of classes, if it has any."""
    class_rows = head.class_rows if isinstance(head, HasClassRows) else {}
    module = cast(nn.Module, head)
    return [(module.get_submodule(name), std, class_rows.get(name)) for name, std in head.output_stds.items()]


def _corner(batch: Batch) -> Batch:
    """One image, cut to a corner, which suffices and takes less memory than what will be measured."""
    one = map_tensors(batch, lambda tensor: tensor[:1])
    return replace(
        one,
        images=one.images[:, :, :_CORNER, :_CORNER],
        image_sizes=one.image_sizes.clamp(max=_CORNER),
        original_sizes=one.original_sizes.clamp(max=_CORNER),
    )


def _is_basic(detector: nn.Module, name: str) -> bool:
    """Whether a norm bn2 is the last of its block, as in ResNet-18 and 34."""
    block = detector.get_submodule(name.rpartition(".bn2")[0])
    return not hasattr(block, "bn3")
