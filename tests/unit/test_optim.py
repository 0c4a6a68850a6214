import copy
import json
import sys
import types

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load, save
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ftk.configs.schema import RunConfig, ScheduleConfig, TrainConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.run import resolve
from ftk.train import optim, optimizers
from ftk.train.inputs import open_inputs
from ftk.train.memory import has_torchao
from ftk.train.optim import MasterOptimizer
from ftk.train.optimizers import OPTIMIZERS, elementwise, splits

RATES = {"adafactor": 0.3, "lion": 0.02, "prodigy": 1.0, "torch.optim.SGD": 0.05, "torch.optim.RMSprop": 0.02}
needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed: make test-int8")
PLAIN_NAMES = [*(name for name in OPTIMIZERS if name != "adamw-8bit"), "torch.optim.SGD", "torch.optim.RMSprop"]
NAMES = [*PLAIN_NAMES, pytest.param("adamw-8bit", marks=needs_torchao)]
SETTINGS = {"torch.optim.SGD": {"momentum": 0.9, "nesterov": True}, "prodigy": {"d0": 1e-3, "weight_decay": 0.01}}
DTYPES = [torch.float32, torch.bfloat16]


def config_of(name="adamw", *, groups=(), learning_rate=None, schedule="constant", ema_decay=None, **settings):
    return TrainConfig(
        learning_rate=learning_rate or RATES.get(name, 0.05),
        optimizer={"name": name, "groups": groups, **SETTINGS.get(name, {}), **settings},
        schedule=schedule,
        ema_decay=ema_decay,
    )


def make_parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # 4096 values: the smallest tensor whose moments the 8-bit optimizer quantises
    shapes = {"blocks.0.weight": (64, 64), "blocks.1.weight": (3, 5), "blocks.1.bias": (7,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def backward(optimizer, step):
    """A quadratic's gradient, a little different in every step; returns the loss."""
    generator = torch.Generator().manual_seed(step)
    loss = sum(
        ((parameter.float() - 0.01 * torch.randn(parameter.shape, generator=generator)) ** 2).sum()
        for parameter in optimizer.parameters.values()
    )
    loss.backward()
    optimizer.accumulate()
    return loss.detach()


def train(optimizer, steps, first=0, factor=1.0):
    losses = []
    for step in range(first, first + steps):
        loss = backward(optimizer, step)
        _, is_bad = optimizer.step(factor, 1.0, loss)
        assert not is_bad
        losses.append(loss.item())
    return losses


def through_a_file(optimizer):
    """Weights, tensors and facts as a checkpoint gives them back."""
    tensors, facts = optimizer.state()
    return load(save(optimizer.weights())), load(save(tensors)), json.loads(json.dumps(facts, allow_nan=False))


def frozen(optimizer):
    """A copy of all that an update could change."""
    return copy.deepcopy((optimizer.weights(), *optimizer.state(), dict(optimizer.parameters)))


def assert_equal(found, wanted):
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_equal(*pair)
    else:
        assert found == wanted


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"name": "constant"}, {"name": "constant_with_warmup"}),
        ({"name": "linear"}, {}),
        ({"name": "cosine"}, {}),
        ({"name": "cosine_with_restarts", "cycles": 3}, {"num_cycles": 3}),
        ({"name": "polynomial", "power": 2.0}, {"power": 2.0}),
    ],
)
def test_schedules_equal_those_of_diffusers(settings, theirs, warmup):
    ours = optim.schedule(ScheduleConfig(warmup=warmup, **settings), 40)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = get_scheduler(**{
        "name": settings["name"], "optimizer": optimizer, "num_warmup_steps": warmup, "num_training_steps": 40, **theirs
    })  # fmt: skip
    factors = []
    for step in range(40):
        factors.append(ours(step))
        assert factors[-1] == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
    assert ours(3) == factors[3]
    assert max(factors) == 1.0
    assert (factors[0] == 0.0) == (warmup > 0)
    assert (factors[-1] == 1.0) == (settings["name"] == "constant")


