"""What the launcher says. torchrun, `accelerate launch`, mpirun and Slurm all speak through environment variables.

accelerate joins the processes and knows who is who; this module checks the variables first, because accelerate and torch
answer an incomplete environment with a traceback or by waiting for ever.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_choice_from_env, parse_flag_from_env, patch_environment

from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault

LOGGER = logging.getLogger("ftk")

# The first name is what torchrun and accelerate set; mpirun, which `accelerate launch` uses on CPUs, sets one of the others.
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

_REFUSED_FLAGS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed; ftk splits weights with FSDP2 (train.sharding: fsdp)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM; ftk splits weights with FSDP2 (train.sharding: fsdp)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config; ftk splits weights with FSDP2 (train.sharding: fsdp)",
}
_REFUSED_PRECISIONS = {"fp8"}
_PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlace:
    """Which process this is: `rank` of `size`, and which one on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world_size() -> int:
    """How many processes the launcher started; 1 without one.

    Raises:
        ConfigError: the environment holds no number, or 0.
    """
    size = _number(_SIZE, 1)
    if not size:
        raise ConfigError("the environment variable WORLD_SIZE is 0: it counts the processes. Unset it, or start one or more.")
    return size


def place() -> ProcessPlace:
    """This process's place as the launcher gave it; the only process without a launcher.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
    """
    size = world_size()
    if size == 1:
        return ProcessPlace()
    rank, local_rank = _number(_RANK), _number(_LOCAL_RANK, 0)
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
    return ProcessPlace(rank=rank, size=size, local_rank=local_rank)


@contextmanager
def joined(place: ProcessPlace, device: torch.device, timeout_seconds: float) -> Iterator[PartialState]:
    """Start accelerate's state, and with it the process group where there are several processes; end both afterwards.

    On GPUs the group has a gloo half for tensors in host memory, so that flags are exchanged without waiting for the device.

    Raises:
        EnvironmentFault: the others cannot be reached, or this machine has fewer GPUs than processes.
    """
    is_cuda = device.type == "cuda"
    if is_cuda and place.local_rank >= torch.cuda.device_count():
        # accelerate takes the rank modulo the number of GPUs, and NCCL then fails on two processes of one GPU.
        raise EnvironmentFault(
            f"LOCAL_RANK is {place.local_rank}, and this machine has {torch.cuda.device_count()} GPUs: start as many processes."
        )
    # accelerate's singletons would hand an earlier run's state to this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield _state(place, is_cuda, timeout_seconds)
    finally:
        if place.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def _state(place: ProcessPlace, is_cuda: bool, timeout_seconds: float) -> PartialState:
    arguments: dict[str, Any] = {}
    if place.size > 1:
        # Not through InitProcessGroupKwargs.to_kwargs(): it leaves out a timeout that equals its default for NCCL, and torch
        # then waits for its own default, which is longer.
        arguments = {
            "backend": "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            "timeout": timedelta(seconds=timeout_seconds),
        }
        if is_cuda:
            arguments["device_id"] = torch.device("cuda", place.local_rank)
    try:
        with patch_environment(**_as_accelerate_reads(place)):
            return PartialState(cpu=not is_cuda, **arguments)
    except (RuntimeError, ValueError) as error:
        if place.size == 1:
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentFault(
            f"process {place.rank} of {place.size} cannot join the others at {where}: {str(error).splitlines()[0]}"
        ) from None


def _as_accelerate_reads(place: ProcessPlace) -> dict[str, str]:
    """The variables from which accelerate builds its state, all of them, so that it changes none for good."""
    alone = place.size == 1
    variables = {name: "-1" for name in _SIZE}  # accelerate skips numbers below zero
    variables |= {
        "WORLD_SIZE": str(place.size),
        "RANK": str(place.rank),
        # A local rank asks accelerate for a process group, which one process does not need.
        "LOCAL_RANK": "-1" if alone else str(place.local_rank),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1"),
        # Without it accelerate sets torch's threads for the rest of the process.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(torch.get_num_threads()),
    }
    if alone:
        # On several consumer GPUs with an old driver accelerate refuses to start unless these are set, even one process.
        variables |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return variables


