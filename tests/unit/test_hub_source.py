"""The hub source, on small local datasets and a Hub that is not there."""

import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors as hub_errors
from PIL import Image

from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, EnvironmentFault, FtkError, SourceError
from ftk.pipeline.sources import base, hub
from ftk.pipeline.sources.base import Partition, Record

datasets = pytest.importorskip("datasets", reason='the hub source needs `datasets`: pip install "ftk[hub]"')

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    hub._splits.cache_clear()
    yield
    hub._splits.cache_clear()


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _embedded(data: bytes | None, path: str | None = "0.png") -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _write(
    folder: Path, columns: dict[str, list[Any]], name: str = "train-00000-of-00001", images: tuple[str, ...] = ()
) -> Path:
    """A Parquet file as `push_to_hub` writes it; `images` names the columns with the Image feature."""
    kinds = {column: datasets.Image() for column in images or ("image",)}
    features = datasets.Features({**datasets.Dataset.from_dict(columns).features, **kinds})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    # Not by the library's own `to_parquet`, which would follow paths and put the images in.
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / "data" / f"{name}.parquet")
    return folder


def _dataset(folder: Path, shards: int = 3, rows: int = 4, **columns: list[Any]) -> Path:
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        texts = {"image": [_embedded(_png(number)) for number in numbers], "text": [f"cat {number}" for number in numbers]}
        _write(folder, {**texts, **columns}, f"train-{shard:05d}-of-{shards:05d}")
    return folder


def _partitions(path: str | Path, **settings: Any) -> list[Partition]:
    config = SourceConfig(path=str(path), format="hub", **settings)
    source, parsed = base.parse(config)
    return list(source.partitions(config, parsed, 100))


def _read(path: str | Path, **settings: Any) -> list[Record | Reject]:
    config = SourceConfig(path=str(path), format="hub", **settings)
    source, parsed = base.parse(config)
    return [item for partition in source.partitions(config, parsed, 100) for item in source.read(config, parsed, partition)]


def _record(item: Record | Reject) -> Record:
    assert isinstance(item, Record), item
    return item


def _reject(item: Record | Reject, reason: RejectReason) -> str:
    assert isinstance(item, Reject), item
    assert item.reason is reason, item
    return item.detail


def test_a_folder_is_never_taken_for_a_dataset_by_itself(tmp_path: Path) -> None:
    assert not hub.SOURCE.accepts("owner/name")
    assert not hub.SOURCE.accepts(str(tmp_path))


def test_the_rows_of_each_file_in_order(tmp_path: Path) -> None:
    records = [_record(item) for item in _read(_dataset(tmp_path))]
    assert [record.identity for record in records[:5]] == [
        *(f"train/00000/{row:06d}" for row in range(4)),
        "train/00001/000000",
    ]
    assert [record.captions for record in records] == [(f"cat {number}",) for number in range(12)]
    assert [record.image.data for record in records] == [_png(number) for number in range(12)]


def test_a_partition_is_plain_and_read_alone(tmp_path: Path) -> None:
    partitions = _partitions(_dataset(tmp_path))
    assert len(partitions) == 3
    assert all(isinstance(value, str | int | None) for partition in partitions for value in partition.payload)
    config = SourceConfig(path=str(tmp_path), format="hub")
    source, settings = base.parse(config)
    identities = [_record(item).identity for item in source.read(config, settings, partitions[2])]
    assert identities == [f"train/00002/{row:06d}" for row in range(4)]


def test_images_are_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [_embedded(b"no image at all")]
    _write(tmp_path, {"image": broken, "other": broken, "text": ["a cat"]}, images=("image", "other"))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded"))
    (item,) = _read(tmp_path)
    assert _record(item).image.data == b"no image at all"


def test_columns_of_ones_own(tmp_path: Path) -> None:
    columns = {
        "photo": [_embedded(b"p")],
        "matte": [_embedded(b"m")],
        "pose": [_embedded(b"c")],
        "raw": [b"r"],
        "long": [["a cat", "a pet"]],
        "short": ["cat"],
    }
    _write(tmp_path, columns, images=("photo", "matte", "pose"))
    settings = {"image": "photo", "mask": "matte", "controls": ["pose", "raw"], "captions": ["short", "long"]}
    (item,) = _read(tmp_path, **settings)
    record = _record(item)
    assert record.mask is not None
    assert (record.image.data, record.mask.data, [blob.data for blob in record.controls]) == (b"p", b"m", [b"c", b"r"])
    assert record.captions == ("cat", "a cat", "a pet")


