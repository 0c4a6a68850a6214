"""Puts a trainer together: denoiser, method, optimizer, hooks, and the newest checkpoint."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftk import devices
from ftk.cache import fingerprint
from ftk.cache.plan import text_id
from ftk.configs.schema import ScheduleConfig, TrainConfig
from ftk.methods import base as methods
from ftk.models.base import Model, load_model
from ftk.progress import track
from ftk.run import Run
from ftk.train import checkpoint, memory, optim, placement
from ftk.train.data import Batch, BatchBuilder, Loader
from ftk.train.delivery import Delivery, MakeDelivery
from ftk.train.hooks import samples
from ftk.train.hooks.checkpoints import Checkpoints
from ftk.train.hooks.recorder import Recorder, ValidationLog
from ftk.train.hooks.trackers import open_trackers
from ftk.train.hooks.validation import Validation
from ftk.train.inputs import Inputs, as_begun, open_inputs, with_rates
from ftk.train.loop import Hook, Trainer
from ftk.train.loss_scale import LossScale
from ftk.train.order import ORDER_VERSION, keyed_seed
from ftk.train.ranks import Ranks
from ftk.train.trained_on import TrainedOn

LOGGER = logging.getLogger("ftk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A trainer with all that surrounds it."""

    inputs: Inputs
    trainer: Trainer
    loader: Loader
    recorder: Recorder
    directory: Path


def build_trainer(
    run: Run,
    make_delivery: MakeDelivery,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    *,
    allow_change: bool = False,
) -> Build:
    """A trainer with its hooks, at the newest checkpoint."""
    ranks = ranks or Ranks()
    device = device or devices.resolve_device(run.config.train.device)
    inputs = as_begun(open_inputs(run, device, ranks.size), ranks)
    run, plan = inputs.run, inputs.sizes.plan
    config, directory = run.config, run.paths.run
    LOGGER.log(logging.INFO if plan.fits else logging.WARNING, "%s", memory.in_a_line(plan))
    model, parameters = _load(inputs, ranks, device)
    loss_scale = LossScale(device) if plan.dtype == "float16" else None
    optimizer = optim.MasterOptimizer(parameters, with_rates(run), ranks, loss_scale)
    if optimizer.is_split:
        checkpoint.refuse_unshared(directory, ranks)
    with ranks.unhurried():
        trained_on = TrainedOn.of(inputs.store) if ranks.is_main else None
    settings = checkpoint.exact_settings(config.train, _identities(inputs, trained_on))
    trainer = Trainer(
        model=model,
        method=run.method,
        optimizer=optimizer,
        schedule=optim.schedule(config.train.schedule, config.train.steps),
        config=config.train,
        device=device,
        dtype=getattr(torch, plan.dtype),
        ranks=ranks,
    )
    builder = BatchBuilder(store=inputs.store, run=run, sigmas=inputs.sigmas, dtype=trainer.dtype)
    is_even = plan.sharding == "fsdp"
    loader = Loader(order=inputs.order, builder=builder, device=device, rank=ranks.rank, world_size=ranks.size, is_even=is_even)
    recorder, trainer.hooks = _hooks(inputs, builder, settings, make_delivery(inputs, model, ranks), ranks)
    check = partial(_check_changes, directory, settings, trained_on, allow_change)
    if not _restore(trainer, directory / "checkpoints", check):
        _begin(trainer, inputs, loader)
    if plan.compile:
        batches, trained = _one_of_each_shape(inputs, loader), trainer.optimizer.parameters
        seconds = placement.warm_up(partial(_all_losses, trainer), batches, trained.values())
        LOGGER.info("compiled for every bucket in %.0f s", seconds)
    return Build(inputs=inputs, trainer=trainer, loader=loader, recorder=recorder, directory=directory)


def _begin(trainer: Trainer, inputs: Inputs, loader: Loader) -> None:
    """What happens before the first step of a run: weights from `start_from`, then what the method takes from the data."""
    run, ranks = inputs.run, trainer.ranks
    if inputs.sizes.start is not None:
        weights = {name: weight.cpu() for name, weight in trainer.optimizer.weights().items()}
        trainer.optimizer.begin_from(ranks.from_main(weights | dict(inputs.sizes.start.values))[0])
        LOGGER.info("starting from %s", run.config.train.start_from)
    if count := methods.start_batches(run.method, run.settings):
        _start_from_data(trainer, inputs, loader, count)


