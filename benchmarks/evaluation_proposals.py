"""Compare the time of proposal recall (AR) with hotcoco's, for a validation set of the size of COCO val2017.

python benchmarks/evaluation_proposals.py [--images 5000] [--proposals 1000]

Objects and proposals are generated: 7.3 objects per image on average, 1% of them crowd regions. 30% of the proposals
are close to an object, the others are at random positions.
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
    """The part of a dataset that the evaluation uses."""

    annotations: Path
    categories = (Category(id=1, name="thing"),)


def generate(path: Path, num_images: int, num_proposals: int) -> Results:
    """Write an annotation file and generate proposals, sorted by score within each image."""
    rng = np.random.default_rng(0)
    per_image = rng.poisson(7.3, num_images)
    total = int(per_image.sum())
    sizes = np.exp(rng.normal(4, 1, (total, 2))).clip(4, 400)
    boxes = np.concatenate([rng.random((total, 2)) * (CANVAS - sizes), sizes], 1).round(2)
    image_ids = np.repeat(np.arange(num_images), per_image)
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for i, (image, box, crowd) in enumerate(
            zip(image_ids.tolist(), boxes.tolist(), (rng.random(total) < 0.01).astype(int).tolist(), strict=True)
        )
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(num_images)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_bytes(msgspec.json.encode(document))

    proposal_images = np.repeat(np.arange(num_images), num_proposals)
    num_total = len(proposal_images)
    starts = np.concatenate([[0], np.cumsum(per_image)])
    matches = starts[proposal_images] + (rng.random(num_total) * per_image[proposal_images]).astype(np.int64)
    base = boxes[matches.clip(max=total - 1)]
    proposals = base + np.concatenate([base[:, 2:] * rng.normal(0, 0.2, (num_total, 2)), np.zeros_like(base[:, 2:])], 1)
    proposals[:, 2:] *= np.exp(rng.normal(0, 0.25, (num_total, 2)))
    is_random = rng.random(num_total) < 0.7
    proposals[is_random, :2] = rng.random((int(is_random.sum()), 2)) * CANVAS * 0.8
    return Results(
        image_ids=proposal_images,
        boxes=proposals,
        scores=np.tile(np.linspace(1, 0, num_proposals), num_images),
        labels=np.zeros(num_total, np.int64),
        evaluated=np.arange(num_images),
    )


def hotcoco_recall(dataset: AnnotationFile, results: Results) -> list[float]:
    """The same metrics as `proposal_recall`, computed by hotcoco."""
    evaluator = GroundTruth(dataset).evaluator(results, max_detections=LIMITS)  # type: ignore[arg-type]
    evaluator.params.use_cats = False
    evaluator.evaluate()
    evaluator.accumulate()
    recall = evaluator.eval["recall"]  # [T, 1, A, M]
    return [mean_measured(recall[:, :, area, m]) for area in range(4) for m in range(len(LIMITS))]


def main() -> None:
    """Generate annotations and proposals, and print the times and metrics of both implementations."""
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
                metrics = measure(dataset, results)  # type: ignore[operator]
                seconds, processor = time.perf_counter() - start, time.process_time() - processor
                print(f"{name}: {seconds:.2f} s ({processor:.2f} s of processor time)")
            values = list(metrics.values()) if isinstance(metrics, dict) else metrics
            print("  " + " ".join(f"{value:.6f}" for value in values))


if __name__ == "__main__":
    main()
