"""Every recipe trains: one step at the depth and width of the recipe, on a small image with few samples."""

from __future__ import annotations

import pytest
import torch

from boxwright.recipes import built_in_recipes
from boxwright.training.experiment import build
from boxwright.training.optimizer import build_optimizer
from boxwright.training.settings import describe, with_settings
from boxwright.training.step import TrainStep
from factory import random_batch

RECIPES = built_in_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_takes_a_training_step(name: str) -> None:
    experiment = RECIPES[name]()
    if "\n  box = BoxConfig" in describe(experiment):
        experiment = with_settings(experiment, ["model.box.num_sampled=16"])
    torch.manual_seed(0)
    detector = build(experiment.model, num_classes=3).train()
    step = TrainStep(
        detector,
        build_optimizer(experiment.optimizer, detector),
        device=torch.device("cpu"),
        clip_norm=experiment.clip_norm,
    )
    before = {parameter: parameter.detach().clone() for parameter in detector.parameters()}
    scalars = step([random_batch(num_images=1, canvas=(64, 96))], 0.001)
    assert scalars["finite"] == 1
    assert scalars["total"] > 0
    for parameter, value in before.items():
        if not parameter.requires_grad:
            assert torch.equal(parameter, value)
    changed = sum(not torch.equal(parameter, value) for parameter, value in before.items())
    trained = sum(parameter.requires_grad for parameter in before)
    assert changed > 0.9 * trained
