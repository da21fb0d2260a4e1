"""Optimizers from an experiment's settings, over the parameters that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from boxwright.training.experiment import SGD, AdamW


def build_optimizer(config: SGD | AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over the parameters of `model` that train (`requires_grad`).

    The learning rate is a tensor beside the parameters, which the step fills, so that compiled and captured steps see
    it change. The fused forms are used because they can leave a step out on the device (see `TrainStep`).

    Args:
        config: the experiment's optimizer.
        model: on the device where it will train.

    Raises:
        ValueError: nothing in the model trains.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model trains: every one is frozen")
    learning_rate = torch.tensor(config.lr, dtype=torch.float32, device=trained[0].device)
    groups = [{"params": trained, "weight_decay": config.weight_decay}]
    if not config.decay_norm_and_bias:
        spared = _norm_and_bias(model)
        groups = [
            {"params": [p for p in trained if p not in spared], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p in spared], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if isinstance(config, AdamW):
        return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, fused=True)
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, fused=True)
    if config.momentum:
        # Zero is what the first step starts from; left to itself, a first step that is left out would keep garbage.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _norm_and_bias(model: nn.Module) -> set[Tensor]:
    """Biases and all of a normalisation's parameters, which are those of one dimension."""
    return {parameter for parameter in model.parameters() if parameter.ndim <= 1}
