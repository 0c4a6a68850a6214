"""`ftk cache`."""

from typing import Annotated

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_run, show


def cache(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Encode the I-th of N parts: one job of an array on many machines.")
    ] = "1/1",
    engine: Annotated[str | None, typer.Option("--engine", hidden=True)] = None,
    full_hash: Annotated[bool, typer.Option("--full-hash", hidden=True)] = False,
) -> None:
    """Encode images and captions once, into sharded latents and embeddings; only what changed is encoded again."""
    _refuse_former_options(engine, full_hash)
    resolved = load_run(run_file, overrides, workspace)
    from ftk.cache import stage
    from ftk.pipeline.engine import JobPart

    share = JobPart.parse(part)
    show("cache", stage.dry_run(resolved, share) if dry_run else stage.run(resolved, share), json)


def _refuse_former_options(engine: str | None, full_hash: bool) -> None:
    """Options that have become settings only: the message has the new spelling."""
    from ftk.errors import ConfigError

    if engine is not None:
        raise ConfigError(f"--engine is not an option any more. Write --set cache.engine={engine}, or set it in the run file.")
    if full_hash:
        raise ConfigError("--full-hash is not an option any more. Write --set cache.full_hash=true, or set it in the run file.")
