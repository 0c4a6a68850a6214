"""`ftk demo`: a small model learns a new word from a dozen pictures."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, show

_NUM_PREVIEWED = 3
_PREVIEW_EDGE = 32
"""Characters across, pixels down."""

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table
    from rich.text import Text


def demo(
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="A folder to work in; a temporary one by default.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Learn to follow control images (outlines of things) instead of a new word.")
    ] = False,
    json: Json = False,
) -> None:
    """Watch a small model learn a new word in a minute or two: no GPU, no download, no photos needed."""
    import tempfile

    root = Path(workspace) if workspace else Path(tempfile.mkdtemp(prefix="ftk-demo-"))
    started = time.monotonic()
    reports = _run(root, control=control)
    reports["demo"] = {"workspace": str(root), "seconds": round(time.monotonic() - started, 1)}
    if json:
        show("demo", reports, as_json=True)
    elif control:
        render_control(root, reports)
    else:
        render(root, reports)


def _run(root: Path, *, control: bool) -> dict[str, Any]:
    import torch

    from ftk.cli.run import run_all
    from ftk.demo import lesson, steering

    # The model's operations last microseconds: threads would wait for each other longer than they work.
    torch.set_num_threads(1)
    taught = steering if control else lesson
    resolved = taught.set_up(root)
    reports: dict[str, Any] = run_all(resolved)
    return {**reports, "lesson": asdict(taught.examine(resolved))}


def render(root: Path, reports: Mapping[str, Any]) -> None:
    """What was learned, first of all; then how, and how to do it with one's own photos."""
    from rich.console import Console

    console = Console()
    found, train, seconds = reports["lesson"], reports["train"], reports["demo"]["seconds"]
    console.print(
        f"\nThe model has learned what a {found['word']} is: from {found['num_pictures']} pictures, in {train['step']} steps, "
        f"as a LoRA of {train['num_trainable_parameters']:,} parameters. All of it took {seconds:.0f} seconds.\n",
        highlight=False,
    )
    if console.color_system == "truecolor":
        console.print(_preview(Path(found["grid"])))
    for table in (_learned(found), _losses(found), _stages(root, reports)):
        console.print(table)
        console.print()
    console.print(
        f"Look at it: {found['grid']}\n"
        f"How it was trained: ftk inspect {root / 'runs' / 'demo'} --html\n\n"
        "With your own photos (each IMG.jpg with its caption in IMG.txt beside it):\n\n"
        "  ftk init my-lora.yaml        then name your folder under data.sources\n"
        "  ftk run my-lora.yaml         prepare, cache, train; run it again at any time, it skips what is done\n"
        "  ftk sample my-lora.yaml      pictures from the base model and from your LoRA, side by side",
        highlight=False,
        soft_wrap=True,
    )


def render_control(root: Path, reports: Mapping[str, Any]) -> None:
    """How well the pictures follow a control image; then how, and how to do it with one's own photos."""
    from rich.console import Console

    console = Console()
    lesson, train, seconds = reports["lesson"], reports["train"], reports["demo"]["seconds"]
    console.print(
        f"\nThe model has learned to follow outlines: from {lesson['num_pictures']} pictures, in {train['step']} steps, as a "
        f"Control LoRA of {train['num_trainable_parameters']:,} parameters. All of it took {seconds:.0f} seconds.\n",
        highlight=False,
    )
    if console.color_system == "truecolor":
        console.print(_preview(Path(lesson["grid"]), ("control", "without", "with it")))
    for table in (_steered(lesson), _stages(root, reports)):
        console.print(table)
        console.print()
    console.print(
        f"Look at it: {lesson['grid']}\n"
        f"How it was trained: ftk inspect {root / 'runs' / 'demo-control'} --html\n\n"
        "With your own photos: docs/methods.md has run files for ControlNet, Control LoRA and T2I-Adapter, whose control\n"
        "images `ftk prepare` makes from the photos (`controls: [{make: canny}]`).",
        highlight=False,
        soft_wrap=True,
    )


