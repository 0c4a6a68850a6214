import pytest
import torch

from ftk.configs.schema import TrainConfig
from ftk.errors import CheckpointError
from ftk.train import checkpoint
from ftk.train.optim import MasterOptimizer


@pytest.fixture
def optimizer():
    parameter = torch.nn.Parameter(torch.ones(8))
    made = MasterOptimizer({"w": parameter}, TrainConfig())
    loss = parameter.sum()
    loss.backward()
    made.accumulate()
    made.step(1.0, None, loss)
    return made


def test_a_saved_checkpoint_comes_back(tmp_path, optimizer):
    checkpoint.save_checkpoint(tmp_path, 5, 20, optimizer, {"train": {"seed": 1}})
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.num_samples_seen, found.settings) == (5, 20, {"train": {"seed": 1}})
    weights, moments = found.tensors()
    assert torch.equal(weights["w"], optimizer.weights()["w"])
    assert set(moments) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "trainer.json", "COMPLETE"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, optimizer, caplog, name):
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, step, step, optimizer, {})
    path = tmp_path / "00000010" / name
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    assert checkpoint.latest(tmp_path).step == 5
    assert "00000010 is damaged" in caplog.text


def test_a_missing_file_is_damage_too(tmp_path, optimizer):
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, {})
    (tmp_path / "00000005" / "optimizer.safetensors").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_pruning_keeps_the_newest_and_never_trusts_a_damaged_one(tmp_path, optimizer):
    for step in (1, 2, 3, 4):
        checkpoint.save_checkpoint(tmp_path, step, step, optimizer, {})
    checkpoint.prune(tmp_path, 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004"]
    (tmp_path / "00000004" / "trainer.json").unlink()
    checkpoint.prune(tmp_path, 1, None)
    assert (tmp_path / "00000003").exists()


def test_changed_settings_are_named_with_both_values(tmp_path, optimizer):
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, {"train": {"seed": 1, "learning_rate": 1e-4}})
    found = checkpoint.latest(tmp_path)
    checkpoint.refuse_changed_settings(found, {"train": {"seed": 1, "learning_rate": 1e-4}})
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: checkpoint 0\.0001, now 0\.001"):
        checkpoint.refuse_changed_settings(found, {"train": {"seed": 1, "learning_rate": 1e-3}})


def test_pruning_keeps_the_best_and_every_so_many_steps(tmp_path, optimizer):
    for step in range(1, 10):
        checkpoint.save_checkpoint(tmp_path, step, step, optimizer, {})
    checkpoint.mark_best(tmp_path, 2, 0.5)
    checkpoint.prune(tmp_path, 1, 4)
    assert [int(path.name) for path in checkpoint.all_of(tmp_path)] == [2, 4, 8, 9]


def test_a_damaged_note_of_the_best_step_is_said_and_nothing_is_lost(tmp_path, optimizer, caplog):
    (tmp_path / checkpoint.BEST).write_text("{")
    assert checkpoint.best_step(tmp_path) is None
    assert "best.json is damaged" in caplog.text


def test_a_changed_setting_may_be_accepted(tmp_path, optimizer, caplog):
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, {"train": {"seed": 1}})
    checkpoint.refuse_changed_settings(checkpoint.latest(tmp_path), {"train": {"seed": 2}}, allow=True)
    assert "train.seed: checkpoint 1, now 2" in caplog.text


FREE = [
    {"steps": 7}, {"checkpoint_every": 3}, {"keep_last": 9}, {"keep_every": 2}, {"log_every": 3}, {"trackers": []},
    {"memory": {"checkpointing": "all", "offload": 1, "compile": True}}, {"sharding": "fsdp"}, {"timeout_seconds": 5},
    {"validation": {"share": 0.1, "every": 3, "patience": 2}}, {"max_bad_steps": 2}, {"project": "other"},
]  # fmt: skip
EXACT = [
    {"seed": 3}, {"learning_rate": 1.0}, {"global_batch_size": 8}, {"ema_decay": 0.9}, {"memory": {"base": "int8"}},
    {"sigma": {"stratified": True}}, {"loss": {"prior_weight": 0.5}}, {"optimizer": "lion"}, {"validation": {"share": 0.2}},
    {"schedule": "cosine"}, {"schedule": {"warmup_steps": 5}}, {"caption_dropout": 0.5}, {"posterior": "mean"},
]  # fmt: skip


@pytest.mark.parametrize("change", FREE)
def test_what_leaves_the_course_of_a_run_alone_may_change(change):
    plain = TrainConfig(validation={"share": 0.1})
    changed = TrainConfig(**{"validation": {"share": 0.1}, **change})
    assert changed != plain or change == {}
    assert checkpoint.exact_settings(changed, {}) == checkpoint.exact_settings(plain, {})


@pytest.mark.parametrize("change", EXACT)
def test_what_changes_the_course_of_a_run_is_part_of_it(change):
    plain = TrainConfig(validation={"share": 0.1})
    changed = TrainConfig(**{"validation": {"share": 0.1}, **change})
    assert checkpoint.exact_settings(changed, {}) != checkpoint.exact_settings(plain, {})


def test_a_longer_curve_is_another_curve():
    short, long = (TrainConfig(schedule="cosine", steps=steps) for steps in (5, 6))
    assert checkpoint.exact_settings(short, {}) != checkpoint.exact_settings(long, {})
