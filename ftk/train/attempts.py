"""Where and why the last attempt at a run on several processes ended: `failure.json` in the run's folder.

Such a run ends with exit code 75 when a process is lost, so that a job queue starts it again. A failure that comes back at the
same step would be tried for ever: it ends with exit code 1 instead.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftk import storage
from ftk.errors import NoProgress, Preempted, ProcessFailed, ProcessLost
from ftk.train import checkpoint
from ftk.train.loop import Trainer
from ftk.train.ranks import Ranks

LOGGER = logging.getLogger("ftk")
FAILURE = "failure.json"
_LOST = "a process ended or did not answer"


class Attempt:
    """One attempt at a run. It knows how the one before it ended, unless that one got further than its failure.

    A process that fails notes why; of those that lose it, one that sees no such note writes that a process was lost.
    """

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.trainer: Trainer | None = None
        """Once it is built."""
        self._path = directory / FAILURE
        self._ranks = ranks
        self._previous: dict[str, Any] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """All: inside is the attempt.

        Raises:
            NoProgress: a process was lost at the step, and in the way, in which the attempt before this one ended.
        """
        if self._ranks.size == 1:
            yield
            return
        try:
            _, self._previous = self._ranks.from_main(None, self._read_previous() if self._ranks.is_main else None)
            yield
        except Exception as error:
            if isinstance(error, Preempted) and not isinstance(error, ProcessLost):
                self._clear()
                raise
            failure = self._note(error)
            if isinstance(error, ProcessLost) and failure["times"] > 1:
                raise NoProgress(_described(failure)) from error
            raise
        self._clear()

    @property
    def _step(self) -> int:
        return self.trainer.step if self.trainer else 0

    def _read_previous(self) -> dict[str, Any] | None:
        """The failure of the last attempt, if no checkpoint is newer."""
        failure = _read(self._path)
        saved = checkpoint.all_of(self._path.parent / "checkpoints")
        return None if failure is None or (saved and int(saved[-1].name) > failure["step"]) else failure

    def _note(self, error: Exception) -> dict[str, Any]:
        """What this attempt ended of, written where the run's folder is in sight; the process that failed says it better."""
        number = self._previous["attempt"] + 1 if self._previous else 1
        noted = _read(self._path)
        is_victim = isinstance(error, (ProcessLost, ProcessFailed))
        if is_victim and noted is not None and noted["attempt"] == number:
            return noted
        reason = _LOST if is_victim else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        failure = {"attempt": number, "step": self._step, "reason": reason, "times": 1}
        if self._previous and _is_same(failure, self._previous):
            failure["times"] = self._previous["times"] + 1
        if self._path.parent.is_dir():
            try:
                storage.commit_json(self._path, failure)
            except OSError as unwritten:  # a full disk may be why the attempt ended
                LOGGER.warning("%s was not written: %s", self._path, unwritten)
        return failure

    def _clear(self) -> None:
        if self._ranks.is_main and (self._previous is None or self._step > self._previous["step"]):
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        noted = storage.read_json(path)
        return {"attempt": int(noted["attempt"]), "step": int(noted["step"]), "reason": str(noted["reason"]),
                "times": int(noted["times"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a note on what was, and no part of the run


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Numbers in a reason (bytes, ports, seconds) may differ."""
    return one["step"] == other["step"] and _without_numbers(one["reason"]) == _without_numbers(other["reason"])


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,]+", "N", text)


def _described(failure: dict[str, Any]) -> str:
    return (
        f"The run ended {failure['times']} times at step {failure['step']} in the same way: {failure['reason']}. Another "
        f"attempt would probably end there too, so this is exit code 1 and not 75. See the messages of the process that ended "
        f"first; if it was only slow, raise train.timeout_seconds. Then the same command goes on from the last checkpoint."
    )