def _steered(lesson: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    title = f"Read from the pictures of {lesson['num_scenes']} new captions, which tell no places and no sizes"
    table = Table(title=title, title_justify="left")
    table.add_column("of the things", overflow="fold")
    for name in ("without a control", "with their control", "with another one's"):
        table.add_column(name, justify="right")
    rows = [
        ("are where they are to be", "place", "{:.0%}"),
        ("have the right size", "size", "{:.0%}"),
        ("have the right shape", "shape", "{:.0%}"),
        ("have the right colour", "colour", "{:.0%}"),
        ("distance from where they are to be, px", "distance_px", "{:.1f}"),
    ]
    for label, name, form in rows:
        table.add_row(label, *(form.format(lesson[when][name]) for when in ("without", "steered", "shuffled")))
    return table


def _preview(grid: Path, titles: Sequence[str] = ("before", "after")) -> "Table":
    """The first pictures of each column of a sheet, two pixels a character."""
    from rich.table import Table
    from rich.text import Text

    from ftk.train.sheet import cells

    table = Table.grid(padding=(0, 2))
    pictures = cells(grid)
    for column, title in enumerate(titles):
        shown = [picture for picture, _ in pictures[column :: len(titles)]][:_NUM_PREVIEWED]
        table.add_row(*(Text(title if not number else "") for number in range(len(shown))))
        table.add_row(*(_blocks(picture) for picture in shown))
    return table


def _blocks(picture: "Image.Image") -> "Text":
    import numpy as np
    from rich.text import Text

    scale = _PREVIEW_EDGE / max(picture.size)
    width, height = (max(2, round(side * scale) // 2 * 2) for side in picture.size)
    rows = np.asarray(picture.convert("RGB").resize((width, height))).tolist()
    text = Text()
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for colours in zip(upper, lower, strict=True):
            text.append("\u2580", "#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*colours[0], *colours[1]))
        text.append("\n")
    return text


def _learned(found: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    word, count = found["word"], found["num_scenes"]
    table = Table(
        title=f"Read from the pictures of {count} new captions with the word and {count} without", title_justify="left"
    )
    table.add_column("what", overflow="fold")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    rows = [
        (f"a {word} is there, of {count} that the captions name", "num_recognised", "{:.0f}"),
        ("of its look", "likeness", "{:.0%}"),
        (f"of all that captions with {word} tell", "followed", "{:.0%}"),
        (f"of all that captions without {word} tell", "kept", "{:.0%}"),
        (f"a {word} is there, of {count} that name another creature", "num_confused", "{:.0f}"),
    ]
    for title, name, shown in rows:
        table.add_row(title, *(shown.format(found[name][when]) for when in ("before", "after")))
    return table


def _losses(found: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    title = "Loss of pictures that were held out, by noise level"
    table = Table("sigma, 1 is pure noise", "before", "after", title=title, title_justify="left")
    for band in found["bands"]:
        table.add_row(f"{band['low']:g} to {band['high']:g}", f"{band['before']:.3f}", f"{band['after']:.3f}")
    return table


def _stages(root: Path, reports: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    from ftk.progress import human_bytes

    prepare, cache, train = (reports[name] for name in ("prepare", "cache", "train"))
    table = Table("stage", "what it did", "where", title="How", title_justify="left")
    rows = [
        ("prepare", f"{prepare['num_samples']} pictures into {len(prepare['buckets'])} aspect-ratio buckets, "
                    f"{prepare['num_rejects']} rejected", root / "prepared"),
        ("cache", f"{cache['num_latents_encoded']} images and {cache['num_texts_encoded']} captions encoded, "
                  f"{cache['num_latents_reused'] + cache['num_texts_reused']} reused, "
                  f"{human_bytes(cache['num_bytes'])}", root / "cache"),
        ("train", f"{train['step']} steps of {train['seconds_per_step'] * 1000:.0f} ms, {train['num_samples_seen']} samples",
         train["adapter"]),
    ]  # fmt: skip
    for stage, what, where in rows:
        table.add_row(stage, what, str(where))
    return table
