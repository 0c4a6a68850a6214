"""What all methods of the PEFT library are: settings, layers, an injected adapter, its directory, its merging.

An adapter is injected into the denoiser itself, which keeps its class: families, pipelines and FSDP meet the same module. A
text encoder that is trained too gets one of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ftk.errors import ConfigError
from ftk.methods import base
from ftk.methods.adapters import injection, narrowing, peft_directory, targets, whole_modules
from ftk.methods.adapters.narrowing import BlockNumbers
from ftk.methods.adapters.targets import EXCLUDED_HELP, Excluded, Targets, TextEncoderConfig, TrainedComponent
from ftk.methods.adapters.whole_modules import ModulesToSave
from ftk.methods.base import CacheNeeds, Export
from ftk.models.base import Conditions, Family, Model

if TYPE_CHECKING:
    import torch


class PeftMethodConfig(BaseModel):
    """The settings under `method:` that all adapters have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    exclude: Excluded | None = Field(default=None, description=EXCLUDED_HELP)
    layers: BlockNumbers | None = Field(default=None, description="numbers of the blocks to train; all by default")
    layers_pattern: str | None = Field(
        default=None,
        min_length=1,
        description="the list that `layers` counts in, such as transformer_blocks; any by default",
    )
    modules_to_save: ModulesToSave | None = Field(default=None, description=whole_modules.HELP)
    text_encoder: TextEncoderConfig | None = Field(default=None, description="train the text encoders too; {} by defaults")

    @model_validator(mode="before")
    @classmethod
    def _names_are_those_of_ftk(cls, tree: Any) -> Any:
        return narrowing.refuse_other_names(tree, cls.model_fields)

    @model_validator(mode="after")
    def _layers_take_effect(self) -> Self:
        if self.layers_pattern is not None and self.layers is None:
            raise ValueError("`layers_pattern` has no effect without `layers`")
        return self

    @model_serializer(mode="wrap")
    def _without_modules_that_are_not_named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints of runs without the setting keep their bytes.
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if key != "modules_to_save" or value is not None}


