"""The optimizer over fp32 masters, their moving average, and the learning rate as a pure function of the step."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ftk.configs.schema import ScheduleConfig, TrainConfig
from ftk.errors import CheckpointError, ConfigError
from ftk.train import optimizers
from ftk.train.loss_scale import LossScale
from ftk.train.optimizer_state import is_plain, names_in, pack, unpack
from ftk.train.ranks import Ranks, Rows, part, rows

LOGGER = logging.getLogger("ftk")
_EMA = "ema"
_AS_GOOD_AS_0 = 1e-6
_NOT_STATE = frozenset({"params", "lr", "initial_lr"})


def check(config: TrainConfig) -> None:
    """Check the optimizer as far as it can be done without the parameters; a doubtful choice is logged.

    Raises:
        ConfigError: an optimizer or setting that `MasterOptimizer` would refuse.
    """
    choice = optimizers.choose(config)
    for group in optimizers.try_out(choice, config).param_groups:
        pack({key: value for key, value in group.items() if key not in _NOT_STATE}, "in its groups", {})
    hint = optimizers.hint(config)
    if hint is not None:
        LOGGER.warning("%s", hint)


def check_length(config: TrainConfig) -> None:
    """Compare the schedule with the number of steps of the run; a doubtful choice is logged.

    Raises:
        ConfigError: the schedule ends before the run does, at a learning rate of 0.
    """
    settings, rate = config.schedule, schedule(config.schedule, config.steps)
    if settings.steps is not None and settings.steps < config.steps and rate(settings.steps) < _AS_GOOD_AS_0:
        raise ConfigError(
            f"train.schedule.steps {settings.steps}: the learning rate is 0 after that, and the run has {config.steps} steps. "
            f"Set train.schedule.minimum to a share of the learning rate to go on with, or leave train.schedule.steps out."
        )
    if settings.num_warmup(config.steps) > config.steps:
        LOGGER.warning("train.schedule.warmup %d: the run ends before, after %d steps", settings.warmup, config.steps)


def schedule(config: ScheduleConfig, run_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate for the update that follows `step` finished ones, as diffusers' `get_scheduler`.

    Above a minimum m it is m + (1 - m) times theirs, once it is warm (as transformers' `cosine_with_min_lr`); after the
    schedule's own steps it stays where it ended. A polynomial ends at 1e-7 of the learning rate.
    """
    from diffusers.optimization import get_scheduler

    num_steps, num_warmup = config.steps or run_steps, config.num_warmup(run_steps)
    scheduler = get_scheduler(
        "constant_with_warmup" if config.name == "constant" else config.name,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        step_rules=config.rules,
        num_warmup_steps=num_warmup,
        num_training_steps=num_steps,
        num_cycles=config.cycles,
        power=config.power,
    )
    (rule,) = scheduler.lr_lambdas

    def factor(step: int) -> float:
        if step < num_warmup or config.name in ("constant", "piecewise_constant"):
            return float(rule(step))
        # A cosine would rise again.
        return config.minimum + (1 - config.minimum) * float(rule(min(step, num_steps)))

    return factor


def notice_of_jump(step: int, before: TrainConfig, now: TrainConfig) -> str | None:
    """What to tell of the learning rate after `step` updates, where a run goes on under another schedule; None if nothing."""
    rates = [
        config.learning_rate * schedule(config.schedule, config.steps)(index)
        for config in (before, now)
        for index in (step - 1, step)
    ]
    if not step or all(math.isclose(old, new, rel_tol=1e-6) for old, new in zip(rates[:2], rates[2:], strict=True)):
        return None
    return (
        f"the learning rate jumps: step {step} had {rates[0]:.3g} and would have {rates[2]:.3g} under the new schedule; step "
        f"{step + 1} would have had {rates[1]:.3g} and now has {rates[3]:.3g}"
    )


