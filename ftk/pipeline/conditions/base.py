"""Control images that `ftk prepare` makes from the images themselves. One file in this folder is one kind: `make: canny`.

They are made from the pixels of a sample as it is stored, after resize, crop and flip, so they lie on it pixel by pixel.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel

from ftk.configs import load
from ftk.configs.schema import SourceConfig
from ftk.contracts import RejectReason
from ftk.errors import ConfigError, did_you_mean
from ftk.pipeline.decode import Unfit

CONDITIONS_VERSION = 1
"""Raised whenever equal images and settings would give other control images; part of the fingerprint of datasets with any."""

Maker = Callable[[np.ndarray, str], np.ndarray]
"""From an RGB image [H,W,3], 8 bits, and a key that stands for it, to [H,W,3] or [H,W], 8 bits. The key is for what is random:
equal keys give equal results."""


class Condition(Protocol):
    """What a kind of control image must provide."""

    Settings: type[BaseModel]

    def maker(self, settings: Any) -> Maker:
        """The function that makes one; what it needs is imported here.

        Raises:
            ConfigError: a package or a function is missing.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeControl:
    """A control image that is made of each image of a source; `position` counts from 0 in the source's `controls`."""

    position: int
    make: str
    settings: Any

    def maker(self) -> Maker:
        """See `Condition.maker`."""
        return get(self.make).maker(self.settings)

    def of(self, image_HWC: np.ndarray, key: str) -> np.ndarray:
        """The control image [H,W,3] of an RGB image [H,W,3], both of 8 bits.

        Raises:
            Unfit: the user's function failed, or gave something else than an image of this size.
        """
        control = self.maker()(image_HWC, key)
        height, width, _ = image_HWC.shape
        if control.dtype != np.uint8 or control.shape not in ((height, width), (height, width, 1), (height, width, 3)):
            raise Unfit(
                RejectReason.CONTROL_NOT_MADE,
                f"{self.make} gave an array of {control.shape} and {control.dtype}, not of ({height}, {width}, 3) and uint8",
            )
        gray_or_rgb = control if control.ndim == 3 else control[:, :, None]
        return np.ascontiguousarray(np.broadcast_to(gray_or_rgb, image_HWC.shape))

    @property
    def plain(self) -> dict[str, Any]:
        """As it may be written in a run file, without settings that have their defaults."""
        return {"make": self.make, **self.settings.model_dump(mode="json", exclude_defaults=True)}

    @property
    def fingerprint(self) -> list[Any]:
        """Everything but the image that decides what it looks like, as JSON values."""
        own = [importlib.import_module("ftk.pipeline.conditions.function").source_digest(self.make)] if ":" in self.make else []
        return [CONDITIONS_VERSION, self.position, self.plain, *own]


def available() -> list[str]:
    """Names of all kinds: the files of this folder. A function of the user's own is none of them."""
    package = importlib.import_module("ftk.pipeline.conditions")
    names = [item.name for item in pkgutil.iter_modules(package.__path__)]
    return sorted(name.replace("_", "-") for name in names if name not in ("base", "function"))


def get(name: str) -> Condition:
    """The kind called `name`, or the one for a user's own function, `module:function`; `ConfigError` names the valid ones."""
    if ":" in name:
        function: Condition = importlib.import_module("ftk.pipeline.conditions.function").of(name)
        return function
    if name not in available():
        raise ConfigError(
            f"there is no kind {name!r}.{did_you_mean(name, available())} Valid: {', '.join(available())}, or a function of "
            "your own as module:function"
        )
    condition: Condition = importlib.import_module(f"ftk.pipeline.conditions.{name.replace('-', '_')}").CONDITION
    return condition


def of(config: SourceConfig) -> tuple[MadeControl, ...]:
    """The control images that a source makes, in their order; imports no function of the user's.

    Raises:
        ConfigError: there is no such kind, or a setting is wrong.
    """
    where = f"data.sources: source {config.source_name}"
    for position, entry in config.made_controls:
        if "from" in entry:
            raise ConfigError(
                f"{where}: controls.{position}: `from` is for sample.prompts: here it is made from each image. Leave it out."
            )
    return tuple(parse(entry, f"{where}: controls.{position}", position) for position, entry in config.made_controls)


def parse(entry: Mapping[str, Any], where: str, position: int = 0) -> MadeControl:
    """What one entry of a list of control images asks for; messages call its place `where`."""
    name = entry.get("make")
    if not isinstance(name, str):
        meant = next((hint for key in entry if key != "make" and (hint := did_you_mean(str(key), ["make"]))), "")
        raise ConfigError(f"{where}: an entry with settings says what to make, for example {{make: canny}}.{meant}")
    try:
        condition = get(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    tree = {key: value for key, value in entry.items() if key != "make"}
    return MadeControl(position=position, make=name, settings=load.validate(condition.Settings, tree, f"{where} ({name})"))
