"""The Method protocol: a way of training. One file in this folder is one method; `adapters/` holds what several share."""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ftk.configs import load
from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.models.base import Family, TrainsEncoders

if TYPE_CHECKING:
    import torch

Components = Mapping[str, "torch.nn.Module"]
Tensor = TypeVar("Tensor")
DENOISER = "denoiser"
"""The component that every method trains, whatever the diffusers pipeline calls it."""
EVERYTHING = "all"
"""As `targets`: every layer that the method can carry."""
FORMATS = ("diffusers", "peft", "comfyui", "kohya", "lycoris")
"""All delivery formats; a method writes some of them, and says why not the others."""


class TargetPattern(BaseModel):
    """`targets: {regex: ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    regex: str = Field(min_length=1, description="must match the whole name of a module, from the denoiser's root")

    @field_validator("regex")
    @classmethod
    def _is_a_regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


def _one_of_three(value: Any) -> Any:
    # A union would complain once for each of its members.
    is_list = isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value)
    is_pattern = isinstance(value, TargetPattern) or (isinstance(value, Mapping) and set(value) == {"regex"})
    if not (is_list or is_pattern or (isinstance(value, str) and value)):
        raise ValueError("a group of the family, `all`, a list of module names, or {regex: EXPRESSION}")
    return TargetPattern.model_validate(value) if isinstance(value, Mapping) else value


Targets = Annotated[str | tuple[str, ...] | TargetPattern, BeforeValidator(_one_of_three)]


class TextEncoderConfig(BaseModel):
    """Settings under `method.text_encoder`: train the model's text encoders too, by the same method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    rate: float = Field(default=1.0, gt=0, description="their learning rate is so many times train.learning_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedComponent:
    """A component that is trained, the denoiser or a text encoder, and what the settings choose of it."""

    name: str
    module: Any
    owner: str
    """What messages call it."""
    groups: Mapping[str, Sequence[str]]
    targets: Targets
    setting: str
    """Where `targets` stands in the run file."""

    @property
    def is_denoiser(self) -> bool:
        """Whether it is no text encoder."""
        return self.name == DENOISER

    @property
    def prefix(self) -> str:
        """What stands before the names of its parameters and tensors."""
        return prefix(self.name)


