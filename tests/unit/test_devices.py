"""Memory that is given back."""

import subprocess
import sys

import pytest

from ftk import devices

# Blocks below the size from which malloc maps each alone; the small ones keep the heap from shrinking at its end.
FREES_BETWEEN = """
import numpy as np
from ftk import devices

def anonymous_mib():
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 1024

blocks, between = [], []
before = anonymous_mib()
for _ in range(2000):
    blocks.append(np.ones(100_000, dtype=np.uint8))
    between.append(bytes(600))
held = anonymous_mib() - before
blocks.clear()
freed = devices.FreedMemory()
freed.release()
kept = anonymous_mib() - before
devices._TRIM_SECONDS = 0.0
freed.release()
print(held, kept, anonymous_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or devices._malloc_trim() is None, reason="only glibc's allocator is trimmed")
def test_freed_memory_between_blocks_that_live_on_is_given_back() -> None:
    # In a process of its own: this one's heap has gaps that the blocks would fill.
    output = subprocess.run([sys.executable, "-c", FREES_BETWEEN], check=True, capture_output=True, text=True).stdout
    held, kept, remaining = map(float, output.split())
    assert held > 150
    assert kept > 150
    assert remaining < 60


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
