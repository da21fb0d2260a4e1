"""Compare libraries for JPEG decoding and resizing on one core, and two ways to crop a window of a resized image.

    python benchmarks/decode.py ../shared/data/coco_mini/train2017

Files are read into memory first. All candidates run in alternation within each round, so that other load on the machine
affects them alike. Each result is the median over the rounds.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from boxwright.data.buckets import Resize

RESIZE = Resize(800, 1333)


def opencv_decode(data: bytes) -> np.ndarray:
    """OpenCV, with RGB output from libjpeg."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def torchvision_decode(data: bytes) -> torch.Tensor:
    """torchvision.io, [3, H, W]."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def simplejpeg_decode(data: bytes) -> np.ndarray:
    """simplejpeg, a thin wrapper around libjpeg-turbo."""
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def pillow_decode(data: bytes) -> Image.Image:
    """Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.load()
    return image


def opencv_resize(image: np.ndarray) -> np.ndarray:
    """OpenCV, bilinear without antialiasing."""
    height, width = RESIZE.size(*image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def torchvision_resize(image: torch.Tensor) -> torch.Tensor:
    """Torchvision v2 on uint8, bilinear without antialiasing."""
    return functional.resize(image, list(RESIZE.size(*image.shape[1:])), antialias=False)


def pillow_resize(image: Image.Image) -> Image.Image:
    """Pillow, bilinear with antialiasing, which cannot be disabled and only has an effect when an image shrinks."""
    height, width = RESIZE.size(image.height, image.width)
    return image.resize((width, height), Image.Resampling.BILINEAR)


CHAINS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], Any]]] = {
    "opencv": (opencv_decode, opencv_resize),
    "simplejpeg + opencv": (simplejpeg_decode, opencv_resize),
    "torchvision": (torchvision_decode, torchvision_resize),
    "pillow": (pillow_decode, pillow_resize),
}


def crop_by_resize(image: np.ndarray, resized: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
    """Crop the centre of the resized image: resize the whole image, then slice."""
    top, left = (resized[0] - window[0]) // 2, (resized[1] - window[1]) // 2
    whole = cv2.resize(image, resized[::-1], interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(whole[top : top + window[0], left : left + window[1]])


def crop_by_warp(image: np.ndarray, resized: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
    """The same crop by an affine warp, which does not compute pixels outside the window."""
    top, left = (resized[0] - window[0]) // 2, (resized[1] - window[1]) // 2
    scale_y, scale_x = resized[0] / image.shape[0], resized[1] / image.shape[1]
    matrix = np.array([[scale_x, 0, scale_x / 2 - 0.5 - left], [0, scale_y, scale_y / 2 - 0.5 - top]])
    return cv2.warpAffine(image, matrix, window[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def compare_crops(files: list[bytes], rounds: int) -> None:
    """Print the rates of both crops at several scale jitter factors. The window has the unjittered image size."""
    images = [opencv_decode(data) for data in files]
    print("\n| scale jitter | resize and slice | warp |\n| --- | --- | --- |")
    for factor in (1.1, 1.25, 1.5, 2.0, 3.0):
        rates: dict[str, list[float]] = {"resize": [], "warp": []}
        for _ in range(rounds):
            for name, crop in (("resize", crop_by_resize), ("warp", crop_by_warp)):
                start = time.perf_counter()
                for image in images:
                    window = RESIZE.size(*image.shape[:2])
                    crop(image, (int(window[0] * factor), int(window[1] * factor)), window)
                rates[name].append(len(images) / (time.perf_counter() - start))
        print(f"| {factor} | {statistics.median(rates['resize']):.0f} | {statistics.median(rates['warp']):.0f} |")


def main() -> None:
    """Measure all candidates and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-images", type=int, default=100)
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(arguments.images.glob("*.jpg"))[: arguments.num_images]]

    decode_rates: dict[str, list[float]] = {name: [] for name in CHAINS}
    resize_rates: dict[str, list[float]] = {name: [] for name in CHAINS}
    chain_rates: dict[str, list[float]] = {name: [] for name in CHAINS}
    for _ in range(arguments.rounds):
        for name, (decode, resize) in CHAINS.items():
            decoding = resizing = 0.0
            for data in files:
                start = time.perf_counter()
                image = decode(data)
                middle = time.perf_counter()
                resize(image)
                resizing += time.perf_counter() - middle
                decoding += middle - start
            decode_rates[name].append(len(files) / decoding)
            resize_rates[name].append(len(files) / resizing)
            chain_rates[name].append(len(files) / (decoding + resizing))

    packages = ["opencv-python-headless", "simplejpeg", "torch", "torchvision", "pillow"]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    print(f"{len(files)} images, {arguments.rounds} rounds, images/s on one core, median (min-max)\n")
    print("| library | decode | resize | both |\n| --- | --- | --- | --- |")
    for name in CHAINS:
        cells = [rates[name] for rates in (decode_rates, resize_rates, chain_rates)]
        print(
            "| "
            + " | ".join([name, *(f"{statistics.median(c):.0f} ({min(c):.0f}-{max(c):.0f})" for c in cells)])
            + " |"
        )
    compare_crops(files[:20], arguments.rounds)


if __name__ == "__main__":
    main()
