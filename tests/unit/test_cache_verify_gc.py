"""`ftk verify` names and sets aside what is not as committed; `ftk gc` removes what no sample names, and nothing else."""

import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from ftk import storage
from ftk.cache import gc, shards, verify, view
from ftk.cache.gc import GcReport
from ftk.cache.store import CacheStore
from ftk.contracts import CachedSample, CacheManifest
from ftk.errors import CacheError, EnvironmentFault

Items = dict[str, dict[str, dict[str, torch.Tensor]]]
Samples = Callable[[int], list[CachedSample]]
Seal = Callable[..., CacheManifest]
Write = Callable[..., Items]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def items(written_cache: Write, directory: Path) -> Items:
    """What the cache in `directory` holds: 19 latents in five shards, 10 texts in three."""
    return written_cache(directory)


class Killed(BaseException):
    """What no handler catches."""


def _shard_of(directory: Path, item: str, kind: str = "latents") -> Path:
    for path in (directory / kind).rglob("*.parquet"):
        if item in shards.read_receipt(path).items["id"].to_pylist():
            return path.with_suffix(".safetensors")
    raise AssertionError(item)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _files(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and bytes of every file but locks."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def _read(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every item that the view lists, as plain values."""
    opened = CacheStore.open(directory)
    return {
        (kind, item): {name: (tensor.dtype, tensor.tolist()) for name, tensor in opened.item(kind, item).items()}
        for kind in shards.KINDS
        for item in opened.index(kind)["id"].to_pylist()
    }


def _latents_on_disk(directory: Path) -> list[str]:
    receipts = [shards.read_receipt(path) for path in (directory / "latents").rglob("*.parquet")]
    return [item for receipt in receipts for item in receipt.items["id"].to_pylist()]


def _named(samples: list[CachedSample]) -> set[tuple[str, str]]:
    pictures = {("latents", name) for one in samples for name in (one.latents, *one.controls, one.mask) if name}
    return pictures | {("texts", text) for one in samples for text in (*one.texts, "empty", "prompt0")}


def _found(report: GcReport) -> dict[str, int]:
    """How much there is of what."""
    names = {what: name for name, what in gc._WHAT.items()}
    return {names[one.what]: one.count for one in report.garbage}


def _assert_whole(directory: Path) -> None:
    report = verify.run(directory, deep=True)
    assert (report.damages, report.set_aside, report.num_unsealed) == ([], [], 0)


# ftk verify


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_cache_is_counted_and_left_as_it_is(items: Items, directory: Path, deep: bool) -> None:
    before = _files(directory)
    report = verify.run(directory, deep)
    sizes = [path.stat().st_size for path in directory.rglob("*.safetensors")]
    assert (report.damages, report.set_aside, report.deep, report.directory) == ([], [], deep, str(directory))
    assert (report.num_shards, report.num_bytes, report.num_unsealed) == (len(sizes), sum(sizes), 0)
    assert report.num_items == sum(map(len, items.values()))
    assert _files(directory) == before


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda path: _flip(path, 12), "other header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "other size"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "other size"),
        (lambda path: path.write_bytes(b""), "other size"),
    ],
)
def test_a_damaged_shard_is_named_and_set_aside(
    items: Items, directory: Path, harm: Callable[[Path], Any], problem: str
) -> None:
    path = _shard_of(directory, "image0")
    harm(path)
    damaged, others = path.read_bytes(), _files(directory)
    others.pop(str(path.relative_to(directory)))
    report = verify.run(directory)
    (damage,) = report.damages
    assert (damage.path, damage.problem, damage.shard) == (str(path), problem, f"latents/aaaa/{path.stem}")
    assert report.set_aside == [f"{path}.damaged"]
    assert not path.exists()
    assert Path(f"{path}.damaged").read_bytes() == damaged
    assert _files(directory).items() >= others.items()
    assert report.num_shards == len(list(directory.rglob("*.parquet"))) - 4 - 1
    again = verify.run(directory)
    assert [(one.path, one.found) for one in again.damages] == [(str(path), "it was set aside by `ftk verify`")]
    assert again.set_aside == []
    with pytest.raises(CacheError, match="set aside by `ftk verify`"):
        CacheStore.open(directory)


