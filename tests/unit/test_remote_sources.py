"""Reading from where things fail: S3 and the web on loopback, and local files that are none."""

import email.utils
import errno
import io
import json
import logging
import multiprocessing
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Fault, FaultServer, fault_server, s3_endpoint, s3_server

from ftk import locations
from ftk.configs.schema import SourceConfig
from ftk.contracts import Reject, RejectReason
from ftk.errors import ConfigError, EnvironmentFault, SourceError
from ftk.pipeline.sources import folder, table
from ftk.pipeline.sources.base import Record

READERS: dict[str, Callable[[str], bytes]] = {}
IMAGE = bytes(range(256)) * 40


def _reader(function: Callable[[str], bytes]) -> Callable[[str], bytes]:
    READERS[function.__name__.strip("_")] = function
    return function


@_reader
def _whole(location: str) -> bytes:
    return locations.read_bytes(location)


@_reader
def _stream(location: str) -> bytes:
    with locations.open_stream(location) as file:
        return b"".join(iter(lambda: file.read(1000), b""))


@_reader
def _seekable(location: str) -> bytes:
    with locations.open_seekable(location) as file:
        file.seek(5000)
        end = file.read()
        file.seek(0)
        return file.read(5000) + end


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_STREAM_BYTES", 4000)
    monkeypatch.setattr(locations, "_SEEK_BYTES", 3000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        running.files["/a.jpg"] = IMAGE
        yield running


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_server() as client:
        yield client


def _put(client: Any, **files: bytes | str) -> None:
    for key, body in files.items():
        client.put_object(Bucket="bucket", Key=key, Body=body)


def _records(module: Any, path: str, **settings: Any) -> list[Record | Reject]:
    config = SourceConfig(path=path, **settings)
    parsed = module.SOURCE.Settings(**config.settings)
    partitions = list(module.SOURCE.partitions(config, parsed, 2))
    assert partitions == list(module.SOURCE.partitions(config, parsed, 2))
    return [item for partition in partitions for item in module.SOURCE.read(config, parsed, partition)]


# The web, and its faults.


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "faults",
    [[503, 503], [429], [500, 502, 504], ["reset"], ["short", "reset", 503], [408, "short"]],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_a_passing_fault_is_waited_out(server: FaultServer, read: Callable[[str], bytes], faults: list[Fault]) -> None:
    server.faults["GET", "/a.jpg"] = list(faults)
    assert read(f"{server.url}/a.jpg") == IMAGE
    assert server.faults["GET", "/a.jpg"] == []


@pytest.mark.parametrize("read", [*READERS.values(), locations.signature], ids=[*READERS, "signature"])
@pytest.mark.parametrize("fault", [503, 429, "reset"])
def test_a_lasting_fault_is_the_environments_and_hides_secrets(
    server: FaultServer, read: Callable[[str], object], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    server.always["/a.jpg"] = fault
    url = f"http://user:hunter2@127.0.0.1:{server.server_port}/a.jpg?sig=hunter3&x=hunter4"
    with caplog.at_level(logging.DEBUG, "ftk"), pytest.raises(EnvironmentFault) as caught:
        read(url)
    message = str(caught.value)
    assert message.startswith(f"http://***@127.0.0.1:{server.server_port}/a.jpg?*** could not be read in 5 tries: ")
    assert "run the command again" in message
    assert fault == "reset" or f"HTTP {fault}" in message
    assert caught.value.__cause__ is None
    assert "trying again" in caplog.text
    assert "hunter" not in message + caplog.text
    assert EnvironmentFault.exit_code == 4


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_body_that_never_comes_whole_is_the_environments(server: FaultServer, read: Callable[[str], bytes]) -> None:
    server.always["/a.jpg"] = "short"
    with pytest.raises(EnvironmentFault, match="in 5 tries"):
        read(f"{server.url}/a.jpg")


@pytest.mark.parametrize("read", [READERS["stream"], READERS["seekable"]], ids=["stream", "seekable"])
def test_a_body_that_owns_up_to_half_of_it_is_read_again(server: FaultServer, read: Callable[[str], bytes]) -> None:
    server.faults["GET", "/a.jpg"] = ["lie", "lie"]
    assert read(f"{server.url}/a.jpg") == IMAGE


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("read", [*READERS.values(), locations.signature], ids=[*READERS, "signature"])
def test_what_is_not_there_is_not_found_at_once(server: FaultServer, read: Callable[[str], object], status: int) -> None:
    server.always["/a.jpg"] = status
    with pytest.raises(FileNotFoundError, match=r"does not exist: '.*/a\.jpg\?\*\*\*'"):
        read(f"{server.url}/a.jpg?sig=secret")
    assert server.count("/a.jpg") == 1


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("read", [*READERS.values(), locations.signature], ids=[*READERS, "signature"])
def test_a_closed_door_is_no_reject(server: FaultServer, read: Callable[[str], object], status: int) -> None:
    server.always["/a.jpg"] = status
    with pytest.raises(EnvironmentFault, match=rf"/a\.jpg: access was denied \(HTTP {status}\)\. .*netrc"):
        read(f"{server.url}/a.jpg")
    assert server.count("/a.jpg") == 1


@pytest.mark.parametrize(("asked", "waits"), [("3", 3.0), ("0", 0.0), ("date", 20.0), ("3600", None)])
def test_the_wait_that_a_server_asks_for_is_kept_within_bounds(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, asked: str, waits: float | None
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    asked = email.utils.formatdate(time.time() + waits, usegmt=True) if asked == "date" and waits else asked
    server.faults["GET", "/a.jpg"] = [429, 503]
    server.headers["/a.jpg"] = {"Retry-After": asked}
    if waits is None:
        with pytest.raises(locations.UnreachableError, match=r"HTTP 429; the server asks to wait 3,\d\d\d s") as caught:
            locations.read_bytes(f"{server.url}/a.jpg")
        assert "127.0.0.1" not in caught.value.detail
        assert slept == []
        return
    assert locations.read_bytes(f"{server.url}/a.jpg") == IMAGE
    assert len(slept) == 2
    assert all(waits - 2 <= each <= waits + 0.1 for each in slept)


def test_redirects_that_never_end_are_refused_at_once(server: FaultServer) -> None:
    server.redirects |= {"/a.jpg": "/b.jpg", "/b.jpg": "/a.jpg"}
    with pytest.raises(locations.RefusedError, match=r"its redirects never end"):
        locations.read_bytes(f"{server.url}/a.jpg")
    assert server.count("/a.jpg") <= 10


def test_a_body_that_stops_coming_is_not_waited_for_forever(server: FaultServer) -> None:
    server.always["/a.jpg"] = "drip"
    with pytest.raises(locations.UnreachableError, match="no whole answer in time"):
        locations.read_bytes(f"{server.url}/a.jpg", seconds=0.3)


def test_a_host_that_takes_no_connections_gets_one_try_a_file_until_it_does(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.jpg"
    tries: list[str] = []
    for _ in range(2):
        with pytest.raises(locations.UnreachableError, match="ClientConnectorError") as caught:
            locations.read_bytes(url)
        tries.append(caught.value.detail)
    assert ["in 5 tries" in each for each in tries] == [True, False]
    server.faults["GET", "/a.jpg"] = ["reset", 503, "short", 503]
    assert locations.read_bytes(f"{server.url}/a.jpg") == IMAGE


@pytest.mark.parametrize("read", [*READERS.values(), locations.signature], ids=[*READERS, "signature"])
def test_the_scheme_of_a_url_may_be_in_capitals(server: FaultServer, read: Callable[[str], object], tmp_path: Path) -> None:
    url = f"{server.url}/a.jpg".replace("http://", "HTTP://")
    assert read(url) == read(f"{server.url}/a.jpg")
    (tmp_path / "a b").write_bytes(IMAGE)
    assert not locations.is_url(f"FILE://{tmp_path}/a b")
    assert locations.read_bytes(f"FILE://{tmp_path}/a b") == IMAGE
    assert locations.without_secrets("HTTPS://u:p@h/a?sig=x") == "HTTPS://h/a"


def test_the_netrc_file_opens_doors(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.secret = "Basic bWU6b3Blbg=="  # me:open
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password open\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert locations.read_bytes(f"{server.url}/a.jpg") == IMAGE


def test_a_definite_refusal_concerns_one_file(server: FaultServer) -> None:
    server.always["/a.jpg"] = 451
    for url in (f"{server.url}/a.jpg", "http://[bad/a.jpg"):
        with pytest.raises(OSError, match="cannot be fetched"):
            locations.read_bytes(url)


def test_a_stream_goes_on_where_it_broke_off(server: FaultServer) -> None:
    with locations.open_stream(f"{server.url}/a.jpg") as file:
        parts = [file.read(4000)]
        server.faults["GET", "/a.jpg"] = ["short", 503]
        parts += [file.read(4000), file.read()]
    assert b"".join(parts) == IMAGE
    asked = [span for method, _, span in server.requests if method == "GET"]
    assert asked == ["bytes=0-3999", *["bytes=4000-7999"] * 3, "bytes=8000-10239"]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("lacking", ["ranges", "sizes"])
def test_a_server_without_ranges_or_sizes_is_read_whole(
    server: FaultServer, read: Callable[[str], bytes], lacking: str
) -> None:
    setattr(server, lacking, False)
    server.faults["GET", "/a.jpg"] = [503, "short"]
    assert read(f"{server.url}/a.jpg") == IMAGE


def test_a_file_that_changes_while_it_is_read_is_refused(server: FaultServer) -> None:
    with locations.open_stream(f"{server.url}/a.jpg") as file:
        file.read(1000)
        server.files["/a.jpg"] = IMAGE[::-1]
        with pytest.raises(EnvironmentFault, match="has changed while it was being read"):
            file.read()


def test_the_beginning_of_a_file_is_enough(server: FaultServer) -> None:
    server.files["/empty"] = b""
    assert locations.read_bytes(f"{server.url}/a.jpg", 100) == IMAGE[:100]
    assert locations.read_bytes(f"{server.url}/a.jpg", 1 << 20) == IMAGE
    assert locations.read_bytes(f"{server.url}/empty", 100) == locations.read_bytes(f"{server.url}/empty") == b""
    assert READERS["stream"](f"{server.url}/empty") == b""


def test_a_signature_is_the_servers_word_for_a_version(server: FaultServer) -> None:
    before = locations.signature(f"{server.url}/a.jpg")
    assert before == locations.signature(f"{server.url}/a.jpg")
    server.files["/a.jpg"] = IMAGE[::-1]
    assert locations.signature(f"{server.url}/a.jpg") != before


def test_a_table_of_urls(server: FaultServer, tmp_path: Path) -> None:
    server.files["/b%20%23.jpg"] = b"escaped"
    urls = [f"{server.url}/a.jpg?size=5", f"{server.url}/none.jpg"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"url": url, "text": "a cat"}) for url in urls))
    first, second = _records(table, str(tmp_path / "t.jsonl"))
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.identity, first.image.read()) == (f"{server.url}/a.jpg", IMAGE)
    with pytest.raises(FileNotFoundError):
        second.image.read()
    server.files["/t.csv"] = b"file_name,text\na.jpg,a cat\nb #.jpg,a dog\n"
    assert [item.image.read() for item in _records(table, f"{server.url}/t.csv") if isinstance(item, Record)] == [
        IMAGE,
        b"escaped",
    ]
    server.always["/t.csv"] = 503
    with pytest.raises(EnvironmentFault, match=r"t\.csv could not be read in 5 tries: HTTP 503"):
        _records(table, f"{server.url}/t.csv")


def test_a_network_fault_inside_of_parquet_is_no_damage(server: FaultServer) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [os.urandom(20_000)] * 4, "text": ["a cat"] * 4}), buffer, row_group_size=1)
    server.files["/t.parquet"] = buffer.getvalue()
    server.faults["GET", "/t.parquet"] = [503, "reset"]
    assert len(_records(table, f"{server.url}/t.parquet")) == 4
    config, settings = SourceConfig(path=f"{server.url}/t.parquet"), table.TableSettings()
    (first, *_) = table.SOURCE.partitions(config, settings, 1)
    server.always["/t.parquet"] = 503
    with pytest.raises(EnvironmentFault, match="HTTP 503"):
        list(table.SOURCE.read(config, settings, first))


