"""`boxwright zoo` lists, shows and fetches."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from boxwright.cli.main import app
from boxwright.importers.categories import COCO
from importers.test_mmdetection import detector
from weights.hosts import serve, status, whole

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = f"mine-{SHA256[:8]}.pth"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("BOXWRIGHT_ZOO", "BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["zoo", *words])
    return result.exit_code, result.stdout, result.stderr


def own_zoo(folder: Path, *mirrors: str) -> str:
    path = folder / "own.toml"
    shown = ", ".join(f'"{mirror}"' for mirror in mirrors)
    path.write_text(
        f'[[collections]]\ntitle = "Ours"\nlicence = "MIT"\nsource = "us"\nmirrors = [{shown}]\n'
        f'models = [{{ name = "mine", family = "rpn", file = "{FILE}", figures = {{ AR1000 = 50.5 }} }}]\n',
        "utf-8",
    )
    return str(path)


def test_list_can_be_narrowed_to_a_kind() -> None:
    status, listed, _ = run("list")
    assert status == 0
    assert "mask_rcnn_r50_fpn_1x" in listed
    assert "retinanet_resnet50_fpn_v2" in listed
    assert listed.count("\n") > 60
    _, narrowed, _ = run("list", "--model", "mask_rcnn")
    names = [line.split()[0] for line in narrowed.splitlines() if line.startswith("    ")]
    assert names[:3] == ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "mask_rcnn_r50_fpn_1x"]
    assert not any("cascade" in name or "fast_" in name for name in names)
    assert "box AP 37.3, mask AP 34.2, GB 5.8, s/iter 0.69, images/s 7.7" in narrowed
    status, _, told = run("list", "--model", "mask_rccn")
    assert (status, told.strip()) == (
        1,
        "boxwright: the zoo has no models of kind 'mask_rccn'; did you mean 'mask_rcnn'?",
    )


def test_show_tells_all_that_is_known() -> None:
    status, shown, _ = run("show", "mask_rcnn_r50_fpn_1x")
    assert status == 0
    for part in (
        "https://open-mmlab.oss-cn-beijing.aliyuncs.com/mmdetection/models/mask_rcnn_r50_fpn_1x_20181010-069fa190.pth",
        "results/mask_rcnn_r50_fpn_1x_20181010_results.pkl.json",
        "069fa190 (first 8 digits)",
        "Apache-2.0",
        "October 2018",
        "may be offline",
    ):
        assert part in shown
    status, _, told = run("show", "mask_rcn_r50_fpn_1x")
    assert status == 1
    assert "did you mean 'mask_rcnn_r50_fpn_1x'" in told


def test_download_into_the_cache_and_into_a_folder(tmp_path: Path) -> None:
    with serve() as host:
        host.answer(FILE, whole(CONTENT))
        zoo = own_zoo(tmp_path, f"{host.url}gone/", host.url)
        status, printed, _ = run("download", "mine", "--zoo", zoo)
        assert status == 0
        assert Path(printed.strip()).read_bytes() == CONTENT
        assert Path(printed.strip()).is_relative_to(tmp_path / "cache")
        _, shown, _ = run("show", "mine", "--zoo", zoo)
        assert printed.strip() in shown
        status, printed, _ = run("download", "mine", "--zoo", zoo, "--out", str(tmp_path / "new" / "folder"))
        assert Path(printed.strip()) == tmp_path / "new" / "folder" / FILE
        assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE]
        assert Path(printed.strip()).read_bytes() == CONTENT
        assert len(host.requests) == 2


def test_of_a_weak_hash_show_says_that_it_is_one_and_what_the_better_one_is(tmp_path: Path) -> None:
    stated = hashlib.md5(CONTENT).hexdigest()[:6]
    with serve() as host:
        zoo = Path(own_zoo(tmp_path, host.url))
        weak = zoo.read_text("utf-8").replace(f'"{FILE}"', f'"model_final_{stated}.pkl", md5_prefix = "{stated}"')
        zoo.write_text(weak, "utf-8")
        _, shown, _ = run("show", "mine", "--zoo", str(zoo))
        assert f"{stated} (first 6 digits; detects damaged files, but not forged ones)" in shown
        assert "not published" in shown
        assert SHA256 not in shown
        host.answer(f"model_final_{stated}.pkl", whole(b"another"), whole(CONTENT))
        code, _, told = run("download", "mine", "--zoo", str(zoo))
        assert code == 1
        actual = hashlib.md5(b"another").hexdigest()[:6]
        assert f"MD5 mismatch: expected a hash that starts with {stated}, got {actual}" in told
        assert run("download", "mine", "--zoo", str(zoo))[0] == 0
        _, shown, _ = run("show", "mine", "--zoo", str(zoo))
        assert SHA256 in shown


def test_a_download_that_fails_tells_what_each_mirror_said(tmp_path: Path) -> None:
    with serve() as host:
        host.answer(f"a/{FILE}", status(403))
        host.answer(f"b/{FILE}", whole(b"another"))
        zoo = own_zoo(tmp_path, f"{host.url}a/", f"{host.url}b/")
        code, _, told = run("download", "mine", "--zoo", zoo)
    assert code == 1
    assert "HTTP 403 Forbidden" in told
    assert f"a hash that starts with {SHA256[:8]}" in told
    assert "Traceback" not in told
    assert not list((tmp_path / "cache").rglob(FILE))


def test_predict_takes_a_name_fetches_another_s_weights_and_converts_them_once(tmp_path: Path) -> None:
    tensors = {name: tensor / 50 for name, tensor in detector("faster_rcnn", first=True).items()}
    tensors |= {name: tensor * 50 for name, tensor in tensors.items() if "running_var" in name}
    content = io.BytesIO()
    torch.save({"meta": {"mmdet_version": "0.5.1"}, "state_dict": tensors}, content)
    file = f"mine-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    cv2.imwrite(str(tmp_path / "street.png"), np.zeros((64, 96, 3), np.uint8))
    out = tmp_path / "found"
    with serve() as host:
        host.answer(file, whole(content.getvalue()))
        zoo = Path(own_zoo(tmp_path, host.url))
        zoo.write_text(zoo.read_text().replace(FILE, file))
        words = ["predict", "mine", str(tmp_path / "street.png"), "--out", str(out), "--score", "0", "--device", "cpu"]
        for _ in range(2):
            result = CliRunner().invoke(app, words, env={"BOXWRIGHT_ZOO": str(zoo)})
            assert result.exit_code == 0, result.output
        assert len(host.requests) == 1
    found = json.loads((out / "detections.json").read_text())
    assert {row["category_name"] for row in found} <= {category.name for category in COCO}
    assert (out / "street.png").is_file()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
