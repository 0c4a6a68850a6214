"""Which pairs of a family and a method the contract tests run: every family with three methods, every method with two families.

The other pairs are a campaign: `make campaign-methods`.
"""

from typing import Any

import pytest

from ftk.models import base as families

FIRST = ("qwen-image", "stable-diffusion")
"""A transformer and a U-Net: the families of every method."""
METHODS = ("lora", "oft", "full")
"""The methods of every family."""


def families_of_each() -> list[str]:
    """Every family, `FIRST` in front, but those that are written as another one's subclass: they share its denoiser."""
    types = {name: type(families.get(name)) for name in families.available()}

    def is_subclass(kind: type) -> bool:
        return any(kind is not other and issubclass(kind, other) for other in types.values())

    return [*FIRST, *(name for name, kind in types.items() if not is_subclass(kind) and name not in FIRST)]


def all_families() -> list[Any]:
    """The parameters of a test of every family; a campaign for those that share a denoiser and have judges of their own."""
    first = families_of_each()
    return [pytest.param(name, marks=() if name in first else pytest.mark.campaign) for name in families.available()]


def marked(family: str, method: str, *more: Any, **options: Any) -> Any:
    """The parameters of a test of this pair, which is a campaign unless it is run each time."""
    is_run = family in FIRST or method in METHODS
    return pytest.param(family, method, *more, marks=() if is_run else pytest.mark.campaign, **options)
