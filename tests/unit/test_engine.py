"""The worker pool: order, bounds, and what a task that crashes, hangs or swells costs. The local engine over units.

Workers import what they run, so it stands at module level.
"""

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftk.contracts import RejectReason
from ftk.errors import ConfigError, EnvironmentFault
from ftk.pipeline import engine
from ftk.pipeline.engine import WHOLE, JobPart, Lost, WorkerPool, map_units, worker_place

MIB = 2**20


def a_pool(workers: int = 2, seconds: float = 60.0, memory_bytes: int = 2**31) -> WorkerPool:
    return WorkerPool(workers, seconds, memory_bytes)


def square(number: int) -> int:
    return number * number


def square_slowly_at_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def own_process(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def exit_with_seven(_: int) -> None:
    os._exit(7)


def exit_as_if_well(_: int) -> None:
    sys.exit(0)


def die_of_segv(_: int) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def die_of_kill(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_: int) -> None:
    time.sleep(600)


def hang_with_the_interpreter_locked(_: int) -> None:
    re.match("(a+)+$", "a" * 64 + "b")


def swell(_: int) -> None:
    held = []
    for _ in range(40):
        held.append(os.urandom(10 * MIB))
        time.sleep(0.01)
    time.sleep(600)


def do_at_three(act: Callable[[int], None], number: int) -> int:
    if number == 3:
        act(number)
    return number


def die_always(_: int) -> None:
    os._exit(1)


def signal_own_group(number: int) -> int:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), ignored)
    return number


def length(data: bytes) -> int:
    return len(data)


def same(data: Any) -> Any:
    return data


def refuse_at_three(number: int) -> int:
    if number == 3:
        raise ConfigError("no three")
    return number


