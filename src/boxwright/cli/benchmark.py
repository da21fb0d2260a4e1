"""`boxwright benchmark`: measure time and memory of recipes, optionally against a peer."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def benchmark(
    recipes: Annotated[
        list[str],
        typer.Argument(help="Names of built-in recipes, such as faster_rcnn_r50_fpn_1x, or package.module:function."),
    ],
    phases: Annotated[
        str,
        typer.Option(
            help="Phases, separated by commas: train, infer, train-loader, infer-loader, memory, parts and flops.",
            show_default="all",
        ),
    ] = "",
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Image size, such as 800x1333.", show_default="as in the recipe"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size.", show_default="as in the recipe for training, 1 for inference"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, hidden=True, help="Deprecated name of --batch-size.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Number of measured iterations.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Number of warm-up iterations.")] = 2,
    precision: Annotated[
        str | None, typer.Option(help="Precision: float32, bfloat16 or auto.", show_default="as in the recipe")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="PEER", help="Peer to measure in alternation: torchvision, detectron2 or mmdetection."),
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="Python interpreter in which detectron2 or mmdetection is installed."),
    ] = None,
    peer_precision: Annotated[
        str | None, typer.Option(help="Precision of the peer.", show_default="as --precision")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a data set whose images are used.", show_default="generated images")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights file of the model.", show_default="random weights")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Field of the recipes to change, as in boxwright train; repeatable."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="as in torch")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Number of data loading workers.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="cuda if available")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for all measurements.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Markdown file for the tables.")] = None,
) -> None:
    """Measure time, memory, time per part and number of operations of recipes, and print tables."""
    import torch

    from boxwright.benchmark.plan import Plan, parse_phases, parse_precision, parse_size
    from boxwright.benchmark.report import write_report
    from boxwright.benchmark.run import measure
    from boxwright.benchmark.table import markdown as tables
    from boxwright.cli.options import renamed, search_current_folder

    shared: dict[str, Any] = {
        "settings": settings or [],
        "size": None if size is None else parse_size(size),
        "batch": renamed(batch_size, "--batch-size", batch, "--batch"),
        "iterations": iterations,
        "warmup": warmup,
        "precision": parse_precision(precision),
        "peer_precision": parse_precision(peer_precision, "--peer-precision"),
        "threads": threads,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "workers": workers,
        "data": "" if data is None else str(data),
        "weights": "" if weights is None else str(weights),
        "peer": against or "",
        "peer_python": "" if peer_python is None else str(peer_python),
    }
    for recipe in recipes:
        search_current_folder(recipe)
    report = measure(
        [Plan(recipe=recipe, **shared) for recipe in recipes],
        parse_phases(phases),
        command=shlex.join(["boxwright", *sys.argv[1:]]),
        log=lambda line: typer.echo(line, err=True),
    )
    text = tables(report)
    typer.echo(text, nl=False)
    if json is not None:
        write_report(json, report)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text, encoding="utf-8")