@pytest.mark.parametrize("status", [503, 403])
def test_a_caption_that_cannot_be_fetched_is_no_reject(server: FaultServer, status: int) -> None:
    from ftk.pipeline import captions

    server.always["/a.txt"] = status
    with pytest.raises(EnvironmentFault):
        captions.read(f"{server.url}/a.txt")
    server.always["/a.txt"] = 404
    problem = captions.read(f"{server.url}/a.txt")
    assert isinstance(problem, captions.Problem)
    assert problem.reason == RejectReason.CAPTION_MISSING


def test_a_web_index_is_a_folder(server: FaultServer) -> None:
    server.files["/photos/"] = b'<a href="../">up</a> <a href="b.jpg">b</a> <a href="b.txt">b</a> <a href="sub/">sub</a>'
    server.files["/photos"] = server.files["/photos/"]
    server.files["/photos/sub/"] = server.files["/photos/sub"] = b'<a href="c.jpg">c</a>'
    server.files.update({"/photos/b.jpg": IMAGE, "/photos/b.txt": b"a cat", "/photos/sub/c.jpg": b"c"})
    first, second = _records(folder, f"{server.url}/photos/", caption="a photo")
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.identity, first.captions, first.image.read()) == ("b.jpg", ("a cat",), IMAGE)
    assert (second.identity, second.captions, second.image.read()) == ("sub/c.jpg", ("a photo",), b"c")


