"""How long the recall of proposals takes on COCO val2017's size, and what hotcoco takes for the same numbers.

python benchmarks/evaluation_proposals.py [--images 5000] [--proposals 1000]

Objects and proposals are generated: seven objects an image, one in a hundred a crowd region; three of ten proposals
lie around an object, the others anywhere.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import hotcoco
import msgspec
import numpy as np

from boxwright.data.dataset import Category
from boxwright.evaluation.coco import mean_measured
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.proposals import LIMITS, proposal_recall
from boxwright.evaluation.results import Results

CANVAS = np.array([640.0, 480.0])


@dataclass
class AnnotationFile:
    """As much of a data set as the evaluation looks at."""

    annotations: Path
    categories = (Category(id=1, name="thing"),)


def generate(path: Path, num_images: int, num_proposals: int) -> Results:
    """Write an annotation file and make proposals for it, best first in each image."""
    rng = np.random.default_rng(0)
    per_image = rng.poisson(7.3, num_images)
    total = int(per_image.sum())
    sides = np.exp(rng.normal(4, 1, (total, 2))).clip(4, 400)
    boxes = np.concatenate([rng.random((total, 2)) * (CANVAS - sides), sides], 1).round(2)
    image_ids = np.repeat(np.arange(num_images), per_image)
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for i, (image, box, crowd) in enumerate(
            zip(image_ids.tolist(), boxes.tolist(), (rng.random(total) < 0.01).astype(int).tolist(), strict=True)
        )
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(num_images)]
    page = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_bytes(msgspec.json.encode(page))

    owners = np.repeat(np.arange(num_images), num_proposals)
    starts = np.concatenate([[0], np.cumsum(per_image)])
    chosen = starts[owners] + (rng.random(len(owners)) * per_image[owners]).astype(np.int64)
    base = boxes[chosen.clip(max=total - 1)]
    proposals = base + np.concatenate(
        [base[:, 2:] * rng.normal(0, 0.2, (len(owners), 2)), np.zeros_like(base[:, 2:])], 1
    )
    proposals[:, 2:] *= np.exp(rng.normal(0, 0.25, (len(owners), 2)))
    anywhere = rng.random(len(owners)) < 0.7
    proposals[anywhere, :2] = rng.random((int(anywhere.sum()), 2)) * CANVAS * 0.8
    return Results(
        image_ids=owners,
        boxes=proposals,
        scores=np.tile(np.linspace(1, 0, num_proposals), num_images),
        labels=np.zeros(len(owners), np.int64),
        evaluated=np.arange(num_images),
    )


def hotcoco_recall(dataset: AnnotationFile, results: Results) -> list[float]:
    """The same numbers by hotcoco."""
    evaluator = GroundTruth(dataset).evaluator(results, max_detections=LIMITS)  # type: ignore[arg-type]
    evaluator.params.use_cats = False
    evaluator.evaluate()
    evaluator.accumulate()
    recall = evaluator.eval["recall"]  # [T, 1, A, M]
    return [mean_measured(recall[:, :, area, m]) for area in range(4) for m in range(len(LIMITS))]


def main() -> None:
    """Generate, measure three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--proposals", type=int, default=1000)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, hotcoco {hotcoco.__version__}")
    with TemporaryDirectory() as folder:
        dataset = AnnotationFile(Path(folder) / "instances.json")
        results = generate(dataset.annotations, arguments.images, arguments.proposals)
        for name, measure in (("boxwright", proposal_recall), ("hotcoco", hotcoco_recall)):
            for _ in range(3):
                start, processor = time.perf_counter(), time.process_time()
                numbers = measure(dataset, results)  # type: ignore[operator]
                seconds, processor = time.perf_counter() - start, time.process_time() - processor
                print(f"{name}: {seconds:.2f} s ({processor:.2f} s of processor time)")
            values = list(numbers.values()) if isinstance(numbers, dict) else numbers
            print("  " + " ".join(f"{value:.6f}" for value in values))


if __name__ == "__main__":
    main()
