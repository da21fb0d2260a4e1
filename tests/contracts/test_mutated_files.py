"""A damaged file of any format is either read or refused with a ValueError that names the file.

`python tests/contracts/test_mutated_files.py 20000` reads 20,000 mutants of each format and counts the outcomes.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

import coco_files
import voc_files
from boxwright.data.dataset import Category
from boxwright.data.decode import decode_image
from boxwright.data.formats import read_annotations
from boxwright.data.proposals import FORMAT as PROPOSALS_FORMAT
from boxwright.data.proposals import ImageProposals, write_proposals
from boxwright.data.proposals_foreign import open_proposals
from boxwright.evaluation.results import read_results
from boxwright.importers.categories import read_categories
from boxwright.training.metrics import read_lines
from boxwright.weights.foreign import read_foreign
from boxwright.weights.ours import load_weights, save_weights

MUTANTS = 150
"""Mutants per format in the test."""
EXTREMES = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff" * 7 + b"\x7f",
    b"9" * 30,
    b"[" * 2000,
)


def mutant(content: bytes, random_state: random.Random) -> bytes:
    """Truncate the content, flip bits, write random or extreme bytes, or insert, delete or overwrite a slice."""
    data = bytearray(content)
    for _ in range(random_state.choice((1, 1, 1, 2, 4))):
        size = max(len(data), 1)
        place, length = random_state.randrange(size), 1 + random_state.randrange(min(size, 40))
        kind = random_state.randrange(7)
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[place] ^= 1 << random_state.randrange(8)
        elif kind == 2:
            data[place : place + length] = random_state.randbytes(length)
        elif kind == 3:
            extreme = random_state.choice(EXTREMES)
            data[place : place + len(extreme)] = extreme
        elif kind == 4:
            source = random_state.randrange(size)
            data[place:place] = data[source : source + length]
        elif kind == 5:
            del data[place : place + length]
        else:
            source = random_state.randrange(size)
            data[place : place + length] = data[source : source + length]
    return bytes(data)


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(3, 4, generator=generator) for name in ("conv1.weight", "layer.bias")}
    return {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state, "step": 1.5}


def torch_file(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def arrays(protocol: int) -> bytes:
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3), "lr": np.float64(0.5)}
    return pickle.dumps({"model": weights, "names": ["a", "b"], "iteration": 2**40}, protocol)


def detectron_proposals() -> bytes:
    boxes = [np.array([[1, 2, 3, 4], [0, 0, 9, 9]], np.float32), np.zeros((0, 4), np.float32)]
    logits = [np.array([2.0, -1.0], np.float32), np.zeros(0, np.float32)]
    return pickle.dumps({"ids": [7, 3], "boxes": boxes, "objectness_logits": logits, "bbox_mode": 0}, 4)


def list_of_proposals() -> bytes:
    return pickle.dumps([np.array([[1, 2, 3, 4, 0.5]], np.float32), np.zeros((0, 5), np.float32)], 2)


def bytes_of(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def boxwright_proposals(path: Path) -> None:
    image = ImageProposals(np.array([[1, 2, 3, 4]], np.float32), np.array([0.5], np.float32))
    metadata = {"splits": [{"name": "val", "images": 2}]}
    write_proposals(path, image_ids=[7, 3], counts=[1, 1], images=[image, image], metadata=metadata)


def boxwright_weights(path: Path) -> None:
    save_weights(path, tensors()["state_dict"], {"categories": [{"id": 1, "name": "a"}], "step": 3})


def image(ending: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    done, content = cv2.imencode(ending, cv2.GaussianBlur(pixels, (5, 5), 0))
    assert done
    return content.tobytes()


def results_rows() -> bytes:
    row = {"image_id": 7, "category_id": 1, "bbox": [1.5, 2, 3, 4], "score": 0.25}
    mask = {"segmentation": {"size": [4, 5], "counts": [5, 10, 5]}}
    text = {"segmentation": {"size": [40, 60], "counts": "0X1hY2"}}
    return json.dumps([row | mask, row | text]).encode()


def read_proposals(path: Path) -> None:
    file = open_proposals(path, image_ids=[7, 3])
    for image_id in file.image_ids.tolist():
        file.of(image_id, (50, 50))


def read_coco(path: Path) -> None:
    raise_faults(read_annotations(path))


def read_voc(path: Path) -> None:
    """Read the data set whose only annotation file is the mutant."""
    raise_faults(read_annotations(path.parent.parent / "ImageSets" / "Main" / "train.txt"))


def raise_faults(reading: Any) -> None:
    errors = [fault for fault in reading.faults if fault.severity == "error"]
    if errors:
        raise ValueError(str(errors[0]))


VOC_XML = voc_files.annotation_xml("000001", [("cat", (5, 6, 30, 20.5), 0), ("dog", (1, 1, 60, 40), 1)])

CATEGORY = [Category(1, "a")]
FORMATS: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], Any]]] = {
    "torch, zip": (partial(torch_file, zipped=True), "x.pth", read_foreign),
    "torch, old": (partial(torch_file, zipped=False), "x.pth", read_foreign),
    "pickle 0": (partial(arrays, 0), "x.pkl", read_foreign),
    "pickle 2": (partial(arrays, 2), "x.pkl", read_foreign),
    "pickle 5": (partial(arrays, 5), "x.pkl", read_foreign),
    "safetensors": (lambda: save_tensors(tensors()["state_dict"]), "x.safetensors", read_foreign),
    "Boxwright weights": (partial(bytes_of, boxwright_weights), "x.safetensors", load_weights),
    "Boxwright proposals": (partial(bytes_of, boxwright_proposals), "x.safetensors", read_proposals),
    "Detectron proposals": (detectron_proposals, "x.pkl", read_proposals),
    "list of proposals": (list_of_proposals, "x.pkl", read_proposals),
    "JPEG": (partial(image, ".jpg"), "x.jpg", decode_image),
    "PNG": (partial(image, ".png"), "x.png", decode_image),
    "TIFF": (partial(image, ".tiff"), "x.tiff", decode_image),
    "BMP": (partial(image, ".bmp"), "x.bmp", decode_image),
    "WebP": (partial(image, ".webp"), "x.webp", decode_image),
    "COCO": (lambda: json.dumps(coco_files.document()).encode(), "instances_train.json", read_coco),
    "COCO results": (results_rows, "results.json", partial(read_results, categories=CATEGORY)),
    "VOC": (lambda: VOC_XML.encode(), "Annotations/000001.xml", read_voc),
    "categories": (lambda: b'[{"id": 1, "name": "a"}, {"id": 3, "name": "b c"}]', "x.json", read_categories),
    "metrics": (lambda: b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n', "metrics.jsonl", read_lines),
}


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    """Return "read", "refused", or a description of the reader's fault."""
    try:
        read(path)
    except ValueError as error:
        if type(error) is UnicodeDecodeError or path.name not in str(error):
            return f"{type(error).__name__} without the file's name: {error}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def outcomes(name: str, folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Read `count` mutants of a format and count the outcomes."""
    make, file_name, read = FORMATS[name]
    content, path = make(), folder / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "VOC":
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        (folder / "ImageSets" / "Main" / "train.txt").write_text("000001\n")
        (folder / "classes.txt").write_text("cat\ndog\n")
    path.write_bytes(content)
    assert outcome(read, path) == "read"
    random_state = random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    for _ in range(count):
        path.write_bytes(mutant(content, random_state))
        counts[outcome(read, path)] += 1
    return counts


