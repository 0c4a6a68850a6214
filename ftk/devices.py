"""Which device computes, how much memory it has taken, and whether an error means that it ran out of memory.

torch is imported inside the functions: commands that compute nothing do not load it.
"""

import resource
import sys
from typing import TYPE_CHECKING

from ftk.errors import EnvironmentFault

if TYPE_CHECKING:
    import torch


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
