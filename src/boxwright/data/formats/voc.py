"""Pascal VOC: one XML file per image, and one list of image names per split.

A split is the list of its image names, `ROOT/ImageSets/Main/train.txt`. The annotations of the name `2007_000027` are
`ROOT/Annotations/2007_000027.xml`. Its image is, in the image folder, the file that the XML file names if only the
ending differs, otherwise `2007_000027.jpg`. The classes are the lines of `ROOT/classes.txt`, in that order; without
this file they are the sorted classes of all XML files in the folder, so that all splits have the same classes.

VOC counts pixels from 1, and a box includes its last row and column: (xmin, ymin, xmax, ymax) is (xmin - 1, ymin - 1,
xmax, ymax) in continuous coordinates. A `difficult` object becomes a crowd region: not trained on, ignored in
evaluation.
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
_BOX_FORM = "bndbox is xmin, ymin, xmax, ymax in pixels, the first of which is 1"
_VOC_NAME = re.compile(r"(?:([1-9]\d{3})_)?(\d{6})", re.ASCII)
_LENGTH = re.compile(r"[1-9]\d{0,8}", re.ASCII)


def detect(folder: Path) -> dict[str, Split] | NoMatch:
    """Find the lists `ImageSets/Main/SPLIT.txt`. The image folder is `JPEGImages`.

    `trainval` overlaps train and val: it is the training split only if neither of them is there.
    """
    lists = {split: folder / _LISTS.replace("SPLIT", split) for split in (*SPLIT_NAMES, "trainval")}
    present = {split: path for split, path in lists.items() if path.is_file()}
    trainval = present.pop("trainval", None)
    if trainval and not present.keys() & {"train", "val"}:
        present["train"] = trainval
    if not present:
        return NoMatch(f"{_LISTS} with train, val, test or trainval as SPLIT")
    return {split: Split(present[split], folder / "JPEGImages") for split in SPLIT_NAMES if split in present}


def reads(annotations: Path) -> bool:
    """Whether a path ends in `.txt`."""
    return annotations.suffix == ".txt"


def content_hash(split: Split) -> str:
    """A hash of the list, the classes and all XML files.

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
    """The well-formed images and objects of a split, and a fault for each of the others.

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
            Fault(str(root / "Annotations"), "folder", "its files name no object", "add what is to be learnt")
        )
    columns.category_names = classes
    columns.category_ids.extend(range(1, len(classes) + 1))
    for name in names:
        file = root / "Annotations" / f"{name}.xml"
        tree = _read_tree(file)
        if isinstance(tree, Fault):
            faults.append(tree)
        else:
            _add_picture(columns, name, tree, file, faults)
    return columns, faults


def image_id(name: str) -> int:
    """A picture's number, from its name alone: VOC's own names are their digits, others a 48-bit hash beyond those."""
    if match := _VOC_NAME.fullmatch(name):
        return int((match[1] or "") + match[2])
    return 2**48 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _root(image_set: Path) -> Path:
    root = image_set.parent.parent.parent
    if not (root / "Annotations").is_dir():
        raise ValueError(
            f"{image_set}: there is no folder {root / 'Annotations'}: a list of VOC pictures lies in ImageSets/Main, "
            "and the folder Annotations beside ImageSets holds an XML file for each name in it"
        )
    return root


def _classes_in_use(root: Path) -> list[str]:
    """The classes of all XML files that can be read, sorted."""
    trees = (tree for tree in map(_read_tree, _xml_files(root)) if isinstance(tree, Element))
    return sorted({_text(thing, "name") for tree in trees for thing in tree.iterfind("object")} - {""})


def _xml_files(root: Path) -> list[Path]:
    return sorted((root / "Annotations").glob("*.xml"))


def _names(path: Path, noun: str, faults: list[Fault]) -> Iterator[str]:
    """The names that a file lists, one a line, each once; adds the faults of the others."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        faults.append(Fault(str(path), "file", f"not UTF-8 text: {error}", "write it as UTF-8"))
        return
    counts = Counter(filter(None, lines))
    if not counts:
        faults.append(Fault(str(path), "file", f"it names no {noun}", f"write the name of a {noun} on each line"))
    for name, count in counts.items():
        if count > 1:
            faults.append(Fault(str(path), f"{noun} {name}", f"{count} lines name it", "name it once"))
        if noun == "image" and (len(PurePath(name).parts) != 1 or "\\" in name or "\0" in name or name == ".."):
            mend = "give the XML file's name without folder and ending"
            faults.append(Fault(str(path), f"image {name!r}", "is no plain name", mend))
        else:
            yield name


