"""Model tables of the benchmark page, one per family: Boxwright's measurements and the figures of published models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from boxwright.benchmark.report import Case, Memory, Timing
from boxwright.benchmark.stored import GB, StoredReport, conditions, peak_bytes
from boxwright.benchmark.table import table
from boxwright.recipes import built_in_recipes
from boxwright.training.experiment import Experiment, arguments_of, call_name
from boxwright.zoo import Entry

FAMILIES = {
    "rpn": "RPN",
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "fast_rcnn": "Fast R-CNN (with precomputed proposals)",
    "fast_mask_rcnn": "Mask R-CNN (with precomputed proposals)",
    "cascade_rcnn": "Cascade R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
}


def recipe_family(recipe: str) -> str:
    """The family of the model that a built-in recipe builds: a key of `FAMILIES`."""
    return call_name(built_in_recipes()[recipe]().model).rpartition(".")[2].replace("proposal_network", "rpn")


def accuracy_metrics(family: str) -> Sequence[str]:
    """The accuracy metrics reported for a family."""
    if family == "rpn":
        return ("AR1000",)
    return ("box AP", "mask AP") if "mask" in family else ("box AP",)


def backbone_and_schedule(experiment: Experiment) -> tuple[str, str, str]:
    """Backbone, style and schedule, named as in mmdetection's MODEL_ZOO.md: ("R-50-FPN", "pytorch", "1x")."""
    arguments = arguments_of(arguments_of(experiment.model)["backbone"])
    kind = "R" if arguments["groups"] == 1 else "X"
    width = "" if arguments["groups"] == 1 else f"-{arguments['groups']}x{arguments['width_per_group']}d"
    schedule = {12: "1x", 24: "2x"}.get(experiment.epochs, f"{experiment.epochs} epochs")
    return f"{kind}-{arguments['depth']}{width}-FPN", arguments["style"], schedule


def schedule_of(entry: Entry) -> str:
    """The schedule in a published model's name, such as "1x" or "20 epochs"; empty if the name has none.

    The entry's recipe describes only the architecture, not how the model was trained.
    """
    match = re.search(r"_(\d+)(x|e)(_|$)", entry.model.name)
    return "" if match is None else f"{match[1]}x" if match[2] == "x" else f"{match[1]} epochs"


def model_tables(stored: Sequence[StoredReport], zoo: Mapping[str, Entry], sources: Sequence[str]) -> list[str]:
    """One section with a heading and a table for each family.

    Args:
        stored: Boxwright's measurements.
        zoo: published models by name.
        sources: titles of the collections in the zoo, in the order of the letters A, B, ... that refer to them.
    """
    recipes = {name: recipe_family(name) for name in built_in_recipes()}
    sections = []
    for family, title in FAMILIES.items():
        figures = accuracy_metrics(family)
        head = ["Backbone", "Style", "Lr schd", "Mem (GB)", "Train time (s/iter)", "Inf time (img/s)", *figures]
        rows: list[list[str]] = []
        for name in (name for name, kind in recipes.items() if kind == family):
            backbone, style, schedule = backbone_and_schedule(built_in_recipes()[name]())
            measured = _measured_rows(name, stored, len(figures))
            rows += [
                [backbone, style, schedule, *row]
                for row in measured or [["", "", "", *[""] * len(figures), "", f"`{name}`"]]
            ]
            entries = [entry for entry in zoo.values() if entry.model.recipe == name]
            rows += [
                [backbone, style, schedule_of(entry), *_published_row(entry, figures, sources)] for entry in entries
            ]
        sections.append(f"### {title}\n\n" + table([*head, "Download", "Measured"], rows))
    return sections


def _measured_rows(recipe: str, stored: Sequence[StoredReport], num_figures: int) -> list[list[str]]:
    """Rows for all conditions under which a recipe was measured.

    If several files hold the same measurement, the first one is used.
    """
    groups: dict[tuple[object, ...], _Group] = {}

    def group(case: Case, machine: int) -> _Group:
        key = (machine, tuple(case.settings), case.asked_size, case.precision, case.dataset, case.weights)
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
    return [row for group in groups.values() for row in group.rows(recipe, num_figures)]


class _Group(NamedTuple):
    """Measurements of one recipe under the same conditions; the keys are batch sizes."""

    machine: int
    train: dict[int, Timing]
    infer: dict[int, Timing]
    memory: dict[int, Memory]

    def rows(self, recipe: str, num_figures: int) -> Iterator[list[str]]:
        """Rows that pair training and inference batch sizes, both in ascending order."""
        train_batches = sorted(self.train.keys() | self.memory.keys())
        for train_batch, infer_batch in zip_longest(train_batches, sorted(self.infer)):
            train, memory = self.train.get(train_batch), self.memory.get(train_batch)
            infer = self.infer.get(infer_batch)
            cases = [measured.case for measured in (train or memory, infer) if measured is not None]
            text = "; ".join(f"{case.task} {conditions(case, self.machine)}" for case in cases)
            mem = "" if memory is None else f"{peak_bytes(memory) / GB:.2f}"
            time = "" if train is None else f"{train.median:.3f}"
            rate = "" if infer is None else f"{infer.images_per_second:.2f}"
            yield [mem, time, rate, *[""] * num_figures, "", f"`{recipe}`: {text}"]


def _published_row(entry: Entry, figures: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Cells of a published model, ending with its name and the letter of its source."""
    published, model = entry.model.figures, entry.model
    cells = [f"{published[name]:g}" if name in published else "" for name in ("GB", "s/iter", "images/s", *figures)]
    mirror = entry.collection.mirrors[0]
    links = [f"[model]({mirror}{model.file})", *([f"[result]({mirror}{model.results})"] if model.results else [])]
    letter = chr(ord("A") + sources.index(entry.collection.title))
    return [*cells, " \\| ".join(links), f"`{model.name}` [{letter}]"]
