"""Pascal VOC: one XML file per image, and one list of image names per split.

A split is a list of image names, `ROOT/ImageSets/Main/train.txt`. For the name `2007_000027`:

- The annotations are `ROOT/Annotations/2007_000027.xml`.
- The image is `2007_000027.jpg` in the image folder. If `filename` in the XML file has the same stem, its suffix is
  used instead of `.jpg`.

The classes are the lines of `ROOT/classes.txt`, in that order. Without this file they are the sorted classes of all XML
files in `ROOT/Annotations`, so that all splits have the same classes.

VOC counts pixels from 1, and a box includes its last row and column, so (xmin, ymin, xmax, ymax) becomes (xmin - 1,
ymin - 1, xmax, ymax) in continuous coordinates. A `difficult` object becomes a crowd region: it is not trained on, and
evaluation ignores it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from boxwright.data.formats.columns import Annotation, Columns, add_annotation
from boxwright.data.formats.fault import Fault
from boxwright.data.formats.format import SPLIT_NAMES, NoMatch, Split

name = "VOC"

_LISTS = "ImageSets/Main/SPLIT.txt"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_BOX_FORM = "`bndbox` is xmin, ymin, xmax, ymax in pixels, and the first pixel is 1"
_VOC_NAME = re.compile(r"(?:([1-9]\d{3})_)?(\d{6})", re.ASCII)
_LENGTH = re.compile(r"[1-9]\d{0,8}", re.ASCII)


def detect(folder: Path) -> dict[str, Split] | NoMatch:
    """Find the lists `ImageSets/Main/SPLIT.txt`. The image folder is `JPEGImages`.

    `trainval` is the union of train and val. It becomes the training split only if neither `train` nor `val` exists.
    """
    lists = {split: folder / _LISTS.replace("SPLIT", split) for split in (*SPLIT_NAMES, "trainval")}
    present = {split: path for split, path in lists.items() if path.is_file()}
    trainval = present.pop("trainval", None)
    if trainval and not present.keys() & {"train", "val"}:
        present["train"] = trainval
    if not present:
        return NoMatch(f"{_LISTS}, where SPLIT is train, val, test or trainval")
    return {split: Split(present[split], folder / "JPEGImages") for split in SPLIT_NAMES if split in present}


def reads(annotations: Path) -> bool:
    """Whether the file name ends in `.txt`."""
    return annotations.suffix == ".txt"


def content_hash(split: Split) -> str:
    """Hash of the image list, `classes.txt` and all XML files.

    Raises:
        OSError: A file cannot be read.
        ValueError: The folder `Annotations` is missing.
    """
    root = _root(split.annotations)
    classes = root / "classes.txt"
    digest = hashlib.sha256()
    for source in [split.annotations, *([classes] if classes.is_file() else []), *_xml_files(root)]:
        content = source.read_bytes()
        digest.update(f"{source.name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()[:32]


def read(split: Split) -> tuple[Columns, list[Fault]]:
    """Read the XML files of a split.

    Returns:
        The valid images and objects, and at least one fault for each other image and object.

    Raises:
        OSError: A file cannot be read.
        ValueError: The folder `Annotations` is missing.
    """
    image_set = split.annotations
    root = _root(image_set)
    columns, faults = Columns(box_form=_BOX_FORM), list[Fault]()
    names = list(_names(image_set, "image", faults))
    class_file = root / "classes.txt"
    classes = list(_names(class_file, "class", faults)) if class_file.is_file() else _classes_in_use(root)
    if not classes and not faults:
        faults.append(
            Fault(str(root / "Annotations"), "folder", "no XML file has an object", "Annotate the objects to train on")
        )
    columns.category_names = classes
    columns.category_ids.extend(range(1, len(classes) + 1))
    for name in names:
        file = root / "Annotations" / f"{name}.xml"
        tree = _read_tree(file)
        if isinstance(tree, Fault):
            faults.append(tree)
        else:
            _add_image(columns, name, tree, file, faults)
    return columns, faults


def image_id(name: str) -> int:
    """Image id, a function of the image name only.

    The id of a VOC name such as `2007_000027` or `000027` is the number that its digits form. The id of any other name
    is a 48-bit hash plus 2^48, so that it differs from all ids of VOC names.
    """
    if match := _VOC_NAME.fullmatch(name):
        return int((match[1] or "") + match[2])
    return 2**48 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _root(image_set: Path) -> Path:
    root = image_set.parent.parent.parent
    if not (root / "Annotations").is_dir():
        raise ValueError(
            f"{image_set}: there is no folder {root / 'Annotations'}. Move the image list to ImageSets/Main, and the "
            "XML files of its images to a folder Annotations beside ImageSets"
        )
    return root


def _classes_in_use(root: Path) -> list[str]:
    """Sorted classes of all readable XML files."""
    trees = (tree for tree in map(_read_tree, _xml_files(root)) if isinstance(tree, Element))
    return sorted({_text(element, "name") for tree in trees for element in tree.iterfind("object")} - {""})


def _xml_files(root: Path) -> list[Path]:
    return sorted((root / "Annotations").glob("*.xml"))


def _names(path: Path, noun: str, faults: list[Fault]) -> Iterator[str]:
    """Yield the names in a file, one per line, without duplicates; append a fault for each invalid name."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        faults.append(Fault(str(path), "file", f"not UTF-8 text: {error}", "Save the file as UTF-8"))
        return
    counts = Counter(filter(None, lines))
    if not counts:
        faults.append(Fault(str(path), "file", f"the list has no {noun}", f"Write one {noun} name per line"))
    for name, count in counts.items():
        if count > 1:
            faults.append(Fault(str(path), f"{noun} {name}", f"{count} lines have this name", "Write each name once"))
        if noun == "image" and (len(PurePath(name).parts) != 1 or "\\" in name or "\0" in name or name == ".."):
            what = "expected a name without folder"
            fix = "Write the name of the XML file without folder and suffix"
            faults.append(Fault(str(path), f"image {name!r}", what, fix))
        else:
            yield name


