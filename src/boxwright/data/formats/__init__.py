"""Annotation formats: one module per format, and the functions that open data sets in any of them.

`formats` is the only list of formats. To add a format, write a module with the members of `format.Format` and add it to
that list.
"""

from __future__ import annotations

from pathlib import Path

from boxwright.data.formats import coco, voc
from boxwright.data.formats.columns import Columns
from boxwright.data.formats.fault import Fault
from boxwright.data.formats.format import Format, NoMatch, Split
from boxwright.data.formats.index import AnnotationIndex, build_index
from boxwright.data.formats.reading import Reading, check_columns

__all__ = ["Split", "find_layout", "format_of", "formats", "read_annotations", "read_columns", "read_index"]


def formats() -> tuple[Format, ...]:
    """All annotation formats. The first that recognises a folder or a file reads it."""
    return (coco, voc)


def find_layout(folder: Path) -> dict[str, Split]:
    """Find the splits of the data set in a folder: those of "train", "val" and "test" that are there.

    `IndexedDataset(*find_layout(folder)["train"])` opens one.

    Raises:
        ValueError: The folder does not exist, no format recognises it (the message lists what each format looked for),
            or several files could be one split.
    """
    if not folder.is_dir():
        what = "it is a file: give its folder, or it and its image folder by their paths"
        raise ValueError(f"{folder}: {what if folder.exists() else 'there is no such folder'}")
    reasons = []
    for form in formats():
        match = form.detect(folder)
        if not isinstance(match, NoMatch):
            return match
        reasons.append(f"{form.name}: looked for {match.reason}")
    raise ValueError(
        f"{folder}: the folder is not in a known format ({', '.join(form.name for form in formats())}). "
        f"{'. '.join(reasons)}. Rename the files, or give the annotation file and the image folder by their paths"
    )


def format_of(annotations: Path) -> Format:
    """The format of a split's annotations.

    Raises:
        FileNotFoundError: The annotations do not exist, and no format claims the path by its name.
        ValueError: They are in no known format.
    """
    for form in formats():
        if form.reads(annotations):
            return form
    if not annotations.exists():
        raise FileNotFoundError(2, "there is no such annotation file", str(annotations))
    names = ", ".join(form.name for form in formats())
    raise ValueError(f"{annotations}: these annotations are in no known format ({names})")


def read_index(annotations: Path, images: Path | None = None, *, cache_dir: Path | None = None) -> AnnotationIndex:
    """The index of a split. It is read from the cache if the split was read before.

    Args:
        annotations: The split's annotations, such as a COCO JSON file or a VOC list of images.
        images: The image folder; the folder of `annotations` by default. COCO and VOC do not look at it.
        cache_dir: The folder for indexes, by the hash of the annotations. By default `BOXWRIGHT_CACHE`, otherwise the
            user's cache folder, otherwise (if that is not writable) the temporary folder.

    Raises:
        FaultyDataError: The annotations contain errors that would corrupt training.
        OSError: The annotations cannot be read, or no cache folder can be written.
        ValueError: The annotations are in no known format.
    """
    return build_index(format_of(annotations), _split(annotations, images), cache_dir)


def read_annotations(annotations: Path, images: Path | None = None) -> Reading:
    """Read and check the annotations of a split without the cache: all that is sound, and every fault.

    Raises:
        OSError: The annotations cannot be read.
        ValueError: The annotations are in no known format.
    """
    return check_columns(str(annotations), *read_columns(annotations, images))


def read_columns(annotations: Path, images: Path | None = None) -> tuple[Columns, list[Fault]]:
    """The well-typed entries of a split as annotated, and a fault for each of the others.

    Raises:
        OSError: The annotations cannot be read.
        ValueError: The annotations are in no known format, or files that the format requires are missing.
    """
    return format_of(annotations).read(_split(annotations, images))


def _split(annotations: Path, images: Path | None) -> Split:
    return Split(annotations, annotations.parent if images is None else images)
