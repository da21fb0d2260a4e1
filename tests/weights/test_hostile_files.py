"""Every reader of weights refuses malicious files with a one-line error and without side effects."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import boxwright
from boxwright.backbones.fpn import FPN
from boxwright.backbones.timm import TimmBackbone, timm_fpn
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.data.proposals_foreign import open_proposals
from boxwright.detectors.rcnn import faster_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.training.experiment import Experiment, build, to_json
from boxwright.training.init_weights import load_init
from boxwright.weights.foreign import read_foreign
from boxwright.weights.ours import save_weights

CATEGORIES = [Category(id=1, name="a")]
EXPERIMENT = "boxwright.training.experiment.Experiment"
FASTER = "boxwright.detectors.rcnn.faster_rcnn"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def read_init(path: Path) -> None:
    load_init(nn.Linear(1, 1), path, CATEGORIES)


READERS: dict[str, Callable[[Path], Any]] = {
    "load": boxwright.load,
    "init": read_init,
    "foreign": read_foreign,
    "proposals": partial(open_proposals, image_ids=[1]),
}


def safetensors(header: Any, body: bytes = bytes(4), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


FILES = {
    "the same bytes twice": safetensors({"a": ONE, "b": ONE}),
    "overlapping offsets": safetensors(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {**ONE, "data_offsets": [4, 8]}}, bytes(8)
    ),
    "offsets past the end": safetensors({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}),
    "offsets backwards": safetensors({"a": {**ONE, "data_offsets": [4, 0]}}),
    "a hole": safetensors({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8)),
    "trailing bytes": safetensors({"a": ONE}, bytes(8)),
    "a header of 2^63 bytes": safetensors({"a": ONE}, length=2**63),
    "a header of 2^64 - 1 bytes": safetensors({"a": ONE}, length=2**64 - 1),
    "a header longer than the file": safetensors({"a": ONE}, length=99_000_000),
    "a header that is no JSON": safetensors(b"{no JSON}"),
    "a header nested 50,000 deep": safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a name twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "two pages": safetensors(b'{"__metadata__":{"boxwright":"1"},"__metadata__":{"boxwright":"2"}}', b""),
    "an unknown type": safetensors({"a": {**ONE, "dtype": "PYOBJECT"}}),
    "a huge shape": safetensors({"a": {**ONE, "shape": [2**31, 2**31]}}),
    "a shape whose size overflows": safetensors({"a": {**ONE, "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
    "a negative shape": safetensors({"a": {**ONE, "shape": [-1]}}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_damaged_headers(name: str, reader: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(FILES[name])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        READERS[reader](path)


def experiment(model: Any) -> dict[str, Any]:
    resize = {"call": "boxwright.data.buckets.Resize", "arguments": {}}
    return {"call": EXPERIMENT, "arguments": {"model": model, "resize": resize}}


def faster(backbone: Any = None, **arguments: Any) -> dict[str, Any]:
    backbone = backbone or {"call": "boxwright.backbones.fpn.resnet_fpn", "arguments": {"depth": 18}}
    return {"call": FASTER, "arguments": {"backbone": backbone, **arguments}}


def part(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"call": f"boxwright.{kind}", "arguments": numbers}


def box(**numbers: Any) -> dict[str, Any]:
    return experiment(faster(box=part("heads.box_head.BoxConfig", **numbers)))


def mask(**numbers: Any) -> dict[str, Any]:
    model = faster(mask=part("heads.mask_head.MaskConfig", **numbers))
    return experiment({**model, "call": "boxwright.detectors.rcnn.mask_rcnn"})


def retina(**numbers: Any) -> dict[str, Any]:
    body = part("backbones.fpn.resnet_fpn", depth=18, out_stages=[3, 4, 5], extra="c5")
    head = part("heads.retina_head.RetinaConfig", **numbers)
    return experiment(part("detectors.retinanet.retinanet", backbone=body, retina=head))


def body(**numbers: Any) -> dict[str, Any]:
    return experiment(faster(part("backbones.fpn.resnet_fpn", **numbers)))


def resize(side: int) -> dict[str, Any]:
    page = box()
    return {**page, "arguments": {**page["arguments"], "resize": part("data.buckets.Resize", short=side, long=side)}}


def scales(mode: str, *sizes: list[int]) -> dict[str, Any]:
    page = box()
    return {**page, "arguments": {**page["arguments"], "scale_mode": mode, "scales": sizes}}


NAMES = (
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "boxwright.data.shapes.write_shapes",
    "boxwright.weights.ours.save_weights",
    "boxwright.training.experiment.importlib.import_module",
    "boxwright.training.experiment.build",
    "boxwright.detectors.rcnn.RCNN",
    "boxwright.detectors.rcnn.torch.load",
    "boxwright.__main__.app",
    "boxwright.cli.main.app",
    "boxwright..os.system",
    "",
)
PAGES: dict[str, Any] = {
    **{f"calls {name!r}": {"call": name, "arguments": {"command": "touch hit"}} for name in NAMES},
    **{f"holds {name!r}": experiment(faster({"call": name, "arguments": {"folder": "hit"}})) for name in NAMES},
    "a huge layer": box(width=10**7),
    "a negative layer": box(width=-5),
    "a billion cells": box(output_size=10**9),
    "a billion layers": mask(num_convs=10**9),
    "a billion layers of one stage": retina(num_convs=10**9),
    "a billion layers with norms": retina(num_convs=10**9, norm="gn"),
    "a billion anchors": retina(scales_per_octave=10**9),
    "a billion blocks": body(depth=10**9),
    "a billion groups": body(depth=50, groups=10**9),
    "groups a billion wide": body(depth=50, groups=1, width_per_group=10**9),
    "a pyramid a billion wide": body(depth=18, channels=10**9),
    "a billion sizes of images": scales("range", [1, 1], [10**12, 10**12]),
    "an image a billion pixels wide": resize(10**9),
    "a detector's class without its parts": experiment(part("detectors.rcnn.RCNN")),
    "a module that is no detector": experiment(part("backbones.fpn.resnet_fpn", depth=18)),
    "a class of a billion blocks": experiment(
        faster(part("backbones.fpn.FPN", body=part("backbones.resnet.ResNet", depth=50, groups=10**9)))
    ),
    "a class a billion wide": experiment(
        faster(part("backbones.fpn.FPN", body=part("backbones.resnet.ResNet", depth=18), channels=10**9))
    ),
    "a head that is no head": experiment(faster(box_head=part("backbones.fpn.resnet_fpn", depth=18))),
    "a head with what its detector passes": experiment(
        faster(box_head=part("heads.box_head.BoxHead", config=part("heads.box_head.BoxConfig", width=10**7)))
    ),
    "a depth that is text": experiment(
        faster({"call": "boxwright.backbones.fpn.resnet_fpn", "arguments": {"depth": "os"}})
    ),
    "no call": {"call": 1, "arguments": []},
}
TEXTS = {
    "a page that is no JSON": "{",
    "a page nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "a page of calls in calls": '{"format": "boxwright-1", "categories": [], "experiment": '
    + f'{{"call": "{FASTER}", "arguments": {{"backbone": ' * 5000
    + "1"
    + "}}" * 5000
    + "}",
    "a number of 5,000 digits": '{"format": "boxwright-1", "step": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", [*PAGES, *TEXTS])
def test_hostile_metadata(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = {"format": "boxwright-1", "categories": [{"id": 1, "name": "a"}], "experiment": PAGES.get(name)}
    path = tmp_path / "weights.safetensors"
    text = TEXTS.get(name) or json.dumps(page)
    path.write_bytes(safetensors({"__metadata__": {"boxwright": text}, "a": ONE}))
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        boxwright.load(path)
    result = CliRunner().invoke(app, ["weights", "inspect", str(path)])
    assert result.exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_metadata_cannot_cause_downloads_or_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata names pretrained weights, which a builder would download and then overwrite with the file's."""
    timm = pytest.importorskip("timm", reason="needs the extra boxwright[timm]")
    asked = []

    def create_model(*args: Any, pretrained: bool = False, **arguments: Any) -> Any:
        asked.append(pretrained)
        return make(*args, pretrained=pretrained, **arguments)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    backbone: Any = partial(timm_fpn, name="resnet10t", channels=16)
    model = partial(faster_rcnn, box=BoxConfig(width=8))
    detector = build(partial(model, backbone=backbone), num_classes=1)
    page = {
        "experiment": to_json(Experiment(model=partial(model, backbone=partial(backbone, pretrained=True)))),
        "categories": [{"id": 1, "name": "a"}],
    }
    save_weights(tmp_path / "weights.safetensors", detector.state_dict(), page)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = boxwright.load(tmp_path / "weights.safetensors").detector.state_dict()
    assert asked == [False]
    by_class = partial(FPN, body=partial(TimmBackbone, name="resnet10t", pretrained=True), channels=16)
    of_classes = {**page, "experiment": to_json(Experiment(model=partial(model, backbone=by_class)))}
    save_weights(tmp_path / "classes.safetensors", detector.state_dict(), of_classes)
    boxwright.load(tmp_path / "classes.safetensors")
    assert asked == [False, False]
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in detector.state_dict().items())
    page["experiment"]["arguments"]["model"]["arguments"]["backbone"]["arguments"]["name"] = "hf-hub:someone/hit"
    save_weights(tmp_path / "hub.safetensors", detector.state_dict(), page)
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:someone/hit'"):
        boxwright.load(tmp_path / "hub.safetensors")


