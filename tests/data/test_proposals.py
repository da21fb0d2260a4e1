"""Proposals files: reading, writing, and errors that say how to fix them."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from boxwright.data.proposals import GivenProposals, ImageProposals, ProposalFile, write_proposals
from boxwright.data.proposals_foreign import open_proposals

SIZE = (100, 200)


def random_proposals(count: int, seed: int = 0) -> ImageProposals:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 50, (count, 2))], 1).astype(np.float32)
    return ImageProposals(boxes, np.sort(rng.random(count).astype(np.float32))[::-1])


def write(path: Path, images: dict[int, ImageProposals], splits: list[dict[str, Any]] | None = None) -> Path:
    write_proposals(
        path,
        image_ids=images.keys(),
        counts=[len(image.boxes) for image in images.values()],
        images=images.values(),
        metadata={"splits": splits or [{"name": "val", "images": len(images)}], "model": "runs/rpn"},
    )
    return path


def assert_equal(one: ImageProposals, two: ImageProposals) -> None:
    np.testing.assert_array_equal(one.boxes, two.boxes)
    np.testing.assert_array_equal(one.scores, two.scores)


def test_read_proposals_equal_written_proposals(tmp_path: Path) -> None:
    images = {7: random_proposals(5, 1), -3: random_proposals(0), 2**40: random_proposals(130, 2)}
    file = ProposalFile(write(tmp_path / "deep" / "file", images))
    assert file.metadata["model"] == "runs/rpn"
    assert file.image_ids.tolist() == [-3, 7, 2**40]
    for image_id, expected in images.items():
        assert_equal(file.of(image_id, SIZE), expected)
    assert file.slots == 192
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    unpickled = pickle.loads(pickle.dumps(file))
    assert len(pickle.dumps(file)) < 500, "a path, not the arrays"
    assert_equal(unpickled.of(7), images[7])


def test_a_proposals_file_is_a_safetensors_file(tmp_path: Path) -> None:
    images = {1: random_proposals(3), 2: random_proposals(4)}
    tensors = load_file(write(tmp_path / "file", images))
    assert tensors["offsets"].tolist() == [0, 3, 7]
    np.testing.assert_array_equal(tensors["boxes"], np.concatenate([image.boxes for image in images.values()]))


def test_the_limit_keeps_the_best_proposals(tmp_path: Path) -> None:
    image = random_proposals(70)
    file = ProposalFile(write(tmp_path / "file", {1: image}), limit=6)
    assert_equal(file.of(1), ImageProposals(image.boxes[:6], image.scores[:6]))
    assert (file.slots, file.counts.tolist()) == (6, [6])


def test_a_file_without_proposals_is_valid(tmp_path: Path) -> None:
    file = ProposalFile(write(tmp_path / "file", {1: random_proposals(0)}))
    assert len(file.of(1).boxes) == 0
    assert file.slots >= 1


def test_missing_images_are_an_error_with_their_number(tmp_path: Path) -> None:
    file = ProposalFile(
        write(tmp_path / "file", {1: random_proposals(2), 5: random_proposals(2), 9: random_proposals(1)})
    )
    file.require([5, 1])
    with pytest.raises(
        ValueError, match=r"no proposals for 2 of 3 images \(for example image id 4\).*boxwright propose"
    ):
        file.require([5, 4, 10])
    with pytest.raises(ValueError, match="image id 10"):
        file.of(10)


def test_splits_that_share_image_ids_need_the_name_of_the_split(tmp_path: Path) -> None:
    parts = [random_proposals(2, seed) for seed in range(3)]
    path = tmp_path / "file"
    splits = [{"name": "train", "images": 2}, {"name": "val", "images": 1}]
    write_proposals(path, image_ids=[1, 2, 1], counts=[2, 2, 2], images=parts, metadata={"splits": splits})
    assert_equal(ProposalFile(path, split="train").of(1), parts[0])
    assert_equal(ProposalFile(path, split="val").of(1), parts[2])
    assert ProposalFile(path, split="val").image_ids.tolist() == [1]
    with pytest.raises(ValueError, match=r"train, val, which share image ids, got None\. Use --split"):
        ProposalFile(path)
    write_proposals(path, image_ids=[1, 2, 3], counts=[2, 2, 2], images=parts, metadata={"splits": splits})
    assert len(ProposalFile(path, split="test").image_ids) == 3, "the split is ignored if image ids are unique"


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
def test_invalid_proposals_are_an_error(boxes: Any, scores: Any, message: str, tmp_path: Path) -> None:
    image = ImageProposals(np.array(boxes, np.float32), np.array(scores, np.float32))
    file = ProposalFile(write(tmp_path / "file", {4: image}))
    with pytest.raises(ValueError, match=f"of image 4 .*{message}"):
        file.of(4, SIZE)


def test_damaged_files_and_other_files_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {1: random_proposals(3)})
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


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {1: random_proposals(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_proposals(path, image_ids=[1, 2], counts=[3, 3], images=[random_proposals(3)], metadata={"splits": []})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


class TestForeign:
    """Files of other programs give the same proposals."""

    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))

    def test_mmdetection_0_5(self, tmp_path: Path) -> None:
        images = [random_proposals(4, 1), random_proposals(0), random_proposals(3, 2)]
        # x2 and y2 are the last pixel inside the box, and rows are not sorted.
        rows = [np.column_stack([i.boxes - np.float32([0, 0, 1, 1]), i.scores])[::-1].copy() for i in images]
        path = tmp_path / "rpn.pkl"
        path.write_bytes(pickle.dumps([row.astype(np.float32) for row in rows], 2))
        file = open_proposals(path, [9, 4, 6])
        for image_id, expected in zip([9, 4, 6], images, strict=True):
            np.testing.assert_allclose(file.of(image_id).boxes, expected.boxes, atol=1e-5)
            np.testing.assert_array_equal(file.of(image_id).scores, expected.scores)
        assert open_proposals(path, [9, 4, 6]).path == file.path, "the second call uses the cache"
        assert open_proposals(path, [4, 9, 6]).path != file.path, "another order of ids is another cached file"
        with pytest.raises(ValueError, match=r"each of the 2 images .*got 3 arrays.*without objects"):
            open_proposals(path, [1, 2])

    @pytest.mark.parametrize("mode", [None, 0, 1])
    def test_detectron2(self, mode: int | None, tmp_path: Path) -> None:
        images = {9: random_proposals(4, 1), 4: random_proposals(0), 6: random_proposals(3, 2)}
        boxes = [image.boxes.copy() for image in images.values()]
        if mode == 1:
            boxes = [np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], 1) for box in boxes]
        logits = [np.log(image.scores / (1 - image.scores)) for image in images.values()]
        content: dict[str, Any] = {"ids": list(images), "boxes": boxes, "objectness_logits": logits}
        if mode is not None:
            content["bbox_mode"] = mode
        path = tmp_path / "proposals.pkl"
        path.write_bytes(pickle.dumps(content))
        file = open_proposals(path, [4, 6, 9])
        for image_id, expected in images.items():
            np.testing.assert_allclose(file.of(image_id).boxes, expected.boxes, rtol=1e-5)
            np.testing.assert_allclose(file.of(image_id).scores, expected.scores, rtol=1e-5)

    def test_detectron(self, tmp_path: Path) -> None:
        path = tmp_path / "proposals.pkl"
        image = random_proposals(4)
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
    def test_other_content_is_an_error(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            open_proposals(path, [1])

    def test_another_file_type_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "instances_val.json"
        path.write_text('{"images": []}')
        with pytest.raises(ValueError, match=r"instances_val.json is refused.* Expected a proposals file"):
            open_proposals(path, [1])

    def test_a_malicious_pickle_is_not_executed(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pkl"
        path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "hit").encode() + b"'\ntR.")
        with pytest.raises(ValueError, match=r"os\.system"):
            open_proposals(path, [1])
        assert not (tmp_path / "hit").exists()

    def test_a_boxwright_file_is_opened_directly(self, tmp_path: Path) -> None:
        path = write(tmp_path / "file", {1: random_proposals(3)})
        assert open_proposals(path, [1]).path == path


def test_deprecated_names_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_proposals(path, image_ids=[1], counts=[2], images=[random_proposals(2)], page={"splits": []})
    file = ProposalFile(path)
    assert file.page == file.metadata
    assert GivenProposals is ImageProposals
