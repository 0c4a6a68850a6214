"""Several adapters in one pipeline, each with a strength of its own: a run's, and files of ftk or of other programs.

PEFT adds up what adapters of several types give a layer, each wrapped around the one before: exactly the sum of their changes
to its weights, as long as they only add to a layer's output (LoRA, LoHa, LoKr). Their strength is PEFT's scaling. Others rotate
or rescale (OFT, DoRA, HRA and the rest): the run's own of such a kind is folded into the weights before others are added.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ftk import locations
from ftk.configs.schema import AddedAdapterConfig
from ftk.errors import ConfigError
from ftk.methods.adapters import adapter_files, injection
from ftk.methods.adapters.adapter_files import AdapterFile
from ftk.methods.adapters.layer_change import TENSORS, LayerChange
from ftk.models.base import DENOISER, Family, TrainsEncoders

OWN = injection.ADAPTER
"""The name under which a method loads its run's adapter."""
ADDING = ("LORA", "LOHA", "LOKR")
"""PEFT's types that add to a layer's output, in proportion to their strength."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedAdapter:
    """An adapter that is to be added to others: where it lies, PEFT's name of its type, and how strong it shall be."""

    path: Path
    kind: str
    setting: str
    strength: float = 1.0


def find(config: AddedAdapterConfig, setting: str, allowed: Sequence[str] = ADDING) -> AddedAdapter:
    """What lies at a path, which can be added to others.

    Raises:
        ConfigError: there is no adapter, or one of a type that is not among the allowed ones.
    """
    path = locations.local_path(config.path)
    kind = adapter_files.kind_of(adapter_files.locate(path, setting))
    if kind not in allowed:
        raise ConfigError(
            f"{setting} {config.path} is of type {kind}, which does not add up with others: only LoRA, LoHa and "
            f"LoKr do. Draw it alone, as `ftk sample` of its own run does."
        )
    return AddedAdapter(path=path, kind=kind, setting=setting, strength=config.strength)


def check_own_strength(strength: float, adapter: Path, method: str, setting: str = "sample.strength") -> None:
    """Refuse another strength than 1 for what has none.

    Raises:
        ConfigError: with the type.
    """
    if strength == 1:
        return
    files = adapter_files.in_folder(adapter)
    if files and adapter_files.whole_entries(files):
        raise ConfigError(
            f"{setting}: {strength:g} has no meaning for {adapter}, which holds whole modules (method.modules_to_save) beside "
            f"its adapter. Leave it out."
        )
    adapter_kind = adapter_files.kind_of(files) if files else None
    if adapter_kind not in ADDING:
        kind = f"{method}, whose weights are the model's own" if adapter_kind is None else f"of type {adapter_kind}"
        raise ConfigError(
            f"{setting}: {strength:g} has no meaning for {adapter}, which is {kind}: only LoRA, LoHa and LoKr have a "
            f"strength. Leave it out."
        )


def read(family: Family, pipeline: Any, added: Sequence[AddedAdapter]) -> list[AdapterFile]:
    """The adapters as changes of the pipeline's layers, before anything is drawn.

    Raises:
        CheckpointError: a file is damaged, or was trained on another base model.
    """
    modules = _components(family, pipeline)
    return [adapter_files.read(each.path, family, modules, each.setting, type(pipeline)) for each in added]


def add(
    family: Family, pipeline: Any, own: Mapping[str, float], added: Sequence[tuple[AdapterFile, float]]
) -> dict[str, float]:
    """Put adapters on top of the run's own, which is loaded, and set all strengths; returns them by name.

    Args:
        own: the strengths of what is loaded, by name.
        added: what `read` returned for this pipeline, each with its strength.
    """
    strengths = {} if _fold_in(pipeline) else dict(own)
    modules = _components(family, pipeline)
    for number, (file, strength) in enumerate(added):
        for component, layers in file.layers.items():
            for kind in TENSORS:
                name = f"added_{number}_{kind}"
                chosen = {module: change for module, change in layers.items() if change.kind == kind}
                if chosen:
                    inject(modules[component], kind, chosen, name)
                    strengths[name] = strength
    set_strengths(pipeline, strengths)
    return strengths


def inject(module: Any, kind: str, changes: Mapping[str, LayerChange], adapter: str) -> None:
    """Put changes of one kind into a component as an adapter of PEFT, their scale within its tensors."""
    import peft

    is_training = module.training
    # By their whole names: a short one can be the end of another layer's.
    exact = {name: f"^{re.escape(name)}" for name in changes}
    ranks = {exact[name]: change.rank or 1 for name, change in changes.items()}
    config_class = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    alpha = {"lora_alpha" if kind == "lora" else "alpha": 1}
    config = config_class(
        r=1, **alpha, rank_pattern=ranks, alpha_pattern=dict(ranks), target_modules="|".join(map(re.escape, changes))
    )
    module.add_adapter(config, adapter_name=adapter)
    for name, change in changes.items():
        _set_tensors(module.get_submodule(name), change, adapter)
    # New modules come in training mode.
    module.train(is_training)


def _set_tensors(layer: Any, change: LayerChange, adapter: str) -> None:
    """Put the tensors of a file in the place of those that PEFT has made, whose shapes follow from other settings."""
    weight = layer.get_base_layer().weight
    tensors = {
        name: torch.nn.Parameter(tensor.to(weight.device, weight.dtype), requires_grad=False)
        for name, tensor in change.at_scale(1.0).tensors.items()
    }
    if change.kind == "lora":
        for name, tensor in tensors.items():
            getattr(layer, name)[adapter].weight = tensor
        return
    for name in TENSORS[change.kind]:
        held = getattr(layer, name)
        if name in tensors:
            held[adapter] = tensors[name]
        elif adapter in held:
            del held[adapter]


def _components(family: Family, pipeline: Any) -> dict[str, Any]:
    """What an adapter can be for: the denoiser, and text encoders that can be trained."""
    names = family.trainable_encoders if isinstance(family, TrainsEncoders) else ()
    encoders = {name: getattr(pipeline, name, None) for name in names}
    return {
        DENOISER: getattr(pipeline, family.denoiser_attribute),
        **{name: encoder for name, encoder in encoders.items() if encoder is not None},
    }


def _fold_in(pipeline: Any) -> bool:
    """Fold the run's own adapter into the weights if it does more than add; returns whether it does."""
    adapted = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module) and injection.adapted(each)]
    settings = [each.peft_config[OWN] for each in adapted]
    only_adds = all(each.peft_type.value in ADDING and not getattr(each, "use_dora", False) for each in settings)
    for component in () if only_adds else adapted:
        injection.merge(component)
    return not only_adds


def set_strengths(pipeline: Any, strengths: Mapping[str, float]) -> None:
    """Make these adapters active, by name, in every component; those that have no strength stay as they are."""
    for component in pipeline.components.values():
        for layer in component.modules() if isinstance(component, torch.nn.Module) else ():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter(list(strengths))
            if isinstance(layer, LoraLayer | LycorisLayer):
                for name, strength in strengths.items():
                    layer.set_scale(name, strength)
