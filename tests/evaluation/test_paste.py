"""Pasted masks equal bilinear sampling at pixel centres, and torchvision's masks up to a border of one pixel."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn.functional import grid_sample
from torchvision.models.detection.roi_heads import paste_masks_in_image

from boxwright.evaluation.paste import paste_masks

HEIGHT, WIDTH = 90, 130


def smooth_masks(num: int, cells: int = 28, seed: int = 0) -> np.ndarray:
    """[num, cells, cells] float32 in 0..1: blobs with holes and islands."""
    rng = np.random.default_rng(seed)
    noise = np.stack([cv2.GaussianBlur(rng.normal(size=(cells, cells)), (0, 0), cells / 10) for _ in range(num)])
    return (1 / (1 + np.exp(-noise / noise.std() * 3))).astype(np.float32)


def round_masks(num: int, cells: int = 28) -> np.ndarray:
    """[num, cells, cells] float32: ellipses with soft edges; some extend beyond their boxes."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, cells), np.linspace(-1, 1, cells))
    wide, high, lean = (
        values[:, None, None] for values in rng.uniform([[0.6], [0.6], [-0.6]], [[1.4], [1.2], [0.6]], (3, num))
    )
    distance = np.sqrt(((x + lean * y) / wide) ** 2 + (y / high) ** 2)
    return (1 / (1 + np.exp(12 * (distance - 1)))).astype(np.float32)


def random_boxes(num: int, seed: int = 0) -> np.ndarray:
    """[num, 4] float64 boxes: sizes from less than a pixel to the whole image; some extend beyond its border."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (num, 2)) * [WIDTH, HEIGHT]
    sides = 2 ** rng.uniform(-1, 7, (num, 2))
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)


def sizes(num: int) -> np.ndarray:
    return np.tile(np.array([[HEIGHT, WIDTH]]), (num, 1))


def sampled(probabilities: np.ndarray, box: np.ndarray) -> np.ndarray:
    """[HEIGHT, WIDTH] float64: a mask sampled at the centres of all pixels with torch's `grid_sample`."""
    x = (np.arange(WIDTH) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (np.arange(HEIGHT) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.from_numpy(np.stack(np.broadcast_arrays(x[None], y[:, None]), axis=-1))[None]
    return grid_sample(torch.from_numpy(probabilities)[None, None].double(), grid, align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("cells", [1, 7, 28, 56])
def test_equals_bilinear_sampling_at_the_centres_of_the_pixels(cells: int) -> None:
    probabilities, boxes = smooth_masks(60, cells), random_boxes(60)
    pasted = paste_masks(probabilities, boxes, sizes(60))
    assert len(pasted) == 60
    num_pixels = 0
    for index, mask in enumerate(pasted):
        expected = sampled(probabilities[index], boxes[index])
        undecided = np.abs(expected - 0.5) < 1e-5
        assert (mask == (expected >= 0.5))[~undecided].all()
        num_pixels += mask.sum()
    assert num_pixels > 1_000


def test_rle_equals_the_coco_api() -> None:
    probabilities, boxes = smooth_masks(60), random_boxes(60)
    probabilities[:5] = 1.0
    boxes[:3] = [[0, 0, WIDTH, HEIGHT], [-9, -9, WIDTH + 9, HEIGHT + 9], [20, -5, 60, HEIGHT + 5]]
    pasted = paste_masks(probabilities, boxes, sizes(60))
    for mask, characters in zip(pasted, pasted.counts, strict=True):
        assert characters == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert pasted[1].all()
    assert pasted[2][:, 20:60].all()


def test_torchvision_agrees_up_to_a_border_of_one_pixel() -> None:
    probabilities, boxes = round_masks(300), random_boxes(300, seed=1)
    boxes = np.clip(boxes, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) > 4]
    probabilities = probabilities[: len(boxes)]
    theirs = paste_masks_in_image(
        torch.from_numpy(probabilities)[:, None], torch.from_numpy(boxes).float(), (HEIGHT, WIDTH)
    )
    assert len(boxes) > 100
    for ours, peer in zip(
        paste_masks(probabilities, boxes, sizes(len(boxes))), theirs[:, 0].numpy() > 0.5, strict=True
    ):
        inner = cv2.erode(peer.astype(np.uint8), np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
        outer = cv2.dilate(peer.astype(np.uint8), np.ones((3, 3))) > 0
        assert not (inner & ~ours).any()
        assert not (ours & ~outer).any()


def test_nothing_to_paste_gives_empty_masks() -> None:
    probabilities = smooth_masks(5)
    boxes = np.array([[10, 10, 50, 50], [20, 20, 20, 40], [20, 40, 30, 40], [-50, 2, -10, 9], [7.6, 7.6, 8.4, 8.4]])
    probabilities[0] = 0.4999
    pasted = paste_masks(probabilities, boxes, sizes(5))
    assert not any(mask.any() for mask in pasted)
    assert coco_mask.area(pasted.to_coco()).tolist() == [0] * 5
    none = paste_masks(probabilities[:0], boxes[:0], sizes(0))
    assert len(none) == 0
    assert none.to_coco() == []
    assert len(paste_masks(np.ones((1, 28, 28), np.float32), np.array([[1.0, 1, 9, 9]]), np.array([[0, 0]]))[0]) == 0


def test_images_of_many_sizes_are_pasted_together() -> None:
    probabilities, boxes = smooth_masks(4), random_boxes(4, seed=3).clip(1, 60)
    boxes[:, 2:] += 20
    image_sizes = np.array([[90, 130], [70, 64], [33, 200], [90, 130]])
    together = paste_masks(probabilities, boxes, image_sizes)
    for index in range(4):
        rows = slice(index, index + 1)
        alone = paste_masks(probabilities[rows], boxes[rows], image_sizes[rows])
        assert alone.counts[0] == together.counts[index]
        assert together[index].shape == tuple(image_sizes[index])


def test_pasting_in_chunks_equals_pasting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, boxes = smooth_masks(60), random_boxes(60)
    at_once = paste_masks(probabilities, boxes, sizes(60))
    for num_columns in (1, 100, 700):
        monkeypatch.setattr("boxwright.evaluation.paste._COLUMNS_AT_ONCE", num_columns)
        assert paste_masks(probabilities, boxes, sizes(60)).to_coco() == at_once.to_coco()


def test_memory_does_not_grow_with_the_number_of_masks_of_a_huge_image() -> None:
    def peak(num: int) -> int:
        boxes, image_sizes = np.tile([[0.0, 0, 20_000, 500]], (num, 1)), np.tile([[500, 20_000]], (num, 1))
        tracemalloc.start()
        pasted = paste_masks(smooth_masks(num), boxes, image_sizes)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(pasted) == num
        return peak_bytes

    assert peak(24) < 1.5 * peak(6)
