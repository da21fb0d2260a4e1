"""An experiment: a model and how to train it, as one frozen value with a JSON form; `settings.py` changes it.

The model is given as a part (`parts.py`), which `build` calls. `settings.py` shows and changes experiments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from boxwright.checks import check_choice, check_counts, check_numbers
from boxwright.data.augment import Photometric
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize, ScaleMode
from boxwright.training import parts

# Those who work with experiments import these from here too.
from boxwright.training.parts import arguments_of as arguments_of
from boxwright.training.parts import build as build
from boxwright.training.parts import call_name as call_name
from boxwright.training.parts import nearest as nearest
from boxwright.training.parts import not_pretrained as not_pretrained
from boxwright.training.parts import to_json as to_json


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum; the defaults are the 2018 toolbox's."""

    lr: float = 0.02
    """Learning rate for a batch of `Experiment.batch_size`."""
    momentum: float = 0.9
    """Share of the last step's direction that is kept."""
    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient."""
    decay_norm_and_bias: bool = True
    """Whether normalisation parameters and biases decay too."""

    def __post_init__(self) -> None:
        check_numbers(self, "lr", "weight_decay", least=0)
        check_numbers(self, "momentum", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    lr: float = 2e-4
    """Learning rate for a batch of `Experiment.batch_size`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How slowly the averages of the gradient and of its square move."""
    weight_decay: float = 0.05
    """Weights shrink by this times the learning rate in each step."""
    decay_norm_and_bias: bool = False
    """Whether normalisation parameters and biases decay too."""

    def __post_init__(self) -> None:
        check_numbers(self, "lr", "weight_decay", least=0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: expected two numbers in 0..1, below 1, such as (0.9, 0.999)")


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The learning rate falls at a few epochs; the defaults are the 2018 toolbox's 1x, of 12 epochs."""

    epochs: tuple[int, ...] = (8, 11)
    """After how many epochs it falls."""
    factor: float = 0.1
    """What it is multiplied by each time."""
    warmup_steps: int = 500
    """Steps in which it rises linearly to its full value."""
    warmup_factor: float = 1 / 3
    """The share of its full value that it starts from."""

    def __post_init__(self) -> None:
        check_counts(self, "epochs")
        check_counts(self, "warmup_steps", least=0)
        check_numbers(self, "factor", "warmup_factor", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """The learning rate falls along half a cosine from the first step to the last (Loshchilov & Hutter, 2017)."""

    final_factor: float = 0.01
    """The share of its full value that it ends at."""
    warmup_steps: int = 500
    """Steps in which it rises linearly to the cosine."""
    warmup_factor: float = 1 / 3
    """The share of the cosine that it starts from."""

    def __post_init__(self) -> None:
        check_counts(self, "warmup_steps", least=0)
        check_numbers(self, "final_factor", "warmup_factor", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model and how to train it; the defaults are the 2018 toolbox's 1x on COCO."""

    model: Callable[..., nn.Module]
    """Builds the detector, given `num_classes`: a function, an `nn.Module` class, or `functools.partial` of either."""
    resize: Resize = field(default_factory=Resize)
    """The size that pictures are brought to, in training and in testing."""
    scales: tuple[tuple[int, int], ...] | None = None
    """(short, long) sizes that training pictures are brought to in place of `resize`; each batch draws one."""
    scale_mode: ScaleMode = "list"
    """Whether `scales` are all sizes that there are, or the two ends of a range in which each picture draws its own."""
    flip: float = 0.5
    """Probability that a training picture is mirrored left to right."""
    scale_jitter: tuple[float, float] | None = None
    """Least and largest factor on a training picture's size; None leaves the size alone."""
    crop: float | None = None
    """Training pictures keep a window of at least this share of each side; None keeps all."""
    photometric: Photometric | None = None
    """Random changes of a training picture's colours; None for none."""
    given_proposals: int = 1000
    """Of proposals that are read from a file, for a model without an RPN, the best so many an image are used."""
    optimizer: SGD | AdamW = field(default_factory=SGD)
    """What turns gradients into steps."""
    schedule: StepSchedule | CosineSchedule = field(default_factory=StepSchedule)
    """How the learning rate changes over the run."""
    epochs: int = 12
    """Passes over the training pictures."""
    batch_size: int = 16
    """Batch size of `optimizer.lr`, which is scaled linearly to `images_per_device` x devices x `accumulate`."""
    images_per_device: int = 2
    """Pictures that a device takes at a time in training."""
    accumulate: int = 1
    """Gradients are summed over this many batches before a step."""
    clip_norm: float | None = 35.0
    """Gradients are scaled down to at most this L2 norm; None leaves them alone."""
    ema_decay: float | None = None
    """How slowly the averaged weights follow, which are tested and kept; None keeps the weights themselves."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic (weights, boxes and losses are always float32); "auto" is bfloat16 on GPUs that have it."""
    compile: bool = False
    """Whether training runs through torch.compile."""
    cuda_graphs: bool = False
    """Whether what `compile` made is replayed as CUDA graphs on a GPU, a pair for each canvas; not yet measured."""
    seed: int = 0
    """Decides everything random."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        check_counts(self, "epochs", "batch_size", "images_per_device", "accumulate", "evaluate_every")
        check_counts(self, "keep_checkpoints", "given_proposals")
        check_counts(self, "seed", least=0)
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        self.augmentation  # noqa: B018  (its constructor checks the image settings)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: give a share between 0 and 1, such as 0.999, or none")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs=true: only what is compiled is captured: give compile=true too")
        check_numbers(self, "clip_norm", least=0, above=True)

    @property
    def augmentation(self) -> Augmentation:
        """The image settings of the training loader."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation) if f.name != "transform"})


def from_json(data: Any, trusted_modules: Collection[str] = ()) -> Experiment:
    """Undo `to_json` for an experiment; see `parts.from_json`.

    Raises:
        ValueError: `data` is no experiment, or names what does not exist or is not trusted.
    """
    experiment = parts.from_json(data, trusted_modules)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"expected the JSON of an experiment, got that of {experiment!r}")
    return experiment


def require_rebuildable(experiment: Experiment) -> None:
    """Check that the model can be rebuilt from the JSON that weights files hold, with the experiment's modules trusted.

    Raises:
        ValueError: it cannot; the message says which part is at fault and how to fix it.
    """
    data = to_json(experiment)
    try:
        again = from_json(json.loads(json.dumps(data)), parts.modules_of(experiment))
    except ValueError as error:
        raise ValueError(f"the model could not be rebuilt from its weights file: {error}") from None
    if json.dumps(to_json(again)) != json.dumps(data):
        raise ValueError(
            "the model could not be rebuilt from its weights file: read back from JSON, the experiment is "
            f"{json.dumps(to_json(again))} instead of {json.dumps(data)}"
        )


def with_new_defaults(data: Any, experiment: Experiment) -> Any:
    """The JSON of an older version's experiment with the defaults of parameters that were added since.

    Args:
        data: the JSON.
        experiment: the present experiment, whose modules are trusted.

    Returns:
        The JSON as this version writes it; `data` itself if this version cannot read it.
    """
    try:
        return to_json(from_json(data, parts.modules_of(experiment)))
    except ValueError:
        return data