# S3.


def test_a_folder_in_a_bucket(bucket: Any) -> None:
    for key in ["b.jpg", "é.png", "sub/a.jpg", "sub/deep/x [1]?.webp", "sub-a/z.jpg"]:
        _put(bucket, **{f"photos/{key}": key, f"photos/{key.rpartition('.')[0]}.txt": f"caption of {key}"})
    _put(bucket, **{"photos/.hidden/a.jpg": b"", "photos/sub/": b"", "photos2/a.jpg": b"", "masks/b.png": b"mask"})
    records = _records(folder, "s3://bucket/photos")
    assert all(isinstance(record, Record) for record in records)
    names = [record.identity for record in records if isinstance(record, Record)]
    assert names == ["b.jpg", "é.png", "sub/a.jpg", "sub/deep/x [1]?.webp", "sub-a/z.jpg"]
    for record in records:
        assert isinstance(record, Record)
        assert record.image.read() == record.identity.encode()
        assert record.captions == (f"caption of {record.identity}",)
    one, *others = _records(folder, "s3://bucket/photos/", masks="s3://bucket/masks")
    assert isinstance(one, Record)
    assert one.mask is not None
    assert one.mask.read() == b"mask"
    assert {item.reason for item in others if isinstance(item, Reject)} == {RejectReason.MASK_MISSING}


