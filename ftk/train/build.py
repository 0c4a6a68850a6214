"""Puts a trainer together: denoiser, method, optimizer, hooks, and the newest checkpoint."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftk.cache import fingerprint
from ftk.configs.load import run_path
from ftk.configs.schema import RunConfig, TrainConfig
from ftk.methods import base as methods
from ftk.methods.base import DENOISER
from ftk.models import base as models
from ftk.progress import track
from ftk.train import checkpoint, memory, optim, placement
from ftk.train.data import Batch, BatchBuilder, Loader
from ftk.train.delivery import MakeDelivery
from ftk.train.hooks import samples
from ftk.train.hooks.checkpoints import Checkpoints
from ftk.train.hooks.recorder import Recorder, ValidationLog
from ftk.train.hooks.trackers import open_trackers
from ftk.train.hooks.validation import Validation
from ftk.train.inputs import Inputs, load_components, open_inputs, with_rates
from ftk.train.loop import Hook, Trainer
from ftk.train.order import keyed_seed
from ftk.train.ranks import Ranks

LOGGER = logging.getLogger("ftk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A trainer with all that surrounds it."""

    inputs: Inputs
    trainer: Trainer
    loader: Loader
    recorder: Recorder
    directory: Path


def build_trainer(config: RunConfig, make_delivery: MakeDelivery, ranks: Ranks | None = None,
                  device: torch.device | None = None, *, allow_change: bool = False) -> Build:  # fmt: skip
    """A trainer with its hooks, at the newest checkpoint."""
    ranks = ranks or Ranks()
    device = device or models.resolve_device(config.train.device)
    inputs, directory = open_inputs(config, device, ranks.size), run_path(config)
    LOGGER.log(logging.INFO if inputs.plan.fits else logging.WARNING, "%s", memory.in_a_line(inputs.plan))
    dtype = getattr(torch, inputs.plan.dtype)
    components, parameters = _load(config, inputs, ranks, device)
    optimizer = optim.MasterOptimizer(parameters, with_rates(config.train, inputs.method, inputs.method_config), ranks)
    if optimizer.is_split:
        checkpoint.refuse_unshared(directory, ranks)
    settings = checkpoint.exact_settings(config.train, _identities(config, inputs))
    trackers = open_trackers(config, directory) if ranks.is_main else []
    recorder = Recorder(directory, config.train, trackers, writes=ranks.is_main)
    delivery = make_delivery(config, inputs, components, ranks)
    checkpoints = Checkpoints(directory / "checkpoints", settings, recorder, delivery.export)
    builder = BatchBuilder(store=inputs.store, family=inputs.family, sigmas=inputs.sigmas, config=config.train, dtype=dtype)
    trainer = Trainer(
        family=inputs.family,
        denoiser=components[DENOISER],
        encoders={name: module for name, module in components.items() if name != DENOISER},
        predict=getattr(inputs.method, "predict", inputs.family.predict),
        optimizer=optimizer,
        schedule=optim.schedule(config.train.schedule, config.train.steps),
        noise_schedule=inputs.schedule.to(device),
        config=config.train,
        device=device,
        dtype=dtype,
        ranks=ranks,
    )
    is_sharded = inputs.plan.sharding == "fsdp"
    validation = _validation(config.train, inputs, builder, directory, recorder, checkpoints)
    drawn: list[Hook] = []
    if config.sample.every and config.sample.prompts:
        drawn = [samples.Samples(config, inputs.model, inputs.store, recorder, delivery.renew_cards, is_sharded=is_sharded)]
    trainer.hooks = [recorder, *validation, checkpoints, *drawn]
    loader = Loader(
        order=inputs.order, builder=builder, device=device, rank=ranks.rank, world_size=ranks.size, is_even=is_sharded
    )
    is_begun = _restore(trainer, directory / "checkpoints", settings, allow_change)
    if not is_begun and (count := methods.start_batches(inputs.method, inputs.method_config)):
        _start_from_data(trainer, inputs, components, loader, count)
    if inputs.plan.compile:
        seconds = placement.warm_up(trainer.losses, _one_of_each_shape(inputs, loader), trainer.optimizer.parameters.values())
        LOGGER.info("compiled for every bucket in %.0f s", seconds)
    return Build(inputs=inputs, trainer=trainer, loader=loader, recorder=recorder, directory=directory)


def _load(
    config: RunConfig, inputs: Inputs, ranks: Ranks, device: torch.device
) -> tuple[dict[str, Any], dict[str, torch.nn.Parameter]]:
    """The denoiser on the device, with what is trained attached."""
    family, plan = inputs.family, inputs.plan
    first = torch.device("cpu") if plan.load_device == "cpu" else device
    names = inputs.method.needs(family, inputs.method_config)
    components = load_components(names, family, inputs.model, getattr(torch, plan.dtype), first)
    denoiser = components[DENOISER]
    placement.before_method(denoiser, plan, family, device)
    parameters = inputs.method.attach(components, family, inputs.method_config, keyed_seed(config.train.seed, "adapter"))
    placement.after_method(denoiser, plan, family, device)
    for module in components.values():
        if module is not denoiser:
            module.to(device)
    if plan.sharding == "fsdp":
        whole = [] if methods.trains_base(inputs.method, inputs.method_config) else list(parameters.values())
        now = ranks.shard(denoiser, family, whole, device, getattr(torch, plan.dtype))
        parameters = {name: now.get(parameter, parameter) for name, parameter in parameters.items()}
    return components, parameters


