"""`ftk export`."""

from pathlib import Path
from typing import Annotated

import typer

from ftk.cli.options import Json, Overrides, RunFile, Workspace, load_config, show

Best = Annotated[bool, typer.Option("--best", help="The step with the lowest validation loss, not the newest.")]


def export(
    run_file: RunFile,
    form: Annotated[str, typer.Option("--format", help="diffusers, peft, comfyui, kohya or lycoris.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go; exports/FORMAT of the run by default.")
    ] = None,
    best: Best = False,
    overrides: Overrides = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Write the trained weights in another format, as far as the method can become one."""
    config = load_config(run_file, overrides, workspace)
    from ftk.train import deliver

    show("export", deliver.export(config, form, out, best), json)
