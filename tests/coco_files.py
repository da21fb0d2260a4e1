"""Small COCO data sets on disk, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def document() -> dict[str, Any]:
    """Two images of 60 x 40 pixels with polygons, run lengths in both forms, and a crowd region; ids have gaps."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40, "license": [1, None]},
            {"id": 3, "file_name": "sub/b.png", "width": 60, "height": 40, "extra": {"deep": 1.5}},
        ],
        "annotations": [
            {
                "id": 11,
                "image_id": 3,
                "category_id": 90,
                "bbox": [10, 5, 20, 10],
                "area": 150.5,
                "iscrowd": 0,
                "segmentation": [[10, 5, 30, 5, 20, 15], [1.5, 2, 3, 4, 5, 6.25, 7, 8]],
            },
            {"id": 12, "image_id": 7, "category_id": 2, "bbox": [0.5, 1.5, 4, 5]},
            {
                "id": 13,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 0, 1, 40],
                "iscrowd": 1,
                "area": 40,
                "segmentation": {"size": [40, 60], "counts": [0, 40, 2360]},
            },
            {
                "id": 14,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 0, 1, 40],
                "area": 40,
                "segmentation": {"size": [40, 60], "counts": "0X1hY2"},
            },
        ],
        "categories": [{"id": 90, "name": "zebra", "supercategory": "animal"}, {"id": 2, "name": "ant"}],
    }


def write(folder: Path, content: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write a data set with the images of `document()`; returns the paths of the annotation file and image folder."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("a.png", "sub/b.png")):
        cv2.imwrite(str(images / name), np.full((40, 60, 3), (number, 100, 200), np.uint8))
    annotations = folder / "instances_train.json"
    annotations.write_text(json.dumps(document() if content is None else content))
    return annotations, images
