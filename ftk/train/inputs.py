"""What a run trains on: cache, order, noise, method and memory plan, opened and checked before any weights are read."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc
import torch

from ftk.cache import fingerprint, plan
from ftk.cache.fetch import Download
from ftk.cache.shards import KINDS
from ftk.cache.store import CacheStore
from ftk.configs.schema import ParameterGroupConfig, RunConfig, TrainConfig
from ftk.errors import CacheError, ConfigError
from ftk.methods import base as methods
from ftk.models.base import Family, load_model
from ftk.models.components.schedule import NoiseSchedule
from ftk.pipeline import dataset as prepared
from ftk.run import Run
from ftk.train import checkpoint, controls, memory, optim, optimizers, start
from ftk.train.flow import SigmaDistribution
from ftk.train.hooks import samples
from ftk.train.order import Order
from ftk.train.ranks import Ranks
from ftk.train.start import Start

LOGGER = logging.getLogger("ftk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run trains on, without any weights in memory. `model` is the folder of the base model.

    `run` has its number of steps; `epochs` is what the run file gives in their place, if it does.
    """

    run: Run
    epochs: float | None
    store: CacheStore
    order: Order
    model: Path
    schedule: NoiseSchedule
    sigmas: SigmaDistribution
    workload: memory.Workload
    sizes: "Sizes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the shapes of the model alone tell: how much is trained, how it is made to fit the device, and where it starts."""

    plan: memory.MemoryPlan
    num_frozen_parameters: int
    num_trainable_parameters: int
    start: Start | None


def open_inputs(run: Run, device: torch.device, world_size: int = 1) -> Inputs:
    """Open the cache, order it, and plan the memory; the denoiser's shapes alone are read.

    Raises:
        CacheError: the cache is missing, damaged, or was made with something else than this run names.
        ConfigError: a setting does not fit the family, the method or the samples.
    """
    config, family = run.config, run.family
    check_optimizer(run)
    draws = family.latent_components if config.sample.draws_in_training else ()
    model = run.locate((*run.trained_components, *draws))
    schedule = family.load_schedule(model)
    sigmas = sigma_distribution(config.train, schedule, family)
    store = open_cache(run)
    samples.check(run, store, model)
    _check_dropped_text(run, store, model)
    _check_preservation(run, store)
    workload = memory.cached_workload(store.table, family, config.train, world_size)
    if config.train.loss.preservation is not None:
        workload = replace(workload, text_tokens=max(workload.text_tokens, store.longest_preserved))
    order = build_order(config, store)
    return Inputs(
        run=with_steps(run, order),
        epochs=config.train.epochs,
        store=store,
        order=order,
        model=model,
        schedule=schedule,
        sigmas=sigmas,
        workload=workload,
        sizes=plan_sizes(run, model, workload, device),
    )


def with_steps(run: Run, order: Order, num_steps: int | None = None) -> Run:
    """The run with its number of steps, where its file gives epochs.

    Args:
        num_steps: instead of what the epochs of this order have.

    Raises:
        ConfigError: the schedule does not go with it.
    """
    train = run.config.train
    if train.epochs is None and num_steps is None:
        return run
    num_steps = num_steps or order.steps_of(train.epochs or 1)
    train = train.model_copy(update={"steps": num_steps, "epochs": None})
    optim.check_length(train)
    return run.with_config(run.config.model_copy(update={"train": train}))


def as_begun(inputs: Inputs, ranks: Ranks) -> Inputs:
    """All: the inputs with the number of steps that the run was begun with, where its file gives the same epochs still."""
    if inputs.epochs is None:
        return inputs
    noted = checkpoint.noted_length(inputs.run.paths.checkpoints) if ranks.is_main else None
    _, noted = ranks.from_main(None, noted)
    if noted is None or noted["epochs"] != inputs.epochs:
        return inputs
    return replace(inputs, run=with_steps(inputs.run, inputs.order, noted["steps"]))


def plan_sizes(run: Run, model: Path, workload: memory.Workload, device: torch.device) -> Sizes:
    """Attach the method to the model's shapes, count, and plan the memory; no weights are read.

    Raises:
        ConfigError: the method does not fit the model, or settings of the memory exclude each other.
    """
    shapes = load_model(run.family, model, run.encoders, torch.float32, torch.device("meta"))
    trained = run.method.attach(shapes, run.settings, 0)
    every = [each for module in shapes.components.values() for each in module.parameters()]
    return Sizes(
        plan=memory.plan(
            shapes, settings_for_plan(run), workload, memory.inspect_device(device), splits_trained=run.trains_base
        ),
        num_frozen_parameters=sum(each.numel() for each in every if not each.requires_grad),
        num_trainable_parameters=sum(parameter.numel() for parameter in trained.values()),
        start=start.read(run, model, shapes, trained),
    )


