"""Adapters of several runs in one pipeline, each with a strength of its own.

PEFT adds up what adapters of several types give a layer, each wrapped around the one before: exactly the sum of their changes
to its weights, as long as they only add to a layer's output (LoRA, LoHa, LoKr). Their strength is PEFT's scaling. Others rotate
or rescale (OFT, DoRA, HRA and the rest): the run's own of such a kind is folded into the weights before others are added.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from ftk import locations
from ftk.configs.schema import AddedAdapterConfig
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters import formats, injection, peft_directory, peft_method
from ftk.models.base import Family

OWN = injection.ADAPTER
"""The name under which a method loads its run's adapter."""
ADDING = ("LORA", "LOHA", "LOKR")
"""PEFT's types that add to a layer's output, in proportion to their strength."""
_DORA = "DORA"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredAdapter:
    """A delivered adapter: its folder, PEFT's name of its type, and whether it is a PEFT directory."""

    folder: Path
    kind: str
    is_directory: bool
    strength: float = 1.0


def find(config: AddedAdapterConfig, setting: str) -> DeliveredAdapter:
    """What lies at a path, which can be added to others.

    Raises:
        ConfigError: there is no adapter, or one of a type that only its own run can be drawn with.
    """
    folder = locations.local_path(config.path)
    if not folder.is_dir():
        raise ConfigError(f"{setting}.path {config.path}: no such folder. Name the adapter/ folder of a run, or an export.")
    found = look(folder)
    if found is None:
        inner = folder / "adapter"
        meant = f" Did you mean `{inner}`?" if inner.is_dir() and look(inner) is not None else ""
        raise ConfigError(
            f"{setting}.path {config.path} holds no adapter in diffusers' or PEFT's format (neither {formats.SINGLE_FILE} nor "
            f"{peft_directory.CONFIG_FILE}).{meant}"
        )
    if found.kind not in ADDING:
        raise ConfigError(
            f"{setting}.path {config.path} is of type {found.kind}, which does not add up with others: only LoRA, LoHa and "
            f"LoKr do. Draw it alone, as `ftk sample` of its own run does."
        )
    return DeliveredAdapter(folder=folder, kind=found.kind, is_directory=found.is_directory, strength=config.strength)


def look(folder: Path) -> DeliveredAdapter | None:
    """The adapter in a folder, None if there is none.

    Raises:
        ConfigError: its files cannot be read.
    """
    try:
        if (folder / peft_directory.CONFIG_FILE).exists():
            settings = json.loads((folder / peft_directory.CONFIG_FILE).read_bytes())
            kind = _DORA if settings.get("use_dora") else str(settings["peft_type"])
            return DeliveredAdapter(folder=folder, kind=kind, is_directory=True)
        if (folder / formats.SINGLE_FILE).exists():
            return DeliveredAdapter(folder=folder, kind=_kind(folder / formats.SINGLE_FILE), is_directory=False)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds an adapter that cannot be read: {error}. Export it again.") from error
    return None


def check_own_strength(strength: float, adapter: Path, method: str) -> None:
    """Refuse another strength than 1 for what has none.

    Raises:
        ConfigError: with the type.
    """
    if strength == 1:
        return
    found = look(adapter)
    if found is None or found.kind not in ADDING:
        kind = f"{method}, whose weights are the model's own" if found is None else f"of type {found.kind}"
        raise ConfigError(
            f"sample.strength: {strength:g} has no meaning for {adapter}, which is {kind}: only LoRA, LoHa and LoKr have a "
            f"strength. Leave it out."
        )


def check_fits(family: Family, pipeline: Any, added: Sequence[DeliveredAdapter]) -> None:
    """Refuse adapters of another base, before anything is drawn.

    Raises:
        CheckpointError: a file is damaged, or was trained on another base model.
    """
    for one in added:
        path = one.folder / (peft_directory.WEIGHTS_FILE if one.is_directory else formats.SINGLE_FILE)
        # What stands before the denoiser's own names in a PEFT directory, and in a file for diffusers.
        prefix = re.compile(rf"^(base_model\.model|{family.denoiser_attribute})\.")
        tensors = {prefix.sub("", name): tensor for name, tensor in peft_directory.read_tensors(path).items()}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder")}
        peft_directory.check_fits(getattr(pipeline, family.denoiser_attribute), own, path)


def add(family: Family, pipeline: Any, own: Mapping[str, float], added: Sequence[DeliveredAdapter]) -> None:
    """Load adapters on top of the run's own, which are loaded, and set all strengths.

    Raises:
        CheckpointError: a file is damaged, or was trained on another base model.
    """
    strengths = {} if _fold_in(pipeline) else dict(own)
    for number, one in enumerate(added):
        name = f"added_{number}"
        if one.is_directory:
            peft_directory.load_directories(family, pipeline, one.folder, name)
        else:
            method = methods.get(one.kind.lower())
            assert isinstance(method, peft_method.PeftMethod)
            method.load_into(family, pipeline, one.folder, name)
        strengths[name] = one.strength
    set_strengths(pipeline, strengths)


def _fold_in(pipeline: Any) -> bool:
    """Fold the run's own adapter into the weights if it does more than add; returns whether it does."""
    adapted = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module) and injection.adapted(one)]
    settings = [one.peft_config[OWN] for one in adapted]
    only_adds = all(one.peft_type.value in ADDING and not getattr(one, "use_dora", False) for one in settings)
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


def _kind(path: Path) -> str:
    file: Any
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    if any("lora_magnitude_vector" in name or "dora_scale" in name for name in names):
        return _DORA
    return "LOKR" if any(".lokr_" in name for name in names) else "LORA"