def ensure_state() -> None:
    """Start accelerate's state for one process, unless there is one: its trackers and its logger refuse to work without."""
    with patch_environment(**_as_accelerate_reads(ProcessPlace())):
        PartialState(cpu=True)


def applied(config: RunConfig) -> RunConfig:
    """The configuration with what `accelerate launch` asks for by its options or its configuration file.

    `mixed_precision: bf16` or `fp16`, `use_cpu` and FSDP become `train.precision`, `train.device` and `train.sharding`, unless
    the run file says otherwise, which is an error. `mixed_precision: no` asks for nothing: it is also what the launcher says
    when nobody chose a precision.

    Raises:
        ConfigError: the launcher and the run file disagree, or the launcher asks for what ftk does not do.
    """
    precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "")
    _refuse_unsupported(precision)
    _warn_of_one_cpu_process()
    requests = {
        "precision": (precision, f"mixed_precision: {precision}", precision in _PRECISIONS),
        "device": ("cpu", "use_cpu: true", parse_flag_from_env("ACCELERATE_USE_CPU")),
        "sharding": ("fsdp", "distributed_type: FSDP", parse_flag_from_env("ACCELERATE_USE_FSDP")),
    }
    changes: dict[str, str] = {}
    for name, (value, words, is_asked) in requests.items():
        current = getattr(config.train, name)
        if not is_asked or current == value:
            continue
        if name in config.train.model_fields_set and current != "auto":
            raise ConfigError(
                f"train.{name} is {current} in the run file, and the launcher's configuration says `{words}`. Take "
                f"train.{name} out of the run file, or change the launcher's configuration with `accelerate config`."
            )
        changes[name] = value
        _log("the launcher says `%s`: train.%s is %s", words, name, value)
    if precision == "no":
        _log("the launcher's mixed_precision is `no`, its default: train.precision %s stands", config.train.precision)
    return config.model_copy(update={"train": config.train.model_copy(update=changes)}) if changes else config


def _refuse_unsupported(precision: str) -> None:
    asked = [words for name, words in _REFUSED_FLAGS.items() if parse_flag_from_env(name)]
    if precision in _REFUSED_PRECISIONS:
        asked.append(f"mixed_precision: {precision}; ftk trains in bf16, fp16 or fp32")
    if parse_choice_from_env("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        asked.append("a dynamo_backend; ftk compiles with train.memory.compile: true")
    if parse_choice_from_env("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        asked.append("gradient accumulation; ftk accumulates train.global_batch_size in parts of train.micro_batch_size")
    if asked:
        raise ConfigError(
            f"the launcher's configuration asks for {'; and for '.join(asked)}. Change it with `accelerate config`, or name "
            f"another file with `accelerate launch --config_file`."
        )


def _warn_of_one_cpu_process() -> None:
    # For several processes on CPUs accelerate sets an address, and starts a single process unless mpirun is configured.
    is_on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU") and bool(os.environ.get("MASTER_PORT"))
    if is_on_cpus and not any(name in os.environ for name in _SIZE):
        LOGGER.warning(
            "the launcher was asked for several processes on CPUs and started one. Use `distributed_type: MULTI_GPU`, which "
            "starts them on CPUs too, with train.device: cpu."
        )


def _log(message: str, *arguments: object) -> None:
    # Every process decides alike; the first one says so.
    if _number(_RANK, 0) == 0:
        LOGGER.info(message, *arguments)


def _number(names: Sequence[str], default: int | None = None) -> int:
    name = next((name for name in names if name in os.environ), names[0])
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {text!r}: torchrun and accelerate set RANK, WORLD_SIZE and LOCAL_RANK. "
            f"Start through one of them, or unset WORLD_SIZE."
        )
    return int(text)