def test_a_minimum_is_that_of_transformers():
    ours = optim.schedule(ScheduleConfig(name="cosine", warmup=5, minimum=0.1), 40)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 40, min_lr_rate=0.1)
    for step in range(40):
        assert ours(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_a_schedule_has_a_length_of_its_own_and_stays_where_it_ends(name):
    ours = optim.schedule(ScheduleConfig(name=name, steps=20, minimum=0.25), 50)
    alone = optim.schedule(ScheduleConfig(name=name, minimum=0.25), 20)
    assert [ours(step) for step in range(20)] == [alone(step) for step in range(20)]
    assert {round(ours(step), 6) for step in range(20, 50)} == {0.25}
    assert min(ours(step) for step in range(50)) >= 0.25


@pytest.mark.parametrize(
    ("settings", "run_steps", "expected"),
    [
        ({"warmup": 0.1}, 200, 20), ({"warmup": 0.1, "steps": 50, "name": "cosine"}, 200, 5), ({"warmup": 7}, 200, 7),
        ({"warmup": 0.5, "steps": 50}, 200, 25), ({"warmup_steps": 7}, 200, 7), ({"warmup": 0.0}, 200, 0),
    ],
)  # fmt: skip
def test_a_warm_up_is_a_number_of_steps_or_a_share_of_the_schedule(settings, run_steps, expected):
    config = ScheduleConfig(**settings)
    assert config.num_warmup(run_steps) == expected
    factor = optim.schedule(config, run_steps)
    if expected:
        assert [factor(step) for step in (0, expected)] == [0.0, 1.0]
        assert factor(expected - 1) < 1


def test_a_schedule_that_ends_at_nothing_before_the_run_is_refused():
    short = {"name": "cosine", "steps": 4}
    with pytest.raises(ConfigError, match=r"steps 4: the learning rate is 0 after that, and the run has 8 steps.*minimum"):
        optim.check_length(TrainConfig(steps=8, schedule=short))
    optim.check_length(TrainConfig(steps=8, schedule={**short, "minimum": 0.1}))
    optim.check_length(TrainConfig(steps=4, schedule=short))


@pytest.mark.parametrize(
    ("before", "now", "rates"),
    [
        # The rates of the cosine by hand: (1 + cos(pi 3/4)) / 2, (1 + cos(pi 3/8)) / 2, 0 and 1/2 of 0.01.
        ({"schedule": "cosine", "steps": 4}, {"schedule": "cosine", "steps": 8}, ["0.00146", "0.00691", "had 0 and", "0.005"]),
        ({"schedule": "constant"}, {"schedule": "constant", "learning_rate": 0.02}, ["0.01", "0.02"]),
        ({"schedule": "constant"}, {"schedule": "constant", "steps": 8}, None),
        (
            {"schedule": {"name": "cosine", "steps": 8}, "steps": 4},
            {"schedule": {"name": "cosine", "steps": 8}, "steps": 8},
            None,
        ),
    ],
)
def test_a_learning_rate_that_jumps_is_told_with_both_rates(before, now, rates):
    configs = [TrainConfig(**{"learning_rate": 0.01, "steps": 4, **settings}) for settings in (before, now)]
    notice = optim.notice_of_jump(4, *configs)
    assert (notice is None) == (rates is None)
    assert all(rate in (notice or "") for rate in rates or ())


def test_piecewise_rules_hold_up_to_their_steps():
    factor = optim.schedule(ScheduleConfig(name="piecewise_constant", rules="1:3,0.5:5,0.1"), 10)
    assert [factor(step) for step in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_loss(name, dtype):
    parameters = make_parameters(dtype)
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = MasterOptimizer(parameters, config_of(name))
    losses = train(optimizer, 40)
    assert losses[-1] < 0.9 * losses[0]
    for key, parameter in parameters.items():
        assert parameter.dtype == dtype
        assert not torch.equal(parameter, before[key])
        assert torch.equal(parameter, optimizer.weights()[key].to(dtype))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_resuming_goes_on_to_the_bit(name, dtype, grouped):
    groups = [{"match": "bias$", "weight_decay": 0.1}, {"match": "blocks.1", "learning_rate": 0.0}] if grouped else []
    config = config_of(name, groups=groups, ema_decay=None if name == "schedule-free" else 0.9)
    whole = MasterOptimizer(make_parameters(dtype), config)
    train(whole, 7)
    begun = MasterOptimizer(make_parameters(dtype), config)
    train(begun, 3)
    resumed = MasterOptimizer(make_parameters(dtype, seed=9), config)
    resumed.restore(*through_a_file(begun))
    assert_equal(frozen(resumed), frozen(begun))
    train(resumed, 4, first=3)
    assert_equal(frozen(resumed), frozen(whole))
    assert_equal(resumed.delivered(), whole.delivered())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimizer_of_ones_own_resumes_whatever_it_keeps(dtype, monkeypatch):
    class Odd(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                group["seen"] = group.get("seen", torch.zeros(())) + 1
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("history", []).append(parameter.grad.clone())
                    state["ema"] = state.get("ema", torch.zeros(())) + parameter.grad.sum()
                    state["worst"] = float("-inf") if len(state["history"]) < 2 else (None, torch.bfloat16)
                    past = torch.stack(state["history"]).mean(0)
                    parameter.data.sub_(group["lr"] * group["seen"] * (past + 0.01 * state["ema"]))

    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    sys.modules["my_package"].Odd = Odd
    config = config_of("my_package.Odd", ema_decay=0.5, learning_rate=1e-3)
    whole, begun, resumed = (MasterOptimizer(make_parameters(dtype), config) for _ in range(3))
    train(whole, 4)
    train(begun, 1)
    resumed.restore(*through_a_file(begun))
    train(resumed, 3, first=1)
    assert_equal(frozen(resumed), frozen(whole))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", [*NAMES, "unfused"])
def test_a_step_that_is_not_finite_changes_nothing(name, steps_before, fault):
    unfused = {"fused": False} if name == "unfused" else {}
    name = "adamw" if name == "unfused" else name
    config = config_of(name, ema_decay=None if name == "schedule-free" else 0.9, **unfused)
    optimizer, spared = (MasterOptimizer(make_parameters(), config) for _ in range(2))
    train(optimizer, steps_before)
    train(spared, steps_before)
    before = frozen(optimizer)
    loss = backward(optimizer, 99)
    if fault == "gradient":
        optimizer.gradients()[1][0, 0] = torch.inf
    norm, is_bad = optimizer.step(1.0, 1.0, torch.tensor(torch.nan) if fault == "loss" else loss)
    assert is_bad
    assert is_bad.dtype == torch.bool
    assert torch.isfinite(norm) == (fault == "loss")
    assert all(parameter.grad is None for parameter in optimizer.parameters.values())
    after = frozen(optimizer)
    assert_equal(after[0], before[0])
    if steps_before:
        assert_equal(after, before)
    train(optimizer, 3, first=2)
    train(spared, 3, first=2)
    assert_equal(frozen(optimizer), frozen(spared))


def test_the_default_step_does_not_read_from_the_device(monkeypatch):
    optimizer = MasterOptimizer(make_parameters(), config_of(ema_decay=0.9))
    unfused = MasterOptimizer(make_parameters(), config_of(fused=False))
    losses = [backward(made, 0) for made in (optimizer, unfused)]

    def read(*_):
        raise AssertionError("the device was waited for")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "item", "__float__", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, read)
        optimizer.step(1.0, 1.0, losses[0])
        with pytest.raises(AssertionError, match="waited for"):
            unfused.step(1.0, 1.0, losses[1])


def test_fp32_steps_equal_plain_adamw_with_clipping():
    ours = MasterOptimizer(make_parameters(), config_of(learning_rate=1e-3))
    theirs = make_parameters()
    plain = torch.optim.AdamW(theirs.values(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(5):
        norm, _ = ours.step(1.0, 1.0, backward(ours, step))
        generator = torch.Generator().manual_seed(step)
        sum(((each - 0.01 * torch.randn(each.shape, generator=generator)) ** 2).sum() for each in theirs.values()).backward()
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0).item())
        plain.step()
        plain.zero_grad()
    for name, weight in ours.weights().items():
        assert torch.allclose(weight, theirs[name], rtol=0, atol=1e-7)


def test_a_factor_scales_the_learning_rate_and_no_bound_leaves_the_gradient():
    optimizer = MasterOptimizer(make_parameters(), config_of("torch.optim.SGD", momentum=0.0, nesterov=False))
    before = optimizer.weights()["blocks.1.bias"].clone()
    loss = backward(optimizer, 0)
    gradient = optimizer.gradients()[2].clone()
    assert gradient.norm() > 1
    optimizer.step(0.5, None, loss)
    assert torch.allclose(optimizer.weights()["blocks.1.bias"], before - 0.5 * 0.05 * gradient)


def test_bf16_weights_move_although_each_update_is_below_their_precision():
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, config_of(weight_decay=0.0, learning_rate=1e-4))
    for _ in range(100):
        parameter.sum().backward()
        optimizer.accumulate()
        optimizer.step(1.0, None, torch.zeros(()))
    # 1 - 100 * 1e-4; in bf16 alone 1 - 1e-4 rounds back to 1
    assert optimizer.weights()["w"].mean().item() == pytest.approx(0.99, abs=1e-4)
    assert parameter.float().mean().item() == pytest.approx(0.99, abs=0.004)


def test_gradients_of_micro_batches_add_up_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, config_of())
    for _ in range(512):
        (parameter * 1.0).sum().backward()
        optimizer.accumulate()
    # a bf16 sum of ones stops at 256
    assert optimizer.masters["w"].grad[0].item() == 512


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_masters_own_and_zero_where_there_were_none(dtype):
    optimizer = MasterOptimizer(make_parameters(dtype), config_of())
    optimizer.parameters["blocks.1.bias"].sum().backward()
    optimizer.accumulate()
    gradients = optimizer.gradients()
    assert [gradient.sum().item() for gradient in gradients] == [0.0, 0.0, 7.0]
    gradients[0].fill_(2.0)
    norm, _ = optimizer.step(1.0, None, torch.zeros(()))
    assert norm.item() == pytest.approx((4 * 4096 + 7) ** 0.5)


