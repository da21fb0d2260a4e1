"""The zoo's list is valid and agrees with its sources; invalid zoo files are rejected with the name of the entry."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)

from boxwright.recipes import built_in_recipes
from boxwright.weights.fetch import Remote
from boxwright.zoo import find_model, load_zoo
from weights.hosts import serve, status, whole

TORCHVISION = {
    "fasterrcnn_resnet50_fpn": FasterRCNN_ResNet50_FPN_Weights,
    "fasterrcnn_resnet50_fpn_v2": FasterRCNN_ResNet50_FPN_V2_Weights,
    "maskrcnn_resnet50_fpn": MaskRCNN_ResNet50_FPN_Weights,
    "maskrcnn_resnet50_fpn_v2": MaskRCNN_ResNet50_FPN_V2_Weights,
    "retinanet_resnet50_fpn": RetinaNet_ResNet50_FPN_Weights,
    "retinanet_resnet50_fpn_v2": RetinaNet_ResNet50_FPN_V2_Weights,
}
MODELS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "model_zoo" / "models.md"

ZOO = """
[[collections]]
title = "Ours"
licence = "CC-BY-4.0"
source = "boxwright test"
mirrors = ["https://a.example/models/", "https://b.example/"]
models = [
    {{ name = "first", family = "rpn", file = "x/first-0a1b2c3d.safetensors", figures = {{ AR1000 = 50.5 }} }},
    {{ name = "second", family = "rpn", {second} }},
]
"""


@pytest.fixture(autouse=True)
def default_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOXWRIGHT_ZOO", raising=False)


def write_zoo(folder: Path, second: str = 'file = "second-1a1b2c3d.pth"') -> Path:
    path = folder / "zoo.toml"
    path.write_text(ZOO.format(second=second), "utf-8")
    return path


def test_torchvisions_entries_equal_its_weights_metadata() -> None:
    zoo = load_zoo()
    for name, weights in TORCHVISION.items():
        entry, published = zoo[name], weights.COCO_V1
        assert entry.remote.urls == (published.url,)
        metrics = published.meta["_metrics"]["COCO-val2017"]
        assert entry.model.figures["box AP"] == metrics["box_map"]
        assert entry.model.figures.get("mask AP") == metrics.get("mask_map")


def test_every_recipe_in_the_zoo_exists_and_has_the_models_family() -> None:
    recipes = built_in_recipes()
    for name, entry in load_zoo().items():
        model = entry.model
        assert model.recipe in recipes or not model.recipe, name
        assert model.recipe.startswith(model.family) or not model.recipe, name
        assert len(entry.remote.sha256) == 8 or (not entry.remote.sha256 and len(entry.remote.md5) == 6)
        assert model.figures
        assert entry.collection.licence


def test_figures_of_mmdetection_0_equal_the_models_page() -> None:
    """The zoo and the page were copied from mmdetection's tables independently."""
    zoo, num_compared = load_zoo(), 0
    for line in MODELS_PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        name = next((cell.strip("`") for cell in cells if re.fullmatch(r"`\w+`", cell)), "")
        if name not in zoo or "V100" not in zoo[name].collection.source:
            continue
        figures = zoo[name].model.figures
        accuracy = [figures.get("AR1000", figures.get("box AP")), figures.get("mask AP")]
        values_on_page = {float(number) for number in re.findall(r"(?<![\d.])\d+\.\d+", line)}
        assert {value for value in accuracy if value is not None} <= values_on_page, name
        if "(2019:" not in line:  # for RetinaNet, the page only has the AP of 2019
            assert {figures[key] for key in ("GB", "s/iter") if key in figures} <= values_on_page, name
        num_compared += 1
    assert num_compared >= 40


def test_files_of_mmdetection_0_have_its_mirrors() -> None:
    entry = load_zoo()["mask_rcnn_r50_fpn_1x"]
    file = "models/mask_rcnn_r50_fpn_1x_20181010-069fa190.pth"
    assert entry.remote.sha256 == "069fa190"
    assert f"https://s3.ap-northeast-2.amazonaws.com/open-mmlab/mmdetection/{file}" in entry.remote.urls
    assert f"https://open-mmlab.oss-cn-beijing.aliyuncs.com/mmdetection/{file}" in entry.remote.urls
    assert entry.model.results == "results/mask_rcnn_r50_fpn_1x_20181010_results.pkl.json"


