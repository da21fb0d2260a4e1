"""Checks whether a module may be computed by a faster formula instead of being called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_stock(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether a module is of exactly one of these classes and has nothing attached to it.

    Then its parameters determine its output, and a caller may compute the output without calling the module. These are
    not stock: a subclass; a parametrized module, because its class is a subclass; a module with hooks; a module with a
    `forward` or `_conv_forward` set on the instance.

    Args:
        module: a module, or None, which is not stock.
        types: exact classes; a subclass does not match.
    """
    return type(module) in types and is_unhooked(module)  # type: ignore[arg-type]  # None is of none of the classes


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else: no hooks, local or global."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
