"""Describe weights files in text lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from boxwright.text import plural
from boxwright.training.experiment import Experiment, arguments_of, call_name

_SETTINGS = {
    "pixel_stats": ("order", "mean", "std"),
    "conventions": ("plus_one", "anchor_rounding", "roi_align_aligned", "roi_align_plus_one", "proposal_clip_multiple"),
    "rpn": ("test_pre_nms_per_level", "test_num_proposals", "nms_iou"),
    "box": ("sampling_ratio", "score_threshold", "nms_iou", "max_detections"),
    "cascade": ("mean_of",),
    "mask": ("sampling_ratio",),
    "retina": (
        "ratios",
        "clip_first",
        "drop_empty",
        "pre_nms_per_level",
        "score_threshold",
        "nms_iou",
        "max_detections",
    ),
}
"""Settings that affect detections and that files of other libraries do not contain."""


def model_line(experiment: Experiment, num_classes: int) -> str:
    """Name of the model, with backbone and number of classes."""
    backbone = arguments_of(arguments_of(experiment.model)["backbone"])
    body = f", ResNet of depth {backbone['depth']}" if "depth" in backbone else ""
    groups = f", {backbone['groups']} groups" if backbone.get("groups", 1) > 1 else ""
    return f"{call_name(experiment.model).rpartition('.')[2]}{body}{groups}, {num_classes} classes"


def settings_of(experiment: Experiment) -> Iterator[str]:
    """`name = value` lines of the settings that tensors do not determine, for `--set`."""
    model = arguments_of(experiment.model)
    backbone = arguments_of(model["backbone"])
    for name in ("style", "extra_relu"):
        if name in backbone:
            yield f"model.backbone.{name} = {backbone[name]}"
    for part, names in _SETTINGS.items():
        if part in model:
            values = arguments_of(model[part])
            yield from (f"model.{part}.{name} = {_text(values[name])}" for name in names)
    yield f"resize.short = {experiment.resize.short}"
    yield f"resize.long = {experiment.resize.long}"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def summary_of(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """One line per part of a model: number of tensors, number of elements, dtypes."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        part = f"{first}.{rest.partition('.')[0]}" if first == "backbone" else first
        parts.setdefault(part, []).append(tensor)
    for part, members in sorted(parts.items()):
        kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in members)
        elements = sum(tensor.numel() for tensor in members)
        yield f"{part}: {plural(len(members), 'tensor')}, {plural(elements, 'element')}, {', '.join(sorted(kinds))}"


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[str]:
    """One line per tensor that exists in one file only or differs in shape or value; largest differences first."""
    yield from (f"only in A: {name} {list(a[name].shape)}" for name in sorted(a.keys() - b.keys()))
    yield from (f"only in B: {name} {list(b[name].shape)}" for name in sorted(b.keys() - a.keys()))
    gaps = []
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            yield f"shape: {name} {list(a[name].shape)} in A, {list(b[name].shape)} in B"
        elif not torch.equal(a[name], b[name]):
            gap = (a[name].double() - b[name].double()).abs().max().item()
            gaps.append((gap, name))
    for gap, name in sorted(gaps, reverse=True):
        yield f"value: {name} maximum difference {gap:.3g}"
