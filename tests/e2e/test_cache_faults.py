"""`ftk cache` and `ftk gc` under faults: killed anywhere, a full disk, flipped bits, files cut short or gone. Same bytes."""

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import killing
import pytest
import yaml
from killing import Server, torn

from ftk import storage
from ftk.cache import shards, verify
from ftk.cache.store import CacheStore
from ftk.demo import draw_pictures
from ftk.errors import CacheError

pytestmark = pytest.mark.faults

NUM_PICTURES, NUM_ADDED = 12, 4
SUFFIXES = (shards.SHARD, shards.RECEIPT)


@dataclass(frozen=True)
class Scene:
    """Two states of a dataset over one model, and the caches of both. Read only; runs take `--set cache.path`."""

    first: Path
    """Run file of a dozen pictures, some with two captions."""
    later: Path
    """Run file of the same with one caption edited and pictures added."""
    fewer: Path
    """Run file of `later` with pictures taken away."""
    sealed: Path
    """The cache of `first`, from one run that nothing interrupted."""
    sealed_later: Path
    """What a run of `later` makes of it."""

    def alone(self, run_file: Path) -> Path:
        return self.sealed if run_file == self.first else self.sealed_later


def files(cache: Path) -> dict[str, str]:
    """Hashes of all that a reader sees, and of anything else that should not be there."""
    found = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    found = [path for path in found if not path.name.endswith(shards.SET_ASIDE)]
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def everything(cache: Path) -> dict[object, object]:
    """All that the store of a cache gives out, tensors as bytes."""
    with contextlib.closing(CacheStore.open(cache)) as store:
        found: dict[object, object] = {"table": store.table.to_pylist(), "manifest": store.manifest.prompts}
        for number in range(len(store)):
            found["latents", number] = [_bytes(tensor) for tensor in store.latents(number)]
            for caption in range(store.num_texts(number)):
                found["text", number, caption] = {name: _bytes(one) for name, one in store.text(number, caption).items()}
        texts = {"": store.empty_text(), **{prompt: store.prompt(prompt) for prompt in store.manifest.prompts}}
        return found | {("prompt", name): {key: _bytes(one) for key, one in text.items()} for name, text in texts.items()}


def _bytes(tensor):
    return str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes()


def to(cache: Path) -> list[str]:
    return ["--set", f"cache.path={cache}"]


def report(result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)


def encoded(cached: dict) -> tuple[int, int]:
    return cached["num_latents_encoded"], cached["num_texts_encoded"]


@pytest.fixture(scope="module")
def server() -> Server:
    """Runs commands in forks."""
    return killing.server()


def write_run_file(place: Path, model: Path) -> Path:
    """A run over the pictures and in the workspace at `place`."""
    tree = {
        "run": "test",
        "workspace": str(place),
        "model": {"family": "qwen-image", "path": str(model)},
        "data": {
            "sources": [{"path": str(place / "pictures"), "caption_lines": True}],
            "resolutions": [64], "workers": 1,
        },
        "cache": {"text_dtype": "float32", "latents_dtype": "float32", "shard_bytes": 20_000},
        "train": {"steps": 2, "precision": "fp32"},
        "sample": {"prompts": ["a red circle"], "num_inference_steps": 2},
    }  # fmt: skip
    run_file = place.with_suffix(".yaml")
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_model, ftk) -> Scene:
    """One for all files that import this."""
    return _scene(tmp_path_factory.getbasetemp() / "scene", tiny_model, ftk)


