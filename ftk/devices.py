"""Which device computes, how much memory it takes, keeps and gives back, and whether an error means that it ran out of memory.

torch is imported inside the functions: commands that compute nothing do not load it.
"""

import contextlib
import ctypes
import functools
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ftk.errors import EnvironmentFault

if TYPE_CHECKING:
    import torch

_TRIM_SECONDS = 1.0
_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 64, "LRU_CACHE_CAPACITY": 16}
"""The variables that size the two caches of CPU kernels, oneDNN's and that of torch's bridge to it, and how many kernels each
may hold: about those of one batch, whose layers share them."""


def resolve_device(name: str) -> "torch.device":
    """`auto` is CUDA when there is one, else the CPU; a device that is asked for by name must be there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("device cuda was asked for, but torch sees no CUDA device. Set the device to auto or cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentFault("device mps was asked for, but torch sees no Metal device. Set the device to auto or cpu.")
    return torch.device(name)


def limit_cpu_kernels() -> None:
    """Keep compiled CPU kernels of the last few shapes only, for loops whose batches differ in shape.

    oneDNN compiles a kernel for each shape of an operation. By default the last 1,024 stay in memory, in each of two caches, at
    about 0.3 MiB each for matrix products in bfloat16. Few batches of captions are equal in number and in length, so these
    kernels are hardly used again: they took 120 MiB more after 30,000 captions than after 3,000. One takes about 0.3 ms to
    compile. torch reads the variables when it first computes on the CPU, so call this before. Those already set stay.
    """
    for variable, kernels in _KERNELS_KEPT.items():
        os.environ.setdefault(variable, str(kernels))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def memory_bytes(device: "torch.device") -> int:
    """Peak memory: what torch allocated on a CUDA device, elsewhere this process's resident set."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class FreedMemory:
    """Gives memory that was freed back to the system, for loops whose batches differ in size.

    glibc keeps freed blocks in an arena for each thread, and blocks of one size leave gaps that the next size does not fit:
    encoding 2,000 pictures of 20 sizes took 0.8 GiB at first and 2.5 GiB at the end. Trimming keeps such a loop flat and costs
    it nothing that could be measured; it is done at most once a second.
    """

    def __init__(self) -> None:
        self._trimmed_at = time.monotonic()

    def release(self) -> None:
        """Trim, unless that was done in the last second. Does nothing where the C library is not glibc."""
        now = time.monotonic()
        if now - self._trimmed_at < _TRIM_SECONDS:
            return
        self._trimmed_at = now
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> "Callable[[int], int] | None":
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        trim = ctypes.CDLL(None).malloc_trim
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
        return trim
    return None
