"""Records what happened: `metrics.parquet`, trackers and the progress line. Reads the device only every few steps.

Shape legend: N queued steps, K sigma bands.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from ftk import devices, progress, storage
from ftk.configs.schema import TrainConfig
from ftk.errors import TrainingError
from ftk.train.hooks.trackers import Tracker
from ftk.train.loop import NUM_BANDS, StepResult, Trainer

LOGGER = logging.getLogger("ftk")

METRICS, VALIDATION = "metrics.parquet", "validation.parquet"
METRICS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("learning_rate", pa.float64()),
        pa.field("grad_norm", pa.float64()),
        pa.field("num_samples", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("data_seconds", pa.float64()),
        pa.field("memory_bytes", pa.int64()),
        pa.field("is_bad", pa.bool_()),
        pa.field("loss_scale", pa.float64()),
        pa.field("is_overflow", pa.bool_()),
        pa.field("preservation_loss", pa.float64()),
        pa.field("band_losses", pa.list_(pa.float32())),
        pa.field("band_counts", pa.list_(pa.int32())),
    ]
)
VALIDATION_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("band_losses", pa.list_(pa.float32())),
        pa.field("is_best", pa.bool_()),
    ]
)
_RECENT_STEPS = 20
_SECONDS_BETWEEN_COMMITS = 30.0
# A commit writes all rows anew: of a long run it may take at most this share of the time.
_COMMIT_SHARE = 0.01
_MOST_CHUNKS = 256
_SECONDS_BETWEEN_DISPLAYS = 0.2


class Recorder:
    """One row a step. Rows are fetched from the device at log steps and before checkpoints, never in between.

    Every process of a run has one, so that all of them see a bad step and stop alike; one of them writes.
    """

    def __init__(self, directory: Path, config: TrainConfig, trackers: Sequence[Tracker], writes: bool = True) -> None:
        self.directory = directory
        self._config = config
        self._writes = writes
        self._trackers = list(trackers) if writes else []
        self._pending: list[StepResult] = []
        self._log = _MetricsLog(directory)
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._bad_in_a_row: list[str] = []
        self._num_bad_steps = self._num_overflows = 0
        self._window_started = self._shown_at = 0.0
        self._num_unshown = 0
        self._progress: progress.ProgressBar | None = None
        self._stack = contextlib.ExitStack()

    def on_start(self, trainer: Trainer) -> None:
        """Keep the rows of the steps that this run continues from, and no later ones."""
        with trainer.ranks.unhurried():
            self._begin(trainer)
        self._window_started = self._shown_at = time.perf_counter()

    def _begin(self, trainer: Trainer) -> None:
        if self._writes:
            self._log.load(trainer.step)
            self._num_bad_steps, self._num_overflows = self._log.count("is_bad"), self._log.count("is_overflow")
            self._recent.extend(self._log.last_losses(_RECENT_STEPS))
            if trainer.step < trainer.config.steps:
                self._tell(lambda tracker: tracker.start(trainer.step))
            else:  # they were told everything
                self._end_trackers()
            shown = progress.track("train", trainer.config.steps, "step", done=trainer.step)
            self._progress = self._stack.enter_context(shown)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Queue the row; at a log step fetch all queued ones."""
        self._pending.append(result)
        self._num_unshown += 1
        if result.step % self._config.log_every == 0:
            self._show(self.flush(trainer))
            with trainer.ranks.unhurried():
                if self._log.is_due():
                    self.commit()
        elif time.perf_counter() - self._shown_at > _SECONDS_BETWEEN_DISPLAYS:
            self._show("")

    def on_end(self, trainer: Trainer) -> None:
        """Write what is left; the trackers stay open for what other hooks still have to say."""
        self._show(self.flush(trainer))
        with trainer.ranks.unhurried():
            self.commit()

    def close(self) -> None:
        """End the progress line and close the trackers, also after an error; may be called twice."""
        self._stack.close()
        self._progress = None
        self._end_trackers()

    def _end_trackers(self) -> None:
        self._tell(lambda tracker: tracker.close())
        self._trackers = []

    def flush(self, trainer: Trainer) -> str:
        """Fetch the queued results, which waits for the device; returns a note on them for the progress line.

        Raises:
            TrainingError: `train.max_bad_steps` steps in a row had no finite loss or gradient.
        """
        if not self._pending:
            return ""
        results, self._pending = self._pending, []
        values = _fetch(results)
        now = time.perf_counter()
        seconds, self._window_started = (now - self._window_started) / len(results), now
        memory = devices.memory_bytes(trainer.device)
        rows = [_row(result, row, seconds, memory) for result, row in zip(results, values, strict=True)]
        bad = [row for row in rows if row["is_bad"]]
        self._num_bad_steps += len(bad)
        self._num_overflows += sum(row["is_overflow"] for row in rows)
        self._recent.extend(row["loss"] for row in rows if not row["is_bad"])
        with trainer.ranks.unhurried():  # a service may be slow
            if self._writes:
                self._log.extend(rows)
                scalars = {**_scalars(rows), "train/bad_steps": float(self._num_bad_steps)}
                if results[-1].scaled is not None:
                    scalars["train/overflows"] = float(self._num_overflows)
                self._tell(lambda tracker: tracker.scalars(results[-1].step, scalars))
        self._refuse_bad(rows, bad)
        samples_a_second = sum(result.num_samples for result in results) / max(seconds * len(results), 1e-9)
        return self._note(results[-1].learning_rate, samples_a_second, memory)

    @contextlib.contextmanager
    def paused(self, trainer: Trainer) -> Iterator[None]:
        """For what is no step (validation, sample images, checkpoints): its time is not counted as the steps'."""
        self.flush(trainer)
        try:
            yield
        finally:
            self._window_started = time.perf_counter()

    @property
    def num_bad_in_a_row(self) -> int:
        """How many of the last fetched steps, up to the last one, were bad."""
        return len(self._bad_in_a_row)

    def commit(self) -> None:
        """Swap in `metrics.parquet`."""
        if self._writes:
            self._log.commit()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the trackers what another hook measured."""
        self._tell(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Show the trackers sample images with their prompts."""
        self._tell(lambda tracker: tracker.images(step, images, captions))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                # Other people's code and servers fail in ways that cannot be listed; none is worth the training.
                self._trackers.remove(tracker)
                LOGGER.warning(
                    "%s fails (%s: %s) and is told no more. The run goes on; all its numbers are in %s",
                    tracker.name, type(error).__name__, error, self.directory / METRICS,
                )  # fmt: skip

    def _refuse_bad(self, rows: Sequence[Mapping[str, Any]], bad: Sequence[Mapping[str, Any]]) -> None:
        """Warn of bad steps, and stop at too many in a row; nothing was updated in any of them."""
        if bad and self._writes:
            LOGGER.warning(
                "%s: neither loss nor gradient may be infinite or no number, so the weights were left as they were",
                "; ".join(_described(row) for row in bad),
            )
        for row in rows:
            if row["is_overflow"]:  # says nothing of the samples or the weights
                continue
            self._bad_in_a_row = [*self._bad_in_a_row, _described(row)] if row["is_bad"] else []
            if len(self._bad_in_a_row) >= self._config.max_bad_steps:
                self.commit()
                raise TrainingError(
                    f"{len(self._bad_in_a_row)} steps in a row had no finite loss or gradient (train.max_bad_steps is "
                    f"{self._config.max_bad_steps}):\n  " + "\n  ".join(self._bad_in_a_row) + "\n"
                    "None of them changed the weights, and the last checkpoint is good. Lower train.learning_rate or "
                    "train.max_grad_norm, look at the samples (`ftk inspect CACHE` counts latents that are not finite), and "
                    "run the same command again."
                )

    def _note(self, learning_rate: float, samples_a_second: float, memory: int) -> str:
        loss = sum(self._recent) / len(self._recent) if self._recent else math.nan
        bad = f"  {self._num_bad_steps} bad" if self._num_bad_steps else ""
        size = progress.human_bytes(memory)
        return f"loss {loss:.4f}  lr {learning_rate:.2e}  {samples_a_second:,.1f} samples/s  {size}{bad}"

    def _show(self, note: str) -> None:
        if self._progress is not None and self._num_unshown:
            self._progress.advance(self._num_unshown, note)
        self._num_unshown = 0
        self._shown_at = time.perf_counter()


