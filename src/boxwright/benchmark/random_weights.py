"""Random weights under which a detector does as much work as a trained one.

Fresh layers score everything alike: nothing passes the score threshold, and a detector that skips what does not pass
would be timed at doing nothing. So residual branches are made weak, as training makes them, and the last layers are
scaled until their outputs spread as a trained model's do.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from boxwright.detectors.detector import Detector
from boxwright.heads.declarations import ClassRows, HasClassLayers, HasOutputStds
from boxwright.structures import Batch, map_tensors

SEED = 0
_CORNER = 384
_BRANCH = 0.2
"""Scale of the last norm of a residual branch."""
_BACKGROUND = 4.5
"""Bias of the background logit. With it, about a third as many pairs of box and class as there are proposals pass a
score of 0.05; of a RetinaNet, about 100 pairs of anchor and class of a 640 x 640 image."""


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
    was_training = detector.training
    with ExitStack() as stack:
        for head in detector.modules():
            if isinstance(head, HasOutputStds):
                for name, std in head.output_stds.items():
                    rows = head.class_layers.get(name) if isinstance(head, HasClassLayers) else None
                    layer = cast(nn.Module, head).get_submodule(name)
                    stack.callback(layer.register_forward_hook(_Scale(std, rows)).remove)
        detector.eval().detect(_corner(batch))
    detector.train(was_training)


class _Scale:
    """Forward hook that scales a layer at its first call, so that later layers see outputs of the right spread."""

    def __init__(self, std: float, rows: ClassRows | None) -> None:
        self._std, self._rows, self._done = std, rows, False

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Scale the weight, set the bias of background, and return the layer's new output."""
        if self._done:
            return output
        self._done = True
        layer.weight.mul_(self._std / output.float().std().clamp(min=1e-6))
        if self._rows is not None and self._rows.background:
            layer.bias[-self._rows.background :] = _BACKGROUND
        return cast(Tensor, layer.forward(*inputs))


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
