"""The processes of a run: a launcher starts them, `launch.py` joins them, and this file is all that knows of more than one.

A process that dies, or does not answer in time, ends all the others: `ProcessLost`, and the same command goes on from the
last checkpoint, on as many processes as there are then. Inside `Ranks.unhurried` a process may take as long as it needs.
"""

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ftk import devices
from ftk.errors import Preempted, ProcessFailed, ProcessLost
from ftk.models.base import Family
from ftk.train import launch
from ftk.train.memory import blocks

LOGGER = logging.getLogger("ftk")
_SECONDS_BETWEEN_PULSES = 1.0


@dataclass(slots=True)
class Ranks:
    """This process among the others; alone by default. Calls that others must join say so with `all`."""

    rank: int = 0
    size: int = 1
    stop_requested: bool = False
    """Set by a signal's handler."""
    pulses: "_Pulses | None" = None
    _is_unhurried: bool = False

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

    def gather(self, facts: Any) -> list[Any]:
        """All: each process's plain (JSON) facts, in the order of the processes."""
        if self.size == 1:
            return [facts]
        data = json.dumps(facts).encode()
        length = torch.tensor(len(data))
        with _others_may_be_gone():
            dist.all_reduce(length, dist.ReduceOp.MAX)
            # Spaces after it change nothing in JSON.
            own = torch.frombuffer(bytearray(data.ljust(int(length))), dtype=torch.uint8)
            buffers = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(buffers, own)
        return [json.loads(bytes(buffer.numpy())) for buffer in buffers]

    def wait(self) -> None:
        """All: go on once every process is here."""
        if self.size > 1:
            with _others_may_be_gone():
                dist.all_reduce(torch.zeros(()))

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """All: inside, a process may take as long as it needs; outside again once every process is done.

        For what one process does for all (checkpoints, pictures, trackers), and for what takes some longer than others. A
        thread tells the others meanwhile that this process is alive. Inside another such section it does nothing.

        Raises:
            ProcessLost: another process has ended, or is silent for longer than `train.timeout_seconds`.
            ProcessFailed: another process failed inside.
        """
        if self.pulses is None or self._is_unhurried:
            yield
            return
        self._is_unhurried = True
        section = self.pulses.begin()
        try:
            yield
        except BaseException as error:
            section.end(getattr(error, "exit_code", 1))
            raise
        else:
            section.end(0)
            section.refuse_failure()
        finally:
            self._is_unhurried = False

    def shard(
        self,
        denoiser: Any,
        family: Family,
        whole: Sequence[torch.nn.Parameter],
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[torch.nn.Parameter, torch.nn.Parameter]:
        """All: split the weights over the processes, block by block (FSDP2), all but those in `whole`.

        Adapters are small: whole on every process, their update and their checkpoint are those of unsplit training. What is
        trained and split becomes fp32, so that each part is its own master, and is gathered in `dtype`; gradients come back
        in parts, summed over the processes in fp32. The loss of a micro-batch is divided by the step's samples already.

        Returns:
            What has become of each parameter.

        Source: Zhao et al. 2023 (arXiv 2304.11277); `torch.distributed.fsdp.fully_shard`.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        names, own_class = {parameter: name for name, parameter in denoiser.named_parameters()}, type(denoiser).__name__
        # There is nothing to split in a single number, and what is kept in another precision is to stay in it.
        kept = {*whole, *(parameter for parameter in names if not parameter.ndim or parameter.dtype != dtype)}
        for parameter in kept:
            parameter.data = parameter.data.to(device)
        is_split = any(parameter.requires_grad for parameter in names if parameter not in kept)
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if is_split else MixedPrecisionPolicy()
        for module in [*blocks(denoiser, family), denoiser]:
            _to_fp32(parameter for parameter in module.parameters() if parameter in names and parameter not in kept)
            # Weights outside the blocks go back to their parts after each pass, too: reading the adapter's state on one process
            # alone would make them do so there, and the next gathering would wait for ever.
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=kept, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        # What diffusers asks a model for: what it computes in is not the precision of its parts.
        denoiser.__class__ = type(own_class, (type(denoiser),), {"dtype": dtype})
        now = dict(denoiser.named_parameters())
        return {parameter: now[name] for parameter, name in names.items()}


@dataclass(slots=True, kw_only=True)
class _Pulses:
    """Exchanges by which processes know that all are alive while they wait for one. They are apart from those of training."""

    group: Any
    interval_seconds: float

    def begin(self) -> "_Section":
        """Begin to tell the others that this process works."""
        section = _Section(pulses=self)
        section.thread = threading.Thread(target=section.run, name="ftk-pulse", daemon=True)
        section.thread.start()
        return section


@dataclass(slots=True, kw_only=True)
class _Section:
    """What `Ranks.unhurried` does beside the work: rounds of exchanges, until no process works or one has failed."""

    pulses: _Pulses
    thread: threading.Thread = field(init=False)
    _is_done: threading.Event = field(default_factory=threading.Event)
    _exit_code: int = 0
    _others_code: int = 0
    _error: RuntimeError | None = None

    def run(self) -> None:
        """In a thread: who is done waits in the exchange for those who are not."""
        while True:
            self._is_done.wait(self.pulses.interval_seconds)
            numbers = torch.tensor([int(not self._is_done.is_set()), self._exit_code])
            try:
                dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.pulses.group)
            except RuntimeError as error:
                self._error = error
                return
            is_working, self._others_code = numbers.tolist()
            if self._others_code or not is_working:
                return

    def end(self, exit_code: int) -> None:
        """This process is done, or has failed with an exit code; returns once all are done."""
        self._exit_code = exit_code
        self._is_done.set()
        self.thread.join()

    def refuse_failure(self) -> None:
        """Raise what has become of another process, if it did not come to the end of the section."""
        if self._error is not None:
            raise _gone(self._error) from self._error
        if self._others_code == Preempted.exit_code:
            raise ProcessLost("Another process was stopped. The same command goes on from the last checkpoint.")
        if self._others_code:
            raise ProcessFailed("Another process of this run failed; its own message says why.", self._others_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """This process's part of a tensor that is split along its first dimension: rows `first` to `end` - 1 of `total`."""

    first: int
    end: int
    total: int


def rows(parameter: torch.nn.Parameter) -> Rows | None:
    """Which rows of a parameter this process holds; None: all of them, as every other process does."""
    if not isinstance(parameter, DTensor):
        return None
    total, each = len(parameter), -(-len(parameter) // parameter.device_mesh.size())  # as torch.chunk cuts
    first = min(total, parameter.device_mesh.get_local_rank() * each)
    return Rows(first=first, end=min(total, first + each), total=total)


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter or gradient, in the same memory: the rows that `rows` names, or all."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def _to_fp32(parameters: Iterable[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def started(device: torch.device, timeout_seconds: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that the launcher started; yields this one's place among them and its device.

    Raises:
        ConfigError: the launcher's environment variables are incomplete.
        EnvironmentFault: the others cannot be reached, or there is no device for this process.
    """
    with launch.joined(launch.place(), device, timeout_seconds) as state:
        if state.num_processes == 1:
            yield Ranks(), device
            return
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        pulses = _Pulses(group=group, interval_seconds=min(_SECONDS_BETWEEN_PULSES, timeout_seconds / 4))
        ranks, level = Ranks(rank=state.process_index, size=state.num_processes, pulses=pulses), LOGGER.level
        if not state.is_main_process:
            LOGGER.setLevel(max(level, logging.WARNING))  # the main process says it for all
        try:
            yield ranks, state.device if device.type == "cuda" else device
            ranks.wait()  # a process that ends sooner would be taken for dead
        finally:
            LOGGER.setLevel(level)


@contextmanager
def _others_may_be_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # also torch.distributed's own errors
        if devices.is_out_of_memory(error):
            raise
        raise _gone(error) from error


def others_gone(error: RuntimeError) -> ProcessLost | None:
    """What to raise in place of an error from an exchange of torch's own, FSDP's; None for any other error."""
    is_of_exchange = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    return _gone(error) if is_of_exchange and not devices.is_out_of_memory(error) else None


def _gone(error: RuntimeError) -> ProcessLost:
    return ProcessLost(
        f"Another process has ended or does not answer: {str(error).splitlines()[0][:200]}. "
        f"The same command goes on from the last checkpoint."
    )
