"""`ftk export`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, Overrides, RunFile, Workspace, load_run, show

if TYPE_CHECKING:
    from ftk.run import Run

Best = Annotated[bool, typer.Option("--best", help="The step with the lowest validation loss, not the newest.")]


def export(
    run_file: RunFile,
    form: Annotated[
        str | None, typer.Option("--format", help="diffusers, peft, comfyui, kohya or lycoris; the method's own by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; exports/FORMAT of the run by default.")
    ] = None,
    best: Best = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload them to this repository of the Hub too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and their sizes; keep and upload nothing.")
    ] = False,
    overrides: Overrides = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Write the trained weights in another format, as far as the method can become one; with --push to the Hub too."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.errors import ConfigError

    if private and push is None:
        raise ConfigError("--private is for --push: nothing else leaves this machine.")
    report = _plan(resolved, form, best, push) if dry_run else _run(resolved, form, out, best, push, private)
    show("export", report, json)


def _run(
    resolved: "Run", form: str | None, out: Path | None, best: bool, repository: str | None, private: bool
) -> dict[str, Any]:
    from ftk.deliver import export, push

    if repository is None:
        return asdict(export.export(resolved, form, out, best))
    push.check(repository)
    report = export.export(resolved, form, out, best, repository)
    message = f"Step {report.step:,} of {resolved.config.run}, {report.format}"
    url = push.upload(Path(report.directory), report.files, repository, private, message)
    return {**asdict(report), "url": url}


def _plan(resolved: "Run", form: str | None, best: bool, repository: str | None) -> dict[str, Any]:
    """What would be written, found out by writing it where it is thrown away."""
    from ftk.deliver import export, push

    if repository is not None:
        push.check_name(repository)
    planned = export.plan(resolved, form, best, repository)
    return planned if repository is None else {**planned, "repository": repository, "logged_in": push.is_logged_in()}
