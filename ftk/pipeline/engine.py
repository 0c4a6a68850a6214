"""Where the work runs: tasks on supervised processes of this machine, units of work here or on a Ray cluster.

A unit is large (a shard) and must be idempotent; a task is small (an image) and may crash, hang or swell at no cost but its
own. The function and its tasks are pickled, so the function stands at module level.
"""

import atexit
import importlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import psutil

from ftk.contracts import RejectReason
from ftk.errors import ConfigError, EnvironmentFault

LOGGER = logging.getLogger("ftk")

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 4
_POLL_SECONDS = 0.2
_START_SECONDS = 120.0
_EXIT_SECONDS = 2.0
_MAX_FAILED_STARTS = 3
_RAY_RETRIES = 3
# What a worker is at, where it is not the number of a task.
_IDLE = -1
_STARTING = -2
# A signal to the whole process group must not turn tasks into crashes: the parent alone decides, and workers die with it.
_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}
_UNIT_TRIES = 3

_place = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Stands for the result of a task whose worker crashed, hung or outgrew its memory."""

    reason: RejectReason
    detail: str


class WorkerPool:
    """A fixed number of processes that survive whatever a task does to them; a context manager, for several `map` calls.

    Every worker is a process of its own, also when there is only one, and starts when the first task needs it. It holds one
    task at a time, so what kills it costs that task alone; a fresh process takes its place. Workers see the environment
    variables that this process had when it first started one.

    Args:
        workers: how many processes.
        seconds: how long a task may take, from its start, give or take half a second; time in which this process is
            stopped (Ctrl-Z, a suspended job) does not count.
        memory_bytes: how much resident memory, shared pages included, a worker may hold; polled, so that a fast task may
            pass it for a moment. A worker that is left with more after its task is replaced, at no loss.
    """

    def __init__(self, workers: int, seconds: float, memory_bytes: int) -> None:
        self._count = workers
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._context = _process_context()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        # Seconds that the watching thread has seen pass.
        self._clock = 0.0
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        # A generator that holds a pool may be left suspended: without this, the exit of multiprocessing waits for workers
        # which ignore its SIGTERM.
        atexit.register(self._close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        atexit.unregister(self._close)
        self._close()

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int] = lambda _: 0
    ) -> Iterator[Result | Lost]:
        """Results in task order; at most a few tasks a worker are in flight, so memory stays constant.

        Args:
            size: how many bytes this process holds for a task. Those in flight hold no more than half of what a worker may,
                or there is one alone.

        An exception of the function is raised here as it is, in its task's turn, with the worker's traceback as a note; so
        is one that keeps the function, a task or a result from being pickled. One `map` at a time; one that is left before
        its end kills the workers that are still at its tasks.

        Raises:
            EnvironmentFault: worker processes cannot be started.
        """
        assert self._watcher.is_alive(), "a pool works inside its `with` block"
        assert not self._busy(), "one map at a time"
        numbered = enumerate(tasks)
        following = next(numbered, None)
        outcomes: dict[int, tuple[bool, Any]] = {}
        position = 0
        sizes: deque[int] = deque()
        try:
            while following is not None or outcomes or self._busy():
                at_work = any(worker.task != _IDLE for worker in self._workers)
                self._collect(outcomes, wait=at_work and position not in outcomes)
                # Before a result is yielded, so that workers have work while the caller is at it.
                while following and self._has_room(sizes, following[1], size) and self._give(function, following, position):
                    sizes.append(size(following[1]))
                    following = next(numbered, None)
                if position in outcomes:
                    succeeded, value = outcomes.pop(position)
                    position += 1
                    sizes.popleft()
                    if not succeeded:
                        raise value
                    yield value
        finally:
            for worker in self._busy():
                self._discard(worker)

    def _busy(self) -> list["_Worker"]:
        return [worker for worker in self._workers if worker.task >= 0]

    def _has_room(self, sizes: Collection[int], task: Task, size: Callable[[Task], int]) -> bool:
        """Whether this process may hold the task's bytes beside those of the tasks in flight."""
        return not sizes or sum(sizes) + size(task) <= self._memory_bytes // 2

    def _give(self, function: Callable[[Task], Result], numbered: tuple[int, Task], position: int) -> bool:
        """Hand a task to an idle worker, if there is one and the task is not too far ahead of the `position` awaited."""
        number, task = numbered
        if number >= position + self._count * _IN_FLIGHT_PER_WORKER:
            return False
        worker = self._idle_worker()
        if worker is None:
            return False
        message = ForkingPickler.dumps((function, task))
        worker.task = number
        # The clock may be about to tick.
        worker.deadline = self._clock + self._seconds + _POLL_SECONDS
        with suppress(OSError):  # it has just died: the end of its pipe will say so
            worker.connection.send_bytes(message)
        return True

    def _idle_worker(self) -> "_Worker | None":
        while len(self._workers) < self._count:
            place = min(set(range(self._count)) - {worker.place for worker in self._workers})
            try:
                self._workers.append(_Worker(self._context, self._clock + _START_SECONDS, place))
            except (OSError, EOFError) as error:
                raise EnvironmentFault(f"A worker process cannot be started: {error!r}. Try a smaller data.workers.") from error
        return next((worker for worker in self._workers if worker.task == _IDLE), None)

    def _collect(self, outcomes: dict[int, tuple[bool, Any]], *, wait: bool) -> None:
        """Take in what workers have sent, and count out those that died, idle ones too, or are past their deadline."""
        ready = connection.wait([worker.connection for worker in self._workers], _POLL_SECONDS if wait else 0)
        for worker in tuple(self._workers):
            if worker.connection in ready:
                self._receive(worker, outcomes)
            elif worker.task != _IDLE and worker.deadline < self._clock:
                limit = _START_SECONDS if worker.task == _STARTING else self._seconds
                self._lose(worker, RejectReason.WORKER_TIMED_OUT, f"not done after {limit:g} s", outcomes)

    def _receive(self, worker: "_Worker", outcomes: dict[int, tuple[bool, Any]]) -> None:
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, OSError):
            if worker.excess:
                self._lose(worker, RejectReason.WORKER_OUT_OF_MEMORY, worker.excess, outcomes)
            else:
                self._lose(worker, RejectReason.WORKER_CRASHED, _end_of(worker), outcomes)
            return
        task, worker.task = worker.task, _IDLE
        if task == _STARTING:
            self._failed_starts = 0
            return
        outcomes[task] = ForkingPickler.loads(message)
        if worker.excess or worker.resident_bytes() > self._memory_bytes:
            # The next task must not pay for what this one left behind.
            self._discard(worker)

    def _lose(self, worker: "_Worker", reason: RejectReason, detail: str, outcomes: dict[int, tuple[bool, Any]]) -> None:
        self._discard(worker)
        if worker.task >= 0:
            outcomes[worker.task] = (True, Lost(reason=reason, detail=detail))
        elif worker.task == _STARTING:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise EnvironmentFault(
                    f"Worker processes do not start ({detail}; {self._failed_starts} tries). Their own messages are above; a "
                    'script that starts workers needs `if __name__ == "__main__":`.'
                )

    def _discard(self, worker: "_Worker") -> None:
        # No join: a process that hangs in a file system outlives SIGKILL, and must not hold up the others.
        self._workers.remove(worker)
        worker.connection.close()
        worker.kill()

    def _watch(self) -> None:
        """Count the seconds, and kill workers that outgrow their memory even while the caller is busy elsewhere."""
        while not self._closed.wait(_POLL_SECONDS):
            self._clock += _POLL_SECONDS
            for worker in tuple(self._workers):
                resident = worker.resident_bytes()
                if resident > self._memory_bytes:
                    worker.excess = f"{resident >> 20} MiB in memory, of {self._memory_bytes >> 20} allowed"
                    worker.kill()

    def _close(self) -> None:
        self._closed.set()
        self._watcher.join()
        for worker in tuple(self._workers):
            self._discard(worker)


