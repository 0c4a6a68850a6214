"""Runs a pure function over tasks on worker processes, and gives the results in the order of the tasks."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ftk.errors import EnvironmentFault

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 4


def ordered_map(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results in task order; at most a few tasks a worker are in flight, so memory stays constant.

    One worker means this process itself. Processes are spawned, not forked: they hold nothing of this one's threads.

    Raises:
        EnvironmentFault: a worker process died (out of memory, a crash in a decoder).
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) >= workers * _IN_FLIGHT_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise EnvironmentFault(
                "A worker process died (out of memory, or a crash while decoding). Finished shards are kept: run the "
                "command again, with a smaller data.workers if memory was short."
            ) from None
        finally:
            for future in pending:
                future.cancel()
