"""`ftk merge`: what a run has learned, and adapters in files, folded into a pipeline of its own."""

import inspect
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from ftk import locations, storage
from ftk.configs.schema import AddedAdapterConfig
from ftk.deliver import card, metadata, mixing
from ftk.deliver.export import Choice, find_checkpoint, run_dtype, trained
from ftk.errors import ConfigError, ModelError
from ftk.methods.adapters import adapter_files, injection, peft_directory
from ftk.methods.adapters.adapter_files import AdapterFile
from ftk.methods.base import Export, HasMergedPipeline
from ftk.models.base import DENOISER, AddsTokens, Model, TrainsEncoders, load_model
from ftk.models.components import loading
from ftk.run import Run
from ftk.train import controls
from ftk.train.checkpoint import Checkpoint
from ftk.train.data import conditions_of
from ftk.train.inputs import open_cache

_INDEX = "model_index.json"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far a merged model's prediction may be from the adapted one's, as a share of its root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Where the merged pipeline lies, and how far its prediction is from the adapted one's (a share of its RMS)."""

    step: int
    directory: str
    difference: float
    tolerance: float
    dtype: str
    added: list[str]
    num_bytes: int


def merge(
    run: Run,
    out: Path,
    choice: Choice = Choice(),  # noqa: B008 - it is frozen
    strength: float = 1.0,
    added: Sequence[AddedAdapterConfig] = (),
) -> MergeReport:
    """Write the base model with what was trained folded into its weights, as a pipeline directory.

    Nothing is written unless the merged model predicts what the adapted one does, on a sample of the cache.

    Args:
        strength: of what was trained.
        added: adapters that are folded in after it, in this order.

    Raises:
        CheckpointError: there is no checkpoint to merge, or an adapter is of another base model.
        ConfigError: `out` holds something, or the method adds nothing to the base weights.
        ModelError: a merged weight is not finite, or the predictions differ.
    """
    target = locations.local_path(str(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {target} holds something already. Name a new folder.")
    _check_strength(run, strength)
    if added and isinstance(run.method, HasMergedPipeline):
        raise ConfigError(
            f"--add {added[0].path}: what {run.method.name} merges takes other inputs than the base, for which adapters are "
            f"made. Merge it alone, and load the other into the merged pipeline."
        )
    adapters = [mixing.find(each, "--add", (*mixing.ADDING, "DORA")) for each in added]
    checkpoint = find_checkpoint(run, choice)
    directory = run.locate(run.all_components)
    files = _read(run, directory, adapters)
    dtype = run_dtype(run) if choice.dtype is None else getattr(torch, choice.dtype)
    # Not every device computes in fp16, whose range is small: it is rounded to at the end.
    working = torch.float32 if dtype == torch.float16 else dtype
    with _adapted(run, directory, checkpoint, working) as model:
        difference = _fold(run, model, strength, working)
        for file, other in zip(files, adapters, strict=True):
            _fold_file(run, directory, model, working, (file, other.strength))
        for name, module in model.components.items():
            _refuse_infinite(name, module.to(dtype))
        notes = [f"{other.path} at {other.strength:g}" for other in adapters]
        _write(
            run, directory, model, target, checkpoint.step, [*([f"itself at {strength:g}"] if strength != 1 else []), *notes]
        )
    return MergeReport(
        step=checkpoint.step,
        directory=str(target),
        difference=difference,
        tolerance=TOLERANCE[working],
        dtype=str(dtype).removeprefix("torch."),
        added=notes,
        num_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
    )


def _check_strength(run: Run, strength: float) -> None:
    kind = str(getattr(run.settings, "type", run.method.name)).upper()
    kind = "DORA" if getattr(run.settings, "dora", False) else kind
    if strength != 1 and getattr(run.settings, "modules_to_save", None) is not None:
        raise ConfigError(
            f"--strength {strength:g} has no meaning for a run that trains whole modules (method.modules_to_save) beside its "
            f"adapter: they have no strength. Leave it out."
        )
    if strength != 1 and kind not in mixing.ADDING:
        raise ConfigError(
            f"--strength {strength:g} has no meaning for method {run.method.name} ({kind}): only LoRA, LoHa and LoKr have a "
            f"strength. Leave it out."
        )


def _read(run: Run, directory: Path, others: Sequence[mixing.AddedAdapter]) -> list[AdapterFile]:
    """The files, by the shapes of the model alone."""
    if not others:
        return []
    meta = torch.device("meta")
    modules: dict[str, Any] = {DENOISER: run.family.load_denoiser(directory, torch.float32, meta)}
    if isinstance(run.family, TrainsEncoders):
        for name in run.family.trainable_encoders:
            modules[name] = run.family.load_encoder(directory, name, torch.float32, meta)
    pipeline_class = loading.pipeline_class(directory)
    return [adapter_files.read(each.path, run.family, modules, each.setting, pipeline_class) for each in others]


@contextmanager
def _adapted(run: Run, directory: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Model]:
    """The model with what was trained, in a precision that need not be the run's.

    What takes a part out of the base weights took it out of those that the run was trained with: it is brought into the form
    in which it is delivered, which is for the original weights.
    """
    if run.trains_base or not run.changes_base:
        with trained(run, directory, checkpoint, dtype) as model:
            yield model
        return
    with tempfile.TemporaryDirectory(prefix="ftk-merge-") as folder:
        with trained(run, directory, checkpoint, in_fp32=True) as model:
            run.method.export(model, run.settings, Export(directory=Path(folder), form="peft", metadata={}))
        del model
        model = load_model(run.family, directory, run.encoders, dtype, torch.device("cpu"))
        for name, module in model.components.items():
            module.eval()
            peft_directory.load_directory(module, peft_directory.folder(Path(folder), name))
    yield model


def _fold(run: Run, model: Model, strength: float, dtype: torch.dtype) -> float:
    """Fold what was trained into the weights; returns how far the prediction moved by that, as a share of its RMS.

    Raises:
        ModelError: it moved further than rounding explains.
    """
    for module in model.components.values() if strength != 1 else ():
        for layer in injection.adapted(module).values():
            layer.set_scale(injection.ADAPTER, strength)
    adapted = _prediction(run, model, dtype)
    run.method.merge(model)
    for name, module in model.components.items():
        _refuse_infinite(name, module)
    merged = _prediction(run, model, dtype)
    difference = float((merged - adapted).square().mean().sqrt() / adapted.square().mean().sqrt())
    tolerance = TOLERANCE[dtype]
    if not difference <= tolerance:
        raise ModelError(
            f"The merged model's prediction is {difference:.2g} of its size away from the adapted one's, where "
            f"{tolerance:.2g} is allowed. Nothing was written. Try --dtype float32."
        )
    return difference


def _fold_file(run: Run, directory: Path, model: Model, dtype: torch.dtype, added: tuple[AdapterFile, float]) -> None:
    """Change the weights as a file says, at a strength; of a text encoder that is not in memory yet, too."""
    file, strength = added
    for component, layers in file.layers.items():
        if component not in model.components:
            assert isinstance(run.family, TrainsEncoders)
            model.encoders[component] = run.family.load_encoder(directory, component, dtype, torch.device("cpu")).eval()
        for name, change in layers.items():
            weight = model.components[component].get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(change.applied(weight, strength))


def _prediction(run: Run, model: Model, dtype: torch.dtype) -> torch.Tensor:
    """[1,C,H,W] fp32: of the cache's first sample, half noise, through the same conditions as in training."""
    schedule = model.schedule
    store = open_cache(run)
    try:
        latents = store.latents(0)[0].float()
        conditions = conditions_of(store, run, [0], [0], [controls.drawn(store, run, 0, ("merge",))], dtype)
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
                f"The merged weight {name} of the {component} is not finite in {str(parameter.dtype).removeprefix('torch.')}. "
                f"Nothing was written. Was the training's loss finite? In float16 large weights overflow: use bfloat16."
            )


def _tokenizers(run: Run, base: Path) -> dict[str, Any]:
    """Those of the text encoders, by their folders, with the new words that were trained."""
    words, family = run.needs.placeholder_tokens, run.family
    if not words or not isinstance(family, AddsTokens):
        return {}
    return {folder: family.tokenizer_with(base, encoder, words) for encoder, folder in family.token_encoders.items()}


def _write(run: Run, base: Path, model: Model, directory: Path, step: int, mixed: Sequence[str]) -> None:
    attribute = run.family.denoiser_attribute
    merged = {attribute: model.denoiser, **model.encoders, **_tokenizers(run, base)}
    pipeline = run.method.merged_pipeline(model, base) if isinstance(run.method, HasMergedPipeline) else None
    with storage.committing_directory(directory) as temporary:
        for entry in sorted(base.iterdir()):
            if entry.is_dir() and entry.name not in merged:
                shutil.copytree(entry, temporary / entry.name)
            elif entry.is_file():
                shutil.copyfile(entry, temporary / entry.name)
        if pipeline is not None:
            storage.commit_json(temporary / _INDEX, _index(base, pipeline.name))
        for name, module in merged.items():
            module.save_pretrained(temporary / name)
        subject = metadata.Subject(run=run, step=step, model=base)
        usage = "" if pipeline is None else pipeline.usage
        card.write(subject, temporary, card.merged_loading(mixed, usage), merged=True)


def _index(base: Path, pipeline: str) -> dict[str, Any]:
    """`model_index.json` of a pipeline of another class with the same parts."""
    parameters = inspect.signature(getattr(diffusers, pipeline).__init__).parameters
    index = storage.read_json(base / _INDEX)
    kept = {name: value for name, value in index.items() if name.startswith("_") or name in parameters}
    return {**kept, "_class_name": pipeline}
