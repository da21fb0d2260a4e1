"""Writes the fixtures `mmdetection*`: what mmdetection's own models detect, see `reference.py`. Run by hand.

    PYTHONPATH=src:tests:PEER python -m importers.make_fixtures_mmdetection CONFIGS DATA [MODEL ...]

PEER is a folder with the packages `mmdet` and `mmcv` (and, for 3.x, `mmengine`), CONFIGS the configurations that belong
to them, DATA what `BOXWRIGHT_DATA` names. The committed fixtures come from mmdetection 0.5.7 with mmcv 0.2.7, 1.0.0
with 0.2.16, 2.28.2 with 1.7.2, and 3.3.0 with 2.1.0 and mmengine 0.10.7, on torch 2.14 and torchvision 0.29, on a CPU.
(0.5.7 and 1.0.0 want a `version.py`, which their setup writes.) Of 0.5.7 and 2.28.2 not all models are kept: the parts
of the others are in those that are. The one with GroupNorm is 3.3.0's alone.

Nothing of a peer is compiled for it, see `mmdetection_on_cpu.py`. Models are those of the peer's own configurations,
but narrower, and on a ResNet-18 but for some.
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
from importers.reference import Found, Reference, fill, images_of, proposals, thinned

KEPT_PROPOSALS = 300
KEPT_MASKS = 10
NARROW = {"out_channels": 64, "in_channels": 64, "feat_channels": 64, "conv_out_channels": 32, "fc_out_channels": 128}
CAFFE = {
    r"style='pytorch'": "style='caffe'",
    r"mean=\[.*?\], std=\[.*?\], to_rgb=True": "mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False",
}
"""Makes a configuration of 0.x or 1.x that of the Caffe-trained models in its model zoo, for which it has none."""
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
"""By our names, folder (from 2.x on) and name of the configuration."""
DEEP = ("faster_rcnn_caffe", "faster_rcnn_resnext")
"""Models that have bottlenecks, of 50 layers: where a bottleneck has its stride makes a difference."""
GAINS = {
    "neck.*.weight": 0.4,
    # Scores that spread, and boxes that stay near their anchors.
    "*rpn_cls.weight": 0.7,
    "*rpn_reg.weight": 0.15,
    "*bbox_head.fc_cls.weight": 1.0,
    "*bbox_head.?.fc_cls.weight": 0.7,
    "*fc_reg.weight": 0.5,
    "*retina_cls.weight": 0.5,
    "*retina_reg.weight": 0.4,
}
OWN_GAINS = {
    # Pixels that nothing divides.
    "faster_rcnn_caffe": {"backbone.conv1.weight": 0.015},
    # Objectness that float32 tells apart after the sigmoid, by which the peer chooses.
    "proposal_network": {"*rpn_cls.weight": 0.3},
    "faster_rcnn_resnext": {"*rpn_cls.weight": 0.3},
    "mask_rcnn_gn": {"backbone.conv1.weight": 0.015, "backbone.*.gn2.weight": 0.3},
    # Detections on the two coarsest levels, too.
    "retinanet": {"neck.fpn_convs.3.*.weight": 0.8, "neck.fpn_convs.4.*.weight": 1.2, "*retina_reg.weight": 0.2},
    # Scores around the threshold.
    "fast_rcnn": {"*fc_cls.weight": 0.32},
}
"""Of a model, before those."""
LAST_NORM = {18: {"backbone.*.bn2.weight": 0.3}, 50: {"backbone.*.bn3.weight": 0.3}}
"""By depth: residual branches are weak, as training makes them."""


def read_config(configs: Path, name: str, major: int) -> tuple[Any, str]:
    """A configuration made narrow, and its text as the version writes it into a checkpoint."""
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


def _narrow(page: Any, depth: int) -> None:
    for key, value in page.items() if isinstance(page, dict) else enumerate(page):
        if key in NARROW and isinstance(value, int):
            page[key] = NARROW[key]
        elif key == "in_channels" and depth == 18:
            page[key] = [64, 128, 256, 512]
        elif key == "depth":
            page[key] = depth
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
    """[1, 3, H, W], the image as the version's own pipeline for tests makes it, but for the resize."""
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
def found_by(model: Any, config: Any, pixels: np.ndarray, version: str, given: np.ndarray | None) -> Found:
    """What a model finds in a image at its own size."""
    maps: list[tuple[Tensor, Tensor | None]] = []
    _listen_to_masks(model, maps)
    if version.startswith("3."):
        boxes, scores, labels = _found_by_3(model, pixels, given)
    else:
        boxes, scores, labels = _found_by_earlier(model, config, pixels, version, given)
    masks = None
    if maps:
        masks = _own_class(*maps[-1], first=1 if version < "2" else 0)
        masks = masks[np.arange(len(masks)) if version >= "3" else np.argsort(maps[-1][1], kind="stable")]
    order = np.argsort(-scores, kind="stable")
    kept = order[: KEPT_PROPOSALS if type(model).__name__ == "RPN" else len(order)]
    return Found(
        boxes=boxes[kept],
        scores=scores[kept],
        labels=labels[kept],
        count=len(boxes),
        masks=None if masks is None else thinned(masks[order[:KEPT_MASKS]]),
    )


