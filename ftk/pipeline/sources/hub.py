"""Datasets of the Hugging Face Hub, or local folders of the same layout, streamed through the `datasets` library.

Chosen by `format: hub` alone. A dataset of the Hub is pinned to one commit when it is listed. Images come undecoded, and
no code of the dataset is ever run: the library has no such thing any more, and is not asked for it.
"""

import contextlib
import errno
import functools
import importlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, Field

from ftk import locations, storage
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, EnvironmentFault, FtkError, SourceError, did_you_mean
from ftk.pipeline import captions
from ftk.pipeline.captions import Problem
from ftk.pipeline.labels import Labels
from ftk.pipeline.sources.base import Blob, MayLack, Partition, Place, Record, beside, is_outside

CAPTION_COLUMNS = ("text", "caption", "prompt", "captions", "txt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "Accept its terms on its page if it has any, log in with `hf auth login`, and run the command again"
# Of whichever client: httpx, aiohttp, requests, or Python's own.
_NETWORK_ERRORS = {
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "RequestError", "ClientError", "RequestException"),
    *("ConnectionError", "TimeoutError", "IncompleteRead"),
}
_DISK_ERRNOS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}

DataFiles = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]


class HubSettings(MayLack):
    """Which part of the dataset is meant, and what its columns are."""

    split: str = Field(default="train", min_length=1)
    config_name: str | None = Field(default=None, description="which of the dataset's configurations, where it has several")
    revision: str | None = Field(default=None, description="branch, tag or commit of a dataset of the Hub")
    data_files: Annotated[DataFiles | None, Place(only_outside=True)] = Field(
        default=None, description="files of the dataset to read instead of all"
    )
    image: str | None = Field(default=None, description="column of the images; the first of that kind by default")
    captions: tuple[str, ...] = Field(
        default=(),
        description="columns of the captions, all of which are used; by default the first of " + ", ".join(CAPTION_COLUMNS),
    )
    mask: str | None = Field(default=None, description="column of the masks; an image without one is rejected")
    controls: tuple[str, ...] = Field(default=(), description="columns of the control images, in their order")


