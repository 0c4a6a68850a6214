"""Trackers: what TensorBoard's files hold, and what the services are called with, through accelerate's own classes.

The services are small stand-ins with the signatures of wandb 0.31, trackio 0.43, swanlab 0.10, mlflow 3, comet_ml 3.49,
clearml 2, aim 3 and dvclive 3.
"""

import itertools
import logging
import sys
import types
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.summary.writer import event_file_writer

from ftk.configs.load import validate
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault
from ftk.train.hooks.trackers import _ARGUMENTS, IDENTITIES, check, open_trackers

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


class Calls:
    """Notes every call of every method, and gives what `answers` has under the method's name."""

    def __init__(self, name: str, calls: list[Any], **answers: Any) -> None:
        self._name, self._calls, self._answers = name, calls, answers

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            print(f"{self._name} says something")
            self._calls.append((f"{self._name}.{method}", *arguments, *([options] if options else [])))
            return self._answers.get(method)

        return call

    def __setitem__(self, name: str, value: Any) -> None:
        self._calls.append((f"{self._name}[{name}]", value))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def swanlab(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    def init(project=None, experiment_name=None, config=None, logdir=None, id=None, resume=None):
        assert len(id) == 21
        calls.append(("init", project, experiment_name, config["run"], id, resume))
        return Calls("run", calls)

    stand_in(monkeypatch, "swanlab", init=init, Image=lambda data, caption=None: ("image", data.size, caption), config={})
    return calls


@pytest.fixture
def mlflow(monkeypatch) -> list[Any]:
    calls: list[Any] = []
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    service = Calls("mlflow", calls, search_experiments=[], create_experiment="7", start_run=active)
    names = ("search_experiments", "create_experiment", "start_run", "log_params", "log_metrics", "end_run")
    validation = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    members = {name: getattr(service, name) for name in names}
    stand_in(monkeypatch, "mlflow", **members, utils=types.SimpleNamespace(validation=validation))
    return calls


@pytest.fixture
def comet_ml(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    def start(project_name=None, experiment_key=None):
        assert len(experiment_key) == 32
        calls.append(("start", project_name, experiment_key))
        return Calls("experiment", calls)

    stand_in(monkeypatch, "comet_ml", start=start, __version__="3.49.0")
    return calls


@pytest.fixture
def clearml(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    class Task(Calls):
        id = "c1"

        @classmethod
        def current_task(cls):
            return None

        @classmethod
        def init(cls, project_name=None, task_name=None, reuse_last_task_id=True, continue_last_task=False):
            calls.append(("init", project_name, task_name, reuse_last_task_id, continue_last_task))
            return cls("task", calls, get_logger=Calls("logger", calls))

    stand_in(monkeypatch, "clearml", Task=Task)
    return calls


@pytest.fixture
def aim(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    class Run(Calls):
        hash = "a1"

        def __init__(self, run_hash=None, repo=None, experiment=None):
            super().__init__("run", calls)
            calls.append(("Run", run_hash, repo, experiment))

    stand_in(monkeypatch, "aim", Run=Run, Image=lambda data, caption="": ("image", data.size, caption))
    return calls


@pytest.fixture
def dvclive(monkeypatch) -> list[Any]:
    calls: list[Any] = []

    class Live(Calls):
        def __init__(self, dir="dvclive", resume=False):
            super().__init__("live", calls)
            calls.append(("Live", dir, resume))

    class Metric:
        @staticmethod
        def could_log(value):
            return isinstance(value, (int, float))

    stand_in(monkeypatch, "dvclive", Live=Live)
    stand_in(monkeypatch, "dvclive.plots", Metric=Metric)
    return calls


def twice(name: str, directory: Any) -> None:
    """A run that logs a step and an image, and the same run resumed."""
    for step in (5, 6):
        (tracker,) = open_trackers(config(name), directory)
        tracker.start(step - 1)
        tracker.scalars(step, {"train/loss": 0.5})
        tracker.images(step, pictures()[:1], ["a dog"])
        tracker.close()


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


def test_tensorboard_forgets_the_steps_that_a_resumed_run_goes_back_behind(tmp_path, monkeypatch):
    # Files of one second and one process are told apart by a number that is sorted as text: 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", types.SimpleNamespace(get=itertools.count().__next__))
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
        ("finish", None),
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


@pytest.mark.parametrize("name", sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"}))
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


def test_swanlab_goes_on_under_its_id_and_shows_prompts(tmp_path, swanlab):
    twice("swanlab", tmp_path)
    openings = [call for call in swanlab if call[0] == "init"]
    assert openings[0] == openings[1]
    assert openings[0][1:4] == ("dogs", "my-dog", "my-dog")
    assert ("run.log", {"train/loss": 0.5}, {"step": 5}) in swanlab
    assert ("run.log", {"samples": [("image", (8, 6), "a dog")]}, {"step": 6}) in swanlab


def test_mlflow_goes_on_under_its_run_and_is_told_the_settings_once(tmp_path, mlflow, caplog):
    caplog.set_level(logging.INFO, "ftk")
    twice("mlflow", tmp_path)
    assert [call[1]["run_id"] for call in mlflow if call[0] == "mlflow.start_run"] == [None, "m1"]
    settings = [call[1] for call in mlflow if call[0] == "mlflow.log_params"]
    assert [part["train.project"] for part in settings if "train.project" in part] == ["dogs"]
    assert SECRET not in str(mlflow)
    assert ("mlflow.log_metrics", {"train/loss": 0.5}, {"step": 6}) in mlflow
    assert caplog.text.count("mlflow gets no sample images") == 2  # once for each process


def test_what_cannot_be_shown_is_said_once(tmp_path, mlflow, caplog):
    caplog.set_level(logging.INFO, "ftk")
    (tracker,) = open_trackers(config("mlflow"), tmp_path)
    for step in (1, 2, 3):
        tracker.images(step, pictures(), ["a dog", "a cat"])
    assert caplog.text.count("mlflow gets no sample images") == 1


def test_comet_goes_on_under_its_key(tmp_path, comet_ml):
    twice("comet_ml", tmp_path)
    openings = [call for call in comet_ml if call[0] == "start"]
    assert openings[0] == openings[1]
    assert openings[0][1] == "dogs"
    assert ("experiment.log_metric", "train/loss", 0.5, {"step": 6}) in comet_ml
    assert comet_ml[-1] == ("experiment.end",)


def test_clearml_goes_on_with_its_task_and_shows_images(tmp_path, clearml):
    twice("clearml", tmp_path)
    assert [call for call in clearml if call[0] == "init"] == [
        ("init", "dogs", "my-dog", False, False),
        ("init", "dogs", "my-dog", False, "c1"),
    ]
    images = [call[1] for call in clearml if call[0] == "logger.report_image"]
    assert [(image["title"], image["iteration"]) for image in images] == [("samples/0", 5), ("samples/0", 6)]


def test_aim_goes_on_with_its_run_and_shows_prompts(tmp_path, aim):
    twice("aim", tmp_path)
    folder = str(tmp_path / "logs")
    assert [call for call in aim if call[0] == "Run"] == [("Run", None, folder, "dogs"), ("Run", "a1", folder, "dogs")]
    assert ("run.track", ("image", (8, 6), "a dog"), {"name": "samples/0", "step": 5}) in aim


def test_dvclive_goes_on_in_its_folder(tmp_path, dvclive):
    twice("dvclive", tmp_path)
    folder = str(tmp_path / "dvclive")
    assert [call for call in dvclive if call[0] == "Live"] == [("Live", folder, False), ("Live", folder, True)]
    assert ("live.log_metric", "train/loss", 0.5) in dvclive


def test_no_service_writes_to_stdout(tmp_path, capsys, swanlab, mlflow, comet_ml, clearml, aim, dvclive):
    for name in ("swanlab", "mlflow", "comet_ml", "clearml", "aim", "dvclive"):
        twice(name, tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "says something" in shown.err


def test_a_name_that_accelerate_does_not_know_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no tracker 'mlfow'. Did you mean `mlflow`\? Valid: aim, "):
        check(["tensorboard", "mlfow"])


def test_a_tracker_that_somebody_registered_is_used_by_its_name(tmp_path, monkeypatch):
    calls: list[Any] = []

    class Mine(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", True, None

        def __init__(self, run_name: str, logging_dir: str) -> None:
            super().__init__()
            calls.append((run_name, logging_dir))

        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            calls.append((values, step))

        def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
            calls.append(([image.shape for image in values["samples"]], step))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Mine)
    twice("mine", tmp_path)
    assert calls[:3] == [("dogs", str(tmp_path / "logs")), ({"train/loss": 0.5}, 5), ([(6, 8, 3)], 5)]


def test_every_tracker_of_accelerate_is_known_by_name():
    """A service that a new accelerate brings is opened like a registered class until its arguments are written down."""
    assert set(_ARGUMENTS) == set(LOGGER_TYPE_TO_CLASS)
