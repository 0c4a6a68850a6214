"""A cache on object storage: what arrives is what was stored, within a bound, ahead of need, whatever fails on the way."""

import errno
import logging
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from servers import Fault, FaultServer, fault_server, s3_server

from ftk import storage
from ftk.cache import fetch, shards, view
from ftk.cache.fetch import Download, RemoteShards, open_remote
from ftk.cache.store import CacheStore
from ftk.contracts import CachedSample
from ftk.errors import CacheError, ConfigError, EnvironmentFault

NUM_SAMPLES, PER_SHARD = 24, 2
NUM_SHARDS = NUM_SAMPLES // PER_SHARD + 1
TEXTS = NUM_SHARDS - 1
"""The one shard of texts, the last row; those before hold latents and are of one size."""


def _item(number: int) -> str:
    return f"{number:032x}"


def _write_cache(directory: Path, num_samples: int = NUM_SAMPLES, **facts: Any) -> Path:
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latents, texts = [(_item(n), {"mean": noise(4, 8, 8), "std": noise(4, 8, 8)}) for n in range(num_samples)], []
    for number in range(num_samples):
        texts.append((_item(number), {"embeds": noise(number + 1, 8).bfloat16()}))
    groups = [latents[first : first + PER_SHARD] for first in range(0, num_samples, PER_SHARD)]
    tables = view.merged(
        {
            ("latents", "aaaa"): [shards.write(directory / "latents" / "aaaa", group) for group in groups],
            ("texts", "bbbb"): [shards.write(directory / "texts" / "bbbb", texts)],
        }
    )
    sides = {"width": 64, "height": 64, "bucket_width": 64, "bucket_height": 64, "resize_width": 64, "resize_height": 64}
    rows = [
        CachedSample(
            key=f"k{n}", latents=_item(n), controls=[_item(1)] if n == 3 else [], mask="", texts=[_item(n)],
            text_lengths=[n + 1], crop_x=0, crop_y=0, flipped=False, repeats=1, role="instance", **sides,
        )
        for n in range(num_samples)
    ]  # fmt: skip
    tables["samples"] = pa.Table.from_pylist([asdict(row) for row in rows], schema=view.SAMPLE_SCHEMA)
    manifest = {
        "family": "tiny", "latents_fingerprint": "aaaa", "texts_fingerprint": "bbbb", "encoders": {}, "normalisation": {},
        "prepared_fingerprint": "", "prepared_recipe": {}, "empty_text": _item(0), "prompts": {}, **facts,
    }  # fmt: skip
    view.commit(directory, tables, manifest)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 13 shards; tests only read it."""
    return _write_cache(tmp_path_factory.mktemp("cache"))


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _shards(directory: Path) -> list[str]:
    manifest = view.read_manifest(directory)
    assert manifest is not None
    rows = view.read_tables(directory, manifest)["shards"].to_pylist()
    return [f"{row['kind']}/{row['fingerprint']}/{row['name']}.safetensors" for row in rows]


def _shard_bytes(directory: Path) -> int:
    return (directory / _shards(directory)[0]).stat().st_size


def _put(server: FaultServer, directory: Path) -> None:
    server.files.clear()
    server.files.update({f"/cache/{name}": data for name, data in _files(directory).items()})


class _Gated(dict[str, bytes]):
    """Files that a request waits for until the gate is open; a path in `instead` first has those contents."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.instead: dict[str, list[bytes]] = {}

    def __getitem__(self, path: str) -> bytes:
        if path.endswith(".safetensors"):
            self.gate.wait(20)
        return self.instead[path].pop(0) if self.instead.get(path) else super().__getitem__(path)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ROOM_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with fault_server() as running:
        # Head and body go out separately, and the second would wait for the first to be acknowledged.
        monkeypatch.setattr(running.RequestHandlerClass, "disable_nagle_algorithm", True)
        running.files = _Gated()
        _put(running, cache)
        yield running