class Hub:
    """One partition a shard of the dataset, which is as a rule one file; the Hub's datasets by their commit."""

    Settings: type[BaseModel] = HubSettings

    def accepts(self, path: str) -> bool:
        """Never: a folder or an id says nothing of its layout."""
        return False

    def partitions(self, config: SourceConfig, settings: HubSettings, shard_samples: int) -> Iterator[Partition]:
        """The dataset's shards in their order; which columns are used is settled here, before anything is read.

        Raises:
            ConfigError: the library is not installed.
            SourceError: no such dataset, configuration, split or column; no access to it.
            EnvironmentFault: the Hub cannot be reached.
        """
        path, is_local = _locate(config, settings)
        commit = None if is_local else _commit(config, path, settings.revision)
        files = [] if commit else _files(config, path)
        _splits.cache_clear()
        dataset = _opened(config, settings, path, commit)
        _columns(config, settings, dataset)
        num_shards: int = dataset.num_shards
        names = storage.digest([file.relative for file in files])
        content = storage.digest([commit, num_shards, [[file.relative, file.signature] for file in files]])
        vouched = _only_own_files(settings.data_files)
        for index in range(num_shards):
            signature = storage.digest([content, index]) if vouched else None
            yield Partition(payload=(path, commit, names, index), signature=signature, num_records=None)

    def read(self, config: SourceConfig, settings: HubSettings, partition: Partition) -> Iterator[Record | Reject]:
        """The shard's rows in their order, each under the name SPLIT/SHARD/ROW.

        Raises:
            SourceError: a file of the dataset is damaged.
            EnvironmentFault: the Hub cannot be reached.
        """
        path, commit, _, index = partition.payload
        dataset = _opened(config, settings, path, commit)
        columns = _columns(config, settings, dataset)
        shard = _undecoded(dataset, columns).shard(dataset.num_shards, index)
        rows = enumerate(shard)
        number = 0
        top = f"{path}/" if commit is None else f"hf://datasets/{path}@"
        while True:
            with _explained(config, f" (split {settings.split}, shard {index}, after row {number})"):
                number, row = next(rows, (0, None))
            if row is None:
                return
            identity = f"{settings.split}/{index:05d}/{number:06d}"
            item = _item(config, settings, columns, row, identity, top)
            if isinstance(item, Problem):
                detail = locations.printable(item.detail)
                yield Reject(source=config.source_name, path=identity, reason=item.reason, detail=detail)
            else:
                yield item


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The columns that are read: those that the settings name, or the defaults that the dataset has."""

    image: str
    captions: tuple[str, ...]
    mask: str | None
    controls: tuple[str, ...]
    labels: Labels

    @property
    def images(self) -> dict[str, RejectReason]:
        """The columns that hold images, and why a row is rejected that lacks one."""
        return {
            **dict.fromkeys(self.controls, RejectReason.CONTROL_MISSING),
            **({self.mask: RejectReason.MASK_MISSING} if self.mask else {}),
            self.image: RejectReason.FILE_MISSING,
        }


def _item(
    config: SourceConfig, settings: HubSettings, columns: _Columns, row: dict[str, Any], identity: str, top: str
) -> Record | Problem:
    blobs: dict[str, list[Blob]] = {}
    for column, reason in columns.images.items():
        value = row[column]
        values = value if isinstance(value, list) else [] if _is_nothing(value) else [value]
        blobs_of_cell = [_blob(config, each, f"{identity}/{column}/{number}", top) for number, each in enumerate(values)]
        missing = next((each for each, blob in zip(values, blobs_of_cell, strict=True) if blob is None), None)
        may_lack = settings.optional and column in columns.controls
        if None in blobs_of_cell or not (blobs_of_cell or may_lack):
            return Problem(reason=reason, detail=f"its column `{column}` holds {_absence(missing)}")
        blobs[column] = [blob for blob in blobs_of_cell if blob is not None]
    texts = _captions(config, columns, row)
    if isinstance(texts, Problem):
        return texts
    return Record(
        identity=identity,
        image=blobs[columns.image][0],
        captions=texts or (str(captions.fallback(config)),),
        is_fallback=not texts,
        mask=blobs[columns.mask][0] if columns.mask else None,
        **beside(config, [blobs[column] for column in columns.controls]),
    )


def _is_nothing(value: Any) -> bool:
    """Whether a cell of a column of images is empty."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and not value.get("path"))


