"""Measures the loss of held-out samples, with noise and sigmas that never change, from the cache.

Shape legend: K sigma bands.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ftk.train.data import BatchBuilder
from ftk.train.hooks.checkpoints import Checkpoints
from ftk.train.hooks.recorder import Recorder, ValidationLog
from ftk.train.loop import NUM_BANDS, StepResult, Trainer, band_totals

LOGGER = logging.getLogger("ftk")


class Validation:
    """Comes between the recorder and the checkpoints: the best step is saved, whatever its number.

    Args:
        batches: what is measured: samples of one bucket, and which of the fixed sigmas.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        batches: Sequence[tuple[Sequence[int], int]],
        log: ValidationLog,
        recorder: Recorder,
        checkpoints: Checkpoints,
    ) -> None:
        self._builder = builder
        self._batches = batches
        self._log = log
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._measured_step = -1

    def on_start(self, trainer: Trainer) -> None:
        """Measure the base model before the first step; a resumed run whose patience is used up is at its end."""
        self._log.rows = [row for row in self._log.rows if row["step"] <= trainer.step]
        if self._log.rows:
            self._measured_step = int(self._log.rows[-1]["step"])
        elif trainer.step == 0:
            self._measure(trainer)
        self._mend_best(trainer)
        self._stop_when_out_of_patience(trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Measure at every `validation.every`-th step and at the last."""
        if result.step % trainer.config.validation.every == 0 or result.step == trainer.config.steps:
            self._measure(trainer)
            self._stop_when_out_of_patience(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Nothing to close."""

    def _measure(self, trainer: Trainer) -> None:
        if self._measured_step == trainer.step:
            return
        self._measured_step = trainer.step
        with self._recorder.paused(trainer):
            totals = self._totals(trainer)
        loss = float(totals[0].sum() / totals[1].sum())
        bands = [total / count if count else math.nan for total, count in zip(*totals.tolist(), strict=True)]
        # The base model, before the first step, is never the best one: there is nothing of it to save.
        best = self._best_row()
        is_best = trainer.step > 0 and math.isfinite(loss) and (best is None or loss < best["loss"])
        # Saving may take all processes: the main one's log decides, should theirs differ.
        (is_best,) = trainer.ranks.agree(is_best and trainer.ranks.is_main)
        self._log.append({"step": trainer.step, "loss": loss, "band_losses": bands, "is_best": is_best})
        with trainer.ranks.unhurried():
            self._recorder.scalars(trainer.step, {"validation/loss": loss})
            if trainer.ranks.is_main:
                self._log.commit()
        if trainer.ranks.is_main:
            LOGGER.info("step %d: validation loss %.5f%s", trainer.step, loss, ", the best so far" if is_best else "")
        if is_best:
            self._checkpoints.save_best(trainer, loss)

    def _totals(self, trainer: Trainer) -> torch.Tensor:
        """[2,K]: losses and samples by sigma band, over all processes."""
        rank, size = trainer.ranks.rank, trainer.ranks.size
        totals = torch.zeros(2, NUM_BANDS, device=trainer.device)
        with torch.no_grad(), trainer.model.evaluating(), trainer.optimizer.averaged():
            for first in range(0, len(self._batches), size):
                samples, position = self._batches[min(first + rank, len(self._batches) - 1)]
                batch = self._builder.fixed(samples, position, trainer.config.validation.sigmas)
                # Where weights are split every process computes whenever one does.
                batch = replace(batch, share=1.0 if first + rank < len(self._batches) else 0.0)
                batch = batch.map(lambda tensor: tensor.to(trainer.device))
                totals += batch.share * band_totals(batch.sigma_B, trainer.losses(batch))
        trainer.ranks.sum([totals])
        return totals

    def _stop_when_out_of_patience(self, trainer: Trainer) -> None:
        patience, best = trainer.config.validation.patience, self._best_row()
        if patience is None or best is None:
            return
        if sum(row["step"] > best["step"] for row in self._log.rows) >= patience:
            LOGGER.info("no better validation loss than %.5f at step %d in %d measurements: the training ends here",
                        best["loss"], best["step"], patience)  # fmt: skip
            trainer.is_finished = True

    def _best_row(self) -> dict[str, Any] | None:
        return next((row for row in reversed(self._log.rows) if row["is_best"]), None)

    def _mend_best(self, trainer: Trainer) -> None:
        """Let the log and the note of the best step agree: one may be damaged, or a kill may have come between them."""
        best, noted = self._best_row(), self._checkpoints.noted_best()
        is_unnoted = best is not None and noted != (best["step"], best["loss"])
        (must_note,) = trainer.ranks.agree(is_unnoted and trainer.ranks.is_main)
        if best is not None and must_note:
            LOGGER.info("the best step so far is %d, by the log of its measurements: noted again", best["step"])
            self._checkpoints.note_best(trainer, best["step"], best["loss"])
        elif best is None and noted is not None and noted[0] <= trainer.step:
            step, loss = noted
            others = [row for row in self._log.rows if row["step"] != step]
            mended = {"step": step, "loss": loss, "band_losses": None, "is_best": True}
            self._log.rows = sorted([*others, mended], key=lambda row: int(row["step"]))
