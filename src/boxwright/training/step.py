"""One training step: losses, gradients, a check for non-finite values, the optimizer. No host synchronisation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from boxwright.checks import check_count, check_device, check_number
from boxwright.losses import shared_denominators
from boxwright.precision import Precision, autocast, check_precision
from boxwright.structures import Batch
from boxwright.training.compiled import CompiledLosses, Losses


class TrainStep:
    """A training step: each call trains on one global batch.

    A step with a loss or gradient norm that is not finite on any rank is skipped: parameters and momenta keep their
    values. After more than `allowed_non_finite` such steps every later step is skipped too, so that the weights of the
    last failure are kept. The device decides this; the host reads `finite` at the next log line.
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
        num_canvases: int = 1,
        cuda_graphs: bool = False,
        allowed_non_finite: int = 0,
    ) -> None:
        """Set up the step.

        Args:
            detector: the model, on its device, in training mode.
            optimizer: optimizer of the trainable parameters, whose learning rate is a tensor (see `build_optimizer`).
            device: device of the detector.
            precision: precision of convolutions and matrix products; weights, losses and boxes stay float32.
            clip_norm: maximum L2 norm of the gradient of all parameters; None disables clipping.
            compile: whether to compile the losses, as one graph for each canvas shape.
            num_canvases: number of canvas shapes in training; only `compile` uses it.
            cuda_graphs: whether to capture the compiled losses as CUDA graphs: a forward and a backward graph for
                each canvas shape. They share one memory pool, into which each batch is copied.
            allowed_non_finite: number of non-finite steps after which every later step is skipped, too.

        Raises:
            ValueError: `cuda_graphs` is set in a run with several processes.
        """
        check_device(device)
        check_precision(precision)
        check_count("allowed_non_finite", allowed_non_finite, least=0)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, 0, above=True)
        if cuda_graphs and dist.is_initialized():
            # The all-reduce of the losses' denominators would be captured too, which is untested.
            raise ValueError("cuda_graphs: expected false under torchrun, got true. CUDA graphs need a single process.")
        losses: nn.Module = Losses(detector)
        if compile:
            losses = CompiledLosses(detector, num_canvases=num_canvases, cuda_graphs=cuda_graphs)
        if dist.is_initialized():
            # Ranks share buffers before evaluating and saving only, not in every step. Newer PyTorch versions rename
            # the argument and warn about the old name.
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
            # A CUDA graph overwrites the outputs of its last replay. So gradients are summed in memory outside of the
            # graph; otherwise a step with accumulation would lose the gradients of its first batches.
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._allowed_non_finite = allowed_non_finite
        self.num_non_finite = torch.zeros((), device=device)
        """[] float32, number of non-finite steps so far."""

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> dict[str, Tensor]:
        """Train on one global batch.

        Args:
            batches: this rank's images, on the device, one batch for each part of an accumulated step.
            learning_rate: learning rate of this step.

        Returns:
            Scalars on the device: this rank's losses (mean over the batches), their sum `total`, `grad_norm` before
            clipping, and `finite` (1, or 0 for a skipped step). The last two are the same on all ranks.
        """
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            if self._cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self._gradient_sync(index == len(batches) - 1):
                with autocast(self._device, self._precision), shared_denominators():
                    losses = self._losses(batch)
                total = torch.stack(list(losses.values())).sum()
                # An infinite loss may have finite gradients. They become NaN here, and NaN reaches every rank with the
                # sum of the gradients. So all ranks skip the step without another collective.
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
        # Fused optimizers read `found_inf` on the device (gradient scalers use it) and change nothing if it is set.
        cast(Any, self._optimizer).found_inf = skip.float()
        for group in self._optimizer.param_groups:
            group["lr"].fill_(learning_rate)
        self._optimizer.step()
        return (~bad).float()

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one backward pass: skips DDP's all-reduce for all but the last batch of an accumulated step."""
        if isinstance(self._losses, DistributedDataParallel) and not last:
            return self._losses.no_sync()
        return nullcontext()