class _Worker:
    """A worker process, the pipe to it, and what it is at."""

    def __init__(self, context: ForkServerContext | SpawnContext, deadline: float, place: int) -> None:
        self.place = place
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place), daemon=True)
        self.process.start()
        # Only the worker holds its end now, so its death is the end of the pipe.
        theirs.close()
        self.task = _STARTING
        self.deadline = deadline
        self.excess = ""

    def resident_bytes(self) -> int:
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def kill(self) -> None:
        # The number of a process that is gone may be another's by now.
        if self.process.is_alive():
            self.process.kill()


def _process_context() -> ForkServerContext | SpawnContext:
    """Fork servers make a worker in milliseconds and, unlike a fork, without this process's threads and locks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftk.pipeline.images", __name__])
    return context


def _end_of(worker: _Worker) -> str:
    """How a process ended that has closed its pipe."""
    worker.process.join(_EXIT_SECONDS)
    code = worker.process.exitcode
    if code is None:
        return "closed its pipe"
    return f"exit code {code}" if code >= 0 else f"killed by {_SIGNAL_NAMES.get(-code, f'signal {-code}')}"


def _serve(parent: "connection.Connection[Any, Any]", place: int) -> None:
    """The life of a worker: say that it is there, then answer messages until the parent is gone."""
    global _place
    _place = place
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        parent.send_bytes(b"")
        while True:
            parent.send_bytes(_answer(parent.recv_bytes()))


def worker_place() -> int:
    """The number of this process among the workers of its pool, from 0: which GPU is its own. 0 outside of a pool."""
    return _place


def _die_with_parent() -> None:
    """End a worker that is at a task, and so does not see the end of its pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(message: bytes) -> memoryview:
    """The pickled pair of whether the task succeeded, and its result or exception."""
    try:
        function, task = ForkingPickler.loads(message)
        return ForkingPickler.dumps((True, function(task)))
    except Exception as error:  # whatever it is, it is the caller's
        trace = traceback.format_exc()
        error.add_note(f"In a worker process:\n{trace}")
        try:
            pickled = ForkingPickler.dumps((False, error))
            ForkingPickler.loads(pickled)
        except Exception:  # exceptions with several arguments often cannot be rebuilt
            return ForkingPickler.dumps((False, RuntimeError(f"A worker raised what cannot be pickled:\n{trace}")))
        return pickled


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPart:
    """One machine's share of a job array: the units whose number leaves `index` (from 0) when divided by `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "JobPart":
        """From I/N, where I counts from 1."""
        first, _, last = text.partition("/")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"--part {text}: expected I/N with I from 1 to N, for example --part 3/8")
        return cls(index=int(first) - 1, count=int(last))

    def has(self, unit: int) -> bool:
        """Whether a unit is this part's to make."""
        return unit % self.count == self.index

    @property
    def label(self) -> str:
        """The name of this part's lock; empty for the whole."""
        return f"{self.index + 1}-of-{self.count}" if self.count > 1 else ""


