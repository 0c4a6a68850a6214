"""Processes that train together, one world of them after the other, as a JSON list on the standard input names them.

A world is {"size", "arguments" of `ftk train`, "dies"}. `dies` is [rank, file]: that process is killed as it is about to write
the file into a checkpoint of step 4. With "folder" in place of "arguments" it trains the model of `odd_rows` there. All are
forks of this process: what takes seconds to import is imported once. Prints a line of JSON for each: the exit codes.
"""

import gc
import importlib
import json
import math
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ftk import storage
from ftk.cli import app
from ftk.configs.schema import TrainConfig
from ftk.methods import full
from ftk.train import checkpoint, ranks
from ftk.train.loss_scale import LossScale
from ftk.train.optim import MasterOptimizer

SLOW_IMPORTS = (
    "ftk.train.stage",
    "torch.distributed.fsdp",
    "diffusers.optimization",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
)
STEPS = 3


class Block(nn.Module):
    """Fewer rows than processes, as many, more, and a single number; a frozen weight, and one that stays in fp32."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"one": (1, 5), "two": (2, 3), "seven": (7, 1), "wide": (5, 2, 2), "frozen": (3,), "number": (), "exact": (4,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator), name != "frozen"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((parameter.float() ** 2 * x).sum() for parameter in self.parameters()) * self.number.float()


class OddRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.outside = nn.Parameter(torch.arange(5.0))

    def forward(self, x: torch.Tensor, spike: float) -> torch.Tensor:
        return sum(block(x) for block in self.blocks) + (self.outside.float() * x).sum() + self.outside.float()[-1] * spike


def odd_rows(mine: ranks.Ranks, folder: Path) -> None:
    """`STEPS` steps in bf16 from the newest checkpoint in `folder`, and another one. The second step's gradient is infinite.

    The loss is scaled as in fp16, which leaves the rest as it is: every process must come to the same scale.
    """
    model, dtype = OddRows().to(torch.bfloat16), torch.bfloat16
    for block in model.blocks:
        block.exact.data = block.exact.data.float()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if mine.size > 1:
        mine.shard(model, SimpleNamespace(block_classes=("Block",)), [], torch.device("cpu"), dtype)
    parameters = dict(model.named_parameters())
    config = TrainConfig(ema_decay=0.5, learning_rate=0.1, schedule="constant", max_grad_norm=1.0)
    scale = LossScale(torch.device("cpu"))
    optimizer = MasterOptimizer({name: parameters[name] for name in names}, config, mine, scale)
    found = checkpoint.latest(folder, mine)
    first = found.step if found else 0
    if found:
        optimizer.restore(*found.tensors(optimizer.rows), found.optimizer_facts)
    for step in range(first, first + STEPS):
        for share in range(12 // mine.size):
            number = mine.rank * (12 // mine.size) + share
            spike = math.inf if (step, number) == (1, 0) else 0.0
            (model(torch.tensor(0.01 * (step + 1 + number)), spike) * scale.scale).backward()
            optimizer.accumulate()
        mine.sum(optimizer.gradients())
        _, is_bad = optimizer.step(1.0, config.max_grad_norm, torch.zeros(()))
        assert bool(is_bad) == (step == 1)
        assert bool(scale.adapt(torch.zeros(()), is_bad).is_overflow) == bool(is_bad)
    assert mine.gather(scale.facts()) == [{"scale": 2.0**15, "good_steps": first + STEPS - 2}] * mine.size
    checkpoint.save_checkpoint(folder, first + STEPS, 0, optimizer, {}, mine)


def die(rank: int, file: str) -> None:
    plain = storage.commit_bytes

    def commit(path: Path, data: bytes) -> None:
        if path.name == file and path.parent.name.startswith(f"{storage.TEMPORARY_PREFIX}00000004-"):
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        plain(path, data)

    if rank == int(os.environ["RANK"]):
        storage.commit_bytes = commit


def child(rank: int, port: int, world: dict) -> int:
    os.environ |= {"WORLD_SIZE": str(world["size"]), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if "folder" in world:
        with ranks.started(torch.device("cpu"), 60) as (mine, _):
            odd_rows(mine, Path(world["folder"]))
        return 0
    if world.get("dies"):
        die(*world["dies"])
    full.MAX_SHARD_SIZE = world.get("max_shard_size", full.MAX_SHARD_SIZE)
    sys.argv = ["ftk", "train", *world["arguments"]]
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(world: dict) -> list[int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(world["size"]):
        if not (pid := os.fork()):
            code = 70
            try:
                code = child(rank, port, world)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def main() -> None:
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    for world in json.load(sys.stdin):
        print(json.dumps(run(world)), flush=True)


if __name__ == "__main__":
    main()