class Reduces:
    """An object whose pickle calls `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def programs(command: str) -> dict[str, bytes]:
    """Pickles that run a command when loaded with `pickle`, or contain something other than data."""
    line = command.encode()
    string = struct.pack("<I", len(line)) + line
    return {
        **{f"reduce, protocol {number}": pickle.dumps({"model": Reduces(command)}, number) for number in range(6)},
        "global": b"cos\nsystem\n(S'" + line + b"'\ntR.",
        "inst": b"(S'" + line + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nX" + string + b"o.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93X" + string + b"\x85R.",
        "build": b"cos\nsystem\n}(S'x'\nI1\nub.",
        "persistent id": b"P" + line + b"\n.",
        "binary persistent id": b"\x80\x02X" + string + b"Q.",
    }


@pytest.mark.parametrize("place", ["plain", "archive"])
@pytest.mark.parametrize("name", programs(""))
def test_pickled_code_is_not_run(name: str, place: str, tmp_path: Path) -> None:
    program = programs(f"touch {tmp_path / 'hit'}")[name]
    path = tmp_path / "x.pth"
    if place == "plain":
        path.write_bytes(program)
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", program)
            file.writestr("archive/version", "3")
    for reader in READERS.values():
        with pytest.raises(ValueError, match=r"x\.pth"):
            reader(path)
    for command in (["inspect"], ["convert", "--out", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, ["weights", command[0], str(path), *command[1:]])
        assert result.exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_archive_bombs_and_escaping_paths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "inside" / "x.pth"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(20_000_000))
    with pytest.raises(ValueError, match="the file is compressed"):
        read_foreign(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../hit", b"1")
        file.writestr("/tmp/../hit", b"1")
    with pytest.raises(ValueError, match="damaged or not a torch file"):
        read_foreign(path)
    assert list(tmp_path.rglob("*hit*")) == []


def test_escaping_archive_names_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without valid weights in the archive: entries are read into memory and never written to disk."""
    inside = tmp_path / "one" / "two"
    inside.mkdir(parents=True)
    (tmp_path / "hit").write_bytes(b"as it was")
    outside = ["../hit", "../../hit", str(tmp_path / "hit"), "..\\..\\hit"]
    below = [
        "x/../../hit",
        "x/../../../hit",
        "x/link",
        "x/link/hit",
    ]  # torch reads valid archives that contain these names
    for name, entries in (("y", below + outside), ("x", below)):
        torch.save({"w": torch.ones(2)}, inside / "x.pth")
        path = (inside / "x.pth").rename(inside / f"{name}.pth")
        with zipfile.ZipFile(path, "a") as file:
            for entry in map(zipfile.ZipInfo, entries):
                if entry.filename == "x/link":  # stored as a symbolic link
                    entry.create_system, entry.external_attr = 3, 0o120777 << 16
                file.writestr(entry, str(tmp_path) if entry.filename == "x/link" else b"overwritten")
    monkeypatch.chdir(inside)
    before = listing(tmp_path)
    for path in inside.iterdir():
        for reader in READERS.values():
            with suppress(ValueError):
                reader(path)
    assert read_foreign(inside / "x.pth").tensors.keys() == {"w"}
    assert listing(tmp_path) == before


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Paths below a folder with modification time and content."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


