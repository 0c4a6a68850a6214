"""Options that several commands share, each spelled once, and how a report is shown."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftk.run import Run

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="section.key=value", help="Change one setting; repeatable.")
]
Workspace = Annotated[str | None, typer.Option("--workspace", help="Where outputs go, instead of the file's `workspace`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate and print the plan and its cost; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on stdout.")]


def load_run(run_file: Path, overrides: list[str] | None, workspace: str | None) -> "Run":
    """The resolved run file, its sources checked too: a typo anywhere fails before any work."""
    from ftk import run
    from ftk.pipeline.sources import base as sources

    resolved = run.load_run(run_file, overrides or (), workspace)
    for position, source in enumerate(resolved.config.data.sources):
        sources.parse(source, f"data.sources.{position}")
    return resolved


def cache_directory(location: str) -> Path:
    """The cache that a user means by its folder or by the workspace around it."""
    from ftk import locations

    directory = locations.local_path(location)
    inner = directory / "cache"
    return inner if not (directory / "cache.json").exists() and inner.is_dir() else directory


def show(title: str, report: Any, as_json: bool) -> None:
    """Print a report on stdout: a table for people, or one JSON object."""
    plain = asdict(report) if is_dataclass(report) and not isinstance(report, type) else report
    if as_json:
        typer.echo(json.dumps(json_safe(plain), ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ftk.progress import plain_text

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in plain.items():
        for label, text in _lines(name, value):
            table.add_row(label, Text(plain_text(text)))
    Console().print(table)


def json_safe(value: Any) -> Any:
    """NaN and infinity, which JSON does not know, become null."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(name: str, value: Any) -> list[tuple[str, str]]:
    label = name.removeprefix("num_").replace("_", " ")
    if name.endswith("_bytes") or name == "num_bytes":
        from ftk.progress import human_bytes

        return [(label, human_bytes(value))]
    if isinstance(value, Mapping):
        shown = ", ".join(f"{key}: {item}" for key, item in value.items())
        return [(label, shown)] if value else []
    if isinstance(value, list):
        rows = [_row(item) for item in value]
        more = [f"and {len(rows) - 10} more"] if len(rows) > 10 else []
        return [(label if not position else "", row) for position, row in enumerate([*rows[:10], *more])]
    if isinstance(value, bool) or value is None:
        return [(label, {True: "yes", False: "no", None: "-"}[value])]
    if isinstance(value, float):
        return [(label, f"{value:,.4g}")]
    return [(label, f"{value:,}" if isinstance(value, int) else str(value))]


def _row(item: Any) -> str:
    """One entry of a list on one line: its values, without those that are empty."""
    if isinstance(item, Mapping):
        item = list(item.values())
    return ", ".join(_row(part) for part in item if part not in ("", [])) if isinstance(item, list) else str(item)
