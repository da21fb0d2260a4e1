"""Writes the page "Benchmark and Model Zoo" from stored measurements and published figures, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from boxwright.benchmark.comparison import memory, performance, speed
from boxwright.benchmark.model_tables import model_tables
from boxwright.benchmark.stored import read_stored
from boxwright.zoo import Entry

_HEAD = """# Benchmark and Model Zoo

`boxwright zoo page --out docs/benchmark.md` writes this page from the files in `{folder}`, which `boxwright benchmark`
wrote ([how it measures](measuring.md)), and from the figures that others published with their models ([the
zoo](zoo.md)). A cell that was never measured is empty."""

_SETTINGS = """## Common settings

- 1x is 12 epochs of COCO train2017 and 2x is 24, in batches of 16 images. Boxwright's models are those of the recipes
  that the last column names; a number in brackets is the machine, a letter the source of figures that are not ours.
- "Mem" is the peak of training: on a GPU what torch had reserved, on the CPU the resident memory of the whole process,
  its libraries included; in a process of its own.
- "Train time" is the median of steps on pictures that are in memory: losses, gradients, clipping, optimizer.
- "Inf time" is images/s with all of it: decoding and scaling pictures, forward, and post-processing to boxes and
  run-length encoded masks in the pixels of the file.
- Unless the file says otherwise, pictures are generated (640 pixels long, 1 to 8 objects), and weights are random,
  scaled so that as many boxes pass the thresholds as with a trained model.
- What others published was measured on their machines and is not comparable in speed."""

_COMPARISON = """## Comparison with peers

Peers are measured with the same architecture and pictures, in turns with ours on the same machine; a ratio is the
median over these turns (least to most). torchvision has our weights too. It keeps its own frozen normalisation, whose
scale and bias do not learn as ours do, and its masks are pasted but not encoded as ours are. Detectron2 and mmdetection
run in processes of their own, with their published numbers and random weights that are settled as ours are.

### Performance

Of R-50-FPN, as published by each source: box AP (and mask AP), AR1000 of RPN."""

_SPEED = """### Training speed

Seconds a step, the lower the better. The floor is what the operations of convolutions and matrix products would take at
the best rate that a convolution reached on the machine."""


def write_page(folder: Path, zoo: Mapping[str, Entry]) -> str:
    """The page as Markdown.

    Args:
        folder: of the stored measurements.
        zoo: the published models.

    Raises:
        ValueError: a file of the folder is no measurement.
    """
    stored = read_stored(folder)
    sources = list(dict.fromkeys(entry.collection.title for entry in zoo.values()))
    described = {entry.collection.title: entry.collection.source for entry in zoo.values()}
    letters = [f"- [{chr(ord('A') + number)}] {title}: {described[title]}" for number, title in enumerate(sources)]
    machines: dict[str, None] = {}
    software: dict[str, None] = {}
    for one in stored:
        machines[f"- [{one.machine}] {_listed(one.report.machine)}"] = None
        software[f"- {_listed(one.report.versions)}"] = None
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
        *model_tables(stored, zoo, sources),
        _COMPARISON,
        performance(zoo, sources),
        _SPEED,
        speed(stored, "train"),
        "### Inference speed\n\nSeconds a batch of forward and post-processing, without loading; the lower the better.",
        speed(stored, "infer"),
        "### Training memory",
        memory(stored),
        "## Commands",
        "\n\n".join(f"`{one.name}.json`:\n\n```\n{one.report.command}\n```" for one in stored),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
