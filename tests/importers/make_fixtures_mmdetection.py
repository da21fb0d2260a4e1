"""Write the fixtures `mmdetection*`: detections of mmdetection's own models, see `reference.py`.

Run it by hand:

    PYTHONPATH=src:tests:PEER python -m importers.make_fixtures_mmdetection CONFIGS DATA [MODEL ...]

PEER is a folder with the packages `mmdet` and `mmcv` (and `mmengine` for 3.x). CONFIGS is the folder of their
configurations, DATA the folder that `BOXWRIGHT_DATA` names. The committed fixtures come from mmdetection 0.5.7 with
mmcv 0.2.7, 1.0.0 with mmcv 0.2.16, 2.28.2 with mmcv 1.7.2, and 3.3.0 with mmcv 2.1.0 and mmengine 0.10.7, all with
torch 2.14 and torchvision 0.29 on a CPU. (0.5.7 and 1.0.0 need a `version.py`, which their setup writes.) Only some
models of 0.5.7 and 2.28.2 are committed; together they cover the parts of the others. The model with GroupNorm exists
for 3.3.0 only.

No extension of a peer is compiled, see `mmdetection_on_cpu.py`. The models are the peer's own configurations with
narrower layers and, except for the models in `DEEP`, on a ResNet-18.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from importers.mmdetection_on_cpu import import_peer
from importers.reference import ImageDetections, Reference, fill, images_of, proposals_for, thinned

KEPT_PROPOSALS = 300
KEPT_MASKS = 10
NARROW = {"out_channels": 64, "in_channels": 64, "feat_channels": 64, "conv_out_channels": 32, "fc_out_channels": 128}
CAFFE = {
    r"style='pytorch'": "style='caffe'",
    r"mean=\[.*?\], std=\[.*?\], to_rgb=True": "mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False",
}
"""Edits to a configuration of 0.x or 1.x. The Caffe-trained models of its model zoo come without a configuration."""
MODELS = {
    "proposal_network": ("rpn", "rpn_r50_fpn_1x"),
    "fast_rcnn": ("fast_rcnn", "fast_rcnn_r50_fpn_1x"),
    "faster_rcnn": ("faster_rcnn", "faster_rcnn_r50_fpn_1x"),
    "faster_rcnn_caffe": ("faster_rcnn", "faster_rcnn_r50_caffe_fpn_1x"),
    "faster_rcnn_resnext": ("faster_rcnn", "faster_rcnn_x101_32x4d_fpn_1x"),
    "mask_rcnn": ("mask_rcnn", "mask_rcnn_r50_fpn_1x"),
    "mask_rcnn_gn": ("gn", "mask_rcnn_r50_fpn_gn-all_2x"),
    "cascade_rcnn": ("cascade_rcnn", "cascade_rcnn_r50_fpn_1x"),
    "cascade_mask_rcnn": ("cascade_rcnn", "cascade_mask_rcnn_r50_fpn_1x"),
    "retinanet": ("retinanet", "retinanet_r50_fpn_1x"),
}
"""Folder (2.x and later) and name of the configuration of each fixture."""
DEEP = ("faster_rcnn_caffe", "faster_rcnn_resnext")
"""Models on a ResNet-50: they check which convolution of a bottleneck has the stride."""
GAINS = {
    "neck.*.weight": 0.4,
    # Spread the scores and keep boxes near their anchors.
    "*rpn_cls.weight": 0.7,
    "*rpn_reg.weight": 0.15,
    "*bbox_head.fc_cls.weight": 1.0,
    "*bbox_head.?.fc_cls.weight": 0.7,
    "*fc_reg.weight": 0.5,
    "*retina_cls.weight": 0.5,
    "*retina_reg.weight": 0.4,
}
SPECIAL_GAINS = {
    # Pixels are not divided by a standard deviation.
    "faster_rcnn_caffe": {"backbone.conv1.weight": 0.015},
    # The peer sorts by objectness after the sigmoid: keep the values distinct in float32.
    "proposal_network": {"*rpn_cls.weight": 0.3},
    "faster_rcnn_resnext": {"*rpn_cls.weight": 0.3},
    "mask_rcnn_gn": {"backbone.conv1.weight": 0.015, "backbone.*.gn2.weight": 0.3},
    # The two coarsest levels must produce detections, too.
    "retinanet": {"neck.fpn_convs.3.*.weight": 0.8, "neck.fpn_convs.4.*.weight": 1.2, "*retina_reg.weight": 0.2},
    # Scores on both sides of the threshold.
    "fast_rcnn": {"*fc_cls.weight": 0.32},
}
"""Gains of single models, which take precedence over `GAINS`."""
LAST_NORM = {18: {"backbone.*.bn2.weight": 0.3}, 50: {"backbone.*.bn3.weight": 0.3}}
"""Gains by depth: weak residual branches, as in a trained network."""


def read_config(configs: Path, name: str, major: int) -> tuple[Any, str]:
    """Return a configuration with narrow layers, and its text as this version writes it into a checkpoint."""
    folder, file = MODELS[name]
    if major < 2:
        from mmcv import Config

        text = (configs / f"{file.replace('_caffe', '')}.py").read_text()
        for pattern, other in (CAFFE if name.endswith("_caffe") else {}).items():
            text = re.sub(pattern, other, text)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "config.py"
            path.write_text(text)
            config = Config.fromfile(str(path))
    else:
        if major == 3:
            from mmengine.config import Config

            file = file.replace("_rcnn", "-rcnn").replace("mask_", "mask-").replace("cascade_", "cascade-")
            file = file.replace("_caffe", "-caffe").replace("x101_", "x101-")
        else:
            from mmcv import Config
        config = Config.fromfile(str(configs / folder / f"{file}_coco.py"))
    _narrow(config.model, 18 if name not in DEEP else 50)
    config.model.backbone.pop("init_cfg", None)
    config.model.pop("pretrained", None)
    return config, text if major < 2 else config.pretty_text


def _narrow(config: Any, depth: int) -> None:
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in NARROW and isinstance(value, int):
            config[key] = NARROW[key]
        elif key == "in_channels" and depth == 18:
            config[key] = [64, 128, 256, 512]
        elif key == "depth":
            config[key] = depth
        elif isinstance(value, (dict, list)):
            _narrow(value, depth)


def build_model(config: Any, major: int) -> Any:
    if major == 3:
        from mmdet.registry import MODELS as REGISTRY
        from mmdet.utils import register_all_modules

        register_all_modules()
        return REGISTRY.build(config.model)
    from mmdet.models import build_detector

    return build_detector(config.model, test_cfg=config.get("test_cfg"))


def normalized(config: Any, pixels: np.ndarray, version: str) -> Tensor:
    """Apply the version's own test pipeline, without the resize. Returns [1, 3, H, W]."""
    bgr = np.ascontiguousarray(pixels[:, :, ::-1])
    if version.startswith("0."):
        from mmdet.datasets.transforms import ImageTransform

        sides = sorted(pixels.shape[:2], reverse=True)
        image, _, _, scale = ImageTransform(size_divisor=32, **config.img_norm_cfg)(bgr, tuple(sides), False)
        assert scale == 1
        return torch.from_numpy(image)[None]
    from mmdet.datasets.pipelines import Compose

    steps = config.test_pipeline[-1]["transforms"]
    kept = [step for step in steps if step["type"] in ("Normalize", "Pad", "ImageToTensor")]
    return Compose(kept)({"img": bgr, "img_fields": ["img"]})["img"][None]


