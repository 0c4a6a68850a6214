"""`ftk cache`."""

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def cache(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Encode images and captions once, into sharded latents and embeddings; only what changed is encoded again."""
    config = load_config(run_file, overrides, workspace)
    from ftk.cache import stage

    show("cache", stage.dry_run(config) if dry_run else stage.run(config), json)