def test_a_flipped_bit_of_a_tensor_is_found_by_a_deep_look_alone(items: Items, directory: Path) -> None:
    paths = sorted([_shard_of(directory, "image0"), _shard_of(directory, "empty", "texts")])
    for path in paths:
        _flip(path, path.stat().st_size - 1)
    assert verify.run(directory).damages == []
    report = verify.run(directory, deep=True)
    assert [(one.path, one.problem) for one in report.damages] == [(str(path), "other contents") for path in paths]
    assert sorted(report.set_aside) == [f"{path}.damaged" for path in paths]


def test_a_missing_shard_is_named(items: Items, directory: Path) -> None:
    path = _shard_of(directory, "image0")
    path.unlink()
    report = verify.run(directory)
    assert [(one.path, one.problem, one.found) for one in report.damages] == [(str(path), "missing", "no file")]
    assert report.set_aside == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: _flip(path, 60),
        lambda path: storage.commit_table(path, storage.read_table(path).slice(1)),
    ],
)
def test_a_damaged_receipt_is_named_and_set_aside(items: Items, directory: Path, harm: Callable[[Path], Any]) -> None:
    path = _shard_of(directory, "image0").with_suffix(".parquet")
    harm(path)
    report = verify.run(directory)
    assert [(one.path, one.shard) for one in report.damages] == [(str(path), f"latents/aaaa/{path.stem}")]
    assert report.set_aside == [f"{path}.damaged"]
    assert path.with_suffix(".safetensors").exists()


def test_a_missing_receipt_is_named(items: Items, directory: Path) -> None:
    path = _shard_of(directory, "image0").with_suffix(".parquet")
    path.unlink()
    report = verify.run(directory)
    assert [(one.path, one.problem, one.expected) for one in report.damages] == [(str(path), "missing", "a receipt")]


@pytest.mark.parametrize("name", ["samples", "latents", "texts", "shards"])
def test_a_damaged_table_is_named_and_no_shard_is_touched(items: Items, directory: Path, name: str) -> None:
    (path,) = (directory / "view").glob(f"{name}-*")
    _flip(path, 50)
    before = _files(directory)
    report = verify.run(directory)
    assert [(one.path, one.shard) for one in report.damages] == [(str(path), "")]
    assert report.set_aside == []
    assert _files(directory) == before


def test_a_damaged_manifest_is_named_and_shards_are_looked_at_all_the_same(items: Items, directory: Path) -> None:
    _flip(directory / "cache.json", 30)
    path = _shard_of(directory, "image0")
    path.unlink()
    report = verify.run(directory)
    assert [one.path for one in report.damages] == [str(directory / "cache.json"), str(path)]
    assert "cache.json is damaged" in report.damages[0].found


