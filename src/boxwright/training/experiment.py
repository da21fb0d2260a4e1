"""An experiment: a model and how to train it, as one frozen value with a JSON form; `settings.py` changes it.

A part of a model is given as the call that makes it, `partial(function, argument=...)`; `build` makes it. Calls nest.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from types import FunctionType
from typing import Any, Literal

from torch import nn

from boxwright.checks import check_choice, check_counts, check_numbers
from boxwright.data.augment import Photometric
from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize, ScaleMode


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
    """Makes the detector, given `num_classes`: a function, or `partial` of one."""
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


def build(call: Callable[..., Any], **arguments: Any) -> Any:
    """Make a part, and first the parts that it is made of.

    Args:
        call: a function or `partial`; arguments of it that are functions or `partial`s themselves are built first.
        arguments: further arguments, such as `num_classes`; the call may have them only at their defaults, which
            `to_json` writes down.

    Raises:
        ValueError: the function does not take these arguments, or wants more.
    """
    function, given = _split(call)
    signature = inspect.signature(function)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    given = {name: value for name, value in given.items() if name not in arguments or value != defaults.get(name)}
    parts = {name: build(value) if is_call(value) else value for name, value in given.items()}
    try:
        signature.bind(**parts, **arguments)
    except TypeError as error:
        raise ValueError(f"{call_name(call)}: {error}") from None
    return function(**parts, **arguments)


def is_call(value: Any) -> bool:
    """Whether an argument stands for what it makes."""
    return isinstance(value, (partial, FunctionType))


def is_settings(value: Any) -> bool:
    """Whether it is a value of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def call_name(value: Any) -> str:
    """The full name of the function that a call calls, or of a value's class."""
    function = _split(value)[0] if is_call(value) else type(value)
    return f"{function.__module__}.{function.__qualname__}"


def arguments_of(value: Any) -> dict[str, Any]:
    """What a call would pass on, or the fields of a dataclass's value, by name; defaults included.

    Arguments that have no default and are not given are left out.
    """
    if not is_call(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    function, given = _split(value)
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    named = {p.name: {**defaults, **given}[p.name] for p in parameters if p.name in defaults or p.name in given}
    return {**named, **given}


def _split(call: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a call, and the arguments that are given with it."""
    if not isinstance(call, partial):
        return call, {}
    if call.args:
        raise ValueError(f"{call.func.__qualname__}: give the arguments of a partial by name")
    return call.func, dict(call.keywords)


def to_json(value: Any) -> Any:
    """A value that `json` can write: all of an experiment, defaults included, so that later defaults change nothing.

    A call or a dataclass's value becomes `{"call": "boxwright.backbones.fpn.resnet_fpn", "arguments": {...}}`.

    Raises:
        ValueError: something in it is neither that nor a number, string, bool, None or tuple of such.
    """
    if is_call(value) or is_settings(value):
        name = call_name(value)
        if "<" in name or name.startswith("__main__."):
            raise ValueError(f"{name} cannot be imported by its name: define it at the top of an importable module")
        return {"call": name, "arguments": {k: to_json(v) for k, v in arguments_of(value).items()}}
    if isinstance(value, (tuple, list)):
        return [to_json(element) for element in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"an experiment cannot hold {value!r}: give parts as functools.partial(function, argument=...), and otherwise "
        "numbers, strings, None, tuples and dataclasses"
    )


def not_pretrained(call: Any) -> Any:
    """A call, and those in it, with each `pretrained` of Boxwright's off: for a model whose weights come from a file.

    They would be fetched, and then overwritten.
    """
    if not is_call(call):
        return call
    function, given = _split(call)
    changes = {name: not_pretrained(value) for name, value in given.items() if is_call(value)}
    if _inside(function.__module__, ("boxwright",)) and given.get("pretrained"):
        changes["pretrained"] = False
    return partial(call, **changes) if changes else call


MODEL_MODULES = ("boxwright.backbones", "boxwright.heads", "boxwright.detectors")
"""Whose functions a page may have called: they make modules and do nothing else."""
SETTINGS_MODULES = (
    "boxwright.training.experiment",
    "boxwright.data.augment",
    "boxwright.data.buckets",
    "boxwright.geometry.conventions",
)
"""Whose dataclasses a page may hold besides. No other module is imported for a page: importing one may run it."""


def from_json(page: Any, trusted_modules: Collection[str] = ()) -> Experiment:
    """Undo `to_json`. Lists come back as tuples.

    Args:
        page: as `json` reads it.
        trusted_modules: modules, or packages with all in them, whose functions may be called besides Boxwright's own.
            Name those that you would run.

    Raises:
        ValueError: the page is no experiment, or names what does not exist or is not trusted.
    """
    experiment = _decode(page, tuple(trusted_modules))
    if not isinstance(experiment, Experiment):
        raise ValueError(f"this page holds no experiment but {experiment!r}")
    return experiment


def _decode(page: Any, trusted: tuple[str, ...]) -> Any:
    if isinstance(page, list):
        return tuple(_decode(element, trusted) for element in page)
    if not isinstance(page, dict):
        return page
    name, given = page.get("call"), page.get("arguments")
    if set(page) != {"call", "arguments"} or not isinstance(name, str) or not isinstance(given, dict):
        raise ValueError(f"this is no call with arguments: {page!r}")
    target = _find(name, trusted)
    known = inspect.signature(target).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for argument in given:
            if argument not in known:
                raise ValueError(f"{name} has no {argument!r}{nearest(argument, known)}")
    arguments = {argument: _decode(value, trusted) for argument, value in given.items()}
    if not isinstance(target, type):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _find(name: str, trusted: tuple[str, ...]) -> Any:
    """What a name stands for, if a page may use it."""
    module_name, _, attribute = name.rpartition(".")
    if not _inside(module_name, ("boxwright", *trusted)):
        raise ValueError(
            f"{name} is not Boxwright's: name its module as trusted if you know its code and would run it here"
        )
    if not _inside(module_name, (*MODEL_MODULES, *SETTINGS_MODULES, *trusted)):
        raise ValueError(f"{name} is neither a part of a model nor settings")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        raise ValueError(f"there is no {name}: was the experiment written by another version?") from None
    settings = isinstance(target, type) and dataclasses.is_dataclass(target)
    # Modules also hold what they import, and Boxwright has functions that write files.
    own = getattr(target, "__module__", None) == module_name
    if not (
        own and (settings or (isinstance(target, FunctionType) and _inside(module_name, (*MODEL_MODULES, *trusted))))
    ):
        raise ValueError(f"{name} is neither a part of a model nor settings")
    return target


def _inside(module: str, packages: Collection[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def nearest(name: str, names: Collection[str]) -> str:
    """The end of an error about a wrong name: the several names that hold it, or the nearest one, or else all."""
    holding = [right for right in names if name in right]
    close = get_close_matches(name, list(names), n=1)
    if len(holding) < 2 and close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(holding or names) or 'none'}"