@functools.cache
def _scene(place: Path, tiny_model: Path, ftk) -> Scene:
    pictures = draw_pictures(place / "first/pictures", NUM_PICTURES)
    for picture in pictures[:3]:
        with picture.with_suffix(".txt").open("a") as caption:
            caption.write(f"picture {picture.stem}, once more\n")
    later = place / "later/pictures"
    shutil.copytree(place / "first/pictures", later)
    (later / pictures[5].with_suffix(".txt").name).write_text("something else altogether")
    for number, picture in enumerate(draw_pictures(place / "more", NUM_PICTURES + NUM_ADDED)[NUM_PICTURES:]):
        for path in (picture, picture.with_suffix(".txt")):
            # Among the others, so that shards are cut at other places.
            path.rename(later / f"{3 * number:03d}-more{path.suffix}")
    shutil.copytree(later, place / "fewer/pictures")
    for picture in pictures[2:9:3]:
        (place / "fewer/pictures" / picture.name).unlink()
        (place / "fewer/pictures" / picture.with_suffix(".txt").name).unlink()
    run_files = [write_run_file(place / name, tiny_model) for name in ("first", "later", "fewer")]
    for run_file in run_files:
        assert ftk("prepare", run_file).code == 0
    made = Scene(*run_files, place / "sealed", place / "sealed-later")
    cached = report(ftk("cache", made.first, *to(made.sealed), "--json"))
    assert encoded(cached) == (12, 17)
    shutil.copytree(made.sealed, made.sealed_later)
    cached = report(ftk("cache", made.later, *to(made.sealed_later), "--json"))
    assert encoded(cached) == (NUM_ADDED, NUM_ADDED + 1)
    for kind in shards.KINDS:
        assert len(list(made.sealed.glob(f"{kind}/*/*{shards.SHARD}"))) >= 6
    return made


@pytest.fixture(scope="module")
def truth(scene) -> dict[Path, dict[object, object]]:
    """What readers of the two caches get."""
    return {scene.first: everything(scene.sealed), scene.later: everything(scene.sealed_later)}


def begin(scene: Scene, run_file: Path, cache: Path) -> None:
    """The state before a run of `run_file`: nothing, or the cache of the first."""
    shutil.rmtree(cache, ignore_errors=True)
    if run_file == scene.later:
        shutil.copytree(scene.sealed, cache)


def assert_readable(scene: Scene, truth, run_file: Path, cache: Path) -> None:
    """Between the states before and after a run there is no third, at no instant."""
    if (cache / "cache.json").exists():
        assert everything(cache) in (truth[scene.first], truth[run_file])
        return
    assert run_file == scene.first
    with pytest.raises(CacheError, match="no finished cache"):
        CacheStore.open(cache)


def kill_and_repeat(server, ftk, scene, truth, run_file, cache, points) -> int:
    """Kill a run at each of these touches of the disk, and complete it."""
    expected = files(scene.alone(run_file))
    for point in points:
        begin(scene, run_file, cache)
        assert server.run("cache", run_file, *to(cache), at=point).code == -signal.SIGKILL, point
        assert_readable(scene, truth, run_file, cache)
        result = ftk("cache", run_file, *to(cache))
        assert result.code == 0, result.err
        assert files(cache) == expected, point
    return len(points)


def touches_of(server, scene, run_file, cache) -> int:
    begin(scene, run_file, cache)
    whole = server.run("cache", run_file, *to(cache))
    assert whole.code == 0, whole.err
    assert files(cache) == files(scene.alone(run_file))
    return whole.touches


@pytest.mark.parametrize("state", ["first", "later"])
def test_killed_at_touches_of_the_disk_a_second_run_completes_with_the_same_bytes(
    server, ftk, scene, truth, tmp_path, state
):  # fmt: skip
    run_file, cache = getattr(scene, state), tmp_path / "cache"
    touches = touches_of(server, scene, run_file, cache)
    assert touches > 100
    kill_and_repeat(server, ftk, scene, truth, run_file, cache, random.Random(state).sample(range(1, touches + 1), 4))


@pytest.mark.campaign
@pytest.mark.parametrize("state", ["first", "later"])
def test_killed_at_every_touch_of_the_disk(server, ftk, scene, truth, tmp_path, state):
    run_file, cache = getattr(scene, state), tmp_path / "cache"
    touches = touches_of(server, scene, run_file, cache)
    kills = kill_and_repeat(server, ftk, scene, truth, run_file, cache, range(1, touches + 1))
    print(f"{state}: {kills} kills, one at every touch of the disk; all completed with equal bytes")


