"""A run as one HTML page to look at: curves to point at, sample images over time, settings, checkpoints.

Shape legend: N steps, P points of a curve, K sigma bands.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ftk import storage
from ftk.pipeline import page_parts
from ftk.progress import track
from ftk.train import run_summary
from ftk.train.run_summary import Floats, History, RunSummary, ValidationHistory

_MOST_POINTS = 1500
_DIGITS = 5
_MOST_MARKS = 400
_MOST_SHEETS = 60
_SHEETS_BYTES = 18 << 20
_SIGMAS_BYTES = 1 << 20
_SHEET_PX = (1600, 1100, 800, 560, 400, 280)
# Which settings stand at the top; the whole file is below them.
_SETTINGS = (
    *("model.family", "model.path", "method.name", "method.rank", "train.learning_rate", "train.schedule.name"),
    *("train.optimizer.name", "train.global_batch_size", "train.micro_batch_size", "train.precision", "train.seed"),
    *("train.sigma.sampling", "train.sigma.shift", "train.loss.kind", "train.max_grad_norm", "train.ema_decay"),
)


def page(directory: Path) -> tuple[RunSummary, bytes]:
    """The run's numbers, and one self-contained HTML page of them."""
    rows, measured = run_summary.history(directory), run_summary.validation(directory)
    summary = run_summary.summary(directory, rows, measured)
    settings = run_summary.settings(directory)
    name = page_parts.short_name(directory)
    html = page_parts.environment("ftk.train").get_template("run.html").render(
        name=f"{name}, step {summary.step:,}" + (f" of {summary.num_steps:,}" if summary.num_steps else ""),
        run_name=name,
        summary=summary,
        is_recorded=len(rows) > 0,
        data=curves(rows, measured, summary, settings),
        sheets=_sheets(directory),
        num_sheets=len(summary.sample_sheets),
        sigmas=_thumbnail(directory / run_summary.SIGMAS, _SIGMAS_BYTES),
        settings=[(name, _shown(_at(settings, name))) for name in _SETTINGS if _at(settings, name) is not None],
        config=_text(directory / run_summary.CONFIG),
        environment=_flat(_environment(directory)),
        duration=duration,
    )  # fmt: skip
    return summary, page_parts.encoded(html)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """Sample images of one step, as a data URI; None where the file cannot be read."""

    step: int
    image: str | None