class ValidationLog:
    """`validation.parquet`: one row a measurement, as dicts with the schema's fields."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / VALIDATION
        self.rows: list[dict[str, Any]] = _read(self._path, VALIDATION_SCHEMA).to_pylist()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a measurement; those of the same or a later step were made in a run that this one goes back behind."""
        self.rows = [*(earlier for earlier in self.rows if earlier["step"] < row["step"]), dict(row)]

    def commit(self) -> None:
        """Swap in the file."""
        storage.commit_table(self._path, pa.Table.from_pylist(self.rows, schema=VALIDATION_SCHEMA))


class _MetricsLog:
    """The rows of `metrics.parquet`: as Arrow chunks, so that a million of them take 150 MB, and little time to write."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._table = METRICS_SCHEMA.empty_table()
        self._rows: list[dict[str, Any]] = []
        self._committed_at, self._commit_seconds = time.perf_counter(), 0.0

    def load(self, step: int) -> None:
        """The file's rows up to `step`."""
        table = _read(self._path, METRICS_SCHEMA)
        self._table, self._rows = table.filter(pc.less_equal(table["step"], step)), []
        self._committed_at = time.perf_counter()

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows.extend(rows)

    def count(self, flag: str) -> int:
        """How many rows have it set."""
        return int(pc.sum(self._table[flag]).as_py() or 0)

    def last_losses(self, number: int) -> list[float]:
        rows = self._table.slice(max(0, len(self._table) - number)).select(["loss", "is_bad"]).to_pylist()
        return [row["loss"] for row in rows if not row["is_bad"]]

    def is_due(self) -> bool:
        """Whether those who look on have waited long enough for new rows."""
        waited = time.perf_counter() - self._committed_at
        return waited > max(_SECONDS_BETWEEN_COMMITS, self._commit_seconds / _COMMIT_SHARE)

    def commit(self) -> None:
        started = time.perf_counter()
        self._table = pa.concat_tables([self._table, pa.Table.from_pylist(self._rows, schema=METRICS_SCHEMA)])
        self._rows = []
        if self._table["step"].num_chunks > _MOST_CHUNKS:
            self._table = self._table.combine_chunks()
        storage.commit_table(self._path, self._table)
        self._committed_at = time.perf_counter()
        self._commit_seconds = self._committed_at - started


