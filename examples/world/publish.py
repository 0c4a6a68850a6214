"""Put the trained model where ftk ships it from, with its card: what it is, how it learned, what it can and cannot do.

    python examples/world/publish.py

takes work/world/small, the metrics of the run that trained it and what `measure.py` found, and writes ftk/demo/model.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parts import parse, parser, run
from PIL import Image
from rich.console import Console

from ftk import storage
from ftk.demo.lesson import MODEL
from ftk.errors import ModelError
from ftk.train import run_summary
from ftk.train.loop import NUM_BANDS
from ftk.train.run_summary import Floats, History
from ftk.train.sheet import png_bytes

NUM_POINTS = 80
_COLOURS = ("#2a6fdb", "#1b9e77", "#d98c00", "#c2377a")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 320, 50, 110, 16, 36
_CARD = Path(__file__).with_name("card.md")


def curve_svg(rows: History) -> bytes:
    """Loss over the steps, a line for each band of sigma, both axes logarithmic."""
    step_P, losses_PK = _averaged(rows)
    finite = losses_PK[np.isfinite(losses_PK)]
    lowest, highest = int(np.floor(np.log10(finite.min()))), int(np.ceil(np.log10(finite.max())))

    def across(step: Any) -> Any:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * np.log10(step) / np.log10(len(rows))

    def down(loss: Any) -> Any:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (highest - np.log10(loss)) / max(highest - lowest, 1)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for loss in (10.0**power for power in range(lowest, highest + 1)):
        y = down(loss)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in (10**power for power in range(int(np.log10(len(rows))) + 1)):
        parts.append(f'<text x="{across(step):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{step:,}</text>')
    for band, colour in enumerate(_COLOURS):
        there_P = np.isfinite(losses_PK[:, band])
        points = zip(across(step_P[there_P]), down(losses_PK[there_P, band]), strict=True)
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        label = f"σ {band / NUM_BANDS:g} to {(band + 1) / NUM_BANDS:g}"
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{_TOP + 18 * (band + 1)}" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end" fill="#555">step</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>", ""]).encode()


def _averaged(rows: History) -> tuple[Floats, Floats]:
    """[P] steps at even distances on a logarithmic axis and [P, K] the bands' mean losses around them; NaN without samples."""
    edges = np.unique(np.geomspace(1, len(rows) + 1, NUM_POINTS).astype(int)) - 1
    counts_PK = np.add.reduceat(rows.band_counts_NK, edges[:-1])
    sums_PK = np.add.reduceat(np.nan_to_num(rows.band_losses_NK) * rows.band_counts_NK, edges[:-1])
    means_PK = np.divide(sums_PK, counts_PK, out=np.full_like(sums_PK, np.nan), where=counts_PK > 0)
    return (edges[:-1] + edges[1:] + 1) / 2, means_PK


def card(model: Path, run_directory: Path, measured: dict[str, Any]) -> str:
    """The card's text."""
    rows, settings = run_summary.history(run_directory), run_summary.settings(run_directory)
    sizes = {path.parent.name: path.stat().st_size for path in sorted(model.glob("*/*.safetensors"))}
    return _CARD.read_text(encoding="utf-8").format(
        parameters=sum(sizes.values()) / 2e6,
        megabytes=sum(sizes.values()) / 1e6,
        agreement=_table(
            (name, f"{share:.1%}", f"{measured['through_vae'][name]:.1%}") for name, share in measured["agreement"].items()
        ),
        steps=int(rows.step_N[-1]),
        batch=settings["train"]["global_batch_size"],
        minutes=float(rows.seconds_N.sum()) / 60,
        parts=_table((name, f"{size // 2:,}", f"{size:,}") for name, size in sizes.items()),
        **{name: measured[name] for name in ("num_captions", "num_inference_steps", "guidance_scale")},
    )


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--run", default="pretrain", help="the run that trained the transformer")
    made.add_argument("--to", type=Path, default=MODEL, metavar="DIR")
    options = parse(made)
    model, run_directory = options.directory / "small", options.directory / "runs" / options.run
    if not (model / "model_index.json").is_file() or not (options.directory / "measure.json").is_file():
        raise ModelError(f"{options.directory} lacks small/ or measure.json: run assemble.py --trained and measure.py first.")
    measured = json.loads((options.directory / "measure.json").read_text())
    with storage.committing_directory(options.to) as temporary:
        shutil.copytree(model, temporary, dirs_exist_ok=True)
        storage.commit_bytes(temporary / "README.md", card(model, run_directory, measured).encode())
        storage.commit_bytes(temporary / "curve.svg", curve_svg(run_summary.history(run_directory)))
        with Image.open(options.directory / "measure.png") as sheet:
            storage.commit_bytes(temporary / "samples.png", png_bytes(sheet.convert("RGB").quantize(128)))
    found = sum(path.stat().st_size for path in options.to.rglob("*") if path.is_file())
    Console().print(f"{options.to}: {found:,} bytes in all")


if __name__ == "__main__":
    run(main)