WHOLE = JobPart(index=0, count=1)


def map_units(
    engine: Literal["local", "ray"],
    function: Callable[[Task], Result],
    units: Iterable[Task],
    *,
    workers: int,
    processes: int = 1,
    gpu: bool = False,
) -> Iterator[Result]:
    """The function's results over units of work: one after another in this process, or many at once in others.

    Units are taken as they are needed. On Ray they run in any order, and each reserves `workers` CPUs, and one GPU with
    `gpu` where the cluster has any. Locally, with several `processes`, each unit runs in one of these (`worker_place` tells
    which). A unit whose node or process dies is run again, on Ray possibly while a first attempt is still alive: the
    function must be idempotent, and its result must say which unit it is of. The cluster is the one that is connected to,
    that of RAY_ADDRESS, or one that runs on this machine; else, and where RAY_ADDRESS is `local`, one that is started here
    and shut down at the end.

    Raises:
        ConfigError: Ray is not installed.
        EnvironmentFault: no cluster answers at RAY_ADDRESS, or a unit's process died again and again.
    """
    if engine == "ray":
        yield from _map_on_ray(_import_ray(), function, units, workers, gpu)
    elif processes > 1:
        yield from _map_in_processes(function, list(units), processes)
    else:
        for unit in units:
            yield function(unit)