def test_the_moving_average_equals_one_by_hand_and_bad_steps_are_left_out():
    optimizer = MasterOptimizer(make_parameters(torch.bfloat16), config_of(ema_decay=0.3))
    by_hand = {name: weight.double() for name, weight in optimizer.weights().items()}
    for step in range(5):
        loss = backward(optimizer, step)
        optimizer.step(1.0, 1.0, loss)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, weight in optimizer.weights().items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * weight
        backward(optimizer, 50)
        optimizer.step(1.0, 1.0, torch.tensor(torch.inf))
    for name, average in optimizer.delivered().items():
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), by_hand[name], atol=1e-6)
        assert not torch.allclose(average, optimizer.weights()[name], atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "ema_decay"), [("adamw", 0.9), ("schedule-free", None)])
def test_averaged_weights_are_there_inside_and_gone_to_the_bit_outside(name, ema_decay, dtype):
    parameters = make_parameters(dtype)
    optimizer = MasterOptimizer(parameters, config_of(name, ema_decay=ema_decay))
    train(optimizer, 5)
    before, delivered = frozen(optimizer), optimizer.delivered()

    def look_and_fail():
        with optimizer.averaged():
            for key, parameter in parameters.items():
                assert torch.equal(parameter, delivered[key].to(dtype))
                assert not torch.equal(parameter, before[3][key])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_and_fail()
    assert_equal(frozen(optimizer), before)


