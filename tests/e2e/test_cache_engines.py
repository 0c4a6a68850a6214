"""`ftk cache` by whoever works: one writer at a time, the same bytes from all; and only what changed is encoded again."""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from killing import Run
from test_cache_faults import (  # noqa: F401 - fixtures among them
    NUM_PICTURES,
    encoded,
    everything,
    files,
    flips_of_receipt,
    report,
    scene,
    server,
    to,
)

from ftk.cache import shards
from ftk.demo import draw_pictures

pytestmark = pytest.mark.faults

TWO_PROCESSES = ["--set", "cache.processes=2"]
ADAPTER = "runs/test/adapter/pytorch_lora_weights.safetensors"


def stopped(server, at: int, *arguments: object) -> Run:  # noqa: F811
    """A command that stands still at a touch of the disk, its lock held."""
    one = server.start(*arguments, at=at, by=signal.SIGSTOP)
    assert one.wait() is None, one.err
    return one


def go_on(one: Run) -> int | None:
    os.kill(one.pid, signal.SIGCONT)
    return one.wait()


def test_a_second_writer_is_refused_and_told_who_the_first_is(server, ftk, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    first = stopped(server, 20, "cache", scene.later, *to(cache), "--json")
    run = ["cache", scene.later, *to(cache)]
    for command in (run, [*run, "--part", "1/2"], ["gc", cache, "--yes"]):
        result = ftk(*command)
        assert result.code == 4
        assert f"is being written by process {first.pid} on " in result.err
    assert everything(cache) == everything(scene.sealed)
    assert go_on(first) == 0
    assert files(cache) == files(scene.sealed_later)


def test_a_dead_writer_holds_nothing(server, ftk, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    first = stopped(server, 200, "cache", scene.first, *to(cache))
    assert ftk("cache", scene.first, *to(cache)).code == 4
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert ftk("cache", scene.first, *to(cache)).code == 0
    assert files(cache) == files(scene.sealed)


def test_parts_have_one_writer_each_and_the_whole_none_beside_them(server, ftk, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    first = stopped(server, 100, "cache", scene.first, *to(cache), "--part", "1/2", "--json")
    for others in ([], ["--part", "1/2"]):
        result = ftk("cache", scene.first, *to(cache), *others)
        assert result.code == 4
        assert f"is being written by process {first.pid} on " in result.err
    assert report(ftk("cache", scene.first, *to(cache), "--part", "2/2", "--json"))["num_shards_missing"] > 0
    assert ftk("cache", scene.first, *to(cache)).code == 4
    assert go_on(first) == 0
    assert first.report["num_shards_missing"] == 0
    assert files(cache) == files(scene.sealed)


def test_the_holder_that_is_named_is_one_that_still_holds(server, ftk, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    first = stopped(server, 100, "cache", scene.first, *to(cache), "--part", "1/2")
    assert ftk("cache", scene.first, *to(cache), "--part", "2/2").code == 0
    result = ftk("cache", scene.first, *to(cache))
    assert go_on(first) == 0
    assert f"is being written by process {first.pid} on " in result.err


@pytest.mark.campaign
def test_a_hundred_races_have_one_winner_each(server, scene, tmp_path):  # noqa: F811
    cache, expected = tmp_path / "cache", files(scene.sealed)
    for race in range(100):
        shutil.rmtree(cache, ignore_errors=True)
        racers = [server.start("cache", scene.first, *to(cache)) for _ in range(2)]
        assert sorted(racer.wait() for racer in racers) == [0, 4], race
        (winner,) = (racer for racer in racers if racer.code == 0)
        (loser,) = (racer for racer in racers if racer.code == 4)
        assert f"is being written by process {winner.pid} on " in loser.err, race
        assert files(cache) == expected, race
    print("100 races, one winner each, who was named to the other; all with equal bytes")


def run_parts(server, ftk, scene, cache, order, killed: int, at: int) -> None:  # noqa: F811
    """Run the parts of three in this order; one of them is killed at a touch of the disk, and repeated at the end."""
    left = len(order)
    for part in (*order, killed):
        arguments = [scene.first, *to(cache), "--part", f"{part}/3", "--json"]
        if part == killed and left == len(order) - order.index(killed):
            assert server.run("cache", *arguments, at=at).code == -signal.SIGKILL
        else:
            missing = report(ftk("cache", *arguments))["num_shards_missing"]
            assert (missing == 0) == (left == 0)
        left -= 1
    found = files(cache)
    # A temporary file may be that of a part at work elsewhere: what a killed part left, a run of the whole removes.
    assert {name: digest for name, digest in found.items() if ".tmp-" not in name} == files(scene.sealed)
    assert encoded(report(ftk("cache", scene.first, *to(cache), "--json"))) == (0, 0)
    assert files(cache) == files(scene.sealed)


def test_parts_in_any_order_one_of_them_killed_end_with_the_bytes_of_one_run(server, ftk, scene, tmp_path):  # noqa: F811
    run_parts(server, ftk, scene, tmp_path / "cache", (3, 1, 2), killed=1, at=101)


@pytest.mark.campaign
def test_parts_in_every_order_each_of_them_killed_somewhere(server, ftk, scene, tmp_path):  # noqa: F811
    count = 0
    for order, killed, at in itertools.product(itertools.permutations((1, 2, 3)), (1, 2, 3), (3, 34, 77, 120, 163)):
        run_parts(server, ftk, scene, tmp_path / "cache", order, killed, at)
        shutil.rmtree(tmp_path / "cache")
        count += 1
    print(f"{count} caches made by three parts, one of them killed; all with equal bytes")


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize("what", ["shard", "receipt", "flipped"])
def test_parts_make_a_damaged_shard_again(ftk, scene, tmp_path, order, what):  # noqa: F811
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    # Of the first unit of latents, which is the first part's.
    first = everything(cache)["table"][0]["latents"]
    (receipt,) = (
        path for path in cache.glob("latents/*/*.parquet") if first in shards.read_receipt(path).items["id"].to_pylist()
    )
    if what == "shard":
        receipt.with_suffix(shards.SHARD).write_bytes(receipt.with_suffix(shards.SHARD).read_bytes()[:-1])
    elif what == "receipt":
        receipt.unlink()
    else:
        receipt.write_bytes(flips_of_receipt(receipt, 1)[0])
    counts = []
    for part in order:
        counts.append(encoded(report(ftk("cache", scene.first, *to(cache), "--part", f"{part}/2", "--json"))))
    assert sorted(counts) == [(0, 0), (2, 0)]
    assert files(cache) == files(scene.sealed)


def workers_of(pid: int) -> list[psutil.Process]:
    """The children of the server that a pool forks its workers from."""
    return [worker for child in psutil.Process(pid).children() for worker in child.children()]


def kill_a_worker_at_work(running: Run, cache: Path, kind: str) -> None:
    """Stop a worker after the first shard, see that the others get on without it, and kill it."""

    def done() -> int:
        return len(list(cache.glob(f"{kind}/*/*{shards.RECEIPT}")))

    deadline = time.monotonic() + 120
    while not done() and time.monotonic() < deadline:
        time.sleep(0.001)
    victim = workers_of(running.pid)[0]
    victim.suspend()
    count = -1
    while count != done():
        count = done()
        time.sleep(0.5)
    victim.kill()


def test_two_processes_give_the_same_bytes_though_one_is_killed(server, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    # The texts are there already: every pool costs two imports of torch.
    shutil.copytree(scene.sealed / "texts", cache / "texts")
    running = server.start("cache", scene.first, *to(cache), *TWO_PROCESSES, "--json")
    kill_a_worker_at_work(running, cache, "latents")
    assert running.wait() == 0, running.err
    assert "lost their process (killed by SIGKILL)" in running.err
    assert encoded(running.report) == (NUM_PICTURES, 0)
    assert files(cache) == files(scene.sealed)


@pytest.mark.campaign
def test_two_processes_give_the_same_bytes_of_both_kinds_and_after_a_change(server, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    for run_file, sealed in ((scene.first, scene.sealed), (scene.later, scene.sealed_later)):
        assert server.run("cache", run_file, *to(cache), *TWO_PROCESSES).code == 0
        assert files(cache) == files(sealed)
    print("two processes: equal bytes, also of what a change adds")


@pytest.mark.usefixtures("ray_connection")
def test_ray_gives_the_bytes_of_the_local_engine(ftk, scene, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    # Two units at once, of four that would fit: each process imports torch and loads the encoders.
    engine = ["--set", "cache.engine=ray", "--set", "data.workers=2"]
    done = report(ftk("cache", scene.first, *to(cache), *engine, "--json"))
    assert encoded(done) == (NUM_PICTURES, 17)
    assert files(cache) == files(scene.sealed)


def train(ftk, run_file: Path, *arguments: object) -> str:
    """What training says of a cache that does not fit its run file."""
    result = ftk("train", run_file, *arguments)
    assert result.code == 2
    assert "was not made from what this run names" in result.err
    return result.err


def test_an_edited_caption_is_one_text_and_ten_pictures_are_ten(ftk, workspace, tmp_path):
    run_file = workspace()
    cached = report(ftk("run", run_file, "--json"))["cache"]
    num_texts = cached["num_texts_encoded"]
    edited = sorted((tmp_path / "pictures").glob("*.txt"))[4]
    edited.write_text("an edited caption")
    assert ftk("prepare", run_file).code == 0
    assert "prepared dataset: expected " in train(ftk, run_file)
    cached = report(ftk("cache", run_file, "--json"))
    assert (*encoded(cached), cached["num_latents_reused"], cached["num_texts_reused"]) == (0, 1, 12, num_texts - 1)

    known = {path.read_text() for path in (tmp_path / "pictures").glob("*.txt")}
    added = draw_pictures(tmp_path / "more", 22)[12:]
    captions = {picture.with_suffix(".txt").read_text() for picture in added}
    for picture in added:
        for path in (picture, picture.with_suffix(".txt")):
            path.rename(tmp_path / "pictures" / path.name)
    assert ftk("prepare", run_file).code == 0
    assert "prepared dataset: expected " in train(ftk, run_file)
    cached = report(ftk("cache", run_file, "--json"))
    assert encoded(cached) == (10, len(captions - known))
    assert cached["num_latents_reused"] == 12
    assert ftk("train", run_file, "--dry-run").code == 0


def perturb(weights: Path, place: int) -> None:
    """Change one byte of a safetensors file's data."""
    _, start = shards.read_header(weights)
    with weights.open("r+b") as file:
        file.seek(start + place)
        (byte,) = file.read(1)
        file.seek(start + place)
        file.write(bytes([byte ^ 1]))


def test_another_vae_encodes_latents_alone_and_the_first_one_finds_its_own_again(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    (old,) = (tmp_path / "work/cache/latents").iterdir()
    before = files(tmp_path / "work/cache")
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    perturb(weights, 0)
    told = train(ftk, run_file)
    assert "latents.weights.vae: expected sampled:" in told
    assert "texts." not in told
    cached = report(ftk("cache", run_file, "--json"))
    assert (*encoded(cached), cached["num_texts_reused"]) == (12, 0, 14)
    assert len(list((tmp_path / "work/cache/latents").iterdir())) == 2
    assert {name: digest for name, digest in files(tmp_path / "work/cache").items() if old.name in name} == {
        name: digest for name, digest in before.items() if old.name in name
    }
    assert ftk("train", run_file, "--dry-run").code == 0
    perturb(weights, 0)
    assert "latents.weights.vae: expected sampled:" in train(ftk, run_file)
    assert encoded(report(ftk("cache", run_file, "--json"))) == (0, 0)
    assert {name: digest for name, digest in files(tmp_path / "work/cache").items() if name in before} == before


def test_a_weight_between_the_samples_is_noticed_with_full_hash(ftk, workspace, tmp_path):
    run_file = workspace(cache={"full_hash": True})
    assert ftk("prepare", run_file).code == ftk("cache", run_file).code == 0
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    header, _ = shards.read_header(weights)
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    begin, end = max(spans, key=lambda span: span[1] - span[0])
    assert end - begin > 4 * 4096
    perturb(weights, begin + (end - begin) // 4)
    assert "latents.weights.vae: expected full:" in train(ftk, run_file)
    assert encoded(report(ftk("cache", run_file, "--json"))) == (12, 0)


@pytest.mark.parametrize(
    ("setting", "expected", "found", "counts"),
    [
        ("cache.latents_dtype=float16", "latents.stored: expected float16, found float32", "texts.", (12, 0)),
        ("cache.text_dtype=bfloat16", "texts.dtype: expected bfloat16, found float32", "latents.", (0, 17)),
        ("cache.text_stored=float16", "texts.stored: expected float16, found float32", "latents.", (0, 17)),
    ],
)
def test_another_precision_encodes_its_own_kind_alone(ftk, scene, tmp_path, setting, expected, found, counts):  # noqa: F811
    cache = tmp_path / "cache"
    shutil.copytree(scene.sealed, cache)
    changed = [*to(cache), "--set", setting]
    told = train(ftk, scene.first, *changed)
    assert expected in told
    assert found not in told
    assert encoded(report(ftk("cache", scene.first, *changed, "--json"))) == counts
    assert ftk("train", scene.first, *changed, "--dry-run").code == 0
    assert expected.split(":")[0] in train(ftk, scene.first, *to(cache))
    assert encoded(report(ftk("cache", scene.first, *to(cache), "--json"))) == (0, 0)
    assert {name: digest for name, digest in files(cache).items() if name in files(scene.sealed)} == files(scene.sealed)


def test_other_data_settings_are_shown_one_by_one(ftk, scene, tmp_path):  # noqa: F811
    told = train(ftk, scene.first, *to(scene.sealed), "--set", "data.resolutions=[96]", "--set", "data.crop=random")
    assert "data.resolutions: expected [96], found [64]" in told
    assert "data.crop: expected random, found center" in told
    assert "`ftk prepare RUN.yaml`, then" in told


def test_a_cache_is_all_that_training_needs_of_the_pictures(ftk, workspace, tmp_path):
    run_file = workspace()
    assert ftk("run", run_file).code == 0
    expected = (tmp_path / "work" / ADAPTER).read_bytes()
    elsewhere = tmp_path / "another machine"
    shutil.copytree(tmp_path / "work/cache", elsewhere / "cache")
    tree = yaml.safe_load(run_file.read_text())
    for gone in ("work", "pictures", "model/vae", "model/text_encoder", "model/tokenizer"):
        shutil.rmtree(tmp_path / gone)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"transformer", "scheduler", "model_index.json"}
    tree["workspace"], tree["cache"]["path"] = str(elsewhere), str(elsewhere / "cache")
    run_file.write_text(json.dumps(tree))
    result = ftk("train", run_file, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["step"] == 6
    assert (elsewhere / ADAPTER).read_bytes() == expected
