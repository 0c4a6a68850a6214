"""`ftk tiny`."""

from pathlib import Path
from typing import Annotated

import typer

from ftk.cli.options import Json, show


def tiny(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="For example qwen-image.", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    trained: Annotated[
        bool,
        typer.Option("--trained", help="The one that comes with ftk and draws its small world, instead: qwen-image alone."),
    ] = False,
    json: Json = False,
) -> None:
    """Write a complete small random model in the Diffusers layout, to try things on without a download."""
    from ftk.demo import lesson
    from ftk.errors import ConfigError
    from ftk.models import base as models

    model = models.get(family)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty folder: name a new one.")
    if trained and family != lesson.FAMILY:
        raise ConfigError(f"--trained: the model that comes with ftk is a {lesson.FAMILY}, not a {family}.")
    if trained:
        lesson.write_model(directory)
    else:
        model.tiny(directory)
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    show("tiny", {"family": family, "directory": str(directory), "num_bytes": num_bytes}, json)
