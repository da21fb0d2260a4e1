"""Generate the page "Benchmark and Model Zoo" from stored benchmark reports and published metrics of zoo models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from boxwright.benchmark.comparison import memory, performance, speed
from boxwright.benchmark.model_tables import model_tables
from boxwright.benchmark.stored import read_stored
from boxwright.zoo import Entry

_HEAD = """# Benchmark and Model Zoo

`boxwright zoo page --out docs/model_zoo/benchmark.md` generates this page. Boxwright's figures come from the reports of
`boxwright benchmark` in `{folder}` ([how they are measured](../guides/measure.md)). The other figures were published
with the models ([zoo](index.md)). Cells without a measurement are empty."""

_SETTINGS = """## Common settings

- 1x is 12 epochs on COCO train2017 and 2x is 24 epochs, with batch size 16. The last column names the recipe of a
  Boxwright model or the published model. In that column, a number in brackets is the machine and a letter is the source
  of published figures.
- "Mem" is the peak memory of training, measured in a separate process: on a GPU the memory reserved by torch, on a CPU
  the resident set size of the process, including its libraries.
- "Train time" is the median time of a training step on images in memory: losses, gradients, clipping and optimizer.
- "Inf time" is images/s for the whole pipeline: decoding, resizing, forward pass, and post-processing to boxes and
  run-length encoded masks in the pixel coordinates of the image file.
- Unless a report names a dataset or a weights file, images are generated (long side 640 pixels, 1 to 8 objects) and
  weights are random, scaled so that about as many boxes pass the thresholds as with a trained model.
- Published speeds were measured on other machines and are not comparable with Boxwright's."""

_COMPARISON = """## Comparison with peers

Each peer has the same architecture and images as Boxwright and runs in alternation with it on the same machine. A ratio
is the median over the rounds (min-max). torchvision also has Boxwright's weights. Its frozen batch norm does not train
the scale and bias, which Boxwright's does, and it pastes masks but does not run-length encode them. Detectron2 and
mmdetection run in separate processes, with their published hyperparameters and with random weights scaled in the same
way as Boxwright's.

### Performance

Published accuracy of R-50-FPN models: box AP (& mask AP), and AR1000 for RPN."""

_SPEED = """### Training speed

Seconds per step; lower is better. The floor is the time that the operations of convolutions and matrix products would
take at the best rate that a convolution reached on the machine."""


_INFERENCE_SPEED = """### Inference speed

Seconds per batch for the forward pass and post-processing, without data loading; lower is better."""


def write_page(folder: Path, zoo: Mapping[str, Entry]) -> str:
    """Return the page as Markdown.

    Args:
        folder: folder of the stored reports.
        zoo: published models by name.

    Raises:
        ValueError: a JSON file of the folder is not a report.
    """
    stored = read_stored(folder)
    sources = {entry.collection.title: entry.collection.source for entry in zoo.values()}
    titles = list(sources)
    letters = [
        f"- [{chr(ord('A') + index)}] {title}: {source}" for index, (title, source) in enumerate(sources.items())
    ]
    machines: dict[str, None] = {}
    software: dict[str, None] = {}
    for item in stored:
        machines[f"- [{item.machine}] {_joined(item.report.machine)}"] = None
        software[f"- {_joined(item.report.versions)}"] = None
    sections = [
        _HEAD.format(folder=folder.as_posix()),
        "## Environment",
        "### Hardware",
        "\n".join(machines),
        "### Software environment",
        "\n".join(software),
        "### Sources of published figures",
        "\n".join(letters),
        _SETTINGS,
        "## Baselines",
        *model_tables(stored, zoo, titles),
        _COMPARISON,
        performance(zoo, titles),
        _SPEED,
        speed(stored, "train"),
        _INFERENCE_SPEED,
        speed(stored, "infer"),
        "### Training memory",
        memory(stored),
        "## Commands",
        "\n\n".join(f"`{item.name}.json`:\n\n```\n{item.report.command}\n```" for item in stored),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _joined(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
