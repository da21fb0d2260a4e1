"""Check whether a module may be computed by a faster formula instead of a call of its `forward`."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_stock(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether a module has exactly one of these classes, no hooks, and no `forward` set on the instance.

    The output of such a module depends on its input and parameters only, so a caller may use a faster formula.
    Instances of subclasses, such as parametrized modules, are not stock.

    Args:
        module: module to check; None is not stock.
        types: exact classes.
    """
    return type(module) in types and is_unhooked(module)  # type: ignore[arg-type]  # None is of none of the classes


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class only: no hooks of the module, no global hooks."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
