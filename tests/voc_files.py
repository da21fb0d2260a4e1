"""Small Pascal VOC data sets on disk, for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

Object = tuple[str, tuple[object, object, object, object], int]
"""Class name, (xmin, ymin, xmax, ymax), and 1 for a difficult object."""

IMAGES: dict[str, list[Object]] = {
    "000007": [("zebra", (11, 6, 30, 15), 0), ("ant", (1, 1, 60, 40), 1)],
    "2008_000003": [],
    "with space": [("ant", (5, 6, 7.5, 8), 0)],
}


def annotation_xml(name: str, objects: list[Object], *, size: tuple[int, int] = (40, 60)) -> str:
    """Content of the XML file of an image; `size` is (height, width)."""
    elements = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part><bndbox>"
        + "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for label, box, difficult in objects
    )
    height, width = size
    return (
        f"<annotation><filename>{name}.png</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{elements}</annotation>"
    )


def write_voc(root: Path, objects: dict[str, list[Object]] | None = None, split: str = "train") -> tuple[Path, Path]:
    """Write a data set of images of 60 x 40 pixels; returns the paths of the image list and the image folder.

    Args:
        root: Folder of the data set.
        objects: Objects of each image, by image name; None for `IMAGES`.
        split: Name of the image list.
    """
    objects = IMAGES if objects is None else objects
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (name, image_objects) in enumerate(objects.items()):
        (root / "Annotations" / f"{name}.xml").write_text(annotation_xml(name, image_objects))
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.png"), np.full((40, 60, 3), number, np.uint8))
    image_set = root / "ImageSets" / "Main" / f"{split}.txt"
    image_set.write_text("".join(f"{name}\n" for name in objects))
    return image_set, root / "JPEGImages"