def _read_tree(file: Path) -> Element | Fault:
    """Parse an XML file. Document types are rejected, because their entities can expand kilobytes to gigabytes."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(file.read_bytes(), True)
    except FileNotFoundError:
        fix = "Add the file, or remove the name from the image list"
        return Fault(str(file), f"image {file.stem}", "the file is missing", fix)
    except (expat.ExpatError, ValueError, LookupError) as error:
        return Fault(str(file), "file", f"not valid XML: {error}", "Correct the file, or export it again")
    root = builder.close()
    if root.tag != "annotation":
        what = f"not a VOC annotation: expected the root element <annotation>, got <{root.tag}>"
        return Fault(str(file), "file", what, "Export the file as Pascal VOC")
    return root


def _refuse_doctype(*_: Any) -> None:
    raise ValueError("a document type (DOCTYPE) is not allowed")


def _text(parent: Element | None, tag: str) -> str:
    return ((parent.findtext(tag) if parent is not None else None) or "").strip()


def _add_image(columns: Columns, name: str, tree: Element, file: Path, faults: list[Fault]) -> None:
    size = tree.find("size")
    sides = [_text(size, side) for side in ("height", "width")]
    current_id = image_id(name)
    if not all(map(_LENGTH.fullmatch, sides)):
        what = f"`size` is height {sides[0] or 'missing'}, width {sides[1] or 'missing'}"
        faults.append(Fault(str(file), f"image {name}", what, "Write height and width in pixels, as integers"))
        return
    stated = _text(tree, "filename")
    columns.image_ids.append(current_id)
    columns.image_sizes.extend(map(int, sides))
    usable = PurePath(stated).stem == name and PurePath(stated).name == stated and PurePath(stated).suffix
    columns.file_names.append(stated if usable else f"{name}.jpg")
    labels = {known: category for category, known in enumerate(columns.category_names, 1)}
    for position, element in enumerate(tree.iterfind("object"), 1):
        label = _text(element, "name")
        place = f"object {position}" + f" ({label})" * bool(label)
        object_faults = list(_object_faults(element, label, labels))
        if object_faults:
            faults += [Fault(str(file), place, what, fix) for what, fix in object_faults]
            continue
        xmin, ymin, xmax, ymax = box = _corners(element)
        # With inclusive coordinates, xmin == xmax is one column of pixels. In practice it is an annotation error, so
        # the box gets no area and is dropped.
        width, height = (high - low + (high > low) for low, high in ((xmin, xmax), (ymin, ymax)))
        columns.places.append((str(file), place))
        columns.stated_boxes.extend(box)
        annotation = Annotation(
            id=len(columns.annotation_ids) + 1,
            image_id=current_id,
            category_id=labels[label],
            bbox=(xmin - 1, ymin - 1, width, height),
            iscrowd=1 if _text(element, "difficult") == "1" else 0,
        )
        add_annotation(columns, annotation, str(file), faults)


def _corners(element: Element) -> list[float]:
    """xmin, ymin, xmax and ymax of an object; NaN for a value that is missing or not a number."""
    box = element.find("bndbox")
    return [_number(_text(box, side)) for side in _SIDES]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _object_faults(element: Element, label: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with an object, and how to fix it."""
    if not label:
        yield "`name` is missing", "Add the class name"
    elif label not in known:
        yield f"classes.txt has no class {label!r}", "Correct the name, or add the class to classes.txt"
    if not all(map(math.isfinite, _corners(element))):
        stated = ", ".join(f"{side} {_text(element.find('bndbox'), side) or 'missing'}" for side in _SIDES)
        yield f"`bndbox` is {stated}", f"Correct the box ({_BOX_FORM}), or remove the object"
    if _text(element, "difficult") not in ("", "0", "1"):
        yield f"`difficult` is {_text(element, 'difficult')!r}", "Write 0 or 1"
