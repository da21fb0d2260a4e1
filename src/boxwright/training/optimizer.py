"""Build the optimizer of an experiment over the trainable parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from boxwright.training.experiment import SGD, AdamW


def build_optimizer(config: SGD | AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters (`requires_grad`) of a model.

    The learning rate is a tensor on the device of the parameters. `TrainStep` writes to it, so compiled and captured
    steps see the change. Fused optimizers are used because they can skip a step on the device (see `TrainStep`).

    Args:
        config: optimizer settings.
        model: the model, on the device on which it is trained.

    Raises:
        ValueError: The model has no trainable parameter.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the model has no trainable parameter: all have requires_grad=False. Unfreeze some of them.")
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
        # A first step starts from momentum 0. If it is skipped, PyTorch leaves the buffers uninitialised.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _norm_and_bias(model: nn.Module) -> set[Tensor]:
    """Biases and parameters of normalisation layers: all parameters with one dimension."""
    return {parameter for parameter in model.parameters() if parameter.ndim <= 1}