def test_the_first_image_column_that_is_nothing_else_is_the_image(tmp_path: Path) -> None:
    columns = {"mask": [_embedded(b"m")], "photo": [_embedded(b"p")], "caption": ["a cat"], "prompt": ["not taken"]}
    (item,) = _read(_write(tmp_path, columns, images=("mask", "photo")), mask="mask")
    assert (_record(item).image.data, _record(item).captions) == (b"p", ("a cat",))


def test_lists_of_images_are_several_control_images(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "edits": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    )
    columns = {"image": [_png(0)] * 4, "edits": [[_png(1), _png(2)], [_png(3)], [], None], "text": ["a cat"] * 4}
    (tmp_path / "data").mkdir()
    encoded = {**columns, "image": [_embedded(data) for data in columns["image"]]}
    encoded["edits"] = [each and [_embedded(data) for data in each] for each in columns["edits"]]
    datasets.Dataset.from_dict(encoded, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    records = [_record(item) for item in _read(tmp_path, controls=["edits"], optional=True)]
    assert [[blob.data for blob in record.controls] for record in records] == [[_png(1), _png(2)], [_png(3)], [], []]
    items = _read(tmp_path, controls=["edits"])
    assert "`edits` holds nothing" in _reject(items[2], RejectReason.CONTROL_MISSING)
    with pytest.raises(SourceError, match="not images"):
        _read(tmp_path, mask="edits")


def test_labels_are_captions_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a cat", "a dog"])})
    columns = {"image": [_embedded(_png(0))] * 3, "label": [1, 0, -1]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    *good, missing = _read(tmp_path, captions=["label"])
    assert [_record(item).captions for item in good] == [("a dog",), ("a cat",)]
    _reject(missing, RejectReason.CAPTION_MISSING)


def test_a_dataset_of_save_to_disk_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a cat", "a dog"])})
    columns = {"image": [_embedded(_png(number)) for number in range(5)], "label": [number % 2 for number in range(5)]}
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": saved, "test": saved.select([4])}).save_to_disk(tmp_path / "dict")
    for path, settings, expected in [("one", {}, range(5)), ("dict", {}, range(5)), ("dict", {"split": "test"}, [4])]:
        records = [_record(item) for item in _read(tmp_path / path, captions=["label"], **settings)]
        assert [record.image.data for record in records] == [_png(number) for number in expected]
        assert [record.captions for record in records] == [(["a cat", "a dog"][number % 2],) for number in expected]
    assert len(_partitions(tmp_path / "one", captions=["label"])) == 2
    with pytest.raises(SourceError, match=r"no split `nothing`.*train"):
        _read(tmp_path / "dict", split="nothing", captions=["label"])
    with pytest.raises(ConfigError, match=r"written by `save_to_disk`: .*no effect"):
        _read(tmp_path / "one", config_name="x")
    config = SourceConfig(path=str(tmp_path / "one"))
    source, settings = base.parse(config)
    with pytest.raises(SourceError, match=r"wrote, add `format: hub`"):
        list(source.partitions(config, settings, 1))


def test_rows_that_lack_something_are_rejects(tmp_path: Path) -> None:
    full = _embedded(b"i")
    columns = {
        "image": [full, None, full, full, full, full],
        "mask": [full, full, None, full, full, full],
        "pose": [full, full, full, None, full, full],
        "text": ["a cat", "a cat", "a cat", "a cat", None, " "],
    }
    _write(tmp_path, columns, images=("image", "mask", "pose"))
    items = _read(tmp_path, mask="mask", controls=["pose"])
    _record(items[0])
    assert "`image` holds nothing" in _reject(items[1], RejectReason.FILE_MISSING)
    assert "`mask`" in _reject(items[2], RejectReason.MASK_MISSING)
    assert "`pose`" in _reject(items[3], RejectReason.CONTROL_MISSING)
    assert "text" in _reject(items[4], RejectReason.CAPTION_MISSING)
    _reject(items[5], RejectReason.CAPTION_EMPTY)
    assert next(item.path for item in items if isinstance(item, Reject)) == "train/00000/000001"
    assert _record(_read(tmp_path, mask="mask", controls=["pose"], caption="a pet")[4]).captions == ("a pet",)


def test_captions_that_are_no_text_are_rejects(tmp_path: Path) -> None:
    (item,) = _read(_write(tmp_path, {"image": [_embedded(b"i")], "text": [7]}))
    assert "int" in _reject(item, RejectReason.CAPTION_NOT_TEXT)


def test_a_path_that_leads_out_of_the_dataset_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    outside.write_bytes(_png(0))
    paths = [str(outside), f"{tmp_path}/dataset/../secret.png", "secret.png", "https://host/a.png"]
    columns = {"image": [_embedded(None, path) for path in paths], "text": ["a cat"] * len(paths)}
    items = _read(_write(tmp_path / "dataset", columns))
    assert len(items) == len(paths)
    for item, path in zip(items, paths, strict=True):
        assert f"a path to {Path(path).name}, which" in _reject(item, RejectReason.FILE_MISSING)


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).write_bytes(_png(len(name)))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\nsub/b.png,a dog\n")
    records = {_record(item).captions[0]: _record(item).image.read() for item in _read(tmp_path)}
    assert records == {"a cat": _png(5), "a dog": _png(9)}


def test_a_split_and_files_of_ones_own(tmp_path: Path) -> None:
    _write(tmp_path, {"image": [_embedded(b"1")], "text": ["one"]}, "train-00000-of-00001")
    _write(tmp_path, {"image": [_embedded(b"2")], "text": ["two"]}, "test-00000-of-00001")
    assert [_record(item).captions for item in _read(tmp_path, split="test")] == [("two",)]
    assert _record(_read(tmp_path, split="test")[0]).identity == "test/00000/000000"
    assert [_record(item).captions for item in _read(tmp_path, data_files="data/test-*.parquet")] == [("two",)]
    files = {"mine": ["data/train-*.parquet", "data/test-*.parquet"]}
    assert [_record(item).captions for item in _read(tmp_path, split="mine", data_files=files)] == [("one",), ("two",)]


def test_a_signature_stays_until_a_file_changes(tmp_path: Path) -> None:
    before = [partition.signature for partition in _partitions(_dataset(tmp_path))]
    assert before == [partition.signature for partition in _partitions(tmp_path)]
    assert None not in before
    assert len(set(before)) == 3
    (tmp_path / "data" / "train-00002-of-00003.parquet").unlink()
    after = _partitions(tmp_path)
    assert len(after) == 2
    assert not {partition.signature for partition in after} & set(before)


def test_nothing_vouches_for_files_of_elsewhere(tmp_path: Path) -> None:
    _dataset(tmp_path / "one")
    _dataset(tmp_path / "two")
    partitions = _partitions(tmp_path / "one", data_files=f"{tmp_path}/two/data/*.parquet")
    assert {partition.signature for partition in partitions} == {None}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "trian"}, "`trian`.*Did you mean `train`"),
        ({"image": "imgae"}, "`imgae`.*Did you mean `image`"),
        ({"captions": ["txet"]}, "`txet`.*Did you mean `text`.*image, text"),
        ({"image": "text"}, "`text`.*not images.*Columns of images: image"),
        ({"mask": "text"}, "`text`.*not images"),
        ({"mask": "matte"}, "no column `matte`"),
        ({"config_name": "other"}, "other.*default.*config_name"),
        ({"data_files": "*.csv"}, "No .*files.*data_files"),
        ({"revision": "main"}, "`revision` has no effect"),
        ({"spilt": "train"}, "spilt.*split"),
    ],
)
def test_what_the_dataset_has_not_is_told(tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(FtkError, match=f"(?s){said}") as caught:
        _read(_dataset(tmp_path, shards=1), **settings)
    assert caught.value.exit_code == 2


def test_a_dataset_without_captions_needs_one(tmp_path: Path) -> None:
    _write(tmp_path, {"image": [_embedded(b"i")], "label": [1]})
    with pytest.raises(SourceError, match=r"no column of captions.*image, label"):
        _read(tmp_path)
    assert _record(_read(tmp_path, caption="a cat")[0]).captions == ("a cat",)


def test_a_dataset_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na cat\n")
    with pytest.raises(SourceError, match="no column of images"):
        _read(tmp_path)


@pytest.mark.parametrize("path", ["missing", "./owner/name", "/owner/name", "parquet", "s3://owner/name", "a/b/c"])
def test_what_is_neither_folder_nor_id(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="OWNER/NAME"):
        _read(path)


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match="is a file"):
        _read(tmp_path / "a.parquet")


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="any data files"):
        _read(tmp_path)