def curves(rows: History, measured: ValidationHistory, summary: RunSummary, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script draws, as plain values: each curve in at most 1500 points, whatever the number of steps.

    A point stands for the steps after the one before it. `count` are its good steps, `band_counts` their samples; `low`
    and `high` are there when a point stands for more than one step.
    """
    edges = _edges(len(rows))
    good_N = np.where(rows.is_good_N, 1.0, np.nan)
    band_counts_NK = rows.band_counts_NK * rows.is_good_N[:, None]
    bands = range(rows.band_losses_NK.shape[1])
    return {
        "steps": summary.num_steps,
        "step": rows.step_N[edges[1:] - 1].tolist(),
        "count": _plain(_sums(rows.is_good_N.astype(float), edges)),
        "loss": _spread(rows.loss_N * good_N, edges),
        "preservation": _plain(_means(rows.preservation_loss_N * good_N, edges)),
        "bands": [_plain(_means(rows.band_losses_NK[:, band], edges, band_counts_NK[:, band])) for band in bands],
        "band_counts": [_plain(_sums(band_counts_NK[:, band], edges)) for band in bands],
        "learning_rate": _plain(rows.learning_rate_N[edges[1:] - 1]),
        "grad_norm": _spread(rows.grad_norm_N * good_N, edges),
        "seconds": _plain(_means(rows.seconds_N, edges)),
        "data_seconds": _plain(_means(rows.data_seconds_N, edges)),
        "memory_gib": _plain(_extremes(rows.memory_bytes_N, edges, np.fmax) / 2**30),
        "bad_steps": rows.bad_steps[-_MOST_MARKS:].tolist(),
        "checkpoints": [one.step for one in summary.checkpoints][-_MOST_MARKS:],
        "validation": {
            "step": measured.step_M.tolist(),
            "loss": _plain(measured.loss_M),
            "bands": [_plain(measured.band_losses_MK[:, band]) for band in bands],
            "best": summary.validation.best_step if summary.validation else None,
        },
        "max_grad_norm": _at(settings, "train.max_grad_norm"),
    }


def duration(seconds: float) -> str:
    """A time for people: 2 d 3 h, 4 min 5 s, 0.31 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    parts = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    first = next(position for position, (_, size) in enumerate(parts) if seconds >= size)
    (unit, size), (minor, minor_size) = parts[first : first + 2]
    return f"{seconds // size:.0f} {unit} {seconds % size // minor_size:.0f} {minor}"


def _edges(number: int) -> npt.NDArray[np.int64]:
    """Where each point's rows begin, and where the last one's end."""
    points = min(number, _MOST_POINTS)
    return np.arange(points + 1) * number // max(points, 1)


def _sums(values_N: Floats, edges: npt.NDArray[np.int64]) -> Floats:
    """[P] sums of what is finite."""
    return _reduced(np.add, np.where(np.isfinite(values_N), values_N, 0.0), edges)


def _means(values_N: Floats, edges: npt.NDArray[np.int64], weights_N: Floats | None = None) -> Floats:
    """[P] weighted means of what is finite; NaN where nothing is."""
    weights_N = np.isfinite(values_N).astype(float) if weights_N is None else np.where(np.isfinite(values_N), weights_N, 0.0)
    sums_P = _reduced(np.add, np.where(weights_N > 0, values_N, 0.0) * weights_N, edges)
    counts_P = _reduced(np.add, weights_N, edges)
    means_P: Floats = np.divide(sums_P, counts_P, out=np.full(len(sums_P), np.nan), where=counts_P > 0)
    return means_P


def _extremes(values_N: Floats, edges: npt.NDArray[np.int64], which: np.ufunc) -> Floats:
    """[P] least or largest values, as `numpy.fmin` or `fmax` find them."""
    return _reduced(which, np.where(np.isfinite(values_N), values_N, np.nan), edges)


def _reduced(function: np.ufunc, values_N: Floats, edges: npt.NDArray[np.int64]) -> Floats:
    values_P: Floats = function.reduceat(values_N, edges[:-1]) if len(values_N) else values_N
    return values_P


def _spread(values_N: Floats, edges: npt.NDArray[np.int64]) -> dict[str, list[float | None]]:
    mean = {"mean": _plain(_means(values_N, edges))}
    if len(edges) - 1 == len(values_N):
        return mean
    return {**mean, "low": _plain(_extremes(values_N, edges, np.fmin)), "high": _plain(_extremes(values_N, edges, np.fmax))}


def _plain(values: Floats) -> list[float | None]:
    """Rounded for the page; what is not finite is null, for JSON has no other word."""
    rounded = [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
    return [int(value) if value is not None and value.is_integer() else value for value in rounded]


def _sheets(directory: Path) -> list[_Sheet]:
    """The sheets from all over the run, made smaller so that the page has at most about 20 MB."""
    paths = run_summary.sample_sheets(directory)
    shown = min(len(paths), _MOST_SHEETS)
    # The first and the last one are always among them.
    paths = [paths[position * (len(paths) - 1) // max(shown - 1, 1)] for position in range(shown)]
    sheets = []
    with track("draw", len(paths), "sheet") as progress:
        for path in paths:
            step = int("".join(filter(str.isdecimal, path.stem)) or 0)
            sheets.append(_Sheet(step=step, image=_thumbnail(path, _SHEETS_BYTES // len(paths))))
            progress.advance(1)
    return sheets


def _thumbnail(path: Path, most_bytes: int) -> str | None:
    """The largest of some sizes that takes at most so many bytes; the smallest where none does."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    uri = ""
    for longest_px in _SHEET_PX:
        uri = page_parts.thumbnail(picture, longest_px, quality=85)
        if len(uri) <= most_bytes:
            break
    return uri


def _environment(directory: Path) -> Any:
    try:
        return storage.read_json(directory / run_summary.ENVIRONMENT)
    except (OSError, ValueError):
        return {}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _at(tree: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _flat(tree: Any, prefix: str = "") -> Sequence[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    if not isinstance(tree, Mapping):
        return [(prefix.rstrip("."), _shown(tree))]
    return [pair for name, item in tree.items() for pair in _flat(item, f"{prefix}{name}.")]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
