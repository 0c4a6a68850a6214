"""`ftk prepare`."""

from typing import Annotated

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def prepare(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Make the I-th of N parts: one job of an array on many machines.")
    ] = "1/1",
) -> None:
    """Bucket, resize and crop images into tar shards with tables; every input is a sample or a reject with a reason."""
    config = load_config(run_file, overrides, workspace)
    from ftk.pipeline import stage
    from ftk.pipeline.engine import Part

    share = Part.parse(part)
    show("prepare", stage.dry_run(config, share) if dry_run else stage.run(config, share), json)