def test_without_an_average_the_weights_themselves_are_delivered():
    optimizer = MasterOptimizer(make_parameters(), config_of())
    train(optimizer, 2)
    before = frozen(optimizer)
    with optimizer.averaged():
        assert_equal(frozen(optimizer), before)
    assert_equal(optimizer.delivered(), optimizer.weights())


def test_schedule_free_is_the_librarys_own_with_its_own_warm_up():
    from schedulefree import AdamWScheduleFree

    ours = MasterOptimizer(make_parameters(), config_of("schedule-free", schedule=ScheduleConfig(warmup=4)))
    theirs = make_parameters()
    library = AdamWScheduleFree(theirs.values(), lr=0.05, warmup_steps=4)
    library.train()
    for step in range(6):
        loss = backward(ours, step)
        for parameter, gradient in zip(theirs.values(), ours.gradients(), strict=True):
            parameter.grad = gradient.clone()
        # the schedule's factor is not for an optimizer that warms up by itself
        ours.step(0.0, None, loss)
        library.step()
    assert_equal(ours.weights(), {name: parameter.detach() for name, parameter in theirs.items()})
    library.eval()
    assert_equal(ours.delivered(), {name: parameter.detach() for name, parameter in theirs.items()})


def test_muon_takes_the_matrices_and_adamw_the_rest():
    optimizer = MasterOptimizer(make_parameters(), config_of("muon", learning_rate=1e-2, weight_decay=0.02))
    theirs = make_parameters()
    muon = torch.optim.Muon(
        [theirs["blocks.0.weight"], theirs["blocks.1.weight"]], lr=1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([theirs["blocks.1.bias"]], lr=1e-2, weight_decay=0.02, fused=True)
    for step in range(3):
        loss = backward(optimizer, step)
        for parameter, gradient in zip(theirs.values(), optimizer.gradients(), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step(1.0, None, loss)
        muon.step()
        adamw.step()
    assert_equal(optimizer.weights(), {name: parameter.detach() for name, parameter in theirs.items()})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_groups_have_their_own_rate_and_decay_and_the_first_match_counts(name):
    takes_decay = {"match": "blocks.1", "learning_rate": 0.03, "weight_decay": 0.2}
    grouped = MasterOptimizer(
        make_parameters(), config_of(name, groups=[takes_decay, {"match": "bias", "weight_decay": 0.0}][:1])
    )
    first = MasterOptimizer(make_parameters(), config_of(name, groups=[takes_decay, {"match": "weight", "learning_rate": 0.0}]))
    alone = MasterOptimizer(make_parameters(), config_of(name, learning_rate=0.03, weight_decay=0.2))
    rest = MasterOptimizer(make_parameters(), config_of(name))
    for step in range(3):
        for optimizer in (grouped, first, alone, rest):
            # unclipped: then a parameter's update hangs on its own gradient alone
            optimizer.step(1.0, None, backward(optimizer, step))
    for inside in ("blocks.1.weight", "blocks.1.bias"):
        assert torch.equal(grouped.weights()[inside], alone.weights()[inside])
        assert torch.equal(first.weights()[inside], alone.weights()[inside])
        assert not torch.equal(grouped.weights()[inside], rest.weights()[inside])
    assert torch.equal(grouped.weights()["blocks.0.weight"], rest.weights()["blocks.0.weight"])
    assert torch.equal(first.weights()["blocks.0.weight"], make_parameters()["blocks.0.weight"])


def test_a_group_that_matches_nothing_names_some_parameters():
    config = config_of(groups=[{"match": "attn", "learning_rate": 0.1}])
    with pytest.raises(ConfigError, match=r"groups\.0: 'attn' matches no trained parameter\. They are: blocks\.0\.weight, "):
        MasterOptimizer(make_parameters(), config)
    taken = config_of(groups=[{"match": "bias", "learning_rate": 0.1}, {"match": "bias$", "learning_rate": 0.2}])
    with pytest.raises(ConfigError, match=r"groups\.1: 'bias\$' matches no trained parameter that no earlier group has"):
        MasterOptimizer(make_parameters(), taken)


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_every_optimizer_pass_the_check(name, capsys):
    optim.check(config_of(name))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"name": "adamv"}}, r"name: there is no optimizer 'adamv'\. Did you mean `adamw`\? Valid: adamw,"),
        ({"optimizer": {"name": "torch.optim.SDG"}}, r"SDG is not in torch\.optim\. Did you mean `SGD`\?"),
        ({"optimizer": {"name": "torch.nn.Linear"}}, r"torch\.nn\.Linear is no torch\.optim\.Optimizer"),
        ({"optimizer": {"name": "no_such_package.Adam"}}, r"needs no_such_package, which cannot be imported .* install"),
        ({"optimizer": {"name": "torch.optim.LBFGS"}}, r"needs a closure"),
        ({"optimizer": {"name": "adamw", "weight_decey": 1}}, r"adamw has no .* mean `weight_decay`\? Valid: betas, eps,"),
        pytest.param(
            {"optimizer": {"name": "adamw-8bit", "amsgrad": True}},
            r"optimizer\.amsgrad: torchao has no maximum",
            marks=needs_torchao,
        ),
        ({"optimizer": {"name": "adamw", "lr": 0.1}}, r"optimizer\.lr: the learning rate is `train\.learning_rate`"),
        ({"optimizer": {"name": "adamw", "maximize": True}}, r"optimizer\.maximize: a loss is minimised"),
        ({"optimizer": {"name": "adamw", "betas": [0.9, 1.5]}}, r"does not accept .*Invalid beta parameter at index 1: 1\.5"),
        ({"optimizer": {"name": "adamw", "betas": [0.9]}}, r"adamw does not accept its settings \(betas \[0\.9\]"),
        ({"optimizer": {"name": "adamw", "eps": "small"}}, r"adamw does not accept its settings \(eps 'small'"),
        ({"optimizer": {"name": "adamw", "fused": True, "foreach": True}}, r"cannot be `True` together"),
        ({"optimizer": {"name": "lion", "betas": [0.9, 7.0]}}, r"lion does not accept .*AssertionError"),
        ({"optimizer": {"name": "adamw", "groups": [{"match": "x"}]}}, r"groups\.0 \(match 'x'\) changes nothing"),
        (
            {"optimizer": {"name": "torch.optim.Rprop", "groups": [{"match": "x", "weight_decay": 0.1}]}},
            r"groups\.0 .*torch\.optim\.Rprop has no weight_decay",
        ),
        ({"optimizer": {"name": "prodigy"}}, r"learning_rate: prodigy finds .* Set `learning_rate: 1`"),
        (
            {"optimizer": {"name": "prodigy", "groups": [{"match": "x", "learning_rate": 0.5}]}, "learning_rate": 1.0},
            r"prodigy has one learning rate for all \(1\), or 0; found 0\.5",
        ),
        ({"optimizer": {"name": "schedule-free"}, "schedule": "cosine"}, r"train\.schedule: schedule-free .* found 'cosine'"),
        ({"optimizer": {"name": "schedule-free"}, "ema_decay": 0.9}, r"ema_decay: schedule-free averages the weights itself"),
        ({"optimizer": {"name": "schedule-free", "warmup_steps": 9}}, r"the warm-up is `train\.schedule\.warmup`"),
        (
            {"optimizer": {"name": "schedulefree.RAdamScheduleFree"}, "schedule": {"name": "constant", "warmup": 3}},
            r"RAdamScheduleFree has no warm-up",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_there_are_parameters(config, message):
    with pytest.raises(ConfigError, match=message):
        optim.check(TrainConfig(**config))


def test_a_class_that_does_not_take_these_parameters_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match=r"torch\.optim\.Muon does not accept .*only supports 2D"):
        MasterOptimizer(make_parameters(), config_of("torch.optim.Muon"))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("adamw-8bit", "torchao.optim", "int8"),
        ("lion", "lion_pytorch", "optimizers"),
        ("prodigy", "prodigyopt", "optimizers"),
        ("schedule-free", "schedulefree", "optimizers"),
    ],
)
def test_a_missing_extra_names_its_pip_command(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{name} needs {module}, .* pip install 'ftk\[{extra}\]'"):
        optim.check(config_of(name))


def test_a_rate_that_does_not_suit_and_a_warm_up_without_end_are_said(caplog):
    config = TrainConfig(optimizer="adafactor", steps=5, schedule={"name": "constant", "warmup": 9})
    optim.check(config)
    optim.check_length(config)
    assert "with adafactor 0.01 is customary" in caplog.text
    assert "warmup 9: the run ends before, after 5 steps" in caplog.text
    caplog.clear()
    optim.check(TrainConfig(optimizer="adafactor", learning_rate=1e-3))
    optim.check(TrainConfig())
    assert caplog.text == ""


def test_lists_of_a_run_file_become_tuples():
    optimizer = MasterOptimizer(make_parameters(), config_of("adafactor", eps=[None, 1e-2]))
    assert optimizer._optimizers[0].param_groups[0]["eps"] == (None, 1e-2)


@needs_torchao
def test_a_checkpoint_of_other_parameters_or_another_optimizer_is_refused():
    config = config_of("adamw-8bit", ema_decay=0.9)
    begun = MasterOptimizer(make_parameters(), config)
    train(begun, 1)
    weights, tensors, facts = through_a_file(begun)

    def restore(weights=weights, tensors=tensors, facts=facts, config=config):
        MasterOptimizer(make_parameters(), config).restore(weights, tensors, facts)

    restore()
    with pytest.raises(CheckpointError, match=r"1 differ, the first is blocks\.1\.bias, with shape \(1,\) .* \(7,\) here"):
        restore(weights={**weights, "blocks.1.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"moving average .* blocks\.1\.bias, with shape none"):
        restore(tensors={name: tensor for name, tensor in tensors.items() if name != "blocks.1.bias/ema"})
    with pytest.raises(CheckpointError, match=r"'other/exp_avg' is of no parameter"):
        restore(tensors={**tensors, "other/exp_avg": torch.zeros(1)})


@pytest.mark.parametrize(
    "changed", [{"name": "lion"}, {"name": "adamw", "groups": [{"match": "bias", "weight_decay": 0.0}]}], ids=["name", "groups"]
)
def test_another_optimizer_begins_anew_at_the_weights_and_says_so(changed, caplog):
    begun = MasterOptimizer(make_parameters(), config_of())
    train(begun, 3)
    resumed = MasterOptimizer(make_parameters(seed=9), config_of(ema_decay=0.9, **changed))
    resumed.restore(*through_a_file(begun))
    assert "another optimizer (adamw): moments start anew" in caplog.text
    assert "no moving average: it starts at the checkpoint's weights" in caplog.text
    assert_equal(resumed.weights(), begun.weights())
    assert_equal(resumed.delivered(), begun.weights())
    train(resumed, 1)
    assert not torch.equal(resumed.weights()["blocks.1.bias"], begun.weights()["blocks.1.bias"])


def test_a_changed_setting_is_the_run_files_not_the_checkpoints():
    begun = MasterOptimizer(make_parameters(), config_of(weight_decay=0.5))
    train(begun, 2)
    resumed = MasterOptimizer(make_parameters(), config_of(weight_decay=0.0, learning_rate=0.01))
    resumed.restore(*through_a_file(begun))
    (group,) = resumed._optimizers[0].param_groups
    assert (group["weight_decay"], group["initial_lr"]) == (0.0, 0.01)


TORCH_OPTIMIZERS = [
    f"torch.optim.{name}"
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD")
]


@pytest.mark.parametrize("name", [*elementwise(), *TORCH_OPTIMIZERS])
def test_optimizers_that_may_be_split_treat_a_part_as_they_do_within_the_whole(name):
    config = config_of(name, learning_rate=0.01)
    assert splits(config)
    value, gradients = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(4)]
    updated = []
    for cuts in ([6], [4, 2], [1, 0, 5]):
        parts = {str(number): torch.nn.Parameter(part.clone()) for number, part in enumerate(value.split(cuts))}
        optimizer = MasterOptimizer(parts, config)
        for gradient in gradients:
            for parameter, part in zip(parts.values(), gradient.split(cuts), strict=True):
                parameter.grad = part.clone()
            optimizer.step(1.0, None, torch.zeros(()))
        updated.append(torch.cat(list(optimizer.delivered().values())))
    for other in updated[1:]:
        torch.testing.assert_close(other, updated[0], rtol=1e-6, atol=1e-7)
    assert not torch.equal(updated[0], value)


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor", "prodigy", "muon", "torch.optim.Muon", "some.package.Optimizer"])
def test_optimizers_that_look_at_whole_tensors_may_not_be_split(name):
    config = config_of(name, learning_rate=0.01)
    assert not splits(config)


@pytest.mark.parametrize(("rate", "is_far"), [(2e-4, True), (0.1, True), (0.2, False), (1.0, False), (5.0, False), (6.0, True)])
def test_a_rate_far_from_that_of_an_optimizer_which_finds_its_own_is_warned_of(rate, is_far):
    hint = optimizers.hint(TrainConfig(optimizer="prodigy", learning_rate=rate))
    assert (hint is not None and f"is {rate:g}, and prodigy, which finds its step size itself" in hint) == is_far
    assert optimizers.hint(TrainConfig(optimizer="adamw", learning_rate=rate)) is None


@pytest.mark.parametrize("method", [{"name": "lora", "lora_plus": 4.0}, {"name": "lora", "text_encoder": {"rate": 0.5}}])
def test_rates_of_a_method_are_refused_before_weights_are_read(method):
    pytest.importorskip("prodigyopt")
    tree = {"run": "test", "model": {"family": "sdxl", "path": "nowhere"}, "data": {"sources": [{"path": "x"}]}}
    train = {"optimizer": "prodigy", "learning_rate": 1.0}
    run = resolve(RunConfig.model_validate({**tree, "method": method, "train": train}))
    with pytest.raises(ConfigError, match=r"prodigy has one rate for all. Leave out .*`text_encoder.rate`"):
        open_inputs(run, torch.device("cpu"))
