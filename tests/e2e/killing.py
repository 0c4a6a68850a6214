"""Runs ftk commands in forks of one process, and stops them at the n-th touch of the disk; at none, it counts the touches.

A touch is the middle of a write, and both sides of an fsync, a rename and a removal. `killing.py serve` answers requests on
its standard input, each in a fork of itself: what takes seconds to import is imported once.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ftk import storage
from ftk.cli import app

TOUCHED = ("fsync", "replace", "rename", "unlink", "rmdir")
SLOW_IMPORTS = (
    "ftk.cache.stage",
    "ftk.cache.gc",
    "ftk.cache.verify",
    "ftk.pipeline.stage",
    "ftk.train.stage",
    "ftk.methods.lora",
    "peft",
    "diffusers.optimization",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2.tokenization_qwen2",
)

point, number, touches = 0, signal.SIGKILL, 0


def touch():
    global touches
    touches += 1
    if touches == point:
        os.kill(os.getpid(), number)


def around(function):
    def wrapped(*arguments, **options):
        touch()
        result = function(*arguments, **options)
        touch()
        return result

    return wrapped


class TornFile:
    """A file in which the first half of every write is there before the second."""

    def __init__(self, file, between):
        self._file, self._between = file, between

    def write(self, data):
        data = memoryview(data).cast("B")
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._between()
        self._file.write(data[half:])
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def torn(committing, between):
    """`storage.committing`, with a call in the middle of every write."""

    @contextlib.contextmanager
    def wrapped(path):
        with committing(path) as file:
            yield TornFile(file, between)

    return wrapped


def run(command, arguments):
    """Run a command; prints how often it touched the disk."""
    storage.committing = torn(storage.committing, touch)
    for name in TOUCHED:
        setattr(os, name, around(getattr(os, name)))
    sys.argv = ["ftk", command, *arguments]
    try:
        app.main()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        print(touches)


def serve():
    """Answer `start` and `wait` requests, a line of JSON each."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    # Forks share what is imported, and do not search it for garbage.
    gc.freeze()
    sys.modules["ftk.cache.encode"].speed = lambda *_: 1e10
    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(**request["start"]) if "start" in request else _wait(**request["wait"])
        print(json.dumps(answer), flush=True)


def _start(command, arguments, at, by, output, environment, begin):
    global point, number
    child = os.fork()
    if child:
        return child
    point, number = at, by
    os.environ |= environment
    code = 1
    try:
        for descriptor, path in enumerate((os.devnull, f"{output}.out", f"{output}.err")):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
        if begin:
            importlib.import_module(begin).begin()
        run(command, arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child, seconds):
    """How a fork ended, or None when it was stopped."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WUNTRACED | os.WNOHANG)
        if ended:
            return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


@dataclass
class Run:
    """A command that runs in a fork."""

    pid: int
    output: Path
    ask: Callable
    code: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet, or was stopped."""
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def wait(self, seconds: float = 120.0) -> int | None:
        """The exit code, negative when killed; None when it was stopped by `SIGSTOP`."""
        self.code = self.ask(wait={"child": self.pid, "seconds": seconds})
        return self.code

    @property
    def out(self) -> str:
        return Path(f"{self.output}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.output}.err").read_text()

    @property
    def touches(self) -> int:
        return int(self.out.split()[-1])

    @property
    def report(self) -> dict:
        return json.loads(self.out.rpartition("}")[0] + "}")


@dataclass
class Server:
    """Starts commands in forks of one process; `folder` keeps what they print."""

    folder: Path
    count: int = 0
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, command, *arguments, at: int = 0, by: int = signal.SIGKILL, begin: str = "", environment: Mapping[str, str] = {}
    ) -> Run:
        """Start a command that gets the signal `by` at touch `at` of the disk; at none when 0.

        `begin` names a module whose function of that name is called first, with `environment` set.
        """
        self.count += 1
        output = self.folder / f"{self.count:04d}-{command}"
        given = [str(argument) for argument in arguments]
        request = {"command": command, "arguments": given, "at": at, "by": int(by), "output": str(output)}
        return Run(self.ask(start={**request, "begin": begin, "environment": dict(environment)}), output, self.ask)

    def run(self, command, *arguments, at: int = 0) -> Run:
        """Run a command to its end, or to its death at touch `at`."""
        started = self.start(command, *arguments, at=at)
        started.wait()
        return started

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@functools.cache
def server() -> Server:
    """The one that all tests of this process share."""
    folder = tempfile.TemporaryDirectory(prefix="ftk-forks-")
    one = Server(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(one.close)
    return one


# Workers import this file too, and are not to be killed.
if __name__ == "__main__":
    assert sys.argv[1:] == ["serve"]
    serve()
