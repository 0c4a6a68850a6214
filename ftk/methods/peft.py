"""Any other adapter of the PEFT library, by its type and its own settings: `method: {name: peft, type: MISS, r: 32}`.

Settings are those of PEFT's class for the type, under PEFT's names; only `target_modules` is written `targets`, as everywhere.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods import _peft
from ftk.methods.base import Components, Targets, check_format
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

_LANGUAGE = "it trains prompts of a language model, and a denoiser has none"
_SHARED = "its layers share one state, which lives in PEFT's wrapper and not in the denoiser"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("LORA", "LOHA", "LOKR", "OFT", "BOFT"), "it is a method of its own: write `name: %s`"),
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _LANGUAGE),
    **dict.fromkeys(("ADAPTION_PROMPT", "CPT", "CARTRIDGE"), _LANGUAGE),
    **dict.fromkeys(("VERA", "VBLORA", "FROD", "PVERA", "TINYLORA", "UNILORA"), _SHARED),
    "ADALORA": "it moves ranks between layers after each step (update_and_allocate), which the loop does not call",
    "ADAMSS": "it clusters weights with scikit-learn, which ftk does not install",
    "POLY": "it needs a task's number with every sample",
    "SHADOW": "PEFT cannot inject it into a model that it does not know",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, and a denoiser has none",
    "XLORA": "it mixes adapters that were trained before",
}
_SET_BY_FTK: Mapping[str, str] = {
    "target_modules": "write `targets`",
    "modules_to_save": "modules are not saved whole: use `name: full`",
    **dict.fromkeys(("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"), "ftk sets it"),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "the base is the section `model`"),
}


class PeftConfig(BaseModel):
    """Settings under `method:`: the type, the targets, and whatever PEFT's class of this type takes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = Field(description="a type of the PEFT library, such as MISS or HRA")
    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")

    @model_validator(mode="after")
    def _settings_are_pefts(self) -> Self:
        valid = _settings_of(self.type)
        for key in self.settings:
            if key in _SET_BY_FTK:
                raise ValueError(f"`{key}` is no setting of this method: {_SET_BY_FTK[key]}")
            if key not in valid:
                near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
                meant = f" Did you mean `{near[0]}`?" if near else ""
                raise ValueError(f"`{key}` is not a setting of PEFT's {self.type.upper()}.{meant} Valid: {', '.join(valid)}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What PEFT's class takes, as it was written."""
        return dict(self.model_extra or {})


def _settings_of(kind: str) -> list[str]:
    """The names of the settings of a type.

    Raises:
        ValueError: there is no such type, or it cannot be trained here.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

    known = {each.value: made for each, made in CLASSES.items()}
    valid = sorted(known.keys() - _REFUSED.keys())
    name = kind.upper()
    if name in _REFUSED:
        raise ValueError(f"type {name} cannot be trained here: {_REFUSED[name].replace('%s', name.lower())}")
    if name not in known:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"PEFT has no type {kind!r}.{meant} Valid: {', '.join(valid)}")
    return [field.name for field in dataclasses.fields(known[name]) if field.init and field.name not in _SET_BY_FTK]


class Peft:
    """An adapter of which ftk knows no more than PEFT's interface."""

    name = "peft"
    Config: ClassVar[type[BaseModel]] = PeftConfig
    NEEDS = ("denoiser",)
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("peft",)

    def attach(self, components: Components, family: Family, config: PeftConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter. Whether training starts at the base is the type's affair: FourierFT does not.

        Raises:
            ConfigError: PEFT refuses the settings, or a target.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

        denoiser: Any = components["denoiser"]
        names = _peft.select(denoiser, family, config.targets, _anything)
        targets = _peft.as_peft_targets(denoiser, family, config.targets, names)
        kind = config.type.upper()
        # PEFT looks these up by the name of a language model.
        own: dict[str, Any] = {"feedforward_modules": []} if kind == "IA3" else {}
        try:
            settings = CLASSES[kind](target_modules=targets, **{**own, **config.settings})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method: PEFT's {kind} refuses its settings: {error}") from error
        return _peft.attach(denoiser, settings, seed)

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """Whatever PEFT saves of this type."""
        return _peft.state(components["denoiser"])

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        _peft.load_state(components["denoiser"], state)

    def export(
        self,
        components: Components,
        family: Family,
        config: PeftConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """A PEFT directory."""
        reason = "no other reader knows this type. Merge it into the weights, and use those."
        check_format(self.name, self.FORMATS, form, dict.fromkeys(("diffusers", "comfyui", "kohya", "lycoris"), reason))
        denoiser: Any = components["denoiser"]
        settings = _peft.for_delivery(denoiser.peft_config[_peft.ADAPTER])
        return _peft.export_directory(directory, settings, self.state(components), metadata)

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """PEFT's settings and tensors, injected."""
        _peft.load_directory(pipeline, directory)

    def merge(self, components: Components) -> None:
        """PEFT's own merging, where the type has one."""
        _peft.merge(components["denoiser"])

    def usage(self, family: Family) -> str:
        """PEFT's loader."""
        return _peft.usage(family)


def _anything(_: "torch.nn.Module") -> None:
    """PEFT itself knows which layers a type carries, and says so."""


METHOD = Peft()
