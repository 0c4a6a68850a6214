"""The reader of a cache: what was stored comes back, once checked, to many threads, from wherever the cache is; or an error."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from counting import steps_of

from ftk import storage
from ftk.cache import shards, store
from ftk.cache.store import CacheStore
from ftk.contracts import CachedSample, CacheManifest
from ftk.errors import CacheError

Items = dict[str, dict[str, dict[str, torch.Tensor]]]
Samples = Callable[[int], list[CachedSample]]
Seal = Callable[..., CacheManifest]
Write = Callable[..., Items]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def items(written_cache: Write, directory: Path) -> Items:
    """What the cache in `directory` holds."""
    return written_cache(directory)


@pytest.fixture(params=["mapped", "positioned"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "is_network", lambda path: request.param == "positioned")


def _is_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    def facts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {
            name: (tensor.dtype, tensor.shape, bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()))
            for name, tensor in tensors.items()
        }

    return facts(one) == facts(other)


def _shard_of(directory: Path, kind: str, item: str) -> Path:
    for path in (directory / kind).rglob("*.parquet"):
        if item in shards.read_receipt(path).items["id"].to_pylist():
            return path.with_suffix(".safetensors")
    raise AssertionError(item)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _flip_tensor(path: Path, name: str) -> None:
    """Change the last byte of a tensor."""
    header, start = shards.read_header(path)
    _flip(path, start + header[name]["data_offsets"][1] - 1)


@pytest.mark.usefixtures("_either_way")
def test_every_item_comes_back_as_it_was_stored(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    for kind, listed in items.items():
        assert sorted(opened.index(kind)["id"].to_pylist()) == sorted(listed)
        for item, tensors in listed.items():
            assert _is_same(opened.item(kind, item), tensors)
            assert opened.length(kind, item) == len(tensors[min(tensors)])


@pytest.mark.usefixtures("_either_way")
def test_every_sample_has_its_own_parts(items: Items, directory: Path, cached_samples: Samples) -> None:
    opened, expected = CacheStore.open(directory), cached_samples(8)
    assert len(opened) == 8
    latents, texts = items["latents"], items["texts"]
    for number, sample in enumerate(expected):
        assert opened.sample(number) == sample
        mean, std = opened.latents(number)
        assert _is_same({"mean": mean, "std": std}, latents[sample.latents])
        controls = [{"mean": mean, "std": std} for mean, std in opened.controls(number)]
        assert len(controls) == len(sample.controls)
        assert all(_is_same(one, latents[name]) for one, name in zip(controls, sample.controls, strict=True))
        mask = opened.mask(number)
        assert (mask is None) == (sample.mask == "")
        assert mask is None or _is_same({"mask": mask}, latents[sample.mask])
        assert opened.num_texts(number) == len(sample.texts)
        for caption, name in enumerate(sample.texts):
            assert _is_same(opened.text(number, caption), texts[name])
            assert len(opened.text(number, caption)["embeds"]) == sample.text_lengths[caption]
        assert _is_same(opened.text(number), texts[sample.texts[0]])


def test_a_caption_that_a_sample_does_not_have_is_not_another_samples(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    assert opened.num_texts(2) == 1
    with pytest.raises((AssertionError, IndexError)):
        opened.text(2, 1)


def test_the_empty_caption_and_the_prompts_are_there(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    assert _is_same(opened.empty_text(), items["texts"]["empty"])
    assert _is_same(opened.prompt(""), items["texts"]["empty"])
    assert _is_same(opened.prompt("a red fox"), items["texts"]["prompt0"])
    with pytest.raises(KeyError):
        opened.prompt("a blue fox")


def test_an_item_that_is_not_there_is_a_key_error(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    for kind, other in (("latents", "text0"), ("texts", "image0")):
        with pytest.raises(KeyError):
            opened.item(kind, other)
        with pytest.raises(KeyError):
            opened.length(kind, other)


def test_the_bytes_of_all_items_are_counted(items: Items, directory: Path) -> None:
    total = sum(tensor.nbytes for listed in items.values() for tensors in listed.values() for tensor in tensors.values())
    assert CacheStore.open(directory).num_bytes() == total


def test_an_id_is_found_in_constant_time() -> None:
    count = 3_000
    rows = pa.table(
        {
            "id": [f"item{n}" for n in range(count)], "tensors": pa.array(["mean"] * count),
            "length": pa.array(range(count), pa.int32()), "bytes": pa.array([1] * count, pa.int64()),
            "checksum": pa.array([b"\0" * 16] * count, pa.binary(16)), "shard": pa.array([0] * count, pa.int32()),
        }
    )  # fmt: skip
    items = store._Items.of(rows.combine_chunks())
    assert items.row("item0") == 0
    # Arrow's own search counts as one step however long it takes: from here on there is nothing to search.
    items.ids = items.tensors = items.checksums = None
    assert [items.row(f"item{n}") for n in range(count)] == list(range(count))
    last = f"item{count - 1}"
    assert steps_of(lambda: items.row("item0")) == steps_of(lambda: items.row(last)) < 50


@pytest.mark.usefixtures("_either_way")
def test_a_checksum_is_compared_when_an_item_is_first_read(
    items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    checksum = shards.checksum
    monkeypatch.setattr(shards, "checksum", lambda tensors: calls.append(sorted(tensors)) or checksum(tensors))
    opened = CacheStore.open(directory)
    assert calls == []
    for _ in range(3):
        opened.latents(0)
        opened.item("latents", "image0")
    assert calls == [["mean", "std"]]
    opened.mask(0)
    opened.text(0)
    opened.text(1, 1)  # the same caption
    assert calls == [["mean", "std"], ["mask"], ["embeds"]]
    CacheStore.open(directory).latents(0)
    assert len(calls) == 4


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    ("kind", "item", "name", "read"),
    [
        ("latents", "image2", "mean", lambda opened: opened.latents(2)),
        ("latents", "image2", "std", lambda opened: opened.latents(2)),
        ("latents", "control0", "std", lambda opened: opened.controls(3)),
        ("latents", "mask3", "mask", lambda opened: opened.mask(3)),
        ("texts", "text4", "embeds", lambda opened: opened.text(5, 1)),
        ("texts", "empty", "embeds", lambda opened: opened.empty_text()),
        ("texts", "prompt0", "embeds", lambda opened: opened.prompt("a red fox")),
    ],
)
def test_a_changed_tensor_is_refused_with_its_shard_and_the_others_are_read(
    items: Items, directory: Path, kind: str, item: str, name: str, read: Callable[[CacheStore], Any]
) -> None:
    path = _shard_of(directory, kind, item)
    _flip_tensor(path, f"{item}.{name}")
    opened = CacheStore.open(directory)
    for _ in range(2):
        with pytest.raises(CacheError, match=rf"{path} is damaged: item {item} does not have its checksum.*ftk verify"):
            read(opened)
    assert _is_same(opened.item("latents", "image0"), items["latents"]["image0"])


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("place", [0, 7, 9, 40])
def test_a_changed_header_is_refused_with_its_shard(items: Items, directory: Path, place: int) -> None:
    path = _shard_of(directory, "latents", "image0")
    opened = CacheStore.open(directory)
    _flip(path, place)
    with pytest.raises(CacheError, match=rf"{path} is damaged: its header has the digest \w+, expected \w+.*ftk verify"):
        opened.latents(0)


@pytest.mark.usefixtures("_either_way")
def test_a_shard_that_goes_away_after_opening_is_an_error_that_names_it(items: Items, directory: Path) -> None:
    path = _shard_of(directory, "latents", "image0")
    opened = CacheStore.open(directory)
    path.rename(shards.aside(path))
    with pytest.raises(CacheError, match=f"{path} is damaged: .*No such file"):
        opened.latents(0)


def test_a_shard_cut_short_after_opening_is_an_error_that_names_it(
    items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files in use too, where reads are positioned; a mapped file must not change under its reader."""
    monkeypatch.setattr(storage, "is_network", lambda path: True)
    path = _shard_of(directory, "latents", "image0")
    opened = CacheStore.open(directory)
    _, start = shards.read_header(path)
    opened._shard(int(opened._items["latents"].shards[0]))
    with path.open("r+b") as file:
        file.truncate(start + 100)
    with pytest.raises(CacheError, match=rf"{path} is damaged: it ends within image\d\."):
        opened.latents(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": "nowhere"}, "1 latents"),
        ({"controls": ["nowhere", "control0", "neither"]}, "2 latents"),
        ({"mask": "nowhere"}, "1 latents"),
        ({"texts": ["text0", "nowhere"]}, "1 texts"),
        ({"latents": "a", "mask": "b", "texts": ["image0"]}, "2 latents, 1 texts"),
    ],
)
def test_an_item_that_a_sample_names_and_is_not_there_is_refused_at_once(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal, changes: dict[str, Any], message: str
) -> None:
    samples = cached_samples(8)
    samples[5] = replace(samples[5], **changes)
    resealed(directory, samples)
    with pytest.raises(CacheError, match=rf"cache: {message} that samples name are not there\. Run `ftk cache"):
        CacheStore.open(directory)


