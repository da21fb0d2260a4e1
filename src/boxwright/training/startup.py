"""Log lines at the start of a run."""

from __future__ import annotations

import torch
from torch import nn

from boxwright.layers.norm import has_untrained_statistics
from boxwright.training.distributed import world_size
from boxwright.training.experiment import Experiment
from boxwright.training.metrics import say
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
    """Print what is about to run, and what the user should know before it does.

    Args:
        experiment: what is trained.
        plan: its steps.
        detector: the model.
        device: the device.
        step: steps that are done already.
        num_without_mask: objects without a mask, if the detector is trained on masks.
    """
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    say(
        f"{trained / 1e6:.1f} million trained parameters | device: {device.type}, {world_size()} process(es) | "
        f"{plan.total_steps} steps of {plan.images_per_step} images, {plan.steps_per_epoch} per epoch"
    )
    if plan.images_per_step != experiment.batch_size:
        say(
            f"learning rate {plan.full_learning_rate:g} ({experiment.optimizer.lr:g} at batch size "
            f"{experiment.batch_size}, scaled linearly to batch size {plan.images_per_step})"
        )
    if num_without_mask:
        say(f"{num_without_mask:,} objects have no mask: they are used for the box losses only")
    if step == 0 and has_untrained_statistics(detector):
        say(
            "warning: the backbone's norm layers are frozen and untrained, so the model will not learn. Start from "
            "weights (--init), or train the whole backbone: --set model.backbone.norm=gn "
            "--set model.backbone.frozen_stages=0"
        )
    if step == plan.total_steps:
        say(f"this run is finished already: all {plan.total_steps} steps are done")
    elif step:
        say(f"resuming after step {step}")
