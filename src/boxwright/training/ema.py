"""Exponential moving average (EMA) of the parameters of a model. The averaged weights are often slightly better.

`average <- d * average + (1 - d) * parameter` after every step, with d = min(decay, (1 + n) / (10 + n)) after n steps,
so that the random initial weights are forgotten early (as in TensorFlow's ExponentialMovingAverage with num_updates).
Frozen parameters and buffers are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from boxwright.checks import check_number


class EMA:
    """Averaged parameters of a model in training."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start the average at the current parameters."""
        check_number("decay", decay, 0, 1)
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the parameters after `step` steps (1 after the first step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters of the model with their averages within the block."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(trained)

    def state(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(self.averages)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore saved averages."""
        for name, average in self.averages.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def _write(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