def test_a_changed_object_changes_its_signature(bucket: Any) -> None:
    def signatures() -> list[str | None]:
        config = SourceConfig(path="s3://bucket/signed", caption="a cat")
        return [each.signature for each in folder.SOURCE.partitions(config, folder.FolderSettings(), 1)]

    _put(bucket, **{"signed/a.jpg": b"one", "signed/b.jpg": b"two"})
    before = signatures()
    assert signatures() == before
    _put(bucket, **{"signed/b.jpg": b"owt"})
    assert [old == new for old, new in zip(before, signatures(), strict=True)] == [True, False]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_in_a_bucket(bucket: Any, suffix: str) -> None:
    rows = {"file_name": ["images/a.jpg", "images/none.jpg"], "text": ["a cat", "a dog"]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    lines = zip(*rows.values(), strict=True)
    data = {
        "csv": "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in lines),
        "jsonl": "".join(
            json.dumps({"file_name": name, "text": text}) + "\n" for name, text in zip(*rows.values(), strict=True)
        ),
        "parquet": buffer.getvalue(),
    }[suffix]
    _put(bucket, **{f"tables/t.{suffix}": data, "tables/images/a.jpg": IMAGE})
    good, gone = _records(table, f"s3://bucket/tables/t.{suffix}")
    assert isinstance(good, Record)
    assert (good.image.read(), good.captions) == (IMAGE, ("a cat",))
    assert isinstance(gone, Record)
    with pytest.raises(FileNotFoundError):
        gone.image.read()
    (partition,) = table.SOURCE.partitions(SourceConfig(path=f"s3://bucket/tables/*.{suffix}"), table.TableSettings(), 2)
    assert partition.signature is not None


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_objects_are_read_like_files(bucket: Any, read: Callable[[str], bytes]) -> None:
    _put(bucket, **{"big #1.bin": IMAGE, "empty": b""})
    assert read("s3://bucket/big #1.bin") == IMAGE
    assert read("s3://bucket/empty") == b""
    for missing in ("s3://bucket/none", "s3://no-such-bucket/a"):
        with pytest.raises(FileNotFoundError, match=missing):
            read(missing)
    _put(bucket, **{"prefix/a": b""})
    with pytest.raises(locations.NotAFileError, match="is a folder, not a file"):
        read("s3://bucket/prefix")


def test_what_is_missing_in_a_store_is_said(bucket: Any) -> None:
    with pytest.raises(SourceError, match=r"s3://bucket/nothing holds no images.*Found: nothing"):
        _records(folder, "s3://bucket/nothing")
    with pytest.raises(SourceError, match=r"s3://no-such-bucket/a does not exist"):
        _records(folder, "s3://no-such-bucket/a")
    with pytest.raises(SourceError, match=r"s3://bucket/none\.csv does not exist"):
        _records(table, "s3://bucket/none.csv")


def test_patterns_are_expanded_in_a_bucket(bucket: Any) -> None:
    names = ["p/a-00.tar", "p/a-01.tar", "p/q/b.tar", "p/[x]?.tar"]
    _put(bucket, **dict.fromkeys(names, b""))
    assert locations.expand("s3://bucket/p/*.tar") == [f"s3://bucket/{name}" for name in ["p/[x]?.tar", *names[:2]]]
    assert locations.expand("s3://bucket/p/[x]?*") == ["s3://bucket/p/[x]?.tar"]
    assert locations.expand("s3://bucket/p/**/*.tar") == [f"s3://bucket/{name}" for name in ["p/[x]?.tar", *names[:3]]]
    with pytest.raises(ConfigError, match="can only be an entire path component"):
        locations.expand("s3://bucket/p/**.tar")
    assert locations.expand("s3://bucket/p/a-{01..02}.tar") == ["s3://bucket/p/a-01.tar", "s3://bucket/p/a-02.tar"]
    assert locations.expand("s3://bucket/p/{z*,q/*}") == ["s3://bucket/p/q/b.tar"]


def test_an_object_that_changes_while_it_is_read_is_refused(bucket: Any) -> None:
    _put(bucket, changing=IMAGE)
    with locations.open_stream("s3://bucket/changing") as file:
        file.read(1000)
        _put(bucket, changing=IMAGE[::-1])
        with pytest.raises(EnvironmentFault, match="s3://bucket/changing has changed while it was being read"):
            file.read()


def test_a_listing_does_not_outlive_a_change(bucket: Any) -> None:
    _put(bucket, **{"stale/a.jpg": b"short"})
    assert len(list(locations.list_files("s3://bucket/stale"))) == 1
    _put(bucket, **{"stale/a.jpg": b"not so short", "stale/b.jpg": b""})
    assert locations.read_bytes("s3://bucket/stale/a.jpg") == b"not so short"
    assert len(list(locations.list_files("s3://bucket/stale"))) == 2


def _read_in_child(location: str, results: Any) -> None:
    results.put(locations.read_bytes(location))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_for_itself(bucket: Any, method: str) -> None:
    _put(bucket, forked=IMAGE)
    assert locations.read_bytes("s3://bucket/forked") == IMAGE
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process: Any = context.Process(target=_read_in_child, args=("s3://bucket/forked", results))  # type: ignore[attr-defined]
    process.start()
    try:
        assert results.get(timeout=30) == IMAGE
    finally:
        process.kill()
        process.join()


@pytest.fixture
def faulty_bucket(server: FaultServer) -> Iterator[FaultServer]:
    server.files["/bucket/a.jpg"] = IMAGE
    with s3_endpoint(server.url):
        yield server


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("faults", [[503, 503], ["reset", "short"], ["lie"]], ids=lambda faults: "-".join(map(str, faults)))
def test_an_objects_passing_fault_is_waited_out(
    faulty_bucket: FaultServer, read: Callable[[str], bytes], faults: list[Fault]
) -> None:
    faulty_bucket.faults["GET", "/bucket/a.jpg"] = list(faults)
    faulty_bucket.faults["HEAD", "/bucket/a.jpg"] = [503]
    assert read("s3://bucket/a.jpg") == IMAGE
    assert faulty_bucket.faults["GET", "/bucket/a.jpg"] == []


@pytest.mark.parametrize(("fault", "message"), [(503, "in 5 tries: HTTP 503"), (403, "denied.*AWS_PROFILE")])
def test_an_objects_lasting_fault_is_the_environments(faulty_bucket: FaultServer, fault: Fault, message: str) -> None:
    faulty_bucket.always["/bucket/a.jpg"] = fault
    with pytest.raises(EnvironmentFault, match=message):
        locations.read_bytes("s3://bucket/a.jpg")


def test_an_object_that_is_always_short_is_the_environments(faulty_bucket: FaultServer) -> None:
    faulty_bucket.faults["GET", "/bucket/a.jpg"] = ["lie"] * 50
    with pytest.raises(EnvironmentFault, match=r"in 5 tries: ShortBodyError: 5,120 bytes arrived of 10,240"):
        locations.read_bytes("s3://bucket/a.jpg")


def test_an_object_is_asked_for_twice_at_most(faulty_bucket: FaultServer) -> None:
    locations.read_bytes("s3://bucket/a.jpg")
    assert [method for method, _, _ in faulty_bucket.requests] == ["HEAD", "GET"]


def test_the_hub_out_of_reach_is_the_environments() -> None:
    pattern = "hf://datasets/ftk/none/*.parquet"
    for ask in (locations.read_bytes, locations.signature, locations.expand, lambda root: list(locations.list_files(root))):
        with pytest.raises(EnvironmentFault, match=r"hf://datasets/ftk/none/.* could not be read in 5 tries"):
            ask(pattern)


def test_our_own_mistakes_are_not_the_networks(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("our mistake")

    _put(bucket, mistaken=b"")
    monkeypatch.setattr(locations, "_version", broken)
    with pytest.raises(TypeError, match="our mistake"):
        locations.signature("s3://bucket/mistaken")


def test_missing_credentials_are_advised_upon(
    faulty_bucket: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(EnvironmentFault, match=r"s3://bucket/a\.jpg: access was denied .*AWS_PROFILE"):
        locations.read_bytes("s3://bucket/a.jpg")


# Locations.


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.registry

    def missing(protocol: str) -> Any:
        raise ImportError(f"Please install the package for {protocol}")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=re.escape('s3:// is not installed: pip install "ftk[s3]"')):
        locations.read_bytes("s3://bucket/a")
    with pytest.raises(ConfigError, match=re.escape('https:// is not installed: pip install "ftk[http]"')):
        locations.read_bytes("https://example.invalid/a")
    with pytest.raises(ConfigError, match="gs:// is not installed: Please install the package for gs"):
        list(locations.list_files("gs://bucket/a"))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="nope://user/a: Protocol not known: nope"):
        locations.read_bytes("nope://user/a")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://b/a", True),
        ("hf://datasets/a/b", True),
        ("file:///a", False),
        ("/a://b", False),
        ("a.jpg", False),
        ("5://a", False),
    ],
)
def test_what_is_a_url(location: str, expected: bool) -> None:
    assert locations.is_url(location) == expected


