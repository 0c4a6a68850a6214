"""Where a run is watched: TensorBoard's files, Weights & Biases, trackio. Only the process that writes has trackers."""

import contextlib
import importlib
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from ftk import storage
from ftk.configs.load import redact
from ftk.configs.schema import RunConfig
from ftk.errors import ConfigError, EnvironmentFault

LOGGER = logging.getLogger("ftk")

IDENTITIES = "trackers.json"
"""In the run's folder: under which ids the services know the run, so that a resumed run goes on there."""


class Tracker(Protocol):
    """One place where a run is watched. Whatever a method raises ends this tracker and not the training."""

    name: str

    def start(self, step: int) -> None:
        """Before the first update of this process. What was told of later steps no longer holds."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values after so many steps; a slash in a name groups it."""

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Sample images, each with the prompt that it was drawn from."""

    def close(self) -> None:
        """Hand over what is left."""


def open_trackers(config: RunConfig, directory: Path) -> list[Tracker]:
    """The trackers that `train.trackers` names; they see the configuration with its secrets redacted.

    Raises:
        ConfigError: a tracker's library is not installed.
        EnvironmentFault: a tracker cannot be opened: nobody is logged in, or there is no network.
    """
    settings = redact(config.model_dump(mode="json"))
    with contextlib.ExitStack() as opened:
        trackers: list[Tracker] = []
        for name in dict.fromkeys(config.train.trackers):
            tracker = _OPENERS[name](config, directory, settings)
            opened.callback(tracker.close)
            trackers.append(tracker)
        opened.pop_all()
    return trackers


class TensorBoard:
    """Event files in the run's `logs/`."""

    name = "tensorboard"

    def __init__(self, config: RunConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        self._writer_class = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._summary = _library("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._directory = directory / "logs"
        self._settings = settings
        self._captions: Sequence[str] = ()
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Begin a file that hides what earlier ones say of later steps."""
        self._writer = self._writer_class(str(self._directory), purge_step=step + 1)
        self._writer.add_text(
            "config", _preformatted(yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True)), step
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        # What `add_scalar` writes, in one event for all values: a tenth of its time, which counts where steps are short.
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=points), step)

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """One picture a prompt; the prompts as a text of their own."""
        for number, image in enumerate(images):
            self._writer.add_image(f"samples/{number}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if captions != self._captions:
            lines = "\n".join(f"{number}: {caption}" for number, caption in enumerate(captions))
            self._writer.add_text("samples/prompts", _preformatted(lines), step)
            self._captions = captions

    def close(self) -> None:
        """Write what is queued."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """Weights & Biases; `WANDB_MODE`, `WANDB_API_KEY` and its other variables hold as ever."""

    name = "wandb"

    def __init__(self, config: RunConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        self._wandb = _library("wandb", "ftk[wandb]")
        identity = _identity(directory, self.name) or secrets.token_hex(4)
        with _opening(self.name, "Log in with `wandb login`, set WANDB_MODE=offline"):
            self._run = self._wandb.init(
                project=config.train.project, name=config.run, id=identity, dir=str(directory),
                config=dict(settings), resume="allow",
            )  # fmt: skip
        _remember(directory, self.name, identity)

    def start(self, step: int) -> None:
        """Nothing: W&B refuses steps that it has, and a resumed run repeats them exactly."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """A panel with all pictures of this step."""
        pictures = [self._wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._run.log({"samples": pictures}, step=step)

    def close(self) -> None:
        """Upload what is left; a run that ends in an error is shown as failed."""
        self._run.finish(exit_code=0 if sys.exception() is None else 1)


class Trackio:
    """trackio: a local dashboard, or a Space of the Hugging Face Hub where `TRACKIO_SPACE_ID` names one."""

    name = "trackio"

    def __init__(self, config: RunConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        self._trackio = _library("trackio", "ftk[trackio]")
        is_known = _identity(directory, self.name) is not None
        # It prints to stdout, where `--json` has its report.
        with contextlib.redirect_stdout(sys.stderr), _opening(self.name, "See what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say"):
            self._run = self._trackio.init(
                project=config.train.project, name=config.run, config=dict(settings),
                resume="allow" if is_known else "never", embed=False,
            )  # fmt: skip
        _remember(directory, self.name, config.run)

    def start(self, step: int) -> None:
        """Nothing: trackio keeps all that it was told, and a resumed run repeats it exactly."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """One picture a prompt."""
        pairs = enumerate(zip(images, captions, strict=True))
        pictures = {f"samples/{number}": self._trackio.Image(image, caption=caption) for number, (image, caption) in pairs}
        self._run.log(pictures, step=step)

    def close(self) -> None:
        """Write what is queued."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


_OPENERS: Mapping[str, Callable[[RunConfig, Path, Mapping[str, Any]], Tracker]] = {
    one.name: one for one in (TensorBoard, Wandb, Trackio)
}


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.rpartition(".")[2]
        raise ConfigError(
            f"train.trackers: {name} cannot be imported ({error}). Install it with `pip install '{package}'`, or take it out "
            f"of train.trackers."
        ) from None


@contextlib.contextmanager
def _opening(name: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # These libraries let through whatever their network clients and their own checks raise.
        reason = next(iter(str(error).splitlines()), "")
        raise EnvironmentFault(
            f"train.trackers: {name} could not be opened ({type(error).__name__}: {reason}). {advice}, or take it out of "
            f"train.trackers."
        ) from error


def _identities(directory: Path) -> dict[str, str]:
    path = directory / IDENTITIES
    try:
        found = storage.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is damaged (%s): the trackers begin a new run", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _identity(directory: Path, name: str) -> str | None:
    found = _identities(directory).get(name)
    return found if isinstance(found, str) else None


def _remember(directory: Path, name: str, identity: str) -> None:
    storage.commit_json(directory / IDENTITIES, {**_identities(directory), name: identity})


def _preformatted(text: str) -> str:
    """Markdown that shows `text` as it is: TensorBoard renders texts."""
    return "\n".join(f"    {line}" for line in text.splitlines())
