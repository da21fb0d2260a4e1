"""Measure the time and memory of indexing an annotation file of the size of COCO train2017.

python benchmarks/index_coco.py [--images 118000] [--objects 860000]

The script writes an annotation file with random polygons, then reads it in new processes: once without a cache and
three times from the cache.
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
    """Write annotations whose polygons have as many points as COCO's; one object in 86 is an RLE crowd region."""
    rng = random.Random(0)
    categories = [{"id": index + index // 8, "name": f"class {index}"} for index in range(1, 81)]
    with path.open("w") as file:
        file.write('{"images": [')
        for index in range(num_images):
            image = {"id": index * 5 + 9, "file_name": f"{index:012d}.jpg", "width": 640, "height": 480, "license": 3}
            image |= {"coco_url": f"http://images.cocodataset.org/train2017/{index:012d}.jpg", "flickr_url": "x" * 56}
            file.write((", " if index else "") + json.dumps(image))
        file.write('], "annotations": [')
        for index in range(num_objects):
            x, y, width, height = rng.uniform(0, 400), rng.uniform(0, 300), rng.uniform(4, 200), rng.uniform(4, 150)
            crowd = index % 86 == 0
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
                "id": 900_000_000 + index,
            }
            file.write((", " if index else "") + json.dumps(annotation))
        file.write('], "categories": ' + json.dumps(categories) + "}")


def measure_reading(annotations: Path, cache: Path) -> None:
    """Read the index once and print the time and the peak memory of this process."""
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
    """Write the annotation file, then read it without and with a cache."""
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
        for label in ("without cache", *["from cache"] * 3):
            print(f"{label}: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--read", annotations, cache], check=True)
        print(f"index: {sum(file.stat().st_size for file in cache.rglob('*.npy')) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
