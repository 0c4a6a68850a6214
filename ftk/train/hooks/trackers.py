"""Where a run is watched: the trackers that accelerate knows, by name. Only the process that writes has trackers.

accelerate's classes open a service, log numbers and close it. Added here: what each service calls the run, so that a resumed
run continues there; prompts beside the images; and errors that say what to do.
"""

import contextlib
import importlib
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from ftk import storage
from ftk.configs.load import redact
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault, did_you_mean
from ftk.train import launch

LOGGER = logging.getLogger("ftk")

IDENTITIES = "trackers.json"
"""In the run's folder: under which ids the services know the run, so that a resumed run goes on there."""
_TENSORBOARD, _WANDB = "tensorboard", "wandb"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a service is told when it is opened."""

    name: str
    project: str
    directory: Path
    settings: dict[str, Any]
    identity: str
    is_new: bool
    step: int = 0


# Arguments of accelerate's tracker classes, which pass those that they do not know on to the service. accelerate's `run_name`
# is the project of most services.
_ARGUMENTS: Mapping[str, Callable[[_Run], dict[str, Any]]] = {
    # purge_step hides what earlier event files say of steps that this run repeats.
    _TENSORBOARD: lambda run: {"run_name": "logs", "logging_dir": str(run.directory), "purge_step": run.step + 1},
    # W&B ignores steps that it has; a resumed run repeats them exactly.
    _WANDB: lambda run: {
        "run_name": run.project, "name": run.name, "id": run.identity, "resume": "allow", "config": run.settings,
        "dir": str(run.directory),
    },
    "trackio": lambda run: {
        "run_name": run.project, "name": run.name, "resume": "never" if run.is_new else "allow", "config": run.settings,
        "embed": False,
    },
    "swanlab": lambda run: {
        "run_name": run.project, "experiment_name": run.name, "id": run.identity, "resume": "allow", "config": run.settings,
        "logdir": str(run.directory / "swanlog"),
    },
    "comet_ml": lambda run: {"run_name": run.project, "experiment_key": run.identity},
    "mlflow": lambda run: {
        "experiment_name": run.project, "run_name": run.name, "run_id": None if run.is_new else run.identity,
    },
    "clearml": lambda run: {
        "run_name": run.project, "task_name": run.name, "reuse_last_task_id": False,
        "continue_last_task": False if run.is_new else run.identity,
    },
    "aim": lambda run: {
        "run_name": run.name, "logging_dir": str(run.directory / "logs"), "experiment": run.project,
        "run_hash": None if run.is_new else run.identity,
    },
    "dvclive": lambda run: {"run_name": run.name, "dir": str(run.directory / "dvclive"), "resume": not run.is_new},
}  # fmt: skip
# Comet takes keys of 32 to 50 characters, SwanLab of 21.
_IDENTITY_LENGTHS = {_WANDB: 8, "comet_ml": 32, "swanlab": 21}
# These services choose a run's id themselves.
_CHOSEN_IDENTITY: Mapping[str, Callable[[Any], str]] = {
    "mlflow": lambda active_run: active_run.info.run_id,
    "clearml": lambda task: task.id,
    "aim": lambda aim_run: aim_run.hash,
}
_GIVEN_SETTINGS_WHEN_OPENED = {_WANDB, "trackio", "swanlab"}


class Tracker:
    """One service that shows the run. Whatever a method raises ends this tracker and not the training."""

    def __init__(self, name: str, run: _Run) -> None:
        self.name = name
        self._run = run
        self._tracker: Any = None
        self._prompts: Sequence[str] = ()
        self._can_show_images = True

    def open(self) -> str:
        """Connect to the service; returns the id under which it knows the run.

        Raises:
            ImportError: its library is not installed.
        """
        if self.name == _TENSORBOARD:
            # It only writes files, and needs the first step to open one.
            importlib.import_module(_TENSORBOARD)
            return ""
        with _stdout_kept_clean():
            self._tracker = _build(self.name, self._run)
            self._tracker.start()
            if self._run.is_new and self.name not in _GIVEN_SETTINGS_WHEN_OPENED:
                self._tracker.store_init_configuration(_flat(self._run.settings))
        choose = _CHOSEN_IDENTITY.get(self.name)
        return choose(self._tracker.tracker) if choose else self._run.identity

    def start(self, step: int) -> None:
        """Before the first update of this process. What was told of later steps no longer holds."""
        if self.name != _TENSORBOARD:
            return
        self._tracker = _build(self.name, replace(self._run, step=step))
        self._tracker.start()
        # As a text: store_init_configuration would list a second run, whose name is the time.
        settings = yaml.safe_dump(self._run.settings, sort_keys=False, allow_unicode=True)
        self._tracker.log({"config": _preformatted(settings)}, step=step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values after `step` updates; a slash in a name groups it."""
        with _stdout_kept_clean():
            self._tracker.log(dict(values), step=step)

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Log sample images, each with its prompt, if accelerate can for this service."""
        show = _IMAGES.get(self.name, _show_arrays if hasattr(self._tracker, "log_images") else None)
        if show is None:
            if self._can_show_images:
                LOGGER.info("%s gets no sample images: accelerate has no way to log them there", self.name)
            self._can_show_images = False
            return
        with _stdout_kept_clean():
            show(self._tracker, step, images, captions)
            if self.name == _TENSORBOARD and captions != self._prompts:
                lines = "\n".join(f"{number}: {caption}" for number, caption in enumerate(captions))
                self._tracker.log({"samples/prompts": _preformatted(lines)}, step=step)
                self._prompts = captions

    def close(self) -> None:
        """Upload or write what is left; W&B shows a run that ends in an error as failed."""
        if self._tracker is None:
            return
        with _stdout_kept_clean():
            if self.name == _WANDB and sys.exception() is not None:
                self._tracker.tracker.finish(exit_code=1)
            else:
                self._tracker.finish()


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name in `train.trackers` that accelerate does not know."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise ConfigError(
                f"train.trackers: accelerate knows no tracker {name!r}.{hint} Valid: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )


def open_trackers(config: RunConfig, directory: Path) -> list[Tracker]:
    """The trackers that `train.trackers` names; they see the configuration with its secrets redacted.

    Raises:
        ConfigError: a name that accelerate does not know, or a library that is not installed.
        EnvironmentFault: a tracker cannot be opened: nobody is logged in, or there is no network.
    """
    check(config.train.trackers)
    launch.ensure_state()
    settings = redact(config.model_dump(mode="json"))
    with contextlib.ExitStack() as opened:
        trackers: list[Tracker] = []
        for name in dict.fromkeys(config.train.trackers):
            known = _identities(directory).get(name)
            run = _Run(
                name=config.run,
                project=config.train.project,
                directory=directory,
                settings=settings,
                identity=known or secrets.token_hex(16)[: _IDENTITY_LENGTHS.get(name)],
                is_new=known is None,
            )
            tracker = Tracker(name, run)
            with _explaining(name):
                identity = tracker.open()
            opened.callback(tracker.close)
            if identity:
                storage.commit_json(directory / IDENTITIES, {**_identities(directory), name: identity})
            trackers.append(tracker)
        opened.pop_all()
    return trackers


def _build(name: str, run: _Run) -> Any:
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if name in _ARGUMENTS:
        return tracker_class(**_ARGUMENTS[name](run))
    # A class that somebody registered is called as `Accelerator.init_trackers` does.
    folder = (str(run.directory / "logs"),) if tracker_class.requires_logging_directory else ()
    return tracker_class(run.project, *folder)


def _show_as_media(name: str, in_a_panel: bool) -> Callable[[Any, int, Sequence[Image.Image], Sequence[str]], None]:
    """By the service's own image class, which takes a caption; accelerate's `log_images` does not."""

    def show(tracker: Any, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        media = importlib.import_module(name).Image
        shown = [media(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        tracker.log({"samples": shown} if in_a_panel else _numbered(shown), step=step)

    return show


def _show_in_tensorboard(tracker: Any, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    arrays_NHWC = [np.asarray(image.convert("RGB"))[None] for image in images]
    tracker.log_images(_numbered(arrays_NHWC), step=step, dataformats="NHWC")


def _show_in_aim(tracker: Any, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    tracker.log_images(_numbered(list(zip(images, captions, strict=True))), step=step)


def _show_in_clearml(tracker: Any, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    tracker.log_images(_numbered(images), step=step)


def _show_arrays(tracker: Any, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    tracker.log_images({"samples": [np.asarray(image.convert("RGB")) for image in images]}, step=step)


def _numbered(items: Sequence[Any]) -> dict[str, Any]:
    return {f"samples/{number}": item for number, item in enumerate(items)}


_IMAGES: Mapping[str, Callable[[Any, int, Sequence[Image.Image], Sequence[str]], None]] = {
    _TENSORBOARD: _show_in_tensorboard,
    _WANDB: _show_as_media(_WANDB, in_a_panel=True),
    "swanlab": _show_as_media("swanlab", in_a_panel=True),
    "trackio": _show_as_media("trackio", in_a_panel=False),
    "aim": _show_in_aim,
    "clearml": _show_in_clearml,
}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: services take single values, and lists as text."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple)) else value
    return flat


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send what a service prints to stderr: with `--json` stdout holds the report alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _explaining(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = name if name == _TENSORBOARD else f"ftk[{name}]"
        raise ConfigError(
            f"train.trackers: {name} cannot be imported ({error}). Install it with `pip install '{package}'`, or take it out "
            f"of train.trackers."
        ) from None
    except Exception as error:
        # These libraries let through whatever their network clients and their own checks raise.
        reason = next(iter(str(error).splitlines()), "")
        raise EnvironmentFault(
            f"train.trackers: {name} could not be opened ({type(error).__name__}: {reason}). Log in as {name} describes, or "
            f"take it out of train.trackers."
        ) from error


def _identities(directory: Path) -> dict[str, str]:
    path = directory / IDENTITIES
    try:
        identities = storage.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is damaged (%s): the trackers begin a new run", path, error)
        return {}
    if not isinstance(identities, dict):
        return {}
    return {name: identity for name, identity in identities.items() if isinstance(identity, str)}


def _preformatted(text: str) -> str:
    """Markdown that shows `text` as it is: TensorBoard renders texts."""
    return "\n".join(f"    {line}" for line in text.splitlines())
