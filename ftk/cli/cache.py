"""`ftk cache`."""

from typing import Annotated

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def cache(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Encode the I-th of N parts: one job of an array on many machines.")
    ] = "1/1",
    engine: Annotated[str | None, typer.Option("--engine", help="local or ray; short for --set cache.engine=...")] = None,
    full_hash: Annotated[
        bool, typer.Option("--full-hash", help="Know the encoders by all bytes of their weights; short for --set.")
    ] = False,
) -> None:
    """Encode images and captions once, into sharded latents and embeddings; only what changed is encoded again."""
    short = [f"cache.engine={engine}"] if engine else []
    short += ["cache.full_hash=true"] if full_hash else []
    config = load_config(run_file, [*(overrides or ()), *short], workspace)
    from ftk.cache import stage
    from ftk.pipeline.engine import JobPart

    share = JobPart.parse(part)
    show("cache", stage.dry_run(config, share) if dry_run else stage.run(config, share), json)