class Method(Protocol):
    """What a way of training must provide. A method may also define `predict`, with `Family.predict`'s arguments.

    Names of a text encoder's parameters and tensors start with the component's: `text_encoder.`.
    """

    name: str
    Config: type[BaseModel]
    EXTRA: tuple[str, ...]
    """What the cache must hold besides latents and texts: control latents, placeholder positions, class images."""
    FORMATS: tuple[str, ...]
    """Delivery formats that `export` can write; the first is the default."""

    def needs(self, family: Family, config: Any) -> tuple[str, ...]:
        """Components that must live in memory while training: `denoiser`, and the text encoders that are trained too.

        Raises:
            ConfigError: the settings ask for one that this family cannot give.
        """

    def attach(self, components: Components, family: Family, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Add what is trained to the components; returns it by name. Equal seeds give equal initial values."""

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """The trained tensors as they are now, by the names that `load_state` takes."""

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Put tensors back into components that `attach` has prepared."""

    def export(
        self,
        components: Components,
        family: Family,
        config: Any,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """Write the weights in a delivery format, each file atomically; returns the files.

        Raises:
            ConfigError: the method cannot honestly become this format; the message gives the reason and what works.
        """

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """Load what `export` wrote in the default format into a fresh diffusers pipeline.

        Raises:
            CheckpointError: a file is missing or damaged, or was trained on another base model.
        """

    def merge(self, components: Components) -> None:
        """Fold what was trained into the base weights, in place."""

    def usage(self, family: Family, config: Any) -> str:
        """Python lines that load what `export` wrote in the default format: `path/to/this/folder` into `pipeline`."""


@runtime_checkable
class HasParameterGroups(Protocol):
    """A method whose parameters do not all learn at one rate."""

    def parameter_groups(self, config: Any) -> Sequence[tuple[str, float]]:
        """(regular expression searched in parameter names, factor on the learning rate); the first match counts."""


@runtime_checkable
class HasBaseChanges(Protocol):
    """A method that may write into the base weights: they must be there in full, not as 8-bit codes."""

    def changes_base(self, config: Any) -> bool:
        """Whether it does so with these settings."""


@runtime_checkable
class HasBaseTraining(Protocol):
    """A method that may train the denoiser's own weights: where those are split over processes, so is all that it trains.

    Its `export` is called by all of them then.
    """

    def trains_base(self, config: Any) -> bool:
        """Whether it does so with these settings, and adds nothing to the denoiser."""


@runtime_checkable
class HasDataStart(Protocol):
    """A method that may start from what the layers see of the data."""

    def start_batches(self, config: Any) -> int:
        """How many micro-batches it looks at with these settings; 0: it starts without."""

    def start_from(self, components: Components, predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
        """Set the initial values, once `attach` has been called. Each prediction passes a micro-batch through the model."""


def available() -> list[str]:
    """Names of all methods: the files of this folder."""
    package = importlib.import_module("ftk.methods")
    names = [item.name for item in pkgutil.iter_modules(package.__path__) if not item.ispkg]
    return sorted(name.replace("_", "-") for name in names if name != "base")


def get(name: str) -> Method:
    """The method called `name`; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"method.name: there is no method {name!r}. Valid: {', '.join(available())}")
    method: Method = importlib.import_module(f"ftk.methods.{name.replace('-', '_')}").METHOD
    return method


def parse(config: MethodConfig) -> tuple[Method, Any]:
    """The method that a run file names, and its settings validated by its own model."""
    method = get(config.name)
    return method, load.validate(method.Config, config.settings, f"method {config.name}", prefix="method.")


def parameter_groups(method: Method, config: Any) -> Sequence[tuple[str, float]]:
    """What the method asks for, or nothing; see `HasParameterGroups`."""
    return method.parameter_groups(config) if isinstance(method, HasParameterGroups) else ()


def changes_base(method: Method, config: Any) -> bool:
    """Whether the base weights themselves change; see `HasBaseChanges`."""
    return isinstance(method, HasBaseChanges) and method.changes_base(config)


def trains_base(method: Method, config: Any) -> bool:
    """Whether the base weights are what is trained; see `HasBaseTraining`."""
    return isinstance(method, HasBaseTraining) and method.trains_base(config)


def needs(family: Family, config: Any) -> tuple[str, ...]:
    """The denoiser, and with `config.text_encoder` all text encoders that the family can train.

    Raises:
        ConfigError: it can train none.
    """
    if config.text_encoder is None:
        return (DENOISER,)
    if not isinstance(family, TrainsEncoders):
        raise ConfigError(
            f"method.text_encoder: the text encoder of {family.name} cannot be trained with ftk, its texts are cached as it "
            f"encodes them. Leave it out."
        )
    return (DENOISER, *family.trainable_encoders)


def parts(components: Mapping[str, Any], family: Family, config: Any) -> list[TrainedComponent]:
    """What is trained of each component, by `config.targets` and `config.text_encoder.targets`."""
    found = []
    for name, module in components.items():
        if name == DENOISER:
            targets, setting, owner, groups = config.targets, "method.targets", family.name, family.target_groups
        else:
            assert isinstance(family, TrainsEncoders)
            targets, setting = config.text_encoder.targets, "method.text_encoder.targets"
            owner, groups = f"{family.name}'s {name}", family.encoder_targets
        found.append(TrainedComponent(name=name, module=module, owner=owner, groups=groups, targets=targets, setting=setting))
    return found


def prefix(component: str) -> str:
    """What stands before the names of a component's parameters and tensors."""
    return "" if component == DENOISER else f"{component}."


def tensors_of(component: str, components: Iterable[str], tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Those of one component, by its own names."""
    others = tuple(prefix(name) for name in components if name != DENOISER)
    own = prefix(component)
    if own:
        return {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}


def encoder_rates(config: Any) -> tuple[tuple[str, float], ...]:
    """`Method.parameter_groups` of text encoders that learn at a rate of their own."""
    if config.text_encoder is None or config.text_encoder.rate == 1:
        return ()
    return ((r"^text_encoder(_\d+)?\.", config.text_encoder.rate),)


def start_batches(method: Method, config: Any) -> int:
    """How many micro-batches the method looks at before it starts; see `HasDataStart`."""
    return method.start_batches(config) if isinstance(method, HasDataStart) else 0


def target_modules(part: TrainedComponent) -> "list[str] | TargetPattern":
    """Module-name suffixes for a named group of the component, or for a list of suffixes as it stands; or a pattern.

    Raises:
        ConfigError: there is no group of this name. A string is always a group, so that a typo is found.
    """
    targets = part.targets
    if isinstance(targets, TargetPattern):
        return targets
    if not isinstance(targets, str):
        return list(targets)
    if targets == EVERYTHING:
        return TargetPattern(regex=".*")
    if targets not in part.groups:
        near = difflib.get_close_matches(targets, [*part.groups, EVERYTHING], n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{part.setting}: {part.owner} has no group {targets!r}.{meant} Valid: {', '.join(part.groups)}, "
            f"{EVERYTHING}, a list of module names such as [{', '.join(part.groups['attention'][:2])}], or "
            f"{{regex: EXPRESSION}}."
        )
    return list(part.groups[targets])


def check_format(name: str, formats: Sequence[str], form: str, reasons: Mapping[str, str]) -> None:
    """Refuse a delivery format that the method cannot write, with the reason and the way that works.

    Raises:
        ConfigError: always, unless the method writes the format.
    """
    if form in formats:
        return
    writes = ", ".join(formats)
    if form in reasons:
        raise ConfigError(f"{name} cannot be written as {form}: {reasons[form]} It can be written as: {writes}.")
    raise ConfigError(f"there is no delivery format {form!r}. {name} can be written as: {writes}.")