def _read_tree(file: Path) -> Element | Fault:
    """The root of an XML file. Document types are refused, since they can make kilobytes unfold to gigabytes."""
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
        mend = "add the file, or take the name from the list of images"
        return Fault(str(file), f"image {file.stem}", "is missing", mend)
    except (expat.ExpatError, ValueError, LookupError) as error:
        return Fault(str(file), "file", f"no valid XML: {error}", "correct it there, or export it again")
    root = builder.close()
    if root.tag != "annotation":
        return Fault(str(file), "file", f"no VOC annotation: it holds <{root.tag}>", "its outermost is <annotation>")
    return root


def _refuse_doctype(*_: Any) -> None:
    raise ValueError("it declares a document type or entities, which are not read")


def _text(parent: Element | None, tag: str) -> str:
    return ((parent.findtext(tag) if parent is not None else None) or "").strip()


def _add_picture(columns: Columns, name: str, tree: Element, file: Path, faults: list[Fault]) -> None:
    size = tree.find("size")
    sides = [_text(size, side) for side in ("height", "width")]
    number = image_id(name)
    if not all(map(_LENGTH.fullmatch, sides)):
        what = f"`size` is height {sides[0] or 'missing'}, width {sides[1] or 'missing'}"
        faults.append(Fault(str(file), f"image {name}", what, "write the picture's height and width in whole pixels"))
        return
    stated = _text(tree, "filename")
    columns.image_ids.append(number)
    columns.image_sizes.extend(map(int, sides))
    same = PurePath(stated).stem == name and PurePath(stated).name == stated and PurePath(stated).suffix
    columns.file_names.append(stated if same else f"{name}.jpg")
    labels = {known: category for category, known in enumerate(columns.category_names, 1)}
    for position, thing in enumerate(tree.iterfind("object"), 1):
        label = _text(thing, "name")
        place = f"object {position}" + f" ({label})" * bool(label)
        wrong = list(_object_faults(thing, label, labels))
        if wrong:
            faults += [Fault(str(file), place, what, mend) for what, mend in wrong]
            continue
        xmin, ymin, xmax, ymax = box = _corners(thing)
        # Equal sides would be one row of pixels by the letter, but are a slip of the annotator's: no area.
        width, height = (high - low + (high > low) for low, high in ((xmin, xmax), (ymin, ymax)))
        columns.places.append((str(file), place))
        columns.stated_boxes.extend(box)
        annotation = Annotation(
            id=len(columns.annotation_ids) + 1,
            image_id=number,
            category_id=labels[label],
            bbox=(xmin - 1, ymin - 1, width, height),
            iscrowd=1 if _text(thing, "difficult") == "1" else 0,
        )
        add_annotation(columns, annotation, str(file), faults)


def _corners(thing: Element) -> list[float]:
    """The sides of a box in VOC's order; NaN for what is no number."""
    box = thing.find("bndbox")
    return [_number(_text(box, side)) for side in _SIDES]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _object_faults(thing: Element, label: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with an object, and how to mend it."""
    if not label:
        yield "`name` is missing", "name its class"
    elif label not in known:
        yield f"classes.txt has no class {label!r}", "correct the name, or add the class"
    if not all(map(math.isfinite, _corners(thing))):
        stated = ", ".join(f"{side} {_text(thing.find('bndbox'), side) or 'missing'}" for side in _SIDES)
        yield f"`bndbox` is {stated}", f"{_BOX_FORM}: correct it, or remove the object"
    if _text(thing, "difficult") not in ("", "0", "1"):
        yield f"`difficult` is {_text(thing, 'difficult')!r}", "write 0 or 1"
