"""Where a run stands, and its page, from files written by hand."""

import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ftk import storage
from ftk.cli import inspect as command
from ftk.errors import ConfigError, DatasetError
from ftk.train import checkpoint, run_page, run_summary
from ftk.train.hooks.recorder import METRICS_SCHEMA, VALIDATION_SCHEMA

HOSTILE = '</script><script>document.title = "ran"</script>'


def row(step: int, loss: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A step of two samples that took a second, in the first and the last band."""
    plain = {
        "step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0, "num_samples": 2, "seconds": 1.0,
        "data_seconds": 0.25, "memory_bytes": 1 << 30, "is_bad": not math.isfinite(loss),
        "band_losses": [loss, None, None, loss / 2], "band_counts": [1, 0, 0, 1],
    }  # fmt: skip
    return {**plain, **changes}


def saved(directory: Path, step: int, is_whole: bool = True) -> None:
    path = directory / "checkpoints" / f"{step:08d}"
    path.mkdir(parents=True)
    names = ("adapter.safetensors", "optimizer.safetensors", "trainer.json")
    for name in names:
        (path / name).write_text(json.dumps({"step": step, "num_samples_seen": 7 * step}))
    hashes = {name: storage.blake3_file(path / name) for name in names}
    storage.commit_json(path / checkpoint.RECEIPT, hashes if is_whole else {**hashes, "adapter.safetensors": "0"})


def run(directory: Path, rows: Any = (), steps: int = 100, report: int | None = None, measured: Any = ()) -> Path:
    """A run's folder with these steps, `config.yaml` and `environment.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(f"run: test\ntrain: {{steps: {steps}, learning_rate: 0.0001, max_grad_norm: 1.0}}\n")
    storage.commit_json(directory / "environment.json", {"ftk": "0.1", "libraries": {"torch": "2.13"}})
    if rows:
        storage.commit_table(directory / "metrics.parquet", pa.Table.from_pylist(list(rows), schema=METRICS_SCHEMA))
    if measured:
        storage.commit_table(directory / "validation.parquet", pa.Table.from_pylist(list(measured), schema=VALIDATION_SCHEMA))
    if report is not None:
        storage.commit_json(directory / "report.json", {"step": report})
    return directory


def measurement(step: int, loss: float, is_best: bool = False) -> dict[str, Any]:
    return {"step": step, "loss": loss, "band_losses": [loss, math.nan, loss, loss], "is_best": is_best}


def page(directory: Path) -> str:
    return run_page.page(directory)[1].decode()


def data(directory: Path) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page(directory), re.DOTALL).group(1))


def test_the_numbers_are_those_of_the_rows(tmp_path):
    rows = [row(step, loss=1.0 if step <= 30 else 0.5) for step in range(1, 61)]
    rows[40] = row(41, math.nan, memory_bytes=3 << 30)
    found = run_summary.summarise(
        run(tmp_path, rows, measured=[measurement(0, 0.1), measurement(30, 0.4, True), measurement(60, 0.5)])
    )
    assert (found.step, found.num_steps, found.num_samples, found.seconds) == (60, 100, 120, 60.0)
    assert (found.loss.now, found.loss.best, found.loss.best_step) == (0.5, 0.5, 51)
    assert (found.seconds_per_step, found.samples_per_second, found.data_wait_share) == (1.0, 2.0, 0.25)
    assert (found.num_bad_steps, found.bad_steps, found.memory_bytes) == (1, [41], 3 << 30)
    assert (found.learning_rate, found.grad_norm) == (1e-4, 1.0)
    assert [(band.low, band.share) for band in found.bands] == [(0.0, 0.5), (0.25, 0.0), (0.5, 0.0), (0.75, 0.5)]
    assert (found.num_band_steps, found.bands[0].first, found.bands[0].now) == (30, 1.0, 0.5)
    assert (found.bands[3].first, found.bands[3].now) == (0.5, 0.25)
    assert found.bands[1].now is None
    assert (found.validation.loss, found.validation.best_loss, found.validation.best_step) == (0.5, 0.4, 30)


