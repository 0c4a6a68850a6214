"""`ftk merge`."""

from pathlib import Path
from typing import Annotated

import typer

from ftk.cli.export import Best
from ftk.cli.options import Json, Overrides, RunFile, Workspace, load_run, show


def merge(
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the pipeline.", show_default=False)],
    best: Best = False,
    overrides: Overrides = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Write the base model with what was trained folded in, as a pipeline folder, once its prediction is seen to agree."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.deliver import export

    show("merge", export.merge(resolved, out, best), json)
