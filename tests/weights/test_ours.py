from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boxwright.weights import ours
from boxwright.weights.ours import load_weights, save_weights

METADATA = {
    "experiment": {"call": "boxwright.training.experiment.Experiment", "arguments": {"epochs": 1}},
    "categories": [{"id": 7, "name": "größe"}],
    "versions": {"boxwright": "0"},
}


def test_saved_weights_and_metadata_are_loaded_unchanged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(path, model.state_dict(), {**METADATA, "step": 3})
    tensors, metadata = load_weights(path)
    assert metadata == {"format": "boxwright-1", **METADATA, "step": 3}
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
    # Any safetensors reader can read the file.
    assert load_file(path).keys() == tensors.keys()


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    save_weights(tmp_path / "w.safetensors", {"a": tensor, "b": tensor, "c": tensor.T}, {})
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(loaded["a"], tensor)
    assert torch.equal(loaded["b"], tensor)
    assert torch.equal(loaded["c"], tensor.T)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(2)}, {})

    def fail_midway(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours, "save_file", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, {"a": torch.ones(2)}, {})
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(2))
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_valid_safetensors_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(100)}, METADATA)
    valid = path.read_bytes()
    invalid = {
        "empty": b"",
        "truncated header": valid[:20],
        "truncated tensors": valid[:-10],
        "trailing bytes": valid + b"more",
        "pickle": pickle.dumps({"a": 1}),
        "html": b"<html>404 Not Found</html>" * 10,
    }
    for name, content in invalid.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.safetensors is not a valid safetensors file"):
            load_weights(path)
        assert name


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "without Boxwright's metadata"),
        ({"format": "pt"}, "without Boxwright's metadata"),
        ({"boxwright": "{"}, "not valid JSON"),
        ({"boxwright": "[1]"}, "expected format 'boxwright-1', got "),
        ({"boxwright": json.dumps({"format": "boxwright-9"})}, "'boxwright-9'. Update"),
        (
            {"boxwright": json.dumps({"format": "boxwright-1", "categories": {}})},
            "'categories': expected list, got dict",
        ),
        ({"boxwright": json.dumps({"format": "boxwright-1", "experiment": 1})}, "'experiment': expected dict, got int"),
    ],
)
def test_safetensors_files_without_valid_metadata_are_rejected(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.safetensors")


def test_the_file_has_the_default_permissions(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    (tmp_path / "reference").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "reference").stat().st_mode
