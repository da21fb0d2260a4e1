"""Learning rate as a function of the step. It has no state, so a resumed run needs nothing but the step."""

from __future__ import annotations

import math

from boxwright.training.experiment import CosineSchedule, StepSchedule

Schedule = StepSchedule | CosineSchedule


def learning_rate(schedule: Schedule, step: int, *, base: float, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    During warm-up, the value of the schedule is multiplied by a factor that rises linearly from `warmup_factor` at the
    first step to 1 after `warmup_steps`.

    Args:
        schedule: schedule of the experiment.
        step: number of steps done before; 0 for the first step.
        base: full learning rate, scaled to the actual batch size.
        steps_per_epoch: number of optimizer steps per epoch.
        total_steps: number of optimizer steps of the run.
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
