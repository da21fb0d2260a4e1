"""Prepare a model for detection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from boxwright.layers.norm import FOLDED_NORMS, fold, has_constant_statistics
from boxwright.layers.packed import PackedConv2d
from boxwright.layers.packed_linear import PackedLinear
from boxwright.layers.stock import is_stock, is_unhooked


def optimize_for_cpu(model: nn.Module) -> None:
    """Prepare a model, in place, for faster detection on a CPU.

    Every stock `nn.Conv2d` caches its weights in the form that the CPU computes with. If `conv_norm` applies a batch
    norm to its output, the norm is folded in, and the repr of the convolution names the norm. A linear layer that reads
    RoI features caches its weights in the order of these features. Parameters, their names and their precision do not
    change, and the model can still be trained. Modules with hooks, subclasses and parametrized modules are not changed.
    Hooks that are registered later are called as usual.

    Args:
        model: any module, usually a detector in eval mode.
    """
    packed: dict[nn.Module, nn.Module] = {}  # A module that is used in two places stays one module.
    for container in model.modules():
        for conv_name, norm_name in folded_pairs(container):
            conv = container.get_submodule(conv_name)
            assert isinstance(conv, nn.Conv2d)
            packed[conv] = PackedConv2d.of(conv, folds=norm_name)
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
    """Prepare a model, in place and permanently, for faster detection on a GPU.

    Each batch norm with constant statistics is multiplied into the convolution before it, which gets a bias, and an
    `nn.Identity` replaces it. Weights become channels last. Parameters change, so do not train or save the model
    afterwards. Modules with hooks stay as they are.

    Args:
        model: any module in eval mode, usually a detector.
    """
    uses = Counter(child for container in model.modules() for child in container._modules.values())
    for container in list(model.modules()):
        for conv_name, norm_name in list(folded_pairs(container, sequences=True)):
            conv, norm = container.get_submodule(conv_name), container.get_submodule(norm_name)
            if uses[conv] == uses[norm] == 1 and has_constant_statistics(norm):
                assert isinstance(conv, nn.Conv2d)
                weight, bias = fold(conv, norm)
                conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
                setattr(container, norm_name, nn.Identity())
    model.to(memory_format=torch.channels_last)


def folded_pairs(container: nn.Module, *, sequences: bool = False) -> Iterator[tuple[str, str]]:
    """Names of the pairs of a stock convolution and the stock batch norm that is applied to its output only.

    Args:
        container: module whose children are paired. Its class names the pairs in `conv_norms`, next to a `forward` that
            applies them by `conv_norm`. A subclass with another `forward` has no pairs.
        sequences: whether a stock `nn.Sequential`, which applies its children one by one, also has pairs.
    """
    forward_owner = next(cls for cls in type(container).__mro__ if "forward" in vars(cls))
    if not is_unhooked(container):
        return
    in_sequence = pairwise(container._modules) if sequences and forward_owner is nn.Sequential else ()
    for conv_name, norm_name in vars(forward_owner).get("conv_norms", in_sequence):
        conv, norm = container._modules[conv_name], container._modules[norm_name]
        if is_stock(conv, nn.Conv2d) and is_stock(norm, *FOLDED_NORMS):
            assert isinstance(conv, nn.Conv2d)
            assert norm is not None
            if norm.running_mean is not None and len(norm.running_mean) == conv.out_channels:  # type: ignore[arg-type]
                yield conv_name, norm_name