@pytest.mark.parametrize(
    ("root", "relative", "expected"),
    [
        ("photos", "a.jpg", "photos/a.jpg"),
        ("photos/", "sub/a.jpg", "photos/sub/a.jpg"),
        ("/", "a.jpg", "/a.jpg"),
        ("s3://b/photos/", "a #?.jpg", "s3://b/photos/a #?.jpg"),
        ("s3://b/photos", "../masks/./a.jpg", "s3://b/masks/a.jpg"),
        ("s3://b//photos", "a.jpg", "s3://b//photos/a.jpg"),
        ("https://h/photos", "a #?.jpg", "https://h/photos/a %23%3F.jpg"),
    ],
)
def test_joining(root: str, relative: str, expected: str) -> None:
    assert locations.join(root, relative) == expected


def test_local_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ["a-00.tar", "a-01.tar", "b [1].tar", "b 1.tar", "sub/c.tar", "{x}.tar", "y{1,2}.tar"]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    assert locations.expand("a-*.tar") == ["a-00.tar", "a-01.tar"]
    assert locations.expand(f"{tmp_path}/**/*.tar")[-1] == f"{tmp_path}/{{x}}.tar"
    assert "sub/c.tar" in locations.expand("**/*.tar")
    assert locations.expand("b [1]*") == ["b [1].tar"]
    assert locations.expand("a-{01..00}.tar") == ["a-01.tar", "a-00.tar"]
    assert locations.expand("{a-*,b*,a-00}.tar") == ["a-00.tar", "a-01.tar", "b 1.tar", "b [1].tar"]
    for literal in ["{x}.tar", "y{1,2}.tar", "none.tar", "{unbalanced"]:
        assert locations.expand(literal) == [literal]
    assert locations.expand("none*") == []


