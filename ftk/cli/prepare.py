"""`ftk prepare`."""

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def prepare(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Bucket, resize and crop images into tar shards with tables; every input is a sample or a reject with a reason."""
    config = load_config(run_file, overrides, workspace)
    from ftk.pipeline import stage

    show("prepare", stage.dry_run(config) if dry_run else stage.run(config), json)
