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


def test_round_trip(tmp_path: Path) -> None:
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
    # Any safetensors reader can read it.
    assert load_file(path).keys() == tensors.keys()


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    save_weights(tmp_path / "w.safetensors", {"a": whole, "b": whole, "c": whole.T}, {})
    tensors, _ = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(tensors["a"], whole)
    assert torch.equal(tensors["b"], whole)
    assert torch.equal(tensors["c"], whole.T)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(2)}, {})

    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, {"a": torch.ones(2)}, {})
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(2))
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(100)}, METADATA)
    whole = path.read_bytes()
    foreign = {
        "empty": b"",
        "header cut": whole[:20],
        "tensors cut": whole[:-10],
        "longer": whole + b"more",
        "pickle": pickle.dumps({"a": 1}),
        "text": b"<html>404 Not Found</html>" * 10,
    }
    for name, content in foreign.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.safetensors is no whole safetensors file"):
            load_weights(path)
        assert name


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not one of Boxwright's"),
        ({"format": "pt"}, "not one of Boxwright's"),
        ({"boxwright": "{"}, "no JSON"),
        ({"boxwright": "[1]"}, "format"),
        ({"boxwright": json.dumps({"format": "boxwright-9"})}, "'boxwright-9'.*update"),
        ({"boxwright": json.dumps({"format": "boxwright-1", "categories": {}})}, "no list"),
        ({"boxwright": json.dumps({"format": "boxwright-1", "experiment": 1})}, "no object"),
    ],
)
def test_other_safetensors_files(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.safetensors")


def test_others_may_read_the_file_as_the_system_has_it(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
