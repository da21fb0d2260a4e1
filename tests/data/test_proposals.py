"""Proposals come back from their file for the right image; a file that is not right is told with what to do."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from boxwright.data.proposals import GivenProposals, ProposalFile, write_proposals
from boxwright.data.proposals_foreign import open_proposals

SIZE = (100, 200)


def given(count: int, seed: int = 0) -> GivenProposals:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 50, (count, 2))], 1).astype(np.float32)
    return GivenProposals(boxes, np.sort(rng.random(count).astype(np.float32))[::-1])


def write(path: Path, images: dict[int, GivenProposals], splits: list[dict[str, Any]] | None = None) -> Path:
    write_proposals(
        path,
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        page={"splits": splits or [{"name": "val", "images": len(images)}], "model": "runs/rpn"},
    )
    return path


def assert_equal(one: GivenProposals, two: GivenProposals) -> None:
    np.testing.assert_array_equal(one.boxes, two.boxes)
    np.testing.assert_array_equal(one.scores, two.scores)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    images = {7: given(5, 1), -3: given(0), 2**40: given(130, 2)}
    file = ProposalFile(write(tmp_path / "deep" / "file", images))
    assert file.page["model"] == "runs/rpn"
    assert file.image_ids.tolist() == [-3, 7, 2**40]
    for image_id, wanted in images.items():
        assert_equal(file.of(image_id, SIZE), wanted)
    assert file.slots == 192
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    again = pickle.loads(pickle.dumps(file))
    assert len(pickle.dumps(file)) < 500, "a path, not the arrays"
    assert_equal(again.of(7), images[7])


def test_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    images = {1: given(3), 2: given(4)}
    tensors = load_file(write(tmp_path / "file", images))
    assert tensors["offsets"].tolist() == [0, 3, 7]
    np.testing.assert_array_equal(tensors["boxes"], np.concatenate([image.boxes for image in images.values()]))


def test_the_best_are_used(tmp_path: Path) -> None:
    image = given(70)
    file = ProposalFile(write(tmp_path / "file", {1: image}), limit=6)
    assert_equal(file.of(1), GivenProposals(image.boxes[:6], image.scores[:6]))
    assert (file.slots, file.counts.tolist()) == (6, [6])


def test_no_proposals_at_all_are_fine(tmp_path: Path) -> None:
    file = ProposalFile(write(tmp_path / "file", {1: given(0)}))
    assert len(file.of(1).boxes) == 0
    assert file.slots >= 1


def test_an_image_without_a_row_is_named_and_counted(tmp_path: Path) -> None:
    file = ProposalFile(write(tmp_path / "file", {1: given(2), 5: given(2), 9: given(1)}))
    file.require([5, 1])
    with pytest.raises(
        ValueError, match=r"no proposals for 2 of 3 images \(for example image id 4\).*boxwright propose"
    ):
        file.require([5, 4, 10])
    with pytest.raises(ValueError, match="image id 10"):
        file.of(10)


def test_splits_that_share_ids_are_told_apart_by_name(tmp_path: Path) -> None:
    parts = [given(2, seed) for seed in range(3)]
    path = tmp_path / "file"
    splits = [{"name": "train", "images": 2}, {"name": "val", "images": 1}]
    write_proposals(path, image_ids=[1, 2, 1], counts=[2, 2, 2], images=parts, page={"splits": splits})
    assert_equal(ProposalFile(path, split="train").of(1), parts[0])
    assert_equal(ProposalFile(path, split="val").of(1), parts[2])
    assert ProposalFile(path, split="val").image_ids.tolist() == [1]
    with pytest.raises(ValueError, match=r"train, val, which share image ids, got None\. Use --split"):
        ProposalFile(path)
    write_proposals(path, image_ids=[1, 2, 3], counts=[2, 2, 2], images=parts, page={"splits": splits})
    assert len(ProposalFile(path, split="test").image_ids) == 3, "the split plays no part where ids are unlike"


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ([[0, 0, 1, np.nan]], [0.5], "contain NaN"),
        ([[0, 0, 1, 1]], [np.inf], "contain NaN"),
        ([[0, 0, 1, 1], [0, 0, 2, 2]], [0.5, 0.6], "not sorted by descending score"),
        ([[0, 0, 1, 103]], [0.5], "extend 3 pixels beyond its 200 x 100"),
        ([[-3, 0, 1, 1]], [0.5], "extend 3 pixels beyond"),
    ],
)
def test_proposals_that_cannot_be_right_are_told(boxes: Any, scores: Any, message: str, tmp_path: Path) -> None:
    image = GivenProposals(np.array(boxes, np.float32), np.array(scores, np.float32))
    file = ProposalFile(write(tmp_path / "file", {4: image}))
    with pytest.raises(ValueError, match=f"of image 4 .*{message}"):
        file.of(4, SIZE)


def test_damaged_and_other_files_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {1: given(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="not a complete proposals file"):
        ProposalFile(path)
    path.write_bytes(whole.replace(b"boxwright-proposals-1", b"boxwright-proposals-9"))
    with pytest.raises(ValueError, match="Update boxwright"):
        ProposalFile(path)
    path.write_bytes(whole.replace(b"boxwright_proposals", b"something_different"))
    with pytest.raises(ValueError, match="without proposals"):
        ProposalFile(path)
    path.write_bytes(whole.replace(struct.pack("<q", 3), struct.pack("<q", 4)))
    with pytest.raises(ValueError, match="damaged"):
        ProposalFile(path)
    with pytest.raises(FileNotFoundError):
        ProposalFile(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {1: given(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_proposals(path, image_ids=[1, 2], counts=[3, 3], images=[given(3)], page={"splits": []})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


class TestForeign:
    """The same boxes, whichever program wrote them."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))

    def test_the_2018_toolbox_s(self, tmp_path: Path) -> None:
        images = [given(4, 1), given(0), given(3, 2)]
        # Its last two coordinates name the last pixel inside, and nothing is sorted.
        rows = [np.column_stack([i.boxes - np.float32([0, 0, 1, 1]), i.scores])[::-1].copy() for i in images]
        path = tmp_path / "rpn.pkl"
        path.write_bytes(pickle.dumps([row.astype(np.float32) for row in rows], 2))
        file = open_proposals(path, [9, 4, 6])
        for image_id, wanted in zip([9, 4, 6], images, strict=True):
            np.testing.assert_allclose(file.of(image_id).boxes, wanted.boxes, atol=1e-5)
            np.testing.assert_array_equal(file.of(image_id).scores, wanted.scores)
        assert open_proposals(path, [9, 4, 6]).path == file.path, "read once"
        assert open_proposals(path, [4, 9, 6]).path != file.path, "another order, another file"
        with pytest.raises(ValueError, match=r"each of the 2 images .*got 3 arrays.*without objects"):
            open_proposals(path, [1, 2])

    @pytest.mark.parametrize("mode", [None, 0, 1])
    def test_detectron2_s(self, mode: int | None, tmp_path: Path) -> None:
        images = {9: given(4, 1), 4: given(0), 6: given(3, 2)}
        boxes = [image.boxes.copy() for image in images.values()]
        if mode == 1:
            boxes = [np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], 1) for box in boxes]
        logits = [np.log(image.scores / (1 - image.scores)) for image in images.values()]
        page: dict[str, Any] = {"ids": list(images), "boxes": boxes, "objectness_logits": logits}
        if mode is not None:
            page["bbox_mode"] = mode
        path = tmp_path / "proposals.pkl"
        path.write_bytes(pickle.dumps(page))
        file = open_proposals(path, [4, 6, 9])
        for image_id, wanted in images.items():
            np.testing.assert_allclose(file.of(image_id).boxes, wanted.boxes, rtol=1e-5)
            np.testing.assert_allclose(file.of(image_id).scores, wanted.scores, rtol=1e-5)

    def test_detectron_s(self, tmp_path: Path) -> None:
        path = tmp_path / "proposals.pkl"
        image = given(4)
        path.write_bytes(pickle.dumps({"indexes": [5], "boxes": [image.boxes], "scores": [image.scores]}, 2))
        assert_equal(open_proposals(path, [5]).of(5), image)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (3, "contains no proposals"),
            ({"ids": [1]}, "expected ids, boxes and objectness_logits"),
            ([np.zeros((2, 4), np.float32)], "expected rows of 5 numbers"),
            ({"ids": [1], "boxes": [np.zeros((2, 4))], "scores": [np.zeros(3)]}, "2 boxes and 3 scores"),
            ({"ids": [1], "boxes": [np.zeros((2, 4))], "scores": [np.zeros(2)], "bbox_mode": 4}, "bbox_mode: .*got 4"),
            ({"ids": [1, 1], "boxes": [np.zeros((0, 4))] * 2, "scores": [np.zeros(0)] * 2}, "image 1 twice"),
            ([["text"]], "expected rows of 5"),
        ],
    )
    def test_other_content_is_told(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            open_proposals(path, [1])

    def test_another_file_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "instances_val.json"
        path.write_text('{"images": []}')
        with pytest.raises(ValueError, match=r"instances_val.json is refused.* Expected a proposals file"):
            open_proposals(path, [1])

    def test_hostile_ones_do_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "hit").encode() + b"'\ntR.")
        with pytest.raises(ValueError, match=r"os\.system"):
            open_proposals(path, [1])
        assert not (tmp_path / "hit").exists()

    def test_ours_is_opened_as_it_is(self, tmp_path: Path) -> None:
        path = write(tmp_path / "file", {1: given(3)})
        assert open_proposals(path, [1]).path == path