def _absence(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else None
    return f"a path to {locations.file_name(path)}, which does not lie in the dataset" if path else "nothing"


def _blob(config: SourceConfig, value: Any, place: str, top: str) -> Blob | None:
    """An image's bytes, or where they lie; a path that leads out of the dataset is not followed."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return Blob(location=f"{config.path}#{place}", data=bytes(data))
    path = value.get("path") if isinstance(value, dict) else None
    if not path:
        return None
    # Of zip://image.png::/folder/images.zip the last part is the file.
    archive, _, inner = path.rpartition("::")
    inside = inner if locations.is_url(inner) else os.path.normpath(inner)
    return Blob(location=f"{archive}::{inner}" if archive else inner) if inside.startswith(top) else None


def _captions(config: SourceConfig, columns: _Columns, row: dict[str, Any]) -> tuple[str, ...] | Problem:
    """The row's own captions; none where it takes the source's."""
    name = ", ".join(columns.captions) or "no column"
    texts = captions.gather([columns.labels.text(column, row[column]) for column in columns.captions], name)
    is_missing = isinstance(texts, Problem) and texts.reason is RejectReason.CAPTION_MISSING
    return () if is_missing and captions.fallback(config) is not None else texts


def _columns(config: SourceConfig, settings: HubSettings, dataset: Any) -> _Columns:
    """Settle which columns are read; `SourceError` when the dataset has them not, or they hold no images."""
    library = _library()
    features: dict[str, Any] = dict(dataset.features or {})
    named = [settings.image, settings.mask, *settings.controls]
    images = [name for name, feature in features.items() if isinstance(feature, library.Image) and name not in named[1:]]
    image = settings.image or (images[0] if images else None)
    if image is None:
        raise SourceError(
            f"data.sources: {config.path} has no column of images. It has: {', '.join(features) or 'no known columns'}. "
            "Name the column with `image:`."
        )
    texts = settings.captions or tuple(name for name in CAPTION_COLUMNS if name in features)[:1]
    for name in (image, *texts, *filter(None, named[1:])):
        if name not in features:
            raise SourceError(f"data.sources: {config.path} has no column `{name}`.{_names(name, list(features))}")
    for name in (image, *filter(None, named[1:])):
        may_be_several = name in settings.controls and name not in (image, settings.mask)
        feature = _in_list(features[name]) if may_be_several else features[name]
        if not _holds_images(library, feature):
            raise SourceError(
                f"data.sources: the column `{name}` of {config.path} holds {features[name]}, not images. "
                f"Columns of images: {', '.join(images) or 'none'}."
            )
    if not texts and config.caption is None:
        raise SourceError(
            f"data.sources: {config.path} has no column of captions (looked for {', '.join(CAPTION_COLUMNS)}). It has: "
            f"{', '.join(features)}. Name one with `captions:` (labels too are captions), or write a `caption:` for all images."
        )
    kinds = {name: _in_list(features[name]) for name in texts}
    names = {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, library.ClassLabel)}
    return _Columns(image=image, captions=texts, mask=settings.mask, controls=settings.controls, labels=Labels(names))


def _holds_images(library: ModuleType, feature: Any) -> bool:
    binary = ("binary", "large_binary")
    return isinstance(feature, library.Image) or (isinstance(feature, library.Value) and feature.dtype in binary)


def _in_list(feature: Any) -> Any:
    """What the items of a list are, of whichever version of `datasets`; a feature that is no list itself."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else feature


def _undecoded(dataset: Any, columns: _Columns) -> Any:
    """The dataset with the columns that are read and no others, its images as they are stored."""
    library = _library()
    dataset = dataset.select_columns(list(dict.fromkeys([*columns.images, *columns.captions])))
    for name in columns.images:
        feature = dataset.features[name]
        if isinstance(_in_list(feature), library.Image):
            plain = library.Image(decode=False)
            dataset = dataset.cast_column(name, plain if isinstance(feature, library.Image) else type(feature)(plain))
    return dataset


def _names(given: str, valid: Sequence[str]) -> str:
    return f"{did_you_mean(given, valid)} It has: {', '.join(valid) or 'none'}."


def _locate(config: SourceConfig, settings: HubSettings) -> tuple[str, bool]:
    """(folder, True) or (id on the Hub, False); a folder goes before a dataset of the same name."""
    if not locations.is_url(config.path):
        path = locations.local_path(config.path)
        if path.is_dir() and settings.revision is not None:
            raise ConfigError(f"data.sources: `revision` has no effect on the local folder {path}: leave it out.")
        if path.is_dir():
            return os.path.abspath(path), True  # noqa: PTH100 (Path.absolute keeps `..`)
        if path.exists():
            raise SourceError(f"data.sources: {path} is a file. `format: hub` takes a folder or a dataset's id OWNER/NAME.")
    if _HUB_ID.fullmatch(config.path) is None:
        raise SourceError(
            f"data.sources: {locations.redacted(config.path)} is no local folder, and no id of a Hub dataset (OWNER/NAME)."
        )
    return config.path, False


def _commit(config: SourceConfig, path: str, revision: str | None) -> str:
    with _explained(config):
        hub = importlib.import_module("huggingface_hub")
        commit = hub.HfApi().dataset_info(path, revision=revision, timeout=60).sha
    return str(commit)


def _files(config: SourceConfig, path: str) -> list[locations.File]:
    try:
        return list(locations.list_files(path))
    except OSError as error:
        raise SourceError(f"data.sources: {config.path} cannot be listed: {error.strerror or error}.") from None


def _only_own_files(data_files: DataFiles | None) -> bool:
    """Whether the dataset's own version vouches for all that is read."""
    named = list(data_files.values()) if isinstance(data_files, dict) else [data_files]
    files = [file for item in named for file in ((item,) if isinstance(item, str) else item or ())]
    return not any(is_outside(file) for file in files)


def _opened(config: SourceConfig, settings: HubSettings, path: str, commit: str | None) -> Any:
    """The split as an iterable dataset."""
    files = None if settings.data_files is None else json.dumps(settings.data_files)
    _library()
    with _explained(config):
        splits = _splits(path, settings.config_name, commit, files)
    if settings.split not in splits:
        names = _names(settings.split, [str(name) for name in splits])
        raise SourceError(f"data.sources: {config.path} has no split `{settings.split}`.{names}")
    return splits[settings.split]


@functools.lru_cache(maxsize=4)
def _splits(path: str, config_name: str | None, commit: str | None, data_files: str | None) -> Any:
    """All splits, without their data; kept until the next listing, for a process reads many shards of one dataset."""
    saved = _saved(path)
    if saved and (config_name is not None or data_files is not None):
        raise ConfigError(
            f"data.sources: {path} was written by `save_to_disk`: `config_name` and `data_files` have no effect on it. "
            "Leave them out."
        )
    if saved:
        return _saved_splits(path)
    files = None if data_files is None else json.loads(data_files)
    return _library().load_dataset(path, name=config_name, revision=commit, data_files=files, streaming=True)


def _saved(path: str) -> bool:
    """Whether a local folder is what `save_to_disk` of `datasets` writes."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))  # noqa: PTH113, PTH118


def _saved_splits(path: str) -> dict[str, Any]:
    """The splits of a folder of `save_to_disk`, their Arrow files in order; a dataset of no split counts as `train`."""
    saved = _library().load_from_disk(path)
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    return {
        name: split.to_iterable_dataset(num_shards=max(1, min(len(split), len(split.cache_files))))
        for name, split in splits.items()
    }


@functools.cache
def _library() -> ModuleType:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f'data.sources: `format: hub` needs the package `datasets` ({error}). Install it: pip install "ftk[hub]"'
        ) from None
    # What it has to say about errors comes out in ours.
    library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
    library.disable_progress_bars()
    return library


@contextlib.contextmanager
def _explained(config: SourceConfig, place: str = "") -> Iterator[None]:
    try:
        yield
    except FtkError:
        raise
    except Exception as error:
        # The library lets through what each of its many readers and network clients raises.
        raise _explanation(f"data.sources: the dataset {config.path}{place}", error) from error


def _explanation(dataset: str, error: BaseException) -> FtkError:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((code for cause in causes if (code := _status(cause)) is not None), 0)
    what = locations.redacted(f"{type(error).__name__}: {error}")[:500]
    if "GatedRepoError" in kinds or "is a gated dataset" in str(error):
        return SourceError(f"{dataset} is gated. {_LOGIN}.")
    if "RevisionNotFoundError" in kinds:
        return SourceError(f"{dataset} has no such `revision`: {what}")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return SourceError(f"{dataset} is not on the Hub, or is private. Check its name. If it is private: {_LOGIN}.")
    if status in (401, 403):
        return SourceError(f"{dataset} may not be read (HTTP {status}). {_LOGIN}.")
    if kinds & _NETWORK_ERRORS or status in (408, 429) or status >= 500:
        return EnvironmentFault(
            f"{dataset} could not be read: {what}. Check the network (and that HF_HUB_OFFLINE is not set), then run the "
            "command again: what is done is kept."
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return EnvironmentFault(f"{dataset} could not be read: {what}. Mend that, then run the command again.")
    advice = "Name one with `config_name:`" if "onfig" in str(error) else "Check `path` and `data_files`; mend a damaged file"
    return SourceError(f"{dataset} cannot be read: {what}. {advice}, and run the command again.")


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of one of the network clients."""
    code = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return code if isinstance(code, int) else None


SOURCE = Hub()
