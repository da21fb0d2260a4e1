"""The page's tables of models, one a family: what Boxwright measured, and beside it what others published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from boxwright.benchmark.report import Case, Memory, Timing
from boxwright.benchmark.stored import GB, Stored, peak_bytes, setting
from boxwright.benchmark.table import table
from boxwright.recipes import built_in_recipes
from boxwright.training.experiment import Experiment, arguments_of, call_name
from boxwright.zoo import Entry

FAMILIES = {
    "rpn": "RPN",
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "fast_rcnn": "Fast R-CNN (with proposals computed before)",
    "fast_mask_rcnn": "Mask R-CNN (with proposals computed before)",
    "cascade_rcnn": "Cascade R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
}
_ACCURACY = {"rpn": ("AR1000",)}
_MASKS = ("box AP", "mask AP")


def family_of(recipe: str) -> str:
    """The kind of model that a built-in recipe makes."""
    return call_name(built_in_recipes()[recipe]().model).rpartition(".")[2].replace("proposal_network", "rpn")


def accuracy(family: str) -> Sequence[str]:
    """The figures of accuracy that a family has."""
    return _ACCURACY.get(family, _MASKS if "mask" in family else ("box AP",))


def looks(experiment: Experiment) -> tuple[str, str, str]:
    """Backbone, style and schedule as the 2018 tables name them."""
    given = arguments_of(arguments_of(experiment.model)["backbone"])
    kind = "R" if given["groups"] == 1 else "X"
    width = "" if given["groups"] == 1 else f"-{given['groups']}x{given['width_per_group']}d"
    schedule = {12: "1x", 24: "2x"}.get(experiment.epochs, f"{experiment.epochs} epochs")
    return f"{kind}-{given['depth']}{width}-FPN", given["style"], schedule


def schedule_of(entry: Entry) -> str:
    """How long a published model was trained, where its name says so: its recipe has its architecture alone."""
    stated = re.search(r"_(\d+)(x|e)(_|$)", entry.model.name)
    return "" if stated is None else f"{stated[1]}x" if stated[2] == "x" else f"{stated[1]} epochs"


def model_tables(stored: Sequence[Stored], zoo: Mapping[str, Entry], sources: Sequence[str]) -> list[str]:
    """A section for each family.

    Args:
        stored: what was measured.
        zoo: what others published.
        sources: the titles of their collections, which the table calls A, B, ...
    """
    recipes = {name: family_of(name) for name in built_in_recipes()}
    sections = []
    for family, title in FAMILIES.items():
        figures = accuracy(family)
        head = ["Backbone", "Style", "Lr schd", "Mem (GB)", "Train time (s/iter)", "Inf time (img/s)", *figures]
        rows: list[list[str]] = []
        for name in (name for name, kind in recipes.items() if kind == family):
            backbone, style, schedule = looks(built_in_recipes()[name]())
            own = _measured_rows(name, stored, len(figures))
            rows += [
                [backbone, style, schedule, *row]
                for row in own or [["", "", "", *[""] * len(figures), "", f"`{name}`"]]
            ]
            entries = [entry for entry in zoo.values() if entry.model.recipe == name]
            rows += [
                [backbone, style, schedule_of(entry), *_published_row(entry, figures, sources)] for entry in entries
            ]
        sections.append(f"### {title}\n\n" + table([*head, "Download", "Measured"], rows))
    return sections


def _measured_rows(recipe: str, stored: Sequence[Stored], num_figures: int) -> list[list[str]]:
    """A row for each way in which the recipe was measured, ending with it; of several files the first one counts."""
    groups: dict[tuple[object, ...], _Group] = {}

    def group(case: Case, machine: int) -> _Group:
        key = (machine, tuple(case.settings), case.asked_size, case.precision, case.pictures, case.weights)
        return groups.setdefault(key, _Group(machine, {}, {}, {}))

    for _, machine, report in stored:
        for timing in report.timings:
            case = timing.case
            if (case.recipe, case.system) == (recipe, "boxwright") and timing.loading == (case.task == "infer"):
                column = group(case, machine).train if case.task == "train" else group(case, machine).infer
                column.setdefault(case.batch, timing)
        for peak in report.memory:
            if (peak.case.recipe, peak.case.system, peak.case.task) == (recipe, "boxwright", "train"):
                group(peak.case, machine).memory.setdefault(peak.case.batch, peak)
    return [row for one in groups.values() for row in one.rows(recipe, num_figures)]


class _Group(NamedTuple):
    """What was measured in one way, by images at a time."""

    machine: int
    train: dict[int, Timing]
    infer: dict[int, Timing]
    memory: dict[int, Memory]

    def rows(self, recipe: str, num_figures: int) -> Iterator[list[str]]:
        """A number of images in training and one in inference a row."""
        batches = sorted(self.train.keys() | self.memory.keys())
        for batch, images in zip_longest(batches, sorted(self.infer)):
            train, memory, infer = self.train.get(batch), self.memory.get(batch), self.infer.get(images)
            cases = [one.case for one in (train or memory, infer) if one is not None]
            under = "; ".join(f"{case.task} {setting(case, self.machine)}" for case in cases)
            mem = "" if memory is None else f"{peak_bytes(memory) / GB:.2f}"
            time = "" if train is None else f"{train.median:.3f}"
            rate = "" if infer is None else f"{infer.images_per_second:.2f}"
            yield [mem, time, rate, *[""] * num_figures, "", f"`{recipe}`: {under}"]


def _published_row(entry: Entry, figures: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Somebody else's figures, and whose they are."""
    known, model = entry.model.figures, entry.model
    cells = [f"{known[name]:g}" if name in known else "" for name in ("GB", "s/iter", "images/s", *figures)]
    mirror = entry.collection.mirrors[0]
    links = [f"[model]({mirror}{model.file})", *([f"[result]({mirror}{model.results})"] if model.results else [])]
    letter = chr(ord("A") + sources.index(entry.collection.title))
    return [*cells, " \\| ".join(links), f"`{model.name}` [{letter}]"]