@pytest.fixture
def opened(server: FaultServer, tmp_path: Path) -> Iterator[Callable[..., RemoteShards]]:
    """Open the server's cache with a bound of so many shards of latents; closed at the end."""
    found: list[RemoteShards] = []

    def make(bound: float = 100, path: str = "cache") -> RemoteShards:
        size = max(len(data) for name, data in server.files.items() if "latents" in name and name.endswith("safetensors"))
        download = Download(directory=tmp_path / "kept", max_bytes=int(bound * size))
        found.append(open_remote(f"{server.url}/{path}", download)[2])
        return found[-1]

    yield make
    for one in found:
        one.close()


def _kept(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.002)


def _asked(server: FaultServer, cache: Path) -> list[int]:
    """How often each shard was asked for."""
    return [server.count(f"/cache/{name}") for name in _shards(cache)]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ftk-fetch"]


def _assert_reads_equal(one: CacheStore, other: CacheStore) -> None:
    assert len(one) == len(other) == NUM_SAMPLES
    assert one.manifest == other.manifest
    for number in range(len(one)):
        assert one.sample(number) == other.sample(number)
        pairs = [one.latents(number), *one.controls(number)], [other.latents(number), *other.controls(number)]
        for (mean, std), (other_mean, other_std) in zip(*pairs, strict=True):
            assert torch.equal(mean, other_mean)
            assert torch.equal(std, other_std)
        _assert_same(one.text(number), other.text(number))
    _assert_same(one.empty_text(), other.empty_text())


