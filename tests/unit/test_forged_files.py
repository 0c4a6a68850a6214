"""Names in files lead nowhere: whatever a manifest, receipt, table or index says, nothing outside its folder is touched.

Each file is whole by its own digest: only whoever wrote it meant harm, or a fault on the way made the digest anew.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ftk import storage
from ftk.cache import gc, verify, view
from ftk.cache.store import CacheStore
from ftk.contracts import SampleRow
from ftk.errors import CheckpointError, DatasetError, FtkError
from ftk.models.components import weights
from ftk.pipeline import dataset
from ftk.pipeline.dataset import PreparedDataset
from ftk.train import checkpoint

NAMES: list[Any] = [
    *(
        "../../victim",
        "../victim",
        "/tmp",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\0b",
        ".hidden",
        ".tmp-x",
        "x" * 300,
        "é",
        "a b",
        "a\n",
    ),
    *("~", "file:///etc", "s3://bucket/x", "%2e%2e", 5, None, True, [], {}),
]
FUZZED = 100
VALUES = st.recursive(
    st.sampled_from(NAMES) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_plain_names_are_those_that_lead_nowhere():
    for name in NAMES:
        assert not storage.is_plain_name(name)
        with pytest.raises(ValueError, match="not the plain name of a file"):
            storage.plain_name(name)
    for name in ("0a1b2c", "diffusion_pytorch_model-00001-of-00002.safetensors", "adapter-00000-001.safetensors", "a..b", "-"):
        assert storage.plain_name(name) == name


@given(st.text() | st.text(alphabet="./\\:~-_ab"))
@settings(max_examples=1000)
def test_a_plain_name_is_a_direct_child_of_its_folder(name: str) -> None:
    if storage.is_plain_name(name):
        folder = Path("/some/folder")
        path = Path(os.path.normpath(folder / name))
        assert (path.parent, path.name) == (folder, name)
        assert not name.startswith(storage.TEMPORARY_PREFIX)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the cache's that looks like one of a cache's; it must be the same at the end."""
    folder = tmp_path / "victim"
    for kind in ("latents", "texts", "view"):
        for name in ("precious.safetensors", "precious.parquet", "precious.tar"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / name).write_bytes(b"precious")
            (folder / name).write_bytes(b"precious")
    before = sorted(str(path) for path in tmp_path.rglob("*") if "victim" in path.parts)
    yield folder
    assert sorted(str(path) for path in tmp_path.rglob("*") if "victim" in path.parts) == before
    assert all(path.read_bytes() == b"precious" for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def forged(tmp_path: Path, written_cache: Callable[..., Any], victim: Path) -> Path:
    """A whole cache to forge."""
    directory = tmp_path / "work" / "cache"
    written_cache(directory)
    return directory


def _reseal(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its digest anew."""
    plain = json.loads((directory / view.MANIFEST).read_bytes())
    change(plain)
    plain["digest"] = ""
    plain["digest"] = blake3.blake3(storage.json_bytes(plain)).hexdigest()
    storage.commit_json(directory / view.MANIFEST, plain)


def _replace_table(directory: Path, name: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the rows of a table of the view, and name the new table in the manifest."""
    manifest = view.read_manifest(directory)
    assert manifest is not None
    table = storage.read_table(view.table_path(directory, name, manifest.tables[name]))
    rows = table.to_pylist()
    change(rows)
    data = storage.table_bytes(pa.Table.from_pylist(rows, schema=table.schema))
    digest = blake3.blake3(data).hexdigest()
    storage.commit_bytes(view.table_path(directory, name, digest), data)
    _reseal(directory, lambda plain: plain["tables"].update({name: digest}))


def _is_refused(directory: Path) -> None:
    """Nothing opens it, and neither `ftk gc --yes` nor `ftk verify --deep` touches anything but the cache."""
    with pytest.raises(FtkError) as refusal:
        CacheStore.open(directory)
    assert refusal.value.exit_code == 2
    with pytest.raises(FtkError):
        gc.run(directory, remove=True)
    report = verify.run(directory, deep=True)
    assert report.damages


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
@pytest.mark.parametrize("field", ["latents_fingerprint", "texts_fingerprint", "shards", "samples", "a table more"])
def test_a_manifest_that_names_what_is_outside_is_refused(field: str, name: Any, forged: Path) -> None:
    def change(plain: dict[str, Any]) -> None:
        if field in plain:
            plain[field] = name
        elif field in plain["tables"]:
            plain["tables"][field] = name
        else:
            plain["tables"][str(name)] = plain["tables"]["shards"]

    _reseal(forged, change)
    _is_refused(forged)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name is None or isinstance(name, str)], ids=lambda name: ascii(name)[:12]
)
@pytest.mark.parametrize("column", ["kind", "fingerprint", "name"])
def test_a_table_of_shards_that_names_what_is_outside_is_refused(column: str, name: str | None, forged: Path) -> None:
    _replace_table(forged, "shards", lambda rows: rows[0].update({column: name}))
    _is_refused(forged)


@pytest.mark.parametrize("shard", [999, -1, None])
def test_an_item_in_a_shard_that_is_not_listed_is_refused(shard: int | None, forged: Path) -> None:
    _replace_table(forged, "latents", lambda rows: rows[0].update(shard=shard))
    _is_refused(forged)


def test_links_in_a_cache_are_not_followed_by_gc(forged: Path, victim: Path) -> None:
    (forged / "latents" / "elsewhere").symlink_to(victim / "latents", target_is_directory=True)
    gc.run(forged, remove=True)
    assert CacheStore.open(forged)


def _paths(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*before, key))


