"""Saves a checkpoint every so many steps and at the end, and renews the weights in `adapter/`."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftk.errors import TrainingError
from ftk.train import checkpoint
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer
from ftk.train.ranks import Ranks


class Checkpoints:
    """Comes after the recorder, whose rows must be fetched, and found finite, before anything is saved.

    The main process saves; where what is trained is split over the processes, all of them do together.

    Args:
        directory: `checkpoints/` of the run.
        export: writes the weights, as they are in the model now, for a step into a folder of the run.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        recorder: Recorder,
        export: Callable[[int, str], None],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._recorder = recorder
        self._export = export
        self._saved_step = -1

    def on_start(self, trainer: Trainer) -> None:
        """A resumed run has its first checkpoint already; what comes after its commit may have been cut off."""
        self._saved_step = trainer.step
        with _saving(trainer):
            if trainer.step and _takes_part(trainer):
                self._deliver(trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save at every `checkpoint_every`-th step, and the last one: before it is drawn."""
        is_due = result.step % trainer.config.checkpoint_every == 0 or result.step == trainer.config.steps
        if is_due and not self._is_doubtful(trainer):
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step, whether it was the end or a signal's.

        Raises:
            TrainingError: it was the last of several bad steps.
        """
        if self._is_doubtful(trainer):
            raise TrainingError(
                f"Step {trainer.step} is the last of {self._recorder.num_bad_in_a_row} in a row without a finite loss or "
                f"gradient, and is not saved; the last checkpoint is good. Lower train.learning_rate, and run again."
            )
        self.save(trainer)

    def _is_doubtful(self, trainer: Trainer) -> bool:
        """One bad step is its samples' fault. After more in a row the weights may be what is bad: they are not saved."""
        self._recorder.flush(trainer)
        return self._recorder.num_bad_in_a_row > 1

    def save(self, trainer: Trainer) -> None:
        """Save this step, unless it is saved."""
        if self._saved_step == trainer.step:
            return
        self._saved_step = trainer.step
        with self._recorder.paused(trainer), _saving(trainer):
            if _takes_part(trainer):
                self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        self._recorder.commit()
        checkpoint.save_checkpoint(
            self._directory, trainer.step, trainer.num_samples_seen, trainer.optimizer, self._settings, _together(trainer)
        )
        self._deliver(trainer)

    def _deliver(self, trainer: Trainer) -> None:
        with trainer.optimizer.averaged():
            self._export(trainer.step, "adapter")
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        checkpoint.prune(self._directory, trainer.config.keep_last, trainer.config.keep_every, _together(trainer))

    def save_best(self, trainer: Trainer, loss: float) -> None:
        """Save this step as the one with the lowest validation loss so far, and its weights in `best/`."""
        self.save(trainer)
        self.note_best(trainer, trainer.step, loss)

    def note_best(self, trainer: Trainer, step: int, loss: float) -> None:
        """Note that a saved step is the best so far; the weights in `best/` are renewed if it is the one that is loaded."""
        with self._recorder.paused(trainer), _saving(trainer):
            if _takes_part(trainer):
                self._note_best(trainer, step, loss)

    def _note_best(self, trainer: Trainer, step: int, loss: float) -> None:
        if step == trainer.step:
            with trainer.optimizer.averaged():
                self._export(step, "best")
        # After the weights: a note that is missing is made again, and they with it.
        if trainer.ranks.is_main:
            checkpoint.mark_best(self._directory, step, loss)
        self._prune(trainer)

    def noted_best(self) -> tuple[int, float] | None:
        """The best step so far and its loss, as they were noted."""
        return checkpoint.read_best(self._directory)


def _takes_part(trainer: Trainer) -> bool:
    return trainer.ranks.is_main or trainer.optimizer.is_split


def _saving(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """The others wait for the main process as long as it takes; those that save together meet while they write."""
    return contextlib.nullcontext() if trainer.optimizer.is_split else trainer.ranks.unhurried()


def _together(trainer: Trainer) -> Ranks:
    """Those that save together: all where each has a part of what is trained, else this process alone."""
    return trainer.ranks if trainer.optimizer.is_split else Ranks()
