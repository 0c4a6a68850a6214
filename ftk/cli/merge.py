"""`ftk merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftk.cli.export import Best, Dtype, Step, choice_of
from ftk.cli.options import Json, Overrides, RunFile, Workspace, load_run, show

if TYPE_CHECKING:
    from ftk.configs.schema import AddedAdapterConfig


def merge(
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the pipeline.", show_default=False)],
    strength: Annotated[float, typer.Option("--strength", help="Of the run's own LoRA, LoHa or LoKr.")] = 1.0,
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="PATH[@STRENGTH]",
            help="Merge this adapter after the run's own: a file or folder of ftk or another program. Repeatable, in order.",
        ),
    ] = None,
    best: Best = False,
    step: Step = None,
    dtype: Dtype = None,
    overrides: Overrides = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Merge the trained weights into the base model and save it as a Diffusers pipeline.

    Nothing is saved unless both give the same prediction.
    """
    resolved = load_run(run_file, overrides, workspace)
    from ftk.deliver import merge as stage

    added = [_added(each) for each in add or ()]
    show("merge", stage.merge(resolved, out, choice_of(best, step, dtype), strength, added), json)


def _added(text: str) -> "AddedAdapterConfig":
    """PATH, or PATH@STRENGTH; a path that ends so itself is a path."""
    from ftk.configs.load import validate
    from ftk.configs.schema import AddedAdapterConfig

    path, separator, number = text.rpartition("@")
    try:
        strength = float(number)
    except ValueError:
        separator = ""
    if not separator or Path(text).exists():
        return AddedAdapterConfig(path=text)
    return validate(AddedAdapterConfig, {"path": path, "strength": strength}, f"--add {text}")
