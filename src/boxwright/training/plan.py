"""`Plan`: number of steps, learning rates, and the steps at which a run logs, saves and evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from boxwright.training.experiment import CosineSchedule, Experiment, StepSchedule
from boxwright.training.options import TrainingOptions
from boxwright.training.schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts are in optimizer steps unless their name says otherwise."""

    steps_per_epoch: int
    total_steps: int
    images_per_step: int
    """Images per step, over all ranks and accumulated batches."""
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    full_learning_rate: float
    """Learning rate after warmup, scaled linearly from `Experiment.batch_size` to `images_per_step`."""
    schedule: StepSchedule | CosineSchedule

    @classmethod
    def of(cls, experiment: Experiment, options: TrainingOptions, *, batches_per_epoch: int, world_size: int) -> Plan:
        """Plan a run.

        Args:
            experiment: the experiment.
            options: options of the run: how often it logs and saves.
            batches_per_epoch: number of batches of each rank per epoch.
            world_size: number of ranks.
        """
        steps_per_epoch = max(1, batches_per_epoch // experiment.accumulate)
        total_steps = experiment.epochs * steps_per_epoch
        images_per_step = experiment.images_per_device * world_size * experiment.accumulate
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            images_per_step=images_per_step,
            log_every=options.log_every or max(1, min(50, total_steps // 20)),
            checkpoint_every=options.checkpoint_every or steps_per_epoch,
            evaluate_every=experiment.evaluate_every * steps_per_epoch,
            full_learning_rate=experiment.optimizer.lr * images_per_step / experiment.batch_size,
            schedule=experiment.schedule,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step; 0 is the first step."""
        return learning_rate(
            self.schedule,
            step,
            base=self.full_learning_rate,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def due(self, step: int, every: int) -> bool:
        """Whether a task that repeats every `every` steps is due after `step` steps. The last step is always due."""
        return step > 0 and (step % every == 0 or step == self.total_steps)
