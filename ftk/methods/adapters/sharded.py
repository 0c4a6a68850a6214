"""Weights that are split over processes (FSDP2), put together one at a time: no process ever holds the whole model.

A split tensor is a `DTensor` along its first dimension. Every process must ask for the same ones in the same order.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def writes(tensors: "Iterable[torch.Tensor]") -> bool:
    """Whether this process is the one that gets the whole tensors: the first of those that have parts of any."""
    return all(tensor.device_mesh.get_local_rank() == 0 for tensor in tensors if _is_split(tensor))


def outlines(tensors: "Mapping[str, torch.Tensor]", dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """Tensors of the shapes and dtypes that `gather` gives; those that are not split are themselves."""
    import torch

    return {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta") if _is_split(tensor) else tensor
        for name, tensor in tensors.items()
    }


def gather(tensors: "Mapping[str, torch.Tensor]", dtype: "torch.dtype", keep: bool) -> "dict[str, torch.Tensor]":
    """All processes: the whole tensors, on the CPU, those that were split in `dtype`; nothing where they are not to `keep`."""
    found = {}
    for name, tensor in tensors.items():
        whole: Any = tensor.detach().to(dtype).full_tensor() if _is_split(tensor) else tensor
        if keep:
            found[name] = whole.cpu()
    return found


def _is_split(tensor: "torch.Tensor") -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