def test_steps_that_overflowed_are_counted_apart_from_bad_ones(tmp_path):
    scales = [
        {"loss_scale": 65536.0, "is_overflow": True, "grad_norm": math.inf},
        {"loss_scale": 32768.0, "is_overflow": False},
    ]
    rows = [row(1, loss=9.0, **scales[0]), row(2, **scales[1]), row(3, math.nan, **scales[1]), row(4, **scales[1])]
    found = run_summary.summarise(run(tmp_path, rows))
    assert (found.num_overflows, found.loss_scale, found.num_bad_steps, found.bad_steps) == (1, 32768.0, 1, [3])
    assert (found.grad_norm, found.loss.now) == (1.0, 0.5)
    assert data(tmp_path)["bad_steps"] == [3]
    assert "<dd>32,768 <small>1 steps overflowed</small></dd>" in page(tmp_path)
    assert run_summary.summarise(run(tmp_path / "plain", [row(1)])).loss_scale is None


def test_bands_compare_the_first_steps_with_the_last(tmp_path):
    found = run_summary.summarise(run(tmp_path, [row(step, loss=1.0 if step <= 200 else 0.5) for step in range(1, 501)]))
    assert (found.num_band_steps, found.bands[0].first, found.bands[0].now) == (200, 1.0, 0.5)


@pytest.mark.parametrize(
    ("rows", "report", "state"), [(0, None, "not started"), (5, None, "stopped"), (5, 5, "finished"), (5, 3, "stopped")]
)
def test_the_state_is_known_without_the_process(tmp_path, rows, report, state):
    run(tmp_path, [row(step) for step in range(1, rows + 1)], report=report)
    assert run_summary.summarise(tmp_path).state == state


def test_a_run_that_another_process_trains_is_running_and_says_what_is_left(tmp_path):
    run(tmp_path, [row(step) for step in range(1, 11)], steps=40)
    code = "import sys; from pathlib import Path; from ftk import storage\n" \
        "with storage.lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        found = run_summary.summarise(tmp_path)
        assert (found.state, found.seconds_left) == ("running", 30.0)
        assert found.holder.startswith(f"process {holder.pid} on ")
        holder.stdin.close()
    # The lock's file stays behind; the lock does not.
    assert (tmp_path / ".lock").exists()
    assert run_summary.summarise(tmp_path).state == "stopped"


def test_looking_takes_no_lock_away(tmp_path):
    run(tmp_path, [row(1)])
    with storage.lock(tmp_path):
        pass
    run_summary.summarise(tmp_path)
    with storage.lock(tmp_path):
        assert storage.holder(tmp_path) is not None


def test_the_newest_checkpoint_is_read_and_a_damaged_one_named(tmp_path):
    run(tmp_path, [row(step) for step in range(1, 31)])
    saved(tmp_path, 10)
    saved(tmp_path, 20)
    checkpoint.mark_best(tmp_path / "checkpoints", 10, 0.5)
    found = run_summary.summarise(tmp_path).checkpoints
    assert [(one.step, one.is_best, one.problem) for one in found] == [(10, True, None), (20, False, None)]
    assert found[1].num_bytes == sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "00000020").iterdir())
    saved(tmp_path, 30, is_whole=False)
    assert run_summary.summarise(tmp_path).checkpoints[-1].problem == "adapter.safetensors does not have its checksum"
    assert run_summary.summarise(tmp_path, verify=False).checkpoints[-1].problem is None
    assert "is damaged: adapter.safetensors does not have its checksum" in page(tmp_path)


def test_a_run_without_its_metrics_is_known_by_its_checkpoint(tmp_path, caplog):
    run(tmp_path)
    saved(tmp_path, 20)
    found = run_summary.summarise(tmp_path)
    assert (found.step, found.num_samples, found.loss, found.bands) == (20, 140, None, [])
    (tmp_path / "metrics.parquet").write_bytes(b"PAR1")
    with caplog.at_level(logging.WARNING, "ftk"):
        assert run_summary.summarise(tmp_path).num_samples == 140
    assert "metrics.parquet is damaged" in caplog.text


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.parquet", "all"])
def test_the_page_of_a_run_that_lacks_a_file_says_so(tmp_path, missing):
    run(tmp_path, [row(1)])
    for name in ("config.yaml", "environment.json", "metrics.parquet") if missing == "all" else (missing,):
        (tmp_path / name).unlink()
    text = page(tmp_path)
    assert ("There is no config.yaml" in text) == (missing in ("config.yaml", "all"))
    assert ("There is no environment.json" in text) == (missing in ("environment.json", "all"))
    assert ("No step is recorded yet" in text) == (missing in ("metrics.parquet", "all"))


