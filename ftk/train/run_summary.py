"""Where a run stands, in numbers: from its metrics, checkpoints and files. It may be running, killed, or hardly begun.

Shape legend: N steps, K sigma bands.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ftk import storage
from ftk.configs.load import parse_yaml
from ftk.errors import ConfigError
from ftk.train import checkpoint
from ftk.train.hooks.recorder import metrics_table, validation_table
from ftk.train.loop import NUM_BANDS

LOGGER = logging.getLogger("ftk")

State = Literal["running", "finished", "stopped", "not started"]
CONFIG, ENVIRONMENT, REPORT, SIGMAS = "config.yaml", "environment.json", "report.json", "sigmas.png"
_WEIGHT_FOLDERS = ("adapter", "best")
_LOSS_STEPS, _SPEED_STEPS, _BAND_STEPS = 20, 200, 200
_MOST_BAD_STEPS = 20

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """One checkpoint. `problem` says what is wrong with it; only the newest one's files are read and compared."""

    step: int
    name: str
    num_bytes: int
    is_best: bool
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSummary:
    """Losses of good steps as means over 20 steps: now, and the lowest, which ends at `best_step`."""

    now: float
    best: float
    best_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BandSummary:
    """The samples with sigma in [low, high): their share of all, and their mean loss in the first and in the last steps."""

    low: float
    high: float
    share: float
    first: float | None
    now: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSummary:
    """The last measurement of the held-out samples, and the best one after the first step."""

    num_measurements: int
    step: int
    loss: float
    best_step: int | None
    best_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSummary:
    """A file that is delivered, by its path in the run's folder."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run. `step` is the last one that was recorded, `holder` the process that trains now.

    `num_steps` is what was last asked for, None when the configuration is unknown. Speeds are medians of the last 200
    steps, `seconds` all the time that was trained for, `memory_bytes` the highest peak, `data_wait_share` of `seconds`.
    `preservation_loss` is the mean of the last 20 steps that preserved something. `bands` compare the first `num_band_steps`
    steps with as many at the end.
    """

    directory: str
    state: State
    holder: str | None
    step: int
    num_steps: int | None
    num_samples: int
    seconds: float
    seconds_left: float | None
    loss: LossSummary | None
    bands: list[BandSummary]
    num_band_steps: int
    validation: ValidationSummary | None
    learning_rate: float | None
    grad_norm: float | None
    seconds_per_step: float | None
    samples_per_second: float | None
    data_wait_share: float | None
    memory_bytes: int | None
    num_bad_steps: int
    bad_steps: list[int]
    num_overflows: int
    loss_scale: float | None
    preservation_loss: float | None
    checkpoints: list[CheckpointSummary]
    files: list[FileSummary]
    sample_sheets: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The columns of `metrics.parquet`, and which steps were good; what was not recorded is NaN.

    A step that is not good was bad, or its gradients overflowed at the loss scale of the time.
    """

    step_N: Integers
    loss_N: Floats
    learning_rate_N: Floats
    grad_norm_N: Floats
    num_samples_N: Integers
    seconds_N: Floats
    data_seconds_N: Floats
    memory_bytes_N: Floats
    is_good_N: npt.NDArray[np.bool_]
    is_overflow_N: npt.NDArray[np.bool_]
    loss_scale_N: Floats
    preservation_loss_N: Floats
    band_losses_NK: Floats
    band_counts_NK: Floats

    @property
    def bad_steps(self) -> Integers:
        """The steps that had no finite loss or gradient, and not because the loss scale was too large."""
        return self.step_N[~self.is_good_N & ~self.is_overflow_N]

    def __len__(self) -> int:
        return len(self.step_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationHistory:
    """The columns of `validation.parquet`, M measurements."""

    step_M: Integers
    loss_M: Floats
    band_losses_MK: Floats
    is_best_M: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.step_M)


def summarise(directory: Path, verify: bool = True) -> RunSummary:
    """Where the run in `directory` stands.

    Args:
        verify: read the newest checkpoint to see whether it is whole; else its receipt must do.
    """
    return summary(directory, history(directory), validation(directory), verify)


def history(directory: Path) -> History:
    """The run's metrics; without steps when there are none yet, or their file is damaged."""
    table = metrics_table(directory)
    is_bad_N, is_overflow_N = _flags(table["is_bad"]), _flags(table["is_overflow"])
    return History(
        step_N=table["step"].to_numpy(),
        loss_N=_floats(table["loss"]),
        learning_rate_N=_floats(table["learning_rate"]),
        grad_norm_N=_floats(table["grad_norm"]),
        num_samples_N=pc.fill_null(table["num_samples"], 0).to_numpy(),
        seconds_N=_floats(table["seconds"]),
        data_seconds_N=_floats(table["data_seconds"]),
        memory_bytes_N=_floats(table["memory_bytes"]),
        is_good_N=~(is_bad_N | is_overflow_N),
        is_overflow_N=is_overflow_N,
        loss_scale_N=_floats(table["loss_scale"]),
        preservation_loss_N=_floats(table["preservation_loss"]),
        band_losses_NK=_bands(table["band_losses"]),
        band_counts_NK=np.nan_to_num(_bands(table["band_counts"])),
    )