# Local files that are none.


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["folder", "FIFO", "socket", "device"])
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[str], bytes], kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(path))
    else:
        path = Path("/dev/zero")
    with pytest.raises(locations.NotAFileError, match=f"is a {kind}, not a file"):
        read(str(path))


@pytest.mark.parametrize("name", ["none", "a\0b", "\ud800", "x/none"])
def test_a_name_that_no_file_has_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"")
    for read in (locations.read_bytes, locations.signature):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read(f"{tmp_path}/{name}")


def test_local_files_are_read_from_paths_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_bytes(IMAGE)
    for location in (str(tmp_path / "a"), f"file://{tmp_path}/a", "~/a"):
        for read in READERS.values():
            assert read(location) == IMAGE
    assert locations.read_bytes(str(tmp_path / "a"), 10) == IMAGE[:10]


def test_a_local_signature_sees_a_replacement_of_the_same_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    os.utime(tmp_path / "a", ns=(1, 1))
    before = locations.signature(str(tmp_path / "a"))
    (tmp_path / "b").write_bytes(b"two")
    os.utime(tmp_path / "b", ns=(1, 1))
    (tmp_path / "b").replace(tmp_path / "a")
    assert locations.signature(str(tmp_path / "a")) != before


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failing_disk_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    (tmp_path / "a").write_bytes(b"")

    def failing(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(EnvironmentFault, match=f"a cannot be read: {os.strerror(code)}"):
        locations.read_bytes(str(tmp_path / "a"))
    assert stat.S_ISREG((tmp_path / "a").stat().st_mode)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:p@h/a?sig=x 'http://h/b?c'", "https://***@h/a?*** 'http://h/b?***'"),
        ("s3://b/what? is this", "s3://b/what?*** is this"),
        ("no url? none", "no url? none"),
    ],
)
def test_what_may_be_secret_is_redacted(text: str, expected: str) -> None:
    assert locations.redacted(text) == expected


def test_printable_names_are_utf_8() -> None:
    for name, expected in [("é\n", "é\n"), (os.fsdecode(b"caf\xe9"), "caf\\xe9"), ("half \ud83d", "half \\ud83d")]:
        assert locations.printable(name) == expected


@pytest.mark.parametrize("url", ["reference://x", "github://x", "generic://x", "filecache://x", "nothing://x"])
def test_a_url_that_alone_describes_no_file_system_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"Use a local path or a URL that fsspec knows"):
        locations.read_bytes(url)
