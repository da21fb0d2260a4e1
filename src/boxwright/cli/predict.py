"""`boxwright predict`: what a model finds in pictures."""

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
    model: Annotated[str, typer.Argument(help="A run's folder, a weights file, its URL, or a model of the zoo.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="FILES|FOLDERS", help="Pictures, or folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Where the pictures with boxes and detections.json go.")],
    score: Annotated[float, typer.Option(min=0, max=1, help="Leave out detections below this score.")] = 0.3,
    native: Annotated[
        bool, typer.Option("--native", help="Keep the pictures' own sizes, padded to a multiple of 32.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")] = None,
    precision: PrecisionOption = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="A module of yours that the model's parts come from; may be repeated.")
    ] = None,
) -> None:
    """Detect objects in pictures: pictures with boxes and masks, and detections.json in COCO results form.

    Folders are searched with all their sub-folders. A file that cannot be read, or whose drawing cannot be written, is
    reported and skipped; the exit status is then 1.
    """
    from boxwright.data.decode import decode_image
    from boxwright.evaluation.results import write_json, write_whole
    from boxwright.predictor import load
    from boxwright.report.draw import draw_detections, encode_image
    from boxwright.training.distributed import process_group

    pictures = list(find_pictures(inputs, out))
    if not pictures:
        raise ValueError(f"no pictures in {', '.join(map(str, inputs))}: looked for {', '.join(sorted(SUFFIXES))}")
    targets = name_outputs([name for _, name in pictures], out)
    num_named = Counter(name for _, name in pictures)
    sources = {os.path.realpath(path) for path, _ in pictures}
    clash = next((target for target in targets if os.path.realpath(target) in sources), None)
    if clash is not None:
        raise ValueError(f"{clash} is one of the pictures and would be overwritten: give another --out")

    rows: list[dict[str, object]] = []
    num_done = 0
    with process_group(device) as chosen:
        predictor = load(model, device=chosen, precision=precision, trusted_modules=trust or ())
        if predictor.detector.needs_proposals:
            raise ValueError(
                f"{model} has no network for proposals, so that it needs boxes to look at: give them in Python "
                "(model.predict(image, proposals=boxes)), or measure it with boxwright test --proposals FILE"
            )
        try:
            for image_id, ((path, name), target) in enumerate(zip(pictures, targets, strict=True), start=1):
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
                # Where several images share a name, their paths tell them apart.
                file_name = _readable(name if num_named[name] == 1 else path)
                rows += _rows(prediction, predictor.categories, file_name, image_id)
                num_done += 1
        finally:  # also of the images before an interrupt or an error
            write_json(out / "detections.json", rows)
    num_failed = len(pictures) - num_done
    counted = f"{num_done} picture{'s' * (num_done != 1)}, {len(rows)} detection{'s' * (len(rows) != 1)}"
    typer.echo(f"{counted} in {out}; {num_failed} could not be read or written")
    if num_failed:
        raise typer.Exit(1)


def _rows(
    prediction: Prediction, categories: Sequence[Category], file_name: str, image_id: int
) -> list[dict[str, object]]:
    """The detections of an image in COCO results form."""
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


def find_pictures(inputs: list[Path], out: Path) -> Iterator[tuple[Path, Path]]:
    """Each picture once, with its name: its path inside the folder that was given, or the file's own name.

    What lies in `out`, from an earlier call say, is passed over, and so are hidden files.
    """
    from boxwright.data.formats.check import lies_within

    seen: set[str] = set()
    for given in inputs:
        if not given.is_dir():
            found = [(given, Path(given.name))]
        else:
            found = [
                (path, path.relative_to(given))
                for path in sorted(given.rglob("*"))
                # A link that leads nowhere is no file, but was meant to be one: it is reported, not passed over.
                if path.suffix.lower() in SUFFIXES
                and not path.name.startswith(".")
                and (path.is_file() or not path.exists())
            ]
            if not lies_within(given, out):
                found = [(path, name) for path, name in found if not lies_within(path, out)]
        for path, name in found:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path, name


def _readable(name: Path | str) -> str:
    """A file's name as text that any file can hold, whatever bytes the file system allowed in it."""
    text = name.as_posix() if isinstance(name, Path) else name
    return os.fsencode(text).decode(errors="replace")


def name_outputs(names: list[Path], out: Path) -> list[Path]:
    """A file under `out` for each name; names that are equal but for case get -2, -3 and so on."""
    taken: set[str] = set()
    targets = []
    for name in names:
        suffix = name.suffix if name.suffix.lower() in WRITABLE else name.suffix + ".jpg"
        candidate, count = name.with_suffix(suffix), 1
        while candidate.as_posix().lower() in taken:
            count += 1
            candidate = name.with_name(f"{name.stem}-{count}{suffix}")
        taken.add(candidate.as_posix().lower())
        targets.append(out / candidate)
    return targets
