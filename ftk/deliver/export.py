"""`ftk export` and `ftk merge`: what a run has learned, in another format, or folded into a pipeline of its own."""

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftk import locations, storage
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig
from ftk.deliver import card, metadata
from ftk.errors import CheckpointError, ConfigError, ModelError
from ftk.methods import base as methods
from ftk.methods.base import DENOISER
from ftk.models import base as models
from ftk.models.base import Family, TrainsEncoders
from ftk.progress import human_bytes
from ftk.train import checkpoint, optim
from ftk.train.checkpoint import Checkpoint
from ftk.train.inputs import load_components, open_cache, with_rates
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
    config: RunConfig, form: str | None = None, out: Path | None = None, best: bool = False, repository: str | None = None
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
    family, (method, settings) = models.get(config.model.family), methods.parse(config.method)
    found = find_checkpoint(config, best)
    encoders = [name for name in method.needs(family, settings) if name != DENOISER]
    model = models.locate(config.model, (*family.denoiser_components, *encoders))
    form = form or method.FORMATS[0]
    directory = out or run_path(config) / "exports" / form
    subject = metadata.subject(config, found.step, model, found.settings.get("train"))
    with trained(config, family, model, found) as components:
        files = method.export(components, family, settings, directory, form, metadata.of(subject))
    files = [*files, *card.write(subject, directory, card.loading(subject, form, repository))]
    _hint_at_license(config, model)
    return ExportReport(
        step=found.step,
        format=form,
        directory=str(directory),
        files=[path.relative_to(directory).as_posix() for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
    )


def plan(config: RunConfig, form: str | None = None, best: bool = False, repository: str | None = None) -> dict[str, Any]:
    """What `export` would write, found out by writing it beside the run's exports and throwing it away."""
    place = run_path(config)
    if not place.is_dir():
        raise CheckpointError(f"{place} does not exist: run `ftk train RUN.yaml` first.")
    with tempfile.TemporaryDirectory(prefix=storage.TEMPORARY_PREFIX, dir=place) as folder:
        report = export(config, form, Path(folder), best, repository)
        sizes = {name: (Path(folder) / name).stat().st_size for name in report.files}
    return {
        "step": report.step,
        "format": report.format,
        "files": [f"{name}, {human_bytes(size)}" for name, size in sizes.items()],
        "num_bytes": report.num_bytes,
    }


def _hint_at_license(config: RunConfig, model: Path) -> None:
    theirs = card.base_license(model)
    if config.card.license is None and theirs is not None:
        LOGGER.info("card.license is not set, so the card names none. The base model's own card says %s.", theirs)


def merge(config: RunConfig, out: Path, best: bool = False) -> MergeReport:
    """Write the base model with what was trained folded into its weights, as a pipeline directory.

    Nothing is written unless the merged model predicts what the adapted one does, on a sample of the cache.

    Raises:
        CheckpointError: there is no checkpoint to merge.
        ConfigError: `out` holds something.
        ModelError: a merged weight is not finite, or the predictions differ.
    """
    directory = locations.local_path(str(out))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--out {directory} holds something already. Name a new folder.")
    family, (method, _) = models.get(config.model.family), methods.parse(config.method)
    found = find_checkpoint(config, best)
    everything = (*family.latent_components, *family.text_components, *family.denoiser_components)
    model = models.locate(config.model, everything)
    with trained(config, family, model, found) as components:
        adapted = _prediction(config, family, model, components)
        method.merge(components)
        for name, module in components.items():
            _refuse_infinite(name, module)
        merged = _prediction(config, family, model, components)
        difference = float((merged - adapted).square().mean().sqrt() / adapted.square().mean().sqrt())
        tolerance = TOLERANCE[_dtype(config)]
        if not difference <= tolerance:
            raise ModelError(
                f"The merged model's prediction is {difference:.2g} of its size away from the adapted one's, where "
                f"{tolerance:.2g} is allowed. Nothing was written. Try --set train.precision=fp32."
            )
        _write(config, family, model, components, directory, found.step)
    return MergeReport(
        step=found.step,
        directory=str(directory),
        difference=difference,
        tolerance=tolerance,
        dtype=str(_dtype(config)).removeprefix("torch."),
        num_bytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    )


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.train.precision == "fp32" else torch.bfloat16


def find_checkpoint(config: RunConfig, best: bool) -> Checkpoint:
    directory = run_path(config) / "checkpoints"
    if not best:
        found = checkpoint.latest(directory)
        if found is None:
            raise CheckpointError(f"{directory} holds no whole checkpoint: run `ftk train RUN.yaml` first.")
        return found
    step = checkpoint.best_step(directory)
    if step is None:
        raise CheckpointError(f"{directory} knows no best step: it is measured with train.validation.share above 0.")
    return checkpoint.read(directory / f"{step:08d}")


@contextmanager
def trained(config: RunConfig, family: Family, model: Path, found: Checkpoint) -> Iterator[Mapping[str, Any]]:
    """The denoiser with what was trained as it is delivered: with `ema_decay` the average."""
    method, settings = methods.parse(config.method)
    components = load_components(method.needs(family, settings), family, model, _dtype(config), torch.device("cpu"))
    parameters = method.attach(components, family, settings, keyed_seed(config.train.seed, "adapter"))
    for module in components.values():
        module.eval()
    optimizer = optim.MasterOptimizer(parameters, with_rates(config.train, method, settings))
    tensors = found.tensors()
    if tensors[0].keys() != optimizer.weights().keys():
        raise CheckpointError(
            f"{found.path} holds other parameters than method {config.method.name} trains with these settings. Name the run "
            f"and the settings that it was trained with."
        )
    optimizer.restore(*tensors, found.optimizer_facts)
    with optimizer.averaged():
        yield components


def _prediction(config: RunConfig, family: Family, model: Path, components: Mapping[str, Any]) -> torch.Tensor:
    """[1,C,H,W] fp32: of the cache's first sample, half noise."""
    schedule, dtype = family.load_schedule(model), _dtype(config)
    store = open_cache(config, family)
    try:
        mean, text = store.latents(0)[0].float(), store.text(0)
        texts = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in text.items()}
        sigma_B = schedule.sigmas[len(schedule.sigmas) // 2].reshape(1)
        signal_B, noise_B = schedule.scales(sigma_B, torch.float32)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        noisy_BCHW = (signal_B * mean + noise_B * noise)[None].to(dtype)
        collated = family.collate_texts([texts])
        encoders = {name: module for name, module in components.items() if name != DENOISER}
        with torch.no_grad():
            if encoders:
                assert isinstance(family, TrainsEncoders)
                collated = family.encode_tokens(encoders, collated)
            return family.predict(components[DENOISER], noisy_BCHW, schedule.time(sigma_B), collated)
    finally:
        store.close()


def _refuse_infinite(component: str, module: Any) -> None:
    for name, parameter in module.named_parameters():
        if not math.isfinite(float(parameter.detach().float().abs().max())):
            raise ModelError(
                f"The merged weight {name} of the {component} is not finite. Nothing was written. Was the training's loss "
                f"finite?"
            )


def _write(config: RunConfig, family: Family, model: Path, components: Mapping[str, Any], directory: Path, step: int) -> None:
    merged = {family.denoiser_components[0] if name == DENOISER else name: each for name, each in components.items()}
    with storage.committing_directory(directory) as temporary:
        for entry in sorted(model.iterdir()):
            if entry.is_dir() and entry.name not in merged:
                shutil.copytree(entry, temporary / entry.name)
            elif entry.is_file():
                shutil.copyfile(entry, temporary / entry.name)
        for name, module in merged.items():
            module.save_pretrained(temporary / name)
        card.write(metadata.subject(config, step, model), temporary, card.merged_loading(), merged=True)
