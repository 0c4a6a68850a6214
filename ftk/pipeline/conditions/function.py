"""A control image made by a function of the user's own, `module:function`, from a module that Python finds by itself."""

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ftk import storage
from ftk.contracts import RejectReason
from ftk.errors import ConfigError, did_you_mean
from ftk.pipeline.conditions.base import Condition, Maker
from ftk.pipeline.decode import Unfit

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class FunctionSettings(BaseModel):
    """Whatever stands beside `make`: the function gets it as a dictionary."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Function:
    """Called with an RGB image [H,W,3], 8 bits, and its settings; gives an image of this size, RGB or gray, 8 bits."""

    Settings: type[BaseModel] = FunctionSettings

    def __init__(self, name: str) -> None:
        self.name = name

    def maker(self, settings: FunctionSettings) -> Maker:
        """The user's function; whatever it raises rejects the image."""
        function = _imported(self.name)
        given = settings.model_dump(mode="json")

        def made(image_HWC: np.ndarray, key: str) -> np.ndarray:
            try:
                # Standard output is for the report. The image is a copy: others are made from it too.
                with contextlib.redirect_stdout(sys.stderr):
                    return np.asarray(function(image_HWC.copy(), dict(given)))
            except Exception as error:
                detail = f"{self.name}: {type(error).__name__}: {error}"[:500]
                raise Unfit(RejectReason.CONTROL_NOT_MADE, detail) from None

        return made


def of(name: str) -> Condition:
    """The kind for a function; `ConfigError` if this cannot be the name of one. Imports nothing."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r} is not the name of a function: write module:function, for example my_controls:depth")
    return Function(name)


def source_digest(name: str) -> str:
    """Stands for the code of a function: the files of the module that is named, and of the one that defines it.

    Raises:
        ConfigError: it cannot be imported.
    """
    function = _imported(name)
    names = (name.partition(":")[0], str(getattr(function, "__module__", "")))
    paths = dict.fromkeys(getattr(sys.modules.get(each), "__file__", None) for each in names)
    return storage.digest([storage.sha256_file(Path(path)) for path in paths if path and Path(path).is_file()])


@functools.cache
def _imported(name: str) -> Callable[[np.ndarray, dict[str, Any]], Any]:
    module_name, _, function_name = name.partition(":")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except Exception as error:
        # A module of the user's may raise anything while it is imported.
        raise ConfigError(
            f"data.sources: `make: {name}`: {module_name} cannot be imported ({type(error).__name__}: {error}). Install it, or "
            "put its folder on PYTHONPATH"
        ) from None
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        problem = f"{module_name} has no function {function_name}" if function is None else f"{function_name} is not a function"
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"data.sources: `make: {name}`: {problem}.{did_you_mean(function_name, functions)}")
    named: Callable[[np.ndarray, dict[str, Any]], Any] = function
    return named
