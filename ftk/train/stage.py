"""`ftk train`: open the cache, build the trainer, loop. Only the denoiser is in memory."""

import importlib.metadata
import logging
import os
import platform
import signal
import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

import ftk
from ftk import storage
from ftk.cache import fingerprint
from ftk.cache.fetch import Download
from ftk.cache.shards import KINDS
from ftk.cache.store import CacheStore
from ftk.configs.load import cache_location, prepared_path, redact, resolved_yaml, run_path
from ftk.configs.schema import RunConfig
from ftk.errors import CacheError, ConfigError
from ftk.methods import base as methods
from ftk.models import base as models
from ftk.models.base import Family
from ftk.pipeline import dataset as prepared
from ftk.progress import human_bytes
from ftk.train import checkpoint, data
from ftk.train.hooks.checkpoints import Checkpoints
from ftk.train.hooks.recorder import Recorder, read_metrics, recent_loss
from ftk.train.hooks.samples import Samples
from ftk.train.loop import Hook, Trainer, exact_settings
from ftk.train.optim import MasterOptimizer
from ftk.train.order import Order, keyed_seed

LOGGER = logging.getLogger("ftk")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Where the run stands. `loss` is the mean of the last 20 steps; `seconds_per_step` the median."""

    step: int
    num_samples_seen: int
    loss: float
    seconds_per_step: float
    num_steps_now: int
    num_trainable_parameters: int
    peak_memory_bytes: int
    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A trainer with all that surrounds it."""

    trainer: Trainer
    store: CacheStore
    order: Order
    batches: data.BatchBuilder
    recorder: Recorder
    directory: Path


def run(config: RunConfig, fresh: bool = False) -> TrainReport:
    """Train to `train.steps`, from the newest checkpoint if there is one.

    Args:
        fresh: start over; the run that is there is set aside under another name.

    Raises:
        CacheError: the cache is missing, damaged, or was made with something else than this run names.
        CheckpointError: the settings no longer match the checkpoint's.
        Preempted: a signal stopped the run after saving.
    """
    _refuse_several_processes()
    directory = run_path(config)
    if fresh:
        _set_aside(directory)
    with storage.lock(directory):
        for folder in (directory, directory / "checkpoints", directory / "adapter", directory / "samples"):
            storage.sweep(folder)
        build = build_trainer(config)
        first = build.trainer.step
        if first < config.train.steps:
            _write_environment(config, build)
            with closing(build.store), closing(build.recorder), _stopping_on_signals(build.trainer):
                batches = data.steps(build.order, build.batches.build, first, config.train.steps, build.store.ahead)
                build.trainer.fit(batches)
        else:
            LOGGER.info("%s is at step %d already: nothing to do. Raise train.steps to go on.", directory, first)
        report = _report(build, build.trainer.step - first)
        storage.commit_json(directory / "report.json", report)
    return report


