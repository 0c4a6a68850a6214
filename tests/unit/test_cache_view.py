"""The view of a cache: one swap, nothing changed unseen, nothing of the old one touched before the new one stands."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import pytest
import torch

from ftk import storage
from ftk.cache import shards, view
from ftk.cache.shards import Receipt
from ftk.cache.store import CacheStore
from ftk.contracts import CACHE_SCHEMA, CachedSample, CacheManifest
from ftk.errors import CacheError

Write = Callable[..., dict[str, Any]]
Samples = Callable[[int], list[CachedSample]]


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture
def cache(written_cache: Write, tmp_path: Path) -> Path:
    written_cache(tmp_path / "cache")
    return tmp_path / "cache"


def _manifest(directory: Path) -> CacheManifest:
    manifest = view.read_manifest(directory)
    assert manifest is not None
    return manifest


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _facts(manifest: CacheManifest) -> dict[str, Any]:
    given = {"schema_version", "num_samples", "tables", "digest"}
    return {name: getattr(manifest, name) for name in CacheManifest.__dataclass_fields__ if name not in given}


def _tables(directory: Path) -> dict[str, pa.Table]:
    """The tables as they were committed: readers keep repeated values once."""
    schemas = {"samples": view.SAMPLE_SCHEMA, "shards": view.SHARD_SCHEMA}
    tables = view.read_tables(directory, _manifest(directory))
    return {name: table.cast(schemas.get(name, view.INDEX_SCHEMA)) for name, table in tables.items()}


def _commit_fewer_samples(directory: Path, count: int = 2) -> CacheManifest:
    """A later view of the same items."""
    tables = _tables(directory)
    return view.commit(directory, {**tables, "samples": tables["samples"].slice(0, count)}, _facts(_manifest(directory)))


def _rewrite(directory: Path, **changes: Any) -> None:
    """`cache.json` with other fields, and without a digest that holds."""
    plain = {**json.loads((directory / view.MANIFEST).read_text()), **changes}
    (directory / view.MANIFEST).write_bytes(storage.json_bytes(plain))


def _write_shard(folder: Path, *ids: str) -> Receipt:
    return shards.write(folder, [(item, {"mean": torch.full((2,), float(len(item)))}) for item in ids])


def test_the_manifest_reads_back_and_holds_the_digest_of_itself(cache: Path) -> None:
    manifest = _manifest(cache)
    assert (manifest.schema_version, manifest.num_samples, manifest.family) == (CACHE_SCHEMA, 8, "qwen-image")
    assert manifest.prompts == {"a red fox": "prompt0", "": "empty"}
    without = json.loads((cache / "cache.json").read_text()) | {"digest": ""}
    assert manifest.digest == blake3.blake3(storage.json_bytes(without)).hexdigest()
    assert view.check(cache, manifest) == []


def test_there_is_no_manifest_before_the_first_view(tmp_path: Path) -> None:
    assert view.read_manifest(tmp_path) is None
    assert view.read_manifest(tmp_path / "nowhere") is None


def test_no_flipped_byte_of_the_manifest_goes_unseen(written_cache: Write, tmp_path: Path) -> None:
    written_cache(tmp_path, num_samples=1, encoders={}, normalisation={}, prompts={})
    path = tmp_path / "cache.json"
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CacheError, match=r"cache\.json"):
            view.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\n",
        lambda data: data.replace(b"  ", b"   ", 1),
        lambda data: b"[]",
        lambda data: b"null",
        lambda data: b"{}",
        lambda data: data.replace(b'"family"', b'"familie"'),
        lambda data: data.replace(b'"qwen-image"', b'"\\ud800"'),
        lambda data: data.replace(b'"family"', b'"more": 1,\n  "family"'),
        lambda data: data.replace(f'"schema_version": {CACHE_SCHEMA}'.encode(), b'"schema_version": "2"'),
        lambda data: data.replace(f'"schema_version": {CACHE_SCHEMA}'.encode(), b'"schema_version": null'),
        lambda data: data.replace(b'"num_samples": 8', b'"num_samples": 9'),
    ],
)
def test_a_damaged_manifest_is_refused_with_what_mends_it(cache: Path, harm: Callable[[bytes], bytes]) -> None:
    path = cache / "cache.json"
    assert harm(path.read_bytes()) != path.read_bytes()
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CacheError, match=r"cache\.json is damaged: .*Run `ftk cache RUN.yaml`") as caught:
        view.read_manifest(cache)
    assert not isinstance(caught.value, view.NewerCacheError)


def test_a_newer_schema_is_refused_and_not_to_be_touched(cache: Path) -> None:
    _rewrite(cache, schema_version=CACHE_SCHEMA + 1, what_we_do_not_know=[1])
    with pytest.raises(view.NewerCacheError, match=rf"version {CACHE_SCHEMA + 1}; this ftk reads {CACHE_SCHEMA}.*newer ftk"):
        view.read_manifest(cache)


def test_an_older_schema_is_refused_with_what_to_do(cache: Path) -> None:
    _rewrite(cache, schema_version=CACHE_SCHEMA - 1)
    with pytest.raises(
        CacheError, match=rf"version {CACHE_SCHEMA - 1}; this ftk reads {CACHE_SCHEMA}.*Run `ftk cache"
    ) as caught:
        view.read_manifest(cache)
    assert not isinstance(caught.value, view.NewerCacheError)


def test_tables_are_named_by_their_contents(cache: Path) -> None:
    manifest = _manifest(cache)
    assert sorted(manifest.tables) == ["latents", "samples", "shards", "texts"]
    for name, digest in manifest.tables.items():
        assert blake3.blake3((cache / "view" / f"{name}-{digest[:16]}.parquet").read_bytes()).hexdigest() == digest
    assert len(list((cache / "view").iterdir())) == 4


def test_a_new_view_takes_the_place_of_the_old_one(cache: Path) -> None:
    before = _manifest(cache)
    after = _commit_fewer_samples(cache)
    assert _manifest(cache) == after
    assert (after.num_samples, _facts(after)) == (2, _facts(before))
    assert {name for name in after.tables if after.tables[name] != before.tables[name]} == {"samples"}
    named = {view.table_path(cache, name, digest) for name, digest in after.tables.items()}
    assert set((cache / "view").iterdir()) == named


def test_a_kill_before_the_swap_leaves_the_old_view_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, manifest = _files(cache), _manifest(cache)

    def killed(path: Path, value: Any) -> None:
        assert not any(view.check(cache, CacheManifest(**value)))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "commit_json", killed)
        with pytest.raises(Killed):
            _commit_fewer_samples(cache)
    assert _files(cache).items() >= before.items()
    assert (_manifest(cache), len(CacheStore.open(cache))) == (manifest, 8)
    _commit_fewer_samples(cache)
    assert len(list((cache / "view").iterdir())) == 4


def test_a_kill_after_the_swap_leaves_the_new_view_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, missing_ok: bool = False) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            _commit_fewer_samples(cache)
    assert len(CacheStore.open(cache)) == 2
    assert view.check(cache, _manifest(cache)) == []


def test_equal_input_gives_equal_bytes(written_cache: Write, tmp_path: Path) -> None:
    written_cache(tmp_path / "a")
    written_cache(tmp_path / "b", num_samples=8)  # not a copy, then
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    before = _files(tmp_path / "a")
    view.commit(tmp_path / "a", dict(reversed(_tables(tmp_path / "a").items())), _facts(_manifest(tmp_path / "a")))
    assert _files(tmp_path / "a") == before


def test_no_file_holds_an_absolute_path(cache: Path) -> None:
    here = str(cache.parent).encode()
    assert not [name for name, data in _files(cache).items() if here in data or b"/tmp/" in data or b"/root/" in data]


def test_the_tables_list_every_item_and_its_shard(tmp_path: Path) -> None:
    latents = [_write_shard(tmp_path / "latents" / "aaaa", "b", "a"), _write_shard(tmp_path / "latents" / "aaaa", "ccc")]
    texts = [_write_shard(tmp_path / "texts" / "bbbb", "a")]
    tables = view.merged({("latents", "aaaa"): latents, ("texts", "bbbb"): texts})
    assert list(zip(tables["latents"]["id"].to_pylist(), tables["latents"]["shard"].to_pylist(), strict=True)) == [
        ("b", 0),
        ("a", 0),
        ("ccc", 1),
    ]
    assert tables["texts"]["shard"].to_pylist() == [2]
    columns = shards.ITEM_SCHEMA.names
    assert tables["latents"].select(columns).to_pylist() == [row for one in latents for row in one.items.to_pylist()]
    assert [(row["kind"], row["fingerprint"], row["items"]) for row in tables["shards"].to_pylist()] == [
        ("latents", "aaaa", 2),
        ("latents", "aaaa", 1),
        ("texts", "bbbb", 1),
    ]
    for row, receipt in zip(tables["shards"].to_pylist(), [*latents, *texts], strict=True):
        given = ("name", "bytes", "blake3", "header_blake3", "receipt_bytes", "receipt_blake3")
        assert [row[name] for name in given] == [getattr(receipt, name) for name in given]


def test_an_item_of_two_shards_is_listed_once_where_it_came_first(tmp_path: Path) -> None:
    found = [_write_shard(tmp_path, "a", "b"), _write_shard(tmp_path, "c", "b", "d"), _write_shard(tmp_path, "a", "e")]
    table = view.merged({("latents", "aaaa"): found, ("texts", "bbbb"): []})["latents"]
    listed = list(zip(table["id"].to_pylist(), table["shard"].to_pylist(), strict=True))
    assert listed == [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2)]


def test_a_kind_without_items_has_an_empty_table() -> None:
    tables = view.merged({("latents", "aaaa"): [], ("texts", "bbbb"): []})
    assert {name: len(table) for name, table in tables.items()} == {"latents": 0, "texts": 0, "shards": 0}
    assert tables["latents"].schema.equals(view.INDEX_SCHEMA)


def test_a_table_with_another_byte_is_refused_by_name(cache: Path) -> None:
    manifest = _manifest(cache)
    for name, digest in manifest.tables.items():
        path = view.table_path(cache, name, digest)
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        found = blake3.blake3(path.read_bytes()).hexdigest()
        with pytest.raises(CacheError, match=rf"{path.name} is damaged: expected BLAKE3 {digest}, found {found}"):
            view.read_tables(cache, manifest)
        (damage,) = view.check(cache, manifest)
        assert (damage.path, damage.expected, damage.found, damage.shard) == (str(path), digest, found, "")
        path.write_bytes(data)


def test_a_missing_table_is_told(cache: Path) -> None:
    manifest = _manifest(cache)
    path = view.table_path(cache, "texts", manifest.tables["texts"])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        view.read_tables(cache, manifest)
    (damage,) = view.check(cache, manifest)
    assert (damage.path, damage.found) == (str(path), "no file")


def test_the_view_records_the_digest_of_every_receipt(cache: Path) -> None:
    known = view.receipt_digests(cache, _manifest(cache))
    paths = [path for kind in ("latents", "texts") for path in (cache / kind).rglob("*.parquet")]
    assert known == {
        str(path.relative_to(cache).with_suffix("")): blake3.blake3(path.read_bytes()).hexdigest() for path in paths
    }
    assert len(known) > 4


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes() + b"\0")])
def test_without_the_shards_table_no_receipt_is_on_record(cache: Path, harm: Callable[[Path], Any]) -> None:
    manifest = _manifest(cache)
    harm(view.table_path(cache, "shards", manifest.tables["shards"]))
    assert view.receipt_digests(cache, manifest) == {}


def test_a_reader_whose_view_is_swapped_away_opens_the_new_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, swaps = view.read_tables, iter([True])

    def swapped(directory: Path, manifest: CacheManifest) -> Mapping[str, pa.Table]:
        if next(swaps, False):
            with monkeypatch.context() as patch:
                patch.setattr(view, "read_tables", read)
                _commit_fewer_samples(cache)
        return read(directory, manifest)

    monkeypatch.setattr(view, "read_tables", swapped)
    store = CacheStore.open(cache)
    assert (len(store), store.manifest) == (2, _manifest(cache))


def test_a_manifest_swapped_while_it_is_read_is_not_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two looks at the file, another may have taken its place."""
    newer = (cache / "cache.json").read_bytes()
    _commit_fewer_samples(cache)
    read_bytes = Path.read_bytes

    def then_swapped(path: Path) -> bytes:
        data = read_bytes(path)
        if path.name == "cache.json":
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            storage.commit_bytes(path, newer)
        return data

    monkeypatch.setattr(Path, "read_bytes", then_swapped)
    assert _manifest(cache).num_samples in (2, 8)


