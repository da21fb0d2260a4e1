"""Log lines at the start of a run."""

from __future__ import annotations

import torch
from torch import nn

from boxwright.layers.norm import has_untrained_statistics
from boxwright.text import plural
from boxwright.training.distributed import world_size
from boxwright.training.experiment import Experiment
from boxwright.training.metrics import log_line
from boxwright.training.plan import Plan


def log_start(
    experiment: Experiment,
    plan: Plan,
    detector: nn.Module,
    *,
    device: torch.device,
    step: int,
    num_without_mask: int,
) -> None:
    """Print the size of the run, and warnings about its settings.

    Args:
        experiment: the experiment.
        plan: plan of the run.
        detector: the model.
        device: device of the model.
        step: number of steps done; more than 0 for a resumed run.
        num_without_mask: number of objects without a mask, if the detector is trained on masks.
    """
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    processes = plural(world_size(), "process", "processes")
    log_line(
        f"{trainable / 1e6:.1f} million trainable parameters | device: {device.type}, {processes} | "
        f"{plan.total_steps} steps of {plan.images_per_step} images, {plan.steps_per_epoch} per epoch"
    )
    if plan.images_per_step != experiment.batch_size:
        log_line(
            f"lr {plan.full_learning_rate:g} ({experiment.optimizer.lr:g} at batch size "
            f"{experiment.batch_size}, scaled linearly to batch size {plan.images_per_step})"
        )
    if num_without_mask:
        log_line(f"{plural(num_without_mask, 'object')} without a mask: used for the box losses only")
    if step == 0 and has_untrained_statistics(detector):
        log_line(
            "warning: the backbone's norm layers are frozen and untrained, so the model will not learn. Start from "
            "weights (--init), or train the whole backbone: --set model.backbone.norm=gn "
            "--set model.backbone.frozen_stages=0"
        )
    if step == plan.total_steps:
        log_line(f"the run is already finished: {plan.total_steps} of {plan.total_steps} steps")
    elif step:
        log_line(f"resuming after step {step}")
