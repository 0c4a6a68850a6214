import pytest
import torch
from diffusers.optimization import get_scheduler

from ftk.configs.schema import OptimizerConfig
from ftk.train.optim import MasterOptimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_equals_diffusers_schedules(schedule, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate_factor(step, schedule, warmup, 40) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def _train(optimizer, parameter, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        (parameter.float() * torch.randn(64)).sum().backward()
        optimizer.accumulate()
        optimizer.step(1e-4, 1.0)


def test_fp32_steps_equal_plain_adamw_with_clipping():
    ours, theirs = (torch.nn.Parameter(torch.ones(64)) for _ in range(2))
    _train(MasterOptimizer({"w": ours}, OptimizerConfig()), ours, 5)
    plain = torch.optim.AdamW([theirs], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(5):
        torch.manual_seed(step)
        (theirs * torch.randn(64)).sum().backward()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        plain.step()
        plain.zero_grad()
    assert torch.equal(ours, theirs)


def test_bf16_weights_move_although_each_update_is_below_their_precision():
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, OptimizerConfig(weight_decay=0.0))
    for _ in range(100):
        parameter.sum().backward()
        optimizer.accumulate()
        optimizer.step(1e-4, None)
    # 1 - 100 * 1e-4; in bf16 alone 1 - 1e-4 rounds back to 1
    assert optimizer.weights()["w"].mean().item() == pytest.approx(0.99, abs=1e-4)
    assert parameter.float().mean().item() == pytest.approx(0.99, abs=0.004)
    assert parameter.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_continues_bit_for_bit(dtype):
    whole = torch.nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
    first = torch.nn.Parameter(whole.detach().clone())
    second = torch.nn.Parameter(torch.zeros(64, dtype=dtype))
    optimizer = MasterOptimizer({"w": whole}, OptimizerConfig())
    _train(optimizer, whole, 6)
    before = MasterOptimizer({"w": first}, OptimizerConfig())
    _train(before, first, 3)
    after = MasterOptimizer({"w": second}, OptimizerConfig())
    after.restore(
        {name: tensor.clone() for name, tensor in before.weights().items()},
        {name: tensor.clone() for name, tensor in before.moments().items()},
    )
    _train(after, second, 3, first=3)
    assert torch.equal(whole, second)
    assert torch.equal(optimizer.weights()["w"], after.weights()["w"])


def test_gradients_of_micro_batches_add_up_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, OptimizerConfig())
    for _ in range(512):
        (parameter * 1.0).sum().backward()
        optimizer.accumulate()
    # a bf16 sum of ones stops at 256
    assert optimizer.masters["w"].grad[0].item() == 512
