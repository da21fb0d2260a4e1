"""Measure the time and memory of COCO evaluation (box AP and mask AP) for a validation set of COCO's size.

    python benchmarks/evaluation.py [--images 5000] [--detections 100]

The script generates annotations (7 objects with polygons per image) and detections with masks. 70% of the detections
are close to an object, the others are at random positions. 50 distinct images are repeated under different ids.
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
NUM_TEMPLATES = 50
NUM_OBJECTS = 7
CATEGORIES = [Category(id=category_id, name=f"class {category_id}") for category_id in range(1, 81)]
Result = TypeVar("Result")


class AnnotationFile:
    """The part of a dataset that the evaluation uses."""

    categories = CATEGORIES

    def __init__(self, annotations: Path) -> None:
        """Set the path of the annotation file."""
        self.annotations = annotations

    def __len__(self) -> int:
        """Not used by the evaluation, which reads the annotation file."""
        raise NotImplementedError

    def __getitem__(self, position: int) -> Any:
        """Not used by the evaluation, which reads the annotation file."""
        raise NotImplementedError


def random_boxes(rng: np.random.Generator, num: int) -> np.ndarray:
    """[num, 4] float64 xyxy with log-uniform sides from 8 to 388 pixels: mostly small, as in COCO."""
    sizes = np.minimum(2 ** rng.uniform(3, 8.6, (num, 2)), [WIDTH, HEIGHT])
    corners = rng.uniform(0, 1, (num, 2)) * ([WIDTH, HEIGHT] - sizes)
    return np.concatenate([corners, corners + sizes], axis=1)


def write_annotations(path: Path, objects: np.ndarray, labels: np.ndarray, num_images: int) -> None:
    """Write an annotation file whose objects are ellipses, as polygons of 24 points."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations = []
    for image in range(num_images):
        template = image % NUM_TEMPLATES
        for (x1, y1, x2, y2), label in zip(objects[template].tolist(), labels[template].tolist(), strict=True):
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


def generate_results(objects: np.ndarray, labels: np.ndarray, num_images: int, num: int) -> Results:
    """Generate `num` detections per image, 70% of them close to an object, with soft ellipses as masks."""
    rng = np.random.default_rng(1)
    grid = np.linspace(-1, 1, 28)
    ellipse = np.clip(1.5 - (grid[:, None] ** 2 + grid**2), 0, 1)
    boxes, pred_labels, masks = [], [], []
    for template in range(NUM_TEMPLATES):
        matches = rng.integers(0, NUM_OBJECTS, num)
        sizes = np.tile(objects[template, matches, 2:] - objects[template, matches, :2], 2)
        close_boxes = objects[template, matches] + rng.normal(0, 0.1, (num, 4)) * sizes
        is_close = rng.random(num) < 0.7
        corners = np.where(is_close[:, None], close_boxes, random_boxes(rng, num))
        corners = corners.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        probabilities = np.clip(ellipse + rng.normal(0, 0.05, (num, 28, 28)), 0, 1).astype(np.float32)
        masks += list(paste_masks(probabilities, corners, np.tile([[HEIGHT, WIDTH]], (num, 1))).counts)
        boxes.append(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))
        pred_labels.append(np.where(is_close, labels[template, matches], rng.integers(0, len(CATEGORIES), num)))
    order = (np.arange(num_images * num).reshape(num_images, num) % (NUM_TEMPLATES * num)).ravel()
    return Results(
        image_ids=np.repeat(np.arange(1, num_images + 1), num),
        boxes=np.concatenate(boxes)[order].round(3),
        scores=rng.random(len(order)),
        labels=np.concatenate(pred_labels)[order],
        evaluated=np.arange(1, num_images + 1),
        masks=Masks.of(masks, (HEIGHT, WIDTH)).select(order),
    )


def timed(name: str, function: Callable[[], Result]) -> Result:
    """Call a function, and print its wall-clock time, processor time and the peak memory of the process so far."""
    start, start_processor = time.perf_counter(), time.process_time()
    result = function()
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    print(f"| {name} | {seconds:.1f} | {processor:.1f} | {peak:.2f} GiB |", flush=True)
    return result


def main() -> None:
    """Generate annotations and detections, then measure each step of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, hotcoco {hotcoco.__version__}, numpy {np.__version__}")
    rng = np.random.default_rng(0)
    objects = random_boxes(rng, NUM_TEMPLATES * NUM_OBJECTS).reshape(NUM_TEMPLATES, NUM_OBJECTS, 4)
    labels = rng.integers(0, len(CATEGORIES), (NUM_TEMPLATES, NUM_OBJECTS))
    with tempfile.TemporaryDirectory() as folder:
        annotations, file = Path(folder) / "instances.json", Path(folder) / "results.json"
        write_annotations(annotations, objects, labels, arguments.images)
        results = timed("(generate)", lambda: generate_results(objects, labels, arguments.images, arguments.detections))
        assert results.masks is not None
        print(f"{len(results)} detections, {sum(map(len, results.masks.counts)) / 1e6:.0f} MB of run-length masks")
        truth = timed("read annotations", lambda: GroundTruth(AnnotationFile(annotations)))
        timed("read masks of annotations", lambda: truth.coco_of_masks)
        box_results = Results(
            image_ids=results.image_ids,
            boxes=results.boxes,
            scores=results.scores,
            labels=results.labels,
            evaluated=results.evaluated,
        )
        timed("box AP", lambda: coco_metrics(truth, box_results))
        metrics = timed("box AP and mask AP", lambda: coco_metrics(truth, results))
        timed("write results.json", lambda: write_results(file, results, CATEGORIES))
        timed("read results.json", lambda: read_results(file, CATEGORIES))
        print(f"results.json: {file.stat().st_size / 1e6:.0f} MB; AP {metrics.summary['AP']:.3f}, ", end="")
        print(f"mask AP {metrics.numbers['mask_AP']:.3f}")


if __name__ == "__main__":
    main()