def test_mmdetection_2_files_match_their_models_and_figures() -> None:
    """Some file names contain the AP."""
    entries = [entry for entry in load_zoo().values() if entry.collection.title == "mmdetection 2.x"]
    assert Counter(entry.model.family for entry in entries) == {
        "rpn": 8,
        "faster_rcnn": 12,
        "mask_rcnn": 12,
        "retinanet": 11,
    }
    num_compared = 0
    for entry in entries:
        model = entry.model
        name = re.fullmatch(r"(.+_fpn)_(?:mstrain(?:-poly)?_)?([123]x)_coco", model.name)
        assert name, model.name
        assert model.recipe == f"{name[1]}_{'1x' if name[2] == '1x' else '2x'}"
        url = rf"https://download.openmmlab.com/mmdetection/v2.0/{model.family}/{model.name}/{model.name}_"
        file = re.escape(url) + r"(?:bbox_mAP-([\d.]+)_)?(?:_segm_mAP-([\d.]+)_)?202\d{5}(?:_\d{6})?-[0-9a-f]{8}\.pth"
        parts = re.fullmatch(file, entry.remote.urls[0])
        assert parts, model.file
        for key, stated in (("box AP", parts[1]), ("mask AP", parts[2])):
            if stated is not None:
                assert model.figures[key] == pytest.approx(100 * float(stated))
                num_compared += 1
    assert num_compared == 9


def test_mmdetection_2_caffe_files_match_their_models_and_figures() -> None:
    entries = [entry for entry in load_zoo().values() if entry.collection.title.startswith("mmdetection 2.x, caffe")]
    assert Counter(entry.model.family for entry in entries) == {
        "faster_rcnn": 6,
        "mask_rcnn": 8,
        "retinanet": 3,
        "cascade_rcnn": 10,
        "cascade_mask_rcnn": 17,
    }
    num_compared = 0
    for entry in entries:
        model = entry.model
        folder = model.family.replace("cascade_mask", "cascade")
        name = re.escape(f"{folder}/{model.name}/{model.name}_")
        file = name + r"(?:bbox_mAP-([\d.]+)_)?(?:_segm_mAP-([\d.]+)_)?202\d{5}(?:_\d{6})?-[0-9a-f]{8}\.pth"
        parts = re.fullmatch(file, model.file)
        assert parts, model.file
        for key, stated in (("box AP", parts[1]), ("mask AP", parts[2])):
            if stated is not None:
                assert model.figures[key] == pytest.approx(100 * float(stated))
                num_compared += 1
    assert num_compared >= 15


def test_detectron2_file_names_end_with_the_md5_prefix() -> None:
    """Its MODEL_ZOO.md states this for all its files."""
    entries = [entry for entry in load_zoo().values() if entry.collection.title == "Detectron2"]
    assert len(entries) == 15
    for entry in entries:
        model = entry.model
        assert re.fullmatch(rf"[\w-]+/{model.name}/\d{{8,9}}/model_final_{model.md5_prefix}\.pkl", model.file)
        assert entry.remote.urls == (f"https://dl.fbaipublicfiles.com/detectron2/{model.file}",)
        assert entry.collection.licence == "CC-BY-SA-3.0"
        name = re.fullmatch(r"(\w+?)_(R_50|R_101|X_101_32x8d)_FPN_[13]x", model.name)
        assert name, model.name
        assert name[1] == model.family
        # No recipe has the X-101-32x8d backbone, or a cascade with a single mask head.
        backbone = {"R_50": "r50", "R_101": "r101"}.get(name[2]) if "cascade" not in name[1] else None
        assert model.recipe == ("" if backbone is None else f"{model.family}_{backbone}_caffe_fpn_1x")


