"""Memory that is given back."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ftk import devices

MIB = 1 << 20


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


@pytest.mark.skipif(sys.platform != "linux" or devices._malloc_trim() is None, reason="only glibc's allocator is trimmed")
def test_freed_memory_between_blocks_that_live_on_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks below the size from which malloc maps each alone; the small ones keep the heap from shrinking at its end.
    blocks, between = [], []
    before = _anonymous_mib()
    for _ in range(2000):
        blocks.append(np.ones(100_000, dtype=np.uint8))
        between.append(bytes(600))
    held = _anonymous_mib() - before
    blocks.clear()
    freed = devices.FreedMemory()
    freed.release()
    monkeypatch.setattr(devices, "_TRIM_SECONDS", 0.0)
    freed.release()
    assert held > 150
    assert _anonymous_mib() - before < held / 3


def test_memory_is_trimmed_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    times = iter((100.0, 100.5, 101.0, 101.5, 102.5))
    monkeypatch.setattr(devices, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    freed = devices.FreedMemory()
    for _ in range(4):
        freed.release()
    assert calls == [0, 0]


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_malloc_trim", lambda: None)
    monkeypatch.setattr(devices, "_TRIM_SECONDS", 0.0)
    devices.FreedMemory().release()
