"""The family and the methods that only the tests hold: found by ftk as its own are, while a test asks for them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import ftk.methods
import ftk.models

_FOREIGN = Path(__file__).parents[1] / "foreign"


@pytest.fixture(scope="module")
def foreign() -> Iterator[None]:
    """Within, `models.available` and `methods.available` list what tests/foreign holds too."""
    with pytest.MonkeyPatch.context() as patch:
        for package, folder in ((ftk.models, "models"), (ftk.methods, "methods")):
            patch.setattr(package, "__path__", [*package.__path__, str(_FOREIGN / folder)])
        yield
