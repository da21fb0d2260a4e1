"""Annotation formats: one module per format, and functions that open a data set in any of them.

To add a format, write a module with the members of `format.Format` and add it to `formats`, the only list of formats.
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
    """All annotation formats. The first format that recognises a folder or a file is used."""
    return (coco, voc)


def find_layout(folder: Path) -> dict[str, Split]:
    """Find the splits of the data set in a folder.

    `IndexedDataset(*find_layout(folder)["train"])` opens the training split.

    Returns:
        The splits that exist, by name: "train", "val" and "test".

    Raises:
        ValueError: The folder does not exist, no format recognises it (the message lists what each format looked for),
            or several files match the same split.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(
                f"{folder}: expected a folder, got a file. Use the folder of the data set, or the paths of the "
                "annotation file and the image folder"
            )
        raise ValueError(f"{folder}: there is no such folder")
    reasons = []
    for form in formats():
        match = form.detect(folder)
        if not isinstance(match, NoMatch):
            return match
        reasons.append(f"{form.name}: looked for {match.reason}")
    raise ValueError(
        f"{folder}: the folder is not in a known format ({', '.join(form.name for form in formats())}). "
        f"{'. '.join(reasons)}. Rename the files, or use the paths of the annotation file and the image folder"
    )


def format_of(annotations: Path) -> Format:
    """The format of the annotations of a split.

    Raises:
        FileNotFoundError: The annotations do not exist, and no format recognises the file name.
        ValueError: The annotations are not in a known format.
    """
    for form in formats():
        if form.reads(annotations):
            return form
    if not annotations.exists():
        raise FileNotFoundError(2, "there is no such annotation file", str(annotations))
    names = ", ".join(form.name for form in formats())
    raise ValueError(
        f"{annotations}: unknown annotation format. Supported formats: {names}. Convert the annotations to one of them."
    )


def read_index(annotations: Path, images: Path | None = None, *, cache_dir: Path | None = None) -> AnnotationIndex:
    """The annotation index of a split, from the cache if it contains the split.

    Args:
        annotations: Annotations of the split, such as a COCO JSON file or a VOC image list.
        images: Image folder; None for the folder of `annotations`. The readers of COCO and VOC do not use it.
        cache_dir: Folder in which indexes are stored under the hash of their annotations. None for `BOXWRIGHT_CACHE`,
            if it is set, otherwise the user's cache folder, or the temporary folder if that is not writable.

    Raises:
        FaultyDataError: The annotations contain errors that would corrupt training.
        OSError: The annotations cannot be read, or no cache folder is writable.
        ValueError: The annotations are not in a known format.
    """
    return build_index(format_of(annotations), _split(annotations, images), cache_dir)


def read_annotations(annotations: Path, images: Path | None = None) -> Reading:
    """Read and check the annotations of a split without the cache.

    Returns:
        The valid entries, and all faults.

    Raises:
        OSError: The annotations cannot be read.
        ValueError: The annotations are not in a known format.
    """
    return check_columns(str(annotations), *read_columns(annotations, images))


def read_columns(annotations: Path, images: Path | None = None) -> tuple[Columns, list[Fault]]:
    """Read the annotations of a split; references between entries are not checked.

    Returns:
        The entries that match the schema of their format, and at least one fault for each other entry.

    Raises:
        OSError: The annotations cannot be read.
        ValueError: The annotations are not in a known format, or files that the format requires are missing.
    """
    return format_of(annotations).read(_split(annotations, images))


def _split(annotations: Path, images: Path | None) -> Split:
    return Split(annotations, annotations.parent if images is None else images)