def test_a_sample_whose_item_is_not_there_is_told(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    resealed(directory, [replace(cached_samples(1)[0], latents="nowhere")])
    (damage,) = verify.run(directory).damages
    assert (damage.path, damage.problem) == (str(directory), "incomplete")
    assert "1 latents that samples name are not there" in damage.found


def test_every_damage_is_told_at_once(items: Items, directory: Path) -> None:
    latents, texts = _shard_of(directory, "image0"), _shard_of(directory, "text0", "texts").with_suffix(".parquet")
    (table,) = (directory / "view").glob("samples-*")
    _flip(latents, 12)
    texts.write_bytes(b"")
    table.unlink()
    report = verify.run(directory)
    assert {one.path for one in report.damages} == {str(latents), str(texts), str(table)}
    assert set(report.set_aside) == {f"{latents}.damaged", f"{texts}.damaged"}


def test_shards_that_no_view_lists_yet_are_counted(items: Items, directory: Path) -> None:
    shards.write(directory / "texts" / "bbbb", [("new", {"embeds": torch.ones(2, 16)})])
    report = verify.run(directory)
    assert (report.damages, report.num_unsealed, report.num_shards) == ([], 1, len(list(directory.rglob("*.safetensors"))))
    (directory / "cache.json").unlink()
    unsealed = verify.run(directory, deep=True)
    assert (unsealed.damages, unsealed.num_unsealed) == ([], report.num_shards)


def test_a_shard_of_an_earlier_encoder_is_looked_at_too(items: Items, directory: Path) -> None:
    shards.write(directory / "texts" / "older", [("old", {"embeds": torch.ones(2, 16)})])
    path = _shard_of(directory, "old", "texts")
    path.write_bytes(b"")
    report = verify.run(directory)
    assert [one.path for one in report.damages] == [str(path)]
    assert report.set_aside == [f"{path}.damaged"]


def test_a_shard_that_is_being_written_is_no_damage(items: Items, directory: Path) -> None:
    folder = directory / "texts" / "bbbb"
    (folder / "0123.safetensors").write_bytes(b"its receipt comes later")
    (folder / f"{storage.TEMPORARY_PREFIX}0124.safetensors-1-ab").write_bytes(b"half")
    assert verify.run(directory, deep=True).damages == []


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_where_there_is_no_cache_there_is_nothing_to_verify(tmp_path: Path, place: str) -> None:
    with pytest.raises(CacheError, match="holds no cache"):
        verify.run(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_being_written_is_only_looked_at(items: Items, directory: Path) -> None:
    path = _shard_of(directory, "image0")
    _flip(path, 12)
    before = _files(directory)
    with storage.lock(directory, "1-of-2"):
        report = verify.run(directory)
    assert [one.path for one in report.damages] == [str(path)]
    assert report.set_aside == []
    assert _files(directory) == before


def test_a_directory_that_cannot_be_written_is_only_looked_at(
    items: Items, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = _shard_of(directory, "image0"), _shard_of(directory, "text0", "texts")
    _flip(path, 12)
    _flip(other, 12)

    def refused(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        report = verify.run(directory)
    assert ({one.path for one in report.damages}, report.set_aside) == ({str(path), str(other)}, [])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "lock", refused)
        report = verify.run(directory)
    assert (len(report.damages), report.set_aside) == (2, [])
    assert path.exists()


def test_what_was_set_aside_can_be_encoded_again(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    path = _shard_of(directory, "image0")
    before, receipt = _read(directory), shards.read_receipt(path.with_suffix(".parquet"))
    _flip(path, path.stat().st_size - 1)
    verify.run(directory, deep=True)
    shards.drop(path.parent, path.stem)
    again = shards.write(path.parent, [(item, items["latents"][item]) for item in receipt.items["id"].to_pylist()])
    assert again == receipt
    resealed(directory, cached_samples(8))
    _assert_whole(directory)
    assert _read(directory) == before


# ftk gc


def test_in_a_cache_that_is_all_named_there_is_nothing_to_remove(items: Items, directory: Path) -> None:
    gc.run(directory, remove=True)  # a last, small shard is packed
    before = _files(directory)
    report = gc.run(directory, remove=True)
    assert (report.garbage, report.num_shards_rewritten, report.num_bytes) == ([], 0, 0)
    assert _files(directory) == before


def test_without_remove_nothing_is_touched(items: Items, directory: Path, cached_samples: Samples, resealed: Seal) -> None:
    resealed(directory, cached_samples(4))
    (directory / "view" / "samples-0123.parquet").write_bytes(b"old")
    before = _files(directory)
    report = gc.run(directory, remove=False)
    assert not report.removed
    assert _found(report)["items"] > 0
    assert _files(directory) == before
    removed = gc.run(directory, remove=True)
    assert removed.removed
    assert removed.garbage == report.garbage


def test_items_of_edited_captions_and_of_removed_samples_are_removed(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    samples = cached_samples(8)[1:6]
    samples[2] = replace(samples[2], texts=["text7"], text_lengths=[8])
    resealed(directory, samples)
    before, named = _read(directory), _named(samples)
    dead = {name: items[name[0]][name[1]] for name in before.keys() - named}
    report = gc.run(directory, remove=True)
    assert _read(directory) == {name: before[name] for name in named}
    assert ("texts", "text7") in named
    assert ("texts", "text6") in dead
    assert _found(report)["items"] == len(dead)
    (found,) = (one for one in report.garbage if one.what == gc._WHAT["items"])
    assert found.num_bytes == sum(tensor.nbytes for tensors in dead.values() for tensor in tensors.values())
    assert len(found.examples) == 3
    assert {name for _, name in dead} >= set(found.examples)
    opened = CacheStore.open(directory)
    assert [opened.sample(number) for number in range(len(opened))] == samples
    _assert_whole(directory)
    assert gc.run(directory, remove=True).garbage == []


def test_the_empty_caption_and_the_prompts_are_kept_though_no_sample_names_them(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    resealed(directory, cached_samples(1), prompts={"a red fox": "prompt0", "another": "text5"})
    gc.run(directory, remove=True)
    opened = CacheStore.open(directory)
    assert sorted(opened.index("texts")["id"].to_pylist()) == ["empty", "prompt0", "text0", "text5"]
    assert torch.equal(opened.prompt("another")["embeds"], items["texts"]["text5"]["embeds"])
    assert torch.equal(opened.empty_text()["embeds"], items["texts"]["empty"]["embeds"])
    assert opened.manifest.prompts == {"a red fox": "prompt0", "another": "text5"}


def test_shards_without_garbage_are_not_touched(
    written_cache: Write, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    items = written_cache(directory, num_samples=12, per_shard=2)
    samples = [one for one in cached_samples(12) if one.key != "k4"]
    before = {path: _files(path.parent)[path.name] for path in directory.rglob("*.safetensors")}
    assert "image4" in items["latents"]
    touched = {_shard_of(directory, "image4"), _shard_of(directory, "prompt0", "texts")}
    small = _small(directory)
    resealed(directory, samples)
    gc.run(directory, remove=True)
    after = {path: _files(path.parent)[path.name] for path in directory.rglob("*.safetensors")}
    kept = before.keys() - touched - small
    assert len(kept) >= 5
    assert {path: after.get(path) for path in kept} == {path: before[path] for path in kept}
    assert "image4" not in _ids(directory)


def _small(directory: Path) -> set[Path]:
    """Shards whose tensors take less than half of what those of the largest of their kind take."""
    found: set[Path] = set()
    for folder in (path for kind in shards.KINDS for path in (directory / kind).iterdir()):
        sizes = {one.name: sum(one.items["bytes"].to_pylist()) for one in shards.receipts(folder, {})[0]}
        found |= {folder / f"{name}.safetensors" for name, size in sizes.items() if size < 0.5 * max(sizes.values())}
    return found


def _ids(directory: Path) -> list[str]:
    ids: list[str] = CacheStore.open(directory).index("latents")["id"].to_pylist()
    return ids


def test_garbage_of_one_kind_leaves_the_files_of_the_other(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    gc.run(directory, remove=True)
    samples = [replace(one, mask="") for one in cached_samples(8)]
    resealed(directory, samples)
    texts = _files(directory / "texts")
    report = gc.run(directory, remove=True)
    assert _found(report) == {"items": 3}
    assert _files(directory / "texts") == texts
    assert not [name for name in _ids(directory) if name.startswith("mask")]
    assert {name for _, name in _named(samples)} >= set(_ids(directory))


def test_folders_of_encoders_that_are_not_used_any_more_are_removed(items: Items, directory: Path) -> None:
    gc.run(directory, remove=True)
    shards.write(directory / "latents" / "older", [("old", {"mean": torch.ones(2)})])
    shards.write(directory / "texts" / "oldest", [("old", {"embeds": torch.ones(2, 2)})])
    size = sum(len(data) for folder in ("latents/older", "texts/oldest") for *_, data in _files(directory / folder).values())
    used = {name: facts for name, facts in _files(directory).items() if "aaaa" in name or "bbbb" in name}
    report = gc.run(directory, remove=True)
    assert _found(report) == {"encoders": 2}
    assert report.num_bytes == size
    assert report.garbage[0].examples == ["latents/older", "texts/oldest"]
    assert sorted(path.name for kind in shards.KINDS for path in (directory / kind).iterdir()) == ["aaaa", "bbbb"]
    assert _files(directory).items() >= used.items()
    _assert_whole(directory)


def test_small_shards_are_packed_together_in_the_order_of_the_samples(
    written_cache: Write, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    written_cache(directory, num_samples=24, per_shard=6)
    folder = directory / "latents" / "aaaa"
    few = [(f"extra{n}", {"mean": torch.full((4, 6, 4), float(n)).half(), "std": torch.ones(4, 6, 4).half()}) for n in range(5)]
    for item in few:
        shards.write(folder, [item])
    added = [replace(cached_samples(1)[0], key=f"x{n}", latents=f"extra{n}", mask="") for n in (3, 0, 4, 1, 2)]
    resealed(directory, [*cached_samples(24), *added])
    before, num_before = _read(directory), len(list(directory.rglob("*.safetensors")))
    report = gc.run(directory, remove=True)
    assert _found(report)["small"] >= 5
    assert _read(directory) == before
    packed = shards.read_receipt(_shard_of(directory, "extra0").with_suffix(".parquet")).items["id"].to_pylist()
    assert [item for item in packed if item.startswith("extra")] == ["extra3", "extra0", "extra4", "extra1", "extra2"]
    assert len(list(directory.rglob("*.safetensors"))) <= num_before - 4
    _assert_whole(directory)
    assert _found(gc.run(directory, remove=True)) == {}


def _cache_of_sizes(directory: Path, groups: list[list[int]], keep: Callable[[int], bool]) -> None:
    """Shards of items with so many values each, of which samples name those that are to be kept."""
    number, receipts, kept = 0, [], []
    for sizes in groups:
        group = []
        for size in sizes:
            group.append((f"i{number}", {"mean": torch.full((size,), float(number))}))
            kept += [number] if keep(number) else []
            number += 1
        receipts.append(shards.write(directory / "latents" / "aaaa", group))
    texts = [shards.write(directory / "texts" / "bbbb", [("empty", {"embeds": torch.ones(1, 4)})])]
    tables = view.merged({("latents", "aaaa"): receipts, ("texts", "bbbb"): texts})
    sides = {name: 8 for name in CachedSample.__dataclass_fields__ if "width" in name or "height" in name or "crop" in name}
    rows = [
        CachedSample(
            key=f"k{n}", latents=f"i{n}", controls=[], mask="", texts=["empty"], text_lengths=[1], flipped=False, repeats=1,
            role="instance", **sides,
        )
        for n in kept
    ]  # fmt: skip
    tables["samples"] = pa.Table.from_pylist([asdict(row) for row in rows], schema=view.SAMPLE_SCHEMA)
    facts = {
        "family": "x", "latents_fingerprint": "aaaa", "texts_fingerprint": "bbbb", "encoders": {}, "normalisation": {},
        "prepared_fingerprint": "", "prepared_recipe": {}, "empty_text": "empty", "prompts": {},
    }  # fmt: skip
    view.commit(directory, tables, facts)


@pytest.mark.parametrize(
    ("groups", "dead"),
    [
        ([[4000] * 10, [4000] * 10], set()),
        ([[4000] * 10, [4000] * 10, [4000] * 3], set()),
        ([[4000] * 10, [4000] * 10, [4000] * 3], {2, 3}),
        ([[4000] * 10, [4000] * 10, [4000] * 3], {0, 1, 2, 3, 4, 5, 6}),
        ([[4000] * 10, [4000] * 3, [4000] * 2, [4000] * 4, [4000] * 10], {12}),
        ([[4000] * 10, [40000], [39000], [4000]], {5}),
        ([[12000, 28000], [36000, 4000], [12000, 28000], [36000, 4000]], {1, 3, 5, 7}),
    ],
)
def test_a_second_gc_finds_nothing(directory: Path, groups: list[list[int]], dead: set[int]) -> None:
    _cache_of_sizes(directory, groups, lambda number: number not in dead)
    before = _read(directory)
    report = gc.run(directory, remove=True)
    assert _found(report).get("items", 0) == len(dead)
    assert _read(directory) == {
        name: value for name, value in before.items() if name[1] not in {f"i{number}" for number in dead}
    }
    _assert_whole(directory)
    again = gc.run(directory, remove=False)
    assert (again.garbage, again.num_shards_rewritten) == ([], 0)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_removed_every_named_item_stays_as_it_was(
    written_cache: Write, directory: Path, cached_samples: Samples, resealed: Seal, seed: int
) -> None:
    written_cache(directory, num_samples=24, per_shard=3)
    draw = random.Random(seed)
    for _ in range(2):
        opened = CacheStore.open(directory)
        samples = [opened.sample(number) for number in range(len(opened)) if draw.random() < 0.7]
        resealed(directory, samples)
        before = _read(directory)
        gc.run(directory, remove=True)
        assert _read(directory) == {name: before[name] for name in _named(samples)}
        _assert_whole(directory)


def test_leftovers_are_removed(items: Items, directory: Path) -> None:
    gc.run(directory, remove=True)
    before = _files(directory)
    left = {
        "view/samples-0123456789abcdef.parquet": 10, "view/.tmp-samples.parquet-1-ab": 11, ".tmp-cache.json-1-ab": 12,
        "latents/aaaa/0123.safetensors": 13, "latents/aaaa/.tmp-4567.parquet-1-ab": 14,
        "texts/bbbb/89ab.safetensors.damaged": 15, "texts/bbbb/cdef.parquet.damaged": 16,
    }  # fmt: skip
    for name, size in left.items():
        (directory / name).write_bytes(b"x" * size)
    report = gc.run(directory, remove=True)
    assert _found(report) == {"files": len(left)}
    assert report.num_bytes == sum(left.values())
    assert _files(directory).keys() == before.keys()
    _assert_whole(directory)


def test_a_damaged_receipt_beside_its_shard_is_no_leftover(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    """The shard that was encoded again has the name of the one set aside."""
    path = _shard_of(directory, "image0")
    shutil.copy(path, shards.aside(path))
    report = gc.run(directory, remove=True)
    assert _found(report)["files"] == 1
    assert not shards.aside(path).exists()
    assert len(CacheStore.open(directory)) == 8


def test_whole_shards_that_no_view_lists_yet_leave_the_cache_whole(items: Items, directory: Path) -> None:
    """What `ftk cache` had encoded when it was killed."""
    shards.write(directory / "texts" / "bbbb", [("new", {"embeds": torch.ones(2, 16)})])
    before = _read(directory)
    gc.run(directory, remove=True)
    _assert_whole(directory)
    assert {name: value for name, value in _read(directory).items() if name != ("texts", "new")} == before
    gc.run(directory, remove=True)
    assert gc.run(directory, remove=True).garbage == []


def test_an_item_of_two_shards_is_kept_once_and_counted(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    gc.run(directory, remove=True)
    again = [(item, items["latents"][item]) for item in ("image0", "mask0", "image1", "image2", "control0", "image4")]
    shards.write(directory / "latents" / "aaaa", again)
    resealed(directory, cached_samples(8))
    before = _read(directory)
    report = gc.run(directory, remove=True)
    assert _found(report)["twice"] == len(again)
    assert _read(directory) == before
    assert sorted(_latents_on_disk(directory)) == sorted(items["latents"])
    assert gc.run(directory, remove=True).garbage == []


@pytest.mark.parametrize("harm", ["shard", "receipt", "table", "manifest", "unfinished", "incomplete"])
def test_a_cache_that_is_not_whole_is_refused_and_left_alone(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal, harm: str
) -> None:
    path = _shard_of(directory, "image0")
    if harm == "shard":
        path.unlink()
    elif harm == "receipt":
        path.with_suffix(".parquet").unlink()
    elif harm == "table":
        _flip(next((directory / "view").glob("samples-*")), 50)
    elif harm == "manifest":
        _flip(directory / "cache.json", 30)
    elif harm == "unfinished":
        (directory / "cache.json").unlink()
    else:
        resealed(directory, [replace(cached_samples(1)[0], mask="nowhere")])
    before = _files(directory)
    with pytest.raises(CacheError, match=r"damaged|no finished cache|are not there"):
        gc.run(directory, remove=True)
    assert _files(directory) == before


def test_a_damaged_item_is_not_copied_into_a_new_shard(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal
) -> None:
    resealed(directory, [one for one in cached_samples(8) if one.key != "k1"])
    path = _shard_of(directory, "image0")
    assert path == _shard_of(directory, "image1")
    header, start = shards.read_header(path)
    _flip(path, start + header["image0.mean"]["data_offsets"][0])
    before = {path: path.read_bytes() for path in directory.rglob("*.safetensors")}
    with pytest.raises(CacheError, match="item image0 does not have its checksum"):
        gc.run(directory, remove=True)
    assert {path: path.read_bytes() for path in before} == before
    assert len(CacheStore.open(directory)) == 7


def test_a_cache_that_is_being_written_is_not_swept(items: Items, directory: Path) -> None:
    with storage.lock(directory, "1-of-2"), pytest.raises(EnvironmentFault, match="is being written"):
        gc.run(directory, remove=False)


@pytest.mark.parametrize("moment", ["first shard", "view", "tables", "shards"])
def test_a_kill_loses_nothing_and_the_next_run_goes_on(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    samples = cached_samples(8)[2:7]
    resealed(directory, samples)
    shards.write(directory / "texts" / "older", [("old", {"embeds": torch.ones(2, 2)})])
    before, write, unlink = _read(directory), shards.write, Path.unlink
    written = iter([True])

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def killed_after_one(folder: Path, group: Any) -> Any:
        return write(folder, group) if next(written, False) else killed()

    def killed_at_a_shard(path: Path, missing_ok: bool = False) -> None:
        killed() if path.suffix == ".safetensors" else unlink(path, missing_ok)

    place, name, act = {
        "first shard": (shards, "write", killed_after_one), "view": (view, "commit", killed),
        "tables": (Path, "unlink", killed), "shards": (Path, "unlink", killed_at_a_shard),
    }[moment]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(place, name, act)
        with pytest.raises(Killed):
            gc.run(directory, remove=True)
    assert _named(samples) <= _read(directory).keys() <= before.keys()
    gc.run(directory, remove=True)
    gc.run(directory, remove=True)
    assert _read(directory) == {name: before[name] for name in _named(samples)}
    _assert_whole(directory)
    assert gc.run(directory, remove=True).garbage == []
    assert sorted(_latents_on_disk(directory)) == sorted(name for kind, name in _named(samples) if kind == "latents")


def test_the_manifest_keeps_all_but_its_tables(items: Items, directory: Path, cached_samples: Samples, resealed: Seal) -> None:
    before = resealed(directory, cached_samples(4))
    gc.run(directory, remove=True)
    after = view.read_manifest(directory)
    assert after is not None
    assert replace(after, tables={}, digest="") == replace(before, tables={}, digest="")
    assert after.tables["samples"] == before.tables["samples"]
    assert after.tables["texts"] != before.tables["texts"]
    assert len(list((directory / "view").iterdir())) == 4


def test_tables_that_a_killed_collection_left_unnamed_are_kept_once_they_are_the_view(
    items: Items, directory: Path, cached_samples: Samples, resealed: Seal, monkeypatch: pytest.MonkeyPatch
) -> None:
    resealed(directory, cached_samples(4))
    before = _read(directory)
    plain = storage.commit_json

    def killed(path: Path, value: Any) -> None:
        if path.name == view.MANIFEST:
            raise KeyboardInterrupt
        plain(path, value)

    monkeypatch.setattr(storage, "commit_json", killed)
    with pytest.raises(KeyboardInterrupt):
        gc.run(directory, remove=True)
    monkeypatch.undo()
    assert gc.run(directory, remove=True).garbage
    _assert_whole(directory)
    named = _read(directory)
    assert named
    assert all(before[key].keys() == tensors.keys() for key, tensors in named.items())
