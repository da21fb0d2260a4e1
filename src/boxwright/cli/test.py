"""`boxwright test`: measure a model on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from boxwright.cli.options import PrecisionOption

if TYPE_CHECKING:
    import numpy as np

    from boxwright.data.dataset import Category
    from boxwright.evaluation.coco import CocoMetrics


def measure(
    model: Annotated[str, typer.Argument(help="A run's folder, a weights file, its URL, or a model of the zoo.")],
    data: Annotated[Path | None, typer.Option(help="Folder of a data set, in any format that Boxwright reads.")] = None,
    split: Annotated[str, typer.Option(help="Which split of it: train, val or test.")] = "val",
    annotations: Annotated[
        Path | None, typer.Option(help="Annotations of one split, such as a COCO file, instead of --data.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of its images.")] = None,
    proposals: Annotated[
        Path | None, typer.Option(help="Proposals file, for a model without an RPN; boxwright propose writes it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and report.html.",
            show_default="RUN/evaluation/SPLIT, or another name there if that holds another evaluation",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, for each process.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images, for each process.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")] = None,
    precision: PrecisionOption = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            min=11,
            help="Detections that count for each image and class; COCO's own numbers are for 100.",
            show_default="100, or what the model gives an image if that is more",
        ),
    ] = None,
    metric: Annotated[
        Literal["coco", "voc07", "voc12"],
        typer.Option(
            help="COCO's AP, or Pascal VOC's at IoU 0.5: of eleven points (voc07) or the area under the curve (voc12)."
        ),
    ] = "coco",
    trust: Annotated[
        list[str] | None, typer.Option(help="A module of yours that the model's parts come from; may be repeated.")
    ] = None,
    tta: Annotated[
        bool,
        typer.Option("--tta", help="Test-time augmentation: look at each image several times, merge what is found."),
    ] = False,
    tta_short: Annotated[
        str | None,
        typer.Option(help="With --tta, the short sides to look at, as 640,800,960; the model's own if left out."),
    ] = None,
    tta_flip: Annotated[bool, typer.Option(help="With --tta, whether to look at mirrored images too.")] = True,
) -> None:
    """Measure a model: AP of boxes and masks (or AR of proposals), results.json and report.html.

    Each evaluation of a run has its own folder in RUN/evaluation.

    Start it by torchrun to share the images out over several devices.
    """
    from boxwright.cli.console import ImageProgress, print_numbers
    from boxwright.data.formats import Split, find_layout
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.loader import EvaluationLoader
    from boxwright.data.proposals_foreign import open_proposals
    from boxwright.detectors.detector import require_proposals
    from boxwright.evaluation.evaluate import evaluate_proposals
    from boxwright.evaluation.results import match_categories, write_results
    from boxwright.evaluation.views import View, evaluate_views, view_suppression, views_of
    from boxwright.evaluation.voc import voc_metrics
    from boxwright.predictor import load, weights_file
    from boxwright.report.evaluations import Evaluation, data_name, evaluation_folder, numbers_of
    from boxwright.report.html import write_report
    from boxwright.training.distributed import process_group, rank, world_size
    from boxwright.weights.download import sha256_of
    from boxwright.weights.fetch import is_url
    from boxwright.weights.hub import is_hub_uri
    from boxwright.zoo import load_zoo

    if out is None and (is_url(model) or is_hub_uri(model) or (not Path(model).exists() and model in load_zoo())):
        raise ValueError("a model from elsewhere has no folder for what is measured: give --out")
    if annotations is not None and images is not None and data is None:
        chosen_split = Split(annotations, images)
    elif data is not None and annotations is None and images is None:
        layout = find_layout(data)
        if split not in layout:
            raise ValueError(f"{data} has no split {split!r}, only {', '.join(layout)}: name one with --split")
        chosen_split = layout[split]
    else:
        raise ValueError("give either --data FOLDER, or --annotations FILE and --images FOLDER")
    if not tta and (tta_short is not None or not tta_flip):
        raise ValueError("--tta-short and --no-tta-flip say how to augment in testing: give --tta as well")
    shorts = _short_sides(tta_short)
    weights = weights_file(model)
    run = weights.parent
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        require_proposals(predictor.detector, proposals is not None)
        dataset = IndexedDataset(*chosen_split)
        limit = predictor.experiment.given_proposals
        given = open_proposals(proposals, dataset.image_ids, split=split, limit=limit) if proposals else None
        detector = predictor.detector
        is_proposals = detector.class_agnostic
        unfit = "--tta" if tta else f"--metric {metric}" if metric != "coco" else None
        if is_proposals and unfit is not None:
            raise ValueError(f"{unfit}: {model} only proposes boxes, which are measured by their recall: leave it out")
        if not is_proposals:  # before the work rather than after it
            match_categories(predictor.categories, dataset.categories)
        resize = predictor.experiment.resize
        views = [View(resize)]
        if tta:
            view_suppression(detector)
            views = views_of(resize, shorts, flip=tta_flip)
        loaders = [
            EvaluationLoader(
                dataset,
                batch_size=batch_size,
                resize=view.resize,
                flipped=view.flipped,
                proposals=given,
                num_workers=workers,
                rank=rank(),
                world_size=world_size(),
            )
            for view in views
        ]
        metrics: CocoMetrics | dict[str, float]
        common: dict[str, Any] = {"device": chosen, "precision": predictor.experiment.precision}
        with ImageProgress("testing", len(dataset) * len(views), world_size(), shown=rank() == 0) as progress:
            if is_proposals:
                results, metrics = evaluate_proposals(
                    detector, dataset, loaders[0], progress=progress.advance, **common
                )
            else:
                results, metrics = evaluate_views(
                    detector,
                    dataset,
                    loaders,
                    categories=predictor.categories,
                    max_detections=None if max_detections is None else (1, 10, max_detections),
                    progress=progress.advance,
                    **common,
                )
        if rank() > 0:
            return
        shown_views = [f"{view.resize.short}{' mirrored' if view.flipped else ''}" for view in views]
        file = chosen_split.annotations.resolve()
        evaluation = Evaluation(
            data=data_name(file, [] if data is None else [data]),
            split=file.stem if data is None else split,
            annotations=str(file),
            conditions={
                "precision": predictor.experiment.precision,
                "metric": metric,
                "proposals": None if proposals is None else str(proposals.resolve()),
                "test-time augmentation": ", ".join(shown_views) if tta else None,
                "max_detections": max_detections,
                "weights": None if weights.name == "weights.safetensors" else weights.name,
            },
            step=predictor.metadata.get("step"),
            weights=sha256_of(weights),
            metrics=dict(numbers_of(metrics)),
        )
        extras = [precision, metric if metric != "coco" else None, "tta" if tta else None]
        name = "_".join([evaluation.split, *filter(None, extras)])
        out = evaluation_folder(run, name, evaluation) if out is None else out
        write_results(out / "results.json", results, dataset.categories)
        evaluation.write(out)
        facts = {"model": str(model), "data": str(chosen_split.annotations), "split": evaluation.split}
        if tta:
            facts["test-time augmentation"] = f"short sides {', '.join(shown_views)}"
        if "step" in predictor.metadata:
            facts["step"] = f"{predictor.metadata['step']:,}"
        voc = voc_metrics(dataset, results, interpolation=metric) if metric != "coco" else None
        report = write_report(out, dataset, results, metrics, run=run, title=run.resolve().name, facts=facts, voc=voc)
        if voc is not None:
            _print_classes("class", voc.categories, voc.num_objects, ("AP",), voc.per_class[:, None])
            print_numbers({f"mAP of {metric}": voc.mean})
        else:
            _print_metrics(metrics)
        typer.echo(f"{out / 'results.json'}\n{report}")


def _short_sides(text: str | None) -> list[int]:
    """The numbers of `--tta-short`."""
    sides = [] if text is None else [side.strip() for side in text.split(",")]
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--tta-short {text}: give short sides in pixels with commas between, such as 640,800,960")
    return [int(side) for side in sides]


def _print_metrics(metrics: CocoMetrics | dict[str, float]) -> None:
    """The numbers, and a row a class."""
    from boxwright.cli.console import print_numbers
    from boxwright.evaluation.coco import CLASS_COLUMNS

    if isinstance(metrics, dict):
        print_numbers(metrics)
        return
    parts = [("class", metrics)] if metrics.masks is None else [("boxes", metrics), ("masks", metrics.masks)]
    for title, part in parts:
        _print_classes(title, part.categories, part.num_objects, CLASS_COLUMNS, part.per_class)
        print_numbers(part.summary)


def _print_classes(
    title: str, categories: Sequence[Category], num_objects: np.ndarray, columns: Sequence[str], per_class: np.ndarray
) -> None:
    """One row per class: its name, its number of objects and its metrics [C, columns]."""
    from boxwright.cli.console import print_table
    from boxwright.report.html import percent

    rows = [
        [category.name, str(count), *map(percent, values)]
        for category, count, values in zip(categories, num_objects, per_class, strict=True)
    ]
    print_table([title, "objects", *columns], rows)