def _identities(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What else a run is made of: two with the same are the same run."""
    return {
        "method": {"name": config.method.name, **inputs.method_config.model_dump(mode="json")},
        "order": inputs.order.fingerprint,
        "latents": inputs.store.manifest.latents_fingerprint,
        "texts": inputs.store.manifest.texts_fingerprint,
        "denoiser": fingerprint.weights_digest(inputs.model / inputs.family.denoiser_components[0]),
        **{name: fingerprint.weights_digest(inputs.model / name) for name in _encoders(inputs)},
        "dtype": inputs.plan.dtype,
        "base": inputs.plan.base,
    }


def _encoders(inputs: Inputs) -> list[str]:
    return [name for name in inputs.method.needs(inputs.family, inputs.method_config) if name != DENOISER]


def _validation(
    config: TrainConfig,
    inputs: Inputs,
    builder: BatchBuilder,
    directory: Path,
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> list[Hook]:
    """The hook, when samples are held out; of each bucket's as many together as a micro-batch holds."""
    held_out = [int(sample) for sample in inputs.order.held_out[: config.validation.samples]]
    if not held_out:
        return []
    buckets: dict[tuple[int, int], list[int]] = {}
    for sample in held_out:
        side = tuple(int(inputs.store.table[name][sample].as_py()) for name in ("bucket_width", "bucket_height"))
        buckets.setdefault((side[0], side[1]), []).append(sample)
    size = config.micro_batch_size
    groups = [members[start : start + size] for members in buckets.values() for start in range(0, len(members), size)]
    batches: list[tuple[Sequence[int], int]] = [
        (group, position) for group in groups for position in range(config.validation.sigmas)
    ]
    return [Validation(builder, batches, ValidationLog(directory), recorder, checkpoints)]


def _one_of_each_shape(inputs: Inputs, loader: Loader) -> Iterator[Batch]:
    """A batch from each bucket of the first epoch, on the device."""
    seen: set[tuple[int, int]] = set()
    table = inputs.store.table
    for index in range(inputs.order.micro_batches_an_epoch):
        micro_batch = inputs.order.micro_batch(index)
        side = (table["bucket_width"][micro_batch[0].sample].as_py(), table["bucket_height"][micro_batch[0].sample].as_py())
        if side not in seen:
            seen.add(side)
            yield loader.builder.build(micro_batch).map(lambda tensor: tensor.to(loader.device))


def _start_from_data(trainer: Trainer, inputs: Inputs, components: Mapping[str, Any], loader: Loader, num_batches: int) -> None:
    """All processes: initial values from the first micro-batches; every process looks at all, and the main one's are used."""
    assert isinstance(inputs.method, methods.HasDataStart)

    def predictions() -> Iterator[Callable[[], torch.Tensor]]:
        with track(inputs.method_config.initialisation, num_batches, "batch") as progress:
            for index in range(num_batches):
                batch = loader.builder.build(inputs.order.micro_batch(index)).map(lambda tensor: tensor.to(loader.device))
                yield partial(trainer.losses, batch)
                progress.advance()

    LOGGER.info("initialisation %s: looking at %d micro-batches", inputs.method_config.initialisation, num_batches)
    with trainer.evaluating():
        inputs.method.start_from(components, predictions())
    values = {name: parameter.detach().cpu() for name, parameter in trainer.optimizer.parameters.items()}
    trainer.optimizer.begin_from(trainer.ranks.from_main(values)[0])


def _restore(trainer: Trainer, directory: Path, settings: dict[str, Any], allow_change: bool) -> bool:
    """All processes: the main one's newest checkpoint, if it has one; of what is split each reads its part.

    Returns:
        Whether there is one.
    """
    ranks = trainer.ranks
    if trainer.optimizer.is_split:
        return _restore_part(trainer, checkpoint.latest(directory, ranks), settings, allow_change)
    found = checkpoint.latest(directory) if ranks.is_main else None
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] | None = None
    if found is not None:
        checkpoint.refuse_changed_settings(found, settings, allow_change)
        weights, state = found.tensors()
        facts = {"step": found.step, "num_samples_seen": found.num_samples_seen, "optimizer": found.optimizer_facts}
        LOGGER.info("resuming from %s", found.path)
    weights, facts = ranks.from_main(weights, facts)
    state, _ = ranks.from_main(state)
    if facts is not None:
        trainer.optimizer.restore(weights, state, facts["optimizer"])
        trainer.step, trainer.num_samples_seen = facts["step"], facts["num_samples_seen"]
    return facts is not None


def _restore_part(trainer: Trainer, found: checkpoint.Checkpoint | None, settings: dict[str, Any], allow_change: bool) -> bool:
    if found is not None:
        checkpoint.refuse_changed_settings(found, settings, allow_change)
        trainer.optimizer.restore(*found.tensors(trainer.optimizer.rows), found.optimizer_facts)
        trainer.step, trainer.num_samples_seen = found.step, found.num_samples_seen
        LOGGER.info("resuming from %s", found.path)
    return found is not None
