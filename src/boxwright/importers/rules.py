"""Rules that rename the tensors of another library to Boxwright's names, and changes of the tensors.

C classes, A anchors per position, S anchor sizes, R anchor ratios.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from boxwright.text import plural

Change = Callable[[Tensor], Tensor]

NORM_EPS = 1e-5
"""Epsilon of the norm layers of Boxwright's backbones."""


@dataclass(frozen=True)
class Rule:
    """A rule for tensor names. The first rule that matches a name applies."""

    theirs: str
    """Pattern of the name in the file: `{i}` matches an integer, `*` matches any text."""
    ours: str | None
    """Boxwright's name, with integers (`{i}`, `{i*2}`, `{i-1}`, `{i*3+1}`) and text filled in; None if not used."""
    change: Change | None = None
    """Change of the tensor; None for no change."""


@dataclass(frozen=True)
class Unsupported:
    """A rule for tensors of models that Boxwright does not support."""

    theirs: str
    """Pattern of the name, as in `Rule`."""
    why: str
    """Reason for the error message."""


@dataclass(frozen=True)
class Renamed:
    """Result of `rename`."""

    tensors: dict[str, Tensor]
    """Tensors by Boxwright's names."""
    unused: list[str]
    """Names, in the file, of tensors that are not used."""


def rename(tensors: Mapping[str, Tensor], rules: Sequence[Rule | Unsupported]) -> Renamed:
    """Rename tensors by rules.

    Args:
        tensors: Tensors by their names in the file.
        rules: The rules.

    Raises:
        ValueError: A name matches no rule or an unsupported one, two names become the same name, or the shape of a
            tensor does not allow its change.
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
            raise ValueError(f"{origin[ours]} and {name} both map to {ours}: the file contains two models")
        origin[ours] = name
        try:
            renamed[ours] = tensor if rule.change is None else rule.change(tensor)
        except (IndexError, RuntimeError):  # The shape does not match the layer.
            raise ValueError(f"{name} has shape {list(tensor.shape)}, which does not match {ours}") from None
    if unknown:
        raise ValueError(
            f"{plural(len(unknown), 'unknown tensor')}, so the model would be incomplete: {listed(unknown)}"
        )
    return Renamed(renamed, unused)


def rename_back(tensors: Mapping[str, Tensor], rules: Sequence[Rule | Unsupported]) -> dict[str, Tensor]:
    """Undo `rename`. If several rules produce a name, the first one is inverted.

    Args:
        tensors: Tensors by Boxwright's names.
        rules: The rules of `rename`.

    Raises:
        ValueError: No rule with an invertible change produces a name.
    """
    theirs: dict[str, Tensor] = {}
    lost = []
    for name, tensor in tensors.items():
        for rule in rules:
            origin = _origin(rule, name)
            if origin is not None and next(r for r in rules if _pattern(r.theirs).fullmatch(origin)) is rule:
                assert isinstance(rule, Rule)
                theirs[origin] = tensor if rule.change is None else _UNDO[rule.change](tensor)
                break
        else:
            lost.append(name)
    if lost:
        raise ValueError(f"{plural(len(lost), 'tensor')} cannot be renamed: {listed(lost)}")
    return theirs


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and the number of further names."""
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


def _origin(rule: Rule | Unsupported, ours: str) -> str | None:
    """Name in the file that a rule renames to this name; None if there is none or the change is not invertible."""
    if isinstance(rule, Unsupported) or rule.ours is None or rule.change not in (None, *_UNDO):
        return None
    placeholders: list[tuple[str, int, int]] = []

    def part(place: re.Match[str]) -> str:
        if place[0] == "*":
            return "(?P<rest>.+)"
        placeholders.append((place[1], int(place[2] or 1), int(place[3] or 0)))
        return rf"(?P<{place[1]}>\d+)"

    pieces = re.split(r"(\*|\{[^}]*\})", rule.ours)
    places = [re.sub(r"\*|\{(\w+?)(?:\*(\d+))?([+-]\d+)?\}", part, piece) for piece in pieces[1::2]]
    texts = [re.escape(piece) for piece in pieces[::2]]
    match = re.fullmatch("".join(a + b for a, b in zip(texts, [*places, ""], strict=True)), ours)
    if match is None:
        return None
    name = rule.theirs.replace("*", match["rest"]) if "*" in rule.theirs else rule.theirs
    for key, times, plus in placeholders:
        number, rest = divmod(int(match[key]) - plus, times)
        if rest or number < 0:
            return None
        name = name.replace(f"{{{key}}}", str(number))
    return name


