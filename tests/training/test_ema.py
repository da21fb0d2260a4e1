from __future__ import annotations

import torch
from torch import nn

from boxwright.training.ema import EMA


def test_average_equals_the_formula() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().double()
    for step in range(1, 101):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_applied_restores_the_trained_weights() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = EMA(model, decay=0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    trained = model.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.weight, start)
    assert torch.equal(model.weight, trained)
    assert set(ema.state()) == {"weight"}