def build_trainer(config: RunConfig) -> Build:
    """Cache, denoiser, method, optimizer, order and hooks, with the newest checkpoint restored."""
    family, directory = models.get(config.model.family), run_path(config)
    method, method_config = methods.parse(config.method)
    store = open_cache(config, family)
    order = build_order(config, store)
    device = models.resolve_device(config.train.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    needed = family.latent_components if config.sample.every and config.sample.prompts else ()
    model = models.locate(config.model, (*family.denoiser_components, *needed))
    schedule = family.load_schedule(model)
    if schedule.objective != "flow":
        raise ConfigError(f"model: {model} is trained to predict {schedule.objective}; this ftk trains flow matching only.")
    _check_needs(method)
    denoiser: Any = family.load_denoiser(model, dtype, device)
    components = {"denoiser": denoiser}
    parameters = method.attach(components, family, method_config, keyed_seed(config.train.seed, "adapter"))
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    optimizer = MasterOptimizer(parameters, config.train.optimizer)
    others = {
        "method": {"name": config.method.name, **method_config.model_dump(mode="json")},
        "order": order.fingerprint,
        "latents": store.manifest.latents_fingerprint,
        "texts": store.manifest.texts_fingerprint,
        "denoiser": fingerprint.weights_digest(model / family.denoiser_components[0]),
    }
    settings = exact_settings(config.train, others)

    def export(step: int) -> None:
        metadata = {"ftk_version": ftk.__version__, "ftk_base_model": redact(config.model.path), "ftk_step": str(step)}
        method.export(components, family, method_config, directory / "adapter", method.FORMATS[0], metadata)
        storage.commit_bytes(directory / "adapter" / "README.md", redact(_model_card(config, step)).encode())

    recorder = Recorder(directory, config.train.log_every, config.train.checkpoint_every, config.train.tensorboard)
    hooks: list[Hook] = [recorder, Checkpoints(directory / "checkpoints", settings, recorder, export)]
    if config.sample.every and config.sample.prompts:
        hooks.append(Samples(directory / "samples", model, config, store))
    trainer = Trainer(
        family=family,
        denoiser=denoiser,
        predict=getattr(method, "predict", family.predict),
        optimizer=optimizer,
        config=config.train,
        device=device,
        hooks=hooks,
    )
    _restore(trainer, checkpoint.latest(directory / "checkpoints"), settings)
    batches = data.BatchBuilder(store=store, family=family, table=schedule.sigmas, config=config.train, dtype=dtype)
    return Build(trainer=trainer, store=store, order=order, batches=batches, recorder=recorder, directory=directory)


def _check_needs(method: methods.Method) -> None:
    """What this stage can give a method: the denoiser in memory, and latents and texts from the cache."""
    missing = [*(set(method.NEEDS) - {"denoiser"}), *method.EXTRA]
    if missing:
        raise ConfigError(f"method {method.name} needs {', '.join(sorted(missing))}, which this ftk cannot give it yet.")


def open_cache(config: RunConfig, family: Family) -> CacheStore:
    """Open the cache and refuse one that is not what this run names, with a table of what differs.

    Weights are compared where the VAE and text encoder are at hand; a training machine need not have them.
    """
    location = cache_location(config)
    download = Download(directory=Path(config.cache.download_dir), max_bytes=round(config.cache.download_gib * 2**30))
    store = CacheStore.open(location, download)
    manifest = store.manifest
    rows: list[tuple[str, str, str]] = []
    for kind in KINDS:
        components = family.latent_components if kind == "latents" else family.text_components
        local = models.local_components(config.model, components)
        found = manifest.encoders[kind]
        expected = fingerprint.encoder_parts(kind, family, config.cache, local, full=fingerprint.is_full(found))
        rows += [(f"{kind}.{part}", e, f) for part, e, f in fingerprint.differences(expected, found)]
    there = prepared.read_manifest(prepared_path(config))
    if there is not None and there.fingerprint != manifest.prepared_fingerprint:
        rows.append(("prepared dataset", there.fingerprint, manifest.prepared_fingerprint))
    recipe = fingerprint.differences(prepared.recipe(config), manifest.prepared_recipe)
    rows += [(f"data.{part}", expected, found) for part, expected, found in recipe]
    if rows:
        raise CacheError(
            f"{location} was not made from what this run names:\n{fingerprint.table(rows)}\n"
            f"Run {'`ftk prepare RUN.yaml`, then ' if recipe else ''}`ftk cache RUN.yaml`: it encodes what changed and "
            f"keeps the rest."
        )
    num_unused = pc.sum(
        pc.or_(pc.not_equal(store.table["mask"], ""), pc.greater(pc.list_value_length(store.table["controls"]), 0))
    )
    if num_unused.as_py():
        LOGGER.warning("%d samples have masks or control images: no method of this ftk uses them yet.", num_unused.as_py())
    return store


def build_order(config: RunConfig, store: CacheStore) -> Order:
    """The sequence of micro-batches over the cache's samples."""
    sides = (store.table["bucket_width"].to_pylist(), store.table["bucket_height"].to_pylist())
    order = Order(
        keys=store.table["key"].to_pylist(),
        buckets=[f"{width}x{height}" for width, height in zip(*sides, strict=True)],
        repeats=store.table["repeats"].to_pylist(),
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        remainder=config.train.remainder,
    )
    short = {"smaller": order.num_smaller, "dropped": order.num_dropped, "filled": order.num_filled}
    for what, count in short.items():
        if count:
            unit = "incomplete micro-batches trained as they are" if what == "smaller" else f"samples {what}"
            LOGGER.info("each epoch of %d samples: %d %s", order.samples_an_epoch, count, unit)
    return order


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Steps, samples, parameters and the memory that weights and optimizer will take; no weights are read."""
    family = models.get(config.model.family)
    method, method_config = methods.parse(config.method)
    store = open_cache(config, family)
    order = build_order(config, store)
    model = models.locate(config.model, family.denoiser_components)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    denoiser = family.load_denoiser(model, dtype, torch.device("meta"))
    num_frozen = sum(parameter.numel() for parameter in denoiser.parameters())
    trained = sum(p.numel() for p in method.attach({"denoiser": denoiser}, family, method_config, 0).values())
    # fp32: gradient sum and two moments, and the master where the parameter itself is bf16
    optimizer_bytes = trained * 4 * (3 if dtype == torch.float32 else 4)
    found = checkpoint.latest(run_path(config) / "checkpoints")
    return {
        "step": found.step if found else 0,
        "steps": config.train.steps,
        "samples_an_epoch": order.samples_an_epoch,
        "epochs": round(config.train.steps * order.micro_batches_a_step / order.micro_batches_an_epoch, 2),
        "samples_dropped_an_epoch": order.num_dropped,
        "num_frozen_parameters": num_frozen,
        "num_trainable_parameters": trained,
        "weight_bytes": (num_frozen + trained) * dtype.itemsize,
        "optimizer_bytes": optimizer_bytes,
        "memory_without_activations": human_bytes((num_frozen + trained) * dtype.itemsize + optimizer_bytes),
        "device": str(models.resolve_device(config.train.device)),
    }


def _restore(trainer: Trainer, found: checkpoint.Checkpoint | None, settings: dict[str, Any]) -> None:
    if found is None:
        return
    checkpoint.refuse_changed_settings(found, settings)
    trainer.optimizer.restore(*found.tensors())
    trainer.step, trainer.num_samples_seen = found.step, found.num_samples_seen
    LOGGER.info("resuming from %s", found.path)


def _report(build: Build, num_steps_now: int) -> TrainReport:
    rows = read_metrics(build.directory)
    return TrainReport(
        step=build.trainer.step,
        num_samples_seen=build.trainer.num_samples_seen,
        loss=recent_loss(rows),
        seconds_per_step=statistics.median(row["seconds"] for row in rows) if rows else 0.0,
        num_steps_now=num_steps_now,
        num_trainable_parameters=sum(p.numel() for p in build.trainer.optimizer.parameters.values()),
        peak_memory_bytes=models.memory_bytes(build.trainer.device),
        adapter=str(build.directory / "adapter"),
    )


def _set_aside(directory: Path) -> None:
    if not directory.exists():
        return
    with storage.lock(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
            number += 1
        directory.rename(aside)
    LOGGER.info("--fresh: the run that was there is set aside as %s", aside)


def _write_environment(config: RunConfig, build: Build) -> None:
    cuda = torch.cuda.get_device_name(build.trainer.device) if build.trainer.device.type == "cuda" else None
    environment = {
        "ftk": ftk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(build.trainer.device),
        "cuda_device": cuda,
        "threads": torch.get_num_threads(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    storage.commit_json(build.directory / "environment.json", environment)
    storage.commit_bytes(build.directory / "config.yaml", resolved_yaml(config).encode())


def _model_card(config: RunConfig, step: int) -> str:
    prompts = "".join(f"- {prompt}\n" for prompt in config.sample.prompts)
    trigger = sorted({source.trigger for source in config.data.sources if source.trigger})
    lines = [
        "---",
        f"base_model: {config.model.path}",
        "tags: [ftk, diffusers, text-to-image]",
        "---",
        f"# {config.run}",
        f"A {config.method.name} for {config.model.family}, trained for {step} steps with ftk {ftk.__version__}.",
        "",
        *([f"Trigger: {', '.join(trigger)}", ""] if trigger else []),
        "```python",
        "from diffusers import DiffusionPipeline",
        f'pipeline = DiffusionPipeline.from_pretrained("{config.model.path}")',
        'pipeline.load_lora_weights("path/to/this/folder")',
        "```",
        "",
        *(["Prompts it was watched with:", "", prompts] if prompts else []),
    ]
    return "\n".join(lines)


@contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the loop to stop at the step's end; a second Ctrl-C stops at once."""

    def ask(number: int, _: object) -> None:
        trainer.stop_requested = True
        LOGGER.info("signal %s: saving at the end of this step", signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    try:
        before = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: nobody's signals to take
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_several_processes() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(f"WORLD_SIZE is {world}: this ftk trains on one device. Start it without torchrun.")
