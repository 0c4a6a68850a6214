"""`ftk inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, show

if TYPE_CHECKING:
    from ftk.pipeline.inspect import Summary

_EXAMPLE_CHARS = 120


def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A prepared dataset, or the workspace that holds it.", show_default=False)
    ],
    html: Annotated[bool, typer.Option("--html", help="Write a page with samples, crops and rejects to look at.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where --html writes; inspect.html in the dataset by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a prepared dataset holds: in the terminal, as JSON, or as one HTML page that needs no network."""
    from ftk import storage
    from ftk.errors import ConfigError
    from ftk.pipeline.dataset import PreparedDataset
    from ftk.pipeline.inspect import summarise
    from ftk.pipeline.inspect_page import page

    if out is not None and not html:
        raise ConfigError(f"--out {out}: it says where the page goes. Add --html.")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file in it, for example {out / 'inspect.html'}.")
    dataset = PreparedDataset.open(_prepared_directory(directory))
    if not html:
        summary = summarise(dataset)
        if json:
            show("inspect", summary, as_json=True)
        else:
            _print(summary)
        return
    summary, data = page(dataset)
    out = out or dataset.directory / "inspect.html"
    storage.commit_bytes(out, data)
    if json:
        from dataclasses import asdict

        show("inspect", {**asdict(summary), "page": str(out)}, as_json=True)
    else:
        typer.echo(out)


def _prepared_directory(directory: Path) -> Path:
    """What to show of a folder: the one place that tells kinds of folders apart."""
    from ftk.errors import ConfigError, DatasetError
    from ftk.pipeline.dataset import MANIFEST

    for candidate in (directory, directory / "prepared"):
        if (candidate / MANIFEST).exists():
            return candidate
    advice = "Name a prepared dataset, or the workspace that holds it."
    if not directory.exists():
        raise DatasetError(f"{directory} does not exist. {advice}")
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file. {advice}")
    unfinished = next((one for one in (directory, directory / "prepared") if (one / "shards").is_dir()), None)
    if unfinished and not (unfinished / "cache.json").exists():
        raise DatasetError(f"{unfinished} has shards but no {MANIFEST}: prepare has not ended. Run `ftk prepare RUN.yaml`.")
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    raise DatasetError(f"{directory} is no prepared dataset: it holds {found}, and no {MANIFEST}. {advice}")


def _print(summary: "Summary") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for table in (_totals(summary), _buckets(summary), _captions(summary), _sources(summary), _rejects(summary)):
        if table is not None:
            console.print(table)
            console.print()
    if summary.duplicates:
        console.print(_duplicates(summary))
        console.print()
    console.print(f"To look at the samples: ftk inspect {summary.directory} --html", markup=False, soft_wrap=True)


def _table(title: str, *columns: str, header: bool = True) -> Any:
    """A column called `#NAME` holds numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=header, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith("#")
        table.add_column(column.removeprefix("#"), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _text(text: str, most: int = _EXAMPLE_CHARS) -> Any:
    """Names and captions are shown as they are: no markup, no control characters, no line breaks."""
    from rich.text import Text

    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return Text(printable if len(printable) <= most else f"{printable[:most]}…")


def _totals(summary: "Summary") -> Any:
    from ftk.progress import human_bytes

    table = _table(summary.directory, "", "", header=False)
    loss, size = summary.crop_loss, summary.original_megapixels
    rows = {
        "inputs": f"{summary.num_inputs:,}",
        "samples": f"{summary.num_samples:,}",
        "rejects": f"{summary.num_rejects:,}",
        "shards": f"{summary.num_shards:,}, {human_bytes(summary.num_bytes)}",
        "lost to the crop": f"median {loss.median:.1%}, worst {loss.most:.1%} of the pixels" if loss else "-",
        "megapixels": f"{size.least:.2f} / {size.median:.2f} / {size.most:.2f} of the originals (min, median, max)"
        if size
        else "-",
        "upscaled": f"{summary.num_upscaled:,}",
        "copied": f"{summary.num_copied:,} as they were",
        "flipped": f"{summary.num_flipped:,}",
        "masks, controls": f"{summary.num_masks:,}, {summary.num_controls:,}",
        "long captions": f"{summary.num_long_captions:,}",
        "duplicates": f"{summary.num_duplicates:,} equal, {summary.num_near_duplicates:,} look alike",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _buckets(summary: "Summary") -> Any:
    from rich.bar import Bar

    if not summary.buckets:
        return None
    table = _table("buckets", "#size", "#aspect", "#samples", "#share", "")
    largest = max(bucket.num_samples for bucket in summary.buckets)
    for bucket in summary.buckets:
        table.add_row(
            f"{bucket.width}x{bucket.height}",
            f"{bucket.width / bucket.height:.2f}",
            f"{bucket.num_samples:,}",
            f"{bucket.share:.1%}",
            Bar(size=largest, begin=0, end=bucket.num_samples, width=24),
        )
    return table


def _captions(summary: "Summary") -> Any:
    captions = summary.captions
    if captions.characters is None:
        return None
    table = _table("captions", "", "", header=False)
    characters = captions.characters
    several = ", ".join(f"{number} in {samples:,} samples" for number, samples in captions.captions_a_sample.items())
    table.add_row("captions", f"{captions.num_captions:,}")
    table.add_row("a sample", several)
    lengths = f"{characters.least:,.0f} / {characters.median:,.0f} / {characters.most:,.0f} (min, median, max)"
    table.add_row("characters", lengths)
    for position, (tag, number) in enumerate(captions.leading_tags.items()):
        table.add_row("" if position else "start with", _text(f"{tag} ({number:,})"))
    return table


def _sources(summary: "Summary") -> Any:
    if not summary.sources:
        return None
    table = _table("sources", "source", "#samples", "#rejects", "#repeats", "role")
    for source in summary.sources:
        repeats = "-" if source.repeats is None else f"{source.repeats:,}"
        table.add_row(_text(source.name), f"{source.num_samples:,}", f"{source.num_rejects:,}", repeats, source.role or "-")
    return table


def _rejects(summary: "Summary") -> Any:
    if not summary.rejects:
        return None
    table = _table("rejects", "reason", "#inputs", "for example")
    for group in summary.rejects:
        for position, example in enumerate(group.examples):
            labels = ("", "") if position else (group.reason, f"{group.num_inputs:,}")
            table.add_row(*labels, _text(f"{example['path']}: {example['detail']}"))
    return table


def _duplicates(summary: "Summary") -> Any:
    table = _table("duplicates, for example", "sample", "is like", "#bits that differ")
    for pair in summary.duplicates:
        table.add_row(_text(pair["key"]), _text(pair["like"]), "equal file" if pair["bits"] < 0 else f"{pair['bits']} of 64")
    return table
