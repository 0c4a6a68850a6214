"""What launchers ask for by environment variables, and that accelerate's state leaves nothing behind."""

import logging
import os
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault
from ftk.train import launch, ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PMI_", "OMPI_", "MV2_")):
            monkeypatch.delenv(name)


def config(**train: Any) -> RunConfig:
    tree = {
        "run": "test", "model": {"family": "qwen-image", "path": "model"}, "data": {"sources": [{"path": "photos"}]},
        "train": train,
    }  # fmt: skip
    return validate(RunConfig, tree, "test")


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"WORLD_SIZE": "8", "RANK": "5"}, (5, 8, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "2"}, (2, 4, 2)),
        ({"WORLD_SIZE": "2", "RANK": "1", "PMI_SIZE": "9", "PMI_RANK": "7"}, (1, 2, 0)),
    ],
)
def test_a_process_finds_its_place(monkeypatch, variables, expected):
    set_variables(monkeypatch, {"MASTER_ADDR": "here", "MASTER_PORT": "1", **variables})
    place = launch.place()
    assert (place.rank, place.size, place.local_rank) == expected


@pytest.mark.parametrize(
    ("variables", "train", "expected"),
    [
        ({}, {}, {"precision": "bf16", "device": "auto", "sharding": "auto"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "auto"}, {"precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, {"precision": "fp16"}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "auto"}, {"precision": "fp16"}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}, {"precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"precision": "fp32"}, {"precision": "fp32"}),
        ({"ACCELERATE_USE_CPU": "True"}, {}, {"device": "cpu"}),
        ({"ACCELERATE_USE_CPU": "False"}, {"device": "cuda"}, {"device": "cuda"}),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, {"sharding": "fsdp"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {}, {"precision": "bf16"}),
    ],
)
def test_what_the_launcher_asks_for_takes_effect(monkeypatch, variables, train, expected):
    set_variables(monkeypatch, variables)
    applied = launch.applied(config(**train)).train
    assert {name: getattr(applied, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("variables", "train", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "fp32"}, "train.precision is fp32 in the run file.*`mixed_prec"),
        ({"ACCELERATE_USE_CPU": "True"}, {"device": "cuda"}, "train.device is cuda in the run file.*`use_cpu: true`"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"sharding": "none"}, "train.sharding is none in the run file.*`distributed_type"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "bf16"}, "train.precision is bf16 in the run file.*`mixed_prec"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "mixed_precision: fp8; ftk trains in bf16, fp16 or fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed; ftk splits weights with FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "train.memory.compile: true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "train.micro_batch_size"),
    ],
)
def test_what_ftk_cannot_follow_is_refused(monkeypatch, variables, train, message):
    set_variables(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message):
        launch.applied(config(**train))


def test_decisions_are_said_by_the_first_process_alone(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ftk")
    set_variables(monkeypatch, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "RANK": "1"})
    launch.applied(config())
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    launch.applied(config())
    assert [record.message for record in caplog.records] == [
        "the launcher says `use_cpu: true`: train.device is cpu",
        "the launcher's mixed_precision is `no`, its default: train.precision bf16 stands",
    ]


def test_a_cpu_launch_that_starts_one_process_in_place_of_several_is_said(monkeypatch, caplog):
    set_variables(monkeypatch, {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    launch.applied(config())
    assert "asked for several processes on CPUs and started one" in caplog.text


def test_worlds_of_one_process_leave_nothing_behind(monkeypatch):
    """A group of one, as torchrun starts it, with variables of another launcher around it."""
    set_variables(monkeypatch, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "PMI_SIZE": "4"})
    before, threads = dict(os.environ), torch.get_num_threads()
    for _ in range(2):
        with ranks.started(CPU, 5) as (mine, device):
            assert (mine.rank, mine.size, device) == (0, 1, CPU)
            assert PartialState().num_processes == 1
            assert not torch.distributed.is_initialized()
        assert PartialState._shared_state == {}
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads


def test_a_state_that_could_not_be_started_leaves_nothing_behind(monkeypatch):
    """The first process alone never has a second one to wait for."""
    set_variables(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    before = dict(os.environ)
    with (
        pytest.raises(EnvironmentFault, match=r"process 1 of 2 cannot join the others at 127.0.0.1:1: "),
        ranks.started(CPU, 1),
    ):
        raise AssertionError("nobody answers")
    assert PartialState._shared_state == {}
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before


def test_more_processes_than_gpus_are_refused(monkeypatch):
    set_variables(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EnvironmentFault, match="LOCAL_RANK is 1, and this machine has 1 GPUs"):
        ranks.started(torch.device("cuda"), 5).__enter__()


def test_gpus_exchange_flags_through_gloo_and_wait_as_long_as_the_run_file_says(monkeypatch):
    """What accelerate passes on to torch; the timeout is the one that InitProcessGroupKwargs would leave out."""
    given: dict[str, Any] = {}
    set_variables(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with launch.joined(launch.place(), torch.device("cuda"), 600.0) as state:
        assert (state.process_index, state.num_processes, state.device) == (1, 2, torch.device("cuda", 1))
    assert given["backend"] == "cpu:gloo,cuda:nccl"
    assert given["timeout"].total_seconds() == 600
    assert given["device_id"] == given["current"] == torch.device("cuda", 1)
