"""Saves a checkpoint every so many steps and at the end, and renews the weights in `adapter/`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftk.train import checkpoint
from ftk.train.hooks.recorder import Recorder
from ftk.train.loop import StepResult, Trainer


class Checkpoints:
    """Comes after the recorder, whose rows must be fetched, and found finite, before anything is saved."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        recorder: Recorder,
        export: Callable[[int], None],
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
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save the last step, whether it was the end or a signal's."""
        if self._saved_step != trainer.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._recorder.flush(trainer)
        self._recorder.commit()
        checkpoint.save_checkpoint(self._directory, trainer.step, trainer.num_samples_seen, trainer.optimizer, self._settings)
        self._export(trainer.step)
        checkpoint.prune(self._directory, trainer.config.keep_last)
        self._saved_step = trainer.step
