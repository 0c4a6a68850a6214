"""Runs `ftk train` on several processes of this machine, as a launcher would.

Every process writes FOLDER/SIZE-RANK.jsonl: step by step the draws of its micro-batches, as they were handed to the loop. With
WORLD_GRADIENTS set, the main one saves the gradient of its first step there. With WORLD_PICTURE_SECONDS each picture takes so
long; with WORLD_DIES_AT=STEP process 1 ends in the middle of the update after that step.
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

import killing


class World:
    """Processes that train together: forks of a server that has imported what they need."""

    def __init__(self, size: int, folder: Path, *arguments: object, **environment: str) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        shared = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_FOLDER": str(folder),
            **environment,
        }  # fmt: skip
        self.runs = [
            killing.server().start(
                "train", *arguments, begin="world", environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(size)
        ]
        self.pids = [run.pid for run in self.runs]

    @property
    def is_running(self) -> bool:
        """Whether a process has not ended yet."""
        return any(run.is_running for run in self.runs)

    def end(self, timeout: float = 120) -> tuple[list[int], str]:
        """The exit codes, and what was said."""
        codes = [run.wait(timeout) for run in self.runs]
        err = "".join(run.err for run in self.runs)
        assert "Traceback" not in err, err
        return codes, err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin() -> None:
    """In a process of a world: note what each step hands to the loop."""
    size, rank, folder = os.environ["WORLD_SIZE"], os.environ["RANK"], Path(os.environ["WORLD_FOLDER"])
    trace(folder / f"{size}-{rank}.jsonl")
    if os.environ.get("WORLD_GRADIENTS") and rank == "0":
        save_first_gradient(folder / "gradient.safetensors")
    if seconds := os.environ.get("WORLD_PICTURE_SECONDS"):
        draw_slowly(float(seconds))
    if (step := os.environ.get("WORLD_DIES_AT")) and rank == "1":
        die_at(int(step))


def trace(path: Path) -> None:
    from ftk.train.data import Loader, Step
    from ftk.train.order import share

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
    from safetensors.torch import save_file

    from ftk.train.optim import MasterOptimizer

    plain = MasterOptimizer.step

    def step(self: MasterOptimizer, *arguments):
        if not path.exists():
            save_file({name: master.grad.clone() for name, master in self.masters.items()}, path)
        return plain(self, *arguments)

    MasterOptimizer.step = step


def draw_slowly(seconds: float) -> None:
    from ftk.train import drawing

    plain = drawing.generate

    def generate(*arguments):
        time.sleep(seconds)
        return plain(*arguments)

    drawing.generate = generate


def die_at(step: int) -> None:
    from ftk.train.loop import Trainer

    plain = Trainer.update

    def update(self: Trainer, *arguments):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *arguments)

    Trainer.update = update
