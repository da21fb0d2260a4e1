"""How long, and how much memory, AP takes for a validation set of COCO's size, of boxes and of masks.

    python benchmarks/evaluation.py [--images 5000] [--detections 100]

Generates the annotations (7 objects an image, polygons) and as many detections as a detector gives at most: some about
each object, the rest anywhere, all with masks. Fifty images are drawn and repeated under other ids.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hotcoco
import numpy as np

from boxwright.data.dataset import Category
from boxwright.data.masks import Masks
from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.paste import paste_masks
from boxwright.evaluation.results import Results, read_results, write_results

HEIGHT, WIDTH = 480, 640
NUM_DRAWN = 50
NUM_OBJECTS = 7
CATEGORIES = [Category(id=number, name=f"thing {number}") for number in range(1, 81)]
Outcome = TypeVar("Outcome")


class AnnotationFile:
    """As much of a data set as evaluation looks at."""

    categories = CATEGORIES

    def __init__(self, annotations: Path) -> None:
        """Keep the path."""
        self.annotations = annotations

    def __len__(self) -> int:
        """Not asked for: the file is read instead."""
        raise NotImplementedError

    def __getitem__(self, position: int) -> Any:
        """Not asked for: the file is read instead."""
        raise NotImplementedError


def made_boxes(rng: np.random.Generator, num: int) -> np.ndarray:
    """[num, 4] float64 xyxy; sides from 8 to 400 pixels, most of them small, as COCO's."""
    sides = np.minimum(2 ** rng.uniform(3, 8.6, (num, 2)), [WIDTH, HEIGHT])
    corners = rng.uniform(0, 1, (num, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def write_annotations(path: Path, objects: np.ndarray, labels: np.ndarray, num_images: int) -> None:
    """Ellipses as polygons of 24 points."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations = []
    for image in range(num_images):
        drawn = image % NUM_DRAWN
        for (x1, y1, x2, y2), label in zip(objects[drawn].tolist(), labels[drawn].tolist(), strict=True):
            points = circle * [(x2 - x1) / 2, (y2 - y1) / 2] + [(x1 + x2) / 2, (y1 + y2) / 2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) * np.pi / 4,
                    "segmentation": [points.round(2).ravel().tolist()],
                }
            )
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(num_images)]
    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def made_results(objects: np.ndarray, labels: np.ndarray, num_images: int, num: int) -> Results:
    """`num` detections an image, seven in ten about an object, with soft ellipses as masks."""
    rng = np.random.default_rng(1)
    places = np.linspace(-1, 1, 28)
    ellipse = np.clip(1.5 - (places[:, None] ** 2 + places**2), 0, 1)
    boxes, classes, masks = [], [], []
    for drawn in range(NUM_DRAWN):
        owners = rng.integers(0, NUM_OBJECTS, num)
        sides = np.tile(objects[drawn, owners, 2:] - objects[drawn, owners, :2], 2)
        about = objects[drawn, owners] + rng.normal(0, 0.1, (num, 4)) * sides
        near = rng.random(num) < 0.7
        found = np.where(near[:, None], about, made_boxes(rng, num)).clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        probabilities = np.clip(ellipse + rng.normal(0, 0.05, (num, 28, 28)), 0, 1).astype(np.float32)
        masks += list(paste_masks(probabilities, found, np.tile([[HEIGHT, WIDTH]], (num, 1))).counts)
        boxes.append(np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], axis=1))
        classes.append(np.where(near, labels[drawn, owners], rng.integers(0, len(CATEGORIES), num)))
    order = (np.arange(num_images * num).reshape(num_images, num) % (NUM_DRAWN * num)).ravel()
    return Results(
        image_ids=np.repeat(np.arange(1, num_images + 1), num),
        boxes=np.concatenate(boxes)[order].round(3),
        scores=rng.random(len(order)),
        labels=np.concatenate(classes)[order],
        evaluated=np.arange(1, num_images + 1),
        masks=Masks.of(masks, (HEIGHT, WIDTH)).select(order),
    )


def timed(what: str, call: Callable[[], Outcome]) -> Outcome:
    """Print the time of a call and the process's peak of memory so far."""
    start, start_processor = time.perf_counter(), time.process_time()
    outcome = call()
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    print(f"| {what} | {seconds:.1f} | {processor:.1f} | {peak:.2f} GiB |", flush=True)
    return outcome


def main() -> None:
    """Generate, then measure each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, hotcoco {hotcoco.__version__}, numpy {np.__version__}")
    rng = np.random.default_rng(0)
    objects = made_boxes(rng, NUM_DRAWN * NUM_OBJECTS).reshape(NUM_DRAWN, NUM_OBJECTS, 4)
    labels = rng.integers(0, len(CATEGORIES), (NUM_DRAWN, NUM_OBJECTS))
    with tempfile.TemporaryDirectory() as folder:
        annotations, file = Path(folder) / "instances.json", Path(folder) / "results.json"
        write_annotations(annotations, objects, labels, arguments.images)
        results = timed("(generate)", lambda: made_results(objects, labels, arguments.images, arguments.detections))
        assert results.masks is not None
        print(f"{len(results)} detections, {sum(map(len, results.masks.counts)) / 1e6:.0f} MB of runs")
        truth = timed("read the annotations", lambda: GroundTruth(AnnotationFile(annotations)))
        timed("... their masks", lambda: truth.coco_of_masks)
        boxes_alone = Results(
            image_ids=results.image_ids,
            boxes=results.boxes,
            scores=results.scores,
            labels=results.labels,
            evaluated=results.evaluated,
        )
        timed("AP of boxes", lambda: coco_metrics(truth, boxes_alone))
        metrics = timed("AP of boxes and masks", lambda: coco_metrics(truth, results))
        timed("write results.json", lambda: write_results(file, results, CATEGORIES))
        timed("read results.json", lambda: read_results(file, CATEGORIES))
        print(f"results.json: {file.stat().st_size / 1e6:.0f} MB; AP {metrics.summary['AP']:.3f}, ", end="")
        print(f"mask AP {metrics.numbers['mask_AP']:.3f}")


if __name__ == "__main__":
    main()
