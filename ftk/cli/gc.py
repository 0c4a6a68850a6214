"""`ftk gc`."""

import sys
from typing import Annotated

import typer

from ftk.cli.options import Json, cache_directory, show


def gc(
    directory: Annotated[
        str, typer.Argument(metavar="CACHE", help="A cache, or the workspace that holds it.", show_default=False)
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what no sample names.")] = False,
    json: Json = False,
) -> None:
    """Remove from a cache what no sample names, after showing it: items, encoders no longer used, left-over files."""
    from dataclasses import asdict

    from ftk.cache import gc as stage

    cache = cache_directory(directory)
    report = stage.run(cache, remove=yes and not dry_run)
    plain = asdict(report)
    show("gc", plain if json else {**plain, "garbage": [_described(one) for one in plain["garbage"]]}, json)
    if report.removed or dry_run or json or not report.garbage:
        return
    if not sys.stdin.isatty():
        typer.echo("Nothing was removed: add --yes.", err=True)
    elif typer.confirm("Remove this?"):
        stage.run(cache, remove=True)


def _described(garbage: dict[str, object]) -> dict[str, object]:
    from ftk.progress import human_bytes

    named = ", ".join(map(str, garbage["examples"])) if isinstance(garbage["examples"], list) else ""
    size = float(str(garbage["num_bytes"]))
    return {"what": f"{garbage['count']} {garbage['what']}", "size": human_bytes(size), "for example": named}
