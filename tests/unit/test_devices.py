"""Memory that is given back, and kernels that are not kept."""

import ctypes
import os
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

# Bytes of the heap in use, which does not depend on what the system has taken back.
MULTIPLIES_OF_MANY_SHAPES = """
import ctypes
import torch
from ftk import devices

class Usage(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

usage = ctypes.CDLL(None).mallinfo2
usage.restype = Usage
devices.limit_cpu_kernels()
torch.set_num_threads(1)
weight, bias = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)

def used_after(lengths):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(2, length, 64, dtype=torch.bfloat16), weight, bias)
    return usage().uordblks

with torch.inference_mode():
    before = used_after(range(2, 102))
    print((used_after(range(102, 302)) - before) / 2**20)
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


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc says how much memory is in use"
)
def test_cpu_kernels_of_shapes_long_past_are_not_kept() -> None:
    # torch reads the variables once, so the process is a new one; without them it grows by 126 MiB where oneDNN has AMX.
    unlimited = {name: value for name, value in os.environ.items() if name not in devices._KERNELS_KEPT}
    command = [sys.executable, "-c", MULTIPLIES_OF_MANY_SHAPES]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=unlimited).stdout
    assert float(output) < 5


def test_limits_of_cpu_kernels_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = devices._KERNELS_KEPT
    monkeypatch.setenv(first, "512")
    monkeypatch.setenv(second, "")
    monkeypatch.delenv(second)
    devices.limit_cpu_kernels()
    assert os.environ[first] == "512"
    assert os.environ[second] == str(devices._KERNELS_KEPT[second])
