"""`ftk verify`."""

from typing import Annotated

import typer

from ftk.cli.options import Json, show


def verify(
    directory: Annotated[
        str, typer.Argument(metavar="CACHE", help="A cache, or the workspace that holds it.", show_default=False)
    ],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte; by default sizes, headers and indexes.")] = False,
    json: Json = False,
) -> None:
    """Check that a cache is as it was committed; damaged shards are named and set aside, for `ftk cache` to make anew."""
    from dataclasses import asdict

    from ftk.cache import verify as stage
    from ftk.cli.options import cache_directory
    from ftk.errors import CacheError

    report = stage.run(cache_directory(directory), deep)
    plain = asdict(report)
    plain["damages"] = [str(damage) for damage in report.damages] if not json else plain["damages"]
    show("verify", plain, json)
    if report.damages:
        left = len(report.damages) - len(report.set_aside)
        raise CacheError(
            f"{report.directory} is damaged in {len(report.damages)} places, listed above. Run `ftk cache RUN.yaml`: it "
            f"mends what is damaged and keeps the rest."
            + (f" {left} files could not be set aside, or are no shards." if left and report.deep else "")
        )