def settings_for_plan(run: Run) -> TrainConfig:
    """The settings that the memory plan may choose within: a base that changes is there in full precision.

    It is split over processes only where it is what is trained, and only with an optimizer that updates part by part.

    Raises:
        ConfigError: the settings ask for what the method, or the optimizer, cannot do.
    """
    config = run.config.train
    if not run.changes_base:
        return config
    if config.memory.base == "int8":
        raise ConfigError("train.memory.base: int8 does not go with a method that changes the base weights. Leave it out.")
    splits = run.trains_base and optimizers.splits(config)
    if config.sharding == "fsdp" and not splits:
        raise ConfigError(_why_whole(run))
    return config.model_copy(
        update={
            "sharding": config.sharding if splits else "none",
            "memory": config.memory.model_copy(update={"base": "full"}),
        },
    )


def _why_whole(run: Run) -> str:
    if run.trains_base:
        return (
            f"train.sharding: fsdp splits what method {run.method.name} trains, and optimizer "
            f"{run.config.train.optimizer.name} is not known to treat a part of a tensor as within the whole. Those that do: "
            f"{', '.join(optimizers.elementwise())}, and most of torch.optim. Or leave train.sharding out."
        )
    return (
        f"train.sharding: fsdp does not go with a method that changes the base weights and trains something beside them "
        f"({run.method.name} with these settings): what it delivers is computed from both. Leave it out."
    )


def check_optimizer(run: Run) -> None:
    """Check optimizer, schedule and learning rates as far as it can be done without the weights.

    Raises:
        ConfigError: what `optim.check` and `optim.check_length` refuse; or rates of the method's own where the optimizer has
            one for all.
    """
    optim.check(run.config.train)
    if run.config.train.epochs is None:
        optim.check_length(run.config.train)
    rates = {factor for _, factor in methods.parameter_groups(run.method, run.settings)} - {0, 1}
    if rates and optimizers.finds_rate(run.config.train):
        listed, optimizer = ", ".join(f"{rate:g}" for rate in sorted(rates)), run.config.train.optimizer.name
        raise ConfigError(
            f"method: {run.method.name} asks for {listed} times the learning rate for some parameters, and train.optimizer "
            f"{optimizer} has one rate for all. Leave out settings such as `text_encoder.rate` and `lora_plus`, or use another "
            "optimizer."
        )


def with_rates(run: Run) -> TrainConfig:
    """The settings with the learning rates that the method asks for, behind those of the run file."""
    config = run.config.train
    asked = tuple(
        ParameterGroupConfig(match=match, learning_rate=config.learning_rate * factor)
        for match, factor in methods.parameter_groups(run.method, run.settings)
    )
    groups = (*config.optimizer.groups, *asked)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"groups": groups})})


def open_cache(run: Run) -> CacheStore:
    """Open the cache and refuse one that is not what this run names, with a table of what differs.

    Weights are compared where the VAE and text encoder are at hand; a training machine need not have them.
    """
    config, family, location = run.config, run.family, run.paths.cache
    download = Download(directory=Path(config.cache.download_dir), max_bytes=round(config.cache.download_gib * 2**30))
    store = CacheStore.open(location, download)
    manifest = store.manifest
    rows: list[tuple[str, str, str]] = []
    for kind in KINDS:
        components = family.latent_components if kind == "latents" else family.text_components
        local = run.local_components(components)
        found = manifest.encoders[kind]
        expected = fingerprint.encoder_parts(kind, run, local, full=fingerprint.is_full(found))
        if kind == "texts":
            expected.setdefault("placeholder_tokens", None)  # a cache with new words is not one without
        rows += [(f"{kind}.{part}", e, f) for part, e, f in fingerprint.differences(expected, found)]
    there = prepared.read_manifest(run.paths.prepared)
    if there is not None and there.fingerprint != manifest.prepared_fingerprint:
        rows.append(("prepared dataset", there.fingerprint, manifest.prepared_fingerprint))
    recipe = fingerprint.differences(*prepared.recipes(config, manifest.prepared_recipe))
    rows += [(f"data.{part}", expected, found) for part, expected, found in recipe]
    if rows:
        raise CacheError(
            f"{location} was not made from what this run names:\n{fingerprint.table(rows)}\n"
            f"Run {'`ftk prepare RUN.yaml`, then ' if recipe else ''}`ftk cache RUN.yaml`: it encodes what changed and "
            f"keeps the rest."
        )
    if run.needs.class_images and not pc.any(pc.equal(store.table["role"], "class")).as_py():
        raise CacheError(
            f"method {run.method.name} needs class images, and {location} has none. Add a source with `role: class` to "
            f"data.sources, then run `ftk prepare RUN.yaml` and `ftk cache RUN.yaml`."
        )
    num_unused = pc.sum(pc.greater(pc.list_value_length(store.table["controls"]), 0)).as_py()
    if isinstance(run.method, methods.HasControls):
        controls.check(run, store)
    elif num_unused:
        LOGGER.warning("%d samples have control images, which method %s does not use.", num_unused, run.method.name)
    return store