MEASURE = """
import resource, sys
from pathlib import Path
from weights.test_hostile_files import READERS

def refused(path):
    for name, reader in READERS.items():
        try:
            reader(path)
        except ValueError:
            continue
        if name == "load":  # the other readers ignore metadata
            sys.exit(f"{path} is read")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

refused(Path(sys.argv[1]))  # imports everything that reading needs
before = peak()
for name in sys.argv[2:]:
    refused(Path(name))
    print(name, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_refusing_takes_little_memory(tmp_path: Path) -> None:
    """A 256 MB bomb, headers and shapes of up to 2^63, and metadata of models with a billion layers or channels."""
    first = tmp_path / "first.safetensors"
    first.write_bytes(FILES["a huge shape"])
    paths = [tmp_path / "bomb.pth", tmp_path / "bomb in numbers.pth"]
    with zipfile.ZipFile(paths[0], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/data.pkl", bytes(2**28))
    # Pickles that announce 2^31 - 1 bytes and contain 4.
    paths[1].write_bytes(b"\x80\x02B" + struct.pack("<I", 2**31 - 1) + b"abcd.")
    for name, content in FILES.items():
        if "huge" in name or "header of" in name or "longer" in name or "overflows" in name:
            paths.append(tmp_path / f"{len(paths)}.safetensors")
            paths[-1].write_bytes(content)
    for name, page in PAGES.items():
        if "billion" in name or "huge" in name:
            paths.append(tmp_path / f"{len(paths)}.safetensors")
            about = {"format": "boxwright-1", "categories": [{"id": 1, "name": "a"}], "experiment": page}
            paths[-1].write_bytes(safetensors({"__metadata__": {"boxwright": json.dumps(about)}, "a": ONE}))
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-c", MEASURE, str(first), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    grown = [int(line.rpartition(" ")[2]) for line in result.stdout.splitlines()]
    assert len(grown) == len(paths) >= 15
    assert max(grown) < 100 * 1024, result.stdout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    tensors = {"w": torch.ones(1000)}
    for suffix in ("new", "old"):
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "new")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        for reader in READERS.values():
            with pytest.raises(ValueError, match=r"x\.pth"):
                reader(path)


def test_a_wrong_hash_is_reported_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(programs(f"touch {tmp_path / 'hit'}")["global"])
    arguments = ["weights", "convert", str(path), "--out", str(tmp_path / "out"), "--sha256", "0" * 64]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    with pytest.raises(ValueError, match="expected SHA-256"):
        read_foreign(path, sha256="0" * 64)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pkl"]
