"""When a module may be computed by a faster formula than a call of its `forward`."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_stock(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes and nobody has attached anything to it.

    Then its result follows from its parameters, and a caller may compute it without calling the module. A subclass is
    not stock, and neither is a parametrized module, whose class is a subclass, nor one with a method set on the
    instance.

    Args:
        module: None is not stock.
        types: exact classes.
    """
    return type(module) in types and is_unhooked(module)  # type: ignore[arg-type]  # None is of none of the classes


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else: no hooks, of the module or global."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
