"""How long, and how much memory, the index of an annotation file of COCO train2017's size takes.

python benchmarks/index_coco.py [--images 118000] [--objects 860000]

Writes such a file (random polygons, streamed), then reads it in fresh processes: without a cache, and three times
from the cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np


def write_annotations(path: Path, num_images: int, num_objects: int) -> None:
    """Objects with polygons of as many points as COCO's, and one run-length crowd region in eighty-six."""
    rng = random.Random(0)
    categories = [{"id": number + number // 8, "name": f"thing {number}"} for number in range(1, 81)]
    with path.open("w") as file:
        file.write('{"images": [')
        for number in range(num_images):
            image = {"id": number * 5 + 9, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480, "license": 3}
            image |= {"coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg", "flickr_url": "x" * 56}
            file.write((", " if number else "") + json.dumps(image))
        file.write('], "annotations": [')
        for number in range(num_objects):
            x, y, width, height = rng.uniform(0, 400), rng.uniform(0, 300), rng.uniform(4, 200), rng.uniform(4, 150)
            crowd = number % 86 == 0
            segmentation: object
            if crowd:
                runs = [rng.randrange(1, 600) for _ in range(300)]
                segmentation = {"size": [480, 640], "counts": [*runs, 480 * 640 - sum(runs)]}
            else:
                count = 2 * min(max(3, round(rng.lognormvariate(2.9, 0.75))), 300)
                segmentation = [[round(rng.uniform(0, 480), 2) for _ in range(count)]]
            annotation = {
                "segmentation": segmentation,
                "area": width * height * 0.6,
                "iscrowd": int(crowd),
                "image_id": rng.randrange(num_images) * 5 + 9,
                "bbox": [round(x, 2), round(y, 2), round(width, 2), round(height, 2)],
                "category_id": rng.choice(categories)["id"],
                "id": 900_000_000 + number,
            }
            file.write((", " if number else "") + json.dumps(annotation))
        file.write('], "categories": ' + json.dumps(categories) + "}")


def measure_reading(annotations: Path, cache: Path) -> None:
    """Print the time of one reading and this process's memory."""
    from boxwright.data.formats import read_index

    start, start_processor = time.perf_counter(), time.process_time()
    index = read_index(annotations, cache_dir=cache)
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / 1024
    print(
        f"{seconds:.2f} s ({processor:.2f} s of processor time), peak {peak:.2f} GiB, "
        f"{len(index)} images, {len(index.boxes)} objects"
    )


def main() -> None:
    """Generate, then read twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--read", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        measure_reading(*arguments.read)
        return
    print(f"Python {platform.python_version()}, msgspec {msgspec.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        annotations, cache = Path(folder) / "instances.json", Path(folder) / "cache"
        write_annotations(annotations, arguments.images, arguments.objects)
        print(f"annotation file: {annotations.stat().st_size / 1e6:.0f} MB")
        for what in ("first reading", *["from the cache"] * 3):
            print(f"{what}: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--read", annotations, cache], check=True)
        print(f"index: {sum(file.stat().st_size for file in cache.rglob('*.npy')) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
