"""The optimizers by name: where each class comes from, ftk's own defaults, and what a run file may say of it.

A new optimizer is one entry of `OPTIMIZERS`. A dotted class works without an entry, with the defaults of the class itself.
"""

import contextlib
import importlib
import inspect
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ftk.configs.schema import ParameterGroupConfig, TrainConfig
from ftk.errors import ConfigError, did_you_mean

LOGGER = logging.getLogger("ftk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where an optimizer comes from, and how it differs from the usual one."""

    path: str
    """The dotted class."""
    extra: str | None = None
    """The extra of ftk that installs it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that ftk sets unless the run file does; the rest is as the class has it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Arguments that would fail later or do nothing, and why."""
    customary_rate: float | None = None
    """The learning rate that its authors use, where AdamW's would be far off."""
    finds_rate: bool = False
    """The learning rate is a mere factor on what it finds itself: one for all groups, or 0."""
    matrices_only: bool = False
    """It takes 2-D parameters alone; `adamw` takes the rest."""
    is_elementwise: bool = False
    """Each number's update hangs on that number's own history: a part of a tensor is updated as it is within the whole."""


OPTIMIZERS: Mapping[str, Entry] = {
    # Loshchilov & Hutter 2017, arXiv 1711.05101
    "adamw": Entry(
        path="torch.optim.AdamW", defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}, is_elementwise=True
    ),
    # Dettmers et al. 2021, arXiv 2110.02861
    "adamw-8bit": Entry(
        path="torchao.optim.AdamW8bit",
        extra="int8",
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
        refused={
            "amsgrad": "torchao has no maximum of 8-bit moments",
            "bf16_stochastic_round": "updates go to fp32 masters, so nothing is rounded to bf16",
        },
    ),
    # Shazeer & Stern 2018, arXiv 1804.04235: the rate is relative to a parameter's own size
    "adafactor": Entry(path="torch.optim.Adafactor", customary_rate=1e-2),
    # Chen et al. 2023, arXiv 2302.06675
    "lion": Entry(path="lion_pytorch.Lion", extra="optimizers", is_elementwise=True),
    # Mishchenko & Defazio 2023, arXiv 2306.06101; these two as diffusers' training scripts set them
    "prodigy": Entry(
        path="prodigyopt.Prodigy",
        extra="optimizers",
        defaults={"use_bias_correction": True, "safeguard_warmup": True},
        customary_rate=1.0,
        finds_rate=True,
    ),
    # Defazio et al. 2024, arXiv 2405.15682
    "schedule-free": Entry(path="schedulefree.AdamWScheduleFree", extra="optimizers", is_elementwise=True),
    # Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv 2502.16982, so that AdamW's rate and decay serve for both
    "muon": Entry(
        path="torch.optim.Muon", defaults={"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.01}, matrices_only=True
    ),
}

FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Classes whose fused kernels leave everything as it is, step counts included, where a flag on the device says so."""

_ELEMENTWISE = frozenset(
    f"torch.optim.{name}"
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD")
)
_FAR = 5.0
"""A factor on the customary rate of an optimizer that finds its own; Prodigy's authors keep to 0.5 to 2."""
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_REFUSED = {
    "lr": "the learning rate is `train.learning_rate`",
    "maximize": "a loss is minimised",
    "differentiable": "nothing is differentiated through an update",
}
_REFUSED_IF_AVERAGING = {"warmup_steps": "the warm-up is `train.schedule.warmup`"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a run file asks for, checked as far as it can be without the parameters."""

    name: str
    entry: Entry
    optimizer_class: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]

    @property
    def averages(self) -> bool:
        """It keeps an average of the weights itself, which is what counts at the end (schedule-free)."""
        return averages(self.optimizer_class)


def averages(optimizer_class: type[torch.optim.Optimizer]) -> bool:
    """Whether a class switches between the weights it trains and those it delivers, as schedulefree's do."""
    return all(callable(getattr(optimizer_class, name, None)) for name in ("eval", "train"))


def choose(config: TrainConfig) -> Choice:
    """The class that `optimizer.name` names, and its arguments.

    Raises:
        ConfigError: it cannot be imported, is no optimizer for this loop, or a setting does not fit it.
    """
    name = config.optimizer.name
    entry = _entry(name)
    found = _import_class(name, entry)
    known = _arguments_of(name, found)
    refused = {**_REFUSED, **entry.refused, **(_REFUSED_IF_AVERAGING if averages(found) else {})}
    for setting in config.optimizer.settings:
        if setting in refused:
            raise ConfigError(f"train.optimizer.{setting}: {refused[setting]}. Leave `{setting}` out.")
        if known is not None and setting not in known:
            valid = [argument for argument in known if argument not in refused]
            raise ConfigError(f"train.optimizer.{setting}: {name} has no such setting.{_names(setting, valid)}")
    arguments = {**entry.defaults, **{key: _as_tuples(value) for key, value in config.optimizer.settings.items()}}
    _check_groups(config, entry, takes_decay=known is None or "weight_decay" in known)
    _check_rate(config, entry)
    if averages(found):
        arguments.update(_own_warmup(config, takes_warmup=known is None or "warmup_steps" in known))
    return Choice(name=name, entry=entry, optimizer_class=found, arguments=arguments)


def build(choice: Choice, config: TrainConfig, masters: Mapping[str, torch.Tensor]) -> list[torch.optim.Optimizer]:
    """The optimizers that together update all `masters`; each group keeps its learning rate as `initial_lr`.

    Raises:
        ConfigError: a group matches nothing, or the class refuses its arguments or these parameters.
    """
    groups = _split(masters, config.optimizer.groups)
    if not choice.entry.matrices_only:
        return [_construct(choice, config, _with_settings(groups, config, masters))]
    made = []
    matrices = {name for name, master in masters.items() if master.ndim == 2}
    rest = Choice(
        name="adamw",
        entry=OPTIMIZERS["adamw"],
        optimizer_class=torch.optim.AdamW,
        arguments={**OPTIMIZERS["adamw"].defaults, "weight_decay": choice.arguments["weight_decay"]},
    )
    for part, members in ((choice, matrices), (rest, masters.keys() - matrices)):
        inside = [(group, [name for name in names if name in members]) for group, names in groups]
        if members:
            made.append(_construct(part, config, _with_settings(inside, config, masters)))
    LOGGER.info(
        "optimizer: %s updates %d matrices, adamw the other %d parameters",
        choice.name, len(matrices), len(masters) - len(matrices),
    )  # fmt: skip
    return made


def try_out(choice: Choice, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of one small parameter: what a class refuses on its arguments, it refuses here."""
    master = torch.zeros(2, 2)
    return _construct(choice, config, _with_settings([(None, ["weight"])], config, {"weight": master}))


def hint(config: TrainConfig) -> str | None:
    """What a user should know of a learning rate that was left at its default, or is far from what the optimizer expects."""
    entry = _entry(config.optimizer.name)
    rate = entry.customary_rate
    if rate is None:
        return None
    if entry.finds_rate and not rate / _FAR <= config.learning_rate <= rate * _FAR:
        return (
            f"train.learning_rate is {config.learning_rate:g}, and {config.optimizer.name}, which finds its step size itself, "
            f"multiplies it by that: {rate:g} is customary, and far from it little is learned, or too much"
        )
    if not _is_default_rate(config):
        return None
    return (
        f"train.learning_rate is left at {config.learning_rate:g}, which suits adamw; "
        f"with {config.optimizer.name} {rate:g} is customary"
    )


def finds_rate(config: TrainConfig) -> bool:
    """Whether the learning rate is a mere factor on what the optimizer finds, one for all parameters."""
    return _entry(config.optimizer.name).finds_rate


def splits(config: TrainConfig) -> bool:
    """Whether the optimizer is known to update a part of a tensor as it would within the whole."""
    return _entry(config.optimizer.name).is_elementwise


def elementwise() -> list[str]:
    """The names of those that do."""
    return [name for name, entry in OPTIMIZERS.items() if entry.is_elementwise]


def _entry(name: str) -> Entry:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if not _DOTTED.fullmatch(name):
        raise ConfigError(
            f"train.optimizer.name: there is no optimizer {name!r}.{_names(name, OPTIMIZERS)}, "
            f"or a dotted class such as torch.optim.SGD."
        )
    return Entry(path=name, is_elementwise=name in _ELEMENTWISE)


def _import_class(name: str, entry: Entry) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = entry.path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        remedy = f"pip install 'ftk[{entry.extra}]'" if entry.extra else "install the package that has it, or mend the name"
        raise ConfigError(
            f"train.optimizer.name: {name} needs {module_name}, which cannot be imported ({error}). Do: {remedy}"
        ) from error
    found: Any = getattr(module, class_name, None)
    is_optimizer = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    if not is_optimizer:
        valid = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
        ]
        what = "is no torch.optim.Optimizer" if found is not None else f"is not in {module_name}"
        raise ConfigError(f"train.optimizer.name: {entry.path} {what}.{_names(class_name, valid)}")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"train.optimizer.name: {name} evaluates the loss several times a step (it needs a closure); "
            f"ftk evaluates it once. Choose another optimizer."
        )
    chosen: type[torch.optim.Optimizer] = found
    return chosen


def _arguments_of(name: str, optimizer_class: type[torch.optim.Optimizer]) -> list[str] | None:
    """The names of a class's arguments after the parameters; None if it takes any."""
    _, *parameters = inspect.signature(optimizer_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    if "lr" not in names:
        raise ConfigError(f"train.optimizer.name: {name} has no argument `lr`, so `train.learning_rate` would have no effect.")
    return names


def _check_groups(config: TrainConfig, entry: Entry, *, takes_decay: bool) -> None:
    for number, group in enumerate(config.optimizer.groups):
        where = f"train.optimizer.groups.{number} (match {group.match!r})"
        if group.learning_rate is None and group.weight_decay is None:
            raise ConfigError(f"{where} changes nothing: give it a learning_rate, a weight_decay, or both.")
        if group.weight_decay is not None and not takes_decay:
            raise ConfigError(f"{where}: {config.optimizer.name} has no weight_decay. Leave it out.")
        if entry.finds_rate and group.learning_rate not in (None, 0, config.learning_rate):
            raise ConfigError(
                f"{where}: {config.optimizer.name} has one learning rate for all ({config.learning_rate:g}), or 0; "
                f"found {group.learning_rate:g}."
            )


def _check_rate(config: TrainConfig, entry: Entry) -> None:
    if entry.finds_rate and _is_default_rate(config):
        raise ConfigError(
            f"train.learning_rate: {config.optimizer.name} finds its step size itself and multiplies it by the learning rate, "
            f"so the default {config.learning_rate:g} would all but stop it. Set `learning_rate: {entry.customary_rate:g}`."
        )


def _is_default_rate(config: TrainConfig) -> bool:
    return bool(config.learning_rate == TrainConfig.model_fields["learning_rate"].default)


def _own_warmup(config: TrainConfig, *, takes_warmup: bool) -> dict[str, Any]:
    """The warm-up as the argument of an optimizer that averages: its average must know of it."""
    name, schedule = config.optimizer.name, config.schedule
    if schedule.name != "constant":
        raise ConfigError(
            f"train.schedule: {name} replaces the schedule by an average of the weights; found {schedule.name!r}. "
            f"Set `schedule: constant`; `warmup` may stay."
        )
    if config.ema_decay is not None:
        raise ConfigError(f"train.ema_decay: {name} averages the weights itself. Leave `ema_decay` out.")
    num_warmup = schedule.num_warmup(config.steps)
    if num_warmup and not takes_warmup:
        raise ConfigError(f"train.schedule.warmup: {name} has no warm-up. Leave `warmup` out.")
    return {"warmup_steps": num_warmup} if takes_warmup and num_warmup else {}


def _split(names: Iterable[str], groups: Sequence[ParameterGroupConfig]) -> list[tuple[ParameterGroupConfig | None, list[str]]]:
    """Each group with the names that it is the first to match, then what no group matches."""
    left = list(names)
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    found: list[tuple[ParameterGroupConfig | None, list[str]]] = []
    for number, group in enumerate(groups):
        members = [name for name in left if re.search(group.match, name)]
        if not members:
            earlier = " that no earlier group has" if number else ""
            raise ConfigError(
                f"train.optimizer.groups.{number}: {group.match!r} matches no trained parameter{earlier}. They are: {shown}."
            )
        left = [name for name in left if name not in set(members)]
        found.append((group, members))
    return [*found, (None, left)]


def _with_settings(
    groups: Iterable[tuple[ParameterGroupConfig | None, list[str]]],
    config: TrainConfig,
    masters: Mapping[str, torch.Tensor],
) -> list[dict[str, Any]]:
    """Groups as torch takes them; empty ones are left out."""
    made = []
    for group, names in groups:
        has_rate = group is not None and group.learning_rate is not None
        rate = group.learning_rate if group is not None and has_rate else config.learning_rate
        decay = {} if group is None or group.weight_decay is None else {"weight_decay": group.weight_decay}
        if names:
            made.append({"params": [masters[name] for name in names], "lr": rate, "initial_lr": rate, **decay})
    return made


def _construct(choice: Choice, config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    arguments = dict(choice.arguments)
    if choice.optimizer_class in FUSED and not {"fused", "foreach", "capturable"} & arguments.keys():
        # On a CPU too: 2.6 to 6 times as fast as the loop, with bits that hang neither on threads nor on addresses.
        arguments["fused"] = groups[0]["params"][0].device.type in ("cuda", "cpu")
    try:
        # Prodigy greets on stdout, which belongs to the report.
        with contextlib.redirect_stdout(io.StringIO()):
            return choice.optimizer_class(groups, lr=config.learning_rate, **arguments)
    except (ValueError, TypeError, LookupError, AssertionError, RuntimeError, ImportError) as error:
        shown = ", ".join(f"{key} {value!r}" for key, value in config.optimizer.settings.items())
        raise ConfigError(
            f"train.optimizer: {choice.name} does not accept its settings ({shown or 'none given'}, "
            f"learning_rate {config.learning_rate:g}): {str(error) or type(error).__name__}"
        ) from error


def _as_tuples(value: Any) -> Any:
    """YAML knows lists alone; optimizers want tuples."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _names(given: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    return f"{did_you_mean(given, valid)} Valid: {', '.join(valid) or 'none'}"