@pytest.mark.parametrize("name", FORMATS)
def test_mutants(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    counts = outcomes(name, tmp_path, MUTANTS)
    assert set(counts) <= {"read", "refused"}
    assert counts["refused"] > MUTANTS // 20, "too few mutants were refused: the mutations must do damage"


@pytest.mark.parametrize("read", [load_weights, read_foreign, read_proposals])
@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "C64", "U64", "BOOL"])
def test_dtypes_that_numpy_or_torch_lack(tmp_path: Path, kind: str, read: Callable[[Path], Any]) -> None:
    """Safetensors has dtypes that numpy and torch lack."""
    columns = ("image_ids", "offsets", "boxes", "scores")
    shapes = [[8], [8], [2, 4], [8]]
    size = {"F4": 4, "F6_E2M3": 6, "F8_E8M0": 8, "F8_E4M3": 8, "C64": 64, "U64": 64, "BOOL": 8}[kind]
    header: dict[str, Any] = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [place * size, (place + 1) * size]}
        for place, (name, shape) in enumerate(zip(columns, shapes, strict=True))
    }
    proposals = {"format": PROPOSALS_FORMAT, "splits": [{"name": "val", "images": 8}]}
    metadata = {"boxwright": json.dumps({"format": "boxwright-1"}), "boxwright_proposals": json.dumps(proposals)}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * size))
    assert outcome(read, path) in (("refused",) if read is read_proposals else ("read", "refused"))


if __name__ == "__main__":
    warnings.simplefilter("error")
    for format_name in sys.argv[2:] or FORMATS:
        with tempfile.TemporaryDirectory() as temporary:
            counts = outcomes(format_name, Path(temporary), int(sys.argv[1]), seed=1)
            others = {text: count for text, count in counts.items() if text not in ("read", "refused")}
            sys.stdout.write(
                f"{format_name}: {counts['read']} read, {counts['refused']} refused, {sum(others.values())} others\n"
            )
            for text, number in sorted(others.items(), key=lambda pair: -pair[1])[:5]:
                sys.stdout.write(f"    {number} {text[:200]}\n")