class PeftMethod(ABC):
    """A method whose adapter PEFT makes: what it says of itself, and `peft_config`, are all that it must add."""

    name: str
    Config: ClassVar[type[BaseModel]]
    FORMATS: tuple[str, ...] = ("peft",)
    REASONS: ClassVar[Mapping[str, str]] = {}
    """Why a format is none of `FORMATS`, and what works."""

    HAS_SCALE: ClassVar[bool] = False
    """Whether what the adapter adds to a layer's output is in proportion to PEFT's `scaling`."""

    def refusal(self, layer: "torch.nn.Module") -> str | None:
        """Why the method cannot carry a layer; None if it can. Linear layers and convolutions, if it does not say otherwise."""
        return targets.linear_or_convolution(layer)

    @abstractmethod
    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: Any) -> Any:
        """PEFT's settings for the layers called `names`.

        Raises:
            ConfigError: they do not fit one of the layers.
        """

    def inject(
        self, component: TrainedComponent, peft_config: Any, settings: Any, seed: int
    ) -> "dict[str, torch.nn.Parameter]":
        """Inject one component's adapter; returns what is trained of it, by its own names."""
        return injection.inject(component.module, peft_config, seed)

    def encoders(self, family: Family, settings: Any) -> tuple[str, ...]:
        """By `text_encoder`, all that the family can train."""
        return base.trained_encoders(family, settings)

    def cache_needs(self, family: Family, settings: Any) -> CacheNeeds:
        """Nothing but latents and texts."""
        return CacheNeeds()

    def parameter_groups(self, settings: Any) -> Sequence[tuple[str, float]]:
        """The text encoders' own learning rate."""
        return base.encoder_rates(settings)

    def attach(self, model: Model, settings: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapters."""
        components = targets.trained_components(model.family, model.components, settings)
        chosen = [targets.select(component, self.refusal) for component in components]
        for pattern in ("rank_pattern", "alpha_pattern"):
            targets.check_patterns(getattr(settings, pattern, {}), [name for names in chosen for name in names], pattern)
        parameters: dict[str, torch.nn.Parameter] = {}
        for component, names in zip(components, chosen, strict=True):
            wanted = settings.modules_to_save if component.is_denoiser else None
            whole = [] if wanted is None else whole_modules.select(component, wanted)
            entries = whole_modules.entries(component, wanted, whole, names) if whole else None
            peft_config = self.peft_config(component, names, settings)
            injected = self.inject(component, peft_config, settings, seed)
            if entries is not None:
                _note_whole(component.module.peft_config[injection.ADAPTER], entries)
                injected |= whole_modules.thaw(component, whole)
            parameters |= {component.prefix + name: parameter for name, parameter in injected.items()}
        return parameters

    def thaw(self, model: Model, settings: Any) -> None:
        """Those of `modules_to_save`."""
        if settings.modules_to_save is not None:
            component = targets.trained_components(model.family, model.components, settings)[0]
            whole_modules.thaw(component, whole_modules.select(component, settings.modules_to_save))

    def formats(self, settings: Any) -> tuple[str, ...]:
        """With `modules_to_save`, those that can hold whole modules."""
        if settings.modules_to_save is None:
            return self.FORMATS
        return tuple(form for form in whole_modules.FORMATS if form in self.FORMATS)

    def check_format(self, form: str, settings: Any) -> None:
        """Refuse a delivery format that cannot be written with these settings.

        Raises:
            ConfigError: see `base.check_format`.
        """
        formats, reasons = self.formats(settings), self.REASONS
        if settings.modules_to_save is not None:
            reasons = dict.fromkeys((*self.FORMATS, *self.REASONS), whole_modules.REASON)
        base.check_format(self.name, formats, form, reasons)

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's: adapters are in the model itself."""
        return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def strength_refusal(self, settings: Any) -> str | None:
        """A scale is all of it, and what it scales is the whole difference to the base."""
        if not self.HAS_SCALE:
            return f"only LoRA, LoHa and LoKr have a strength, {self.name} has none."
        if settings.modules_to_save is not None:
            return "the whole modules of method.modules_to_save have no strength."
        return None

    def at_strength(self, model: Model, strength: float) -> AbstractContextManager[None]:
        """By PEFT's `scaling`, of the denoiser and of text encoders that are trained too."""
        return injection.at_strength(model.components.values(), strength)

    def base_refusal(self, settings: Any) -> str | None:
        """An adapter can be switched off; what is trained of the base itself cannot."""
        if settings.modules_to_save is not None:
            return "the modules of method.modules_to_save are trained whole, and cannot be switched off."
        if self.biases(settings) != "none":
            return "biases of the base are trained too (method.bias), and cannot be switched off."
        return None

    def biases(self, settings: Any) -> str:
        """PEFT's `bias`: which biases of the base are trained beside the adapter."""
        return str(getattr(settings, "bias", "none"))

    def base_prediction(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The family's, with the adapters switched off."""
        import torch

        with torch.no_grad(), injection.switched_off(model.components.values()):
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: Any, export: Export) -> list[Path]:
        """A PEFT directory, with one of its own in it for each text encoder."""
        self.check_format(export.form, settings)
        return peft_directory.export_directories(model, export)

    def load_into(self, family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> Any:
        """PEFT's settings and tensors, injected under the adapter's name."""
        peft_directory.load_directories(family, pipeline, directory, adapter)
        return pipeline

    def merge(self, model: Model) -> None:
        """Fold the adapters into the weights and remove them."""
        for module in model.components.values():
            injection.merge(module)

    def usage(self, family: Family, settings: Any) -> str:
        """PEFT's loader."""
        return usage_of_directories(family, self.encoders(family, settings))


def usage_of_directories(family: Family, encoders: Sequence[str]) -> str:
    """Python lines that load PEFT directories of the denoiser and of these text encoders into `pipeline`."""
    line = f'PeftModel.from_pretrained(pipeline.{family.denoiser_attribute}, "path/to/this/folder")'
    others = peft_directory.usage_of_encoders(encoders) or [peft_directory.IMPORT]
    return "\n".join([others[0], line, *others[1:]])


def _note_whole(peft_config: Any, entries: list[str]) -> None:
    """List the modules in the adapter's settings, once it is injected: PEFT would put wrappers in their place before."""
    if not hasattr(peft_config, "modules_to_save"):
        raise ConfigError(f"{whole_modules.SETTING}: PEFT's {peft_config.peft_type.value} has no such setting. Leave it out.")
    peft_config.modules_to_save = entries