class TwoArguments(Exception):
    """Its pickle cannot be loaded: an exception is rebuilt from its single message."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} and {right}")


def refuse_with_two_arguments(_: int) -> None:
    raise TwoArguments("fire", "water")


def return_a_generator(_: int) -> Iterator[int]:
    return iter(range(3)) and (number for number in range(3))


_hoard: list[bytes] = []


def keep_much_at_zero(number: int) -> int:
    if number == 0:
        _hoard.append(b"x" * (150 * MIB))
    return os.getpid()


def place_and_process(_: int) -> tuple[int, int]:
    time.sleep(0.1)
    return worker_place(), os.getpid()


def die_until_tried(marks: Path, times: int, number: int) -> int:
    """Units below `times` take their process down, as often as their number says."""
    (marks / f"{number}-{len(list(marks.glob(f'{number}-*')))}").touch()
    if number < times and len(list(marks.glob(f"{number}-*"))) <= number:
        os._exit(3)
    return number


class CannotBeLoaded:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/nowhere/at/all",)


@pytest.fixture(autouse=True)
def workers_start_without_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import the main script, which is pytest's: a tenth of a second each."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    with a_pool(workers) as pool:
        assert list(pool.map(square_slowly_at_first, range(40))) == [number * number for number in range(40)]


def test_no_tasks_start_no_worker() -> None:
    before = multiprocessing.active_children()
    with a_pool() as pool:
        assert list(pool.map(square, [])) == []
        assert not set(multiprocessing.active_children()) - set(before)


def test_one_worker_is_a_process_of_its_own() -> None:
    with a_pool(1) as pool:
        (process,) = set(pool.map(own_process, range(3)))
        assert process != os.getpid()


def test_the_same_processes_serve_several_maps_and_end_with_the_pool() -> None:
    with a_pool(2) as pool:
        first, second = (set(pool.map(own_process, range(20))) for _ in range(2))
        assert len(first) == 2
        assert first == second
    assert_gone(first)


def test_tasks_are_taken_as_they_are_needed() -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    with a_pool(2) as pool:
        results = pool.map(square_slowly_at_first, tasks())
        assert taken == 0
        assert next(results) == 0
        assert taken <= 9


def test_a_map_left_early_leaves_the_pool_usable() -> None:
    with a_pool(2) as pool:
        for result in pool.map(square_slowly_at_first, range(100)):
            assert result == 0
            break
        assert list(pool.map(square, range(5))) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_the_function_arrives_as_it_is_in_its_turn(workers: int) -> None:
    with a_pool(workers) as pool:
        results = pool.map(refuse_at_three, range(8))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConfigError, match="no three") as caught:
            next(results)
        assert str(caught.value) == "no three"
        assert "refuse_at_three" in "".join(caught.value.__notes__)
        assert list(pool.map(square, range(3))) == [0, 1, 4]


def test_an_exception_that_cannot_be_pickled_is_told() -> None:
    with a_pool(1) as pool, pytest.raises(RuntimeError, match="TwoArguments: fire and water"):
        list(pool.map(refuse_with_two_arguments, [1]))


@pytest.mark.parametrize(
    ("function", "task", "error", "match"),
    [
        (lambda number: number, 1, Exception, "lambda"),
        (same, (number for number in range(3)), TypeError, "pickle"),
        (same, CannotBeLoaded(), FileNotFoundError, "nowhere"),
        (return_a_generator, 1, TypeError, "pickle"),
    ],
)
def test_what_cannot_be_pickled_raises_and_loses_no_worker(
    function: Callable[[Any], Any], task: Any, error: type[Exception], match: str
) -> None:
    with a_pool(1) as pool:
        before = list(pool.map(own_process, [0]))
        with pytest.raises(error, match=match):
            list(pool.map(function, [task]))
        assert list(pool.map(own_process, [0])) == before


@pytest.mark.parametrize(
    ("act", "reason", "detail"),
    [
        (exit_with_seven, RejectReason.WORKER_CRASHED, "exit code 7"),
        (exit_as_if_well, RejectReason.WORKER_CRASHED, "exit code 0"),
        (die_of_segv, RejectReason.WORKER_CRASHED, "killed by SIGSEGV"),
        (die_of_kill, RejectReason.WORKER_CRASHED, "killed by SIGKILL"),
        (hang, RejectReason.WORKER_TIMED_OUT, "not done after 0.5 s"),
        (hang_with_the_interpreter_locked, RejectReason.WORKER_TIMED_OUT, "not done after 0.5 s"),
    ],
)
def test_a_task_that_takes_its_worker_down_is_lost_alone(act: Callable[[int], None], reason: RejectReason, detail: str) -> None:
    with a_pool(2, seconds=0.5) as pool:
        results = list(pool.map(functools.partial(do_at_three, act), range(30)))
    assert results[3] == Lost(reason=reason, detail=detail)
    assert [number for number in range(30) if results[number] != number] == [3]


@pytest.mark.parametrize("caller_is_busy", [False, True])
def test_a_task_that_swells_is_lost_alone(caller_is_busy: bool) -> None:
    with a_pool(2, memory_bytes=200 * MIB) as pool:
        results = pool.map(functools.partial(do_at_three, swell), range(20))
        firsts = [next(results) for _ in range(3)]
        if caller_is_busy:
            held = multiprocessing.active_children()
            assert len(held) == 2
            wait_for(lambda: any(not worker.is_alive() for worker in held), 8.0)
        rest = list(results)
    assert firsts == [0, 1, 2]
    assert isinstance(rest[0], Lost)
    assert rest[0].reason is RejectReason.WORKER_OUT_OF_MEMORY
    assert re.fullmatch(r"\d{3} MiB in memory, of 200 allowed", rest[0].detail)
    assert rest[1:] == list(range(4, 20))


def test_memory_that_a_task_leaves_behind_costs_the_next_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the watching thread does not see it before the task is done.
    monkeypatch.setattr(engine, "_POLL_SECONDS", 60.0)
    with a_pool(1, memory_bytes=100 * MIB) as pool:
        first, *others = pool.map(keep_much_at_zero, range(5))
    assert isinstance(first, int)
    assert len(set(others)) == 1
    assert first not in others


def test_the_time_counts_from_the_start_of_the_task() -> None:
    with a_pool(1, seconds=0.5) as pool:
        assert list(pool.map(square_slowly_at_first, [0] * 4)) == [0] * 4


def test_a_result_that_was_not_fetched_in_time_is_not_late() -> None:
    with a_pool(1, seconds=0.3) as pool:
        results = pool.map(square, range(3))
        assert next(results) == 0
        time.sleep(0.8)
        assert list(results) == [1, 4]


def test_every_task_may_crash_and_the_run_goes_on() -> None:
    with a_pool(2) as pool:
        lost = list(pool.map(die_always, range(6)))
        assert lost == [Lost(reason=RejectReason.WORKER_CRASHED, detail="exit code 1")] * 6
        assert list(pool.map(square, range(3))) == [0, 1, 4]


def test_a_worker_that_dies_idle_is_replaced_at_no_loss() -> None:
    with a_pool(2) as pool:
        processes = set(pool.map(own_process, range(10)))
        for process in processes:
            os.kill(process, signal.SIGKILL)
        # Reaped, not only zombies: until then a pipe may still be open.
        wait_for(lambda: not any(map(psutil.pid_exists, processes)), 5.0)
        assert list(pool.map(square, range(10))) == [number * number for number in range(10)]


def test_signals_to_the_process_group_are_left_to_the_parent() -> None:
    with a_pool(1) as pool:
        assert list(pool.map(signal_own_group, range(3))) == [0, 1, 2]


def test_workers_that_never_start_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_serve", die_always)
    with a_pool(2) as pool, pytest.raises(EnvironmentFault, match=r"do not start \(exit code 1; 3 tries\)"):
        list(pool.map(square, range(10)))


def test_a_limit_below_what_an_interpreter_takes_loses_the_task() -> None:
    with a_pool(1, memory_bytes=MIB) as pool:
        (lost,) = pool.map(hang, [0])
    assert isinstance(lost, Lost)
    assert lost.reason is RejectReason.WORKER_OUT_OF_MEMORY


def test_it_works_where_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with a_pool(1) as pool:
        assert list(pool.map(functools.partial(do_at_three, die_of_kill), range(2, 5))) == [
            2,
            Lost(reason=RejectReason.WORKER_CRASHED, detail="killed by SIGKILL"),
            4,
        ]


PARENT = """
import os, signal, sys, time
from ftk.pipeline.engine import WorkerPool

