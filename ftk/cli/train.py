"""`ftk train`."""

from typing import Annotated

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the run that is there is set aside.")] = False,
) -> None:
    """Train from the cache with the denoiser alone in memory; resumes by itself from the newest checkpoint."""
    config = load_config(run_file, overrides, workspace)
    from ftk.train import stage

    show("train", stage.dry_run(config) if dry_run else stage.run(config, fresh=fresh), json)
