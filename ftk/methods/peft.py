"""Any other adapter of the PEFT library, by its type and its own settings: `method: {name: peft, type: MISS, r: 32}`.

Settings are those of PEFT's class for the type, under PEFT's names; only `target_modules` is written `targets`, as everywhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftk.errors import ConfigError, did_you_mean
from ftk.methods.adapters import narrowing, peft_method, targets
from ftk.methods.adapters.targets import TrainedComponent

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
    **{name: f"write `{narrowing.PEFT_NAMES[name]}`" for name in ("target_modules", "exclude_modules", "layers_to_transform")},
    "layers_pattern": "it goes with `layers`",
    **dict.fromkeys(("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"), "ftk sets it"),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "the base is the section `model`"),
}


class PeftConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`: the type, the targets, and whatever PEFT's class of this type takes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = Field(description="a type of the PEFT library, such as MISS or HRA")

    @model_validator(mode="after")
    def _settings_are_pefts(self) -> Self:
        valid = _settings_of(self.type)
        for key in self.settings:
            if key in _SET_BY_FTK:
                raise ValueError(f"`{key}` is no setting of this method: {_SET_BY_FTK[key]}")
            if key not in valid:
                meant = did_you_mean(key, valid)
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
        raise ValueError(f"PEFT has no type {kind!r}.{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
    return [field.name for field in dataclasses.fields(known[name]) if field.init and field.name not in _SET_BY_FTK]


class Peft(peft_method.PeftMethod):
    """An adapter of which ftk knows no more than PEFT's interface. Not all start at the base: FourierFT does not."""

    name = "peft"
    Config: ClassVar[type[BaseModel]] = PeftConfig
    REASONS = dict.fromkeys(
        ("diffusers", "comfyui", "kohya", "lycoris"),
        "no other reader knows this type. Merge it into the weights, and use those.",
    )

    def refusal(self, layer: "torch.nn.Module") -> None:
        """PEFT itself knows which layers a type carries, and says so."""

    def biases(self, settings: PeftConfig) -> str:
        """As it was written."""
        return str(settings.settings.get("bias", "none"))

    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: PeftConfig) -> Any:
        """PEFT's settings of the type.

        Raises:
            ConfigError: PEFT refuses them.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

        kind = settings.type.upper()
        # PEFT looks these up by the name of a language model.
        own: dict[str, Any] = {"feedforward_modules": []} if kind == "IA3" else {}
        try:
            return CLASSES[kind](target_modules=targets.as_peft_targets(component, names), **{**own, **settings.settings})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method: PEFT's {kind} refuses its settings: {error}") from error


METHOD = Peft()
