import pytest
import torch
from safetensors.torch import load_file, save_file

from ftk import storage
from ftk.configs.schema import TrainConfig
from ftk.contracts import RUN_SCHEMA
from ftk.errors import CheckpointError, EnvironmentFault
from ftk.train import checkpoint
from ftk.train.optim import MasterOptimizer
from ftk.train.ranks import Ranks, Rows


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


def test_a_setting_that_an_older_ftk_did_not_have_is_unchanged_at_its_default(tmp_path, optimizer):
    old = checkpoint.exact_settings(TrainConfig(), {})
    del old["train"]["noise"]
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, old)
    found = checkpoint.latest(tmp_path)
    checkpoint.refuse_changed_settings(found, checkpoint.exact_settings(TrainConfig(), {}))
    with pytest.raises(CheckpointError, match=r"train\.noise\.offset: checkpoint 0\.0, now 0\.1"):
        checkpoint.refuse_changed_settings(found, checkpoint.exact_settings(TrainConfig(noise={"offset": 0.1}), {}))


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


def test_the_micro_batch_size_may_change_with_the_machine():
    ones, fours = (TrainConfig(global_batch_size=4, micro_batch_size=size) for size in (1, 4))
    assert checkpoint.exact_settings(ones, {}) == checkpoint.exact_settings(fours, {})


def test_a_checkpoint_of_another_order_of_samples_is_refused_in_words(tmp_path, optimizer, caplog):
    # Earlier versions noted the order's fingerprint alone.
    checkpoint.save_checkpoint(tmp_path, 5, 5, optimizer, {"train": {"micro_batch_size": 2}, "order": "abc"})
    found = checkpoint.latest(tmp_path)
    now = {"train": {}, "order": {"version": 2, "fingerprint": "def"}}
    with pytest.raises(CheckpointError, match=r"another order.*Finish it with the ftk that began it.*--fresh"):
        checkpoint.refuse_changed_settings(found, now)
    checkpoint.refuse_changed_settings(found, now, allow=True)
    assert "goes on in the new order" in caplog.text


def test_a_longer_curve_is_another_curve():
    short, long = (TrainConfig(schedule="cosine", steps=steps) for steps in (5, 6))
    assert checkpoint.exact_settings(short, {}) != checkpoint.exact_settings(long, {})
    # A warm-up that is a share of the run grows with it; a curve with a length of its own does not.
    short, long = (TrainConfig(schedule={"warmup": 0.2}, steps=steps) for steps in (5, 6))
    assert checkpoint.exact_settings(short, {}) != checkpoint.exact_settings(long, {})
    own = {"name": "cosine", "steps": 9, "warmup": 0.2}
    short, long = (TrainConfig(schedule=own, steps=steps) for steps in (5, 6))
    assert checkpoint.exact_settings(short, {}) == checkpoint.exact_settings(long, {})


WHOLE = {
    "one": torch.randn(1, 4), "three": torch.randn(3), "seven": torch.randn(7, 2, 3), "number": torch.tensor(5.0),
}  # fmt: skip
STATE = {"seven/step": torch.tensor(2.0), "seven/exp_avg": torch.randn(7, 2, 3), "number/exp_avg": torch.tensor(1.0)}


def rows_of(tensor, rank, size):
    each = -(-len(tensor) // size)
    return Rows(first=min(len(tensor), rank * each), end=min(len(tensor), (rank + 1) * each), total=len(tensor))


def split_checkpoint(directory, size):
    """As `size` processes write one: each its rows, the first what is no rows."""
    path = directory / "00000005"
    path.mkdir(parents=True)
    for rank in range(size):
        for kind, tensors in (("adapter", WHOLE), ("optimizer", STATE)):
            own = {name: tensor for name, tensor in tensors.items() if not tensor.ndim and not rank}
            for name, tensor in tensors.items():
                rows = rows_of(tensor, rank, size) if tensor.ndim else None
                if rows and rows.first < rows.end:
                    own[name] = tensor[rows.first : rows.end].clone()
            if own:
                save_file(own, path / f"{kind}-{rank:05d}-000.safetensors")
    trainer = {"schema_version": RUN_SCHEMA, "step": 5, "num_samples_seen": 20, "optimizer": {}, "settings": {}}
    storage.commit_json(path / "trainer.json", trainer)
    storage.commit_json(path / "COMPLETE", {each.name: storage.blake3_file(each) for each in path.iterdir()})
    return path


@pytest.mark.parametrize("written_by", [1, 2, 3, 5, 8])
def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path, written_by):
    split_checkpoint(tmp_path, written_by)
    found = checkpoint.latest(tmp_path)
    for tensors, expected in zip(found.tensors(), (WHOLE, STATE), strict=True):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for size in (1, 2, 3, 4, 9):
        for rank in range(size):
            rows = {name: rows_of(tensor, rank, size) for name, tensor in WHOLE.items() if tensor.ndim}
            weights, state = found.tensors(rows)
            for name, one in rows.items():
                assert torch.equal(weights[name], WHOLE[name][one.first : one.end])
            assert torch.equal(weights["number"], WHOLE["number"])
            seven = rows["seven"]
            assert torch.equal(state["seven/exp_avg"], STATE["seven/exp_avg"][seven.first : seven.end])
            assert torch.equal(state["seven/step"], STATE["seven/step"])


def test_rows_of_another_model_are_refused(tmp_path):
    split_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="checkpoint's three has 3 rows, and this run's 4"):
        checkpoint.latest(tmp_path).tensors({"three": Rows(first=0, end=2, total=4)})


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"X")])
def test_each_file_of_a_split_checkpoint_is_verified(tmp_path, change):
    for number, name in enumerate(("adapter-00000-000", "adapter-00001-000", "optimizer-00001-000")):
        path = split_checkpoint(tmp_path / str(number), 2)
        assert checkpoint.damage(path) is None
        change(path / f"{name}.safetensors")
        assert f"{name}.safetensors" in checkpoint.damage(path)


def test_a_receipt_that_names_no_weights_is_damage(tmp_path):
    path = split_checkpoint(tmp_path, 2)
    receipt = storage.read_json(path / "COMPLETE")
    kept = {name: hashed for name, hashed in receipt.items() if not name.startswith("adapter")}
    storage.commit_json(path / "COMPLETE", kept)
    assert "COMPLETE names no file of the adapter" in checkpoint.damage(path)


def test_large_checkpoints_lie_in_several_files(tmp_path, monkeypatch):
    parameters = {name: torch.nn.Parameter(torch.randn(5, 4)) for name in "abc"}
    made = MasterOptimizer(parameters, TrainConfig())
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 2 * parameters["a"].nbytes)
    path = checkpoint.save_checkpoint(tmp_path, 5, 5, made, {})
    assert [sorted(load_file(each)) for each in sorted(path.glob("adapter*"))] == [["a", "b"], ["c"]]
    assert [each.name for each in path.glob("optimizer*")] == ["optimizer.safetensors"]
    weights, _ = checkpoint.latest(tmp_path).tensors()
    assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path, monkeypatch):
    checkpoint.refuse_unshared(tmp_path, Ranks())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Ranks, "gather", lambda *_: [True, False, True, False])
    with pytest.raises(EnvironmentFault, match="not there for process 1, 3: each writes its own part"):
        checkpoint.refuse_unshared(tmp_path, Ranks())
