"""The prepared tars: the bytes that webdataset's writer gives, and both ways of reading them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from ftk import storage
from ftk.contracts import SampleRow
from ftk.errors import DatasetError
from ftk.pipeline import dataset, light_webdataset
from ftk.pipeline.dataset import PreparedDataset

KEYS = ("a-photo-0123456789ab", "x" * 40 + "-0123456789ab", "_-0123456789ab")


def _row(key: str) -> SampleRow:
    return SampleRow(
        key=key, source="s", content_sha256="", image_id=key, width=32, height=48, bucket_width=32, bucket_height=48,
        resize_width=32, resize_height=48, crop_x=0, crop_y=0, flipped=False, copied=False, perceptual_hash="",
        captions=["a"], repeats=1, role="instance", num_controls=0, control_ids=[], has_mask=False, mask_id="", shard="00000",
    )  # fmt: skip


def _members(count: int) -> list[tuple[str, str, bytes]]:
    """(key, suffix, bytes) of samples with an image of some format, a mask, eleven controls and a row."""
    members = []
    for number in range(count):
        key = f"{KEYS[number % 3]}{number}"
        members.append((key, ("png", "jpg", "webp")[number % 3], bytes([number]) * (number * 511)))
        members.append((key, "mask.png", b"mask"))
        members += [(key, f"control{control}.png", b"control" * control) for control in range(11)]
        members.append((key, "json", "naïve 日本 😀".encode()))
    return members


def _written(path: Path, members: list[tuple[str, str, bytes]]) -> None:
    with path.open("wb") as file, dataset.tar_writer(file) as tar:
        for key, suffix, data in members:
            tar.write({"__key__": key, suffix: data})


def test_a_shard_has_the_bytes_of_pythons_ustar_with_fixed_owner_mode_and_time(tmp_path: Path) -> None:
    members = _members(30)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, suffix, data in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode, info.uname, info.gname, info.mtime = len(data), 0o644, "ftk", "ftk", 0
            tar.addfile(info, io.BytesIO(data))
    _written(tmp_path / "0.tar", members)
    assert (tmp_path / "0.tar").read_bytes() == expected.getvalue()


def test_a_shard_on_a_full_disk_is_an_error_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    with pytest.raises(OSError, match="No space"), Path("/dev/full").open("wb", buffering=0) as file:  # noqa: SIM117
        with dataset.tar_writer(file) as tar:
            tar.write({"__key__": "a", "png": bytes(1 << 20)})
    del tar
    assert capfd.readouterr().err == ""


@pytest.fixture
def prepared(tmp_path: Path, written_dataset: Callable[..., PreparedDataset]) -> PreparedDataset:
    """Six samples in one shard."""
    return written_dataset(tmp_path, [[_row(f"k{number}") for number in range(6)]])


def test_a_stream_gives_what_webdataset_and_reading_by_offset_give(prepared: PreparedDataset) -> None:
    tar = prepared.directory / "shards" / "00000.tar"
    expected = [sample["png"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
    parts = [(f"k{number}", "image") for number in range(6)]
    assert list(prepared.stream("00000", parts)) == expected
    assert [prepared.span("00000", *part).read() for part in parts] == expected
    assert list(prepared.stream("00000", parts[1::2])) == expected[1::2]


def test_masks_and_controls_are_streamed_in_any_order_within_a_sample(
    prepared: PreparedDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    members = _members(6)
    _written(tmp_path / "all.tar", members)
    monkeypatch.setattr(prepared, "_verified", lambda shard: tmp_path / "all.tar")
    keys = list(dict.fromkeys(key for key, _, _ in members))
    parts = [(key, part) for key in keys for part in ("image", "control10", "control2", "mask")]
    data = {f"{key}.{suffix}": data for key, suffix, data in members}
    images = {key: data for key, suffix, data in members if "." not in suffix and suffix != "json"}
    assert list(prepared.stream("00000", parts)) == [
        images[key] if part == "image" else data[f"{key}.{part}.png"] for key, part in parts
    ]


@pytest.mark.parametrize("offset", [0, 3 * 1024 + 20, -1], ids=["first header", "later header", "end"])
def test_a_flipped_bit_in_a_shard_is_found_before_anything_is_read(prepared: PreparedDataset, offset: int) -> None:
    tar = prepared.directory / "shards" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[offset] ^= 1
    tar.write_bytes(content)
    stream = prepared.stream("00000", [("k0", "image")])
    with pytest.raises(DatasetError, match=r"00000\.tar is damaged"):
        next(stream)


def test_a_shard_that_changes_after_it_was_verified_is_named_although_webdataset_reads_on(prepared: PreparedDataset) -> None:
    tar = prepared.directory / "shards" / "00000.tar"
    parts = [(f"k{number}", "image") for number in range(6)]
    assert len(list(prepared.stream("00000", parts))) == 6
    with tarfile.open(tar) as archive:
        header, data = archive.getmembers()[3].offset, archive.getmembers()[4].offset_data
    whole = tar.read_bytes()
    tar.write_bytes(whole[:header])
    # The library takes this for the end: three samples, no error.
    assert len(list(webdataset.WebDataset(str(tar), shardshuffle=False))) == 3
    with pytest.raises(DatasetError, match=r"00000\.tar changed while it was read: it holds no image of k3"):
        list(prepared.stream("00000", parts))
    tar.write_bytes(whole[: data + 10])
    with pytest.raises(DatasetError, match=r"00000\.tar changed while it was read: unexpected end of data\. Run"):
        list(prepared.stream("00000", parts))


def test_a_checksum_is_verified_once_for_both_ways_of_reading(
    prepared: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    sha256 = storage.sha256_file
    monkeypatch.setattr(storage, "sha256_file", lambda path: hashed.append(path) or sha256(path))
    prepared.span("00000", "k0", "image")
    list(prepared.stream("00000", [("k1", "image")]))
    prepared.span("00000", "k2", "image")
    assert len(hashed) == 1


def test_in_a_process_that_has_torch_the_library_is_the_one_that_others_import() -> None:
    import torch.utils.data

    assert light_webdataset.load().DataPipeline is webdataset.DataPipeline
    assert issubclass(light_webdataset.load().DataPipeline, torch.utils.data.IterableDataset)