def validation(directory: Path) -> ValidationHistory:
    """The run's measurements of held-out samples; none as in `history`."""
    table = validation_table(directory)
    return ValidationHistory(
        step_M=table["step"].to_numpy(),
        loss_M=_floats(table["loss"]),
        band_losses_MK=_bands(table["band_losses"]),
        is_best_M=_flags(table["is_best"]),
    )


def summary(directory: Path, rows: History, measured: ValidationHistory, verify: bool = True) -> RunSummary:
    """As `summarise`, of what was read already."""
    checkpoints = _checkpoints(directory, verify)
    num_steps = _number(settings(directory), "train", "steps")
    step = max([0, *rows.step_N[-1:].tolist(), *(one.step for one in checkpoints if one.problem is None)])
    holder = storage.holder(directory)
    state = _state(directory, step, holder)
    speed = rows.seconds_N[-_SPEED_STEPS:]
    seconds_per_step = float(np.median(speed)) if len(speed) else None
    seconds = float(np.nansum(rows.seconds_N))
    good = np.flatnonzero(rows.is_good_N)
    num_band_steps = min(_BAND_STEPS, -(-len(rows) // 2))
    return RunSummary(
        directory=str(directory),
        state=state,
        holder=holder,
        step=step,
        num_steps=num_steps,
        num_samples=_num_samples(directory, rows, checkpoints),
        seconds=seconds,
        seconds_left=seconds_per_step * max(0, num_steps - step)
        if state == "running" and num_steps is not None and seconds_per_step is not None
        else None,
        loss=_loss(rows),
        bands=_band_summaries(rows, num_band_steps),
        num_band_steps=num_band_steps,
        validation=_validation(measured),
        learning_rate=_last(rows.learning_rate_N),
        grad_norm=float(np.median(rows.grad_norm_N[good[-_LOSS_STEPS:]])) if len(good) else None,
        seconds_per_step=seconds_per_step,
        samples_per_second=float(rows.num_samples_N[-_SPEED_STEPS:].sum() / max(speed.sum(), 1e-9)) if len(speed) else None,
        data_wait_share=min(1.0, float(np.nansum(rows.data_seconds_N)) / seconds) if seconds else None,
        memory_bytes=int(np.nanmax(rows.memory_bytes_N)) if np.isfinite(rows.memory_bytes_N).any() else None,
        num_bad_steps=len(rows.bad_steps),
        bad_steps=rows.bad_steps[-_MOST_BAD_STEPS:].tolist(),
        num_overflows=int(rows.is_overflow_N.sum()),
        loss_scale=_last(rows.loss_scale_N[np.isfinite(rows.loss_scale_N)]),
        preservation_loss=_mean_of_last(rows.preservation_loss_N[rows.is_good_N]),
        checkpoints=checkpoints,
        files=_files(directory),
        sample_sheets=[str(path.relative_to(directory)) for path in sample_sheets(directory)],
    )


def _mean_of_last(values_N: Floats) -> float | None:
    """Of the last 20 that are finite; None where none is."""
    finite = values_N[np.isfinite(values_N)][-_LOSS_STEPS:]
    return float(finite.mean()) if len(finite) else None


def settings(directory: Path) -> Mapping[str, Any]:
    """The run's resolved configuration as plain values; empty when there is none, or it cannot be read."""
    path = directory / CONFIG
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if isinstance(tree, dict):
            return tree
        problem = f"it holds {type(tree).__name__}, not the sections of a run file"
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        problem = str(error)
    LOGGER.warning("%s is damaged (%s): no settings are shown. `ftk train` writes it anew when it goes on.", path, problem)
    return {}


def sample_sheets(directory: Path) -> list[Path]:
    """The sheets of sample images, the oldest first."""
    return sorted((directory / "samples").glob("step-*.png"))


def moving_mean(values_N: Floats, window: int) -> Floats:
    """[N - window + 1]: the mean of each `window` neighbours."""
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    means: Floats = (sums[window:] - sums[:-window]) / window
    return means


def _state(directory: Path, step: int, holder: str | None) -> State:
    if holder is not None:
        return "running"
    if step == 0:
        return "not started"
    # The report is written when a training ends by itself, be it for want of patience; steps after it were cut short.
    reported = _number(_json(directory / REPORT), "step")
    return "finished" if reported is not None and reported >= step else "stopped"


def _checkpoints(directory: Path, verify: bool) -> list[CheckpointSummary]:
    folder = directory / "checkpoints"
    best = checkpoint.best_step(folder)
    paths = checkpoint.all_of(folder)
    found = []
    for path in paths:
        if verify and path == paths[-1]:
            problem = checkpoint.damage(path)
        else:
            problem = None if (path / checkpoint.RECEIPT).exists() else f"it has no {checkpoint.RECEIPT}"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        step = int(path.name)
        found.append(
            CheckpointSummary(
                step=step, name=str(path.relative_to(directory)), num_bytes=size, is_best=step == best, problem=problem
            )
        )
    return found


def _num_samples(directory: Path, rows: History, checkpoints: Sequence[CheckpointSummary]) -> int:
    """As the metrics count them; where those are lost, as the newest good checkpoint does."""
    newest = max((one.step for one in checkpoints if one.problem is None), default=0)
    if len(rows) and rows.step_N[-1] >= newest:
        return int(rows.num_samples_N.sum())
    counted = _number(_json(directory / "checkpoints" / f"{newest:08d}" / "trainer.json"), "num_samples_seen")
    return counted or 0


def _loss(rows: History) -> LossSummary | None:
    losses, steps = rows.loss_N[rows.is_good_N], rows.step_N[rows.is_good_N]
    if not len(losses):
        return None
    window = min(_LOSS_STEPS, len(losses))
    means = moving_mean(losses, window)
    best = int(np.argmin(means))
    return LossSummary(now=float(means[-1]), best=float(means[best]), best_step=int(steps[best + window - 1]))


def _band_summaries(rows: History, num_steps: int) -> list[BandSummary]:
    counts_NK = rows.band_counts_NK * rows.is_good_N[:, None]
    total = float(counts_NK.sum())
    if not total:
        return []
    sums_NK = np.where(counts_NK > 0, rows.band_losses_NK, 0.0) * counts_NK

    def mean(span: slice, band: int) -> float | None:
        count = counts_NK[span, band].sum()
        return float(sums_NK[span, band].sum() / count) if count else None

    first, last = slice(0, num_steps), slice(len(rows) - num_steps, None)
    return [
        BandSummary(
            low=band / NUM_BANDS,
            high=(band + 1) / NUM_BANDS,
            share=float(counts_NK[:, band].sum()) / total,
            first=mean(first, band),
            now=mean(last, band),
        )
        for band in range(NUM_BANDS)
    ]


def _validation(measured: ValidationHistory) -> ValidationSummary | None:
    if not len(measured):
        return None
    best = np.flatnonzero(measured.is_best_M)[-1:].tolist()
    return ValidationSummary(
        num_measurements=len(measured),
        step=int(measured.step_M[-1]),
        loss=float(measured.loss_M[-1]),
        best_step=int(measured.step_M[best[0]]) if best else None,
        best_loss=float(measured.loss_M[best[0]]) if best else None,
    )


def _files(directory: Path) -> list[FileSummary]:
    paths = [path for name in _WEIGHT_FOLDERS for path in sorted((directory / name).rglob("*"))]
    return [
        FileSummary(name=str(path.relative_to(directory)), num_bytes=path.stat().st_size)
        for path in paths
        if path.is_file() and not path.name.startswith(storage.TEMPORARY_PREFIX)
    ]


def _floats(column: pa.ChunkedArray) -> Floats:
    """[N] fp64; nulls are NaN."""
    values: Floats = column.cast(pa.float64()).to_numpy()
    return values


def _flags(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """[N]; nulls are False."""
    values: npt.NDArray[np.bool_] = pc.fill_null(column, False).to_numpy().astype(bool)
    return values


def _bands(column: pa.ChunkedArray) -> Floats:
    """[N,K] fp64 of a column of lists; what is null, or not K long, is NaN."""
    is_whole = pc.fill_null(pc.equal(pc.list_value_length(column), NUM_BANDS), False)
    values_NK = np.full((len(column), NUM_BANDS), np.nan)
    values_NK[is_whole.to_numpy().astype(bool)] = _floats(pc.list_flatten(column.filter(is_whole))).reshape(-1, NUM_BANDS)
    return values_NK


def _last(values_N: Floats) -> float | None:
    return float(values_N[-1]) if len(values_N) else None


def _json(path: Path) -> Any:
    try:
        return storage.read_json(path)
    except (OSError, ValueError):
        return None


def _number(tree: Any, *names: str) -> int | None:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, int) else None
