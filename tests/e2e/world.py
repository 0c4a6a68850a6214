"""Runs `ftk train` on several processes of this machine, as a launcher would: python world.py SIZE TRACE [ARGUMENT ...]

Every process writes TRACE/SIZE-RANK.jsonl: step by step the draws of its micro-batches, as they were handed to the loop. With
WORLD_GRADIENTS set, the main one saves the gradient of its first step there. Prints each process's number, then, when all
have ended, the exit codes as a JSON list. The processes are forks: torch is imported once.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from ftk.cli import app
from ftk.train import stage  # noqa: F401  (imported before the fork)
from ftk.train.data import Loader, Step
from ftk.train.optim import MasterOptimizer
from ftk.train.order import share


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def trace(path: Path) -> None:
    """Note what each step hands to the loop."""
    plain = Loader.step

    def step(self: Loader, index: int) -> Step:
        made = plain(self, index)
        expected = dict(share(self.order.step(index), self.rank, self.world_size))
        real = [(number, batch) for number, batch in made.batches if batch.share]
        assert [number for number, _ in real] == list(expected)
        assert [len(batch) for _, batch in real] == [len(draws) for draws in expected.values()]
        names = self.builder.store.table["key"]
        shown = {
            str(number): [[draw.epoch, names[draw.sample].as_py(), draw.repeat, draw.caption] for draw in draws]
            for number, draws in expected.items()
        }
        sigmas = {str(number): batch.sigma_B.tolist() for number, batch in real}
        with path.open("a") as file:
            file.write(json.dumps({"step": index, "draws": shown, "sigmas": sigmas}) + "\n")
        return made

    Loader.step = step


def save_first_gradient(path: Path) -> None:
    plain = MasterOptimizer.step

    def step(self: MasterOptimizer, *arguments):
        if not path.exists():
            save_file({name: master.grad.clone() for name, master in self.masters.items()}, path)
        return plain(self, *arguments)

    MasterOptimizer.step = step


def child(rank: int, size: int, port: int, folder: Path, arguments: list[str]) -> int:
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    trace(folder / f"{size}-{rank}.jsonl")
    if os.environ.get("WORLD_GRADIENTS") and not rank:
        save_first_gradient(folder / "gradient.safetensors")
    sys.argv = ["ftk", "train", *arguments]
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def main() -> None:
    size, folder, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    folder.mkdir(exist_ok=True, parents=True)
    port, children = free_port(), []
    for rank in range(size):
        if not (pid := os.fork()):
            code = 70
            try:
                code = child(rank, size, port, folder, arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
        print(pid, flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


if __name__ == "__main__":
    main()