def test_a_damaged_file_ends_in_an_error_that_names_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = _dataset(tmp_path) / "data" / "train-00001-of-00003.parquet"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(SourceError, match=r"shard 1.*damaged") as caught:
        _read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_script_is_refused_unrun(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = _dataset(tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(SourceError, match="scripts"):
        _read(folder)
    assert not canary.exists()


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    hub._library.cache_clear()
    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "ftk\[hub\]"'):
        hub._library()
    monkeypatch.undo()
    assert hub._library() is importlib.import_module("datasets")


def test_the_hub_is_asked_for_one_commit_and_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = str(_dataset(tmp_path / "local"))
    whole = datasets.load_dataset
    asked: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> Any:
        asked.append({"path": path, **options})
        return whole(local, **{**options, "revision": None})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    items = _read("owner/name", revision="v1")
    assert len(items) == 12
    nothing: dict[str, Any] = {"name": None, "data_files": None}
    assert asked == [{"path": "owner/name", "revision": COMMIT, "streaming": True, **nothing}]
    first = _partitions("owner/name")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT[::-1]))
    assert not {part.signature for part in first} & {part.signature for part in _partitions("owner/name")}


def test_images_of_the_hub_by_path_belong_to_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = f"hf://datasets/owner/name@{COMMIT}/a.png"
    packed = f"zip://a.png::hf://datasets/owner/name@{COMMIT}/a.zip"
    paths = [good, packed, "hf://datasets/owner/other@main/a.png", "/etc/passwd", "https://host/a.png"]
    columns = {"image": [_embedded(None, path) for path in paths], "text": ["a cat"] * len(paths)}
    local = str(_write(tmp_path / "local", columns))
    whole = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: whole(local, **{**options, "revision": None}))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    items = _read("owner/name")
    assert [_record(item).image.location for item in items[:2]] == [good, packed]
    for item in items[2:]:
        _reject(item, RejectReason.FILE_MISSING)


