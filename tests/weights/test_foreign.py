from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from boxwright.weights import foreign
from boxwright.weights.foreign import read_foreign, require_safe_torch


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_files_of_both_formats(tmp_path: Path, new_format: bool) -> None:
    weight = torch.randn(2, 3)
    content = {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": {"module.w": weight}, "optimizer": {}}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format)
    file = read_foreign(tmp_path / "x.pth")
    assert torch.equal(file.tensors["w"], weight), "the prefix `module.` must be removed"
    assert file.about["meta"]["CLASSES"] == ("a", "b")
    assert file.sha256 == hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays(tmp_path: Path, protocol: int) -> None:
    content = {"model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "__author__": "someone"}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    file = read_foreign(tmp_path / "x.pkl")
    assert file.tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.about == {"__author__": "someone"}


def test_arrays_of_another_byte_order_and_layout(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": array, "scalar": np.array(2.0)}))
    tensors = read_foreign(tmp_path / "x.pkl").tensors
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["scalar"].shape == ()


def test_safetensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    file = read_foreign(tmp_path / "x.safetensors")
    assert file.tensors["w"].tolist() == [1, 1]
    assert file.about["metadata"] == {"format": "pt"}


@pytest.mark.parametrize("kind", ["new", "old", *range(6)])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, kind: str | int) -> None:
    content = {"state_dict": {"w": torch.ones(1)}, "meta": Evil(f"touch {tmp_path / 'effect'}")}
    if isinstance(kind, str):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=kind == "new")
    else:
        (tmp_path / "x.pth").write_bytes(pickle.dumps({"meta": content["meta"]}, kind))
    with pytest.raises(ValueError, match=r"x\.pth(: the file contains| is refused).*system"):
        read_foreign(tmp_path / "x.pth")
    assert not (tmp_path / "effect").exists()


def test_hash_is_checked_before_anything_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"expected SHA-256 00ff.*, got [0-9a-f]{64}"):
        read_foreign(tmp_path / "x.pth", sha256="00FF")
    with pytest.raises(ValueError, match="damaged or not a torch file"):
        read_foreign(tmp_path / "x.pth")


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_truncated_files_are_refused(tmp_path: Path, size: int) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pth")
    save_file({"w": torch.ones(1000)}, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
        with pytest.raises(ValueError, match=name):
            read_foreign(tmp_path / name)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"0" * 10**6)
    with pytest.raises(ValueError, match="the file is compressed"):
        read_foreign(tmp_path / "x.pth")


def test_files_without_named_tensors_and_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected tensors by name at the top level"):
        read_foreign(tmp_path / "x.pth")
    torch.save([torch.ones(1)], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors by name, got list"):
        read_foreign(tmp_path / "x.pth")
    monkeypatch.setattr(foreign, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than the limit of 100"):
        read_foreign(tmp_path / "x.pth")


def test_torch_versions_with_known_vulnerabilities_are_refused() -> None:
    require_safe_torch("2.6.0+cpu")
    require_safe_torch("10.0.1")
    for version in ("2.5.1+cu124", "1.13.0"):
        with pytest.raises(ValueError, match=r"CVE-2025-32434.*Install torch 2\.6"):
            require_safe_torch(version)