@pytest.mark.parametrize("facts", [{"empty_text": "nowhere"}, {"prompts": {"a": "prompt0", "b": "nowhere"}}])
def test_a_prompt_that_is_not_there_is_refused_at_once(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal, facts: dict[str, Any]
) -> None:
    resealed(directory, cached_samples(8), **facts)
    with pytest.raises(CacheError, match="1 texts that samples name are not there"):
        CacheStore.open(directory)


def test_what_no_sample_names_may_be_there(items: Items, directory: Path, cached_samples: Samples, resealed: Seal) -> None:
    resealed(directory, cached_samples(1))
    opened = CacheStore.open(directory)
    assert len(opened) == 1
    assert _is_same(opened.item("latents", "image7"), items["latents"]["image7"])


def test_an_unfinished_cache_is_refused_with_what_to_do(items: Items, directory: Path, tmp_path: Path) -> None:
    (directory / "cache.json").unlink()
    for place in (directory, tmp_path / "nowhere"):
        with pytest.raises(CacheError, match=rf"{place} holds no finished cache\. Run `ftk cache"):
            CacheStore.open(place)


def test_shards_that_are_not_as_committed_are_listed_at_once(items: Items, directory: Path) -> None:
    missing, short, away, receipt = (_shard_of(directory, kind, item) for kind, item in (
        ("latents", "image0"), ("latents", "image5"), ("texts", "text0"), ("texts", "prompt0")))  # fmt: skip
    receipt = receipt.with_suffix(".parquet")
    size = {path: path.stat().st_size for path in (missing, short, away, receipt)}
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    away.rename(shards.aside(away))
    receipt.unlink()
    with pytest.raises(CacheError) as caught:
        CacheStore.open(directory)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{directory} is damaged:"
    assert sorted(lines) == sorted(
        [
            f"  {missing}: size: expected {size[missing]:,} bytes, found no file",
            f"  {short}: size: expected {size[short]:,} bytes, found {size[short] - 1:,} bytes",
            f"  {away}: size: expected {size[away]:,} bytes, found it was set aside by `ftk verify`",
            f"  {receipt}: size: expected {size[receipt]:,} bytes, found no file",
        ]
    )
    assert "ftk verify" in last
    assert "ftk cache" in last


