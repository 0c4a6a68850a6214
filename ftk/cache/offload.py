"""Runs a text encoder that is larger than the GPU: its weights stay in host memory and visit the device layer by layer.

accelerate's hooks do it: before a layer computes they copy its weights to the device, and after it they drop them. The kernels
and their inputs are those of a resident encoder, so the outputs have the same bits.
"""

import logging
from typing import Literal

import torch

from ftk.models.base import PutOnDevice, move
from ftk.progress import human_bytes

LOGGER = logging.getLogger("ftk")
_LEAST_WORKING_BYTES = 1 << 30


def placement(offload: Literal["auto", "none", "layers"], device: torch.device) -> PutOnDevice | None:
    """How text encoders get onto `device` under `cache.offload`; None: they move there as they are."""
    if offload == "layers":
        return stream
    if offload == "none" or device.type != "cuda":
        return None

    def stream_if_too_large(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, _ = torch.cuda.mem_get_info(device)
        # Room for a few captions is enough to keep the weights there: batches are halved until they fit.
        if weights + _LEAST_WORKING_BYTES <= free:
            return move(model, device)
        LOGGER.warning(
            "the text encoder's weights take %s, and %s has %s free: they are streamed from host memory layer by layer "
            "(cache.offload), which is slower; larger batches (cache.memory_gib) hide more of it",
            human_bytes(weights), device, human_bytes(free),
        )  # fmt: skip
        return stream(model, device)

    return stream_if_too_large


def stream(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Attach accelerate's offloading hooks: the weights are in host memory but for the layer that computes on `device`."""
    from accelerate import cpu_offload  # half a second that most caches can do without

    cpu_offload(model, execution_device=device)
    # Between two calls the parameters are on the meta device, and a transformers model names that as its own when it is asked
    # where its inputs belong.
    for module in model.modules():
        kind = type(module)
        if hasattr(kind, "device"):
            # transformers looks up what a class can return by how the class is printed.
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (kind,), {**names, "device": device})
    return model