@pytest.mark.parametrize("text", ["train: [", "- 1", "train: none", "\udcff"])
def test_a_configuration_that_cannot_be_read_is_left_out(tmp_path, text):
    run(tmp_path, [row(1)])
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert run_summary.summarise(tmp_path).num_steps is None
    assert "config.yaml, as resolved" in page(tmp_path)


def test_a_short_run_is_drawn_step_by_step(tmp_path):
    run(tmp_path, [row(1), row(2, math.nan), row(3, 0.25)], measured=[measurement(0, 0.5), measurement(3, 0.3, True)])
    curves = data(tmp_path)
    assert (curves["step"], curves["count"], curves["loss"]) == ([1, 2, 3], [1, 0, 1], {"mean": [0.5, None, 0.25]})
    assert curves["bands"] == [[0.5, None, 0.25], [None] * 3, [None] * 3, [0.25, None, 0.125]]
    assert curves["band_counts"] == [[1, 0, 1], [0] * 3, [0] * 3, [1, 0, 1]]
    assert (curves["bad_steps"], curves["max_grad_norm"], curves["memory_gib"]) == ([2], 1, [1, 1, 1])
    assert curves["validation"]["step"] == [0, 3]
    assert curves["validation"]["bands"][1] == [None, None]
    assert curves["validation"]["best"] == 3


def long_history(number: int) -> run_summary.History:
    steps = np.arange(1, number + 1)
    losses = np.sin(steps / 1000) + (steps % 7) / 10
    is_good = steps % 1000 != 0
    return run_summary.History(
        step_N=steps, loss_N=np.where(is_good, losses, np.nan), learning_rate_N=steps * 1e-9, grad_norm_N=losses,
        num_samples_N=np.full(number, 2), seconds_N=np.ones(number), data_seconds_N=np.zeros(number),
        memory_bytes_N=steps * 1024.0, is_good_N=is_good, is_overflow_N=np.zeros(number, bool),
        loss_scale_N=np.full(number, np.nan), preservation_loss_N=np.full(number, np.nan),
        band_losses_NK=np.stack([losses] * 4, 1),
        band_counts_NK=np.stack([steps % 2, np.zeros(number), np.ones(number), np.ones(number)], 1).astype(float),
    )  # fmt: skip


def test_a_million_steps_are_drawn_as_means_with_their_least_and_largest(tmp_path):
    number = 1_000_003
    rows, measured = long_history(number), run_summary.validation(tmp_path)
    curves = run_page.curves(rows, measured, run_summary.summary(tmp_path, rows, measured), {})
    assert len(json.dumps(curves)) < 500_000
    assert len(curves["step"]) == 1500
    assert (curves["step"][-1], sum(curves["count"])) == (number, number - 1000)
    assert len(curves["bad_steps"]) == 400
    start, end = curves["step"][6], curves["step"][7]
    losses = rows.loss_N[start:end]
    assert curves["loss"]["mean"][7] == pytest.approx(np.nanmean(losses), rel=1e-4)
    assert curves["loss"]["low"][7] == pytest.approx(np.nanmin(losses), rel=1e-4)
    assert curves["loss"]["high"][7] == pytest.approx(np.nanmax(losses), rel=1e-4)
    odd = rows.is_good_N[start:end] & (rows.step_N[start:end] % 2 == 1)
    assert curves["bands"][0][7] == pytest.approx(rows.band_losses_NK[start:end, 0][odd].mean(), rel=1e-4)
    assert curves["bands"][1] == [None] * 1500


def test_what_users_wrote_cannot_leave_its_place(tmp_path):
    directory = run(tmp_path / "run", [row(1)])
    (directory / "config.yaml").write_text(f"run: '{HOSTILE}'\nmodel: {{path: '{HOSTILE}'}}\n")
    storage.commit_json(directory / "environment.json", {HOSTILE: HOSTILE})
    (directory / "adapter").mkdir()
    (directory / "adapter" / "<b>.safetensors").touch()
    text = page(directory)
    assert HOSTILE not in text
    assert "<b>.safetensors" not in text
    assert "&lt;b&gt;.safetensors" in text


def sheets(directory: Path, number: int, size: tuple[int, int] = (40, 60)) -> None:
    (directory / "samples").mkdir()
    for step in range(1, number + 1):
        Image.new("RGB", size, (step % 256, 0, 0)).save(directory / "samples" / f"step-{step:08d}.png")


def test_the_page_has_the_first_and_the_last_of_many_sheets(tmp_path):
    sheets(run(tmp_path, [row(1)]), 200)
    text = page(tmp_path)
    shown = [int(step) for step in re.findall(r'<img alt="step (\d+)"', text)]
    assert (shown[0], shown[-1], len(shown)) == (1, 200, 60)
    assert shown == sorted(set(shown))
    assert "60 of 200 sheets" in text


