import json

import pytest

from ftk.errors import NoProgress, Preempted, ProcessLost
from ftk.train import attempts
from ftk.train.ranks import Ranks


class Trainer:
    def __init__(self, step):
        self.step = step


@pytest.fixture(autouse=True)
def _one_process_stands_for_all(monkeypatch):
    monkeypatch.setattr(Ranks, "from_main", lambda self, tensors, facts=None: ({}, facts))


def ended(directory, step, error=None, rank=0):
    """How an attempt ends that gets as far as `step`, and there meets an error."""
    attempt = attempts.Attempt(directory, Ranks(rank=rank, size=2))
    try:
        with attempt.watched():
            attempt.trainer = Trainer(step)
            if error is not None:
                raise error
    except Exception as raised:
        return type(raised)
    return None


def test_the_same_failure_at_the_same_step_is_no_reason_to_try_again(tmp_path):
    lost = ProcessLost("gone")
    assert [ended(tmp_path, step, lost) for step in (4, 7, 7, 4)] == [ProcessLost, ProcessLost, NoProgress, ProcessLost]
    assert json.loads((tmp_path / "failure.json").read_text())["attempt"] == 4


def test_the_note_of_the_process_that_failed_counts(tmp_path):
    for port in (1, 2):
        previous = attempts._read(tmp_path / "failure.json")
        for rank, error in ((1, ValueError(f"no answer at port {port}")), (0, ProcessLost("gone"))):
            attempt = attempts.Attempt(tmp_path, Ranks(rank=rank, size=2))
            attempt._previous, attempt.trainer = previous, Trainer(5)
            noted = attempt._noted(error)
        assert (noted["reason"], noted["processes"]) == (f"ValueError: no answer at port {port}", [1, 0])
        assert attempt._is_repeated(noted) == (port == 2)


@pytest.mark.parametrize("step", [3, 9])
def test_a_stop_by_a_signal_forgets_a_failure_that_it_got_past(tmp_path, step):
    ended(tmp_path, 5, ProcessLost("gone"))
    assert ended(tmp_path, step, Preempted("saved")) is Preempted
    assert (tmp_path / "failure.json").exists() == (step == 3)


def test_a_newer_checkpoint_is_progress(tmp_path):
    ended(tmp_path, 5, ProcessLost("gone"))
    (tmp_path / "checkpoints/00000006").mkdir(parents=True)
    assert ended(tmp_path, 5, ProcessLost("gone")) is ProcessLost
    assert ended(tmp_path, 9) is None
    assert not (tmp_path / "failure.json").exists()