def _fuzzed(tree: Any, data: st.DataObject) -> Any:
    """The tree with one value in it replaced, or one key taken out."""
    tree = copy.deepcopy(tree)
    *above, last = data.draw(st.sampled_from([path for path in _paths(tree) if path]))
    parent = tree
    for key in above:
        parent = parent[key]
    if isinstance(parent, dict) and data.draw(st.integers(0, 4)) == 0:
        del parent[last]
    else:
        parent[last] = data.draw(VALUES)
    return tree


def test_any_manifest_of_a_cache_is_read_or_refused(forged: Path) -> None:
    whole = storage.read_json(forged / view.MANIFEST)
    refused = 0

    @given(data=st.data())
    @settings(max_examples=FUZZED)
    def read_or_refused(data: st.DataObject) -> None:
        nonlocal refused
        plain = {**_fuzzed(whole, data), "digest": ""}
        plain["digest"] = blake3.blake3(storage.json_bytes(plain)).hexdigest()
        storage.commit_json(forged / view.MANIFEST, plain)
        for read in (CacheStore.open, lambda path: gc.run(path, remove=False), verify.run):
            try:
                read(forged)
            except FtkError:
                refused += 1

    read_or_refused()
    assert refused > FUZZED


def _row(number: int) -> SampleRow:
    sizes = ("width", "height", "bucket_width", "bucket_height", "resize_width", "resize_height")
    return SampleRow(
        key=f"k{number}", source="s", content_sha256="", image_id=f"i{number}", **dict.fromkeys(sizes, 64), crop_x=0, crop_y=0,
        flipped=False, copied=False, perceptual_hash="0" * 16, captions=["a"], repeats=1, role="instance", num_controls=0,
        control_ids=[], has_mask=False, mask_id="", shard="",
    )  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path, written_dataset: Callable[..., PreparedDataset], victim: Path) -> Path:
    """A whole prepared dataset of two shards to forge."""
    directory = tmp_path / "work" / "prepared"
    written_dataset(directory, [[_row(0), _row(1)], [_row(2)]])
    return directory


def _read_all(directory: Path) -> None:
    prepared = PreparedDataset.open(directory)
    for row in prepared.rows():
        prepared.image_bytes(row)
    prepared.rejects()


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
def test_a_dataset_that_names_a_shard_outside_is_refused(name: Any, prepared: Path) -> None:
    plain = storage.read_json(prepared / dataset.MANIFEST)
    plain["shards"][0]["name"] = name
    storage.commit_json(prepared / dataset.MANIFEST, plain)
    with pytest.raises(DatasetError):
        _read_all(prepared)


@pytest.mark.parametrize("change", [{"shard": "../../victim/precious"}, {"shard": None}, {"key": "../x"}], ids=str)
def test_rows_that_name_what_their_shard_does_not_hold_are_refused(change: dict[str, Any], prepared: Path) -> None:
    path = prepared / "shards/00000.parquet"
    rows = storage.read_table(path).to_pylist()
    rows[0] |= change
    storage.commit_table(path, pa.Table.from_pylist(rows, schema=dataset.SAMPLE_SCHEMA))
    plain = storage.read_json(prepared / dataset.MANIFEST)
    plain["shards"][0]["table_sha256"] = storage.sha256_file(path)
    storage.commit_json(prepared / dataset.MANIFEST, plain)
    with pytest.raises(DatasetError):
        _read_all(prepared)


def test_any_manifest_of_a_dataset_is_read_or_refused(prepared: Path) -> None:
    whole = storage.read_json(prepared / dataset.MANIFEST)
    refused = 0

    @given(data=st.data())
    @settings(max_examples=FUZZED)
    def read_or_refused(data: st.DataObject) -> None:
        nonlocal refused
        storage.commit_json(prepared / dataset.MANIFEST, _fuzzed(whole, data))
        try:
            _read_all(prepared)
        except FtkError:
            refused += 1

    read_or_refused()
    assert refused > FUZZED // 4


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "nul", "5", "\x00"], ids=lambda text: ascii(text)[:8]
)
def test_a_manifest_that_is_no_json_object_is_refused(text: str, prepared: Path, forged: Path) -> None:
    (prepared / dataset.MANIFEST).write_text(text)
    (forged / view.MANIFEST).write_text(text)
    with pytest.raises(DatasetError):
        _read_all(prepared)
    _is_refused(forged)


@pytest.mark.parametrize("name", ["../../victim/precious.safetensors", "/etc/passwd", ".."])
def test_a_checkpoint_whose_receipt_names_what_is_outside_is_damaged(name: str, tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "00000001"
    path.mkdir(parents=True)
    for file in ("adapter.safetensors", "optimizer.safetensors", "trainer.json"):
        (path / file).write_bytes(b"{}")
    receipt = {file.name: storage.blake3_file(file) for file in path.iterdir()}
    storage.commit_json(path / checkpoint.RECEIPT, receipt)
    assert checkpoint.damage(path) is None
    storage.commit_json(path / checkpoint.RECEIPT, {**receipt, name: "0" * 64})
    assert "is not the plain name of a file" in str(checkpoint.damage(path))
    with pytest.raises(CheckpointError, match="plain name"):
        checkpoint.read(path)


@pytest.mark.parametrize("name", [*NAMES, "weights.safetensors"], ids=lambda name: ascii(name)[:12])
def test_an_index_of_weights_names_files_of_its_own_folder_alone(name: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    if name == "weights.safetensors":
        assert weights.weight_files(tmp_path, "w.safetensors") == [tmp_path / name]
        return
    with pytest.raises(ValueError, match=r"plain name|cannot be read"):
        weights.weight_files(tmp_path, "w.safetensors")
