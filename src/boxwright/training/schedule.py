"""The learning rate as a function of the step, so that it needs no state and a resumed run cannot lose its place."""

from __future__ import annotations

import math

from boxwright.training.experiment import CosineSchedule, StepSchedule

Schedule = StepSchedule | CosineSchedule


def learning_rate(schedule: Schedule, step: int, *, base: float, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of the step that follows `step` finished ones.

    Warm-up multiplies what the schedule says by a factor that rises linearly from `warmup_factor` at the first step to
    1 after `warmup_steps`.

    Args:
        schedule: the experiment's.
        step: 0 at the first step.
        base: the learning rate that the schedule starts from, scaled to the real batch.
        steps_per_epoch: optimizer steps in one pass over the data.
        total_steps: of the whole run.
    """
    rate = base * _decay(schedule, step, steps_per_epoch, total_steps)
    if step < schedule.warmup_steps:
        rate *= schedule.warmup_factor + (1 - schedule.warmup_factor) * step / schedule.warmup_steps
    return rate


def _decay(schedule: Schedule, step: int, steps_per_epoch: int, total_steps: int) -> float:
    if isinstance(schedule, StepSchedule):
        return schedule.factor ** sum(step >= epoch * steps_per_epoch for epoch in schedule.epochs)
    progress = min(step / total_steps, 1.0)
    return schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * progress)) / 2
