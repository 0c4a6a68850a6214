import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftk.configs.schema import TrainConfig
from ftk.train import loss_scale
from ftk.train.loop import Trainer
from ftk.train.loss_scale import LossScale
from ftk.train.optim import MasterOptimizer
from ftk.train.placement import Int8Linear

CPU = torch.device("cpu")
SGD = {"optimizer": {"name": "torch.optim.SGD", "momentum": 0.9}, "learning_rate": 1e-3, "max_grad_norm": None}


def make_trainer(parameter: torch.nn.Parameter, losses: Any, *, is_scaled: bool = True, **settings: Any) -> Trainer:
    """A trainer of one parameter, whose batches are numbers; `losses` computes [1] from the parameter and a number."""
    config = TrainConfig(steps=10_000, **{**SGD, **settings})
    optimizer = MasterOptimizer({"weight": parameter}, config, loss_scale=LossScale(CPU) if is_scaled else None)

    class OfOne(Trainer):
        def losses(self, batch: Any) -> torch.Tensor:
            return losses(parameter, batch.number)

    return OfOne(
        model=None,
        method=None,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        config=config,
        device=CPU,  # type: ignore[arg-type]
    )


def update(trainer: Trainer, *numbers: float) -> Any:
    """A step of one micro-batch per number."""
    batches = [SimpleNamespace(number=number, share=1.0, sigma_B=torch.zeros(1), preserved=None) for number in numbers]
    return trainer.update(SimpleNamespace(batches=enumerate(batches), num_samples=len(batches)))  # type: ignore[arg-type]


def times(parameter: torch.Tensor, number: float) -> torch.Tensor:
    """A loss with the gradient `number`, which a scale may make infinite while the loss is finite."""
    return (parameter.float() * number).sum()[None]


def times_in_fp16(parameter: torch.Tensor, number: float) -> torch.Tensor:
    """As `times` with a 1,024th of the gradient, which leaves the range of fp16 where the scale and the number are large."""
    return (parameter.half() * number).float().sum()[None] / 1024


@pytest.fixture
def interval(monkeypatch) -> int:
    """After so few good steps the scale grows."""
    monkeypatch.setattr(loss_scale, "_GROWTH_INTERVAL", 20)
    return 20


def test_a_new_scale_is_that_of_gradscaler():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))  # makes its tensors
    assert LossScale(CPU).facts() == {"scale": scaler.get_scale(), "good_steps": scaler._get_growth_tracker()}
    theirs = (scaler.get_growth_interval(), scaler.get_growth_factor(), scaler.get_backoff_factor())
    assert theirs == (loss_scale._GROWTH_INTERVAL, 2.0, 0.5)


@pytest.mark.parametrize("is_clipped", [False, True])
def test_every_step_is_that_of_gradscaler(interval, is_clipped):
    """Overflows, good steps, steps that are skipped just before the scale would grow, growth, and more overflows."""
    numbers = [4e4, 4e4, 4e4, *[0.5] * 20, 4e4, *[-0.25] * 19, math.inf, *[0.125] * 21, 2e4]
    mine, theirs = (torch.nn.Parameter(torch.full((3,), 1e-3)) for _ in range(2))
    trainer = make_trainer(mine, times_in_fp16, max_grad_norm=2e-4 if is_clipped else None)
    optimizer = torch.optim.SGD([theirs], lr=1e-3, momentum=0.9)
    scaler, scales = torch.amp.GradScaler("cpu", growth_interval=interval), [2.0**16]
    for step, number in enumerate(numbers):
        result = update(trainer, number)
        optimizer.zero_grad()
        scaler.scale(times_in_fp16(theirs, number).sum()).backward()
        scaler.unscale_(optimizer)
        if is_clipped:
            torch.nn.utils.clip_grad_norm_([theirs], 2e-4)
        is_skipped = bool(sum(scaler._found_inf_per_device(optimizer).values()))
        scaler.step(optimizer)
        scaler.update()
        facts = {"scale": scaler.get_scale(), "good_steps": scaler._get_growth_tracker()}
        assert trainer.optimizer.loss_scale.facts() == facts, step
        scales.append(facts["scale"])
        assert bool(result.scaled.is_overflow | result.is_bad) == is_skipped, step
        assert torch.equal(mine, theirs), step
    changes = [(after > before) - (after < before) for before, after in itertools.pairwise(scales) if after != before]
    assert changes == [-1, -1, -1, 1, -1, -1, 1, -1]


