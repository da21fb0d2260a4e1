"""`boxwright benchmark`: what recipes cost in time and memory, alone or beside a peer."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def benchmark(
    recipes: Annotated[
        list[str], typer.Argument(help="Built-in ones, such as faster_rcnn_r50_fpn_1x, or package.module:function.")
    ],
    phases: Annotated[
        str,
        typer.Option(
            help="Of train, infer, train-loader, infer-loader, memory, parts and flops, with commas.",
            show_default="all",
        ),
    ] = "",
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="What pictures are brought to, as 800x1333.", show_default="the recipe's"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time.", show_default="the recipe's in training, 1 in inference"),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Times that count.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Times before them that do not.")] = 2,
    precision: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or auto.", show_default="the recipe's")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="PEER", help="Measure alternately with torchvision, detectron2 or mmdetection."),
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="The interpreter that has detectron2 or mmdetection.")
    ] = None,
    peer_precision: Annotated[str | None, typer.Option(help="Precision of the peer.", show_default="the same")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a data set to take pictures of.", show_default="they are generated")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights file of the model.", show_default="random weights")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the recipes, as train does; repeatable."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the arithmetic on the CPU.", show_default="torch's own")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each time and all else as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the printed tables.")] = None,
) -> None:
    """Measure recipes: time, memory, where the time goes, operations; and print tables."""
    import torch

    from boxwright.benchmark.plan import Plan, parse_phases, parse_precision, parse_size
    from boxwright.benchmark.report import write_report
    from boxwright.benchmark.run import measure
    from boxwright.benchmark.table import markdown as tables
    from boxwright.cli.options import search_current_folder

    shared: dict[str, Any] = {
        "settings": settings or [],
        "size": None if size is None else parse_size(size),
        "batch": batch,
        "iterations": iterations,
        "warmup": warmup,
        "precision": parse_precision(precision),
        "peer_precision": parse_precision(peer_precision),
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
