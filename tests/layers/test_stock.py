"""A module is stock only if a call runs the `forward` of its class and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from boxwright.layers.stock import is_stock
from boxwright.training.compiled import compiler_settings


class Other(nn.Conv2d):
    """A subclass that changes nothing."""


def hook(*_: Any) -> None:
    return None


def test_a_plain_module_is_stock_for_its_exact_class_only() -> None:
    assert is_stock(nn.Conv2d(2, 2, 1), nn.Linear, nn.Conv2d)
    assert not is_stock(nn.Conv2d(2, 2, 1), nn.Module)
    assert not is_stock(Other(2, 2, 1), nn.Conv2d)
    assert not is_stock(None, nn.Conv2d)


@pytest.mark.parametrize(
    "attach",
    [
        lambda conv: conv.register_forward_hook(hook),
        lambda conv: conv.register_forward_pre_hook(hook),
        lambda conv: conv.register_full_backward_hook(hook),
        lambda conv: conv.register_full_backward_pre_hook(hook),
        lambda conv: setattr(conv, "forward", lambda x: x),
        lambda conv: setattr(conv, "_conv_forward", lambda x, weight, bias: x),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: parametrize.register_parametrization(conv, "weight", nn.Identity()),
    ],
    ids=[
        "forward",
        "pre",
        "backward",
        "backward_pre",
        "instance_forward",
        "instance_conv_forward",
        "prune",
        "parametrize",
    ],
)
def test_a_module_with_an_attachment_is_not_stock(attach: Callable[[nn.Conv2d], Any]) -> None:
    conv = nn.Conv2d(2, 2, 1)
    handle = attach(conv)
    assert not is_stock(conv, nn.Conv2d)
    if isinstance(handle, torch.utils.hooks.RemovableHandle):
        handle.remove()
        assert is_stock(conv, nn.Conv2d)


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_no_module_is_stock_under_a_global_hook(register: Callable[[Any], Any]) -> None:
    conv = nn.Conv2d(2, 2, 1)
    handle = register(hook)
    try:
        assert not is_stock(conv, nn.Conv2d)
    finally:
        handle.remove()
    assert is_stock(conv, nn.Conv2d)


def test_a_compiled_graph_notices_hooks_that_are_registered_later() -> None:
    torch._dynamo.reset()
    conv = nn.Conv2d(2, 2, 1)

    @torch.compile(fullgraph=True, backend="eager")
    def output(x: Tensor) -> Tensor:
        return x + 1 if is_stock(conv, nn.Conv2d) else x - 1

    x = torch.zeros(())
    with compiler_settings():
        assert output(x) == 1
        handle = conv.register_forward_hook(hook)
        assert output(x) == -1
        handle.remove()
        assert output(x) == 1
