"""Which layers of a model a method's targets mean, and whether it can carry them."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.methods.base import EVERYTHING, TargetPattern, TrainedComponent, target_modules

if TYPE_CHECKING:
    import torch


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


def select(part: TrainedComponent, refusal: Callable[["torch.nn.Module"], str | None]) -> list[str]:
    """Names of the layers that the part's targets mean, in the model's order.

    A pattern passes over containers and norms, which hold no layer's weights; `all` also over what cannot be carried.

    Raises:
        ConfigError: a target that names nothing (those near are listed), or a layer that the method cannot carry.
    """
    modules = {name: module for name, module in part.module.named_modules() if name}
    wanted = target_modules(part)
    if isinstance(wanted, TargetPattern):
        found = [name for name, module in modules.items() if is_layer(module) and re.fullmatch(wanted.regex, name)]
        if part.targets == EVERYTHING:
            found = [name for name in found if refusal(modules[name]) is None]
        if not found:
            raise ConfigError(
                f"{part.setting}: the expression {wanted.regex!r} matches no layer of {part.owner}. {_some(modules)}"
            )
    else:
        found = _with_suffixes(part, modules, wanted)
    for name in found:
        reason = refusal(modules[name])
        if reason is not None:
            raise ConfigError(
                f"{part.setting}: {name} cannot be trained by this method: {reason}. Leave it out of the targets."
            )
    return found


def is_layer(module: "torch.nn.Module") -> bool:
    """Whether a module holds a weight of two dimensions or more itself; an 8-bit linear layer does."""
    import torch

    weight = None if isinstance(module, torch.nn.Linear) else dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(module, torch.nn.Linear) or (weight is not None and weight.ndim > 1)


def _with_suffixes(part: TrainedComponent, modules: Mapping[str, Any], suffixes: Sequence[str]) -> list[str]:
    found: set[str] = set()
    layers = [name for name, module in modules.items() if is_layer(module)]
    for suffix in suffixes:
        matched = [name for name in modules if ("." + name).endswith("." + suffix)]
        # A name that several kinds of module share must not be trained here and passed over there.
        if not any(is_layer(modules[name]) for name in matched):
            near = _near(suffix, layers)
            raise ConfigError(
                f"{part.setting}: {suffix!r} is the name of no linear layer or convolution of {part.owner}.{near}"
            )
        found.update(matched)
    return [name for name in modules if name in found]


def _near(suffix: str, layers: Sequence[str]) -> str:
    ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2)}
    ends -= {end for end in ends if end.split(".")[0].isdecimal()}
    close = difflib.get_close_matches(suffix, sorted(ends), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Some of its layers: {', '.join(sorted(ends)[:8])}."


def _some(modules: Mapping[str, Any]) -> str:
    layers = [name for name, module in modules.items() if is_layer(module)]
    return f"It must match whole names, such as {re.escape(layers[len(layers) // 2])}"


def as_peft_targets(part: TrainedComponent, names: Sequence[str]) -> list[str] | str:
    """`names` as PEFT's `target_modules`: the suffixes that they came from, or an expression that matches them alone."""
    wanted = target_modules(part)
    if not isinstance(wanted, TargetPattern):
        return wanted
    # Blocks differ in their number alone: without it a few dozen names remain.
    short = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    everything = [name for name, _ in part.module.named_modules() if name]
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
            raise ConfigError(f"method.{setting}: {key!r} is no regular expression: {error}") from None
        if not matching({key: None}, names):
            near = _near(key, names)
            raise ConfigError(f"method.{setting}: {key!r} is the end of no targeted layer's name.{near}")


def matching(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those patterns that match one of a component's targets: PEFT warns of the others."""
    return {key: value for key, value in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names)}