def _hooks(
    inputs: Inputs, builder: BatchBuilder, settings: dict[str, Any], delivery: Delivery, ranks: Ranks
) -> tuple[Recorder, list[Hook]]:
    """The recorder, and all hooks in the order in which they must run: what is recorded is saved, then drawn."""
    run, directory = inputs.run, inputs.run.paths.run
    with ranks.unhurried():  # a service may be slow
        trackers = open_trackers(run.config, directory) if ranks.is_main else []
    recorder = Recorder(directory, run.config.train, trackers, writes=ranks.is_main)
    checkpoints = Checkpoints(directory / "checkpoints", settings, recorder, delivery.export)
    validation = _validation(inputs, builder, recorder, checkpoints)
    drawn: list[Hook] = []
    if run.config.sample.draws_in_training:
        is_sharded = inputs.sizes.plan.sharding == "fsdp"
        drawn = [samples.Samples(run, inputs.model, inputs.store, recorder, delivery.renew_cards, is_sharded=is_sharded)]
    return recorder, [recorder, *validation, checkpoints, *drawn]


def _load(inputs: Inputs, ranks: Ranks, device: torch.device) -> tuple[Model, dict[str, torch.nn.Parameter]]:
    """The model on the device, with what is trained attached."""
    run, plan = inputs.run, inputs.sizes.plan
    family, dtype = run.family, getattr(torch, plan.dtype)
    first = torch.device("cpu") if plan.load_device == "cpu" else device
    model = load_model(family, inputs.model, run.encoders, dtype, first)
    model.schedule = model.schedule.to(device)
    if isinstance(run.method, methods.HasThawedModules):
        run.method.thaw(model, run.settings)
    placement.before_method(model.denoiser, plan, family, device)
    parameters = run.method.attach(model, run.settings, keyed_seed(run.config.train.seed, "adapter"))
    placement.after_method(model.denoiser, plan, family, device)
    for module in (*model.encoders.values(), *model.extras.values()):
        module.to(device)
    if plan.sharding == "fsdp":
        whole = [] if run.trains_base else list(parameters.values())
        now = ranks.shard(model.denoiser, family, whole, device, dtype)
        parameters = {name: now.get(parameter, parameter) for name, parameter in parameters.items()}
    return model, parameters


def _identities(inputs: Inputs, trained_on: TrainedOn | None) -> dict[str, Any]:
    """What else a run is made of: two with the same are the same run. The samples are known to the process that saves."""
    run, plan = inputs.run, inputs.sizes.plan
    family_settings = run.family.config.model_dump(mode="json", exclude_defaults=True)
    length = {"epochs": inputs.epochs, "steps": run.config.train.steps}
    return {
        **({checkpoint.LENGTH: length} if inputs.epochs is not None else {}),
        "method": {"name": run.config.method.name, **run.settings.model_dump(mode="json")},
        **({"model": family_settings} if family_settings else {}),
        **({"data": trained_on.identity} if trained_on else {}),
        "order": {"version": ORDER_VERSION, "fingerprint": inputs.order.fingerprint},
        "latents": inputs.store.manifest.latents_fingerprint,
        "texts": inputs.store.manifest.texts_fingerprint,
        "denoiser": fingerprint.weights_digest(inputs.model / run.family.denoiser_attribute),
        **{name: fingerprint.weights_digest(inputs.model / name) for name in run.encoders},
        **({"start_from": inputs.sizes.start.digest} if inputs.sizes.start is not None else {}),
        "dtype": plan.dtype,
        "base": plan.base,
        **_dropped_text(inputs),
    }


def _dropped_text(inputs: Inputs) -> dict[str, str]:
    """The item of the text that dropped captions train, where there are any; the empty text goes without saying."""
    item = inputs.store.manifest.empty_text
    return {"dropped_text": item} if inputs.run.config.train.caption_dropout and item != text_id("") else {}


def _validation(inputs: Inputs, builder: BatchBuilder, recorder: Recorder, checkpoints: Checkpoints) -> list[Hook]:
    """The hook, when samples are held out; of each bucket's as many together as a micro-batch holds."""
    config = inputs.run.config.train
    held_out = [int(sample) for sample in inputs.order.held_out[: config.validation.samples]]
    if not held_out:
        return []
    buckets: dict[int, list[int]] = {}
    for sample in held_out:
        buckets.setdefault(inputs.order.shape_of(sample), []).append(sample)
    size = config.micro_batch_size
    groups = [members[start : start + size] for members in buckets.values() for start in range(0, len(members), size)]
    batches: list[tuple[Sequence[int], int]] = [
        (group, position) for group in groups for position in range(config.validation.sigmas)
    ]
    return [Validation(builder, batches, ValidationLog(inputs.run.paths.run), recorder, checkpoints)]