# Changes


def background_to_last(rows: Tensor) -> Tensor:
    """[1 + C, ...] with background first -> [C + 1, ...] with it last."""
    return torch.cat([rows[1:], rows[:1]])


def without_background(rows: Tensor) -> Tensor:
    """[1 + C, ...] with background first -> [C, ...]."""
    return rows[1:]


def without_background_deltas(rows: Tensor) -> Tensor:
    """[4 * (1 + C), ...] with background first -> [4 * C, ...]; class-agnostic [4, ...] stay unchanged."""
    return rows if rows.shape[0] == 4 else rows[4:]


def background_to_first(rows: Tensor) -> Tensor:
    """[C + 1, ...] with background last -> [1 + C, ...] with it first."""
    return torch.cat([rows[-1:], rows[:-1]])


def with_background(rows: Tensor) -> Tensor:
    """[C, ...] -> [1 + C, ...] with zeros for background first."""
    return torch.cat([torch.zeros_like(rows[:1]), rows])


def with_background_deltas(rows: Tensor) -> Tensor:
    """[4 * C, ...] -> [4 * (1 + C), ...] with zeros for background first."""
    return torch.cat([torch.zeros_like(rows[:4]), rows])


_UNDO: dict[Change, Change] = {
    background_to_last: background_to_first,
    without_background: with_background,
    without_background_deltas: with_background_deltas,
}
"""Inverse of each change. Dropped rows become zeros: they belong to the background and are never read."""


def ratios_outermost(rows: Tensor) -> Tensor:
    """Reorder RetinaNet's last layers from sizes outermost to ratios outermost, Boxwright's order.

    Args:
        rows: [S * R * values, ...], S = R = 3 as in the paper.
    """
    if rows.shape[0] % 9:
        raise ValueError(f"{rows.shape[0]} rows cannot be divided among 3 x 3 anchors per position")
    return rows.reshape(3, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def with_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add neutral statistics to norm layers that consist of a scale and a bias only.

    Args:
        tensors: Tensors by Boxwright's names. The norm layers of the body may lack `running_mean` and `running_var`. If
            the norm layers of the pyramid lack them too, all norm layers are GroupNorms and stay unchanged.
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
    """Add `num_batches_tracked` of BatchNorm layers, which files may lack and which has no effect.

    Args:
        tensors: Tensors by Boxwright's names. The backbone has BatchNorm if the pyramid has BatchNorm.
    """
    if "backbone.lateral.0.1.running_var" not in tensors:
        return tensors
    norms = [name for name in tensors if name.startswith("backbone.") and name.endswith(".running_var")]
    counts = [name.removesuffix("running_var") + "num_batches_tracked" for name in norms]
    return tensors | {name: torch.zeros((), dtype=torch.int64) for name in counts}


def with_norm_eps(tensors: dict[str, Tensor], theirs: float, ours: float) -> dict[str, Tensor]:
    """Change the norm layers of the body for another epsilon, with equal outputs.

    The difference of the epsilons is added to the variances. If a variance would become negative, the scale changes.

    Args:
        tensors: Tensors by Boxwright's names.
        theirs: Epsilon of the source.
        ours: Epsilon of Boxwright.
    """
    changed = dict(tensors)
    for name, variance in tensors.items():
        scale = name.removesuffix("running_var") + "weight"
        if name.startswith("backbone.body.") and name.endswith("running_var") and scale in tensors:
            changed[name] = (variance.double() + theirs - ours).clamp(min=0).to(variance.dtype)
            factor = ((changed[name].double() + ours) / (variance.double() + theirs)).sqrt()
            changed[scale] = (tensors[scale].double() * factor).to(tensors[scale].dtype)
    return changed
