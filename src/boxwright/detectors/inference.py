"""Getting a detector ready to detect and do nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from boxwright.backbones.norm import has_constant_statistics
from boxwright.backbones.packed import PackedConv2d
from boxwright.backbones.resnet import BasicBlock, Bottleneck, ResNet


def pack_convolutions(detector: nn.Module) -> None:
    """Let every convolution of a detector keep its weights as a CPU reads them when it detects, in place.

    Parameters, their names and their precision stay, and training it still works.

    Args:
        detector: on the CPU, in eval mode.
    """
    norms = dict(_foldable(detector))
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                setattr(parent, name, PackedConv2d.of(child, norms.get(child)))


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