def _one_of_each_shape(inputs: Inputs, loader: Loader) -> Iterator[Batch]:
    """A batch of each shape of the first epoch, on the device; of one sample too, for which torch compiles code of its own."""
    seen: set[tuple[int, bool]] = set()
    steps = map(inputs.order.step, range(inputs.order.steps_an_epoch))
    for micro_batch in itertools.chain.from_iterable(steps):
        shape = inputs.order.shape_of(micro_batch[0].sample), len(micro_batch) == 1
        if shape not in seen:
            seen.add(shape)
            batch = loader.builder.build(micro_batch, preserves=loader.builder.config.loss.preservation is not None)
            yield batch.map(lambda tensor: tensor.to(loader.device))


def _all_losses(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """[B] what a step computes of a batch."""
    losses_B = trainer.losses(batch)
    return losses_B if batch.preserved is None else losses_B + trainer.preservation_losses(batch)


def _start_from_data(trainer: Trainer, inputs: Inputs, loader: Loader, num_batches: int) -> None:
    """All processes: initial values from the first micro-batches; every process looks at all, and the main one's are used."""
    method = inputs.run.method
    initialisation = getattr(inputs.run.settings, "initialisation", method.name)
    assert isinstance(method, methods.HasDataStart)

    def predictions() -> Iterator[Callable[[], torch.Tensor]]:
        with track(initialisation, num_batches, "batch") as progress:
            for micro_batch in itertools.islice(inputs.order.micro_batches(), num_batches):
                batch = loader.builder.build(micro_batch).map(lambda tensor: tensor.to(loader.device))
                yield partial(trainer.losses, batch)
                progress.advance()

    LOGGER.info("initialisation %s: looking at %d micro-batches", initialisation, num_batches)
    with trainer.model.evaluating():
        method.start_from(trainer.model, predictions())
    values = {name: parameter.detach().cpu() for name, parameter in trainer.optimizer.parameters.items()}
    trainer.optimizer.begin_from(trainer.ranks.from_main(values)[0])


def _restore(trainer: Trainer, directory: Path, check: Callable[[checkpoint.Checkpoint | None], None]) -> bool:
    """All processes: the main one's newest checkpoint, if it has one; of what is split each reads its part.

    Args:
        check: in the main process, refuses a checkpoint of another run.

    Returns:
        Whether there is one.
    """
    ranks = trainer.ranks
    if trainer.optimizer.is_split:
        return _restore_part(trainer, checkpoint.latest(directory, ranks), check)
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] | None = None
    with ranks.unhurried():
        newest = checkpoint.latest(directory) if ranks.is_main else None
        if ranks.is_main:
            check(newest)
        if newest is not None:
            _tell_of_jump(trainer.config, newest)
            weights, state = newest.tensors()
            facts = {"step": newest.step, "num_samples_seen": newest.num_samples_seen, "optimizer": newest.optimizer_facts}
            LOGGER.info("resuming from %s", newest.path)
    weights, facts = ranks.from_main(weights, facts)
    state, _ = ranks.from_main(state)
    if facts is not None:
        trainer.optimizer.restore(weights, state, facts["optimizer"])
        trainer.step, trainer.num_samples_seen = facts["step"], facts["num_samples_seen"]
    return facts is not None


def _restore_part(
    trainer: Trainer, found: checkpoint.Checkpoint | None, check: Callable[[checkpoint.Checkpoint | None], None]
) -> bool:
    with trainer.ranks.unhurried():
        if trainer.ranks.is_main:
            check(found)
    if found is not None:
        if trainer.ranks.is_main:
            _tell_of_jump(trainer.config, found)
        trainer.optimizer.restore(*found.tensors(trainer.optimizer.rows), found.optimizer_facts)
        trainer.step, trainer.num_samples_seen = found.step, found.num_samples_seen
        LOGGER.info("resuming from %s", found.path)
    return found is not None


def _tell_of_jump(config: TrainConfig, found: checkpoint.Checkpoint) -> None:
    """Warn if the learning rate of the run that goes on is not that of the run that was begun."""
    train = found.settings.get("train", {})
    begun = {name: train.get(name, getattr(config, name)) for name in ("steps", "learning_rate")}
    schedule = ScheduleConfig.model_validate(train.get("schedule", config.schedule))
    notice = optim.notice_of_jump(found.step, config.model_copy(update={**begun, "schedule": schedule}), config)
    if notice is not None:
        LOGGER.warning("%s", notice)


def _check_changes(
    directory: Path,
    settings: dict[str, Any],
    trained_on: TrainedOn | None,
    allow_change: bool,
    found: checkpoint.Checkpoint | None,
) -> None:
    """The main process: refuse a checkpoint of other settings or samples, then note what this run trains on."""
    assert trained_on is not None
    if found is not None:
        changes = trained_on.changes(found.settings.get("data", {}), directory)
        checkpoint.refuse_changed_settings(found, settings, allow_change, changes)
    trained_on.commit(directory)
