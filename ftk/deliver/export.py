"""`ftk export` and `ftk merge`: what a run has learned, in another format, or folded into a pipeline of its own."""

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftk import locations, storage
from ftk.deliver import card, metadata
from ftk.errors import CheckpointError, ConfigError, ModelError
from ftk.methods.base import Export
from ftk.models.base import Model, load_model
from ftk.progress import human_bytes
from ftk.run import Run
from ftk.train import checkpoint as checkpoints
from ftk.train import optim
from ftk.train.checkpoint import Checkpoint
from ftk.train.data import conditions_of
from ftk.train.inputs import open_cache, with_rates
from ftk.train.order import keyed_seed

LOGGER = logging.getLogger("ftk")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far a merged model's prediction may be from the adapted one's, as a share of its root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written; `files` lie in `directory`, with the model card and its pictures among them."""

    step: int
    format: str
    directory: str
    files: list[str]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Where the merged pipeline lies, and how far its prediction is from the adapted one's (a share of its RMS)."""

    step: int
    directory: str
    difference: float
    tolerance: float
    dtype: str
    num_bytes: int


def export(
    run: Run, form: str | None = None, out: Path | None = None, best: bool = False, repository: str | None = None
) -> ExportReport:
    """Write the trained weights in a delivery format, with a model card.

    Args:
        form: the method's first by default.
        out: the folder; `exports/FORMAT` of the run by default.
        best: the step with the lowest validation loss, instead of the newest.
        repository: of the Hub, from which the card is to load the weights.

    Raises:
        CheckpointError: there is no checkpoint to deliver.
        ConfigError: the method cannot be written so; the message says why, and what works.
    """
    checkpoint = find_checkpoint(run, best)
    directory = run.locate(run.trained_components)
    form = form or run.method.FORMATS[0]
    target = out or run.paths.run / "exports" / form
    subject = metadata.subject(run, checkpoint.step, directory, checkpoint.settings.get("train"))
    with trained(run, directory, checkpoint) as model:
        files = run.method.export(model, run.settings, Export(directory=target, form=form, metadata=metadata.of(subject)))
    files = [*files, *card.write(subject, target, card.loading(subject, form, repository))]
    _hint_at_license(run, directory)
    return ExportReport(
        step=checkpoint.step,
        format=form,
        directory=str(target),
        files=[path.relative_to(target).as_posix() for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
    )


def plan(run: Run, form: str | None = None, best: bool = False, repository: str | None = None) -> dict[str, Any]:
    """What `export` would write, found out by writing it to the system's temporary folder and throwing it away."""
    place = run.paths.run
    if not place.is_dir():
        raise CheckpointError(f"{place} does not exist: run `ftk train RUN.yaml` first.")
    with tempfile.TemporaryDirectory(prefix="ftk-export-") as folder:
        report = export(run, form, Path(folder), best, repository)
        sizes = {name: (Path(folder) / name).stat().st_size for name in report.files}
    return {
        "step": report.step,
        "format": report.format,
        "files": [f"{name}, {human_bytes(size)}" for name, size in sizes.items()],
        "num_bytes": report.num_bytes,
    }


def _hint_at_license(run: Run, model: Path) -> None:
    theirs = card.base_license(model)
    if run.config.card.license is None and theirs is not None:
        LOGGER.info("card.license is not set, so the card names none. The base model's own card says %s.", theirs)


def merge(run: Run, out: Path, best: bool = False) -> MergeReport:
    """Write the base model with what was trained folded into its weights, as a pipeline directory.

    Nothing is written unless the merged model predicts what the adapted one does, on a sample of the cache.

    Raises:
        CheckpointError: there is no checkpoint to merge.
        ConfigError: `out` holds something, or the method adds nothing to the base weights.
        ModelError: a merged weight is not finite, or the predictions differ.
    """
    target = locations.local_path(str(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {target} holds something already. Name a new folder.")
    checkpoint = find_checkpoint(run, best)
    directory = run.locate(run.all_components)
    with trained(run, directory, checkpoint) as model:
        adapted = _prediction(run, model)
        run.method.merge(model)
        for name, module in model.components.items():
            _refuse_infinite(name, module)
        merged = _prediction(run, model)
        difference = float((merged - adapted).square().mean().sqrt() / adapted.square().mean().sqrt())
        tolerance = TOLERANCE[_dtype(run)]
        if not difference <= tolerance:
            raise ModelError(
                f"The merged model's prediction is {difference:.2g} of its size away from the adapted one's, where "
                f"{tolerance:.2g} is allowed. Nothing was written. Try --set train.precision=fp32."
            )
        _write(run, directory, model, target, checkpoint.step)
    return MergeReport(
        step=checkpoint.step,
        directory=str(target),
        difference=difference,
        tolerance=tolerance,
        dtype=str(_dtype(run)).removeprefix("torch."),
        num_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
    )


def _dtype(run: Run) -> torch.dtype:
    return torch.float32 if run.config.train.precision == "fp32" else torch.bfloat16


def find_checkpoint(run: Run, best: bool) -> Checkpoint:
    """The newest whole checkpoint of a run, or the one with the lowest validation loss.

    Raises:
        CheckpointError: there is none.
    """
    directory = run.paths.checkpoints
    if not best:
        newest = checkpoints.latest(directory)
        if newest is None:
            raise CheckpointError(f"{directory} holds no whole checkpoint: run `ftk train RUN.yaml` first.")
        return newest
    step = checkpoints.best_step(directory)
    if step is None:
        raise CheckpointError(f"{directory} knows no best step: it is measured with train.validation.share above 0.")
    return checkpoints.read(directory / f"{step:08d}")


@contextmanager
def trained(run: Run, directory: Path, checkpoint: Checkpoint) -> Iterator[Model]:
    """The base model in `directory` with what was trained as it is delivered: with `ema_decay` the average."""
    model = load_model(run.family, directory, run.encoders, _dtype(run), torch.device("cpu"))
    parameters = run.method.attach(model, run.settings, keyed_seed(run.config.train.seed, "adapter"))
    for module in model.components.values():
        module.eval()
    optimizer = optim.MasterOptimizer(parameters, with_rates(run))
    tensors = checkpoint.tensors()
    if tensors[0].keys() != optimizer.weights().keys():
        raise CheckpointError(
            f"{checkpoint.path} holds other parameters than method {run.method.name} trains with these settings. Name the run "
            f"and the settings that it was trained with."
        )
    optimizer.restore(*tensors, checkpoint.optimizer_facts)
    with optimizer.averaged():
        yield model


def _prediction(run: Run, model: Model) -> torch.Tensor:
    """[1,C,H,W] fp32: of the cache's first sample, half noise, through the same conditions as in training."""
    schedule, dtype = model.schedule, _dtype(run)
    store = open_cache(run)
    try:
        latents = store.latents(0)[0].float()
        conditions = conditions_of(store, run, [0], [0], dtype)
        sigma_B = schedule.sigmas[len(schedule.sigmas) // 2].reshape(1)
        signal_B, noise_B = schedule.scales(sigma_B, torch.float32)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy_BCHW = (signal_B * latents + noise_B * noise)[None].to(dtype)
        with torch.no_grad():
            return run.method.predict(model, noisy_BCHW, sigma_B, conditions)
    finally:
        store.close()


def _refuse_infinite(component: str, module: Any) -> None:
    for name, parameter in module.named_parameters():
        if not math.isfinite(float(parameter.detach().float().abs().max())):
            raise ModelError(
                f"The merged weight {name} of the {component} is not finite. Nothing was written. Was the training's loss "
                f"finite?"
            )


def _write(run: Run, base: Path, model: Model, directory: Path, step: int) -> None:
    attribute = run.family.denoiser_attribute
    merged = {attribute: model.denoiser, **model.encoders}
    with storage.committing_directory(directory) as temporary:
        for entry in sorted(base.iterdir()):
            if entry.is_dir() and entry.name not in merged:
                shutil.copytree(entry, temporary / entry.name)
            elif entry.is_file():
                shutil.copyfile(entry, temporary / entry.name)
        for name, module in merged.items():
            module.save_pretrained(temporary / name)
        subject = metadata.Subject(run=run, step=step, model=base)
        card.write(subject, temporary, card.merged_loading(), merged=True)