def _http_error(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} for https://user:secret@host/x", response=response)


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (_http_error(hub_errors.RepositoryNotFoundError, 401), SourceError, "hf auth login"),
        (_http_error(hub_errors.GatedRepoError, 403), SourceError, "gated.*hf auth login"),
        (_http_error(hub_errors.HfHubHTTPError, 401), SourceError, "hf auth login"),
        (_http_error(hub_errors.RevisionNotFoundError, 404), SourceError, "revision"),
        (_http_error(hub_errors.HfHubHTTPError, 503), EnvironmentFault, "run the command again"),
        (_http_error(hub_errors.HfHubHTTPError, 429), EnvironmentFault, "run the command again"),
        (hub_errors.OfflineModeIsEnabled("offline"), EnvironmentFault, "HF_HUB_OFFLINE"),
        (ConnectionResetError("reset"), EnvironmentFault, "network"),
        (TimeoutError("slow"), EnvironmentFault, "network"),
        (OSError(28, "No space left on device"), EnvironmentFault, "No space left"),
    ],
)
def test_what_the_hub_answers_is_explained(
    error: Exception, expected: type[FtkError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(expected, match=f"owner/name.*{said}") as caught:
        _partitions("owner/name")
    assert type(caught.value) is expected
    assert "secret" not in str(caught.value)


def test_a_network_that_fails_while_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dataset(tmp_path)
    client = importlib.import_module(hub_errors.HTTPError.__module__.partition(".")[0])

    def broken(dataset: Any) -> Iterator[Any]:
        yield {"image": _embedded(b"i"), "text": "a cat"}
        raise ConnectionError("Server Disconnected") from client.ReadTimeout("slow")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    config = SourceConfig(path=str(tmp_path), format="hub")
    source, settings = base.parse(config)
    rows = source.read(config, settings, next(iter(source.partitions(config, settings, 4))))
    assert _record(next(rows)).captions == ("a cat",)
    with pytest.raises(EnvironmentFault, match="Server Disconnected"):
        next(rows)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda _: iter(()))
    assert list(source.read(config, settings, next(iter(source.partitions(config, settings, 4))))) == []


def test_a_dataset_that_may_not_be_had_offline() -> None:
    with pytest.raises(EnvironmentFault, match="owner/name"):
        _partitions("owner/name")
