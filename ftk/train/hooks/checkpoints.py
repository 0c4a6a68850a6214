"""Saves a checkpoint every so many steps and at the end, and renews the weights in `adapter/`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftk.train import checkpoint
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer


class Checkpoints:
    """Comes after the recorder, whose rows must be fetched, and found finite, before anything is saved.

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
        """A resumed run has its first checkpoint already."""
        self._saved_step = trainer.step

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save at every `checkpoint_every`-th step."""
        if result.step % trainer.config.checkpoint_every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step, whether it was the end or a signal's."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save this step, unless it is saved."""
        if self._saved_step == trainer.step:
            return
        self._saved_step = trainer.step
        with self._recorder.paused(trainer):
            if trainer.ranks.is_main:
                self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        self._recorder.commit()
        checkpoint.save_checkpoint(self._directory, trainer.step, trainer.num_samples_seen, trainer.optimizer, self._settings)
        with trainer.optimizer.averaged():
            self._export(trainer.step, "adapter")
        checkpoint.prune(self._directory, trainer.config.keep_last, trainer.config.keep_every)

    def save_best(self, trainer: Trainer, loss: float) -> None:
        """Save this step as the one with the lowest validation loss so far, and its weights in `best/`."""
        self.save(trainer)
        if trainer.ranks.is_main:
            checkpoint.mark_best(self._directory, trainer.step, loss)
            with self._recorder.paused(trainer), trainer.optimizer.averaged():
                self._export(trainer.step, "best")
            checkpoint.prune(self._directory, trainer.config.keep_last, trainer.config.keep_every)