def _listen_to_masks(model: Any, maps: list[tuple[Any, Any]]) -> None:
    """Note what the last mask head is given to paste: maps [n, C, S, S], logits or probabilities, and labels [n]."""
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
            return [[] for _ in range(head.num_classes)]  # Pasting is no part of what is compared.

        head.get_seg_masks = get_seg_masks


def _probabilities(maps: Any, already: bool) -> Tensor:
    return torch.as_tensor(maps) if already else maps.sigmoid()


def _own_class(maps: Tensor, labels: Any, first: int) -> np.ndarray:
    return maps[torch.arange(len(maps)), labels + first].numpy()


def _found_by_3(model: Any, pixels: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, ...]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = pixels.shape[:2]
    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
    if given is not None:
        sample.proposals = InstanceData(bboxes=torch.from_numpy(given))
    bgr = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)
    found = model.test_step({"inputs": [bgr], "data_samples": [sample]})[0].pred_instances
    return found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy()


def _found_by_earlier(
    model: Any, config: Any, pixels: np.ndarray, version: str, given: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    image = normalized(config, pixels, version)
    scale: Any = 1.0 if version < "2" else np.ones(4, np.float32)
    meta = {"img_shape": pixels.shape, "ori_shape": pixels.shape, "scale_factor": scale, "flip": False}
    meta |= {"pad_shape": (*image.shape[2:], 3), "batch_input_shape": tuple(image.shape[2:])}
    if given is None:
        result = model.simple_test(image, [meta])
    else:
        result = model.simple_test(image, [meta], proposals=[torch.from_numpy(given)])
    if version >= "2":
        result = result[0]
    if isinstance(result, tuple):  # and masks
        result = result[0]
    classes: Iterable[np.ndarray] = [result] if isinstance(result, np.ndarray) else result
    rows = [np.asarray(own) for own in classes]
    labels = np.concatenate([np.full(len(own), label) for label, own in enumerate(rows)])
    found = np.concatenate(rows)
    return found[:, :4], found[:, 4], labels


def main(configs: Path, data: Path, names: list[str]) -> None:
    """Write the fixtures of these models, or of all."""
    version, major = import_peer()
    for name in names or [name for name in MODELS if major == 3 or name != "mask_rcnn_gn"]:
        config, text = read_config(configs, name, major)
        model = build_model(config, major).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        gains = OWN_GAINS.get(name, {}) | LAST_NORM[config.model.backbone.depth]
        gains |= {pattern: gain for pattern, gain in GAINS.items() if pattern not in gains}
        model.load_state_dict(fill(shapes, gains))
        wants = name == "fast_rcnn"
        found = [found_by(model, config, one, version, proposals(one) if wants else None) for one in images_of(data)]
        # As the version's own runner writes it.
        meta = {"mmengine_version": "0.10.7", "cfg": text} if major == 3 else {"mmdet_version": version, "config": text}
        about = {"peer": f"mmdetection {version}", "meta": meta}
        Reference(about=about, shapes=shapes, gains=gains, found=found).save(f"mmdetection{major}_{name}")
        for one in found:
            spread = np.quantile(one.scores, [0, 0.25, 0.5, 0.75, 1]).round(4)
            print(name, one.count, "found, of classes", len(set(one.labels)), "scores", spread)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