@torch.inference_mode()
def detect_with_peer(
    model: Any, config: Any, pixels: np.ndarray, version: str, proposals: np.ndarray | None
) -> ImageDetections:
    """Run a model on an image without resizing it."""
    maps: list[tuple[Tensor, Tensor | None]] = []
    _record_masks(model, maps)
    if version.startswith("3."):
        boxes, scores, labels = _detect_with_3(model, pixels, proposals)
    else:
        boxes, scores, labels = _detect_with_earlier(model, config, pixels, version, proposals)
    masks = None
    if maps:
        masks = _of_predicted_class(*maps[-1], first=1 if version < "2" else 0)
        masks = masks[np.arange(len(masks)) if version >= "3" else np.argsort(maps[-1][1], kind="stable")]
    order = np.argsort(-scores, kind="stable")
    keep = order[: KEPT_PROPOSALS if type(model).__name__ == "RPN" else len(order)]
    return ImageDetections(
        boxes=boxes[keep],
        scores=scores[keep],
        labels=labels[keep],
        count=len(boxes),
        masks=None if masks is None else thinned(masks[order[:KEPT_MASKS]]),
    )


def _record_masks(model: Any, maps: list[tuple[Any, Any]]) -> None:
    """Record what the last mask head receives for pasting: mask probabilities [n, C, S, S] and labels [n]."""
    head = getattr(model, "roi_head", model)
    head = getattr(head, "mask_head", None)
    if head is None:
        return
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    cls = type(head)
    if hasattr(cls, "predict_by_feat"):

        def predict_by_feat(mask_preds: Any, results_list: Any, *rest: Any, **options: Any) -> Any:
            maps.append((_probabilities(mask_preds[0], options.get("activate_map", False)), results_list[0].labels))
            return cls.predict_by_feat(head, mask_preds, results_list, *rest, **options)

        head.predict_by_feat = predict_by_feat
    else:

        def get_seg_masks(mask_pred: Any, boxes: Any, labels: Any, *rest: Any, **options: Any) -> Any:
            maps.append((_probabilities(mask_pred, isinstance(mask_pred, np.ndarray)), labels))
            return [[] for _ in range(head.num_classes)]  # The comparison ends before pasting.

        head.get_seg_masks = get_seg_masks


