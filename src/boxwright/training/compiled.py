"""A detector's losses as a `forward`, plain or compiled.

Compiler settings apply within the calls of this module only, so that a program that uses Boxwright keeps its settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from boxwright.detectors.detector import Detector
from boxwright.structures import Batch


class Losses(nn.Module):
    """A detector's `losses` as a `forward`, the method that DDP and `torch.compile` wrap."""

    def __init__(self, detector: nn.Module) -> None:
        """Wrap a detector."""
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name."""
        return cast(Detector, self.detector).losses(batch)


class CompiledLosses(nn.Module):
    """`Losses`, compiled as one graph for each canvas shape."""

    def __init__(self, detector: nn.Module, *, num_canvases: int = 1, cuda_graphs: bool = False) -> None:
        """Set up the compiler; compiling happens in the first call with each canvas shape.

        Args:
            detector: the model, on its device.
            num_canvases: number of canvas shapes, which is the maximum number of graphs.
            cuda_graphs: whether to capture the compiled graphs as CUDA graphs and replay them.
        """
        super().__init__()
        mode = "reduce-overhead" if cuda_graphs else None
        compiled = torch.compile(Losses(detector), fullgraph=True, dynamic=False, mode=mode)
        self.compiled = cast(nn.Module, compiled)
        self.num_canvases = num_canvases

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name."""
        with compiler_settings(self.num_canvases):
            return cast(dict[str, Tensor], self.compiled(batch))


@contextmanager
def compiler_settings(num_canvases: int = 1) -> Iterator[None]:
    """Settings of PyTorch's compiler for a detector's losses, restored after the block.

    - The recompile limit, by default 8, becomes the number of canvases if that is larger. At the limit, compiling the
      next canvas raises an error.
    - Graphs that contain a `torch.autograd.Function` (the focal loss is one) are stored in the compile cache on disk,
      where later processes find them. By default PyTorch does not store such graphs, because a function may depend on
      more than its arguments. The functions of Boxwright depend on their arguments only.
    - Every call checks for hooks, because the fast formulas are valid only for modules without hooks.
    """
    # The shapes of other detectors in the same process count towards the accumulated limit.
    settings = {
        "skip_nnmodule_hook_guards": False,
        "recompile_limit": max(cast(Any, dynamo_config).recompile_limit, num_canvases),
        "accumulated_recompile_limit": max(cast(Any, dynamo_config).accumulated_recompile_limit, 32 * num_canvases),
    }
    cached = cast(Any, functorch_config).patch(autograd_cache_allow_custom_autograd_functions=True)
    with cast(Any, dynamo_config).patch(**settings), cached:
        yield
