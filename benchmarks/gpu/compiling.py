"""Compilation of a detector's losses, with the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.timing import synchronize


class StagedBackend:
    """Backend of torch.compile that measures its stages."""

    def __init__(self, *, inductor: bool) -> None:
        """Run Inductor, or keep AOTAutograd's graphs as they are."""
        self.stages: dict[str, Any] = {}
        self._inductor = inductor
        self._start = time.perf_counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """Compile a graph that Dynamo has traced."""
        entered = time.perf_counter()
        self.stages |= {"dynamo_s": entered - self._start, "dynamo_nodes": len(graph.graph.nodes)}
        self.stages["dynamo_graphs"] = self.stages.get("dynamo_graphs", 0) + 1
        compiled = compile_fx(graph, inputs, inner_compile=self._inner)
        inner = sum(self.stages.get(f"inductor_{which}_s", 0.0) for which in ("forward", "backward"))
        self.stages["aot_s"] = time.perf_counter() - entered - inner
        return compiled

    def _inner(self, graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        which = "backward" if options.get("is_backward") else "forward"
        self.stages[f"aot_{which}_nodes"] = len(graph.graph.nodes)
        start = time.perf_counter()
        compiled = compile_fx_inner(graph, inputs, **options) if self._inductor else make_boxed_func(graph.forward)
        self.stages[f"inductor_{which}_s"] = time.perf_counter() - start
        return compiled


def compile_losses(
    scale: Scale, losses: Callable[..., Any], work: Callable[[Callable[..., Any]], Any]
) -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    """Compile twice, first without Inductor, so that a run that is cut off in Inductor still knows the other stages.

    Args:
        scale: The CPU's has no Inductor pass: it would compile C++ for minutes.
        losses: A detector's.
        work: Calls the compiled losses and their gradients.

    Yields:
        Seconds and sizes of the stages so far, and the compiled losses.
    """
    for inductor in (False, True)[: 2 if scale.device == "cuda" else 1]:
        torch._dynamo.reset()
        backend = StagedBackend(inductor=inductor)
        compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend=backend)
        start = time.perf_counter()
        work(compiled)
        synchronize(scale)
        first = {"first_call_s": time.perf_counter() - start}
        yield {"inductor" if inductor else "traced": {**backend.stages, **first}}, compiled