def test_a_manifest_of_which_a_table_is_gone_is_damaged(cache: Path) -> None:
    path = view.table_path(cache, "samples", _manifest(cache).tables["samples"])
    path.unlink()
    with pytest.raises(CacheError, match=rf"(?s){path.name}: not as committed: expected \w+, found no file.*ftk verify"):
        CacheStore.open(cache)


def test_the_manifest_of_another_cache_does_not_fit_its_tables(cache: Path, written_cache: Write, tmp_path: Path) -> None:
    written_cache(tmp_path / "other", num_samples=3)
    shutil.copy(tmp_path / "other" / "cache.json", cache / "cache.json")
    with pytest.raises(CacheError, match="not as committed"):
        CacheStore.open(cache)


def test_a_prompt_in_any_script_is_kept(written_cache: Write, cached_samples: Samples, tmp_path: Path) -> None:
    prompts = {'größe "猫" 🦊\n\u2028': "prompt0", "": "empty"}
    samples = [replace(one, key=f"k{n}-ß") for n, one in enumerate(cached_samples(2))]
    written_cache(tmp_path, samples=samples, prompts=prompts)
    assert _manifest(tmp_path).prompts == prompts
    assert [row["key"] for row in CacheStore.open(tmp_path).table.to_pylist()] == ["k0-ß", "k1-ß"]