# What a script starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(number):
    with open(os.path.join(sys.argv[1], str(os.getpid())), "w"):
        pass
    if number:
        while True:
            pass
    while len(os.listdir(sys.argv[1])) < 2:
        time.sleep(0.01)
    return number

def suspended():
    with WorkerPool(2, 600.0, 2**31) as pool:
        yield from pool.map(work, [0, 1])

if __name__ == "__main__":
    results = suspended()
    next(results)
    print("both", flush=True)
    if sys.argv[2] == "stay":
        time.sleep(600)
"""


STOPPED = """
import multiprocessing, os, subprocess, time
from ftk.pipeline.engine import WorkerPool

def stop_both(_):
    both = f"{os.getpid()} {multiprocessing.parent_process().pid}"
    subprocess.Popen(["sh", "-c", f"kill -STOP {both} && sleep 1.2 && touch both-stood-still; kill -CONT {both}"])
    time.sleep(0.2)
    time.sleep(0.2)
    return "done"

if __name__ == "__main__":
    with WorkerPool(1, 0.6, 2**31) as pool:
        print(list(pool.map(stop_both, [0])))
"""


def test_time_in_which_all_were_stopped_does_not_count(tmp_path: Path) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    command = [sys.executable, str(script)]
    assert subprocess.run(command, capture_output=True, check=True, text=True, cwd=tmp_path).stdout == "['done']\n"
    assert (tmp_path / "both-stood-still").exists()


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT", "exit"])
def test_workers_die_with_their_parent(tmp_path: Path, end: str) -> None:
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    pids.mkdir()
    command = [sys.executable, str(script), str(pids), "leave" if end == "exit" else "stay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"both\n"
        try:
            if end != "exit":
                parent.send_signal(signal.Signals[end])
            parent.wait(60)
        finally:
            parent.kill()
    processes = {int(file.name) for file in pids.iterdir()}
    try:
        assert_gone(processes)
    finally:
        for process in filter(psutil.pid_exists, processes):
            os.kill(process, signal.SIGKILL)


def test_a_large_payload_is_one_message_each_way_and_ends_the_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = os.urandom(8 * MIB)
    sent, received, waits = [], [], []
    send, receive, wait = connection.Connection.send_bytes, connection.Connection.recv_bytes, connection.wait

    def noted_send(self: Any, message: Any) -> None:
        sent.append(len(message))
        send(self, message)

    def noted_receive(self: Any) -> bytes:
        received.append(len(message := receive(self)))
        return message

    def noted_wait(connections: Any, seconds: float) -> list[Any]:
        waits.append((seconds, ready := wait(connections, seconds)))
        return ready

    with a_pool(1) as pool:
        list(pool.map(length, [b""]))
        monkeypatch.setattr(connection.Connection, "send_bytes", noted_send)
        monkeypatch.setattr(connection.Connection, "recv_bytes", noted_receive)
        monkeypatch.setattr(engine.connection, "wait", noted_wait)
        assert all(result == payload for result in pool.map(same, (payload for _ in range(4))))
        ended_waits = [seconds for seconds, ready in waits if ready]
    for messages in (sent, received):
        assert len(messages) == 4
        assert max(messages) < len(payload) + 1000
    # Each result ends a wait for the worker's pipe; one that is picked up while not waiting was late.
    assert ended_waits == [engine._POLL_SECONDS] * 4


def test_the_local_engine_takes_one_unit_after_another_in_this_process() -> None:
    taken: list[int] = []
    results = map_units("local", own_process, (taken.append(number) or number for number in range(3)), workers=4)
    assert taken == []
    assert next(results) == os.getpid()
    assert taken == [0]
    assert set(results) == {os.getpid()}


def test_with_several_processes_units_run_in_them_and_results_come_in_order() -> None:
    results = list(map_units("local", square_slowly_at_first, range(20), workers=1, processes=2))
    assert results == [number * number for number in range(20)]
    places = list(map_units("local", place_and_process, range(6), workers=1, processes=3))
    assert {place for place, _ in places} == {0, 1, 2}
    assert len(set(places)) == 3, "a place is one process's"
    assert os.getpid() not in {process for _, process in places}


def test_there_are_no_more_processes_than_units_and_none_for_none() -> None:
    before = multiprocessing.active_children()
    assert list(map_units("local", place_and_process, [], workers=1, processes=8)) == []
    assert not set(multiprocessing.active_children()) - set(before)
    found = set(map_units("local", place_and_process, range(2), workers=1, processes=8))
    assert {place for place, _ in found} == {0, 1}
    assert_gone({process for _, process in found})


def test_a_worker_that_takes_a_dead_ones_place_has_its_number() -> None:
    assert worker_place() == 0
    with a_pool(2) as pool:
        first = dict(pool.map(place_and_process, range(2)))
        assert set(first) == {0, 1}
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(first[0]), 5.0)
        second = dict(pool.map(place_and_process, range(2)))
    assert set(second) == {0, 1}
    assert second[1] == first[1]
    assert second[0] != first[0]


def test_a_unit_that_loses_its_process_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = list(map_units("local", functools.partial(die_until_tried, tmp_path, 3), range(6), workers=1, processes=2))
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert Counter(path.name[0] for path in tmp_path.iterdir()) == {"0": 1, "1": 2, "2": 3, "3": 1, "4": 1, "5": 1}
    first, second = (record.getMessage() for record in caplog.records)
    assert "2 units of work lost their process (exit code 3)" in first
    assert "1 units of work lost their process (exit code 3)" in second


def test_a_unit_that_loses_its_process_three_times_is_a_fault_and_the_others_are_kept(tmp_path: Path) -> None:
    results = map_units("local", functools.partial(die_until_tried, tmp_path, 9), [0, 8, 9, 7], workers=1, processes=2)
    done = [next(results), next(results)]
    with pytest.raises(EnvironmentFault, match=r"2 units of work lost their process 3 times \(exit code 3\).*command again"):
        next(results)
    assert sorted(done) == [0, 9]
    assert Counter(path.name[0] for path in tmp_path.iterdir()) == {"0": 1, "8": 3, "9": 1, "7": 3}


def test_an_exception_of_a_unit_is_not_tried_again() -> None:
    results = map_units("local", refuse_at_three, range(2, 8), workers=1, processes=2)
    assert next(results) == 2
    with pytest.raises(ConfigError, match="no three"):
        next(results)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_share_units_without_a_word(count: int) -> None:
    parts = [JobPart.parse(f"{number}/{count}") for number in range(1, count + 1)]
    for unit in range(50):
        assert sum(part.has(unit) for part in parts) == 1
    assert len({part.label for part in parts}) == count
    assert parts[0].has(0)


def test_the_whole_has_every_unit_and_no_label() -> None:
    assert JobPart.parse("1/1") == WHOLE
    assert WHOLE.label == ""
    assert all(WHOLE.has(unit) for unit in range(50))
    assert JobPart.parse("3/8") == JobPart(index=2, count=8)
    assert JobPart.parse("3/8").label == "3-of-8"


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "-1/8", "1/0", "1/", "/8", "a/b", "1/2/3", "1.0/2", " 1/2", "1/-2"])
def test_a_part_that_is_none_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--part {text}: expected I/N with I from 1 to N, for example --part 3/8"):
        JobPart.parse(text)


def test_ray_that_is_not_installed_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "ftk\[ray\]"'):
        list(map_units("ray", square, [1], workers=1))


def assert_gone(processes: set[Any]) -> None:
    def is_gone(process: int) -> bool:
        try:
            return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(lambda: all(map(is_gone, processes)), 2.0)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(0.02)


@pytest.mark.parametrize(("size", "most"), [(0, 9), (400 * MIB, 3), (600 * MIB, 2), (5000 * MIB, 2)])
def test_what_tasks_hold_bounds_how_many_are_in_flight(size, most):
    drawn = yielded = largest = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn, largest
        for number in range(20):
            drawn += 1
            # Those in flight, and the one that is being drawn.
            largest = max(largest, drawn - yielded)
            yield number

    with a_pool(memory_bytes=2000 * MIB) as pool:
        for result in pool.map(square, tasks(), lambda _: size):
            assert result == yielded**2
            yielded += 1
    assert yielded == 20
    assert largest <= most
