"""`ftk init`."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file to write.")] = Path("run.yaml"),
    recipe: Annotated[str, typer.Option("--recipe", help="Which recipe to start from.")] = "qwen-image-lora",
) -> None:
    """Write a run file to edit, from one of the recipes."""
    from ftk import storage
    from ftk.configs.load import RECIPES
    from ftk.errors import ConfigError

    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if recipe not in names:
        raise ConfigError(f"--recipe {recipe}: there is no such recipe. Valid: {', '.join(names)}")
    if run_file.exists():
        raise ConfigError(f"{run_file} exists already: name another file, or delete it first.")
    storage.commit_bytes(run_file, (RECIPES / f"{recipe}.yaml").read_bytes())
    typer.echo(f"Wrote {run_file}. Name your photos' folder under data.sources, then: ftk run {run_file}")
