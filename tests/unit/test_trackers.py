"""Trackers: what TensorBoard's files hold, and what W&B and trackio are called with.

The two services are small stand-ins with the signatures of wandb 0.31 and trackio 0.43.
"""

import sys
import types
from typing import Any

import pytest
from PIL import Image

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault
from ftk.train.hooks.trackers import IDENTITIES, open_trackers

SECRET = "hf_abcdefgh12345678"


def config(*trackers: str) -> RunConfig:
    tree = {
        "run": "my-dog", "model": {"family": "qwen-image", "path": f"https://user:{SECRET}@example.org/m"},
        "data": {"sources": [{"path": "photos", "api_key": SECRET}]}, "train": {"trackers": list(trackers), "project": "dogs"},
    }  # fmt: skip
    return validate(RunConfig, tree, "test")


class FakeRun:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.calls.append(("log", step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.calls.append(("finish", exit_code))


class FakeTrackioRun:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", step, metrics))

    def finish(self) -> None:
        print("* Run finished.")
        self.calls.append(("finish",))


def picture(value: Any, mode: str | None = None, caption: str | None = None) -> tuple[Any, Any]:
    return ("image", value.size, caption)


@pytest.fixture
def wandb(monkeypatch) -> list[Any]:
    """Puts a stand-in for wandb in place; gives what it was called with."""
    calls: list[Any] = []

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, mode=None, resume=None
    ):
        calls.append(("init", {"project": project, "dir": dir, "id": id, "name": name, "config": config, "resume": resume}))
        assert mode is None
        return FakeRun(calls)

    module = types.ModuleType("wandb")
    module.init, module.Image = init, picture
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.fixture
def trackio(monkeypatch) -> list[Any]:
    """Puts a stand-in for trackio in place; gives what it was called with."""
    calls: list[Any] = []

    def init(project, name=None, group=None, space_id=None, config=None, resume="never", embed=True):
        print(f"* Trackio project initialized: {project}")
        calls.append(("init", {"project": project, "name": name, "config": config, "resume": resume, "embed": embed}))
        return FakeTrackioRun(calls)

    module = types.ModuleType("trackio")
    module.init, module.Image = init, lambda value, caption=None: ("image", value.size, caption)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), "red"), Image.new("L", (4, 4))]


def events(directory: Any) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "logs"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_has_curves_pictures_and_the_redacted_settings(tmp_path):
    (tracker,) = open_trackers(config("tensorboard"), tmp_path)
    tracker.start(0)
    for step in (1, 2):
        tracker.scalars(step, {"train/loss": step / 2, "train/grad_norm": 1.0})
        tracker.images(step, pictures(), ["a *red* dog", "a cat"])
    tracker.close()
    found = events(tmp_path)
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]
    assert [(one.step, one.width, one.height) for one in found.Images("samples/0")] == [(1, 8, 6), (2, 8, 6)]
    texts = {tag: [one.tensor_proto.string_val[0].decode() for one in found.Tensors(tag)] for tag in found.Tags()["tensors"]}
    assert "    run: my-dog" in texts["config/text_summary"][0]
    assert SECRET not in str(texts)
    assert texts["samples/prompts/text_summary"] == ["    0: a *red* dog\n    1: a cat"]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_goes_back_behind(tmp_path):
    for first, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        (tracker,) = open_trackers(config("tensorboard"), tmp_path)
        tracker.start(first)
        for step in steps:
            tracker.scalars(step, {"train/loss": value})
        tracker.close()
    points = [(one.step, one.value) for one in events(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_gets_rows_pictures_and_redacted_settings(tmp_path, wandb):
    (tracker,) = open_trackers(config("wandb"), tmp_path)
    tracker.start(0)
    tracker.scalars(5, {"train/loss": 0.5})
    tracker.images(5, pictures(), ["a dog", "a cat"])
    tracker.close()
    (_, opened), *rest = wandb
    assert (opened["project"], opened["name"], opened["dir"], opened["resume"]) == ("dogs", "my-dog", str(tmp_path), "allow")
    assert opened["config"]["train"]["project"] == "dogs"
    assert SECRET not in str(opened["config"])
    assert rest == [
        ("log", 5, {"train/loss": 0.5}),
        ("log", 5, {"samples": [("image", (8, 6), "a dog"), ("image", (4, 4), "a cat")]}),
        ("finish", 0),
    ]


def test_wandb_goes_on_under_the_id_that_the_run_has(tmp_path, wandb):
    for _ in range(2):
        open_trackers(config("wandb"), tmp_path)
    (tmp_path / "other").mkdir()
    open_trackers(config("wandb"), tmp_path / "other")
    ids = [call[1]["id"] for call in wandb]
    assert ids[0] == ids[1] != ids[2]
    assert all(len(one) == 8 for one in ids)


def test_a_damaged_list_of_ids_begins_a_new_run(tmp_path, wandb, caplog):
    open_trackers(config("wandb"), tmp_path)
    (tmp_path / IDENTITIES).write_text("{")
    open_trackers(config("wandb"), tmp_path)
    assert wandb[0][1]["id"] != wandb[1][1]["id"]
    assert "is damaged" in caplog.text


def test_wandb_hears_that_a_run_failed(tmp_path, wandb):
    import contextlib

    (tracker,) = open_trackers(config("wandb"), tmp_path)
    with pytest.raises(OSError, match="full"), contextlib.closing(tracker):
        raise OSError("full")
    assert wandb[-1] == ("finish", 1)


def test_trackio_gets_rows_and_pictures_and_leaves_stdout_alone(tmp_path, trackio, capsys):
    for _ in range(2):
        (tracker,) = open_trackers(config("trackio"), tmp_path)
        tracker.start(0)
        tracker.scalars(5, {"train/loss": 0.5})
        tracker.images(5, pictures()[:1], ["a dog"])
        tracker.close()
    (_, opened), *rest = trackio[:4]
    assert (opened["project"], opened["name"], opened["embed"]) == ("dogs", "my-dog", False)
    assert SECRET not in str(opened["config"])
    assert rest == [("log", 5, {"train/loss": 0.5}), ("log", 5, {"samples/0": ("image", (8, 6), "a dog")}), ("finish",)]
    assert [call[1]["resume"] for call in trackio if call[0] == "init"] == ["never", "allow"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Trackio project initialized" in shown.err


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'ftk\[{name}\]'"):
        open_trackers(config(name), tmp_path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_cannot_be_opened_is_said_before_training(tmp_path, monkeypatch, request, name):
    request.getfixturevalue(name)

    def refuse(**_: Any) -> Any:
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setattr(sys.modules[name], "init", refuse)
    with pytest.raises(EnvironmentFault, match=rf"{name} could not be opened \(RuntimeError: api_key not configured\)"):
        open_trackers(config(name), tmp_path)
    assert not (tmp_path / IDENTITIES).exists()


def test_trackers_that_were_open_are_closed_when_another_cannot_be(tmp_path, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError):
        open_trackers(config("wandb", "trackio"), tmp_path)
    assert wandb[-1][0] == "finish"


def test_all_trackers_are_opened_once(tmp_path, wandb, trackio):
    names = [tracker.name for tracker in open_trackers(config("tensorboard", "wandb", "trackio", "wandb"), tmp_path)]
    assert names == ["tensorboard", "wandb", "trackio"]
    assert open_trackers(config(), tmp_path) == []
