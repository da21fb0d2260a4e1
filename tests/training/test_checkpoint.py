from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from boxwright.training import checkpoint
from boxwright.training.checkpoint import TrainingState
from boxwright.training.ema import EMA


def make_state(width: int = 3) -> TrainingState:
    model = nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    return TrainingState(model=model, optimizer=optimizer, ema=EMA(model, 0.9), device=torch.device("cpu"))


def save(folder: Path, step: int, state: TrainingState, keep: int = 3) -> Path:
    return checkpoint.save(folder, step, state, figures={"window": torch.ones(2, 3)}, metadata={"hello": 1}, keep=keep)


def test_load_restores_everything(tmp_path: Path) -> None:
    state, other = make_state(), make_state()
    path = save(tmp_path, 7, state)
    next_random = torch.rand(3)
    loop = checkpoint.load(path, other)
    assert checkpoint.read_metadata(path) == {"step": 7, "hello": 1}
    assert torch.equal(loop["window"], torch.ones(2, 3))
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    for saved, loaded in zip(state.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert state.ema is not None
    assert other.ema is not None
    assert all(torch.equal(other.ema.averages[name], tensor) for name, tensor in state.ema.averages.items())
    checkpoint.restore_random_state(loop, torch.device("cpu"))
    assert torch.equal(torch.rand(3), next_random)


def test_newest_is_found_by_step_and_old_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, make_state(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.step_of(newest) == 11
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_failed_save_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, make_state())

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full_disk)
    with pytest.raises(OSError, match=r"step_2 cannot be written: .*No space.*--resume"):
        save(tmp_path, 2, make_state())
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_full_disk_in_safetensors_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a full disk, safetensors raises another exception than the file system."""

    def full_disk(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match=r"step_1 cannot be written"):
        save(tmp_path, 1, make_state())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("name", ["model", "optimizer", "ema", "loop"])
def test_damaged_checkpoint_is_named_and_not_loaded(name: str, missing: bool, tmp_path: Path) -> None:
    path, state = save(tmp_path, 1, make_state()), make_state()
    file = path / f"{name}.safetensors"
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step_1 is damaged: .* Remove this folder"):
        checkpoint.load(path, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state())
    (path / "state.json").write_text('{"step": 1,')
    with pytest.raises(ValueError, match=r"step_1 is damaged"):
        checkpoint.read_metadata(path)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state(3))
    with pytest.raises(ValueError, match=r"step_1 does not match the model.*0\.weight"):
        checkpoint.load(path, make_state(4))
