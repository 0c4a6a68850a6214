"""The engine: order, bounds and faults, whatever the number of workers.

Workers are spawned, so what they run stands at module level.
"""

import os
import time
from collections.abc import Iterator

import pytest

from ftk.errors import EnvironmentFault
from ftk.pipeline.engine import ordered_map


def square_slowly_at_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def own_process(_: int) -> int:
    return os.getpid()


def die_at_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def refuse(number: int) -> int:
    raise ValueError(f"no {number}")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(ordered_map(square_slowly_at_first, range(20), workers)) == [number * number for number in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_tasks_give_no_results(workers: int) -> None:
    assert list(ordered_map(square_slowly_at_first, [], workers)) == []


def test_one_worker_is_this_process_and_two_are_not() -> None:
    assert set(ordered_map(own_process, range(3), 1)) == {os.getpid()}
    assert os.getpid() not in set(ordered_map(own_process, range(3), 2))


def test_a_dead_worker_is_an_environment_fault() -> None:
    with pytest.raises(EnvironmentFault, match=r"worker process died.*data\.workers"):
        list(ordered_map(die_at_three, range(30), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_the_function_arrives_as_it_is(workers: int) -> None:
    with pytest.raises(ValueError, match="no 0"):
        list(ordered_map(refuse, range(3), workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = ordered_map(square_slowly_at_first, tasks(), workers)
    assert next(results) == 0
    assert taken <= 8
    results.close()  # type: ignore[attr-defined]
