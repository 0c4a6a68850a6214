"""Records what happened: `metrics.parquet`, TensorBoard and the progress line. Reads the device only every few steps."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ftk import storage
from ftk.errors import TrainingError
from ftk.models import base as models
from ftk.progress import Tracker, human_bytes, track
from ftk.train.loop import StepResult, Trainer

LOGGER = logging.getLogger("ftk")

METRICS = "metrics.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("learning_rate", pa.float64()),
        pa.field("grad_norm", pa.float64()),
        pa.field("num_samples", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("memory_bytes", pa.int64()),
    ]
)


class Recorder:
    """One row a step. Rows are fetched from the device at log steps and before checkpoints, never in between."""

    def __init__(self, directory: Path, log_every: int, flush_at: int, tensorboard: bool) -> None:
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        self._log_every, self._flush_at, self._tensorboard = log_every, flush_at, tensorboard
        self._pending: list[StepResult] = []
        self._window_started = 0.0
        self._writer: Any = None
        self._progress: Tracker | None = None
        self._stack = contextlib.ExitStack()

    def on_start(self, trainer: Trainer) -> None:
        """Keep the rows of the steps that this run continues from, and no later ones."""
        self.rows = [row for row in read_metrics(self.directory) if row["step"] <= trainer.step]
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory / "logs"), purge_step=trainer.step + 1)
            self._stack.callback(self._writer.close)
        self._progress = self._stack.enter_context(track("train", trainer.config.steps, "step", done=trainer.step))
        self._window_started = time.perf_counter()

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Queue the row; at a log step fetch all queued ones."""
        self._pending.append(result)
        note = ""
        if result.step % self._log_every == 0 or result.step % self._flush_at == 0 or trainer.stop_requested:
            note = self.flush(trainer)
        assert self._progress is not None
        self._progress.advance(1, note)

    def on_end(self, trainer: Trainer) -> None:
        """Write what is left."""
        self.flush(trainer)
        self.commit()
        self.close()

    def close(self) -> None:
        """End the progress line and TensorBoard's file, also after an error; may be called twice."""
        self._stack.close()

    def flush(self, trainer: Trainer) -> str:
        """Fetch the queued results, which waits for the device; `TrainingError` if any is not finite."""
        if not self._pending:
            return ""
        losses = torch.stack([result.loss for result in self._pending]).tolist()
        norms = torch.stack([result.grad_norm for result in self._pending]).tolist()
        now = time.perf_counter()
        seconds = (now - self._window_started) / len(self._pending)
        self._window_started = now
        memory = models.memory_bytes(trainer.device)
        for result, loss, norm in zip(self._pending, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"Step {result.step} gave a loss of {loss} and a gradient norm of {norm}. Nothing after the last "
                    f"checkpoint was saved. Lower train.learning_rate, or set train.max_grad_norm, and run again."
                )
            row = {
                "step": result.step, "loss": loss, "learning_rate": result.learning_rate, "grad_norm": norm,
                "num_samples": result.num_samples, "seconds": seconds, "memory_bytes": memory,
            }  # fmt: skip
            self.rows.append(row)
        if self._writer is not None:
            # One point a log interval: the loss is its mean. Every step's own values are in metrics.parquet.
            self._writer.add_scalar("train/loss", sum(losses) / len(losses), row["step"])
            for name in ("learning_rate", "grad_norm"):
                self._writer.add_scalar(f"train/{name}", row[name], row["step"])
        self._pending = []
        return f"loss {recent_loss(self.rows):.4f}  {human_bytes(memory)}"

    def commit(self) -> None:
        """Swap in `metrics.parquet`."""
        storage.commit_table(self.directory / METRICS, pa.Table.from_pylist(self.rows, schema=_SCHEMA))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; none when there is no file. A damaged file is only history: it is said, and begun anew."""
    path = directory / METRICS
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = storage.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        LOGGER.warning("%s is damaged (%s): its rows are lost, the run itself is not", path, error)
        return []
    return rows


def recent_loss(rows: list[dict[str, Any]], window: int = 20) -> float:
    """Mean loss of the last steps."""
    recent = [row["loss"] for row in rows[-window:]]
    return sum(recent) / len(recent) if recent else math.nan
