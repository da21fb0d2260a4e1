from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from boxwright.data.augmentation import Augmentation
from boxwright.data.buckets import Resize
from boxwright.data.loader import TrainingLoader
from boxwright.structures import Batch, map_tensors
from boxwright.training.experiment import SGD, AdamW
from boxwright.training.optimizer import build_optimizer
from boxwright.training.step import TrainStep
from training.fakes import FakeImages, nan_detector


def batches(number: int, size: int = 4) -> list[Batch]:
    loader = TrainingLoader(
        FakeImages(), augmentation=Augmentation(resize=Resize(32, 32)), batch_size=size, seed=1, num_workers=0
    )
    iterator = loader.batches()
    return [next(iterator) for _ in range(number)]


def make(config: SGD | AdamW | None = None, **options: Any) -> tuple[nn.Module, TrainStep, torch.optim.Optimizer]:
    torch.manual_seed(0)
    detector = nan_detector(2, bad_image=options.pop("bad_image", -1))
    optimizer = build_optimizer(config or SGD(lr=0.1), detector)
    return detector, TrainStep(detector, optimizer, device=torch.device("cpu"), **options), optimizer


def parameters(detector: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in detector.parameters()]


@pytest.mark.parametrize("config", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.0), AdamW(lr=0.1)])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_step_equals_plain_pytorch(config: SGD | AdamW, clip_norm: float | None) -> None:
    """The reference uses `backward`, `clip_grad_norm_` and the default optimizer with a float learning rate."""
    detector, step, _ = make(config, clip_norm=clip_norm)
    reference, _, _ = make()
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    norms_and_biases = [parameter for parameter in trained if parameter.ndim == 1]
    groups = [
        {"params": weights},
        {"params": norms_and_biases, **({} if config.decay_norm_and_bias else {"weight_decay": 0.0})},
    ]
    if isinstance(config, AdamW):
        plain: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    else:
        plain = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    for rate, batch in zip((0.1, 0.05, 0.02), batches(3), strict=True):
        scalars = step([batch], rate)
        plain.zero_grad()
        total = sum(reference.losses(batch).values())
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm or 1e9)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        torch.testing.assert_close(scalars["grad_norm"], norm)
        torch.testing.assert_close(scalars["total"], total.detach())
    for actual, expected in zip(parameters(detector), parameters(reference), strict=True):
        torch.testing.assert_close(actual, expected)


def test_accumulation_equals_one_large_batch() -> None:
    large = batches(1, size=8)[0]
    halves = [map_tensors(large, lambda t: t[:4]), map_tensors(large, lambda t: t[4:])]
    first, step, _ = make()
    expected = step([large], 0.1)
    second, step, _ = make()
    accumulated = step(halves, 0.1)
    torch.testing.assert_close(accumulated, expected)
    for one, other in zip(parameters(first), parameters(second), strict=True):
        torch.testing.assert_close(one, other)


def test_cuda_graphs_may_overwrite_their_outputs_between_accumulated_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are summed outside of the graphs, at the same addresses in every step. Nothing else changes."""
    compile_options: list[dict[str, Any]] = []

    def compile(losses: nn.Module, **options: Any) -> nn.Module:
        compile_options.append(options)
        return losses

    monkeypatch.setattr(torch, "compile", compile)
    plain, plain_step, _ = make(compile=True)
    graphed, step, _ = make(compile=True, cuda_graphs=True)
    assert [options["mode"] for options in compile_options] == [None, "reduce-overhead"]
    trained = [parameter for parameter in graphed.parameters() if parameter.requires_grad]
    addresses = [parameter.grad.data_ptr() for parameter in trained if parameter.grad is not None]
    assert len(addresses) == len(trained)
    for pair in (batches(2), batches(2)):
        torch.testing.assert_close(step(pair, 0.1), plain_step(pair, 0.1))
        assert [parameter.grad.data_ptr() for parameter in trained if parameter.grad is not None] == addresses
    for one, other in zip(parameters(graphed), parameters(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_cuda_graphs_are_refused_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="single process"):
        make(compile=True, cuda_graphs=True)


@pytest.mark.parametrize("config", [SGD(lr=0.1), AdamW(lr=0.1)])
def test_non_finite_step_changes_nothing_even_if_it_is_the_first(config: SGD | AdamW) -> None:
    good = batches(1)[0]
    bad = replace(good, image_ids=good.image_ids.new_full((4,), 5))
    detector, step, optimizer = make(config, bad_image=5, allowed_non_finite=2, clip_norm=1.0)
    before = parameters(detector)
    assert step([bad], 0.1)["finite"] == 0
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(detector), strict=True))
    step([good], 0.1)
    step([bad], 0.1)
    step([good], 0.1)
    clean, clean_step, clean_optimizer = make(config, clip_norm=1.0)
    clean_step([good], 0.1)
    clean_step([good], 0.1)
    assert step.num_non_finite == 2
    assert all(torch.equal(one, other) for one, other in zip(parameters(clean), parameters(detector), strict=True))
    states = zip(optimizer.state.values(), clean_optimizer.state.values(), strict=True)
    assert all(torch.equal(actual[key], expected[key]) for actual, expected in states for key in expected)


def test_after_too_many_non_finite_steps_every_step_is_skipped() -> None:
    good = batches(1)[0]
    bad = replace(good, image_ids=good.image_ids.new_full((4,), 5))
    detector, step, _ = make(bad_image=5)
    before = parameters(detector)
    step([bad], 0.1)
    assert step([good], 0.1)["finite"] == 1
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(detector), strict=True))


def test_infinite_loss_with_finite_gradients_is_detected() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"loss": self.weight.sum() + torch.inf}

    detector = Shifted()
    step = TrainStep(detector, build_optimizer(SGD(lr=0.1), detector), device=torch.device("cpu"))
    assert step([batches(1)[0]], 0.1)["finite"] == 0
    assert detector.weight == 1


def test_frozen_parameters_are_not_optimized() -> None:
    detector, step, optimizer = make()
    stem = detector.stem.weight.clone()
    step(batches(1), 0.1)
    assert torch.equal(stem, detector.stem.weight)
    assert all(
        parameter is not detector.stem.weight for group in optimizer.param_groups for parameter in group["params"]
    )
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(SGD(), detector.requires_grad_(False))


def test_bfloat16_keeps_float32_weights_and_losses() -> None:
    detector, step, _ = make(precision="bfloat16")
    scalars = step(batches(1), 0.1)
    assert all(parameter.dtype == torch.float32 for parameter in detector.parameters())
    assert all(scalar.dtype == torch.float32 and scalar.isfinite() for scalar in scalars.values())


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with the `aot_eager` backend, which traces graphs and compiles no kernels."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_inductor")
def test_number_of_graphs_is_limited_by_canvases_only() -> None:
    """PyTorch's default limit is 8 graphs; one more graph raises FailOnRecompileLimitHit."""
    num_canvases = torch._dynamo.config.recompile_limit + 2
    _, step, _ = make(compile=True, num_canvases=num_canvases)
    batch = batches(1)[0]
    for number in range(num_canvases):
        scalars = step([replace(batch, images=F.pad(batch.images, (0, 32 * number)))], 0.1)
        assert scalars["finite"] == 1


@pytest.mark.usefixtures("without_inductor")
def test_compiled_step_changes_no_compiler_setting() -> None:
    configs = torch._dynamo.config, torch._functorch.config
    with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=False):
        before = [config.save_config() for config in configs]
        _, step, _ = make(compile=True, num_canvases=20)
        step(batches(1), 0.1)
        assert [config.save_config() for config in configs] == before
