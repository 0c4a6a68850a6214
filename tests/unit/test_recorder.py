"""What is recorded of a run, when the device is read for it, and what becomes of bad steps."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from counting import steps_of
from torch.utils._python_dispatch import TorchDispatchMode

from ftk import storage
from ftk.configs.schema import TrainConfig
from ftk.errors import TrainingError
from ftk.train.hooks import recorder as module
from ftk.train.hooks.recorder import Recorder, ValidationLog, metrics_table, read_metrics, recent_loss
from ftk.train.loop import NUM_BANDS, StepResult
from ftk.train.loss_scale import Scaled
from ftk.train.ranks import Ranks


class Watcher:
    """A tracker that remembers, and fails from step `fails_at` on."""

    def __init__(self, name: str = "watcher", fails_at: int | None = None) -> None:
        self.name, self.fails_at, self.calls = name, fails_at, []

    def _note(self, kind: str, step: int, *values: Any) -> None:
        self.calls.append((kind, step, *values))
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("no route")

    def start(self, step: int) -> None:
        self._note("start", step)

    def scalars(self, step: int, values: Any) -> None:
        self._note("scalars", step, dict(values))

    def images(self, step: int, images: Any, captions: Any) -> None:
        self._note("images", step, images, captions)

    def close(self) -> None:
        self._note("close", 0)


def result(step: int, loss: float = 0.5, norm: float = 1.0, bands: Any = None, **changes: Any) -> StepResult:
    """A step of two samples, both in the first band unless `bands` has ([K] losses, [K] samples)."""
    sums, counts = bands or ([2 * loss, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0])
    plain = {
        "step": step, "loss": torch.tensor(loss), "grad_norm": torch.tensor(norm),
        "is_bad": torch.tensor(not (math.isfinite(loss) and math.isfinite(norm))), "band_loss_K": torch.tensor(sums),
        "band_count_K": torch.tensor(counts), "learning_rate": 1e-4, "num_samples": 2, "data_seconds": 0.25,
    }  # fmt: skip
    return StepResult(**{**plain, **changes})


def trainer(step: int = 0, steps: int = 100) -> Any:
    return SimpleNamespace(step=step, device=torch.device("cpu"), config=TrainConfig(steps=steps), ranks=Ranks())


def started(directory: Any, step: int = 0, trackers: Any = (), writes: bool = True, **settings: Any) -> Recorder:
    recorder = Recorder(directory, TrainConfig(steps=100, **settings), trackers, writes)
    recorder.on_start(trainer(step))
    return recorder


def took(recorder: Recorder, *results: StepResult) -> None:
    for one in results:
        recorder.on_step(trainer(one.step), one)


def test_each_step_is_a_row_with_its_own_values(tmp_path):
    recorder = started(tmp_path, log_every=2)
    took(
        recorder, result(1, 0.5, bands=([0.25, 0.0, 0.0, 0.75], [1.0, 0.0, 0.0, 3.0])), result(2, 0.25, 3.0, learning_rate=2e-4)
    )
    recorder.on_end(trainer(2))
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["grad_norm"], first["num_samples"], first["data_seconds"]) == (
        1,
        0.5,
        1,
        2,
        0.25,
    )
    assert (first["band_losses"], first["band_counts"]) == ([0.25, None, None, 0.25], [1, 0, 0, 3])
    assert (second["step"], second["loss"], second["learning_rate"], second["is_bad"]) == (2, 0.25, 2e-4, False)
    assert second["memory_bytes"] > 0
    assert metrics_table(tmp_path).schema.equals(module.METRICS_SCHEMA)


def test_the_device_is_read_at_log_steps_and_when_asked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(module, "_fetch", lambda results, real=module._fetch: fetched.append(len(results)) or real(results))
    recorder = started(tmp_path, log_every=4)
    took(recorder, *(result(step) for step in range(1, 7)))
    assert fetched == [4]
    assert recorder.flush(trainer(6)).startswith("loss 0.5000")
    assert recorder.flush(trainer(6)) == ""
    assert fetched == [4, 2]


def test_a_resumed_run_goes_back_behind_the_rows_that_were_not_saved(tmp_path):
    first = started(tmp_path, log_every=1)
    took(first, *(result(step, loss=step / 10) for step in range(1, 6)))
    first.on_end(trainer(5))
    second = started(tmp_path, step=3, log_every=1)
    took(second, result(4, loss=0.7))
    second.on_end(trainer(4))
    assert [(row["step"], round(row["loss"], 3)) for row in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.7)]


@pytest.mark.parametrize("payload", [b"", b"PAR1 and no more", "other"])
def test_a_damaged_history_is_said_and_begun_anew(tmp_path, caplog, payload):
    if payload == "other":
        storage.commit_table(tmp_path / "metrics.parquet", pa.table({"step": ["one"]}))
    else:
        (tmp_path / "metrics.parquet").write_bytes(payload)
    (tmp_path / "validation.parquet").write_bytes(b"no table")
    with caplog.at_level(logging.WARNING, "ftk"):
        recorder, log = started(tmp_path, step=3, log_every=1), ValidationLog(tmp_path)
    assert [record.args[0].name for record in caplog.records] == ["metrics.parquet", "validation.parquet"]
    took(recorder, result(4))
    recorder.on_end(trainer(4))
    log.append({"step": 4, "loss": 0.5, "band_losses": [0.5] * NUM_BANDS, "is_best": True})
    log.commit()
    assert [row["step"] for row in read_metrics(tmp_path)] == [4]
    assert [row["step"] for row in ValidationLog(tmp_path).rows] == [4]


def test_a_history_without_the_newer_columns_is_kept(tmp_path):
    old = pa.table({"step": [1, 2], "loss": [0.5, 0.25], "learning_rate": [1e-4] * 2, "grad_norm": [1.0] * 2})
    storage.commit_table(tmp_path / "metrics.parquet", old)
    recorder = started(tmp_path, step=2, log_every=1)
    took(recorder, result(3))
    recorder.on_end(trainer(3))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["band_losses"] is None
    assert recent_loss(rows) == pytest.approx((0.5 + 0.25 + 0.5) / 3)


def test_one_bad_step_is_a_warning_with_its_number(tmp_path, caplog):
    recorder = started(tmp_path, log_every=3, max_bad_steps=2)
    with caplog.at_level(logging.WARNING, "ftk"):
        took(recorder, result(1), result(2, math.nan), result(3, loss=0.75))
    (record,) = caplog.records
    assert "step 2: loss nan" in record.getMessage()
    recorder.on_end(trainer(3))
    assert [row["is_bad"] for row in read_metrics(tmp_path)] == [False, True, False]
    assert recent_loss(read_metrics(tmp_path)) == pytest.approx(0.625)


def test_good_steps_between_bad_ones_begin_the_count_anew(tmp_path):
    recorder = started(tmp_path, log_every=1, max_bad_steps=2)
    took(recorder, result(1, math.nan), result(2), result(3, math.nan), result(4), result(5, norm=math.inf))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        took(recorder, result(6, math.nan))


def overflowed(step: int, scale: float, **changes: Any) -> StepResult:
    """A step whose gradients were infinite at a loss scale, which was too large."""
    scaled = Scaled(scale=torch.tensor(scale), is_overflow=torch.tensor(True))
    return result(step, norm=math.inf, scaled=scaled, **{"is_bad": torch.tensor(False), **changes})


def test_overflows_are_rows_that_stop_nothing(tmp_path):
    recorder = started(tmp_path, log_every=1, max_bad_steps=2)
    good = Scaled(scale=torch.tensor(8.0), is_overflow=torch.tensor(False))
    took(recorder, *(overflowed(step, 64.0) for step in range(1, 5)), result(5, scaled=good))
    recorder.commit()
    rows = read_metrics(tmp_path)
    assert [row["is_overflow"] for row in rows] == [True] * 4 + [False]
    assert [row["loss_scale"] for row in rows] == [64.0] * 4 + [8.0]
    assert not any(row["is_bad"] for row in rows)
    assert (rows[4]["band_losses"], rows[4]["band_counts"]) == ([0.5, None, None, None], [2, 0, 0, 0])


def test_overflows_between_bad_steps_do_not_start_their_count_anew(tmp_path):
    recorder = started(tmp_path, log_every=1, max_bad_steps=2)
    at_one = Scaled(scale=torch.tensor(1.0), is_overflow=torch.tensor(False))
    took(recorder, result(1, math.nan, scaled=at_one), overflowed(2, 2.0))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        took(recorder, result(3, norm=math.inf, scaled=at_one))


@pytest.mark.parametrize("writes", [True, False])
def test_too_many_bad_steps_stop_every_process_and_say_what_to_do(tmp_path, writes):
    recorder = started(tmp_path, writes=writes, log_every=10, max_bad_steps=3)
    took(recorder, result(1), result(2, math.inf), result(3, norm=math.nan), result(4, math.nan))
    with pytest.raises(TrainingError) as raised:
        recorder.flush(trainer(4))
    message = str(raised.value)
    for part in ("3 steps in a row", "step 2: loss inf", "step 3: loss 0.5, gradient norm nan", "step 4: loss nan",
                 "the last checkpoint is good", "Lower train.learning_rate", "ftk inspect"):  # fmt: skip
        assert part in message
    assert [row["step"] for row in read_metrics(tmp_path)] == ([1, 2, 3, 4] if writes else [])


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    watcher = Watcher()
    recorder = started(tmp_path, trackers=[watcher], writes=False, log_every=1)
    took(recorder, result(1))
    recorder.scalars(1, {"validation/loss": 1.0})
    recorder.on_end(trainer(1))
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert watcher.calls == []


def test_trackers_get_means_of_the_good_steps_and_what_hooks_say(tmp_path):
    watcher = Watcher()
    recorder = started(tmp_path, trackers=[watcher], log_every=4, step=0)
    took(recorder, result(1, 0.5), result(2, math.nan), result(3, 1.0, 3.0))
    took(recorder, result(4, 0.75, 2.0, bands=([0.0, 0.0, 0.0, 1.5], [0.0, 0.0, 0.0, 2.0]), learning_rate=5e-5))
    recorder.scalars(4, {"validation/loss": 0.25})
    recorder.images(4, ["picture"], ["a dog"])
    recorder.on_end(trainer(4))
    recorder.close()
    recorder.close()
    kinds = [call[:2] for call in watcher.calls]
    assert kinds == [("start", 0), ("scalars", 4), ("scalars", 4), ("images", 4), ("close", 0)]
    values = watcher.calls[1][2]
    assert (values["train/loss"], values["train/grad_norm"], values["train/learning_rate"]) == (0.75, 2.0, 5e-5)
    assert (values["loss_by_sigma/0.00-0.25"], values["loss_by_sigma/0.75-1.00"]) == (0.75, 0.75)
    assert "loss_by_sigma/0.25-0.50" not in values
    assert values["train/bad_steps"] == 1
    assert watcher.calls[2][2] == {"validation/loss": 0.25}
    assert watcher.calls[3][2:] == (["picture"], ["a dog"])


def test_a_tracker_that_fails_is_dropped_once_and_the_others_go_on(tmp_path, caplog):
    good, bad = Watcher("good"), Watcher("bad", fails_at=2)
    recorder = started(tmp_path, trackers=[bad, good], log_every=1)
    with caplog.at_level(logging.WARNING, "ftk"):
        took(recorder, *(result(step) for step in range(1, 5)))
    recorder.on_end(trainer(4))
    recorder.close()
    (record,) = caplog.records
    assert "bad fails (ConnectionError: no route)" in record.getMessage()
    assert [call[1] for call in bad.calls] == [0, 1, 2]
    assert [call[1] for call in good.calls] == [0, 1, 2, 3, 4, 0]
    assert len(read_metrics(tmp_path)) == 4


def test_what_is_no_step_is_not_counted_as_one(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    recorder = started(tmp_path, log_every=100)

    def take(number, seconds):
        clock.now += seconds
        took(recorder, result(number))

    take(1, 2.0)
    take(2, 3.0)
    with recorder.paused(trainer(2)):
        clock.now += 1000.0
    take(3, 4.0)
    recorder.on_end(trainer(3))
    # Steps that are fetched together share their time.
    assert [row["seconds"] for row in read_metrics(tmp_path)] == [2.5, 2.5, 4.0]


def test_those_who_look_on_see_new_rows_without_a_checkpoint(tmp_path, monkeypatch):
    recorder = started(tmp_path, log_every=2)
    took(recorder, result(1), result(2))
    assert not (tmp_path / "metrics.parquet").exists()
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_COMMITS", 0.0)
    took(recorder, result(3), result(4))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_many_commits_keep_few_chunks_and_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_CHUNKS", 30)
    recorder = started(tmp_path, log_every=1)
    for step in range(1, module._MOST_CHUNKS + 20):
        took(recorder, result(step))
        recorder.commit()
    assert recorder._log._table["step"].num_chunks < 30
    assert metrics_table(tmp_path)["step"].to_pylist() == list(range(1, module._MOST_CHUNKS + 20))


class TensorsAreLeftAlone(TorchDispatchMode):
    """Fails at any operation on a tensor, reading its value included."""

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        raise AssertionError(f"a tensor was touched: {operation}")


def test_a_step_between_log_steps_touches_no_tensor_and_costs_the_same_however_many_wait(tmp_path, monkeypatch):
    recorder = started(tmp_path, log_every=100_000)
    # The progress line is shown now and then; here no time passes.
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: recorder._shown_at))
    now, step = trainer(1), result(1)
    with TensorsAreLeftAlone():
        first = steps_of(lambda: recorder.on_step(now, step))
        for _ in range(1000):
            recorder.on_step(now, step)
        assert steps_of(lambda: recorder.on_step(now, step)) == first < 200


def test_the_note_has_loss_learning_rate_speed_and_memory(tmp_path):
    recorder = started(tmp_path, log_every=100)
    took(recorder, *(result(step, loss=10.0) for step in range(1, 6)), *(result(step, loss=0.5) for step in range(6, 26)))
    note = recorder.flush(trainer(25))
    assert note.startswith("loss 0.5000  lr 1.00e-04  ")
    assert " samples/s  " in note
    assert note.endswith("iB")


def test_a_measurement_replaces_those_of_its_step_and_later(tmp_path):
    log = ValidationLog(tmp_path)
    for step in (0, 10, 20, 30):
        log.append({"step": step, "loss": float(step), "band_losses": [0.5, math.nan, None, 1.0], "is_best": False})
    log.append({"step": 20, "loss": 0.1, "band_losses": [1.0] * NUM_BANDS, "is_best": True})
    log.commit()
    rows = ValidationLog(tmp_path).rows
    assert [(row["step"], row["loss"], row["is_best"]) for row in rows] == [(0, 0.0, False), (10, 10.0, False), (20, 0.1, True)]
    assert rows[0]["band_losses"][0] == 0.5
    assert math.isnan(rows[0]["band_losses"][1])
    assert rows[0]["band_losses"][2] is None
