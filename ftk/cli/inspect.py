"""`ftk inspect`."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, show

if TYPE_CHECKING:
    from ftk.cache.cache_summary import CacheSummary
    from ftk.cache.store import CacheStore
    from ftk.pipeline.dataset import PreparedDataset
    from ftk.pipeline.prepared_summary import PreparedSummary
    from ftk.train.run_summary import RunSummary

LOGGER = logging.getLogger("ftk")
_CACHE = "cache.json"
_RUN = ("config.yaml", "environment.json")
_PAGE = "inspect.html"
_ADVICE = "Name a prepared dataset, a cache, a run, or the workspace that holds them."


def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A prepared dataset, a cache, a run, or their workspace.", show_default=False)
    ],
    html: Annotated[
        bool, typer.Option("--html", help="Write a page to look at: samples, crops, rejects; latents; curves of a run.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where --html writes; inspect.html in DIR by default.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Of a cache: decode some latents with this model's VAE.")
    ] = None,
    prepared: Annotated[
        Path | None, typer.Option("--prepared", metavar="DIR", help="What the cache was made from, unless beside it.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a prepared dataset or a cache holds, or where a run stands.

    In the terminal, as JSON, or as an HTML page that needs no network.
    """
    _check(html, out, model, prepared)
    found = _find(directory)
    _check_found(found, out, model)
    from ftk.pipeline.dataset import PreparedDataset

    dataset = PreparedDataset.open(found.prepared) if found.prepared else None
    parts: list[_Inspection] = []
    store = _open_cache(found.cache) if found.cache else None
    if dataset is not None:
        parts.append(_prepared_part(dataset, out or dataset.directory / _PAGE if html else None))
    if store is not None:
        sources = _sources(store, prepared, dataset) if model else None
        parts.append(_cache_part(store, out or Path(store.location) / _PAGE if html else None, model, sources))
    is_one = found.prepared is None and found.cache is None and found.runs == (directory,)
    parts += [_run_part(run, out or run / _PAGE if html else None, verify=is_one) for run in found.runs]
    _show(parts, json, is_one)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The folders to show; at least one."""

    prepared: Path | None
    cache: Path | None
    runs: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inspection:
    """What is shown of one of them; `page` is the file that was written."""

    summary: "PreparedSummary | CacheSummary | RunSummary"
    page: Path | None


def _check(html: bool, out: Path | None, model: Path | None, prepared: Path | None) -> None:
    from ftk.errors import ConfigError

    if out is not None and not html:
        raise ConfigError(f"--out {out}: it says where the page goes. Add --html.")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file in it, for example {out / _PAGE}.")
    if model is not None and not html:
        raise ConfigError(f"--model {model}: decoded latents are on the page. Add --html.")
    if prepared is not None and model is None:
        raise ConfigError(f"--prepared {prepared}: its pictures stand beside decoded latents. Add --html --model DIR.")


def _check_found(found: _Found, out: Path | None, model: Path | None) -> None:
    from ftk.errors import ConfigError

    folders = [folder for folder in (found.prepared, found.cache, *found.runs) if folder is not None]
    if found.cache is None and model is not None:
        kind = "a prepared dataset" if found.prepared else "a run"
        raise ConfigError(f"--model {model}: {folders[0]} is {kind} and has no latents to decode.")
    if out is not None and len(folders) > 1:
        number = "two" if len(folders) == 2 else f"{len(folders)}"
        raise ConfigError(
            f"--out {out}: there are {number} pages to write. Name the one to show, {' or '.join(map(str, folders))}."
        )


def _find(directory: Path) -> _Found:
    """What to show of a folder: the one place that tells kinds of folders apart."""
    from ftk.pipeline.dataset import MANIFEST

    runs = _runs(directory)
    if runs == (directory,):
        return _Found(prepared=None, cache=None, runs=runs)

    is_either = any((directory / name).exists() for name in (MANIFEST, _CACHE))
    prepared, cache = (directory, directory) if is_either else (directory / "prepared", directory / "cache")
    has_prepared, has_cache = (prepared / MANIFEST).exists(), (cache / _CACHE).exists()
    unfinished = next((one for one in (directory, cache) if _is_unfinished_cache(one)), None)
    if not has_prepared and not has_cache and unfinished is None and not runs:
        _refuse(directory)
    if (has_prepared or runs) and unfinished is not None:
        LOGGER.info("%s is not finished and not shown. Run `ftk cache RUN.yaml`.", unfinished)
        unfinished = None
    return _Found(prepared=prepared if has_prepared else None, cache=cache if has_cache else unfinished, runs=runs)


def _runs(directory: Path) -> tuple[Path, ...]:
    """The folder itself if it is a run's, else the runs of a workspace, or of its folder `runs`."""
    for candidates in ([directory], (directory / "runs").glob("*"), directory.glob("*")):
        found = tuple(sorted(path for path in candidates if _is_run(path)))
        if found:
            return found
    return ()


