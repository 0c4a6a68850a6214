"""What `ftk inspect` prints: a prepared dataset, a cache and runs as tables."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftk.cache.cache_summary import CacheSummary, ChannelSummary, LengthSummary
    from ftk.pipeline.prepared_summary import BucketSummary, PreparedSummary
    from ftk.train.run_summary import RunSummary

_EXAMPLE_CHARS = 120
_BAR_CHARS = 24
_MOST_CHANNELS, _MOST_PROMPTS = 32, 10
_MOST_UNMATCHED = 10
_MOST_CHECKPOINTS = 10


def print_prepared(summary: "PreparedSummary") -> None:
    """Tables of a prepared dataset."""
    tables = (_totals(summary), _buckets(summary.buckets), _captions(summary), _sources(summary), _rejects(summary))
    duplicates = _duplicates(summary) if summary.duplicates else None
    _print(
        [*tables, _caption_notes(summary), _caption_check(summary), duplicates],
        f"To look at the samples: ftk inspect {summary.directory} --html",
    )


def print_buckets(counted: Mapping[str, int]) -> None:
    """The table of buckets alone, from samples by WIDTHxHEIGHT."""
    from ftk.pipeline.prepared_summary import named_buckets

    table = _buckets(named_buckets(counted))
    if table is not None:
        _print([table])


def print_cache(summary: "CacheSummary") -> None:
    """Tables of a cache."""
    tables = (
        *(_cache_totals(summary), _storage(summary), _buckets(summary.buckets), _lengths(summary.text_lengths)),
        *(_latents(summary), _channels(summary.latents.channels), _encoders(summary), _prompts(summary)),
    )
    _print(tables, f"To look at decoded latents: ftk inspect {summary.directory} --html --model MODEL")


def print_run(summary: "RunSummary") -> None:
    """Tables of one run."""
    tables = (_run_totals(summary), _run_bands(summary), _run_checkpoints(summary), _run_files(summary))
    _print(tables, f"To look at its curves and sample images: ftk inspect {summary.directory} --html")


def print_runs(summaries: Sequence["RunSummary"]) -> None:
    """A workspace's runs, one a line."""
    table = _table("runs", "run", "state", "#step", "#of", "#loss", "#best validation", "#a step")
    for one in summaries:
        validation = one.validation.best_loss if one.validation else None
        table.add_row(
            _text(Path(one.directory).name),
            one.state,
            f"{one.step:,}",
            "-" if one.num_steps is None else f"{one.num_steps:,}",
            f"{one.loss.now:.4g}" if one.loss else "-",
            "-" if validation is None else f"{validation:.4g}",
            "-" if one.seconds_per_step is None else f"{one.seconds_per_step:.3g} s",
        )
    _print([table], f"To see more of one: ftk inspect {summaries[0].directory}")


def _print(tables: Iterable[Any], advice: str = "") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        if table is not None:
            # A table would break its title at its own width, and a folder's name with it.
            console.print(_text(table.title, most=len(table.title)), style="bold", soft_wrap=True)
            table.title = None
            console.print(table)
            console.print()
    if advice:
        console.print(advice, markup=False, soft_wrap=True)


