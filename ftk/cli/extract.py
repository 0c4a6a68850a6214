"""`ftk extract`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ftk.cli.options import Json, show

if TYPE_CHECKING:
    from rich.table import Table

    from ftk.deliver.extract import ExtractReport, LayerEnergy


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before: a folder or a Hub id.", show_default=False)],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model after, or an adapter.", show_default=False)],
    family: Annotated[str, typer.Option("--family", help="For example qwen-image.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the LoRA.", show_default=False)],
    rank: Annotated[int, typer.Option("--rank", help="Of each layer; with --energy the highest.")] = 16,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Take the lowest rank that keeps this share of a layer's squared change, such as 0.95."),
    ] = None,
    targets: Annotated[
        str, typer.Option("--targets", help="Of the denoiser: a group, `all`, '[to_q, to_k]' or '{regex: EXPRESSION}'.")
    ] = "all",
    form: Annotated[str, typer.Option("--format", help="diffusers, peft, comfyui or kohya.")] = "diffusers",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the factors.")] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to decompose.")] = "auto",
    json: Json = False,
) -> None:
    """Extract a LoRA from the difference between two models (truncated SVD), and report how much of it the LoRA captures."""
    from ftk.deliver import extract as stage

    report = stage.run(
        stage.ExtractConfig(
            family=family,
            base=base,
            tuned=tuned,
            out=out,
            rank=rank,
            energy=energy,
            targets=targets,
            form=form,
            dtype=dtype,
            device=device,
        )
    )
    if json:
        show("extract", report, as_json=True)
    else:
        _render(report)


def _render(report: "ExtractReport") -> None:
    from rich.console import Console
    from rich.table import Table

    from ftk.progress import plain_text

    summary = {
        "directory": report.directory,
        "format": report.format,
        "files": ", ".join(report.files),
        "num_bytes": report.num_bytes,
        "num_layers": report.num_layers,
        "rank": report.rank,
        "energy kept": f"{report.energy:.2%} of the squared change of these layers",
    }
    show("extract", summary, as_json=False)
    console = Console()
    console.print(_layers("by kind of layer, the most changed first", report.groups))
    console.print(_layers("layers with the most loss", report.worst))
    if not report.left_out:
        return
    title = f"not in the LoRA, {report.left_out_share:.2%} of the squared change"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("tensors", "number", "change", "why"):
        table.add_column(column, justify="right" if column in ("number", "change") else "left", overflow="fold")
    for one in report.left_out:
        table.add_row(plain_text(one.name), str(one.num_tensors or "all"), _percent(one.change), one.reason)
    console.print(table)


def _layers(title: str, rows: "Sequence[LayerEnergy]") -> "Table":
    from rich.table import Table

    from ftk.progress import plain_text

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("layer", "number", "rank", "change", "energy kept"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for one in rows:
        table.add_row(plain_text(one.name), str(one.num_layers), one.rank, _percent(one.change), f"{one.energy:.2%}")
    return table


def _percent(change: float | None) -> str:
    """Of the norm of the base's weights."""
    return "-" if change is None else f"{change:.3%}"
