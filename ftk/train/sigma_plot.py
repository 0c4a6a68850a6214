"""Histograms of the noise levels that a run draws: as text for `ftk train --dry-run`, and as a PNG in the run's folder.

`tokens` maps an image size, as it shall be called, to its tokens (latent cells / patch^2): where sigma is shifted by them,
the smallest and the largest size have a histogram each, elsewhere all sizes have one.
"""

import io
import shutil
import textwrap
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from ftk.models.components.schedule import TokenShift
from ftk.train.flow import SigmaDistribution

Bins = npt.NDArray[np.float64]

_TEXT_BINS = (100, 50, 25, 20, 10)
"""Divisors of the usual table's 1000 entries: with others, bins of equal probability would look uneven."""
_PNG_BINS = 50
_TEXT_ROWS = 8
_LABEL_COLUMNS = 7
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
_X_LABEL = "sigma (1 = noise)"

_WIDTH_PX, _PANEL_HEIGHT_PX = 1200, 460
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 100, 40, 84, 88
_TITLE_PX, _LABEL_PX = 26, 20
_INK, _FAINT, _BAR, _PAPER = "#222222", "#dddddd", "#3b6ea8", "#ffffff"
_SHORTEST_FONT_PX = 10


def histogram(
    distribution: SigmaDistribution, tokens: int, num: int = 20_000, seed: int = 0, num_bins: int = _PNG_BINS
) -> Bins:
    """The share of draws in each of `num_bins` equal bins of (0, 1], in percent; sums to 100.

    One draw from each of `num` equal shares of the distribution: what is seen is its shape, not chance.
    """
    jitter = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = ((torch.arange(num) + jitter) / num).clamp(max=1 - 2.0**-24)
    sigma = distribution.sigma(u.float(), tokens).double().numpy()
    # Bins are closed above, as the table's entries end at 1 and not at 0; fp32 may be off by a little.
    bins = np.ceil(sigma * num_bins - 1e-4).astype(np.int64) - 1
    return np.bincount(bins.clip(0, num_bins - 1), minlength=num_bins).astype(np.float64) * (100 / num)


def describe(distribution: SigmaDistribution) -> str:
    """The settings in a line, as the run file spells them."""
    own = {
        "uniform": "",
        "logit_normal": f" (logit_mean {distribution.logit_mean:g}, logit_std {distribution.logit_std:g})",
        "sigmoid": f" (sigmoid_scale {distribution.sigmoid_scale:g})",
        "mode": f" (mode_scale {distribution.mode_scale:g})",
        "beta": f" (beta_alpha {distribution.beta_alpha:g}, beta_beta {distribution.beta_beta:g})",
    }
    shift = distribution.shift
    parts = [
        f"{distribution.sampling}{own[distribution.sampling]}",
        "no shift" if shift is None else "shift by resolution" if isinstance(shift, TokenShift) else f"shift {shift:g}",
        "continuous" if distribution.continuous else f"table of {len(distribution.table)}",
    ]
    if (distribution.minimum, distribution.maximum) != (0.0, 1.0):
        parts.append(f"within [{distribution.minimum:g}, {distribution.maximum:g}]")
    return ", ".join(parts)


def text(distribution: SigmaDistribution, tokens: Mapping[str, int], width: int | None = None) -> str:
    """Histograms of block characters with labelled axes, at most `width` columns wide (the terminal's by default)."""
    columns = shutil.get_terminal_size().columns if width is None else width
    fitting = [number for number in _TEXT_BINS if number + _LABEL_COLUMNS <= columns]
    num_bins = fitting[0] if fitting else _TEXT_BINS[-1]
    lines = textwrap.wrap(f"sigma: {describe(distribution)}", max(columns, _LABEL_COLUMNS + num_bins))
    for name, count in _panels(distribution, tokens).items():
        bins = histogram(distribution, count, num_bins=num_bins)
        lines += ["", *([name] if name else []), *_text_bars(bins), *_text_axis(num_bins)]
    return "\n".join(lines)


