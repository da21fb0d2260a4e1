"""Write the generated pages of docs/reference from the code: `python docs/make_reference.py`.

The pages are committed, so that they can be read in the repository; a test compares them with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from typer.cli import get_docs_for_click

from boxwright.cli.main import app
from boxwright.data.augment import Photometric
from boxwright.data.buckets import Resize
from boxwright.detectors.cascade_rcnn import CascadeConfig
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.recipes import built_in_recipes
from boxwright.training.experiment import SGD, AdamW, CosineSchedule, Experiment, StepSchedule, build

REFERENCE = Path(__file__).resolve().parent / "reference"

CONFIGURATIONS = {
    Experiment: "epochs",
    Resize: "resize.short",
    Photometric: "photometric.brightness",
    SGD: "optimizer.lr",
    AdamW: "optimizer.betas",
    StepSchedule: "schedule.epochs",
    CosineSchedule: "schedule.final_factor",
    RPNConfig: "model.rpn.nms_iou",
    BoxConfig: "model.box.score_threshold",
    MaskConfig: "model.mask.width",
    RetinaConfig: "model.retina.gamma",
    CascadeConfig: "model.cascade.positive_ious",
}
"""Configuration classes, each with the name that `--set` uses for one of its fields."""


def command_line() -> str:
    """Return the page of all commands and options, as typer writes it."""
    command: Any = typer.main.get_command(app)
    _write_out_summaries(command)
    context = command.context_class(command, info_name="boxwright")
    page = get_docs_for_click(obj=command, ctx=context, name="boxwright")
    page = html.unescape(page).replace("```console\n$ ", "```text\n")
    start = "# Command line\n\n```bash\nboxwright --help\n```\n\n"
    return start + page.split("\n", 2)[2].strip() + "\n"


def configuration() -> str:
    """Return the page of all fields of an experiment and of the parts of its model."""
    lines = [
        "# Configuration",
        "",
        "```bash",
        "boxwright train faster_rcnn_r50_fpn_1x --show",
        "```",
        "",
        "An `Experiment` is a frozen dataclass. `boxwright train RECIPE --show` prints its fields with their values.",
        "`--set NAME=VALUE` changes one. In Python, use `dataclasses.replace`.",
    ]
    for config, example in CONFIGURATIONS.items():
        lines += ["", f"## {config.__name__}", "", textwrap.fill(_summary(config), 120), ""]
        lines += [
            f"Example: `--set {example}=...`",
            "",
            "| field | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in _fields(config)]
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Return the page of all recipes, each with its docstring and the size of its model."""
    lines = [
        "# Recipes",
        "",
        "```bash",
        "boxwright train faster_rcnn_r50_fpn_1x --show",
        "```",
        "",
        "A recipe is a function that returns an `Experiment`. `boxwright train NAME --data DIR` trains it.",
        "Parameters are counted for the 80 classes of COCO. Published figures: [Models](../model_zoo/models.md).",
        "",
        "| recipe | model and training | parameters, M | trainable, M |",
        "| --- | --- | --- | --- |",
    ]
    for name, recipe in built_in_recipes().items():
        with torch.device("meta"):
            parameters = list(build(recipe().model, num_classes=80).parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        lines.append(f"| `{name}` | {_summary(recipe)} | {total / 1e6:.2f} | {trainable / 1e6:.2f} |")
    return "\n".join(lines) + "\n"


def _write_out_summaries(command: Any) -> None:
    """List each command with its first paragraph, which click would cut after 45 characters."""
    for subcommand in getattr(command, "commands", {}).values():
        subcommand.short_help = " ".join(subcommand.help.split("\n\n")[0].split())
        _write_out_summaries(subcommand)


def _fields(config: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field. The meaning is the string below the field."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(node, ast.ClassDef)
    meanings = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            meanings[statement.target.id] = " ".join(ast.literal_eval(below.value).split())
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            default = _value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = f"{field.default_factory()!r}".split("(")[0] + "()"
        else:
            default = ""
        yield f"`{field.name}`", f"`{field.type}`", f"`{default}`" if default else "required", meanings[field.name]


def _value(default: Any) -> str:
    return f"{default:.4g}" if isinstance(default, float) else repr(default)


def _summary(documented: Any) -> str:
    """First paragraph of a docstring."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"command_line.md": command_line, "configuration.md": configuration, "recipes.md": recipes}


if __name__ == "__main__":
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), "utf-8")
