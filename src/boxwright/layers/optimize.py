"""Prepare a model for detection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from boxwright.layers.norm import FrozenBatchNorm2d, fold, has_constant_statistics
from boxwright.layers.packed import PackedConv2d, Pair, pack_norm
from boxwright.layers.packed_linear import PackedLinear
from boxwright.layers.stock import is_stock, is_unhooked


def optimize_for_cpu(model: nn.Module) -> None:
    """Make a model detect faster on a CPU, in place.

    Every stock `nn.Conv2d` keeps its weights as the CPU computes with them, and folds the batch norm that follows it in
    the same container. A linear layer that reads RoIAlign's grids keeps its weights in the order of the grids.
    Parameters, their names and their precision stay, and the model still trains. Modules with hooks, subclasses and
    parametrized modules stay as they are, and hooks that are registered later are called as usual.

    Args:
        model: any module, usually a detector in eval mode.
    """
    uses = Counter(child for container in model.modules() for child in container._modules.values())
    packed: dict[nn.Module, nn.Module] = {}  # A module that is used in two places stays one module.
    for container in model.modules():
        for pair in neighbours(container):
            conv, norm = container.get_submodule(pair.conv), container.get_submodule(pair.norm)
            if uses[conv] == uses[norm] == 1:
                assert isinstance(conv, nn.Conv2d)
                packed |= {conv: PackedConv2d.of(conv, pair), norm: pack_norm(norm, pair)}
        for name in getattr(type(container), "grid_linears", ()):
            linear = container.get_submodule(name)
            if type(linear) is nn.Linear and is_stock(linear, nn.Linear):
                packed[linear] = PackedLinear.of(linear)
    for module in model.modules():
        if type(module) is nn.Conv2d and is_stock(module, nn.Conv2d) and module not in packed:
            packed[module] = PackedConv2d.of(module)
    for container in list(model.modules()):
        for name, child in container.named_children():
            if child in packed:
                setattr(container, name, packed[child])


@torch.no_grad()
def optimize_for_cuda(model: nn.Module) -> None:
    """Make a model detect faster on a GPU, in place and for good.

    Each batch norm with constant statistics is multiplied into the convolution before it, which gets a bias, and an
    `nn.Identity` replaces it. Weights become channels last. Parameters change, so do not train or save the model
    afterwards. Norms of containers that may apply something in between stay: only stock `nn.Sequential` containers and
    classes that name their pairs in `conv_norms` are folded. Modules with hooks stay as they are.

    Args:
        model: any module in eval mode, usually a detector.
    """
    uses = Counter(child for container in model.modules() for child in container._modules.values())
    for container in list(model.modules()):
        owner = next(cls for cls in type(container).__mro__ if "forward" in vars(cls))
        # A subclass with another `forward` may apply its layers in another order.
        names = vars(owner).get("conv_norms", ())
        for pair in list(neighbours(container)):
            conv, norm = container.get_submodule(pair.conv), container.get_submodule(pair.norm)
            applied = is_unhooked(container) and (owner is nn.Sequential or (pair.conv, pair.norm) in names)
            if applied and uses[conv] == uses[norm] == 1 and has_constant_statistics(norm):
                assert isinstance(conv, nn.Conv2d)
                weight, bias = fold(conv, norm)
                conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
                setattr(container, pair.norm, nn.Identity())
    model.to(memory_format=torch.channels_last)


def neighbours(container: nn.Module) -> Iterator[Pair]:
    """Each stock convolution that has a stock batch norm of its channels as its next sibling."""
    for (conv_name, conv), (norm_name, norm) in pairwise(container.named_children()):
        if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            stock = is_stock(conv, nn.Conv2d) and is_stock(norm, nn.BatchNorm2d, FrozenBatchNorm2d)
            if stock and norm.running_mean is not None and len(norm.running_mean) == conv.out_channels:
                yield Pair(container, conv_name, norm_name)
