"""Small Pascal VOC data sets on disk, for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

Object = tuple[str, tuple[object, object, object, object], int]
"""Class, (xmin, ymin, xmax, ymax) and whether it is difficult."""

PICTURES: dict[str, list[Object]] = {
    "000007": [("zebra", (11, 6, 30, 15), 0), ("ant", (1, 1, 60, 40), 1)],
    "2008_000003": [],
    "some one": [("ant", (5, 6, 7.5, 8), 0)],
}


def page(name: str, objects: list[Object], *, size: tuple[int, int] = (40, 60)) -> str:
    """The XML file of a picture of (height, width) pixels."""
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part><bndbox>"
        + "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for label, box, difficult in objects
    )
    height, width = size
    return (
        f"<annotation><filename>{name}.png</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{things}</annotation>"
    )


def write_voc(root: Path, pictures: dict[str, list[Object]] | None = None, split: str = "train") -> tuple[Path, Path]:
    """Write a data set of pictures of 60 x 40 pixels; returns the split's list and the image folder."""
    pictures = PICTURES if pictures is None else pictures
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (name, objects) in enumerate(pictures.items()):
        (root / "Annotations" / f"{name}.xml").write_text(page(name, objects))
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.png"), np.full((40, 60, 3), number, np.uint8))
    image_set = root / "ImageSets" / "Main" / f"{split}.txt"
    image_set.write_text("".join(f"{name}\n" for name in pictures))
    return image_set, root / "JPEGImages"