def _check_dropped_text(run: Run, store: CacheStore, model: Path) -> None:
    """What captions are dropped for must be what the cache holds for that.

    Raises:
        CacheError: it is another text.
    """
    text = run.dropped_text(model)
    if run.config.train.caption_dropout and store.manifest.empty_text != plan.text_id(text):
        raise CacheError(
            f"train.caption_dropout_text: {store.location} holds another text for dropped captions than "
            f"{'none' if text is None else repr(text)}. Run `ftk cache RUN.yaml`: it encodes that text alone."
        )


def _check_preservation(run: Run, store: CacheStore) -> None:
    """The texts for which the base model's prediction is kept must be those that the cache holds for that.

    Raises:
        CacheError: they are others, or there are none.
    """
    settings = run.config.train.loss.preservation
    if settings is not None and store.manifest.preservation != settings.texts:
        (name, value), *_ = settings.texts.items()
        raise CacheError(
            f"train.loss.preservation.{name}: {store.location} does not hold the texts of {value!r}. Run `ftk cache RUN.yaml`: "
            f"it encodes those texts alone."
        )


def build_order(config: RunConfig, store: CacheStore) -> Order:
    """The sequence of steps over the cache's samples."""
    empty_length = store.length("texts", store.manifest.empty_text)
    order = Order(store.table, config.train, empty_length=empty_length)
    if last := _last_step(order):
        LOGGER.info("an epoch has %d samples in %d steps: %s", order.samples_an_epoch, order.steps_an_epoch, last)
    if len(order.held_out):
        LOGGER.info("%d samples are held out for validation", len(order.held_out))
    return order


def _last_step(order: Order) -> str | None:
    """What is special about the last step of an epoch."""
    if order.num_short:
        return f"the last step has {order.num_short} of {order.step_size} (train.remainder: smaller)"
    if order.num_dropped:
        return f"{order.num_dropped} more, which would not fill a step, are dropped (train.remainder: drop)"
    if order.num_filled:
        return f"{order.num_filled} of them are repeated to fill the last step (train.remainder: fill)"
    return None


def sigma_distribution(config: TrainConfig, schedule: NoiseSchedule, family: Family) -> SigmaDistribution:
    """How sigmas are drawn, on the family's own table.

    Raises:
        ConfigError: a setting that the model's objective, or its scheduler, does not know.
    """
    _check_sigma(config, schedule, family)
    if config.sigma.shift == "resolution" and schedule.token_shift is None:
        raise ConfigError(f"train.sigma.shift: resolution: the scheduler of this {family.name} has no shift by resolution.")
    plain = config.sigma.model_dump(exclude={"stratified", "weighting", "min_snr_gamma", "shift"})
    shift = schedule.token_shift if config.sigma.shift == "resolution" else config.sigma.shift
    return SigmaDistribution(table=schedule.sigmas, shift=shift, **plain)


def _check_sigma(config: TrainConfig, schedule: NoiseSchedule, family: Family) -> None:
    """Weightings are made for one kind of objective; noise levels off the table for models that have no table."""
    is_flow, weighting = schedule.objective == "flow", config.sigma.weighting
    is_for_flow, is_for_v = weighting in ("sigma_sqrt", "cosmap"), weighting == "like_epsilon"
    if weighting != "none" and (is_flow != is_for_flow or (is_for_v and schedule.objective != "v")):
        weightings = "soft_min_snr, debiased and like_epsilon" if schedule.objective == "v" else "soft_min_snr and debiased"
        fitting = "sigma_sqrt, cosmap or none" if is_flow else f"min_snr or none; {weightings} fit, too"
        raise ConfigError(
            f"train.sigma.weighting: {weighting} is not made for {family.name}, which predicts "
            f"{'velocities' if is_flow else schedule.objective}. Set it to {fitting}."
        )
    if is_flow and config.loss.huber_schedule == "snr":
        raise ConfigError(
            f"train.loss.huber_schedule: snr is made for models that predict noise or v; {family.name} predicts velocities. "
            f"Set it to exponential or constant."
        )
    if schedule.times is None:
        return
    plain = type(config.sigma)()
    changed = [
        name for name in ("shift", "minimum", "maximum", "continuous") if getattr(config.sigma, name) != getattr(plain, name)
    ]
    if changed:
        raise ConfigError(
            f"train.sigma.{changed[0]}: {family.name} was trained at {len(schedule.sigmas):,} noise levels, and is told the "
            f"number of the level: it knows none between them. Leave it out; train.sigma.sampling (logit_normal, mode, beta) "
            f"prefers a part of the levels."
        )