@pytest.mark.campaign
def test_two_hundred_kills_at_random_instants_end_with_the_same_bytes(server, ftk, scene, truth, tmp_path):
    rng, cache = random.Random(2), tmp_path / "cache"
    ways = [(state, options) for state in (scene.first, scene.later) for options in ([], ["--set", "cache.processes=2"])]
    seconds, kills, completed = {}, Counter(), 0
    for state, options in ways:
        begin(scene, state, cache)
        began = time.monotonic()
        assert server.run("cache", state, *to(cache), *options).code == 0
        seconds[state.stem, *options] = time.monotonic() - began
        assert files(cache) == files(scene.alone(state))
    while kills.total() < 200:
        state, _ = rng.choice(ways)
        begin(scene, state, cache)
        for _ in range(rng.randint(1, 4)):
            options = rng.choice(ways)[1]
            running = server.start("cache", state, *to(cache), *options)
            time.sleep(rng.uniform(0.0, 1.0) * seconds[state.stem, *options])
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
            kills[state.stem, *options] += running.wait() == -signal.SIGKILL
            assert_readable(scene, truth, state, cache)
        assert ftk("cache", state, *to(cache)).code == 0
        assert files(cache) == files(scene.alone(state)), f"after {kills.total()} kills"
        completed += 1
    alone = {name: round(of, 1) for name, of in seconds.items()}
    print(f"{kills.total()} kills ({dict(kills)}), {completed} completed runs, all equal; seconds alone: {alone}")


