"""Modules of the denoiser that are trained whole beside an adapter: PEFT's `modules_to_save`.

PEFT trains a copy of such a module in a wrapper. Here the module itself is thawed, so that families, pipelines, quantisation
and FSDP meet the model that they know; files are the same as PEFT's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from ftk.errors import ConfigError, did_you_mean
from ftk.methods.adapters import injection, targets
from ftk.methods.adapters.narrowing import ends_with, places
from ftk.methods.adapters.targets import TargetPattern, TrainedComponent
from ftk.models.base import AdapterNames

if TYPE_CHECKING:
    import torch

SETTING = "method.modules_to_save"
FORMATS = ("peft", "comfyui")
"""The delivery formats that can hold whole modules."""
REASON = (
    "its readers have no place for the whole modules of `modules_to_save`. Write peft, which PEFT loads into the denoiser, or "
    "merge the run into the base weights."
)
"""Why another format cannot be written."""
_COMFYUI = {"weight": "diff", "bias": "diff_b"}
_NO_FORWARD = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
_LISTED = 3


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else targets.one_of_three(value)


ModulesToSave = Annotated[tuple[str, ...] | TargetPattern, BeforeValidator(_as_tuple)]
HELP = "modules of the denoiser that are trained whole beside the adapter: names, ends of names, or {regex: ...}"


def select(component: TrainedComponent, wanted: "tuple[str, ...] | TargetPattern") -> list[str]:
    """Names of the modules that the setting means, in the model's order, the outermost alone.

    Raises:
        ConfigError: an entry that names nothing, or a module that has no parameters or no forward pass of its own.
    """
    modules = {name: module for name, module in component.module.named_modules() if name}
    matched: set[str] = set()
    for entry in [wanted.regex] if isinstance(wanted, TargetPattern) else wanted:
        matched |= _matched(component, modules, entry, is_pattern=isinstance(wanted, TargetPattern))
    names = [name for name in modules if name in matched and not matched.intersection(places(name)[:-1])]
    for name in names:
        if type(modules[name]).__name__ in _NO_FORWARD:
            raise ConfigError(f"{SETTING}: {name} is a list of modules. Name the modules in it, such as {name}.0.")
    return names


def entries(component: TrainedComponent, wanted: Any, names: Sequence[str], targeted: Sequence[str]) -> list[str]:
    """The modules as PEFT's `modules_to_save`: what was written, or whole names.

    Args:
        names: what `select` returned.
        targeted: the layers that carry the adapter.

    Raises:
        ConfigError: a module is targeted too, or PEFT, which compares ends of names, would take other modules for them.
    """
    overlap = [layer for layer in targeted if set(places(layer)) & set(names)]
    if overlap:
        listed = ", ".join(overlap[:_LISTED]) + (", ..." if overlap[_LISTED:] else "")
        raise ConfigError(
            f"{SETTING}: {listed} would be trained whole, and {component.setting} gives it an adapter too. Leave it out of one "
            f"of them: method.exclude takes the same names."
        )
    written = [list(wanted)] if not isinstance(wanted, TargetPattern) else []
    for candidate in (*written, list(names)):
        read = set(injection.modules_of_entries(component.module, candidate))
        excludes = re.compile("|".join(rf"(^|.*\.){entry}($|\..*)" for entry in candidate))
        if read == set(names) and not any(excludes.match(layer) for layer in targeted):
            return candidate
    ambiguous = sorted(set(injection.modules_of_entries(component.module, names)) - set(names)) or ["another module"]
    raise ConfigError(
        f"{SETTING}: PEFT reads the ends of names, and would take {', '.join(ambiguous[:_LISTED])} for one of {len(names)} "
        f"modules such as {names[0]}. Name all of them, or none."
    )


def thaw(
    component: TrainedComponent, names: Sequence[str], setting: str = SETTING, *, biases: bool = True
) -> "dict[str, torch.nn.Parameter]":
    """Let these modules be trained; returns their parameters by name.

    Args:
        setting: what messages call the place where they were asked for.
        biases: whether their biases are trained too.

    Raises:
        ConfigError: their weights are 8-bit.
    """
    parameters: dict[str, torch.nn.Parameter] = {}
    for name in names:
        module = component.module.get_submodule(name)
        injection.refuse_quantised((layer for layer in module.modules() if targets.is_layer(layer)), setting)
        own = {key: each for key, each in module.named_parameters() if biases or key != "bias"}
        # On the host: only an export to ComfyUI reads them.
        module.initial_values = {key: each.detach().to("cpu", copy=True) for key, each in own.items() if not each.is_meta}
        parameters |= {f"{name}.{key}": each.requires_grad_(True) for key, each in own.items()}
    return parameters


def thawed(model: Any) -> list[str]:
    """Names of the modules that `thaw` has thawed, whatever wrappers (FSDP) have made of the blocks around them."""
    return [name for name, module in model.named_modules() if hasattr(module, "initial_values")]


def differences(model: Any, modules: Sequence[str], names: AdapterNames) -> "dict[str, torch.Tensor]":
    """What training has added to the parameters of thawed modules, fp32, as ComfyUI reads it: `LAYER.diff` and `LAYER.diff_b`.

    Source: ComfyUI, `load_lora` in `comfy/lora.py`, which finds a bias by the weight beside it.

    Raises:
        ConfigError: a parameter is neither a weight nor a bias.
    """
    named: dict[str, torch.Tensor] = {}
    for module_name in modules:
        module = model.get_submodule(module_name)
        for key, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, _, kind = f"{module_name}.{key}".rpartition(".")
            if kind not in _COMFYUI or not hasattr(model.get_submodule(layer), "weight"):
                raise ConfigError(
                    f"{module_name}.{key} cannot be written as comfyui: ComfyUI reads changes of weights, and of the biases "
                    f"beside them. Write peft."
                )
            trained = parameter.detach().float().cpu()
            named[f"{names.module(layer)}.{_COMFYUI[kind]}"] = trained - module.initial_values[key].float()
    return named


def _matched(component: TrainedComponent, modules: Mapping[str, Any], entry: str, *, is_pattern: bool) -> set[str]:
    """The modules with parameters that an entry names."""
    matched = [name for name in modules if (re.fullmatch(entry, name) if is_pattern else ends_with(name, entry))]
    if not matched:
        owner = component.owner
        if is_pattern:
            raise ConfigError(f"{SETTING}: the expression {entry!r} matches the whole name of no module of {owner}.")
        ends = {".".join(name.split(".")[-count:]) for name in modules for count in (1, 2)}
        near = did_you_mean(entry, sorted(end for end in ends if not end.split(".")[0].isdecimal()))
        if any(ends_with(name, entry) for name, _ in component.module.named_parameters()):
            near = " It is the name of a parameter: name the module that it lies in."
        raise ConfigError(f"{SETTING}: {entry!r} is the name of no module of {owner}, nor the end of one.{near}")
    with_parameters = {name for name in matched if next(modules[name].parameters(), None) is not None}
    if not with_parameters:
        raise ConfigError(f"{SETTING}: {matched[0]} has no parameters, so nothing of it can be trained. Leave it out.")
    return with_parameters
