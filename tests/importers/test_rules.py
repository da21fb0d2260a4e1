from __future__ import annotations

import pytest
import torch
from torch import nn

from boxwright.backbones.resnet import ResNet
from boxwright.importers.rules import (
    Rule,
    Unsupported,
    background_to_last,
    ratios_outermost,
    rename,
    rename_back,
    with_statistics,
    without_background,
    without_background_deltas,
)
from boxwright.layers.norm import has_untrained_statistics

ONE = torch.ones(1)


def test_placeholders_are_substituted_and_the_first_matching_rule_applies() -> None:
    assert rename({"a.3": ONE}, (Rule("a.{i}", "b.{i*2}"),)).tensors == {"b.6": ONE}
    table = (
        Rule("head.{i}.{j}.drop", None),
        Rule("head.{i}.{j}.*", "ours.{i*3+1}.{j-1}.*"),
        Rule("head.*", "rest.*", lambda rows: 2 * rows),
    )
    renamed = rename({"head.2.10.w.x": ONE, "head.0.1.drop": ONE, "head.other": ONE}, table)
    assert renamed.tensors == {"ours.7.9.w.x": ONE, "rest.other": 2 * ONE}
    assert renamed.unused == ["head.0.1.drop"]


def test_rename_back_inverts_the_rule_that_rename_would_apply() -> None:
    table = (
        Rule("lost.*", None),
        Rule("layer.{i}.0.*", "ours.{i*3+1}.*"),
        Rule("old{i}.*", "ours.{i}.*"),
        Rule("fcn{i}.*", "convs.{i-1}.*"),
        Rule("*.logits", "*.scores", background_to_last),
    )
    tensors = {"ours.7.w": ONE, "ours.8.w": ONE, "convs.0.w": ONE, "head.scores": torch.tensor([1.0, 2.0, 0.0])}
    back = rename_back(tensors, table)
    assert list(back) == ["layer.2.0.w", "old8.w", "fcn1.w", "head.logits"]
    assert back["head.logits"].tolist() == [0.0, 1.0, 2.0]
    again = rename(back, table).tensors
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_rename_back_reports_names_and_changes_that_it_cannot_invert() -> None:
    table = (Rule("lost.*", None), Rule("*", "ours.*"), Rule("x", "y", ratios_outermost))
    with pytest.raises(ValueError, match=r"3 tensors cannot be renamed: other, y, ours\.lost\.w"):
        rename_back({"other": ONE, "y": ONE, "ours.lost.w": ONE, "ours.w": ONE}, table)


def test_a_dot_in_a_pattern_matches_only_a_dot() -> None:
    with pytest.raises(ValueError, match=r"1 unknown tensor, .* axb"):
        rename({"axb": ONE}, (Rule("a.b", "b"),))


def test_all_unknown_names_are_reported() -> None:
    names = [f"n{i}" for i in range(13)]
    with pytest.raises(ValueError, match=r"13 unknown tensors.*n0, n1, .*n9 and 3 more"):
        rename(dict.fromkeys(names, ONE), ())


def test_name_collisions_and_unsupported_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a1 and a2 both map to b, so the file seems to contain two models"):
        rename({"a1": ONE, "a2": ONE}, (Rule("a{i}", "b"),))
    with pytest.raises(ValueError, match=r"k\.1: no keypoints"):
        rename({"k.1": ONE}, (Unsupported("k.*", "no keypoints"),))


def test_unexpected_shapes_are_reported() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[\], which does not match logits"):
        rename({"x": torch.tensor(1.0)}, (Rule("x", "logits", background_to_last),))


def test_background_row_is_moved_last_or_removed() -> None:
    rows = torch.arange(12).reshape(3, 4)
    assert background_to_last(rows)[:, 0].tolist() == [4, 8, 0]
    assert without_background(rows)[:, 0].tolist() == [4, 8]
    assert without_background_deltas(torch.arange(12)).tolist() == list(range(4, 12))
    assert without_background_deltas(torch.arange(4)).tolist() == [0, 1, 2, 3], (
        "class-agnostic deltas have no background row"
    )


def test_anchors_are_reordered_and_the_values_of_an_anchor_stay_together() -> None:
    theirs = torch.tensor([100 * size + 10 * ratio + k for size in range(3) for ratio in range(3) for k in range(4)])
    ours = [100 * size + 10 * ratio + k for ratio in range(3) for size in range(3) for k in range(4)]
    assert ratios_outermost(theirs[:, None])[:, 0].tolist() == ours
    with pytest.raises(ValueError, match="10 rows"):
        ratios_outermost(torch.zeros(10))


def test_norms_without_statistics_become_norms_that_count_as_trained() -> None:
    body = ResNet(18).eval()
    state = {f"backbone.body.{name}": tensor for name, tensor in body.state_dict().items() if "running" not in name}
    nn.init.uniform_(state["backbone.body.bn1.weight"], 0.5, 2)
    nn.init.normal_(state["backbone.body.bn1.bias"])
    completed = {name.removeprefix("backbone.body."): tensor for name, tensor in with_statistics(state).items()}
    assert has_untrained_statistics(body)
    body.load_state_dict(completed)
    assert not has_untrained_statistics(body)
    x = torch.randn(1, 64, 3, 3)
    expected = x * completed["bn1.weight"].view(1, -1, 1, 1) + completed["bn1.bias"].view(1, -1, 1, 1)
    assert torch.allclose(body.bn1(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
