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

    A process that fails notes why; those that lose it add themselves to that note, or note that a process was lost.
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
            failure = self._noted(error)
            if isinstance(error, ProcessLost) and self._is_repeated(failure):
                raise NoProgress(_described(failure)) from error
            raise
        self._clear()

    @property
    def _step(self) -> int:
        return self.trainer.step if self.trainer else 0

    def _read_previous(self) -> dict[str, Any] | None:
        """The failure of the last attempt; one that a checkpoint is newer than is forgotten."""
        failure = _read(self._path)
        saved = checkpoint.all_of(self._path.parent / "checkpoints")
        if failure is not None and saved and int(saved[-1].name) > failure["step"]:
            self._path.unlink()
            return None
        return failure

    def _noted(self, error: Exception) -> dict[str, Any]:
        """What this attempt ended of, with this process among those that noted it, if the run's folder is in sight."""
        reason = _LOST if _is_of_others(error) else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        number = self._previous["attempt"] + 1 if self._previous else 1
        failure: dict[str, Any] = {"attempt": number, "step": self._step, "reason": reason, "times": 1, "processes": []}
        try:
            # Several processes may be at it.
            with storage.locked(self._path):
                noted = _read(self._path)
                if noted is not None and noted["attempt"] == number and _is_of_others(error):
                    failure = noted  # of the process that failed, which knows better
                failure["processes"].append(self._ranks.rank)
                if self._previous and self._is_repeated(failure):
                    failure["times"] = self._previous["times"] + 1
                storage.commit_json(self._path, failure)
        except OSError as unwritten:
            LOGGER.debug("%s is not written: %s", self._path, unwritten)
        return failure

    def _is_repeated(self, failure: dict[str, Any]) -> bool:
        """Whether the last attempt ended so, too: at the same step, for this process. Numbers in a reason may differ."""
        before = self._previous
        if before is None or before["step"] != failure["step"]:
            return False
        is_noted = self._ranks.rank in before["processes"] or not self._path.exists()
        return is_noted and _without_numbers(before["reason"]) == _without_numbers(failure["reason"])

    def _clear(self) -> None:
        if self._ranks.is_main and (self._previous is None or self._step > self._previous["step"]):
            self._path.unlink(missing_ok=True)


def _is_of_others(error: Exception) -> bool:
    return isinstance(error, (ProcessLost, ProcessFailed))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        noted = storage.read_json(path)
        numbers = {name: int(noted[name]) for name in ("attempt", "step", "times")}
        return {**numbers, "reason": str(noted["reason"]), "processes": [int(rank) for rank in noted["processes"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a note on what was, and no part of the run


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,]+", "N", text)


def _described(failure: dict[str, Any]) -> str:
    return (
        f"The run ended more than once at step {failure['step']} in the same way: {failure['reason']}. Another "
        f"attempt would probably end there too, so this is exit code 1 and not 75. See the messages of the process that ended "
        f"first; if it was only slow, raise train.timeout_seconds. Then the same command goes on from the last checkpoint."
    )