@pytest.mark.parametrize(
    "settings", [SGD, {"optimizer": "adamw", "max_grad_norm": 1.0, "ema_decay": 0.9}], ids=["sgd", "adamw"]
)
def test_in_fp32_a_scaled_step_has_the_bytes_of_a_plain_one(settings):
    """A power of two rounds nothing."""
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0))
    pair = [torch.nn.Parameter(weights.clone()) for _ in range(2)]
    trainers = [
        make_trainer(each, lambda weight, number: ((weight - number) ** 2).sum()[None], is_scaled=is_scaled, **settings)
        for each, is_scaled in zip(pair, (True, False), strict=True)
    ]
    for step in range(20):
        results = [update(trainer, step / 3, step / 7) for trainer in trainers]
        assert torch.equal(results[0].grad_norm, results[1].grad_norm)
        assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(*pair)
    assert results[1].scaled is None


def test_fp16_gradients_that_would_vanish_reach_the_masters():
    plain, scaled = (torch.nn.Parameter(torch.ones(2, dtype=torch.float16)) for _ in range(2))
    trainers = [make_trainer(plain, times, is_scaled=False), make_trainer(scaled, times)]
    for trainer in trainers:
        update(trainer, 1e-8)
    moved = [1 - trainer.optimizer.masters["weight"][0].item() for trainer in trainers]
    assert moved[0] == 0
    norms = [update(trainer, 1e-8).grad_norm.item() for trainer in trainers]
    assert norms[0] == 0
    assert norms[1] == pytest.approx(math.sqrt(2) * 1e-8, rel=1e-3)


def test_an_overflow_is_skipped_and_no_bad_step_until_the_scale_is_1():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    trainer = make_trainer(weight, times)
    results = [update(trainer, 1e5) for _ in range(20)]  # beyond fp16 at any scale
    assert [each.scaled.scale.item() for each in results] == [2.0**power for power in range(16, 0, -1)] + [1.0] * 4
    assert [bool(each.scaled.is_overflow) for each in results] == [True] * 16 + [False] * 4
    assert [bool(each.is_bad) for each in results] == [False] * 16 + [True] * 4
    assert not weight.any()
    good = update(trainer, 1e3)
    assert not good.is_bad
    assert weight.all()


def test_a_loss_that_is_not_finite_is_a_bad_step_at_any_scale():
    trainer = make_trainer(torch.nn.Parameter(torch.ones(2)), times)
    result = update(trainer, math.nan)
    assert result.is_bad
    assert not result.scaled.is_overflow


def test_one_micro_batch_that_overflows_costs_the_whole_step():
    weight = torch.nn.Parameter(torch.zeros(2))
    trainer = make_trainer(weight, times)
    assert update(trainer, 1.0, 1e35, 1.0).scaled.is_overflow
    assert not weight.any()


def test_the_scale_and_its_count_go_on_from_a_checkpoint(interval):
    numbers = [4e3, *[1.0] * 15, 4e3, *[0.5] * (interval + 5)]
    whole = make_trainer(torch.nn.Parameter(torch.zeros(2)), times_in_fp16)
    first = make_trainer(torch.nn.Parameter(torch.zeros(2)), times_in_fp16)
    second = make_trainer(torch.nn.Parameter(torch.zeros(2)), times_in_fp16)
    for number in numbers:
        update(whole, number)
    for number in numbers[:25]:
        update(first, number)
    tensors, facts = first.optimizer.state()
    second.optimizer.restore(first.optimizer.weights(), tensors, json.loads(json.dumps(facts)))
    for number in numbers[25:]:
        update(second, number)
    assert second.optimizer.state()[1] == whole.optimizer.state()[1]
    assert torch.equal(*(each.optimizer.masters["weight"] for each in (whole, second)))
    assert whole.optimizer.loss_scale.facts() == {"scale": 2.0**15, "good_steps": 5}


def test_a_checkpoint_of_a_run_without_a_scale_starts_one():
    plain = make_trainer(torch.nn.Parameter(torch.zeros(2)), times, is_scaled=False)
    scaled = make_trainer(torch.nn.Parameter(torch.zeros(2)), times)
    update(plain, 1.0)
    tensors, facts = plain.optimizer.state()
    assert "loss_scale" not in facts
    scaled.optimizer.restore(plain.optimizer.weights(), tensors, facts)
    assert scaled.optimizer.loss_scale.facts() == {"scale": 2.0**16, "good_steps": 0}


def test_an_8_bit_base_in_fp16_multiplies_without_overflow():
    """127 times the sum of 4,096 inputs leaves the range of fp16; the product itself does not."""
    linear = torch.nn.Linear(4096, 2, bias=False, dtype=torch.float16)
    layer = Int8Linear(linear, torch.full((2, 4096), 127, dtype=torch.int8), torch.full((2, 1), 1e-3, dtype=torch.float16))
    inputs = torch.ones(1, 4096, dtype=torch.float16, requires_grad=True)
    output = layer(inputs)
    assert output.detach().tolist() == [[pytest.approx(127e-3 * 4096, rel=2e-3)] * 2]
    output.sum().backward()
    assert inputs.grad[0, 0].item() == pytest.approx(2 * 127e-3, rel=2e-3)
