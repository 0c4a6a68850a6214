"""`ftk export`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ftk.cli.options import Json, Overrides, RunFile, Workspace, load_run, show

if TYPE_CHECKING:
    from ftk.deliver.export import Choice
    from ftk.run import Run

Best = Annotated[bool, typer.Option("--best", help="Take the step with the lowest validation loss, not the newest.")]
Step = Annotated[
    int | None, typer.Option("--step", help="Take the checkpoint of this step, not the newest.", show_default=False)
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype",
        help="Precision of what is written; by default float32 of an adapter, and train.precision of a whole model.",
        show_default=False,
    ),
]


def choice_of(best: bool, step: int | None, dtype: str | None) -> "Choice":
    """Which weights the options mean."""
    from ftk.deliver.export import Choice

    return Choice(best=best, step=step, dtype=dtype)  # type: ignore[arg-type]


def export(
    run_file: RunFile,
    form: Annotated[
        str | None,
        typer.Option("--format", help="diffusers, peft, comfyui, kohya, lycoris or a1111; the method's own by default."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; exports/FORMAT of the run by default.")
    ] = None,
    best: Best = False,
    step: Step = None,
    dtype: Dtype = None,
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
    """Export the trained weights to another format, if the method supports it; with --push, upload them to the Hub too."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.errors import ConfigError

    if private and push is None:
        raise ConfigError("--private is for --push: nothing else leaves this machine.")
    choice = choice_of(best, step, dtype)
    report = _plan(resolved, form, choice, push) if dry_run else _run(resolved, form, out, choice, push, private)
    show("export", report, json)


def _run(
    resolved: "Run", form: str | None, out: Path | None, choice: "Choice", repository: str | None, private: bool
) -> dict[str, Any]:
    from ftk.deliver import export, push

    if repository is None:
        return asdict(export.export(resolved, form, out, choice))
    push.check(repository)
    report = export.export(resolved, form, out, choice, repository)
    message = f"Step {report.step:,} of {resolved.config.run}, {report.format}"
    url = push.upload(Path(report.directory), report.files, repository, private, message)
    return {**asdict(report), "url": url}


def _plan(resolved: "Run", form: str | None, choice: "Choice", repository: str | None) -> dict[str, Any]:
    """What would be written, found out by writing it where it is thrown away."""
    from ftk.deliver import export, push

    if repository is not None:
        push.check_name(repository)
    planned = export.plan(resolved, form, choice, repository)
    return planned if repository is None else {**planned, "repository": repository, "logged_in": push.is_logged_in()}
