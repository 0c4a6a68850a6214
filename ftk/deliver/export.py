"""`ftk export`: what a run has learned, in another format; and which of its weights that is."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

import ftk
from ftk.deliver import card, metadata
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import peft_directory
from ftk.methods.base import Export
from ftk.models.base import Model, load_model
from ftk.progress import human_bytes
from ftk.run import Run
from ftk.train import checkpoint as checkpoints
from ftk.train import optim
from ftk.train.checkpoint import Checkpoint
from ftk.train.inputs import with_rates
from ftk.train.memory import DTYPES
from ftk.train.order import keyed_seed

LOGGER = logging.getLogger("ftk")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written; `files` lie in `directory`, with the model card and its pictures among them."""

    step: int
    format: str
    directory: str
    files: list[str]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of a run's weights are delivered, and in which precision.

    Attributes:
        best: the step with the lowest validation loss, instead of the newest.
        step: that of a checkpoint.
        dtype: of what is written; fp32 of an adapter by default, whose masters are in it, and the run's precision of a model.
    """

    best: bool = False
    step: int | None = None
    dtype: Dtype | None = None

    @property
    def is_default(self) -> bool:
        """Whether it is what lies in a run's adapter/."""
        return self == Choice()


def export(
    run: Run,
    form: str | None = None,
    out: Path | None = None,
    choice: Choice = Choice(),
    repository: str | None = None,
) -> ExportReport:
    """Write the trained weights in a delivery format, with a model card.

    Args:
        form: the method's first by default.
        out: the folder; `exports/FORMAT` of the run by default.
        repository: of the Hub, from which the card is to load the weights.

    Raises:
        CheckpointError: there is no checkpoint to deliver.
        ConfigError: the method cannot be written so; the message says why, and what works.
    """
    checkpoint = find_checkpoint(run, choice)
    directory = run.locate(run.trained_components)
    form = form or run.formats[0]
    target = out or run.paths.run / "exports" / form
    subject = metadata.subject(run, checkpoint.step, directory, checkpoint.settings.get("train"))
    files = _write_weights(run, checkpoint, Export(directory=target, form=form, metadata=metadata.of(subject)), choice.dtype)
    files = [*files, *card.write(subject, target, card.loading(subject, form, repository))]
    _hint_at_license(run, directory)
    return ExportReport(
        step=checkpoint.step,
        format=form,
        directory=str(target),
        files=[path.relative_to(target).as_posix() for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
    )


def _write_weights(run: Run, checkpoint: Checkpoint, export: Export, dtype: Dtype | None) -> list[Path]:
    directory = run.locate(run.trained_components)
    if run.trains_base:
        with trained(run, directory, checkpoint, None if dtype is None else getattr(torch, dtype)) as model:
            return run.method.export(model, run.settings, export)
    with trained(run, directory, checkpoint, in_fp32=True) as model:
        files = run.method.export(model, run.settings, export)
    if dtype not in (None, "float32"):
        for path in files:
            if path.suffix == ".safetensors":
                _round(path, getattr(torch, str(dtype)))
    return files


def _round(path: Path, dtype: torch.dtype) -> None:
    """Round the tensors of a file that was just written; single numbers such as alpha stay as they are.

    Raises:
        ConfigError: a value is too large for the precision.
    """
    file: Any
    rounded: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        header = {name: value for name, value in (file.metadata() or {}).items() if name != "format"}
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            tensor = file.get_tensor(name)
            is_rounded = tensor.is_floating_point() and tensor.ndim > 0
            rounded[name] = tensor.to(dtype) if is_rounded else tensor
            if is_rounded and not bool(rounded[name].isfinite().all()):
                raise ConfigError(
                    f"--dtype {str(dtype).removeprefix('torch.')}: {name} has values too large for it. Use bfloat16."
                )
    peft_directory.commit_tensors(path, rounded, header)


def plan(
    run: Run,
    form: str | None = None,
    choice: Choice = Choice(),
    repository: str | None = None,
) -> dict[str, Any]:
    """What `export` would write, found out by writing it to the system's temporary folder and throwing it away."""
    place = run.paths.run
    if not place.is_dir():
        raise CheckpointError(f"{place} does not exist: run `ftk train RUN.yaml` first.")
    with tempfile.TemporaryDirectory(prefix="ftk-export-") as folder:
        report = export(run, form, Path(folder), choice, repository)
        sizes = {name: (Path(folder) / name).stat().st_size for name in report.files}
    return {
        "step": report.step,
        "format": report.format,
        "files": [f"{name}, {human_bytes(size)}" for name, size in sizes.items()],
        "num_bytes": report.num_bytes,
    }


@contextmanager
def chosen_adapter(run: Run, choice: Choice) -> Iterator[Path]:
    """A folder with these weights in the method's first format, which `Method.load_into` reads: a run's adapter/ by default.

    Raises:
        CheckpointError: there are none.
    """
    if choice.is_default:
        if not run.paths.adapter.is_dir():
            raise CheckpointError(f"{run.paths.adapter} does not exist: run `ftk train` first.")
        yield run.paths.adapter
        return
    checkpoint = find_checkpoint(run, choice)
    with tempfile.TemporaryDirectory(prefix="ftk-weights-") as folder:
        export = Export(directory=Path(folder), form=run.formats[0], metadata={"ftk_version": ftk.__version__})
        _write_weights(run, checkpoint, export, choice.dtype)
        yield Path(folder)


def _hint_at_license(run: Run, model: Path) -> None:
    theirs = card.base_license(model)
    if run.config.card.license is None and theirs is not None:
        LOGGER.info("card.license is not set, so the card names none. The base model's own card says %s.", theirs)


def run_dtype(run: Run) -> torch.dtype:
    """The precision of the frozen weights, which deliveries of whole models have too.

    Which one `auto` was is in the checkpoints.
    """
    precision = run.config.train.precision
    name = checkpoints.noted_dtype(run.paths.checkpoints) if precision == "auto" else DTYPES[precision]
    dtype: torch.dtype = getattr(torch, name or "bfloat16")
    return dtype


def find_checkpoint(run: Run, choice: Choice) -> Checkpoint:
    """The newest whole checkpoint of a run, that of a step, or the one with the lowest validation loss.

    Raises:
        CheckpointError: there is none.
        ConfigError: a step and the best one are asked for at once.
    """
    directory = run.paths.checkpoints
    if choice.best and choice.step is not None:
        raise ConfigError("--best and --step name one checkpoint each: leave one of them out.")
    if choice.step is not None:
        steps = [int(path.name) for path in checkpoints.all_of(directory)]
        if choice.step not in steps:
            listed = f"There are those of step {', '.join(map(str, steps))}." if steps else "There are none."
            raise CheckpointError(f"--step {choice.step}: {directory} holds no checkpoint of this step. {listed}")
        return checkpoints.read(directory / f"{choice.step:08d}")
    if not choice.best:
        newest = checkpoints.latest(directory)
        if newest is None:
            raise CheckpointError(f"{directory} holds no whole checkpoint: run `ftk train RUN.yaml` first.")
        return newest
    step = checkpoints.best_step(directory)
    if step is None:
        raise CheckpointError(f"{directory} knows no best step: it is measured with train.validation.share above 0.")
    return checkpoints.read(directory / f"{step:08d}")


@contextmanager
def trained(
    run: Run, directory: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, in_fp32: bool = False
) -> Iterator[Model]:
    """The base model in `directory` with what was trained as it is delivered: with `ema_decay` the average.

    Args:
        dtype: of the model, the run's precision by default.
        in_fp32: what was trained is in fp32 as its masters are, whatever the model is in: to be written, not to predict with.
    """
    model = load_model(run.family, directory, run.encoders, dtype or run_dtype(run), torch.device("cpu"))
    parameters = run.method.attach(model, run.settings, keyed_seed(run.config.train.seed, "adapter"))
    for module in model.components.values():
        module.eval()
    for parameter in parameters.values() if in_fp32 else ():
        parameter.data = parameter.data.float()
    optimizer = optim.MasterOptimizer(parameters, with_rates(run))
    tensors = checkpoint.tensors()
    if tensors[0].keys() != optimizer.weights().keys():
        raise CheckpointError(
            f"{checkpoint.path} holds other parameters than method {run.method.name} trains with these settings. Name the run "
            f"and the settings that it was trained with."
        )
    peft_directory.refuse_not_finite(tensors[0], checkpoint.path)
    optimizer.restore(*tensors, checkpoint.optimizer_facts)
    with optimizer.averaged():
        yield model