def parts_of(cache: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """Every byte of a cache, by what it belongs to: (file, first byte, byte after the last)."""
    found: dict[str, list[tuple[Path, int, int]]] = {"cache.json": [(cache / "cache.json", 0, 0)]}
    found["view"] = [(path, 0, 0) for path in sorted(cache.glob("view/*"))]
    found["receipts"] = [(path, 0, 0) for path in sorted(cache.glob(f"*/*/*{shards.RECEIPT}"))]
    whole = sorted(cache.glob(f"*/*/*{shards.SHARD}"))
    found["headers"] = [(path, 0, shards.read_header(path)[1]) for path in whole]
    found["payloads"] = [(path, shards.read_header(path)[1], 0) for path in whole]
    return {name: [(path, first, end or path.stat().st_size) for path, first, end in of] for name, of in found.items()}


def put(path: Path, data: bytes) -> None:
    """Make a file hold these bytes, also after `verify` has set it aside."""
    shards.aside(path).unlink(missing_ok=True)
    path.write_bytes(data)


def flip_bits(scene: Scene, truth, cache: Path, count: int, both: bool) -> Counter:
    """Flip single bits, one at a time, as many of each part; returns what became of readers."""
    shutil.copytree(scene.sealed, cache)
    parts, rng, seen = parts_of(cache), random.Random(3), Counter()
    for number in range(count):
        part = list(parts)[number % len(parts)]
        path, first, end = rng.choice(parts[part])
        place, bit = rng.randrange(first, end), rng.randrange(8)
        whole = path.read_bytes()
        flipped = whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
        where = f"{path} byte {place} bit {bit}"
        put(path, flipped)
        try:
            assert everything(cache) == truth[scene.first], f"{where}: a reader gets other tensors and no error"
            seen[part, "read"] += 1
        except CacheError:
            seen[part, "refused"] += 1
        for deep in [True] if part == "payloads" else [False, True] if both else [False]:
            put(path, flipped)
            assert [damage.path for damage in verify.run(cache, deep).damages] == [str(path)], f"{where}: not found"
        put(path, whole)
    assert verify.run(cache, deep=True).damages == []
    assert files(cache) == files(scene.sealed)
    return seen


def test_every_flipped_bit_is_found_and_no_reader_gets_other_tensors(scene, truth, tmp_path):
    seen = flip_bits(scene, truth, tmp_path / "cache", 120, both=False)
    assert {(part, fate) for part, fate in seen if part != "receipts"} == {
        (part, "refused") for part in ("cache.json", "view", "headers", "payloads")
    }
    # No reader opens a receipt: it is for writers.
    assert seen["receipts", "refused"] == 0


@pytest.mark.campaign
def test_a_thousand_flipped_bits_are_all_found(scene, truth, tmp_path):
    seen = flip_bits(scene, truth, tmp_path / "cache", 1000, both=True)
    print(f"{seen.total()} flipped bits, all found; readers: {dict(seen)}")


def flips_of_receipt(path: Path, count: int) -> list[bytes]:
    """What a receipt becomes by single flipped bits; first come those that leave it readable, saying something else."""
    whole, true, rng = path.read_bytes(), shards.read_receipt(path), random.Random(5)
    unnoticed, noticed = [], []
    for _ in range(100):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        try:
            read = shards.read_receipt(path)
            says_the_same = read.items.equals(true.items) and (read.bytes, read.blake3) == (true.bytes, true.blake3)
            (noticed if says_the_same else unnoticed).append(path.read_bytes())
        except ValueError:
            noticed.append(path.read_bytes())
    path.write_bytes(whole)
    return [*unnoticed, *noticed][:count]


def test_a_receipt_damaged_before_the_cache_is_sealed_is_not_sealed(ftk, scene, truth, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    path = sorted(cache.glob(f"latents/*/*{shards.RECEIPT}"))[2]
    for flipped in flips_of_receipt(path, 4):
        # As a run leaves it that is killed before its end.
        (cache / "cache.json").unlink()
        path.write_bytes(flipped)
        assert ftk("cache", scene.first, *to(cache)).code == 0
        assert everything(cache) == truth[scene.first]
        # A bit of Parquet's that means nothing may stay as it is, and is sealed as it is.
        other = {name for name, _ in files(cache).items() ^ files(scene.sealed).items()}
        assert all(
            name == "cache.json" or name.startswith("view/shards") or name == f"latents/{path.parent.name}/{path.name}"
            for name in other
        )
        assert verify.run(cache, deep=True).damages == []


def cuts(path: Path) -> list[int]:
    """Lengths to cut a file to: at the ends of a shard's header and tensors and beside them; elsewhere a spread."""
    size = path.stat().st_size
    lengths = {0, 1, 4, 8, size // 4, size // 2, size - 8, size - 4, size - 1}
    if path.suffix == shards.SHARD:
        header, start = shards.read_header(path)
        ends = [start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        lengths = {end + step for end in (0, 8, start, *ends) for step in (-1, 0, 1)}
    return sorted(length for length in lengths if 0 <= length < size)


def one_of_each(cache: Path) -> list[Path]:
    """A shard and a receipt of each kind, from the middle, the tables of the view, and the manifest."""
    found = [sorted(cache.glob(f"{kind}/*/*{suffix}"))[3] for kind in shards.KINDS for suffix in SUFFIXES]
    return [*found, *sorted(cache.glob("view/*")), cache / "cache.json"]


def assert_refused(ftk, scene, cache, path, expected: str, found: str) -> None:
    """Training names the damaged file; of a shard and its receipt both sizes."""
    result = ftk("train", scene.first, *to(cache))
    assert result.code == 2, path
    if path.name == "cache.json" and found == "no file":
        assert f"{cache} holds no finished cache" in result.err
        return
    assert str(path) in result.err
    if path.parent.parent.name in shards.KINDS:
        assert expected in result.err
        assert found in result.err


def assert_mended(ftk, scene, cache, path) -> None:
    """`ftk cache` makes the damaged shard again, nothing else."""
    cached = report(ftk("cache", scene.first, *to(cache), "--json"))
    counts = dict.fromkeys(shards.KINDS, 0)
    if path.parent.parent.name in counts:
        receipt = scene.sealed / path.relative_to(cache).with_suffix(shards.RECEIPT)
        counts[path.parent.parent.name] = len(shards.read_receipt(receipt).items)
    assert encoded(cached) == (counts["latents"], counts["texts"]), path
    assert files(cache) == files(scene.sealed), path


def named(cache: Path) -> list[str]:
    return [damage.path for damage in verify.run(cache).damages]


def cut_short(ftk, scene, cache, path, mended: bool) -> int:
    """Cut a file to each of its lengths; with `mended` run `ftk cache` after each, else after the last alone."""
    whole, lengths = path.read_bytes(), cuts(path)
    for length in lengths:
        put(path, whole[:length])
        assert_refused(ftk, scene, cache, path, f"{len(whole):,} bytes", f"{length:,} bytes")
        if mended:
            assert_mended(ftk, scene, cache, path)
            put(path, whole[:length])
        assert named(cache) == [str(path)], (path, length)
        if mended or length == lengths[-1]:
            assert_mended(ftk, scene, cache, path)
        put(path, whole)
    return len(lengths)


def test_a_file_cut_short_is_named_refused_and_its_shard_alone_made_again(ftk, scene, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    for path in one_of_each(cache):
        assert cut_short(ftk, scene, cache, path, mended=False) > 5


@pytest.mark.campaign
def test_every_file_cut_short_everywhere_is_named_refused_and_made_again(ftk, scene, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    all_files = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != ".lock")
    num_cuts = sum(cut_short(ftk, scene, cache, path, mended=True) for path in all_files)
    print(f"{num_cuts} cuts of {len(all_files)} files: all named, refused and mended, with and without `ftk verify` before")


def test_a_file_that_is_gone_is_named_refused_and_its_shard_alone_made_again(ftk, scene, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    for path in one_of_each(cache):
        size = path.stat().st_size
        path.unlink()
        assert_refused(ftk, scene, cache, path, f"{size:,} bytes", "no file")
        # Without its manifest a cache is one that is not finished yet.
        assert named(cache) == ([] if path.name == "cache.json" else [str(path)])
        assert_mended(ftk, scene, cache, path)


class FullDisk:
    """Raises at the n-th write, and at each after it."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise OSError(28, "No space left on device", "a shard")


def stored(cache: Path) -> tuple[int, int]:
    """How many latents and texts have a receipt."""
    folders = {kind: cache.glob(f"{kind}/*") for kind in shards.KINDS}
    found = {kind: [one for folder in folders[kind] for one in shards.receipts(folder, {})[0]] for kind in folders}
    return tuple(sum(len(receipt.items) for receipt in found[kind]) for kind in ("latents", "texts"))


def resume_after(ftk, scene, truth, run_file, cache, result) -> None:
    """After a disk that was full: it was said, nothing is half done, and what was done is not done again."""
    assert result.code == 4
    assert "disk is full" in result.err
    assert not list(cache.rglob(".tmp-*"))
    assert_readable(scene, truth, run_file, cache)
    had, needed = stored(cache), stored(scene.alone(run_file))
    yield
    cached = report(ftk("cache", run_file, *to(cache), "--json"))
    assert encoded(cached) == (needed[0] - had[0], needed[1] - had[1])
    assert files(cache) == files(scene.alone(run_file))


def fill_the_disk(ftk, scene, truth, run_file, cache, at: int) -> bool:
    """Run with a disk that is full from a write on, then free it; False when the run has fewer writes."""
    begin(scene, run_file, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "committing", torn(storage.committing, FullDisk(at)))
        result = ftk("cache", run_file, *to(cache))
    if result.code != 0:
        list(resume_after(ftk, scene, truth, run_file, cache, result))
    return result.code != 0


@pytest.mark.parametrize(("state", "at"), [("first", 1), ("first", 160), ("later", 3), ("later", 40)])
def test_a_full_disk_is_said_keeps_what_was_done_and_is_resumed(ftk, scene, truth, tmp_path, state, at):
    assert fill_the_disk(ftk, scene, truth, getattr(scene, state), tmp_path / "cache", at)


@pytest.mark.campaign
@pytest.mark.parametrize("state", ["first", "later"])
def test_a_disk_that_is_full_at_every_write(ftk, scene, truth, tmp_path, state):
    at = 1
    while fill_the_disk(ftk, scene, truth, getattr(scene, state), tmp_path / "cache", at):
        at += 1
    print(f"{state}: the disk was full at each of {at - 1} writes; all said so, and completed with equal bytes")


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[None]:
    """A file system of this size at `place`."""
    place.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount on this machine")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_really_is_full_is_said_and_resumed_once_it_has_room(ftk, scene, truth, tmp_path):
    cache = tmp_path / "cache"
    with small_disk(cache, 160):
        result = ftk("cache", scene.first, *to(cache))
        steps = resume_after(ftk, scene, truth, scene.first, cache, result)
        next(steps)
        assert sum(stored(cache)) > 0
        subprocess.run(["mount", "-o", "remount,size=16m", cache], check=True)
        list(steps)


@dataclass(frozen=True)
class Littered:
    """A cache with every kind of garbage, the files that `ftk gc` leaves of it, and what readers of both get."""

    cache: Path
    swept: dict[str, str]
    truth: dict[object, object]


@pytest.fixture(scope="module")
def littered(tmp_path_factory, ftk, scene) -> Littered:
    place = tmp_path_factory.mktemp("litter")
    cache, swept = place / "cache", place / "swept"
    shutil.copytree(scene.sealed_later, cache)
    assert ftk("cache", scene.first, *to(cache), "--set", "cache.latents_dtype=float16").code == 0
    assert ftk("cache", scene.fewer, *to(cache)).code == 0
    (folder,) = cache.glob("texts/*")
    (folder / ".tmp-killed").write_bytes(b"half")
    (folder / f"damaged{shards.SHARD}{shards.SET_ASIDE}").write_bytes(b"flipped")
    (folder / f"alone{shards.SHARD}").write_bytes(b"no receipt")
    (cache / "view/latents-0123.parquet").write_bytes(b"of an older view")
    truth = everything(cache)
    shutil.copytree(cache, swept)
    first = report(ftk("gc", swept, "--yes", "--json"))
    assert len(first["garbage"]) == 4
    assert everything(swept) == truth
    assert report(ftk("gc", swept, "--yes", "--json"))["garbage"] == []
    return Littered(cache, files(swept), truth)


def kill_gc(server, ftk, scene, littered, cache, point: int, mend: bool) -> None:
    """Kill a collection at a touch of the disk and repeat it; with `mend` run `ftk cache` before."""
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(littered.cache, cache)
    assert server.run("gc", cache, "--yes", at=point).code == -signal.SIGKILL, point
    assert everything(cache) == littered.truth, point
    if mend:
        assert encoded(report(ftk("cache", scene.fewer, *to(cache), "--json"))) == (0, 0), point
        assert everything(cache) == littered.truth, point
    result = ftk("gc", cache, "--yes")
    assert result.code == 0, result.err
    assert everything(cache) == littered.truth, point
    assert verify.run(cache, deep=True).damages == [], point
    if not mend:
        assert files(cache) == littered.swept, point


def touches_of_gc(server, littered, cache) -> int:
    shutil.copytree(littered.cache, cache)
    whole = server.run("gc", cache, "--yes")
    assert whole.code == 0, whole.err
    assert files(cache) == littered.swept
    return whole.touches


def test_a_killed_gc_never_harms_readers_and_ends_the_same_when_repeated(server, ftk, scene, littered, tmp_path):
    touches = touches_of_gc(server, littered, tmp_path / "cache")
    for number, point in enumerate(random.Random(4).sample(range(1, touches + 1), 6)):
        kill_gc(server, ftk, scene, littered, tmp_path / "cache", point, mend=number % 2 == 1)


def test_gc_after_a_killed_run_of_cache_harms_no_reader(server, ftk, scene, truth, tmp_path):
    cache = tmp_path / "cache"
    begin(scene, scene.later, cache)
    assert server.run("cache", scene.later, *to(cache), at=100).code == -signal.SIGKILL
    assert stored(cache) > stored(scene.sealed)
    assert ftk("gc", cache, "--yes").code == 0
    assert everything(cache) == truth[scene.first]
    assert ftk("cache", scene.later, *to(cache)).code == 0
    assert everything(cache) == truth[scene.later]


@pytest.mark.parametrize("what", ["receipt", "header"])
def test_gc_of_a_damaged_cache_seals_no_damage(ftk, scene, littered, tmp_path, what):
    cache = tmp_path / "cache"
    shutil.copytree(littered.cache, cache)
    with contextlib.closing(CacheStore.open(cache)) as store:
        kind, folder, name = (store.shard_table[column][0].as_py() for column in ("kind", "fingerprint", "name"))
    path = cache / kind / folder / f"{name}{shards.RECEIPT}"
    if what == "receipt":
        path.write_bytes(flips_of_receipt(path, 1)[0])
    else:
        path = path.with_suffix(shards.SHARD)
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    assert ftk("gc", cache, "--yes").code in (0, 2)
    assert ftk("cache", scene.fewer, *to(cache)).code == 0
    assert everything(cache) == littered.truth
    assert verify.run(cache, deep=True).damages == []


@pytest.mark.campaign
@pytest.mark.parametrize("mend", [False, True])
def test_gc_killed_at_every_touch_of_the_disk(server, ftk, scene, littered, tmp_path, mend):
    touches = touches_of_gc(server, littered, tmp_path / "cache")
    for point in range(1, touches + 1):
        kill_gc(server, ftk, scene, littered, tmp_path / "cache", point, mend)
    print(f"gc: {touches} kills, one at every touch of the disk; readers and ends all equal")