def png(distribution: SigmaDistribution, tokens: Mapping[str, int]) -> bytes:
    """The same as a PNG: a panel for each histogram, with the settings as its title."""
    panels = _panels(distribution, tokens)
    image = Image.new("RGB", (_WIDTH_PX, _PANEL_HEIGHT_PX * len(panels)), _PAPER)
    draw = ImageDraw.Draw(image)
    for number, (name, count) in enumerate(panels.items()):
        title = describe(distribution) + (f": {name}" if name else "")
        _draw_panel(draw, number * _PANEL_HEIGHT_PX, title, histogram(distribution, count))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _panels(distribution: SigmaDistribution, tokens: Mapping[str, int]) -> dict[str, int]:
    """Name and tokens of each histogram that is worth having; without a name where there is one for all sizes."""
    by_size = sorted(tokens.items(), key=lambda item: item[1])
    if not isinstance(distribution.shift, TokenShift):
        return {"": by_size[0][1]}
    return {f"{name} ({count:,} tokens)": count for name, count in (by_size[0], by_size[-1])}


def _text_bars(bins: Bins) -> list[str]:
    top = _axis_top(bins)
    eighths = np.ceil(bins / top * _TEXT_ROWS * 8 - 1e-9).astype(int)
    lines = []
    for row in reversed(range(_TEXT_ROWS)):
        label = f"{top * (row + 1) / _TEXT_ROWS:g}%" if (row + 1) % 4 == 0 else ""
        bars = "".join(_EIGHTHS[level] for level in (eighths - 8 * row).clip(0, 8))
        lines.append(f"{label:>{_LABEL_COLUMNS - 2}} │{bars}".rstrip())
    return lines


def _text_axis(num_bins: int) -> list[str]:
    ticks, labels = ["─"] * num_bins, [" "] * (num_bins + _LABEL_COLUMNS)
    shown = _TICKS if num_bins > 20 else (0.0, 1.0)
    for tick in shown:
        column = min(num_bins - 1, round(tick * num_bins))
        ticks[column] = "┴"
        label = f"{tick:g}"
        start = _LABEL_COLUMNS + min(column - len(label) // 2, num_bins - len(label))
        labels[start : start + len(label)] = label
    padding = " " * _LABEL_COLUMNS
    return [f"{'0%':>{_LABEL_COLUMNS - 2}} └{''.join(ticks)}", "".join(labels).rstrip(), padding + _X_LABEL]


def _axis_top(bins: Bins) -> float:
    """The smallest round number that no bar exceeds, in percent."""
    highest = max(float(bins.max()), 0.1)
    power = 10.0 ** np.floor(np.log10(highest))
    return float(next(power * step for step in _ROUND if power * step >= highest - 1e-9))


def _draw_panel(draw: ImageDraw.ImageDraw, top_px: int, title: str, bins: Bins) -> None:
    left, right = _LEFT_PX, _WIDTH_PX - _RIGHT_PX
    top, bottom = top_px + _TOP_PX, top_px + _PANEL_HEIGHT_PX - _BOTTOM_PX
    highest = _axis_top(bins)
    labels = ImageFont.load_default(_LABEL_PX)
    draw.text((left, top_px + 28), title, fill=_INK, font=_fitting(draw, title, right - left))
    for step in range(5):
        y = bottom - (bottom - top) * step // 4
        draw.line([(left, y), (right, y)], fill=_FAINT)
        draw.text((left - 12, y), f"{highest * step / 4:g}%", fill=_INK, font=labels, anchor="rm")
    edges = np.linspace(left, right, len(bins) + 1)
    for low, high, share in zip(edges[:-1], edges[1:], bins, strict=True):
        y = bottom - (bottom - top) * share / highest
        if share:
            draw.rectangle([round(low) + 1, min(round(y), bottom - 1), round(high) - 1, bottom], fill=_BAR)
    draw.line([(left, bottom), (right, bottom)], fill=_INK, width=2)
    for tick in _TICKS:
        x = left + (right - left) * tick
        draw.line([(x, bottom), (x, bottom + 8)], fill=_INK, width=2)
        draw.text((x, bottom + 14), f"{tick:g}", fill=_INK, font=labels, anchor="ma")
    draw.text(((left + right) / 2, bottom + 44), _X_LABEL, fill=_INK, font=labels, anchor="ma")


def _fitting(draw: ImageDraw.ImageDraw, title: str, width_px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The title's font, smaller where it would not fit."""
    size = _TITLE_PX
    while size > _SHORTEST_FONT_PX and draw.textlength(title, font=ImageFont.load_default(size)) > width_px:
        size -= 1
    return ImageFont.load_default(size)
