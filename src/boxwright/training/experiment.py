"""`Experiment`: a model and its training settings, as one frozen dataclass with a JSON form.

The model is a factory (see `parts.py`) that `build` calls. `settings.py` prints experiments and changes fields by name.
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

# Re-exported, because code that works with experiments usually needs them too.
from boxwright.training.parts import arguments_of as arguments_of
from boxwright.training.parts import build as build
from boxwright.training.parts import call_name as call_name
from boxwright.training.parts import nearest as nearest
from boxwright.training.parts import not_pretrained as not_pretrained
from boxwright.training.parts import to_json as to_json


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum. The defaults follow mmdetection."""

    lr: float = 0.02
    """Learning rate at batch size `Experiment.batch_size`."""
    momentum: float = 0.9
    """Momentum factor."""
    weight_decay: float = 1e-4
    """Weight decay (L2 penalty), added to the gradient."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to normalisation parameters and biases."""

    def __post_init__(self) -> None:
        check_numbers(self, "lr", "weight_decay", least=0)
        check_numbers(self, "momentum", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    lr: float = 2e-4
    """Learning rate at batch size `Experiment.batch_size`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    weight_decay: float = 0.05
    """Decoupled weight decay: each step multiplies the weights by 1 - lr * weight_decay."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also applies to normalisation parameters and biases."""

    def __post_init__(self) -> None:
        check_numbers(self, "lr", "weight_decay", least=0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), such as (0.9, 0.999), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Step schedule: the learning rate drops at given epochs. The defaults are the 1x schedule (12 epochs)."""

    epochs: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate drops."""
    factor: float = 0.1
    """Factor by which the learning rate is multiplied at each drop."""
    warmup_steps: int = 500
    """Number of steps of linear warm-up to the full learning rate."""
    warmup_factor: float = 1 / 3
    """Learning rate of the first step, as a fraction of the full learning rate."""

    def __post_init__(self) -> None:
        check_counts(self, "epochs")
        check_counts(self, "warmup_steps", least=0)
        check_numbers(self, "factor", "warmup_factor", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Cosine schedule over the whole run, without restarts (Loshchilov & Hutter, 2017)."""

    final_factor: float = 0.01
    """Learning rate of the last step, as a fraction of the full learning rate."""
    warmup_steps: int = 500
    """Number of steps of linear warm-up to the cosine."""
    warmup_factor: float = 1 / 3
    """Learning rate of the first step, as a fraction of the value of the cosine."""

    def __post_init__(self) -> None:
        check_counts(self, "warmup_steps", least=0)
        check_numbers(self, "final_factor", "warmup_factor", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model and its training settings. The defaults are the 1x schedule for COCO, as in mmdetection."""

    model: Callable[..., nn.Module]
    """Factory of the detector, called with `num_classes`: a function, an `nn.Module` class, or `functools.partial` of
    either."""
    resize: Resize = field(default_factory=Resize)
    """Image size in training and testing."""
    scales: tuple[tuple[int, int], ...] | None = None
    """Multi-scale training: (short, long) sizes that replace `resize` in training. Each batch draws one."""
    scale_mode: ScaleMode = "list"
    """Meaning of `scales`: "list" is a list of sizes; "range" is the two ends of a range, and each image draws a size
    between them."""
    flip: float = 0.5
    """Probability of a horizontal flip of a training image."""
    scale_jitter: tuple[float, float] | None = None
    """Scale jitter: minimum and maximum of the random factor on the size of a training image. None disables it."""
    crop: float | None = None
    """Random crop: minimum fraction of each side of a training image that is kept. None disables cropping."""
    photometric: Photometric | None = None
    """Random brightness, contrast and saturation of training images. None disables them."""
    given_proposals: int = 1000
    """Number of highest-scoring proposals per image that are used from a proposals file, for a model without an RPN."""
    optimizer: SGD | AdamW = field(default_factory=SGD)
    """Optimizer and its hyperparameters."""
    schedule: StepSchedule | CosineSchedule = field(default_factory=StepSchedule)
    """Learning rate schedule."""
    epochs: int = 12
    """Number of passes over the training images."""
    batch_size: int = 16
    """Batch size for which `optimizer.lr` is given. The learning rate is scaled linearly to the actual batch size,
    `images_per_device` x devices x `accumulate`."""
    images_per_device: int = 2
    """Number of training images per device and forward pass."""
    accumulate: int = 1
    """Gradient accumulation: number of batches per optimizer step."""
    clip_norm: float | None = 35.0
    """Maximum L2 norm of the gradient; larger gradients are scaled down. None disables clipping."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights. The averaged weights are evaluated and saved. None
    disables averaging."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of convolutions and matrix products. Weights, boxes and losses are always float32. "auto" is bfloat16
    on GPUs that support it, otherwise float32."""
    compile: bool = False
    """Whether the losses are compiled with `torch.compile`."""
    cuda_graphs: bool = False
    """Whether the compiled losses are captured as CUDA graphs. Requires `compile`. Not yet measured on a GPU."""
    seed: int = 0
    """Random seed of the run: initial weights, order of images, augmentation and sampling."""
    evaluate_every: int = 1
    """Number of epochs between evaluations. The last epoch is always evaluated."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        check_counts(self, "epochs", "batch_size", "images_per_device", "accumulate", "evaluate_every")
        check_counts(self, "keep_checkpoints", "given_proposals")
        check_counts(self, "seed", least=0)
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        self.augmentation  # noqa: B018  (its constructor checks the image settings)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay: expected a number between 0 and 1, such as 0.999, or none, got {self.ema_decay}"
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError(
                "cuda_graphs: CUDA graphs are captured from compiled losses only. Use --set compile=true as well."
            )
        check_numbers(self, "clip_norm", least=0, above=True)

    @property
    def augmentation(self) -> Augmentation:
        """Augmentation settings of the training loader."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation) if f.name != "transform"})


def from_json(data: Any, trusted_modules: Collection[str] = ()) -> Experiment:
    """Read an experiment from the JSON that `to_json` returns; see `parts.from_json`.

    Raises:
        ValueError: `data` is not an experiment, or it names a part that does not exist or is not trusted.
    """
    experiment = parts.from_json(data, trusted_modules)
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"expected the JSON of an Experiment, as to_json returns it, got the JSON of {type(experiment).__name__}"
        )
    return experiment


def require_rebuildable(experiment: Experiment) -> None:
    """Check that the model can be rebuilt from the JSON in its weights file, if the modules of its parts are trusted.

    Raises:
        ValueError: The model cannot be rebuilt; the message names the part and the fix.
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
    """Add the defaults of parameters that did not exist when an experiment was saved.

    Args:
        data: JSON of an experiment that an older version wrote.
        experiment: current experiment, whose modules are trusted.

    Returns:
        The JSON as this version writes it, or `data` if this version cannot read it.
    """
    try:
        return to_json(from_json(data, parts.modules_of(experiment)))
    except ValueError:
        return data
