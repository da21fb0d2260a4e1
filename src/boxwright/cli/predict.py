"""`boxwright predict`: detect objects in image files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boxwright.cli.options import PrecisionOption

if TYPE_CHECKING:
    from boxwright.data.dataset import Category
    from boxwright.predictor import Prediction

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
WRITABLE = SUFFIXES - {".gif"}


def predict(
    model: Annotated[
        str, typer.Argument(help="Folder of a run, weights file, URL, hf:OWNER/NAME, or name of a zoo model.")
    ],
    inputs: Annotated[list[Path], typer.Argument(metavar="FILES|FOLDERS", help="Image files, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the images with drawn detections and for detections.json.")],
    score: Annotated[float, typer.Option(min=0, max=1, help="Score threshold.")] = 0.3,
    native: Annotated[
        bool, typer.Option("--native", help="Do not resize the images; pad them to a multiple of 32.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="cuda if available")
    ] = None,
    precision: PrecisionOption = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Module outside Boxwright that parts of the model come from; repeatable. Its code is run."),
    ] = None,
) -> None:
    """Detect objects in images. Writes the images with boxes and masks, and detections.json in the COCO results format.

    Folders are searched recursively. A file that cannot be read or written is reported and skipped; the exit status is
    then 1.
    """
    from boxwright.data.decode import decode_image
    from boxwright.evaluation.results import write_json, write_whole
    from boxwright.predictor import load
    from boxwright.report.draw import draw_detections, encode_image
    from boxwright.text import plural
    from boxwright.training.distributed import process_group

    image_files = list(find_images(inputs, out))
    if not image_files:
        raise ValueError(
            f"no images in {', '.join(map(str, inputs))}: expected files with the endings {', '.join(sorted(SUFFIXES))}"
        )
    targets = name_outputs([name for _, name in image_files], out)
    num_named = Counter(name for _, name in image_files)
    sources = {os.path.realpath(path) for path, _ in image_files}
    clash = next((target for target in targets if os.path.realpath(target) in sources), None)
    if clash is not None:
        raise ValueError(f"{clash} is an input image and would be overwritten: choose another --out")

    rows: list[dict[str, object]] = []
    num_done = 0
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        if predictor.detector.needs_proposals:
            raise ValueError(
                f"{model} has no RPN and needs proposals. Pass them in Python (model.predict(image, proposals=boxes)), "
                "or use boxwright test --proposals FILE."
            )
        try:
            for image_id, ((path, name), target) in enumerate(zip(image_files, targets, strict=True), start=1):
                try:
                    image = decode_image(path)
                except (ValueError, OSError) as error:
                    typer.echo(_readable(f"boxwright: {error}"), err=True)
                    continue
                try:
                    prediction = predictor.predict(image, score=score, native=native)
                except Exception:
                    typer.echo(_readable(f"boxwright: {path}: prediction failed"), err=True)
                    raise
                drawn = draw_detections(
                    image,
                    prediction.boxes,
                    prediction.labels,
                    prediction.names,
                    prediction.scores,
                    masks=prediction.masks,
                )
                try:
                    content = encode_image(drawn, target.suffix)
                except ValueError as error:
                    typer.echo(_readable(f"boxwright: {path}: {error}"), err=True)
                    continue
                write_whole(target, content)
                # Images with equal names are listed by their paths.
                file_name = _readable(name if num_named[name] == 1 else path)
                rows += _rows(prediction, predictor.categories, file_name, image_id)
                num_done += 1
        finally:  # Also after an interrupt or an error: detections so far are kept.
            write_json(out / "detections.json", rows)
    num_failed = len(image_files) - num_done
    failed = f", {num_failed:,} failed" if num_failed else ""
    typer.echo(f"{out}: {plural(num_done, 'image')}, {plural(len(rows), 'detection')}{failed}")
    if num_failed:
        raise typer.Exit(1)


def _rows(
    prediction: Prediction, categories: Sequence[Category], file_name: str, image_id: int
) -> list[dict[str, object]]:
    """Detections of an image in the COCO results format."""
    masks = [None] * len(prediction) if prediction.masks is None else prediction.masks.to_coco()
    rows: list[dict[str, object]] = []
    for box, score, label, mask in zip(
        prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), masks, strict=True
    ):
        x1, y1, x2, y2 = box
        rows.append(
            {
                "file_name": file_name,
                "image_id": image_id,
                "category_id": categories[label].id,
                "category_name": categories[label].name,
                "bbox": [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)],
                "score": score,
                **({} if mask is None else {"segmentation": mask}),
            }
        )
    return rows


def find_images(inputs: list[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each image file once, with its name: the path relative to the input folder, or the file name.

    Hidden files and files in `out`, for example of an earlier call, are skipped.
    """
    from boxwright.data.formats.check import lies_within

    seen: set[str] = set()
    for item in inputs:
        if not item.is_dir():
            files = [(item, Path(item.name))]
        else:
            files = [
                (path, path.relative_to(item))
                for path in sorted(item.rglob("*"))
                # A broken link is included, so that it is reported.
                if path.suffix.lower() in SUFFIXES
                and not path.name.startswith(".")
                and (path.is_file() or not path.exists())
            ]
            if not lies_within(item, out):
                files = [(path, name) for path, name in files if not lies_within(path, out)]
        for path, name in files:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path, name


def _readable(name: Path | str) -> str:
    """File name as valid text; bytes that are not UTF-8 are replaced."""
    text = name.as_posix() if isinstance(name, Path) else name
    return os.fsencode(text).decode(errors="replace")


def name_outputs(names: list[Path], out: Path) -> list[Path]:
    """Output file for each name. Names that differ only in case get -2, -3 and so on."""
    used: set[str] = set()
    targets = []
    for name in names:
        suffix = name.suffix if name.suffix.lower() in WRITABLE else name.suffix + ".jpg"
        candidate, count = name.with_suffix(suffix), 1
        while candidate.as_posix().lower() in used:
            count += 1
            candidate = name.with_name(f"{name.stem}-{count}{suffix}")
        used.add(candidate.as_posix().lower())
        targets.append(out / candidate)
    return targets
