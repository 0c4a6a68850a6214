"""`ftk export` and `ftk merge`: what a run has learned, in another format, or folded into a pipeline of its own."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftk import locations, storage
from ftk.configs.load import redact, run_path
from ftk.configs.schema import RunConfig
from ftk.errors import CheckpointError, ConfigError, ModelError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Family
from ftk.train import card, checkpoint, optim
from ftk.train.build import open_cache, with_rates
from ftk.train.checkpoint import Checkpoint
from ftk.train.order import keyed_seed

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far a merged model's prediction may be from the adapted one's, as a share of its root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written."""

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


def export(config: RunConfig, form: str, out: Path | None = None, best: bool = False) -> ExportReport:
    """Write the trained weights in a delivery format.

    Args:
        out: the folder; `exports/FORMAT` of the run by default.
        best: the step with the lowest validation loss, instead of the newest.

    Raises:
        CheckpointError: there is no checkpoint to deliver.
        ConfigError: the method cannot be written so; the message says why, and what works.
    """
    family, (method, settings) = models.get(config.model.family), methods.parse(config.method)
    found = _checkpoint(config, best)
    model = models.locate(config.model, family.denoiser_components)
    directory = out or run_path(config) / "exports" / form
    with _trained(config, family, model, found) as components:
        files = method.export(components, family, settings, directory, form, card.metadata(config, found.step))
    return ExportReport(
        step=found.step,
        format=form,
        directory=str(directory),
        files=[path.name for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
    )


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
    found = _checkpoint(config, best)
    everything = (*family.latent_components, *family.text_components, *family.denoiser_components)
    model = models.locate(config.model, everything)
    with _trained(config, family, model, found) as components:
        denoiser: Any = components["denoiser"]
        adapted = _prediction(config, family, model, denoiser)
        method.merge(components)
        _refuse_infinite(denoiser)
        merged = _prediction(config, family, model, denoiser)
        difference = float((merged - adapted).square().mean().sqrt() / adapted.square().mean().sqrt())
        tolerance = TOLERANCE[_dtype(config)]
        if not difference <= tolerance:
            raise ModelError(
                f"The merged model's prediction is {difference:.2g} of its size away from the adapted one's, where "
                f"{tolerance:.2g} is allowed. Nothing was written. Try --set train.precision=fp32."
            )
        _write(config, family, model, denoiser, directory, found.step)
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


def _checkpoint(config: RunConfig, best: bool) -> Checkpoint:
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
def _trained(config: RunConfig, family: Family, model: Path, found: Checkpoint) -> Iterator[Mapping[str, Any]]:
    """The denoiser with what was trained as it is delivered: with `ema_decay` the average."""
    method, settings = methods.parse(config.method)
    denoiser: Any = family.load_denoiser(model, _dtype(config), torch.device("cpu"))
    components = {"denoiser": denoiser}
    parameters = method.attach(components, family, settings, keyed_seed(config.train.seed, "adapter"))
    denoiser.eval()
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


def _prediction(config: RunConfig, family: Family, model: Path, denoiser: Any) -> torch.Tensor:
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
        with torch.no_grad():
            return family.predict(denoiser, noisy_BCHW, schedule.time(sigma_B), collated)
    finally:
        store.close()


def _refuse_infinite(denoiser: Any) -> None:
    for name, parameter in denoiser.named_parameters():
        if not math.isfinite(float(parameter.detach().float().abs().max())):
            raise ModelError(f"The merged weight {name} is not finite. Nothing was written. Was the training's loss finite?")


def _write(config: RunConfig, family: Family, model: Path, denoiser: Any, directory: Path, step: int) -> None:
    own = family.denoiser_components[0]
    with storage.committing_directory(directory) as temporary:
        for entry in sorted(model.iterdir()):
            if entry.is_dir() and entry.name != own:
                shutil.copytree(entry, temporary / entry.name)
            elif entry.is_file():
                shutil.copyfile(entry, temporary / entry.name)
        denoiser.save_pretrained(temporary / own, safe_serialization=True)
        usage = "# the trained weights are in the pipeline itself"
        text = card.model_card(config, step, usage)
        (temporary / "README.md").write_text(redact(text), encoding="utf-8")