def _map_in_processes(function: Callable[[Task], Result], units: list[Task], processes: int) -> Iterator[Result]:
    with WorkerPool(min(processes, len(units) or 1), math.inf, sys.maxsize) as pool:
        for attempt in range(1, _UNIT_TRIES + 1):
            lost = []
            for unit, result in zip(units, pool.map(function, units), strict=True):
                if isinstance(result, Lost):
                    lost.append((unit, result))
                else:
                    yield result
            if not lost:
                return
            LOGGER.warning("%d units of work lost their process (%s); try %d", len(lost), lost[0][1].detail, attempt)
            units = [unit for unit, _ in lost]
    raise EnvironmentFault(
        f"{len(units)} units of work lost their process {_UNIT_TRIES} times ({lost[0][1].detail}). "
        "Finished units are kept: mend the cause, often too little memory, and run the command again."
    )


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ConfigError('data.engine is ray, but Ray is not installed. Run: pip install "ftk[ray]"') from error


def _map_on_ray(
    ray: Any, function: Callable[[Task], Result], units: Iterable[Task], workers: int, gpu: bool
) -> Iterator[Result]:
    # Ray prints what befalls its nodes on stdout, which is for the report alone.
    with redirect_stdout(sys.stderr), _cluster(ray, workers):
        _warn_if_too_wide(ray, workers)
        num_gpus = 1 if gpu and ray.cluster_resources().get("GPU", 0) else 0
        remote = ray.remote(num_cpus=workers, num_gpus=num_gpus, max_retries=_RAY_RETRIES)(_call)
        pending: list[Any] = []
        try:
            for unit in units:
                pending.append(remote.remote(function, unit))
                while len(pending) >= _ray_window(ray, workers):
                    yield _next_result(ray, pending)
            while pending:
                yield _next_result(ray, pending)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def _call(function: Callable[[Task], Result], unit: Task) -> Result:
    return function(unit)


@contextmanager
def _cluster(ray: Any, workers: int) -> Iterator[None]:
    """A connection to a cluster; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    try:
        _connect(ray, workers)
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any, workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS") or "auto"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        LOGGER.info("Looking for a Ray cluster (address: %s); Ray tries for some minutes when none answers there.", address)
        try:
            ray.init(address=address, **quiet)
            return
        except ConnectionError as error:
            if address != "auto":
                raise EnvironmentFault(f"No Ray cluster answers at RAY_ADDRESS {address}: {error}") from error
    LOGGER.info("Starting a Ray cluster on this machine, for this run: no other was found or asked for.")
    ray.init(address="local", num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False, **quiet)


def _warn_if_too_wide(ray: Any, workers: int) -> None:
    widest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if workers > widest:
        LOGGER.warning(
            "No Ray node has the %d CPUs of data.workers now (at most %g): waiting for one. Without autoscaling, stop and "
            "lower data.workers.",
            workers,
            widest,
        )


def _ray_window(ray: Any, workers: int) -> int:
    """Twice as many units as run at once; asked anew each time, because clusters grow and shrink."""
    return max(2, 2 * int(ray.cluster_resources().get("CPU", 0) // workers))


def _next_result(ray: Any, pending: list[Any]) -> Any:
    """The result of whichever unit is done first, which leaves `pending`."""
    (reference,), pending[:] = ray.wait(pending)
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, ray.exceptions.RayError):
            raise EnvironmentFault(
                f"Ray gave up on a unit of work: {cause}\n"
                f"A unit whose process or node dies is tried {1 + _RAY_RETRIES} times; every node needs the same ftk "
                "installed. Finished units are kept: run the command again."
            ) from error
        # As the local engine would raise it; what it is from is the traceback of the other machine.
        raise cause from error
