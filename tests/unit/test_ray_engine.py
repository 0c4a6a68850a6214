"""The Ray engine: as the local one, on a cluster of three nodes that are processes of this machine."""

import functools
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftk.contracts import RejectReason
from ftk.errors import ConfigError, EnvironmentFault
from ftk.pipeline.engine import Lost, WorkerPool, map_units

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is not installed; run: pip install "ftk[ray]"'),
]


def die_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def with_a_pool(unit: int) -> tuple[int, list[int | Lost]]:
    with WorkerPool(2, 30.0, 2**31) as pool:
        return unit, list(pool.map(die_at_two, range(unit, unit + 3)))


def refuse_one(unit: int) -> int:
    if unit == 1:
        raise ConfigError("no one")
    return unit


def same(unit: int) -> int:
    return unit


def hang_on_the_doomed_node(directory: Path, unit: int) -> int:
    import ray

    node = ray.get_runtime_context().get_node_id()
    doomed = (directory / "doomed").read_text()
    (directory / f"{unit}-{node}").touch()
    # The other node goes on once this one has a unit: it could be through with all of them before that.
    while node == doomed or not list(directory.glob(f"*-{doomed}")):
        time.sleep(0.1)
    return unit


def end_own_process(directory: Path, unit: int) -> int:
    (directory / f"{unit}-{time.time_ns()}").touch()
    os._exit(1)


def hang_or_refuse(directory: Path, unit: int) -> int:
    if unit == 1:
        while not list(directory.iterdir()):
            time.sleep(0.02)
        raise ConfigError("enough")
    with WorkerPool(1, 600.0, 2**31) as pool:
        return len(list(pool.map(functools.partial(note_pid_and_hang, directory), [unit])))


def note_pid_and_hang(directory: Path, _: int) -> None:
    (directory / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.usefixtures("ray_connection")
def test_a_connection_that_was_there_is_used_and_kept() -> None:
    import ray

    assert sorted(map_units("ray", abs, range(4), workers=1)) == [0, 1, 2, 3]
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_connection")
def test_an_error_of_ours_comes_out_as_itself() -> None:
    with pytest.raises(ConfigError, match="no one") as caught:
        list(map_units("ray", refuse_one, range(4), workers=1))
    assert type(caught.value) is ConfigError
    assert str(caught.value) == "no one"


@pytest.mark.usefixtures("ray_connection")
def test_units_are_taken_as_they_are_needed() -> None:
    taken = 0

    def units() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = map_units("ray", same, units(), workers=2)
    assert taken == 0
    next(results)
    # Twice the two that fit on two nodes.
    assert taken == 4
    results.close()  # type: ignore[attr-defined]


@pytest.mark.campaign
@pytest.mark.usefixtures("ray_connection")
def test_a_unit_whose_process_dies_again_and_again_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"(?s)gave up on a unit of work.*tried 4 times"):
        list(map_units("ray", functools.partial(end_own_process, tmp_path), [0], workers=1))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.campaign
@pytest.mark.usefixtures("ray_connection")
def test_units_that_are_left_behind_end_with_their_workers(tmp_path: Path) -> None:
    """Of two units one fails while the other's worker hangs."""
    with pytest.raises(ConfigError, match="enough"):
        list(map_units("ray", functools.partial(hang_or_refuse, tmp_path), range(2), workers=2))
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    end = time.monotonic() + 60.0
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("ray_connection")
def test_every_unit_is_done_when_a_node_is_lost(ray_cluster: Any, ray_node: dict[str, Any], tmp_path: Path) -> None:
    node = next(iter(ray_cluster.worker_nodes))
    (tmp_path / "doomed").write_text(node.node_id)

    def lose() -> None:
        while not list(tmp_path.glob(f"*-{node.node_id}")):
            time.sleep(0.02)
        ray_cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    results = sorted(map_units("ray", functools.partial(hang_on_the_doomed_node, tmp_path), range(16), workers=1))
    thread.join()
    ray_cluster.add_node(**ray_node)
    assert results == list(range(16))
    # What the lost node had begun was begun again on the other.
    assert len(list(tmp_path.glob("*-*"))) > 16


# Last: whoever connects waits for new workers.


@pytest.mark.usefixtures("no_ray_connection")
def test_results_are_those_of_the_local_engine_and_a_pool_works_in_a_unit(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    units = range(4)
    local = list(map_units("local", with_a_pool, units, workers=2))
    assert sorted(map_units("ray", with_a_pool, units, workers=2)) == local
    assert local[0] == (0, [0, 1, Lost(reason=RejectReason.WORKER_CRASHED, detail="killed by SIGKILL")])
    assert not ray.is_initialized()


@pytest.mark.usefixtures("no_ray_connection")
def test_a_cluster_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    # It takes minutes to give up.
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(EnvironmentFault, match="RAY_ADDRESS nowhere:6379: nobody there"):
        list(map_units("ray", abs, range(3), workers=1))


@pytest.mark.campaign
@pytest.mark.usefixtures("no_ray_connection")
def test_a_cluster_is_started_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    # Not the one of this file, nor any other that runs on this machine.
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert sorted(map_units("ray", abs, range(3), workers=4)) == [0, 1, 2]
    assert not ray.is_initialized()