def _probabilities(maps: Any, already: bool) -> Tensor:
    return torch.as_tensor(maps) if already else maps.sigmoid()


def _of_predicted_class(maps: Tensor, labels: Any, first: int) -> np.ndarray:
    return maps[torch.arange(len(maps)), labels + first].numpy()


def _detect_with_3(model: Any, pixels: np.ndarray, proposals: np.ndarray | None) -> tuple[np.ndarray, ...]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = pixels.shape[:2]
    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
    if proposals is not None:
        sample.proposals = InstanceData(bboxes=torch.from_numpy(proposals))
    bgr = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)
    instances = model.test_step({"inputs": [bgr], "data_samples": [sample]})[0].pred_instances
    return instances.bboxes.numpy(), instances.scores.numpy(), instances.labels.numpy()


def _detect_with_earlier(
    model: Any, config: Any, pixels: np.ndarray, version: str, proposals: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    image = normalized(config, pixels, version)
    scale: Any = 1.0 if version < "2" else np.ones(4, np.float32)
    meta = {"img_shape": pixels.shape, "ori_shape": pixels.shape, "scale_factor": scale, "flip": False}
    meta |= {"pad_shape": (*image.shape[2:], 3), "batch_input_shape": tuple(image.shape[2:])}
    if proposals is None:
        result = model.simple_test(image, [meta])
    else:
        result = model.simple_test(image, [meta], proposals=[torch.from_numpy(proposals)])
    if version >= "2":
        result = result[0]
    if isinstance(result, tuple):  # (boxes, masks)
        result = result[0]
    classes: Iterable[np.ndarray] = [result] if isinstance(result, np.ndarray) else result
    rows = [np.asarray(of_class) for of_class in classes]
    labels = np.concatenate([np.full(len(of_class), label) for label, of_class in enumerate(rows)])
    detections = np.concatenate(rows)
    return detections[:, :4], detections[:, 4], labels


def main(configs: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of the named models, or of all models."""
    version, major = import_peer()
    for name in names or [name for name in MODELS if major == 3 or name != "mask_rcnn_gn"]:
        config, text = read_config(configs, name, major)
        model = build_model(config, major).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        gains = SPECIAL_GAINS.get(name, {}) | LAST_NORM[config.model.backbone.depth]
        gains |= {pattern: gain for pattern, gain in GAINS.items() if pattern not in gains}
        model.load_state_dict(fill(shapes, gains))
        needs_proposals = name == "fast_rcnn"
        detections = [
            detect_with_peer(model, config, one, version, proposals_for(one) if needs_proposals else None)
            for one in images_of(data)
        ]
        # As the version's own runner writes the metadata.
        meta = {"mmengine_version": "0.10.7", "cfg": text} if major == 3 else {"mmdet_version": version, "config": text}
        about = {"peer": f"mmdetection {version}", "meta": meta}
        Reference(about=about, shapes=shapes, gains=gains, detections=detections).save(f"mmdetection{major}_{name}")
        for one in detections:
            spread = np.quantile(one.scores, [0, 0.25, 0.5, 0.75, 1]).round(4)
            print(name, one.count, "detections, classes:", len(set(one.labels)), "scores", spread)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
