"""Classes of files that do not name them: the COCO classes, or class names from the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from boxwright.data.categories import UNUSED
from boxwright.data.dataset import Category
from boxwright.weights.foreign import ForeignFile

_COCO = """\
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase,
34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard,
42 surfboard, 43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl,
52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake,
62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote,
76 keyboard, 77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock,
86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush"""

COCO = tuple(Category(int(id), name) for id, _, name in (row.strip().partition(" ") for row in _COCO.split(",")))
"""The 80 COCO classes by id. The ids have gaps."""


def coco_by_count(file: ForeignFile, count: int) -> Sequence[Category] | None:
    """The COCO classes for a model with 80 classes, otherwise None."""
    return COCO if count == len(COCO) else None


def by_coco_id(first: int) -> tuple[Category, ...]:
    """One class per COCO id, gaps included: a class in a gap is named "N/A 12" and so on.

    Args:
        first: First id: 1, or 0 if the model has an untrained class before the first COCO class.
    """
    names = {category.id: category.name for category in COCO}
    return tuple(Category(id, names.get(id, f"{UNUSED}{id}")) for id in range(first, COCO[-1].id + 1))


def named(names: Sequence[str]) -> tuple[Category, ...]:
    """Classes with these names: with the COCO ids for the COCO names, otherwise numbered from 1."""
    if list(names) == [category.name for category in COCO]:
        return COCO
    return tuple(Category(id, name) for id, name in enumerate(names, start=1))


def read_categories(path: Path) -> tuple[Category, ...]:
    """Read classes from a COCO JSON file or from a text file with one name per line.

    Raises:
        ValueError: The file is neither.
        OSError: The file cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    if not text.lstrip().startswith(("{", "[")):
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise ValueError(f"{path}: no class names. Write one name per line, or use a COCO JSON file.")
        return named(names)
    try:
        data = json.loads(text)
        entries = data["categories"] if isinstance(data, dict) else data
        return tuple(Category(int(entry["id"]), str(entry["name"])) for entry in sorted(entries, key=_id))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a list of categories, each with an id and a name ({error!r})") from None


def _id(entry: dict[str, int]) -> int:
    return entry["id"]