def _assert_same(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


# What is read.


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_cache_on_the_web_reads_as_the_local_one(server: FaultServer, cache: Path, tmp_path: Path, slash: str) -> None:
    store = CacheStore.open(f"{server.url}/cache{slash}", Download(directory=tmp_path))
    _assert_reads_equal(store, CacheStore.open(cache))
    assert _asked(server, cache) == [1] * NUM_SHARDS
    store.close()


def test_a_cache_in_a_bucket_reads_as_the_local_one(cache: Path, tmp_path: Path) -> None:
    with s3_server() as client:
        for name, data in _files(cache).items():
            client.put_object(Bucket="bucket", Key=f"some/cache/{name}", Body=data)
        store = CacheStore.open("s3://bucket/some/cache", Download(directory=tmp_path, max_bytes=5 * _shard_bytes(cache)))
        store.ahead(range(NUM_SAMPLES))
        _assert_reads_equal(store, CacheStore.open(cache))
        store.close()
        with pytest.raises(CacheError, match="s3://bucket/none holds no finished cache"):
            CacheStore.open("s3://bucket/none", Download(directory=tmp_path))


def test_a_cache_in_any_file_system_of_fsspec_reads_as_the_local_one(cache: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in _files(cache).items():
        memory.pipe(f"/some/cache/{name}", data)
    _assert_reads_equal(CacheStore.open("memory://some/cache", Download(directory=tmp_path)), CacheStore.open(cache))
    memory.rm("/some", recursive=True)


@pytest.mark.parametrize("lacking", ["ranges", "sizes"])
def test_a_server_without_ranges_or_sizes_serves_a_cache(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, lacking: str
) -> None:
    setattr(server, lacking, False)
    assert opened().path(3).read_bytes() == (cache / _shards(cache)[3]).read_bytes()


# What fails.


@pytest.mark.parametrize(
    "faults", [[503, 503], ["reset"], ["short", "reset", 429], ["lie", "lie"]], ids=lambda faults: "-".join(map(str, faults))
)
def test_passing_faults_are_waited_out(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, faults: list[Fault]
) -> None:
    names = [*_files(cache / "view"), "../cache.json"]
    scripts = [os.path.normpath(f"/cache/view/{name}") for name in names] + [f"/cache/{name}" for name in _shards(cache)]
    server.faults.update({("GET", path): list(faults) for path in scripts})
    files = opened()
    for shard, name in enumerate(_shards(cache)):
        assert files.path(shard).read_bytes() == (cache / name).read_bytes()
    assert not any(server.faults["GET", path] for path in scripts)


def test_a_lasting_fault_is_the_environments_and_a_later_try_goes_on(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    files = opened()
    server.always[f"/cache/{_shards(cache)[2]}"] = 503
    with pytest.raises(EnvironmentFault, match=r"safetensors could not be read in 5 tries: HTTP 503"):
        files.path(2)
    assert _kept(tmp_path) == []
    server.always.clear()
    assert files.path(2).read_bytes() == (cache / _shards(cache)[2]).read_bytes()


@pytest.mark.parametrize("change", ["flipped", "short", "long"])
def test_other_bytes_on_the_server_are_refused(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path, change: str
) -> None:
    path = f"/cache/{_shards(cache)[1]}"
    good = server.files[path]
    bad = {"flipped": good[:-1] + bytes([good[-1] ^ 1]), "short": good[:-5], "long": good + b"more"}[change]
    server.files[path] = bad
    with pytest.raises(CacheError) as caught:
        opened().path(1)
    found = f"more than {len(good):,} bytes" if change == "long" else f"{len(bad):,} bytes with BLAKE3 {_blake3(bad)}"
    assert str(caught.value) == (
        f"{server.url}{path} is damaged: expected {len(good):,} bytes with BLAKE3 {_blake3(good)}, found {found}, 3 times. "
        f"Run `ftk verify` on the cache's directory, and copy it there again."
    )
    assert _kept(tmp_path) == []


def _blake3(data: bytes) -> str:
    import blake3

    return blake3.blake3(data).hexdigest()


def test_other_bytes_on_the_way_are_fetched_again(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path
) -> None:
    assert isinstance(server.files, _Gated)
    table = next(name for name in _files(cache / "view") if name.startswith("latents"))
    for path in (f"/cache/{_shards(cache)[1]}", f"/cache/view/{table}"):
        good = server.files[path]
        # A request for the length and one for the bytes, each time.
        server.files.instead[path] = [b"x" * len(good)] * 4
    assert opened().path(1).read_bytes() == (cache / _shards(cache)[1]).read_bytes()
    assert not any(server.files.instead.values())


def test_what_the_server_lacks_is_named(server: FaultServer, opened: Callable[..., RemoteShards], cache: Path) -> None:
    path = f"/cache/{_shards(cache)[1]}"
    del server.files[path]
    with pytest.raises(CacheError, match=re.escape(f"{server.url}{path} is missing: the copy of the cache there is not whole")):
        opened().path(1)
    table = next(path for path in server.files if "/view/texts-" in path)
    server.files[table] += b"more"
    # The first open has fetched the table: it counts by its digest.
    opened()
    del server.files["/cache/cache.json"]
    message = "holds no finished cache. Run `ftk cache RUN.yaml` and copy the directory there."
    with pytest.raises(CacheError, match=re.escape(f"{server.url}/cache {message}")):
        opened()


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_table_that_cannot_be_had_is_named(server: FaultServer, opened: Callable[..., RemoteShards], damage: str) -> None:
    table = next(path for path in server.files if "/view/texts-" in path)
    data = server.files.pop(table)
    if damage == "other":
        server.files[table] = data[::-1]
    with pytest.raises(CacheError, match=rf"{re.escape(server.url + table)} is (missing|damaged: expected BLAKE3 \w+, found)"):
        opened()


def test_a_damaged_manifest_is_named(server: FaultServer, opened: Callable[..., RemoteShards]) -> None:
    data = server.files["/cache/cache.json"]
    for wrong in (data[:-10], data.replace(b"tiny", b"huge"), b"[]"):
        server.files["/cache/cache.json"] = wrong
        with pytest.raises(CacheError, match=re.escape(f"{server.url}/cache/cache.json cannot be used. ")):
            opened()


@pytest.mark.parametrize("column", ["kind", "fingerprint", "name"])
def test_no_table_names_a_file_outside_of_the_folder(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path, column: str
) -> None:
    manifest = view.read_manifest(cache)
    assert manifest is not None
    tables = view.read_tables(cache, manifest)
    rows = tables["shards"].to_pylist()
    rows[0][column] = "../../../evil"
    tables["shards"] = pa.Table.from_pylist(rows, schema=view.SHARD_SCHEMA)
    facts = {
        name: value
        for name, value in asdict(manifest).items()
        if name not in ("schema_version", "num_samples", "tables", "digest")
    }
    view.commit(tmp_path / "evil", tables, facts)
    _put(server, tmp_path / "evil")
    server.files["/cache/latents/x.safetensors"] = b""
    with pytest.raises(CacheError, match=r"\.\./\.\./\.\./evil.* is no shard of a cache"):
        opened()


def test_secrets_appear_nowhere(server: FaultServer, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    urls = [f"http://me:hunter{n}@127.0.0.1:{server.server_port}/cache?sig=hunter{n}" for n in range(2)]
    path = f"/cache/{_shards(cache)[0]}"
    messages = []
    with caplog.at_level(logging.DEBUG, "ftk"):
        for url in urls:
            server.faults["GET", path] = [503]
            files = open_remote(url, Download(directory=tmp_path, max_bytes=2 * _shard_bytes(cache)))[2]
            assert "hunter" not in str(files.path(0))
        server.files[f"/cache/{_shards(cache)[1]}"] = b"other"
        for make in (lambda: files.path(1), lambda: open_remote(url.replace("cache", "none"), Download(directory=tmp_path))):
            with pytest.raises(CacheError) as caught:
                make()
            messages.append(str(caught.value))
        with pytest.raises(ConfigError) as refused:
            open_remote(url, Download(directory=tmp_path, max_bytes=10))
    assert "hunter" not in caplog.text + str(refused.value) + "".join(messages)
    # Another password or signature is still the same cache.
    assert server.count(path) == 2
    assert len([folder for folder in tmp_path.iterdir() if (folder / "cache.json").exists()]) == 1


def test_a_full_disk_leaves_no_part_of_a_file(
    opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, chunk: bytes) -> None:
        os.write(file.fileno(), chunk[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = opened()
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_write", full)
        with pytest.raises(EnvironmentFault, match=r"safetensors cannot be written: No space left.*cache\.download_dir"):
            files.path(0)
    assert _kept(tmp_path) == []
    assert files.path(0).read_bytes() == (cache / _shards(cache)[0]).read_bytes()


def test_a_folder_that_cannot_be_made_is_named(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match=r"file/\w+ cannot be written: Not a directory"):
        open_remote(f"{server.url}/cache", Download(directory=tmp_path / "file"))


# What is kept.


def test_what_is_there_is_not_fetched_again(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    for shard in range(NUM_SHARDS):
        first.path(shard)
    server.requests.clear()
    with caplog.at_level(logging.INFO, "ftk"):
        again = opened()
    assert "0 B of " in caplog.text
    assert [again.path(shard) for shard in range(NUM_SHARDS)] == [first.path(shard) for shard in range(NUM_SHARDS)]
    assert {path for _, path, _ in server.requests} == {"/cache/cache.json"}


def test_a_file_that_is_gone_or_cut_off_is_fetched_again(opened: Callable[..., RemoteShards], cache: Path) -> None:
    files = opened()
    path, data = files.path(0), (cache / _shards(cache)[0]).read_bytes()
    path.unlink()
    assert files.path(0).read_bytes() == data
    path.write_bytes(data[:100])
    assert files.path(0).read_bytes() == data


def test_what_a_killed_process_left_is_removed(opened: Callable[..., RemoteShards], tmp_path: Path) -> None:
    files = opened(bound=3)
    path = files.path(0)
    orphans = [path.with_name(f".tmp-{name}.safetensors") for name in ("other", "more")]
    for orphan in orphans:
        orphan.write_bytes(bytes(path.stat().st_size))
    manifest = path.parents[2] / ".tmp-cache.json-1-abc"
    manifest.write_bytes(b"{")
    for shard in (1, 2):
        files.path(shard)
    assert len(_kept(tmp_path)) == 3
    assert not any(orphan.exists() for orphan in orphans)
    opened()
    assert not manifest.exists()


def test_the_least_recently_used_shards_go_first(opened: Callable[..., RemoteShards], tmp_path: Path) -> None:
    files, removed = opened(bound=3), list[int]()
    files.on_removed = removed.append
    for shard in (0, 1, 2, 0, 3):
        files.path(shard)
    assert removed == [1]
    files.used(2)
    files.path(4)
    assert removed == [1, 0]
    assert len(_kept(tmp_path)) == 3


def test_the_order_of_use_outlives_the_process(opened: Callable[..., RemoteShards]) -> None:
    files = opened(bound=3)
    paths = [files.path(shard) for shard in range(3)]
    for path, seconds in zip(paths, (50, 10, 90), strict=True):
        os.utime(path, (seconds, seconds))
    again, removed = opened(bound=3), list[int]()
    again.on_removed = removed.append
    again.path(1)
    assert paths[1].stat().st_mtime > 1000
    again.path(5)
    again.path(6)
    assert removed == [0, 2]


def test_a_smaller_bound_holds_from_the_start(opened: Callable[..., RemoteShards], tmp_path: Path) -> None:
    files = opened()
    for shard in range(6):
        files.path(shard)
    opened(bound=2)
    assert _kept(tmp_path) == sorted(files.path(shard) for shard in (4, 5))


def test_the_bound_holds_at_every_instant(server: FaultServer, opened: Callable[..., RemoteShards], cache: Path) -> None:
    """Random reads by several threads and two stores, and fetching ahead; what is being fetched counts in full."""
    bound, stores = 3.5, [opened(bound=3.5) for _ in range(2)]
    folder, names, seen, stopped = stores[0].path(0).parents[2], _shards(cache), [0], threading.Event()
    whole = {name: (cache / name).read_bytes() for name in names}

    def watch() -> None:
        while not stopped.is_set():
            with storage.locked(folder / fetch._ROOM_LOCK):
                # Outside of the lock files get no longer, but they can go.
                seen.append(sum(path.stat().st_size for path in _kept(folder) if path.exists()))

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(25):
            shard, files = chosen.randrange(NUM_SHARDS), stores[seed % 2]
            files.ahead([shard, *(chosen.randrange(NUM_SHARDS) for _ in range(3))])
            # Another thread may remove the file before it is opened here.
            while True:
                try:
                    assert files.path(shard).read_bytes() == whole[names[shard]]
                    break
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
    finally:
        stopped.set()
        watcher.join()
    assert max(seen) <= bound * _shard_bytes(cache)
    assert max(seen) >= 2 * _shard_bytes(cache)
    assert max(_asked(server, cache)) > 1


def test_a_shard_larger_than_the_bound_is_refused_at_once(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path
) -> None:
    largest = max((cache / name).stat().st_size for name in _shards(cache))
    bound = int(0.9 * _shard_bytes(cache))
    with pytest.raises(ConfigError, match=rf"cache\.download_gib allows {bound:,} bytes, .*/cache has {largest:,}\. Set it to"):
        opened(bound=0.9)


def test_what_is_to_be_fetched_is_said(
    opened: Callable[..., RemoteShards], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "ftk"):
        opened()
        (line,) = caplog.messages
        assert re.fullmatch(
            r"http://\S+/cache: (\S+ KiB) of \1 are still to be fetched into /\S+, which keeps \S+ KiB at most\.", line
        )
        opened(bound=2)
        assert next(message for message in caplog.messages if "is larger" in message).endswith("if the disk has room for it.")
        usage = fetch.shutil.disk_usage("/")._replace(free=100)
        monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
        opened()
    assert "has 100 B free, but" in caplog.messages[-1]


# Ahead of need.


def test_shards_are_fetched_ahead_of_need_and_once(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    files, wanted = opened(), [5, 3, 9, 3, 0]
    files.ahead(wanted)
    _wait_until(lambda: len(_kept(tmp_path)) == 4 and not list(tmp_path.rglob(".tmp-*")))
    asked = _asked(server, cache)
    assert [shard for shard, count in enumerate(asked) if count] == sorted(set(wanted))
    for shard in wanted:
        files.path(shard)
    files.ahead(wanted)
    files.ahead([*wanted, 1])
    _wait_until(lambda: files._files[1].is_there())
    assert _asked(server, cache) == [int(shard in (*wanted, 1)) for shard in range(NUM_SHARDS)]


def test_a_newer_wish_replaces_what_is_not_begun(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    assert isinstance(server.files, _Gated)
    files = opened()
    server.files.gate.clear()
    files.ahead(range(10))
    _wait_until(lambda: len(_kept(tmp_path)) == 4)
    files.ahead([11])
    server.files.gate.set()
    _wait_until(lambda: len(_kept(tmp_path)) == 5 and not list(tmp_path.rglob(".tmp-*")))
    time.sleep(0.05)
    assert [shard for shard, count in enumerate(_asked(server, cache)) if count] == [0, 1, 2, 3, 11]


def test_no_more_than_half_of_the_bound_is_fetched_ahead(opened: Callable[..., RemoteShards], tmp_path: Path) -> None:
    files, removed = opened(bound=6), list[int]()
    files.on_removed = removed.append
    for shard in (0, 1, 2):
        files.path(shard)
    files.ahead([6, 7, 8, 9, 10, 11])
    _wait_until(lambda: all(files._files[shard].is_there() for shard in (6, 7, 8)))
    time.sleep(0.05)
    assert len(_kept(tmp_path)) == 6
    # What is wanted next stays, though it was used less recently than all else.
    for shard in (0, 1, 2, 3, 4, 5):
        files.path(shard)
    assert removed == [0, 1, 2]
    assert all(files._files[shard].is_there() for shard in (6, 7, 8))
    # Unless nothing else can go.
    files.ahead([3, 4, 5])
    files._wanted = frozenset(file.path for file in files._files)
    files.path(9)
    assert removed[3:] in ([6], [7], [8])


def test_nothing_is_fetched_ahead_where_one_shard_fits(opened: Callable[..., RemoteShards], cache: Path) -> None:
    files = opened(bound=1.9)
    files.ahead([0, 1, 2])
    assert _threads() == []
    assert files.path(0).stat().st_size == _shard_bytes(cache)


def test_a_failure_ahead_is_told_and_tried_again_when_needed(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, path = opened(), f"/cache/{_shards(cache)[4]}"
    server.always[path] = 503
    files.ahead([4, 5])
    _wait_until(lambda: "HTTP 503" in caplog.text and "tried again when it is needed" in caplog.text)
    with pytest.raises(EnvironmentFault, match="HTTP 503"):
        files.path(4)
    server.always.clear()
    assert files.path(4).read_bytes() == server.files[path]
    _wait_until(files._files[5].is_there)


def test_needed_shards_wait_for_the_room_that_others_take(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    assert isinstance(server.files, _Gated)
    files = opened(bound=2)
    server.files.gate.clear()
    files.ahead([0])
    _wait_until(lambda: len(_kept(tmp_path)) == 1)
    with ThreadPoolExecutor(2) as pool:
        needed = [pool.submit(files.path, shard) for shard in (1, 2)]
        time.sleep(0.05)
        assert not any(one.done() for one in needed)
        server.files.gate.set()
        assert {one.result(10) for one in needed} == {files._files[shard].path for shard in (1, 2)}


# Threads and processes.


def test_threads_that_ask_for_one_shard_fetch_it_once(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path
) -> None:
    assert isinstance(server.files, _Gated)
    files, others = opened(), opened()
    server.files.gate.clear()
    files.ahead([2])
    with ThreadPoolExecutor(6) as pool:
        found = [pool.submit(one.path, shard) for one in (files, others) for shard in (2, 2, 3)]
        time.sleep(0.1)
        server.files.gate.set()
        assert len({future.result(10) for future in found}) == 2
    assert _asked(server, cache) == [int(shard in (2, 3)) for shard in range(NUM_SHARDS)]


def _read_all(url: str, directory: Path, max_bytes: int, seed: int, results: Any) -> None:
    store = CacheStore.open(url, Download(directory=directory, max_bytes=max_bytes))
    order = random.Random(seed).sample(range(len(store)), len(store))
    store.ahead(order)
    results.put(sum(float(store.latents(number)[0].sum()) for number in sorted(order)))
    store.close()


def test_processes_share_what_they_fetch(server: FaultServer, cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = f"{server.url}/cache", tmp_path, 100 * _shard_bytes(cache)
    processes = [context.Process(target=_read_all, args=(*arguments, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    store = CacheStore.open(cache)
    assert found == {sum(float(store.latents(number)[0].sum()) for number in range(NUM_SAMPLES))}
    counts = Counter(path for method, path, _ in server.requests if method == "GET")
    assert counts.pop("/cache/cache.json") == 3
    assert set(counts.values()) == {1}


def test_closing_stops_the_threads(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    assert isinstance(server.files, _Gated)
    files = opened()
    server.files.gate.clear()
    files.ahead(range(10))
    _wait_until(lambda: len(_kept(tmp_path)) == 4)
    assert len(_threads()) == 4
    threading.Timer(0.1, server.files.gate.set).start()
    files.close()
    assert _threads() == []
    assert sum(_asked(server, cache)) <= 4
    assert not list(tmp_path.rglob(".tmp-*"))
    files.ahead([11])
    assert _threads() == []
    assert files.path(11).exists()


def test_no_thread_keeps_a_process_alive(server: FaultServer, tmp_path: Path) -> None:
    assert isinstance(server.files, _Gated)
    server.files.gate.clear()
    script = (
        "from ftk.cache.fetch import Download, open_remote; from pathlib import Path; import time;"
        f"files = open_remote({server.url + '/cache'!r}, Download(directory=Path({str(tmp_path)!r})))[2];"
        "files.ahead(range(9)); time.sleep(0.3); print('done', flush=True)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    server.files.gate.set()
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")
    # What was under way may lie there still.
    open_remote(f"{server.url}/cache", Download(directory=tmp_path))
    assert _kept(tmp_path) == []


# A view that changes.


def test_a_new_view_on_the_server_is_picked_up(
    server: FaultServer, opened: Callable[..., RemoteShards], tmp_path: Path
) -> None:
    store = CacheStore.open(f"{server.url}/cache", Download(directory=tmp_path))
    for number in range(NUM_SAMPLES):
        store.latents(number)
    _put(server, _write_cache(tmp_path / "grown", NUM_SAMPLES + 2))
    server.requests.clear()
    grown = CacheStore.open(f"{server.url}/cache", Download(directory=tmp_path))
    assert (len(store), len(grown)) == (NUM_SAMPLES, NUM_SAMPLES + 2)
    for number in range(NUM_SAMPLES):
        assert all(map(torch.equal, store.latents(number), grown.latents(number)))
    assert not any(path.endswith("safetensors") for _, path, _ in server.requests)
    grown.latents(NUM_SAMPLES + 1)
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "grown")
    assert len(list((folder / "view").iterdir())) == 4


def test_a_view_that_is_swapped_while_it_is_opened_is_read_anew(
    server: FaultServer, opened: Callable[..., RemoteShards], cache: Path, tmp_path: Path
) -> None:
    assert isinstance(server.files, _Gated)
    old = server.files["/cache/cache.json"]
    _put(server, _write_cache(tmp_path / "grown", NUM_SAMPLES + 2))
    server.files.instead["/cache/cache.json"] = [old]
    store = CacheStore.open(f"{server.url}/cache", Download(directory=tmp_path / "kept"))
    assert len(store) == NUM_SAMPLES + 2
    assert server.count("/cache/cache.json") == 2