def metrics_table(directory: Path) -> pa.Table:
    """The rows of a run so far, with the fields of `METRICS_SCHEMA`; none when there is no file, or a damaged one."""
    return _read(directory / METRICS, METRICS_SCHEMA)


def validation_table(directory: Path) -> pa.Table:
    """The measurements of a run so far, with the fields of `VALIDATION_SCHEMA`; none as in `metrics_table`."""
    return _read(directory / VALIDATION, VALIDATION_SCHEMA)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """`metrics_table` as a dict a row."""
    rows: list[dict[str, Any]] = metrics_table(directory).to_pylist()
    return rows


def recent_loss(rows: Sequence[Mapping[str, Any]], window: int = _RECENT_STEPS) -> float:
    """Mean loss of the last good steps."""
    recent = [row["loss"] for row in rows[-window:] if not row["is_bad"]]
    return sum(recent) / len(recent) if recent else math.nan


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """A file of a run's history. A damaged one is only history: it is said, and begun anew."""
    if not path.exists():
        return schema.empty_table()
    try:
        table = storage.read_table(path)
        missing = [name for name in schema.names if name not in table.column_names]
        # What an earlier version did not record is unknown.
        for name in missing:
            table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
        table = table.select(schema.names).cast(schema)
        if table["step"].null_count:
            raise ValueError("rows without a step")
    except (pa.ArrowException, OSError, ValueError) as error:
        LOGGER.warning("%s is damaged (%s): its rows are lost, the run itself is not", path, error)
        return schema.empty_table()
    return table


