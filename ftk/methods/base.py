"""The Method protocol: a way of training. One file in this folder is one method."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from ftk.configs import load
from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

Components = Mapping[str, "torch.nn.Module"]


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
        """Write the weights in a delivery format, each file atomically; returns the files."""

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """Load what `export` wrote in the default format into a fresh diffusers pipeline."""

    def merge(self, components: Components) -> None:
        """Fold what was trained into the base weights, in place."""


def available() -> list[str]:
    """Names of all methods: the files of this folder."""
    package = importlib.import_module("ftk.methods")
    return sorted(item.name.replace("_", "-") for item in pkgutil.iter_modules(package.__path__) if item.name != "base")


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


def target_modules(family: Family, targets: "str | Sequence[str]") -> list[str]:
    """Module-name suffixes for a named group of the family, or for a list of suffixes as it stands."""
    if not isinstance(targets, str):
        return list(targets)
    if targets not in family.target_groups:
        raise ConfigError(
            f"method.targets: {family.name} has no group {targets!r}. Valid: {', '.join(family.target_groups)}, "
            f"or a list of module names such as [to_q, to_k]."
        )
    return list(family.target_groups[targets])
