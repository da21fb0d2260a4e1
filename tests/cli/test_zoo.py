"""`boxwright zoo` lists models, prints their metadata and downloads their weights."""

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
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("BOXWRIGHT_ZOO", "BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["zoo", *words])
    return result.exit_code, result.stdout, result.stderr


def write_zoo(folder: Path, *mirrors: str) -> str:
    path = folder / "zoo.toml"
    shown = ", ".join(f'"{mirror}"' for mirror in mirrors)
    path.write_text(
        f'[[collections]]\ntitle = "Ours"\nlicence = "MIT"\nsource = "us"\nmirrors = [{shown}]\n'
        f'models = [{{ name = "mine", family = "rpn", file = "{FILE}", figures = {{ AR1000 = 50.5 }} }}]\n',
        "utf-8",
    )
    return str(path)


def test_list_of_one_family() -> None:
    status, listed, _ = run("list")
    assert status == 0
    assert "mask_rcnn_r50_fpn_1x" in listed
    assert "retinanet_resnet50_fpn_v2" in listed
    assert listed.count("\n") > 60
    _, of_family, _ = run("list", "--family", "mask_rcnn")
    names = [line.split()[0] for line in of_family.splitlines() if line.startswith("    ")]
    assert names[:3] == ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "mask_rcnn_r50_fpn_1x"]
    assert not any("cascade" in name or "fast_" in name for name in names)
    assert "box AP 37.3, mask AP 34.2, GB 5.8, s/iter 0.69, images/s 7.7" in of_family
    status, _, error = run("list", "--family", "mask_rccn")
    assert (status, error.strip()) == (
        1,
        "boxwright: --family: the zoo has no models of family 'mask_rccn'; did you mean 'mask_rcnn'?",
    )


def test_the_old_name_of_an_option_works_with_a_note() -> None:
    _, listed, _ = run("list", "--family", "retinanet")
    code, same, error = run("list", "--model", "retinanet")
    assert (code, same) == (0, listed)
    assert "boxwright: --model is deprecated: use --family" in error
    code, _, error = run("list", "--model", "retinanet", "--family", "rpn")
    assert code == 1
    assert "Use --family." in error


def test_show_prints_the_metadata() -> None:
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
    status, _, error = run("show", "mask_rcn_r50_fpn_1x")
    assert status == 1
    assert "did you mean 'mask_rcnn_r50_fpn_1x'" in error


def test_download_into_the_cache_and_into_a_folder(tmp_path: Path) -> None:
    with serve() as host:
        host.answer(FILE, whole(CONTENT))
        zoo = write_zoo(tmp_path, f"{host.url}gone/", host.url)
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


def test_show_marks_an_md5_hash_as_weak_and_prints_the_sha256_of_the_cached_file(tmp_path: Path) -> None:
    stated = hashlib.md5(CONTENT).hexdigest()[:6]
    with serve() as host:
        zoo = Path(write_zoo(tmp_path, host.url))
        weak = zoo.read_text("utf-8").replace(f'"{FILE}"', f'"model_final_{stated}.pkl", md5_prefix = "{stated}"')
        zoo.write_text(weak, "utf-8")
        _, shown, _ = run("show", "mine", "--zoo", str(zoo))
        assert f"{stated} (first 6 digits; detects damaged files, but not forged ones)" in shown
        assert "not published" in shown
        assert SHA256 not in shown
        host.answer(f"model_final_{stated}.pkl", whole(b"another"), whole(CONTENT))
        code, _, error = run("download", "mine", "--zoo", str(zoo))
        assert code == 1
        actual = hashlib.md5(b"another").hexdigest()[:6]
        assert f"MD5 mismatch: expected a hash that starts with {stated}, got {actual}" in error
        assert run("download", "mine", "--zoo", str(zoo))[0] == 0
        _, shown, _ = run("show", "mine", "--zoo", str(zoo))
        assert SHA256 in shown


def test_a_failed_download_lists_the_error_of_each_mirror(tmp_path: Path) -> None:
    with serve() as host:
        host.answer(f"a/{FILE}", status(403))
        host.answer(f"b/{FILE}", whole(b"another"))
        zoo = write_zoo(tmp_path, f"{host.url}a/", f"{host.url}b/")
        code, _, error = run("download", "mine", "--zoo", zoo)
    assert code == 1
    assert "HTTP 403 Forbidden" in error
    assert f"a hash that starts with {SHA256[:8]}" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "cache").rglob(FILE))


def test_predict_downloads_and_converts_a_zoo_model_once(tmp_path: Path) -> None:
    tensors = {name: tensor / 50 for name, tensor in detector("faster_rcnn", first=True).items()}
    tensors |= {name: tensor * 50 for name, tensor in tensors.items() if "running_var" in name}
    content = io.BytesIO()
    torch.save({"meta": {"mmdet_version": "0.5.1"}, "state_dict": tensors}, content)
    file = f"mine-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    cv2.imwrite(str(tmp_path / "street.png"), np.zeros((64, 96, 3), np.uint8))
    out = tmp_path / "out"
    with serve() as host:
        host.answer(file, whole(content.getvalue()))
        zoo = Path(write_zoo(tmp_path, host.url))
        zoo.write_text(zoo.read_text().replace(FILE, file))
        words = ["predict", "mine", str(tmp_path / "street.png"), "--out", str(out), "--score", "0", "--device", "cpu"]
        for _ in range(2):
            result = CliRunner().invoke(app, words, env={"BOXWRIGHT_ZOO": str(zoo)})
            assert result.exit_code == 0, result.output
        assert len(host.requests) == 1
    rows = json.loads((out / "detections.json").read_text())
    assert {row["category_name"] for row in rows} <= {category.name for category in COCO}
    assert (out / "street.png").is_file()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