def _fetch(results: Sequence[StepResult]) -> list[list[float]]:
    """[N, 4+2K]: loss, gradient norm, whether it is bad, preservation loss, and losses and samples by band; one transfer.

    [N, 6+2K] where the loss is scaled: the scale, and whether the gradients overflowed, come last.
    """
    nothing = torch.full((), math.nan, device=results[0].loss.device)
    singles_N = [
        torch.stack([result.loss for result in results]),
        torch.stack([result.grad_norm for result in results]),
        torch.stack([result.is_bad for result in results]),
        torch.stack([nothing if result.preservation_loss is None else result.preservation_loss for result in results]),
    ]
    bands_NK = [
        torch.stack([result.band_loss_K for result in results]),
        torch.stack([result.band_count_K for result in results]),
    ]
    scaled = [result.scaled for result in results if result.scaled is not None]
    if scaled:
        bands_NK.append(torch.stack([torch.stack([each.scale, each.is_overflow.float()]) for each in scaled]))
    values: list[list[float]] = torch.cat([*(one[:, None].float() for one in singles_N), *bands_NK], 1).tolist()
    return values


def _row(result: StepResult, values: Sequence[float], seconds: float, memory: int) -> dict[str, Any]:
    """`values` as `_fetch` gives them; `seconds` and `memory` are those of the steps that were fetched together."""
    loss, norm, is_bad, preservation = values[:4]
    sums, counts = values[4 : 4 + NUM_BANDS], values[4 + NUM_BANDS : 4 + 2 * NUM_BANDS]
    scale, is_overflow = (None, 0.0) if result.scaled is None else values[4 + 2 * NUM_BANDS :]
    return {
        "step": result.step, "loss": loss, "learning_rate": result.learning_rate, "grad_norm": norm,
        "num_samples": result.num_samples, "seconds": seconds, "data_seconds": result.data_seconds,
        "memory_bytes": memory, "is_bad": bool(is_bad), "loss_scale": scale,
        "is_overflow": bool(is_overflow), "preservation_loss": None if math.isnan(preservation) else preservation,
        "band_losses": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
        "band_counts": [int(count) for count in counts],
    }  # fmt: skip


def _scalars(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One point a log interval: means of its good steps. Every step's own values are in `metrics.parquet`."""
    good = [row for row in rows if not (row["is_bad"] or row["is_overflow"])]
    seconds = max(sum(row["seconds"] for row in rows), 1e-9)
    values = {
        "train/learning_rate": rows[-1]["learning_rate"],
        "train/memory_gib": rows[-1]["memory_bytes"] / 2**30,
        "train/samples_per_second": sum(row["num_samples"] for row in rows) / seconds,
        "train/seconds_per_step": seconds / len(rows),
        "train/data_wait_share": min(1.0, sum(row["data_seconds"] for row in rows) / seconds),
    }
    if rows[-1]["loss_scale"] is not None:
        values["train/loss_scale"] = rows[-1]["loss_scale"]
    preserved = [row["preservation_loss"] for row in good if row["preservation_loss"] is not None]
    if preserved:
        values["train/preservation_loss"] = sum(preserved) / len(preserved)
    if good:
        values["train/loss"] = sum(row["loss"] for row in good) / len(good)
        values["train/grad_norm"] = sum(row["grad_norm"] for row in good) / len(good)
    for band in range(NUM_BANDS):
        count = sum(row["band_counts"][band] for row in good)
        if count:
            total = sum((row["band_losses"][band] or 0.0) * row["band_counts"][band] for row in good)
            values[f"loss_by_sigma/{band / NUM_BANDS:.2f}-{(band + 1) / NUM_BANDS:.2f}"] = total / count
    return values


def _described(row: Mapping[str, Any]) -> str:
    return f"step {row['step']}: loss {row['loss']:g}, gradient norm {row['grad_norm']:g}"
