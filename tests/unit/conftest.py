"""Unit tests make files and look at them at once: their times are trusted here, whatever their age."""

import pytest

from ftk import locations


@pytest.fixture(autouse=True)
def _trusted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "FRESH_SECONDS", 0.0)