def test_a_zoo_file_is_loaded_by_path_or_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "1a1b2c3d" + "0" * 56
    path = write_zoo(tmp_path, f'file = "second-1a1b2c3d.pth", sha256 = "{full}"')
    zoo = load_zoo(path)
    assert list(zoo) == ["first", "second"]
    urls = ("https://a.example/models/second-1a1b2c3d.pth", "https://b.example/second-1a1b2c3d.pth")
    assert zoo["second"].remote == Remote(name="second-1a1b2c3d.pth", urls=urls, sha256=full)
    assert zoo["first"].remote.name == "first-0a1b2c3d.safetensors"
    monkeypatch.setenv("BOXWRIGHT_ZOO", str(path))
    assert list(load_zoo()) == ["first", "second"]
    with pytest.raises(ValueError, match="no model 'fist'; did you mean 'first'"):
        find_model(zoo, "fist")


def test_the_example_on_the_publish_page_is_valid(tmp_path: Path) -> None:
    page = MODELS_PAGE.parents[1].joinpath("guides", "publish.md").read_text("utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "zoo.toml").write_text(example, "utf-8")
    (entry,) = load_zoo(tmp_path / "zoo.toml").values()
    assert entry.model.recipe in built_in_recipes()
    assert entry.model.figures == {"box AP": 41.2, "mask AP": 37.0}


def test_a_zoo_is_loaded_from_a_url(tmp_path: Path) -> None:
    with serve() as host:
        url = host.answer("zoo.toml", whole(write_zoo(tmp_path).read_bytes()))
        assert list(load_zoo(url)) == ["first", "second"]
        with pytest.raises(OSError, match="HTTP 500"):
            load_zoo(host.answer("broken.toml", status(500)))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('file = "a-1a1b2c3d.pth", licence = "MIT"', "model 'second': .*unknown field `licence`"),
        ("file = 3", r"model 'second': Expected `str`, got `int` - at `\$.collections\[0\].models\[1\].file`"),
        ('file = "a-1a1b2c3d.pth", figures = { AP = "high" }', "model 'second': Expected `float`, got `str`"),
        ('recipe = "x"', "model 'second': .*missing required field `file`"),
        ('file = "a.pth"', "model 'second': no hash"),
        ('file = "a-20181010.pth"', "model 'second': no hash"),
        ('file = "a.pth", sha256 = "0A1B2C3D"', "model 'second': sha256: expected 8 to 64 .*, got '0A1B2C3D'"),
        ('file = "a-1a1b2c3d.pth", sha256 = "00000000"', "'second': sha256 '00000000' contradicts the hash '1a1b2c3d'"),
        ('file = "a.pth", md5_prefix = "0a1b2"', "model 'second': md5_prefix: expected 6 to 32 .*, got '0a1b2'"),
        ('file = "a.pth", md5_prefix = "0A1B2C"', "model 'second': md5_prefix: expected 6 to 32 .*, got '0A1B2C'"),
        ('file = "../a-1a1b2c3d.pth"', "model 'second': '../a-1a1b2c3d.pth' is not a relative path"),
        ('file = "a-1a1b2c3d.pth", results = "/b"', "model 'second': '/b' is not a relative path"),
    ],
)
def test_errors_name_the_invalid_model(tmp_path: Path, second: str, message: str) -> None:
    path = write_zoo(tmp_path, second)
    with pytest.raises(ValueError, match=message) as caught:
        load_zoo(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"second", f', '"first", f', "model 'first': duplicate name"),
        ('"second", f', '"a/b", f', "model 'a/b': a name may only contain letters"),
        (
            '"https://b.example/"',
            '"https://b.example"',
            "'Ours' has the invalid mirror 'https://b.example'. Mirrors are",
        ),
        ('"https://b.example/"', '"ftp://b.example/"', "'Ours' has the invalid mirror 'ftp://b.example/'. Mirrors are"),
        ('"https://a.example/models/", "https://b.example/"', "", "'Ours' has no mirror"),
        ('licence = "CC-BY-4.0"\n', "", "collection 'Ours': .*missing required field `licence`"),
        ("[[collections]]", "[[collection]]", "unknown field `collection`"),
        ("[[collections]]", "[[collections", "is not a TOML file"),
    ],
)
def test_errors_name_the_invalid_collection(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_zoo(tmp_path)
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_zoo(path)