def test_large_sheets_are_made_smaller_until_the_page_is_small(tmp_path, monkeypatch):
    run(tmp_path, [row(1)])
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    for step in (1, 2):
        Image.fromarray(noise).save(tmp_path / "samples" / f"step-{step:08d}.png")
    monkeypatch.setattr(run_page, "_SHEETS_BYTES", 200_000)
    pictures = re.findall(r'src="(data:image/jpeg;base64,[^"]+)"', page(tmp_path))
    assert len(pictures) == 2
    assert all(10_000 < len(picture) <= 100_000 for picture in pictures)


def test_a_sheet_that_cannot_be_read_is_said(tmp_path):
    sheets(run(tmp_path, [row(1)]), 2)
    (tmp_path / "samples" / "step-00000001.png").write_bytes(b"\x89PNG and no more")
    text = page(tmp_path)
    assert text.count("The picture cannot be read.") == 1
    assert text.count("data:image/jpeg") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "0.0123 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (7384, "2 h 3 min"), (190000, "2 d 4 h")]
)
def test_durations_are_for_people(seconds, text):
    assert run_page.duration(seconds) == text


def test_the_command_shows_a_run_as_tables_json_and_page(tmp_path, capsys):
    directory = run(tmp_path / "runs" / "[red]dog", [row(step) for step in range(1, 31)], measured=[measurement(30, 0.4, True)])
    saved(directory, 30)
    (directory / "adapter").mkdir()
    (directory / "adapter" / "weights.safetensors").write_bytes(b"12345")
    command.inspect(directory)
    shown = capsys.readouterr().out
    for text in ("[red]dog", "stopped", "30 of 100, 60 samples seen", "checkpoints/00000030, whole", "0.5, mean of 20 steps",
                 "0.4 at step 30", "25.0% of the time", "1.0 GiB at most", "weights.safetensors", "0.75 to 1"):  # fmt: skip
        assert text in shown
    command.inspect(directory, json=True)
    plain = json.loads(capsys.readouterr().out)
    assert (plain["state"], plain["loss"]["now"], plain["checkpoints"][0]["problem"]) == ("stopped", 0.5, None)
    command.inspect(directory, html=True)
    assert capsys.readouterr().out.strip() == str(directory / "inspect.html")
    command.inspect(directory, html=True, out=tmp_path / "x.html")
    assert "step 30" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("inner", ["", "runs"])
def test_the_command_lists_the_runs_of_a_workspace(tmp_path, capsys, inner):
    for name in ("b", "a"):
        run(tmp_path / "runs" / name, [row(1, loss=0.25)])
    (tmp_path / "runs" / "empty").mkdir()
    command.inspect(tmp_path / inner)
    shown = capsys.readouterr().out
    assert re.search(r"^a +stopped +1 +100 +0\.25 .*\nb +stopped", shown, re.MULTILINE)
    assert "empty" not in shown
    command.inspect(tmp_path / inner, json=True)
    assert [Path(one["directory"]).name for one in json.loads(capsys.readouterr().out)["runs"]] == ["a", "b"]
    command.inspect(tmp_path / inner, html=True)
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(ConfigError, match="there are two pages to write"):
        command.inspect(tmp_path / inner, html=True, out=tmp_path / "x.html")


def test_the_command_shows_runs_beside_the_prepared_dataset(tmp_path, capsys, written_dataset):
    written_dataset(tmp_path / "prepared", [[]])
    run(tmp_path / "runs" / "a", [row(1)])
    command.inspect(tmp_path, json=True)
    plain = json.loads(capsys.readouterr().out)
    assert (plain["num_samples"], [one["step"] for one in plain["runs"]]) == (0, [1])
    command.inspect(tmp_path)
    assert re.search(r"samples +0 (.|\n)*^runs\n(.|\n)*^a +stopped", capsys.readouterr().out, re.MULTILINE)


def test_a_model_is_refused_for_a_run(tmp_path):
    with pytest.raises(ConfigError, match="is a run and has no latents to decode"):
        command.inspect(run(tmp_path, [row(1)]), html=True, model=tmp_path)


def test_a_run_alone_is_taken_for_nothing_else(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(DatasetError, match="no prepared dataset, no cache and no run"):
        command.inspect(tmp_path)
