"""`ftk inspect`."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftk.cli.options import Json, show

if TYPE_CHECKING:
    from ftk.cache.inspect import Summary as CacheSummary
    from ftk.cache.store import CacheStore
    from ftk.pipeline.dataset import PreparedDataset
    from ftk.pipeline.inspect import Summary

LOGGER = logging.getLogger("ftk")
_CACHE = "cache.json"
_PAGE = "inspect.html"
_ADVICE = "Name a prepared dataset, a cache, or the workspace that holds them."


def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A prepared dataset, a cache, or their workspace.", show_default=False)
    ],
    html: Annotated[bool, typer.Option("--html", help="Write a page to look at: samples, crops, rejects; latents.")] = False,
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
    """Show what a prepared dataset or a cache holds: in the terminal, as JSON, or as an HTML page that needs no network."""
    _check(html, out, model, prepared)
    found = _find(directory)
    _check_found(found, out, model)
    from ftk.pipeline.dataset import PreparedDataset

    dataset = PreparedDataset.open(found.prepared) if found.prepared else None
    parts: list[_Part] = []
    store = _open_cache(found.cache) if found.cache else None
    if dataset is not None:
        parts.append(_prepared_part(dataset, out or dataset.directory / _PAGE if html else None))
    if store is not None:
        sources = _sources(store, prepared, dataset) if model else None
        parts.append(_cache_part(store, out or Path(store.location) / _PAGE if html else None, model, sources))
    _show(parts, json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The folders to show; at least one."""

    prepared: Path | None
    cache: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is shown of one of them; `page` is the file that was written."""

    summary: "Summary | CacheSummary"
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

    if found.cache is None and model is not None:
        raise ConfigError(f"--model {model}: {found.prepared} is a prepared dataset and has no latents to decode.")
    if out is not None and found.prepared and found.cache:
        raise ConfigError(
            f"--out {out}: there are two pages to write. Name the one to show, {found.prepared} or {found.cache}."
        )


def _find(directory: Path) -> _Found:
    """What to show of a folder: the one place that tells kinds of folders apart."""
    from ftk.pipeline.dataset import MANIFEST

    is_either = any((directory / name).exists() for name in (MANIFEST, _CACHE))
    prepared, cache = (directory, directory) if is_either else (directory / "prepared", directory / "cache")
    has_prepared, has_cache = (prepared / MANIFEST).exists(), (cache / _CACHE).exists()
    unfinished = next((one for one in (directory, cache) if _is_unfinished_cache(one)), None)
    if not has_prepared and not has_cache and unfinished is None:
        _refuse(directory)
    if has_prepared and unfinished is not None:
        LOGGER.info("%s is not finished and not shown. Run `ftk cache RUN.yaml`.", unfinished)
        unfinished = None
    return _Found(prepared=prepared if has_prepared else None, cache=cache if has_cache else unfinished)


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
        f"{directory} is no prepared dataset and no cache: it holds {found}, and no {MANIFEST} or {_CACHE}. {_ADVICE}"
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


def _prepared_part(dataset: "PreparedDataset", page: Path | None) -> _Part:
    from ftk import storage
    from ftk.pipeline import inspect as numbers
    from ftk.pipeline import inspect_page

    if page is None:
        return _Part(summary=numbers.summarise(dataset), page=None)
    summary, data = inspect_page.page(dataset)
    storage.commit_bytes(page, data)
    return _Part(summary=summary, page=page)


def _cache_part(store: "CacheStore", page: Path | None, model: Path | None, sources: "PreparedDataset | None") -> _Part:
    from ftk import storage
    from ftk.cache import inspect as numbers
    from ftk.cache import inspect_page

    if page is None:
        return _Part(summary=numbers.summarise(store), page=None)
    summary, data = inspect_page.page(store, model, sources)
    storage.commit_bytes(page, data)
    return _Part(summary=summary, page=page)


def _show(parts: list[_Part], json: bool) -> None:
    """As JSON the first one's numbers, and the cache's as `cache` where the first one is the prepared dataset."""
    from ftk.cli import inspect_tables
    from ftk.pipeline.inspect import Summary

    if json:
        first, *rest = ({**asdict(part.summary), **({"page": str(part.page)} if part.page else {})} for part in parts)
        plain: dict[str, Any] = {**first, **({"cache": rest[0]} if rest else {})}
        show("inspect", plain, as_json=True)
        return
    for part in parts:
        if part.page is not None:
            typer.echo(part.page)
        elif isinstance(part.summary, Summary):
            inspect_tables.print_prepared(part.summary)
        else:
            inspect_tables.print_cache(part.summary)
