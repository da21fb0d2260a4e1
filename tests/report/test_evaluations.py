"""Each evaluation of a run has its own folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from boxwright.report.evaluations import Evaluation, data_name, evaluation_folder, read_evaluations

VAL = Evaluation(data="cells", split="val", annotations="/cells/val.json", conditions={"precision": "float32"})


def write(run: Path, name: str, evaluation: Evaluation) -> str:
    folder = evaluation_folder(run, name, evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.write(folder)
    return folder.relative_to(run).as_posix()


def test_only_the_same_evaluation_replaces_one(tmp_path: Path) -> None:
    assert write(tmp_path, "val", VAL) == "evaluation/val"
    assert write(tmp_path, "val", replace(VAL, step=9, weights="f" * 64, metrics={"AP": 0.5})) == "evaluation/val"
    others = [replace(VAL, annotations=f"/other{number}/val.json") for number in range(3)]
    names = [write(tmp_path, "val", other) for other in others]
    assert names == ["evaluation/cells_val", "evaluation/cells_val_2", "evaluation/cells_val_3"]
    assert write(tmp_path, "val", replace(VAL, conditions={"precision": "bfloat16"})) == "evaluation/cells_val_4"
    assert write(tmp_path, "val", others[1]) == "evaluation/cells_val_2"


def test_a_damaged_evaluation_is_left_alone_and_an_unfinished_one_replaced(tmp_path: Path) -> None:
    write(tmp_path, "val", VAL)
    (tmp_path / "evaluation" / "val" / "evaluation.json").write_text("{")
    assert write(tmp_path, "val", VAL) == "evaluation/cells_val"
    (tmp_path / "evaluation" / "test").mkdir()
    assert write(tmp_path, "test", VAL) == "evaluation/test"


def test_evaluations_of_these_weights_come_back_the_validation_first(tmp_path: Path) -> None:
    test = replace(VAL, split="test", annotations="/cells/test.json", weights="a", metrics={"AP": 0.25, "APs": -1.0})
    write(tmp_path, "test", test)
    write(tmp_path, "val", replace(VAL, weights="a"))
    write(tmp_path, "old", replace(VAL, annotations="/old.json", weights="b"))
    found = read_evaluations(tmp_path, "a")
    assert list(found) == ["val", "test"]
    assert found["test"] == test
    assert test.title == "cells (test)"
    assert replace(test, conditions={"precision": "bfloat16", "max_detections": None}).title == (
        "cells (test), precision bfloat16"
    )


def test_a_data_set_is_named_after_its_folder(tmp_path: Path) -> None:
    annotations = tmp_path / "cells" / "annotations" / "val.json"
    assert data_name(annotations, [tmp_path / "other", tmp_path / "cells"]) == "cells"
    assert data_name(annotations, []) == "val.json"
