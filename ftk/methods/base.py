"""The Method protocol: a way of training. One file in this folder is one method.

Files whose names start with an underscore are no methods: they hold what several methods share.
"""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ftk.configs import load
from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

Components = Mapping[str, "torch.nn.Module"]
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


class Method(Protocol):
    """What a way of training must provide. A method may also define `predict`, with `Family.predict`'s arguments."""

    name: str
    Config: type[BaseModel]
    NEEDS: tuple[str, ...]
    """Components that must live in memory while training; nearly always `("denoiser",)`."""
    EXTRA: tuple[str, ...]
    """What the cache must hold besides latents and texts: control latents, placeholder positions, class images."""
    FORMATS: tuple[str, ...]
    """Delivery formats that `export` can write; the first is the default."""

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

    def usage(self, family: Family) -> str:
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


def available() -> list[str]:
    """Names of all methods: the files of this folder."""
    package = importlib.import_module("ftk.methods")
    names = [item.name for item in pkgutil.iter_modules(package.__path__)]
    return sorted(name.replace("_", "-") for name in names if name != "base" and not name.startswith("_"))


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


def target_modules(family: Family, targets: "str | Sequence[str] | TargetPattern") -> "list[str] | TargetPattern":
    """Module-name suffixes for a named group of the family, or for a list of suffixes as it stands; or a pattern.

    Raises:
        ConfigError: the family has no group of this name. A string is always a group, so that a typo is found.
    """
    if isinstance(targets, TargetPattern):
        return targets
    if not isinstance(targets, str):
        return list(targets)
    if targets == EVERYTHING:
        return TargetPattern(regex=".*")
    if targets not in family.target_groups:
        near = difflib.get_close_matches(targets, [*family.target_groups, EVERYTHING], n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"method.targets: {family.name} has no group {targets!r}.{meant} Valid: {', '.join(family.target_groups)}, "
            f"{EVERYTHING}, a list of module names such as [to_q, to_k], or {{regex: EXPRESSION}}."
        )
    return list(family.target_groups[targets])


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