def test_of_many_damaged_shards_ten_are_listed(written_cache: Write, directory: Path) -> None:
    written_cache(directory, num_samples=8, per_shard=1)
    listed = list((directory / "latents").rglob("*.safetensors"))
    for path in listed:
        path.unlink()
    with pytest.raises(CacheError) as caught:
        CacheStore.open(directory)
    lines = str(caught.value).splitlines()
    assert len(listed) > 12
    assert sum(line.endswith("found no file") for line in lines) == 10
    assert lines[-2] == f"  and {len(listed) - 10} more"


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("open_shards", [1, 2, 4096])
def test_threads_read_what_one_reader_reads(
    written_cache: Write, directory: Path, monkeypatch: pytest.MonkeyPatch, open_shards: int
) -> None:
    items = written_cache(directory, num_samples=24, per_shard=3)
    monkeypatch.setattr(store.LocalShards, "max_open", open_shards)
    opened = CacheStore.open(directory)
    every = [(kind, item) for kind, listed in items.items() for item in listed]

    def read(start: int) -> int:
        turned = every[start:] + every[:start]
        return sum(_is_same(opened.item(kind, item), items[kind][item]) for _ in range(2) for kind, item in turned)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(0, 8 * 7, 7)))
    assert found == [2 * len(every)] * 8
    assert len(opened._open) == min(open_shards, len(opened.shard_table))