def _table(title: str, *columns: str, header: bool = True) -> Any:
    """A column called `#NAME` holds numbers."""
    from rich.table import Table

    table = Table(title=title, show_header=header, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith("#")
        table.add_column(column.removeprefix("#"), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def _text(text: str, most: int = _EXAMPLE_CHARS) -> Any:
    """Names and captions are shown as they are: no markup, no control characters, no line breaks."""
    from rich.text import Text

    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return Text(printable if len(printable) <= most else f"{printable[:most]}…")


def _totals(summary: "PreparedSummary") -> Any:
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
        **({"control images": ", ".join(f"{kind}: {n:,}" for kind, n in summary.controls.items())} if summary.controls else {}),
        "empty masks": f"{summary.num_empty_masks:,} black all over",
        "long captions": f"{summary.num_long_captions:,}",
        "cut wildcards": f"{summary.num_cut_wildcards:,} images with more variants than were taken",
        "duplicates": f"{summary.num_duplicates:,} equal, {summary.num_near_duplicates:,} look alike",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _buckets(buckets: Sequence["BucketSummary"]) -> Any:
    from rich.bar import Bar

    if not buckets:
        return None
    table = _table("buckets", "#size", "#aspect", "#samples", "#share", "")
    largest = max(bucket.num_samples for bucket in buckets)
    for bucket in buckets:
        table.add_row(
            f"{bucket.width}x{bucket.height}",
            f"{bucket.width / bucket.height:.2f}",
            f"{bucket.num_samples:,}",
            f"{bucket.share:.1%}",
            Bar(size=largest, begin=0, end=bucket.num_samples, width=_BAR_CHARS),
        )
    return table


def _captions(summary: "PreparedSummary") -> Any:
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


def _caption_notes(summary: "PreparedSummary") -> Any:
    """Where captions did not come from the images' own files, and what the sources' names hint at."""
    table = _table("caption files", "", "", header=False)
    examples = _first(summary.fallback_captions, summary.num_fallback_captions)
    table.add_row("images with the source's `caption`", _text(f"{summary.num_fallback_captions:,}{examples}"))
    table.add_row("text files of no image", f"{summary.num_unmatched_captions:,}")
    for file in summary.unmatched_captions[:_MOST_UNMATCHED]:
        likely = f", perhaps of {file.likely_image}" if file.likely_image else ""
        table.add_row("", _text(f"{file.path}{likely}: {file.detail}", most=2 * _EXAMPLE_CHARS))
    for hint in summary.hints:
        table.add_row("hint", _text(hint, most=len(hint)))
    return table if table.row_count > 2 or summary.num_fallback_captions else None


def _caption_check(summary: "PreparedSummary") -> Any:
    if not summary.caption_findings:
        return None
    table = _table("caption check", "", "#samples", "captions have")
    for finding in summary.caption_findings:
        examples = f": {', '.join(finding.examples)}" if finding.examples else ""
        text = f"{finding.detail}{examples}"
        table.add_row(finding.kind, f"{finding.num_samples:,}", _text(text, most=len(text)))
    return table


def _first(names: Sequence[str], number: int) -> str:
    more = f" and {number - 3:,} more" if number > 3 else ""
    return f": {', '.join(names[:3])}{more}" if names else ""


def _sources(summary: "PreparedSummary") -> Any:
    if not summary.sources:
        return None
    settings = ["its own settings"] if any(source.settings for source in summary.sources) else []
    table = _table("sources", "source", "#samples", "#rejects", "#repeats", "role", *settings)
    for source in summary.sources:
        repeats = "-" if source.repeats is None else f"{source.repeats:,}"
        cells = [f"{source.num_samples:,}", f"{source.num_rejects:,}", repeats, source.role or "-"]
        table.add_row(_text(source.name), *cells, *([_text(source.settings or "-")] if settings else []))
    return table


def _rejects(summary: "PreparedSummary") -> Any:
    if not summary.rejects:
        return None
    table = _table("rejects", "reason", "#inputs", "for example")
    for group in summary.rejects:
        for position, example in enumerate(group.examples):
            labels = ("", "") if position else (group.reason, f"{group.num_inputs:,}")
            table.add_row(*labels, _text(f"{example['path']}: {example['detail']}"))
    return table


def _duplicates(summary: "PreparedSummary") -> Any:
    table = _table("duplicates, for example", "sample", "is like", "#bits that differ")
    for pair in summary.duplicates:
        table.add_row(_text(pair["key"]), _text(pair["like"]), "equal file" if pair["bits"] < 0 else f"{pair['bits']} of 64")
    return table


def _cache_totals(summary: "CacheSummary") -> Any:
    from ftk.progress import human_bytes

    table = _table(summary.directory, "", "", header=False)
    lengths = summary.text_lengths
    tokens = f"{lengths.least:,} / {lengths.median:,.0f} / {lengths.percentile_95:,.0f} / {lengths.most:,}"
    limit = "unknown" if lengths.limit is None else f"{lengths.limit:,}"
    garbage = sum(kind.garbage_bytes for kind in summary.storage)
    rows = {
        "family": summary.family,
        "samples": f"{summary.num_samples:,}",
        "images": f"{summary.num_images:,}",
        "control images": f"{summary.num_controls:,}",
        "masks": f"{summary.num_masks:,}",
        "texts": f"{summary.num_texts:,} for {lengths.num_captions:,} captions",
        "tokens a caption": f"{tokens} (min, median, 95%, max)",
        "cut": f"{lengths.num_at_limit:,} that reach the limit of {limit} tokens",
        "garbage": f"{human_bytes(garbage)} that no sample names: `ftk gc` removes it" if garbage else "none",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _storage(summary: "CacheSummary") -> Any:
    from ftk.progress import human_bytes

    table = _table("storage", "", "#items", "#shards", "#on disk", "#named by no sample")
    for kind in summary.storage:
        numbers = (f"{kind.num_items:,}", f"{kind.num_shards:,}", human_bytes(kind.num_bytes), human_bytes(kind.garbage_bytes))
        table.add_row(kind.kind, *numbers)
    return table


def _lengths(lengths: "LengthSummary") -> Any:
    from rich.bar import Bar

    table = _table("text lengths in tokens", "#tokens", "#captions", "#share", "")
    largest = max(number for *_, number in lengths.histogram)
    for low, high, number in itertools.dropwhile(lambda one: not one[2], lengths.histogram):
        label = f"{low:,}+" if high is None else f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}"
        bar = Bar(size=largest, begin=0, end=number, width=_BAR_CHARS)
        table.add_row(label, f"{number:,}", f"{number / lengths.num_captions:.1%}", bar)
    return table


def _latents(summary: "CacheSummary") -> Any:
    latents = summary.latents
    table = _table(f"latents: {latents.num_read:,} of {summary.num_images + summary.num_controls:,} read", "", "", header=False)
    verdict = "near 0 and 1, as normalised latents should be"
    if not latents.is_normalised:
        verdict = "far from 0 and 1, where the normalised latents of a trained VAE lie"
    rows = {
        "stored as": latents.dtype,
        "mean, std": f"{latents.mean:.3f}, {latents.std:.3f}: {verdict}",
        "posterior std": f"{latents.posterior_std:.4f} on average",
        "largest": f"{latents.largest:.2f}",
        "not finite": f"{latents.non_finite_share * 100:.2g}%: set cache.latents_dtype: float32 and run `ftk cache` again"
        if latents.non_finite_share
        else "none",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _channels(channels: Sequence["ChannelSummary"]) -> Any:
    shown = list(enumerate(channels))
    title = "latent channels"
    if len(shown) > _MOST_CHANNELS:
        shown = sorted(shown, key=lambda one: -abs(one[1].mean) - abs(one[1].std - 1))[:_MOST_CHANNELS]
        title += f": the {_MOST_CHANNELS} of {len(channels)} that are furthest from 0 and 1"
    table = _table(title, "#channel", "#mean", "#std", "#posterior std")
    for number, channel in shown:
        table.add_row(str(number), f"{channel.mean:.3f}", f"{channel.std:.3f}", f"{channel.posterior_std:.4f}")
    return table


def _encoders(summary: "CacheSummary") -> Any:
    from ftk.cache.cache_summary import flat_parts

    table = _table("encoders", "", "", "", header=False)
    for kind, parts in summary.encoders.items():
        for position, (name, value) in enumerate(flat_parts(parts)):
            table.add_row("" if position else kind, name.replace("_", " "), _text(value))
    return table


def _prompts(summary: "CacheSummary") -> Any:
    if not summary.prompts:
        return None
    table = _table(f"prompts cached: {len(summary.prompts):,}", "", header=False)
    for prompt in summary.prompts[:_MOST_PROMPTS]:
        table.add_row(_text(prompt or "(empty)"))
    if len(summary.prompts) > _MOST_PROMPTS:
        table.add_row(f"and {len(summary.prompts) - _MOST_PROMPTS:,} more")
    return table


def _run_totals(summary: "RunSummary") -> Any:
    from ftk.progress import human_bytes

    table = _table(summary.directory, "", "", header=False)
    of = "" if summary.num_steps is None else f" of {summary.num_steps:,}"
    rows = {
        "state": summary.state + (f", by {summary.holder}" if summary.holder else ""),
        "step": f"{summary.step:,}{of}, {summary.num_samples:,} samples seen",
        "last checkpoint": _last_checkpoint(summary),
        "time": _run_time(summary),
        **_run_losses(summary),
    }
    if summary.learning_rate is not None:
        rows["learning rate"] = f"{summary.learning_rate:.3g}"
    if summary.seconds_per_step is not None and summary.samples_per_second is not None:
        rows["speed"] = f"{summary.seconds_per_step:.3g} s a step, {summary.samples_per_second:,.3g} samples/s"
    if summary.data_wait_share is not None:
        rows["waiting for data"] = f"{summary.data_wait_share:.1%} of the time"
    if summary.memory_bytes is not None:
        rows["memory"] = f"{human_bytes(summary.memory_bytes)} at most"
    rows["bad steps"] = _bad_steps(summary)
    if summary.loss_scale is not None:
        rows["loss scale"] = f"{summary.loss_scale:,.0f}; {summary.num_overflows:,} steps skipped because gradients overflowed"
    rows["sample sheets"] = f"{len(summary.sample_sheets):,}"
    for label, value in rows.items():
        table.add_row(label, _text(value))
    return table


def _last_checkpoint(summary: "RunSummary") -> str:
    if not summary.checkpoints:
        return "none"
    last = summary.checkpoints[-1]
    return f"{last.name}, {'whole' if last.problem is None else f'damaged: {last.problem}'}"


def _run_time(summary: "RunSummary") -> str:
    spent = f"{timedelta(seconds=round(summary.seconds))} trained"
    if summary.seconds_left is None:
        return spent
    return f"{spent}, {timedelta(seconds=round(summary.seconds_left))} left"


def _run_losses(summary: "RunSummary") -> dict[str, str]:
    rows = {}
    if summary.loss is not None:
        best = f"the best was {summary.loss.best:.4g} at step {summary.loss.best_step:,}"
        rows["loss"] = f"{summary.loss.now:.4g}, mean of 20 steps; {best}"
    if summary.preservation_loss is not None:
        rows["preservation loss"] = f"{summary.preservation_loss:.4g}, mean of 20 steps"
    if summary.validation is not None:
        measured = summary.validation
        rows["validation loss"] = f"{measured.loss:.4g} at step {measured.step:,}"
        if measured.best_loss is not None and measured.best_step is not None:
            rows["validation loss"] += f"; the best was {measured.best_loss:.4g} at step {measured.best_step:,}"
    return rows


def _bad_steps(summary: "RunSummary") -> str:
    if not summary.num_bad_steps:
        return "none"
    return f"{summary.num_bad_steps:,} without a finite loss or gradient, the last at step {summary.bad_steps[-1]:,}"


def _run_bands(summary: "RunSummary") -> Any:
    if not summary.bands:
        return None
    title = f"loss by sigma: means of the first and the last {summary.num_band_steps:,} steps"
    table = _table(title, "sigma", "#samples", "#first", "#now")
    for band in summary.bands:
        means = ("-" if mean is None else f"{mean:.4g}" for mean in (band.first, band.now))
        table.add_row(f"{band.low:g} to {band.high:g}", f"{band.share:.1%}", *means)
    return table


def _run_checkpoints(summary: "RunSummary") -> Any:
    from ftk.progress import human_bytes

    if not summary.checkpoints:
        return None
    table = _table("checkpoints", "#step", "#size", "")
    for one in summary.checkpoints[::-1][:_MOST_CHECKPOINTS]:
        note = "best" if one.is_best else ""
        table.add_row(f"{one.step:,}", human_bytes(one.num_bytes), _text(f"damaged: {one.problem}" if one.problem else note))
    if len(summary.checkpoints) > _MOST_CHECKPOINTS:
        table.add_row(f"and {len(summary.checkpoints) - _MOST_CHECKPOINTS:,} more")
    return table


def _run_files(summary: "RunSummary") -> Any:
    from ftk.progress import human_bytes

    if not summary.files:
        return None
    table = _table("weights", "file", "#size")
    for one in summary.files:
        table.add_row(_text(one.name), human_bytes(one.num_bytes))
    return table
