import pytest
import torch

from ftk.configs.schema import OptimizerConfig
from ftk.errors import CheckpointError
from ftk.train import checkpoint
from ftk.train.optim import MasterOptimizer


@pytest.fixture
def optimizer():
    parameter = torch.nn.Parameter(torch.ones(8))
    made = MasterOptimizer({"w": parameter}, OptimizerConfig())
    parameter.sum().backward()
    made.step(1e-3, None)
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
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004"]
    (tmp_path / "00000004" / "trainer.json").unlink()
    checkpoint.prune(tmp_path, 1)
    assert (tmp_path / "00000003").exists()


def test_changed_settings_are_named_with_both_values(tmp_path, optimizer):
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, {"train": {"seed": 1, "learning_rate": 1e-4}})
    found = checkpoint.latest(tmp_path)
    checkpoint.refuse_changed_settings(found, {"train": {"seed": 1, "learning_rate": 1e-4}})
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: checkpoint 0\.0001, now 0\.001"):
        checkpoint.refuse_changed_settings(found, {"train": {"seed": 1, "learning_rate": 1e-3}})
