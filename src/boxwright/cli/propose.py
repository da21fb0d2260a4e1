"""`boxwright propose`: write the proposals of an RPN, for models that have none of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boxwright.cli.options import PrecisionOption

if TYPE_CHECKING:
    from boxwright.data.formats import Split


def propose(
    model: Annotated[str, typer.Argument(help="An RPN: a run's folder, a weights file, its URL, or one of the zoo.")],
    out: Annotated[Path, typer.Option(help="The proposals file to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of a data set, in any format that Boxwright reads.")] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Which split of it: train, val or test; may be repeated.", show_default="train and val"),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Annotations of one split, such as a COCO file, instead of --data.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of its images.")] = None,
    num_proposals: Annotated[int, typer.Option(min=1, help="The best so many of an image are written.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, for each process.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images, for each process.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")] = None,
    precision: PrecisionOption = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="A module of yours that the model's parts come from; may be repeated.")
    ] = None,
) -> None:
    """Write an RPN's proposals for every image of a data set, for `train --proposals` and `test --proposals`.

    The splits go into one file. Start it by torchrun to share the images out over several devices.
    """
    import hashlib

    from boxwright.cli.console import ImageProgress, print_numbers
    from boxwright.data.indexed_dataset import IndexedDataset
    from boxwright.data.loader import EvaluationLoader
    from boxwright.evaluation.propose import ProposalWriter
    from boxwright.evaluation.propose import propose as propose_on
    from boxwright.predictor import load, weights_file
    from boxwright.training.distributed import process_group, rank, world_size
    from boxwright.training.metrics import log_line

    splits = _splits(data, split or [], annotations, images)
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        if not predictor.detector.class_agnostic:
            raise ValueError(f"{model} is no RPN: train one, such as rpn_r50_fpn_1x, and name its run")
        datasets = {name: IndexedDataset(*chosen_split) for name, chosen_split in splits.items()}
        with ProposalWriter(out) as writer:
            for name, dataset in datasets.items():
                loader = EvaluationLoader(
                    dataset,
                    batch_size=batch_size,
                    resize=predictor.experiment.resize,
                    num_workers=workers,
                    rank=rank(),
                    world_size=world_size(),
                )
                with ImageProgress(f"{name}: proposing", len(dataset), world_size(), shown=rank() == 0) as progress:
                    found, recall = propose_on(
                        predictor.detector,
                        dataset,
                        loader,
                        device=chosen,
                        precision=predictor.experiment.precision,
                        limit=num_proposals,
                        progress=progress.advance,
                    )
                writer.add(name, dataset.annotations.name, dataset.image_ids.tolist(), found)
                log_line(f"{name}: {dataset.annotations}, {len(dataset)} images")
                if rank() == 0:
                    print_numbers(recall)
            weights = weights_file(model)
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            num_images, total = writer.finish({"model": str(weights), "sha256": digest})
        log_line(f"{out}: {total:,} proposals of {num_images:,} images ({', '.join(datasets)})")


def _splits(data: Path | None, names: list[str], annotations: Path | None, images: Path | None) -> dict[str, Split]:
    """The splits to work on, by name."""
    from boxwright.data.formats import Split, find_layout

    if annotations is not None and images is not None and data is None:
        if len(names) > 1:
            raise ValueError("--annotations names one split: give --split at most once")
        return {names[0] if names else "val": Split(annotations, images)}
    if data is None or annotations is not None or images is not None:
        raise ValueError("give either --data FOLDER, or --annotations FILE and --images FOLDER")
    layout = find_layout(data)
    missing = [name for name in names if name not in layout]
    if missing:
        raise ValueError(f"{data} has no split {missing[0]!r}, only {', '.join(layout)}: name one with --split")
    return {name: layout[name] for name in layout if name in (names or ("train", "val"))} or layout
