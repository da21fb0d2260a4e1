"""Getting a detector ready to detect and do nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from boxwright.backbones.fused import FusedConv2d
from boxwright.backbones.norm import has_constant_statistics
from boxwright.backbones.resnet import BasicBlock, Bottleneck, ResNet
from boxwright.evaluation.evaluate import Precision


def fuse_convolutions(detector: nn.Module, precision: Precision) -> None:
    """Let every convolution of a detector do what comes behind it, too, in place; it cannot be trained any more.

    Parameters, their names and their precision stay. Where this PyTorch or this CPU cannot, nothing happens.

    Args:
        detector: on the CPU, in eval mode.
        precision: that it will detect in: "bfloat16" under autocast, others without.
    """
    if not can_fuse(precision):
        return
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    norms = dict(_foldable(detector))
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _is_fusable(child):
                setattr(parent, name, FusedConv2d.of(child, norms.get(child), dtype))


def can_fuse(precision: Precision) -> bool:
    """Whether this PyTorch has oneDNN, and this CPU what oneDNN needs for the precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    return precision != "bfloat16" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_fusable(convolution: nn.Conv2d) -> bool:
    padded = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return padded and convolution.weight.dtype == torch.float32


def _foldable(detector: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The convolutions of ResNets with their norms, where those can be folded."""
    for module in detector.modules():
        if isinstance(module, (ResNet, BasicBlock, Bottleneck)):
            pairs = [(name.replace("bn", "conv"), name) for name, _ in module.named_children() if name.startswith("bn")]
            if getattr(module, "downsample", None) is not None:
                pairs.append(("downsample.0", "downsample.1"))
            for convolution, norm in pairs:
                if has_constant_statistics(module.get_submodule(norm)):
                    yield module.get_submodule(convolution), module.get_submodule(norm)
