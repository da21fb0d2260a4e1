"""An exponential moving average of a model's parameters: smoother weights, often a little better, for the test.

`average <- d * average + (1 - d) * parameter` after every step, with d = min(decay, (1 + n) / (10 + n)) after n steps,
so that the random start is forgotten early (as TensorFlow's ExponentialMovingAverage does with num_updates). Parameters
that do not train are left out, and buffers are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from boxwright.checks import check_number


class EMA:
    """The averaged parameters beside a model that trains."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's present parameters."""
        check_number("decay", decay, 0, 1)
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` steps (1 after the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's parameters are the averages; afterwards its own again."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    def state(self) -> dict[str, Tensor]:
        """The averages, by parameter name."""
        return dict(self.averages)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from saved averages."""
        for name, average in self.averages.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def _write(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
