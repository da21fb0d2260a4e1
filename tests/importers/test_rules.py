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


def test_numbers_and_text_are_put_in_and_the_first_row_that_fits_counts() -> None:
    assert rename({"a.3": ONE}, (Rule("a.{i}", "b.{i*2}"),)).tensors == {"b.6": ONE}
    table = (
        Rule("head.{i}.{j}.drop", None),
        Rule("head.{i}.{j}.*", "ours.{i*3+1}.{j-1}.*"),
        Rule("head.*", "rest.*", lambda rows: 2 * rows),
    )
    given = rename({"head.2.10.w.x": ONE, "head.0.1.drop": ONE, "head.other": ONE}, table)
    assert given.tensors == {"ours.7.9.w.x": ONE, "rest.other": 2 * ONE}
    assert given.unused == ["head.0.1.drop"]


def test_tables_go_back_by_the_first_row_that_leads_there_and_is_the_names_own() -> None:
    table = (
        Rule("lost.*", None),
        Rule("layer.{i}.0.*", "ours.{i*3+1}.*"),
        Rule("old{i}.*", "ours.{i}.*"),
        Rule("fcn{i}.*", "convs.{i-1}.*"),
        Rule("*.logits", "*.scores", background_to_last),
    )
    given = {"ours.7.w": ONE, "ours.8.w": ONE, "convs.0.w": ONE, "head.scores": torch.tensor([1.0, 2.0, 0.0])}
    back = rename_back(given, table)
    assert list(back) == ["layer.2.0.w", "old8.w", "fcn1.w", "head.logits"]
    assert back["head.logits"].tolist() == [0.0, 1.0, 2.0]
    again = rename(back, table).tensors
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in given.items())


def test_names_and_changes_that_lead_nowhere_are_told() -> None:
    table = (Rule("lost.*", None), Rule("*", "ours.*"), Rule("x", "y", ratios_outermost))
    with pytest.raises(ValueError, match=r"3 tensors cannot be renamed: other, y, ours\.lost\.w"):
        rename_back({"other": ONE, "y": ONE, "ours.lost.w": ONE, "ours.w": ONE}, table)


def test_dots_are_dots() -> None:
    with pytest.raises(ValueError, match=r"1 unknown tensor, .* axb"):
        rename({"axb": ONE}, (Rule("a.b", "b"),))


def test_all_unknown_names_are_told() -> None:
    names = [f"n{i}" for i in range(13)]
    with pytest.raises(ValueError, match=r"13 unknown tensors.*n0, n1, .*n9 and 3 more"):
        rename(dict.fromkeys(names, ONE), ())


def test_two_names_for_one_of_ours_and_what_is_not_supported() -> None:
    with pytest.raises(ValueError, match=r"a1 and a2 both map to b: the file contains two models"):
        rename({"a1": ONE, "a2": ONE}, (Rule("a{i}", "b"),))
    with pytest.raises(ValueError, match=r"k\.1: no keypoints"):
        rename({"k.1": ONE}, (Unsupported("k.*", "no keypoints"),))


def test_shapes_that_cannot_be_changed_are_told() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[\], which does not match logits"):
        rename({"x": torch.tensor(1.0)}, (Rule("x", "logits", background_to_last),))


def test_background_goes_last_or_away() -> None:
    rows = torch.arange(12).reshape(3, 4)
    assert background_to_last(rows)[:, 0].tolist() == [4, 8, 0]
    assert without_background(rows)[:, 0].tolist() == [4, 8]
    assert without_background_deltas(torch.arange(12)).tolist() == list(range(4, 12))
    assert without_background_deltas(torch.arange(4)).tolist() == [0, 1, 2, 3], "one box for all classes"


def test_anchors_change_their_order_and_keep_their_values_together() -> None:
    theirs = torch.tensor([100 * size + 10 * ratio + k for size in range(3) for ratio in range(3) for k in range(4)])
    ours = [100 * size + 10 * ratio + k for ratio in range(3) for size in range(3) for k in range(4)]
    assert ratios_outermost(theirs[:, None])[:, 0].tolist() == ours
    with pytest.raises(ValueError, match="10 rows"):
        ratios_outermost(torch.zeros(10))


def test_scale_and_bias_alone_are_a_norm_and_count_as_trained() -> None:
    body = ResNet(18).eval()
    state = {f"backbone.body.{name}": tensor for name, tensor in body.state_dict().items() if "running" not in name}
    nn.init.uniform_(state["backbone.body.bn1.weight"], 0.5, 2)
    nn.init.normal_(state["backbone.body.bn1.bias"])
    filled = {name.removeprefix("backbone.body."): tensor for name, tensor in with_statistics(state).items()}
    assert has_untrained_statistics(body)
    body.load_state_dict(filled)
    assert not has_untrained_statistics(body)
    x = torch.randn(1, 64, 3, 3)
    expected = x * filled["bn1.weight"].view(1, -1, 1, 1) + filled["bn1.bias"].view(1, -1, 1, 1)
    assert torch.allclose(body.bn1(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
