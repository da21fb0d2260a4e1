from __future__ import annotations

import pytest
import torch

from boxwright.training.experiment import CosineSchedule, StepSchedule
from boxwright.training.schedule import Schedule, learning_rate


def rates(schedule: Schedule, steps_per_epoch: int, epochs: int, base: float = 0.02) -> list[float]:
    total = steps_per_epoch * epochs
    return [
        learning_rate(schedule, step, base=base, steps_per_epoch=steps_per_epoch, total_steps=total)
        for step in range(total)
    ]


def torch_rates(make: type[torch.optim.lr_scheduler.LRScheduler], steps: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
    scheduler = make(optimizer, **options)  # type: ignore[arg-type]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_step_schedule_equals_multi_step_lr() -> None:
    actual = rates(StepSchedule(warmup_steps=0), 7, 12)
    expected = torch_rates(torch.optim.lr_scheduler.MultiStepLR, 84, milestones=[56, 77], gamma=0.1)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_equals_cosine_annealing_lr() -> None:
    actual = rates(CosineSchedule(warmup_steps=0, final_factor=0.1), 7, 12)
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 84, T_max=84, eta_min=0.002)
    assert actual == pytest.approx(expected, rel=1e-9)


def test_warm_up_equals_linear_lr() -> None:
    actual = rates(StepSchedule(warmup_steps=50), 100, 1)
    expected = torch_rates(torch.optim.lr_scheduler.LinearLR, 100, start_factor=1 / 3, total_iters=50)
    assert actual == pytest.approx(expected, rel=1e-9)


def test_default_warm_up_starts_at_a_third() -> None:
    actual = rates(StepSchedule(), 7330, 1)
    assert actual[0] == pytest.approx(0.02 / 3)
    assert actual[250] == pytest.approx(0.02 * 2 / 3)
    assert actual[500] == 0.02