def _is_run(directory: Path) -> bool:
    return (directory / "metrics.parquet").exists() or all((directory / name).exists() for name in _RUN)


def _is_unfinished_cache(directory: Path) -> bool:
    return not (directory / _CACHE).exists() and any((directory / kind).is_dir() for kind in ("latents", "texts"))


def _refuse(directory: Path) -> None:
    """Say what a folder holds instead."""
    from ftk.errors import ConfigError, DatasetError
    from ftk.pipeline.dataset import MANIFEST

    if not directory.exists():
        raise DatasetError(f"{directory} does not exist. {_ADVICE}")
    if not directory.is_dir():
        raise ConfigError(f"{directory} is a file. {_ADVICE}")
    unfinished = next((one for one in (directory, directory / "prepared") if (one / "shards").is_dir()), None)
    if unfinished:
        raise DatasetError(f"{unfinished} has shards but no {MANIFEST}: prepare has not ended. Run `ftk prepare RUN.yaml`.")
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
    raise DatasetError(
        f"{directory} is no prepared dataset, no cache and no run: it holds {found}, and no {MANIFEST} or {_CACHE}. {_ADVICE}"
    )


def _open_cache(directory: Path) -> "CacheStore":
    from ftk.cache.store import CacheStore

    return CacheStore.open(directory)


def _sources(store: "CacheStore", named: Path | None, shown: "PreparedDataset | None") -> "PreparedDataset | None":
    """The prepared dataset that a user named, that is shown too, or that lies beside the cache."""
    from ftk.pipeline.dataset import MANIFEST, PreparedDataset

    beside = Path(store.location).resolve().parent / "prepared"
    if named is None and shown is not None:
        return shown
    if named is None and not (beside / MANIFEST).exists():
        return None
    return PreparedDataset.open(named or beside)


def _prepared_part(dataset: "PreparedDataset", page: Path | None) -> _Inspection:
    from ftk import storage
    from ftk.pipeline import prepared_page
    from ftk.pipeline import prepared_summary as numbers

    if page is None:
        return _Inspection(summary=numbers.summarise(dataset), page=None)
    summary, data = prepared_page.page(dataset)
    storage.commit_bytes(page, data)
    return _Inspection(summary=summary, page=page)


def _cache_part(store: "CacheStore", page: Path | None, model: Path | None, sources: "PreparedDataset | None") -> _Inspection:
    from ftk import storage
    from ftk.cache import cache_page
    from ftk.cache import cache_summary as numbers

    if page is None:
        return _Inspection(summary=numbers.summarise(store), page=None)
    summary, data = cache_page.page(store, model, sources)
    storage.commit_bytes(page, data)
    return _Inspection(summary=summary, page=page)


def _run_part(directory: Path, page: Path | None, verify: bool) -> _Inspection:
    from ftk import storage
    from ftk.train import run_page
    from ftk.train import run_summary as numbers

    if page is None:
        return _Inspection(summary=numbers.summarise(directory, verify), page=None)
    summary, data = run_page.page(directory)
    storage.commit_bytes(page, data)
    return _Inspection(summary=summary, page=page)


def _show(parts: list[_Inspection], json: bool, is_run: bool) -> None:
    """As JSON the first one's numbers, beside them `cache` and `runs` where the first one is something else."""
    if json:
        show("inspect", _plain(parts, is_run), as_json=True)
        return
    for part in parts:
        if part.page is not None:
            typer.echo(part.page)
    _print([part.summary for part in parts if part.page is None], is_run)


def _plain(parts: list[_Inspection], is_run: bool) -> dict[str, Any]:
    from ftk.cache.cache_summary import CacheSummary
    from ftk.pipeline.prepared_summary import PreparedSummary

    plain = [(part.summary, {**asdict(part.summary), **({"page": str(part.page)} if part.page else {})}) for part in parts]
    if is_run:
        return plain[0][1]
    prepared = next((one for summary, one in plain if isinstance(summary, PreparedSummary)), None)
    cache = next((one for summary, one in plain if isinstance(summary, CacheSummary)), None)
    runs = [one for summary, one in plain if not isinstance(summary, (PreparedSummary, CacheSummary))]
    first = prepared or cache or {}
    return {**first, **({"cache": cache} if prepared and cache else {}), **({"runs": runs} if runs else {})}


def _print(summaries: "list[PreparedSummary | CacheSummary | RunSummary]", is_run: bool) -> None:
    from ftk.cache.cache_summary import CacheSummary
    from ftk.cli import inspect_tables
    from ftk.pipeline.prepared_summary import PreparedSummary

    runs: list[RunSummary] = []
    for summary in summaries:
        if isinstance(summary, PreparedSummary):
            inspect_tables.print_prepared(summary)
        elif isinstance(summary, CacheSummary):
            inspect_tables.print_cache(summary)
        else:
            runs.append(summary)
    if is_run and runs:
        inspect_tables.print_run(runs[0])
    elif runs:
        inspect_tables.print_runs(runs)