def test_a_shard_is_opened_once_for_all_its_items(items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens: Counter[Path] = Counter()
    digest = shards.header_digest
    monkeypatch.setattr(shards, "header_digest", lambda path: opens.update([path]) or digest(path))
    opened = CacheStore.open(directory)
    assert not opens
    for kind, listed in items.items():
        for item in listed:
            opened.item(kind, item)
    assert set(opens.values()) == {1}
    assert len(opens) == len(opened.shard_table)


@pytest.mark.usefixtures("_either_way")
def test_every_type_is_read_as_it_was_stored(
    directory: Path, written_cache: Write, cached_samples: Samples, resealed: Seal
) -> None:
    tensors = {
        "float32": torch.randn(3, 2), "float64": torch.randn(2, dtype=torch.float64), "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(7, 3).bfloat16(), "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor([2**62, -1]), "int32": torch.tensor([[-(2**31)]], dtype=torch.int32),
        "int16": torch.tensor([-5], dtype=torch.int16), "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.arange(3, dtype=torch.uint8), "zero": torch.zeros(0, 16, dtype=torch.bfloat16),
        "zeros": torch.zeros(4, 0, dtype=torch.int64), "nan": torch.tensor([float("nan"), float("-inf")]),
    }  # fmt: skip
    written_cache(directory)
    shards.write(directory / "texts" / "bbbb", [("rich", tensors), ("void", {"embeds": torch.zeros(0, 16)})])
    resealed(directory, cached_samples(8))
    opened = CacheStore.open(directory)
    assert _is_same(opened.item("texts", "rich"), tensors)
    assert _is_same(opened.item("texts", "void"), {"embeds": torch.zeros(0, 16)})
    assert opened.length("texts", "void") == 0


def test_reads_are_positioned_where_files_can_vanish(items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(storage, "is_network", lambda path: asked.append(path) or path.parent.name == "texts")
    opened = CacheStore.open(directory)
    for kind, listed in items.items():
        for item in listed:
            opened.item(kind, item)
    assert {type(shard).__name__ for shard in opened._open.values()} == {"_Mapped", "_Positioned"}
    assert sorted(asked) == [directory / "latents" / "aaaa", directory / "texts" / "bbbb"]


@pytest.mark.usefixtures("_either_way")
def test_a_copy_elsewhere_is_the_same_cache(items: Items, directory: Path, tmp_path: Path, cached_samples: Samples) -> None:
    elsewhere = tmp_path / "on another disk" / "größe #1"
    elsewhere.parent.mkdir()
    shutil.move(directory, elsewhere)
    opened = CacheStore.open(elsewhere)
    assert [opened.sample(number) for number in range(8)] == cached_samples(8)
    for kind, listed in items.items():
        assert all(_is_same(opened.item(kind, item), tensors) for item, tensors in listed.items())


def test_a_cache_can_be_opened_by_a_relative_path_and_by_home(
    items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("HOME", str(directory.parent))
    for place in ("cache", "~/cache", str(directory)):
        assert len(CacheStore.open(place)) == 8


def test_reading_goes_on_after_close(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    mean, _ = opened.latents(0)
    before = mean.clone()
    opened.close()
    assert torch.equal(mean, before)
    assert torch.equal(opened.latents(0)[0], before)


def test_only_the_shards_that_samples_need_are_asked_for_ahead(items: Items, directory: Path) -> None:
    opened = CacheStore.open(directory)
    asked: list[list[int]] = []

    class Recorded:
        def ahead(self, wanted: list[int]) -> None:
            asked.append(wanted)

        def path(self, shard: int) -> Path:
            raise AssertionError(shard)

        def close(self) -> None:
            pass

    opened._files = Recorded()
    index = {
        kind: dict(zip(opened.index(kind)["id"].to_pylist(), opened.index(kind)["shard"].to_pylist(), strict=True))
        for kind in items
    }
    opened.ahead([3, 1])
    (wanted,) = asked
    expected = {index["latents"][name] for name in ("image3", "mask3", "control0", "control3", "image1")}
    expected |= {index["texts"][name] for name in ("text3", "text2", "text1", "text0")}
    assert len(wanted) == len(set(wanted))
    assert set(wanted) == expected
    assert wanted[0] == index["latents"]["image3"]
