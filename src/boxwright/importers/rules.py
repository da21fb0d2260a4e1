"""Tables that turn another code base's names of tensors into ours, and small changes of the tensors on the way.

C classes, A anchors a position, S anchor sizes, R anchor ratios.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]

NORM_EPS = 1e-5
"""What the norms of our backbones add to the variance."""


@dataclass(frozen=True)
class Rule:
    """A row of a table. The first row that a name fits is the name's."""

    theirs: str
    """A name of theirs: `{i}` stands for a whole number, `*` for any text."""
    ours: str | None
    """Ours, with numbers (`{i}`, `{i*2}`, `{i-1}`, `{i*3+1}`) and text put in; None for what has no use here."""
    change: Change | None = None
    """What becomes of the tensor; None leaves it as it is."""


@dataclass(frozen=True)
class Unsupported:
    """A row for what belongs to a model that cannot be built here."""

    theirs: str
    """As in `Rule`."""
    why: str
    """What is missing, for the error."""


@dataclass(frozen=True)
class Renamed:
    """What a table made of a file's tensors."""

    tensors: dict[str, Tensor]
    """Under our names."""
    unused: list[str]
    """Their names that have no use here."""


def rename(tensors: Mapping[str, Tensor], rules: Sequence[Rule | Unsupported]) -> Renamed:
    """Put a table to work.

    Args:
        tensors: By their names.
        rules: The table.

    Raises:
        ValueError: A name fits no row, fits a row of what is not supported, or two names become one of ours; or a
            tensor's shape is not such that it can be changed.
    """
    renamed: dict[str, Tensor] = {}
    unused, unknown = [], []
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        rule, match = next(
            ((rule, match) for rule in rules if (match := _pattern(rule.theirs).fullmatch(name))), (None, None)
        )
        if rule is None or match is None:
            unknown.append(name)
            continue
        if isinstance(rule, Unsupported):
            raise ValueError(f"{name}: {rule.why}")
        if rule.ours is None:
            unused.append(name)
            continue
        ours = _filled(rule.ours, match)
        if ours in renamed:
            raise ValueError(f"{origin[ours]} and {name} are both {ours}: the file holds two models")
        origin[ours] = name
        try:
            renamed[ours] = tensor if rule.change is None else rule.change(tensor)
        except (IndexError, RuntimeError):  # of a shape that is not the layer's
            raise ValueError(f"{name} is {list(tensor.shape)}, which cannot be {ours}") from None
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors are no part of the models that can be built here, so that the model would not be "
            f"whole: {listed(unknown)}"
        )
    return Renamed(renamed, unused)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


@lru_cache(maxsize=1024)
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\*", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", text))


def _filled(template: str, match: re.Match[str]) -> str:
    def number(place: re.Match[str]) -> str:
        value = int(match[place[1]]) * int(place[2] or 1) + int(place[3] or 0)
        return str(value)

    text = re.sub(r"\{(\w+?)(?:\*(\d+))?([+-]\d+)?\}", number, template)
    return text.replace("*", match["rest"]) if "*" in text else text


# Changes


def background_to_last(rows: Tensor) -> Tensor:
    """[1 + C, ...] with background first -> [C + 1, ...] with it last."""
    return torch.cat([rows[1:], rows[:1]])


def without_background(rows: Tensor) -> Tensor:
    """[1 + C, ...] with background first -> [C, ...]."""
    return rows[1:]


def without_background_deltas(rows: Tensor) -> Tensor:
    """[4 * (1 + C), ...] with background first -> [4 * C, ...]; the [4, ...] of a box for all classes stay."""
    return rows if rows.shape[0] == 4 else rows[4:]


def ratios_outermost(rows: Tensor) -> Tensor:
    """RetinaNet's last layers with anchor sizes outermost -> with anchor ratios outermost, as ours are.

    Args:
        rows: [S * R * values, ...], S = R = 3 as in the paper.
    """
    if rows.shape[0] % 9:
        raise ValueError(f"{rows.shape[0]} rows are not as many for each of 3 x 3 anchors a position")
    return rows.reshape(3, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def with_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms that are a scale and a bias alone, with statistics under which scale and bias are all that they do.

    Args:
        tensors: Under our names; the body's `bn` and `downsample.1` may lack `running_mean` and `running_var`. If the
            pyramid's norms do, too, they are GroupNorms, as the body's then are, which stay as they are.
    """
    filled = dict(tensors)
    if "backbone.lateral.0.1.weight" in tensors and "backbone.lateral.0.1.running_var" not in tensors:
        return filled
    for name, tensor in tensors.items():
        if re.fullmatch(r"backbone\.body\.(.+\.)?(bn\d|downsample\.1)\.weight", name):
            prefix = name.removesuffix("weight")
            if prefix + "running_var" not in tensors:
                filled[prefix + "running_mean"] = torch.zeros_like(tensor)
                filled[prefix + "running_var"] = torch.full_like(tensor, 1 - NORM_EPS)
    return filled


def with_batch_counts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what BatchNorms count beside their statistics, which changes nothing and which files may lack.

    Args:
        tensors: Under our names. The backbone's are BatchNorms if those of the pyramid are.
    """
    if "backbone.lateral.0.1.running_var" not in tensors:
        return tensors
    norms = [name for name in tensors if name.startswith("backbone.") and name.endswith(".running_var")]
    counts = [name.removesuffix("running_var") + "num_batches_tracked" for name in norms]
    return tensors | {name: torch.zeros((), dtype=torch.int64) for name in counts}


def with_norm_eps(tensors: dict[str, Tensor], theirs: float, ours: float) -> dict[str, Tensor]:
    """The body's norms for an eps that is not ours: variances, and where they are too small for that scales, that do.

    Args:
        tensors: Under our names.
        theirs: What the source's norms add to the variance.
        ours: What ours add.
    """
    changed = dict(tensors)
    for name, variance in tensors.items():
        scale = name.removesuffix("running_var") + "weight"
        if name.startswith("backbone.body.") and name.endswith("running_var") and scale in tensors:
            changed[name] = (variance.double() + theirs - ours).clamp(min=0).to(variance.dtype)
            factor = ((changed[name].double() + ours) / (variance.double() + theirs)).sqrt()
            changed[scale] = (tensors[scale].double() * factor).to(tensors[scale].dtype)
    return changed