class MovingAverage:
    """Exponential moving average in fp32: after n updates `average += (1 - decay_n) (weight - average)`.

    decay_n = min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten (as TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, masters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.weights = {name: master.detach().clone() for name, master in masters.items()}
        self.num_updates = torch.zeros((), device=next(iter(masters.values())).device)
        self._decay = decay

    def update(self, masters: Mapping[str, torch.Tensor], is_bad: torch.Tensor) -> None:
        """Take in the weights, unless `is_bad` (a bool scalar on the device, which is not waited for)."""
        is_good = (~is_bad).float()
        # 1 - decay_n, without the cancellation
        share = (9 / (10 + self.num_updates)).clamp(min=1 - self._decay) * is_good
        with torch.no_grad():
            for name, average in self.weights.items():
                average.lerp_(masters[name], share)
        self.num_updates += is_good


class MasterOptimizer:
    """The configured optimizer on fp32 masters of the trained parameters.

    A bf16 or fp16 parameter gets an fp32 master that accumulates gradients and takes the update, and is rounded back into
    it: bf16 keeps 8 bits, so an update below 1/256 of a weight would vanish. An fp32 parameter is its own master.

    Of a parameter that is split over the processes (`Ranks.shard`) each has its rows, and all that belongs to them.

    With a `loss_scale` gradients are those of the scaled loss until `step`, which divides them.

    Raises:
        ConfigError: see `optimizers.choose` and `optimizers.build`.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        config: TrainConfig,
        ranks: Ranks | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.loss_scale = loss_scale
        self._ranks = ranks or Ranks()
        found = {name: rows(parameter) for name, parameter in parameters.items()}
        self.rows: dict[str, Rows] = {name: one for name, one in found.items() if one is not None}
        """Of each parameter that is split."""
        self._parts = {name: part(parameter) for name, parameter in parameters.items()}
        self.masters: dict[str, torch.Tensor] = {
            name: own if own.dtype == torch.float32 else own.detach().float() for name, own in self._parts.items()
        }
        choice = optimizers.choose(config)
        self._optimizers = optimizers.build(choice, config, self.masters)
        owners = {
            id(master): (made, group) for made in self._optimizers for group in made.param_groups for master in group["params"]
        }
        self._owners = {name: owners[id(master)] for name, master in self.masters.items()}
        self._averages = choice.averages
        if choice.averages:
            self._switch("train")
        self._average = None if config.ema_decay is None else MovingAverage(self.masters, config.ema_decay)
        self._skips_on_device = all(
            type(optimizer) in optimizers.FUSED and optimizer.defaults["fused"] for optimizer in self._optimizers
        )
        sizes = [[len(group["params"]) for group in made.param_groups] for made in self._optimizers]
        self._identity = {"name": choice.name, "groups": sizes}
        self._first_groups = self._group_trees({})

    def accumulate(self) -> None:
        """Add the gradients of the last backward pass to the masters'."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = part(parameter.grad).float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that are to be summed over processes in place; zeros where there were none.

        Those of parameters that are split come summed.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for name, master in self.masters.items() if name not in self.rows]

    def step(self, factor: float, max_grad_norm: float | None, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All: undo the loss scale, clip by the global norm, update, round back, clear the gradients.

        Args:
            factor: on every group's learning rate. Schedule-free optimizers warm up by themselves and do not take it.
            max_grad_norm: the norm above which gradients are scaled down to it; None to leave them.
            loss: scalar on the device.

        Returns:
            The norm before clipping, and whether it or the loss was not finite, so that nothing has changed: fp32 and bool
            scalars on the device. Fused Adam learns of it there; for any other optimizer the device is waited for.
        """
        if self.loss_scale is not None:
            self.gradients()
            self.loss_scale.unscale([master.grad for master in self.masters.values()])
        norm = self._norm()
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), max_grad_norm, norm)
        if self._skips_on_device or not is_bad:
            self._update(1.0 if self._averages else factor, is_bad)
        for master in self.masters.values():
            master.grad = None
        return norm, is_bad

    def _norm(self) -> torch.Tensor:
        """All: the norm of the whole gradient."""
        whole = self.gradients()
        if not self.rows:
            return torch.nn.utils.get_total_norm(whole)
        squared = torch.nn.utils.get_total_norm([self.masters[name].grad for name in self.rows]).square()
        self._ranks.sum([squared])
        return (squared + torch.nn.utils.get_total_norm(whole).to(squared.device).square()).sqrt()

    @property
    def is_split(self) -> bool:
        """Whether no process has all of what is trained."""
        return bool(self.rows)

    def begin_from(self, values: Mapping[str, torch.Tensor]) -> None:
        """Start from other values of the parameters than they had, before the first step."""
        for targets in (self.masters, self._parts, {} if self._average is None else self._average.weights):
            _copy(values, targets)

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by parameter name."""
        return {name: master.detach() for name, master in self.masters.items()}

    def delivered(self) -> dict[str, torch.Tensor]:
        """The fp32 weights that the run is for: the moving average, or what a schedule-free optimizer evaluates with."""
        if self._average is not None:
            return dict(self._average.weights)
        if not self._averages:
            return self.weights()
        trained = {name: master.detach().clone() for name, master in self.masters.items()}
        self._switch("eval")
        evaluated = {name: master.detach().clone() for name, master in self.masters.items()}
        self._switch("train")
        # Its way there and back rounds.
        _copy(trained, self.masters)
        return evaluated

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold `delivered()`; outside again what they held before, to the bit.

        `weights`, `state` and `step` are for outside.
        """
        if self._average is None and not self._averages:
            yield
            return
        before = {
            name: own.detach().clone() if self.masters[name] is own else self.masters[name] for name, own in self._parts.items()
        }
        _copy(self.delivered(), self._parts)
        try:
            yield
        finally:
            _copy(before, self._parts)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that `restore` needs besides the weights, to go on to the bit.

        Returns:
            Tensors as `NAME/STATE` and `NAME/ema`, and JSON values: states that are no plain tensors, and what the optimizer
            has changed in its groups (Prodigy's step size, schedule-free's sums).
        """
        tensors: dict[str, torch.Tensor] = {}
        states: dict[str, dict[str, Any]] = {}
        for name in self.masters:
            optimizer, _ = self._owners[name]
            for kind, value in optimizer.state.get(self.masters[name], {}).items():
                # A state of that name must not pass for our own average.
                key = f"{name}/{kind}" if kind != _EMA else f"{name}/{kind}.own"
                tree = pack(value, key, tensors)
                if not is_plain(value) or kind == _EMA:
                    states.setdefault(name, {})[kind] = tree
        facts: dict[str, Any] = {"optimizer": self._identity, "states": states, "groups": self._changed_groups(tensors)}
        if self._average is not None:
            tensors.update({f"{name}/{_EMA}": weight for name, weight in self._average.weights.items()})
            facts["ema_updates"] = int(self._average.num_updates)
        if self.loss_scale is not None:
            facts["loss_scale"] = self.loss_scale.facts()
        return tensors, facts

    def restore(
        self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Inverse of `weights` and `state`, in an optimizer that has made no step.

        What another optimizer kept is left out, with a warning: whether that is wanted was asked where settings are compared.

        Raises:
            CheckpointError: they are not of these parameters, or not whole.
        """
        _refuse_others(weights, self.masters, "trained weights")
        _copy(weights, self.masters)
        _copy(self.masters, self._parts)
        self._restore_average(tensors, facts)
        if self.loss_scale is not None and "loss_scale" in facts:
            self.loss_scale.restore(facts["loss_scale"])
        if facts["optimizer"] != self._identity:
            LOGGER.warning("the checkpoint is of another optimizer (%s): moments start anew", facts["optimizer"]["name"])
            return
        named = names_in(facts["states"]) | names_in(facts["groups"])
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("/")
            if key in named or kind == _EMA:
                continue
            if name not in self.masters:
                raise CheckpointError(f"The checkpoint's optimizer state {key!r} is of no parameter that this run trains.")
            self._owners[name][0].state[self.masters[name]][kind] = self._placed(name, kind, tensor)
        for name, kinds in facts["states"].items():
            master = self.masters[name]
            trees = {kind: unpack(tree, tensors, _copier(master.device)) for kind, tree in kinds.items()}
            self._owners[name][0].state[master].update(trees)
        self._restore_groups(tensors, facts["groups"])

    def _update(self, factor: float, is_bad: torch.Tensor) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                _set_rate(group, group["initial_lr"] * factor)
            if self._skips_on_device:
                optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
            with _without_compiler(optimizer):
                optimizer.step()
        _copy(self.masters, self._parts)
        if self._average is not None:
            self._average.update(self.masters, is_bad)

    def _switch(self, mode: str) -> None:
        for optimizer in self._optimizers:
            getattr(optimizer, mode)()

    def _placed(self, name: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy where the optimizer keeps it: its step count on the CPU unless a kernel reads it, as torch has it."""
        _, group = self._owners[name]
        on_host = kind == "step" and not (group.get("fused") or group.get("capturable"))
        return tensor.to("cpu" if on_host else self.masters[name].device, copy=True)

    def _group_trees(self, tensors: dict[str, torch.Tensor]) -> list[list[dict[str, Any]]]:
        return [
            [
                {
                    key: pack(value, f"groups/{first}.{second}.{key}", tensors)
                    for key, value in group.items()
                    if key not in _NOT_STATE
                }
                for second, group in enumerate(optimizer.param_groups)
            ]
            for first, optimizer in enumerate(self._optimizers)
        ]

    def _changed_groups(self, tensors: dict[str, torch.Tensor]) -> list[list[dict[str, Any]]]:
        """What the optimizer wrote into its groups; what the run file says stays the run file's."""
        return [
            [
                {key: tree for key, tree in now.items() if names_in(tree) or key not in before or tree != before[key]}
                for before, now in zip(*pair, strict=True)
            ]
            for pair in zip(self._first_groups, self._group_trees(tensors), strict=True)
        ]

    def _restore_groups(self, tensors: Mapping[str, torch.Tensor], saved: list[list[dict[str, Any]]]) -> None:
        for groups, optimizer in zip(saved, self._optimizers, strict=True):
            for trees, group in zip(groups, optimizer.param_groups, strict=True):
                place = _copier(group["params"][0].device)
                group.update({key: unpack(tree, tensors, place) for key, tree in trees.items()})

    def _restore_average(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        if self._average is None:
            return
        if "ema_updates" not in facts:
            LOGGER.warning("the checkpoint has no moving average: it starts at the checkpoint's weights")
            _copy(self.masters, self._average.weights)
            return
        saved = {key.removesuffix(f"/{_EMA}"): tensor for key, tensor in tensors.items() if key.endswith(f"/{_EMA}")}
        _refuse_others(saved, self._average.weights, "moving average")
        _copy(saved, self._average.weights)
        self._average.num_updates.fill_(facts["ema_updates"])


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        # torchao compiles with the rate as a tensor, and refuses another one.
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _without_compiler(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[Any]:
    """torchao compiles its update; on a CPU that takes a C++ compiler and seconds, and gains nothing."""
    is_compiled = type(optimizer).__module__.startswith("torchao.")
    if is_compiled and optimizer.param_groups[0]["params"][0].device.type == "cpu":
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def _copier(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, copy=True)

    return copied


def _copy(sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    """Write values by name, rounding to the targets' precision; a tensor that is its own source is left."""
    pairs = [(target, sources[name]) for name, target in targets.items() if sources[name] is not target]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _refuse_others(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: str) -> None:
    shapes, own = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (found, wanted))
    wrong = sorted(name for name in {*shapes, *own} if shapes.get(name) != own.get(name))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"The checkpoint's {what} are not those of this run: {len(wrong)} differ, the first is {first}, with shape "
            f"{shapes.get(first, 'none')} in the checkpoint and {own.get(first, 'none')} here. Other parameters are trained, "
            "so this run cannot go on from it: give the run another name, or start over with --fresh."
        )
