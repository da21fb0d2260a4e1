"""Options of a training run that do not change its result: where it runs, what it writes and how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from boxwright.checks import check_counts
from boxwright.data.proposals import ProposalFile

Evaluate = Callable[[nn.Module], dict[str, float]]
"""Evaluates a detector on all ranks together and returns the metrics by name on every rank."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Keyword arguments of `train` and `Training`."""

    device: torch.device | str = "cpu"
    """Device to train on; under torchrun, the device that `process_group` gives."""
    evaluate: Evaluate | None = None
    """Called every `experiment.evaluate_every` epochs and at the end; None disables evaluation."""
    resume: bool = False
    """Resume from the newest checkpoint in the run's folder, if there is one."""
    init: Path | None = None
    """Weights file to start from. Tensors that do not fit the model are left out and named in a log line."""
    init_classes: bool = False
    """Whether class-specific rows of `init` are matched by class names, see `load_init`."""
    proposals: ProposalFile | None = None
    """Proposals for the training images, for a detector without an RPN."""
    num_workers: int = 2
    """Processes per rank that read images."""
    log_every: int | None = None
    """Steps between log lines; None for 50, or fewer in a short run."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None for one checkpoint per epoch."""
    allowed_non_finite: int = 0
    """Number of non-finite steps that are skipped; the next one stops training."""
    command: str = ""
    """Command line, stored with the run."""

    def __post_init__(self) -> None:
        check_counts(self, "num_workers", "allowed_non_finite", least=0)
        check_counts(self, "log_every", "checkpoint_every")
