"""One training step: losses, gradients, a guard, the optimizer; the host never waits for the device in it.

`TrainStep` is what a compiled or captured form may replace: the detector's code is the same either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from boxwright.checks import check_choice, check_count, check_device, check_number
from boxwright.detectors.detector import Detector
from boxwright.evaluation.evaluate import Precision, autocast
from boxwright.structures import Batch


class Losses(nn.Module):
    """A detector's `losses` as a `forward`, which is what DDP and the compiler take hold of."""

    def __init__(self, detector: nn.Module) -> None:
        """Wrap a detector."""
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name."""
        return cast(Detector, self.detector).losses(batch)


def keep_compiled() -> None:
    """Let what is compiled from now on be taken from PyTorch's cache on disk by the processes that come after this one.

    PyTorch does so by itself, but for graphs with a `torch.autograd.Function` in them (the focal loss is one), since
    such a function might use what is no part of the graph. Ours use their arguments alone, and the operations of both
    passes are part of what the cache is asked for.
    """
    cast(Any, functorch_config).autograd_cache_allow_custom_autograd_functions = True


class TrainStep:
    """Learns from one global batch at a call.

    A step whose loss or gradient norm is not finite on any rank leaves parameters and momenta as they were. After more
    than `allowed_non_finite` such steps every later one is left out too, so that the weights stay those that the last
    one met; all of it is decided on the device, and `finite` tells the host when it cares to look.
    """

    def __init__(
        self,
        detector: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: Precision = "float32",
        clip_norm: float | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        allowed_non_finite: int = 0,
    ) -> None:
        """Set up the step.

        Args:
            detector: the model, on its device, in training mode.
            optimizer: over the parameters that train, its learning rate a tensor (see `build_optimizer`).
            device: where it all runs.
            precision: of the detector's arithmetic; weights, losses and boxes stay float32.
            clip_norm: gradients are scaled down to at most this L2 norm over all parameters.
            compile: compile the losses, as one graph for each canvas shape.
            cuda_graphs: let what is compiled for a GPU be captured and replayed as CUDA graphs, of each canvas shape a
                forward and a backward one. They share one pool of memory, into which a batch is copied.
            allowed_non_finite: how many steps may be left out before all are.

        Raises:
            ValueError: CUDA graphs in one of several processes.
        """
        check_device(device)
        check_choice("precision", precision, get_args(Precision))
        check_count("allowed_non_finite", allowed_non_finite, least=0)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, 0, above=True)
        if cuda_graphs and dist.is_initialized():
            # The sums that losses make over all ranks would be captured too, which nobody has tried.
            raise ValueError("cuda_graphs=true is for a single process so far: leave it out of torchrun's")
        losses: nn.Module = Losses(detector)
        if compile:
            keep_compiled()
            mode = "reduce-overhead" if cuda_graphs else None
            losses = cast(nn.Module, torch.compile(losses, fullgraph=True, dynamic=False, mode=mode))
        if dist.is_initialized():
            # Buffers are made alike only where they matter (evaluating, saving), not in every step. The argument has a
            # new name in newer torch, which warns of the old one.
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            losses = DistributedDataParallel(losses, gradient_as_bucket_view=True, **sync)
        self._losses = losses
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = device
        self._precision: Precision = precision
        self._clip_norm = clip_norm
        self._cuda_graphs = cuda_graphs
        if cuda_graphs:
            # A graph writes its results over the last ones. So gradients are summed in memory of their own, or a step
            # over several batches would lose the first ones'.
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._allowed_non_finite = allowed_non_finite
        self.num_non_finite = torch.zeros((), device=device)
        """[] float32, steps left out so far because they were not finite."""

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> dict[str, Tensor]:
        """Do one step.

        Args:
            batches: this rank's images, on the device, in as many parts as gradients are accumulated over.
            learning_rate: of this step.

        Returns:
            Scalars on the device: this rank's losses (the mean over the parts), their sum `total`, `grad_norm` before
            clipping, and `finite` (1 or 0: whether the step counted), the last two the same on all ranks.
        """
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            if self._cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self._gather_gradients(index == len(batches) - 1):
                with autocast(self._device, self._precision):
                    losses = self._losses(batch)
                total = torch.stack(list(losses.values())).sum()
                # A loss may be infinite with finite gradients; NaN in the gradients of the rank that met it reaches
                # every rank with their sum, so that all agree without another collective.
                poison = torch.where(torch.isfinite(total.detach()), 1.0, torch.nan)
                (total * poison / len(batches)).backward()
            for name, loss in {**losses, "total": total}.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / len(batches)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        grad_norm = get_total_norm(gradients)
        if self._clip_norm is not None:
            clip_grads_with_norm_(self._parameters, self._clip_norm, grad_norm)
        finite = self._apply(grad_norm, learning_rate)
        self._optimizer.zero_grad(set_to_none=not self._cuda_graphs)
        return {**sums, "grad_norm": grad_norm.float(), "finite": finite}

    def _apply(self, grad_norm: Tensor, learning_rate: float) -> Tensor:
        """Run the optimizer unless the gradients are not finite."""
        bad = ~torch.isfinite(grad_norm)
        self.num_non_finite += bad
        skip = bad | (self.num_non_finite > self._allowed_non_finite)
        # Fused optimizers look at `found_inf` on the device (gradient scalers use it) and then change nothing at all.
        cast(Any, self._optimizer).found_inf = skip.float()
        for group in self._optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        self._optimizer.step()
        return (~bad).float()

    def _gather_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the last part of an accumulated step only."""
        if isinstance(self._losses, DistributedDataParallel) and not last:
            return self._losses.no_sync()
        return nullcontext()
