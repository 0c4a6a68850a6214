"""Which layers of a model a method's targets mean, and whether it can carry them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ftk.configs.schema import RegularExpression
from ftk.errors import ConfigError, did_you_mean
from ftk.methods.adapters import narrowing
from ftk.methods.base import prefix
from ftk.models.base import DENOISER, Family, TargetGroup, TrainsEncoders

if TYPE_CHECKING:
    import torch

_NARROWER = ("exclude", "layers", "layers_pattern")
EVERYTHING = "all"
"""As `targets`: every layer that the method can carry."""


class TargetPattern(BaseModel):
    """`targets: {regex: ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    regex: RegularExpression = Field(description="must match the whole name of a module, from the denoiser's root")


def one_of_three(value: Any) -> Any:
    """Validate what names layers: a word, a list of names, or a pattern."""
    # A union would complain once for each of its members.
    is_list = isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value)
    is_pattern = isinstance(value, TargetPattern) or (isinstance(value, Mapping) and set(value) == {"regex"})
    if not (is_list or is_pattern or (isinstance(value, str) and value)):
        raise ValueError("a group of the family, `all`, a list of module names, or {regex: EXPRESSION}")
    return TargetPattern.model_validate(value) if isinstance(value, Mapping) else value


Targets = Annotated[str | tuple[str, ...] | TargetPattern, BeforeValidator(one_of_three)]


def _list_or_pattern(value: Any) -> Any:
    return (value,) if isinstance(value, str) else one_of_three(value)


Excluded = Annotated[tuple[str, ...] | TargetPattern, BeforeValidator(_list_or_pattern)]
EXCLUDED_HELP = "targets that are not trained after all: names or ends of names, also of modules around them, or {regex: ...}"


class TextEncoderConfig(BaseModel):
    """Settings under `method.text_encoder`: train the model's text encoders too, by the same method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    exclude: Excluded | None = Field(default=None, description=EXCLUDED_HELP)
    rate: float = Field(default=1.0, gt=0, description="their learning rate is so many times train.learning_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedComponent:
    """A component that is trained, the denoiser or a text encoder, and what the settings choose of it."""

    name: str
    module: Any
    owner: str
    """What messages call it."""
    groups: Mapping[str, TargetGroup]
    block_classes: tuple[str, ...]
    targets: Targets
    setting: str
    """Where `targets` stands in the run file."""
    exclude: "tuple[str, ...] | TargetPattern | None" = None
    layers: tuple[int, ...] | None = None
    layers_pattern: str | None = None

    @property
    def is_denoiser(self) -> bool:
        """Whether it is no text encoder."""
        return self.name == DENOISER

    @property
    def prefix(self) -> str:
        """What stands before the names of its parameters and tensors."""
        return prefix(self.name)


def trained_components(family: Family, modules: Mapping[str, Any], settings: Any) -> list[TrainedComponent]:
    """What is trained of the denoiser and the text encoders, by `settings.targets` and `settings.text_encoder.targets`.

    Args:
        modules: by name, the denoiser first; None in place of a module where names alone are to be checked.
    """
    components = []
    for name, module in modules.items():
        if name == DENOISER:
            narrower: dict[str, Any] = {key: getattr(settings, key, None) for key in _NARROWER}
            components.append(replace(denoiser_component(family, module, settings.targets, "method.targets"), **narrower))
            continue
        assert isinstance(family, TrainsEncoders)
        components.append(
            TrainedComponent(
                name=name,
                module=module,
                owner=f"{family.name}'s {name}",
                groups=family.encoder_targets,
                block_classes=(),
                targets=settings.text_encoder.targets,
                setting="method.text_encoder.targets",
                exclude=settings.text_encoder.exclude,
            )
        )
    return components


def denoiser_component(family: Family, module: Any, targets: Targets, setting: str) -> TrainedComponent:
    """The denoiser and what is chosen of it; `setting` is what messages call the place of the choice."""
    return TrainedComponent(
        name=DENOISER,
        module=module,
        owner=family.name,
        groups=family.target_groups,
        block_classes=family.block_classes,
        targets=targets,
        setting=setting,
    )


def chosen(component: TrainedComponent) -> "TargetGroup | list[str] | TargetPattern":
    """What the targets name: a group of the component, suffixes of module names as they stand, or a pattern.

    Raises:
        ConfigError: there is no group of this name. A string is always a group, so that a typo is found.
    """
    targets = component.targets
    if isinstance(targets, TargetPattern):
        return targets
    if not isinstance(targets, str):
        return list(targets)
    if targets == EVERYTHING:
        return TargetPattern(regex=".*")
    if targets not in component.groups:
        meant = did_you_mean(targets, [*component.groups, EVERYTHING])
        example = ", ".join(component.groups["attention"].suffixes[:2])
        raise ConfigError(
            f"{component.setting}: {component.owner} has no group {targets!r}.{meant} Valid: {', '.join(component.groups)}, "
            f"{EVERYTHING}, a list of module names such as [{example}], or {{regex: EXPRESSION}}."
        )
    return component.groups[targets]


def check_group(family: Family, encoders: Sequence[str], settings: Any) -> None:
    """Refuse a misspelt group before any model is loaded. A method without `targets` has nothing to check.

    Raises:
        ConfigError: see `chosen`.
    """
    if not hasattr(settings, "targets"):
        return
    # Encoders that are in memory for new words have no targets.
    with_targets = encoders if getattr(settings, "text_encoder", None) is not None else ()
    for component in trained_components(family, dict.fromkeys((DENOISER, *with_targets)), settings):
        chosen(component)


def linear_or_convolution(layer: "torch.nn.Module") -> str | None:
    """Why no method that carries linear layers and convolutions can carry this one; None if it can."""
    import torch

    if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
        return None
    return f"it is a {type(layer).__name__}, no linear layer or convolution"


def linear_or_pointwise(layer: "torch.nn.Module") -> str | None:
    """The same of methods that rotate the input's channels, which a larger kernel does not see one by one."""
    import torch

    if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1):
        sides = "x".join(map(str, layer.kernel_size))
        return f"it is a {sides} convolution, whose rotated and merged weights would differ; linear layers and 1x1 ones work"
    return linear_or_convolution(layer)


def select(component: TrainedComponent, refusal: Callable[["torch.nn.Module"], str | None]) -> list[str]:
    """Names of the layers that the component's targets mean, in the model's order, without those that are excluded.

    A pattern passes over containers and norms, which hold no layer's weights; `all` also over what cannot be carried.

    Raises:
        ConfigError: a target that names nothing (those near are listed), or a layer that the method cannot carry.
    """
    modules = {name: module for name, module in component.module.named_modules() if name}
    names = narrowed(component, _named(component, modules, refusal))
    for name in names:
        reason = refusal(modules[name])
        if reason is not None:
            raise ConfigError(
                f"{component.setting}: {name} cannot be trained by this method: {reason}. Leave it out of the targets."
            )
    return names


def narrowed(component: TrainedComponent, names: list[str]) -> list[str]:
    """The names that `layers` and `exclude` leave.

    Raises:
        ConfigError: a block or a layer that is not among them.
    """
    if component.layers is not None:
        names = narrowing.in_blocks(component, names, component.layers, component.layers_pattern)
    return names if component.exclude is None else narrowing.without_excluded(component, names, component.exclude)


def _named(
    component: TrainedComponent, modules: Mapping[str, Any], refusal: Callable[["torch.nn.Module"], str | None]
) -> list[str]:
    wanted = chosen(component)
    if isinstance(wanted, TargetGroup):
        names = names_in_group(component, wanted)
        if not names:
            raise ConfigError(f"{component.setting}: this {component.owner} has no layer of the group {component.targets!r}.")
        return names
    if isinstance(wanted, TargetPattern):
        names = [name for name, module in modules.items() if is_layer(module) and re.fullmatch(wanted.regex, name)]
        if component.targets == EVERYTHING:
            names = [name for name in names if refusal(modules[name]) is None]
        if not names:
            raise ConfigError(
                f"{component.setting}: the expression {wanted.regex!r} matches no layer of {component.owner}. {_some(modules)}"
            )
        return names
    return _with_suffixes(component, modules, wanted)


def is_layer(module: "torch.nn.Module") -> bool:
    """Whether a module holds a weight of two dimensions or more itself; an 8-bit linear layer does."""
    import torch

    weight = None if isinstance(module, torch.nn.Linear) else dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(module, torch.nn.Linear) or (weight is not None and weight.ndim > 1)


def names_in_group(component: TrainedComponent, group: TargetGroup) -> list[str]:
    """Names of the modules that a group means, in the model's order; those that this model lacks are left out.

    A suffix counts within the blocks that it is given for, and one of `outside` in no block of the model at all.
    """
    # What lies in a block has the suffixes of that block, however deep: blocks do not nest. None: in no block.
    suffixes_around: dict[str, Sequence[str] | None] = {"": None}
    names = []
    for name, module in component.module.named_modules():
        if not name:
            continue
        container = name.rpartition(".")[0]
        around = suffixes_around[container]
        if any(f".{name}".endswith(f".{suffix}") for suffix in (group.outside if around is None else around)):
            names.append(name)
        suffixes_around[name] = _of_block(component, group, container, module) if around is None else around
    return names


def _of_block(component: TrainedComponent, group: TargetGroup, container: str, module: Any) -> Sequence[str] | None:
    """The group's suffixes within a module if that is a block, none for a block that the group does not name."""
    kind = type(module).__name__
    for key in (kind, container):
        if key in group.in_blocks:
            return group.in_blocks[key]
    return () if kind in component.block_classes else None


def _with_suffixes(component: TrainedComponent, modules: Mapping[str, Any], suffixes: Sequence[str]) -> list[str]:
    found: set[str] = set()
    layers = [name for name, module in modules.items() if is_layer(module)]
    for suffix in suffixes:
        matched = [name for name in modules if ("." + name).endswith("." + suffix)]
        # A name that several kinds of module share must not be trained here and passed over there.
        if not any(is_layer(modules[name]) for name in matched):
            near = _near(suffix, layers)
            raise ConfigError(
                f"{component.setting}: {suffix!r} is the name of no linear layer or convolution of {component.owner}.{near}"
            )
        found.update(matched)
    return [name for name in modules if name in found]


def _near(suffix: str, layers: Sequence[str]) -> str:
    ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2)}
    ends -= {end for end in ends if end.split(".")[0].isdecimal()}
    return did_you_mean(suffix, sorted(ends)) or f" Some of its layers: {', '.join(sorted(ends)[:8])}."


def _some(modules: Mapping[str, Any]) -> str:
    layers = [name for name, module in modules.items() if is_layer(module)]
    return f"It must match whole names, such as {re.escape(layers[len(layers) // 2])}"


def as_peft_targets(component: TrainedComponent, names: Sequence[str]) -> list[str] | str:
    """`names` as PEFT's `target_modules`: the suffixes that they came from, or an expression that matches them alone."""
    wanted = chosen(component)
    if isinstance(wanted, list) and component.exclude is None and component.layers is None:
        return wanted
    everything = [name for name, _ in component.module.named_modules() if name]
    if isinstance(wanted, TargetGroup):
        suffixes = wanted.suffixes
        if [name for name in everything if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)] == list(names):
            return suffixes
    # Blocks differ in their number alone: without it a few dozen names remain.
    short = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    expression = "|".join(short)
    if [name for name in everything if re.fullmatch(expression, name)] == list(names):
        return expression
    return "|".join(map(re.escape, names))


def check_patterns(patterns: Mapping[str, Any], names: Sequence[str], setting: str) -> None:
    """Refuse a key of `rank_pattern` or `alpha_pattern` that matches no target, by PEFT's own rule.

    Raises:
        ConfigError: it is no expression, or matches nothing.
    """
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"method.{setting}: {key!r} is not a regular expression: {error}") from None
        if not matching({key: None}, names):
            near = _near(key, names)
            raise ConfigError(f"method.{setting}: {key!r} is the end of no targeted layer's name.{near}")


def matching(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those patterns that match one of a component's targets: PEFT warns of the others."""
    return {key: value for key, value in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names)}
