"""The processes of a run: torchrun, accelerate or Slurm start them, this file is all that knows of more than one.

A process that dies, or waits too long, ends all the others: `Preempted`, and the same command goes on from the last
checkpoint, on as many processes as there are then.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ftk.errors import ConfigError, EnvironmentFault, Preempted
from ftk.models import base as models
from ftk.models.base import Family

LOGGER = logging.getLogger("ftk")


@dataclass(slots=True)
class Ranks:
    """This process among the others; alone by default. Calls that others must join say so with `all`."""

    rank: int = 0
    size: int = 1
    stop_requested: bool = False
    """Set by a signal's handler."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """All: add up each tensor over the processes, in place; one message for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            with _others_may_be_gone():
                dist.all_reduce(flat)
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """All: of each flag whether any process has it set. Between CPUs, so that no process waits for its device."""
        if self.size == 1:
            return flags
        numbers = torch.tensor([int(flag) for flag in flags])
        with _others_may_be_gone():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return tuple(bool(number) for number in numbers.tolist())

    def from_main(self, tensors: Mapping[str, torch.Tensor] | None, facts: Any = None) -> tuple[dict[str, torch.Tensor], Any]:
        """All: the main process's CPU tensors and plain (JSON) facts."""
        if self.size == 1:
            return dict(tensors or {}), facts
        listed = tensors or {}
        shapes = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in listed.items()}
        described = json.loads(self._bytes_from_main(json.dumps([shapes, facts]).encode()))
        received = {}
        for name, (dtype, shape) in described[0].items():
            tensor = listed[name].contiguous() if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
            with _others_may_be_gone():
                dist.broadcast(tensor, 0)
            received[name] = tensor
        return received, described[1]

    def _bytes_from_main(self, data: bytes) -> bytes:
        length = torch.tensor(len(data))
        with _others_may_be_gone():
            dist.broadcast(length, 0)
            buffer = torch.zeros(int(length), dtype=torch.uint8)
            if self.is_main:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(buffer, 0)
        return bytes(buffer.numpy())

    def wait(self) -> None:
        """All: go on once every process is here."""
        if self.size > 1:
            with _others_may_be_gone():
                dist.all_reduce(torch.zeros(()))

    def shard(self, denoiser: Any, family: Family, replicated: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        """All: split the frozen weights over the processes, block by block (FSDP2); what is trained stays whole.

        Adapters are small: with them on every process, an update and its checkpoint are those of unsplit training.

        Source: Zhao et al. 2023 (arXiv 2304.11277); `torch.distributed.fsdp.fully_shard`.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        kept = set(replicated)
        for module in list(denoiser.modules()):
            if type(module).__name__ == family.block_class:
                fully_shard(module, mesh=mesh, ignored_params=kept)
        # Weights outside the blocks go back to their parts after each pass, too: reading the adapter's state on one process
        # alone would make them do so there, and the next gathering would wait for ever.
        fully_shard(denoiser, mesh=mesh, ignored_params=kept, reshard_after_forward=True)


@contextmanager
def started(device: torch.device, timeout_seconds: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that the launcher named in the environment; yields this one's place and its device.

    Reads `WORLD_SIZE`, `RANK`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`, as torchrun and accelerate set them.

    Raises:
        ConfigError: the environment is incomplete.
        EnvironmentFault: the others cannot be reached, or there is no device for this process.
    """
    size = world_size()
    if size == 1:
        yield Ranks(), device
        return
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK", 0)
    _check_place(rank, size)
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"LOCAL_RANK is {local_rank}, and this machine has {torch.cuda.device_count()} GPUs: start as many processes."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"process {rank} of {size} cannot reach the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}"
        ) from None
    ranks = Ranks(rank=rank, size=size)
    if rank:
        LOGGER.setLevel(max(LOGGER.level, logging.WARNING))  # the main process says it for all
    try:
        yield ranks, device
        ranks.wait()  # a process that ends sooner would be taken for dead
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes the launcher started; 1 without one."""
    size = _number("WORLD_SIZE", 1)
    if not size:
        raise ConfigError("the environment variable WORLD_SIZE is 0: it counts the processes. Unset it, or start one or more.")
    return size


def _check_place(rank: int, size: int) -> None:
    if rank >= size:
        raise ConfigError(
            f"the environment variable RANK is {rank}, and WORLD_SIZE {size}: ranks count from 0 to {size - 1}. "
            f"Start through torchrun or accelerate, which set both."
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, and {' and '.join(missing)} not set: where the main process is found. "
            f"torchrun and accelerate set them; or unset WORLD_SIZE to train on one process."
        )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {text!r}: torchrun and accelerate set RANK, WORLD_SIZE and LOCAL_RANK. "
            f"Start through one of them, or unset WORLD_SIZE."
        )
    return int(text)


@contextmanager
def _others_may_be_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # also torch.distributed's own errors
        if models.is_out_of_memory(error):
            raise
        raise Preempted(
            f"Another process has ended or does not answer: {str(error).splitlines()[0][:200]}. "
            f"The same command goes on from the last checkpoint."
        ) from error
