"""Progress of long work on stderr: a live bar on a terminal, a log line every few seconds elsewhere."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOGGER = logging.getLogger("ftk")
_SECONDS_BETWEEN_LINES = 10.0

console = Console(stderr=True)


class ProgressBar(Protocol):
    """What `track` yields."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` as done; `note` is shown beside the rate."""


class _Rate:
    def __init__(self, label: str, total: int | None, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.first, self.done = label, total, unit, done, done
        self.started = self.printed = time.monotonic()
        self.note = ""

    def text(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        shown = f"{rate:,.1f} {self.unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:,.2f} s/{self.unit}"
        return f"{shown}  {self.note}".rstrip()

    def time_left(self) -> str:
        done = self.done - self.first
        if self.total is None or not done:
            return "unknown time"
        seconds = (time.monotonic() - self.started) / done * (self.total - self.done)
        return time.strftime("%H:%M:%S", time.gmtime(seconds))


class _Bar(_Rate):
    def __init__(self, label: str, total: int | None, unit: str, done: int, bar: Progress) -> None:
        super().__init__(label, total, unit, done)
        self.bar, self.task = bar, bar.add_task(label, total=total, completed=done, rate="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        self.bar.update(self.task, completed=self.done, rate=self.text())


class _Lines(_Rate):
    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        now = time.monotonic()
        if now - self.printed >= _SECONDS_BETWEEN_LINES:
            self.printed = now
            total = "an unknown number" if self.total is None else f"{self.total:,}"
            LOGGER.info("%s: %s of %s, %s, %s left", self.label, f"{self.done:,}", total, self.text(), self.time_left())


@contextlib.contextmanager
def track(label: str, total: int | None, unit: str, done: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of `total` pieces of work, of which `done` were there before: rate, count and time left.

    `total` is None when only the end will tell.
    """
    if not console.is_terminal:
        yield _Lines(label, total, unit, done)
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(label, total, unit, done, bar)


def plain_text(text: str) -> str:
    """Text for a terminal: names and captions are other people's, and may hold escape sequences."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def human_bytes(count: float) -> str:
    """A byte count for people: 3.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
