"""`ftk prepare` under faults: killed anywhere, a full disk, damaged files, several machines. Nothing lost, same bytes."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import server
from PIL import Image

from ftk import locations, storage
from ftk.pipeline import decode
from ftk.pipeline.dataset import PreparedDataset

pytestmark = pytest.mark.faults

NAMED_AT_THE_END = {"dataset.json", "rejects.parquet", "duplicates.parquet"}


def hashes(prepared: Path) -> dict[str, str]:
    """Of everything that a reader of the dataset sees; receipts also say when their sources were last looked at."""
    files = [*(prepared / "shards").glob("*.tar"), *(prepared / "shards").glob("*.parquet")]
    files += [prepared / name for name in NAMED_AT_THE_END]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def left_over(prepared: Path) -> list[str]:
    return [path.name for path in prepared.rglob(".tmp-*")]


@pytest.fixture
def odd_pictures(tmp_path, pictures) -> Path:
    """Pictures of which one breaks off and one has no caption, old enough for their signatures to be trusted."""
    folder = tmp_path / "odd"
    shutil.copytree(pictures, folder)
    first = next(iter(sorted(folder.glob("*.png"))))
    (folder / "cut.png").write_bytes(first.read_bytes()[:600])
    (folder / "cut.txt").write_text("a cut picture")
    shutil.copy(first, folder / "zz-mute.png")
    return folder


def run_file_over(workspace, folder: Path, **data) -> Path:
    return workspace(
        data={
            "sources": [{"path": str(folder)}],
            "resolutions": [64],
            "shard_samples": 3,
            "workers": 1,
            "max_reject_fraction": 0.5,
            **data,
        }
    )


def killed_at(point: int, run_file: Path, *arguments: object) -> tuple[int, str]:
    done = server().run("prepare", run_file, *arguments, at=point)
    return done.code, done.out


def test_killed_at_touches_of_the_disk_a_second_run_completes_with_the_same_bytes(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    code, out = killed_at(0, run_file, "--workspace", tmp_path / "alone")
    assert code == 0
    touches = int(out.split()[-1])
    assert touches > 50
    expected = hashes(tmp_path / "alone/prepared")
    for point in random.Random(0).sample(range(1, touches + 1), 8):
        place = tmp_path / f"killed-{point}"
        assert killed_at(point, run_file, "--workspace", place)[0] == -signal.SIGKILL
        result = ftk("prepare", run_file, "--workspace", place)
        assert result.code == 0, result.err
        assert hashes(place / "prepared") == expected
        assert not left_over(place / "prepared")


@pytest.mark.campaign
def test_two_hundred_kills_at_random_instants_end_with_the_same_bytes(start, workspace, odd_pictures, tmp_path):
    for number in range(60):
        noise = Image.frombytes("RGB", (320, 240), random.Random(number).randbytes(320 * 240 * 3))
        noise.save(odd_pictures / f"noise-{number:02d}.jpg")
        (odd_pictures / f"noise-{number:02d}.txt").write_text(f"noise number {number}")
    run_file = run_file_over(workspace, odd_pictures, workers=2)

    def whole_run(place: Path) -> float:
        began = time.monotonic()
        process = start("prepare", run_file, "--workspace", place)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return time.monotonic() - began

    seconds = whole_run(tmp_path / "alone")
    expected = hashes(tmp_path / "alone/prepared")
    place, kills, completed = tmp_path / "killed", 0, 0
    rng = random.Random(1)
    while kills < 200:
        process = start("prepare", run_file, "--workspace", place)
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0 or kills % 5 == 0:
            whole_run(place)
            assert hashes(place / "prepared") == expected, f"after {kills} kills"
            assert not left_over(place / "prepared")
            shutil.rmtree(place)
            completed += 1
    print(f"{kills} kills, {completed} completed runs, all equal; a run alone took {seconds:.1f} s")


@pytest.mark.campaign
def test_killed_at_every_touch_of_the_disk(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    touches = int(killed_at(0, run_file, "--workspace", tmp_path / "alone")[1].split()[-1])
    expected = hashes(tmp_path / "alone/prepared")
    for point in range(1, touches + 1):
        place = tmp_path / "killed"
        assert killed_at(point, run_file, "--workspace", place)[0] == -signal.SIGKILL
        assert ftk("prepare", run_file, "--workspace", place).code == 0
        assert hashes(place / "prepared") == expected, point
        shutil.rmtree(place)


def test_a_full_disk_is_said_keeps_what_was_done_and_is_resumed(ftk, workspace, odd_pictures, tmp_path, monkeypatch):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file, "--workspace", tmp_path / "alone").code == 0
    written = 0
    commit = storage.commit_table

    def full(path, table):
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device", str(path))
        commit(path, table)

    monkeypatch.setattr(storage, "commit_table", full)
    result = ftk("prepare", run_file)
    assert result.code == 4
    assert "disk is full" in result.err
    prepared = tmp_path / "work/prepared"
    assert not left_over(prepared)
    assert len(list((prepared / "shards").glob("*.json"))) == 2
    assert not (prepared / "dataset.json").exists()
    monkeypatch.undo()
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["num_shards_reused"] == 2
    assert hashes(prepared) == hashes(tmp_path / "alone/prepared")


def test_a_file_size_limit_in_the_middle_of_a_shard_leaves_no_half_shard(start, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start("prepare", run_file, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "Traceback" not in err
    assert not list((tmp_path / "work/prepared/shards").glob("*"))


def test_a_shard_with_a_flipped_bit_is_named_and_made_again(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0
    before = hashes(tmp_path / "work/prepared")
    path = tmp_path / "work/prepared/shards/00001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = ftk("cache", run_file)
    assert result.code == 2
    assert "00001.tar is damaged" in result.err
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["num_shards_reused"] == done["num_shards"] - 1
    assert hashes(tmp_path / "work/prepared") == before


def test_a_changed_image_remakes_its_shard_alone(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0
    victim = sorted(odd_pictures.glob("*.png"))[5]
    with Image.open(victim) as image:
        image.convert("RGB").transpose(Image.Transpose.ROTATE_180).save(victim)
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["num_shards_reused"] == done["num_shards"] - 1


def test_a_touched_source_is_read_again_and_nothing_is_remade(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/prepared/shards").glob("*.tar")}
    for path in odd_pictures.iterdir():
        os.utime(path, (1, 1))
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["num_shards_reused"] == done["num_shards"]
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_unchanged_sources_are_not_read_again(ftk, workspace, odd_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "FRESH_SECONDS", 0.0)
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0

    def read(*_):
        raise AssertionError("an unchanged source was read")

    monkeypatch.setattr(locations, "read_bytes", read)
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["num_shards_reused"] == done["num_shards"]


def test_a_file_changed_within_its_clock_tick_is_noticed(ftk, workspace, odd_pictures, tmp_path):
    # Files younger than the clock's grain vouch for nothing: the same size and the same time may be other bytes.
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0
    caption = sorted(odd_pictures.glob("*.txt"))[0]
    times = caption.stat()
    with caption.open("r+b") as file:
        file.write(b"Z")
    os.utime(caption, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ftk("prepare", run_file).code == 0
    rows = PreparedDataset.open(tmp_path / "work/prepared").rows()
    assert any(row.captions[0].startswith("Z") for row in rows)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_bytes_do_not_depend_on_the_workers(ftk, workspace, odd_pictures, tmp_path, workers):
    run_file = run_file_over(workspace, odd_pictures)
    for count in (1, workers):
        assert ftk("prepare", run_file, "--workspace", tmp_path / str(count), "--set", f"data.workers={count}").code == 0
    assert hashes(tmp_path / "1/prepared") == hashes(tmp_path / f"{workers}/prepared")


def test_parts_of_a_job_array_end_with_the_bytes_of_one_run(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file, "--workspace", tmp_path / "alone").code == 0
    reports = [json.loads(ftk("prepare", run_file, "--part", f"{part}/3", "--json").out) for part in (2, 3, 1)]
    assert [report["num_shards_missing"] > 0 for report in reports] == [True, True, False]
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "alone/prepared")
    again = json.loads(ftk("prepare", run_file, "--part", "2/2", "--json").out)
    assert again["num_shards_reused"] == again["num_shards"]


def test_parts_that_run_at_once_are_sealed_by_the_last(ftk, workspace, odd_pictures, tmp_path):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file, "--workspace", tmp_path / "alone").code == 0
    parts = [server().start("prepare", run_file, "--part", f"{part}/2", "--json") for part in (1, 2)]
    assert [part.wait() for part in parts] == [0, 0], [part.err for part in parts]
    assert min(part.report["num_shards_missing"] for part in parts) == 0
    assert hashes(tmp_path / "work/prepared") == hashes(tmp_path / "alone/prepared")


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_is_none_says_how_to_write_it(ftk, workspace, part):
    result = ftk("prepare", workspace(), "--part", part)
    assert result.code == 2
    assert "--part 3/8" in result.err


def test_one_part_has_one_writer_and_the_whole_none_beside_it(workspace, tmp_path):
    from ftk.errors import EnvironmentFault

    with storage.lock(tmp_path, "1-of-2"), storage.lock(tmp_path, "2-of-2"):
        with pytest.raises(EnvironmentFault), storage.lock(tmp_path, "1-of-2"):
            pass
        with pytest.raises(EnvironmentFault), storage.lock(tmp_path):
            pass
    with storage.lock(tmp_path), pytest.raises(EnvironmentFault), storage.lock(tmp_path, "1-of-2"):
        pass


@pytest.mark.campaign
def test_a_thousand_races_for_the_lock_have_one_winner_each(tmp_path):
    holding = (
        "import sys, time; from pathlib import Path; from ftk import storage; from ftk.errors import EnvironmentFault\n"
        "won = 0\n"
        "for number in range(1000):\n"
        "    place = Path(sys.argv[1]) / str(number)\n"
        "    try:\n"
        "        with storage.lock(place):\n"
        "            (place / f'won-{sys.argv[2]}').touch()\n"
        "            while not (place / f'lost-{1 - int(sys.argv[2])}').exists() and "
        "not (place / f'won-{1 - int(sys.argv[2])}').exists(): time.sleep(0.0005)\n"
        "    except EnvironmentFault as error:\n"
        "        assert 'being written by' in str(error)\n"
        "        (place / f'lost-{sys.argv[2]}').touch()\n"
        "        while not (place / f'won-{1 - int(sys.argv[2])}').exists(): time.sleep(0.0005)\n"
    )
    racers = [subprocess.Popen([sys.executable, "-c", holding, tmp_path, str(number)]) for number in (0, 1)]
    assert [racer.wait(timeout=300) for racer in racers] == [0, 0]
    for number in range(1000):
        names = sorted(path.name for path in (tmp_path / str(number)).iterdir() if not path.name.startswith("."))
        assert names in (["lost-0", "won-1"], ["lost-1", "won-0"]), (number, names)


def test_rejects_of_a_limit_or_a_missing_decoder_are_tried_again_when_that_changes(
    ftk, workspace, odd_pictures, tmp_path, monkeypatch
):
    run_file = run_file_over(workspace, odd_pictures)
    assert ftk("prepare", run_file).code == 0
    again = ["prepare", run_file, "--json"]
    done = json.loads(ftk(*again).out)
    assert done["num_shards_reused"] == done["num_shards"]
    monkeypatch.setattr(decode, "decoders", lambda: ["a later Pillow"])
    (receipt,) = [
        path for path in (tmp_path / "work/prepared/shards").glob("*.json") if '"unreadable"' in path.read_text()
    ] or [None]
    done = json.loads(ftk(*again).out)
    assert done["num_shards_reused"] == done["num_shards"] - (receipt is not None)
    one = sorted((tmp_path / "work/prepared/shards").glob("*.json"))[0]
    plain = json.loads(one.read_text())
    plain["rejects"] = [{"source": "odd", "path": "x", "reason": "worker_timed_out", "detail": "not done after 120 s"}]
    plain["conditions"] = [120.0, 4.0]
    one.write_text(json.dumps(plain))
    done = json.loads(ftk(*again).out)
    assert (done["num_shards_reused"], done["num_rejects"]) == (done["num_shards"], 3)
    done = json.loads(ftk(*again, "--set", "data.worker_seconds=500").out)
    assert (done["num_shards_reused"], done["num_rejects"]) == (done["num_shards"] - 1, 2)


def test_duplicates_first_leaves_the_copies_out_and_error_writes_nothing(ftk, workspace, odd_pictures, tmp_path):
    shutil.copy(odd_pictures / "zz-mute.png", odd_pictures / "aa-copy.png")
    (odd_pictures / "aa-copy.txt").write_text("a copy")
    run_file = run_file_over(workspace, odd_pictures, duplicates="first")
    done = json.loads(ftk("prepare", run_file, "--json").out)
    assert done["rejects_by_reason"]["duplicate"] == 1
    assert any("the same bytes as 000-shapes.png" in row["detail"] for row in done["rejects"])
    result = ftk("prepare", run_file, "--set", "data.duplicates=error", "--workspace", tmp_path / "other")
    assert result.code == 2
    assert "000-shapes.png" in result.err
    assert not (tmp_path / "other/prepared/dataset.json").exists()
    kept = json.loads(ftk("prepare", run_file, "--set", "data.duplicates=keep", "--json").out)
    assert kept["num_samples"] == done["num_samples"] + 1
    assert kept["num_duplicates"] == 1
