"""What delivered weights come from: the run at a step, and the metadata in their files.

Everything is a function of the settings, the step and what the run's folder holds up to that step, so a run that was
killed and went on delivers the same bytes. Dates are therefore left out. Nothing names a place on this machine.

Keys are ftk's own; those of Stability's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec); and of sd-scripts' the `ss_`
keys that user interfaces show and that hold for these files.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from pydantic import ValidationError

import ftk
from ftk import locations, storage
from ftk.cache.store import CacheStore
from ftk.configs.load import redact
from ftk.configs.schema import HUB_ID, CardConfig, ModelConfig, RunConfig, TrainConfig
from ftk.models import base as models
from ftk.run import Run
from ftk.train.start import Start

LOGGER = logging.getLogger("ftk")
TRAINED_ON = "trained-on.json"
"""In a run's folder: how much it was trained on. `ftk export` has no need of the cache then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is delivered: the weights of a run at a step. `model` is the folder of the base model."""

    run: Run
    step: int
    model: Path

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.run.config

    @property
    def triggers(self) -> list[str]:
        """The words that the sources put before captions."""
        return sorted({source.trigger for source in self.config.data.sources if source.trigger})

    @property
    def is_whole(self) -> bool:
        """Whether the delivery is the model itself, nothing that is added to it."""
        return self.run.trains_base


def subject(run: Run, step: int, model: Path, trained: Mapping[str, Any] | None = None) -> Subject:
    """What is delivered by a run.

    Args:
        trained: the settings under `train` that a checkpoint was made with, where they may differ from the run file's.
    """
    if trained is not None:
        run = run.with_config(run.config.model_copy(update={"train": _as_trained(run.config.train, trained)}))
    return Subject(run=run, step=step, model=model)


def _as_trained(config: TrainConfig, trained: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate({**config.model_dump(), **trained})
    except ValidationError as error:
        LOGGER.warning(
            "the checkpoint's settings are of another ftk (%s): the card has the run file's", error.errors()[0]["msg"]
        )
        return config


def trained_on(store: CacheStore, num_held_out: int, start: Start | None = None) -> dict[str, Any]:
    """Counts of a cache, and what a run started from.

    Crops and mirrored images are images of their own; sources are as they were prepared.
    """
    table = store.table
    sources = store.manifest.prepared_recipe.get("sources", {})
    return {
        "num_samples": len(table),
        "num_images": pc.count_distinct(table["latents"]).as_py(),
        "num_class_samples": pc.sum(pc.equal(table["role"], "class")).as_py() or 0,
        "num_held_out": num_held_out,
        "sources": [
            {"name": name, "repeats": one.get("repeats", 1), "role": one.get("role", "instance")}
            for name, one in sources.items()
        ],
        **({} if start is None else {"start_from": f"{start.name} (blake3 {start.digest})"}),
    }


def of(subject: Subject) -> dict[str, str]:
    """What a delivered file says of itself; secrets redacted."""
    config, triggers = subject.config, ", ".join(subject.triggers)
    counted = counts(subject)
    found = {
        "ftk_version": ftk.__version__,
        "ftk_base_model": base_name(config.model, config.card),
        "ftk_family": config.model.family,
        "ftk_method": config.method.name,
        "ftk_method_settings": json.dumps(redact(settings_of(subject)), sort_keys=True),
        "ftk_step": str(subject.step),
        "ftk_resolutions": ", ".join(map(str, config.data.resolutions_in_use)),
        "ftk_batch_size": str(config.train.global_batch_size),
        "ftk_learning_rate": f"{config.train.learning_rate:g}",
        "ftk_seed": str(config.train.seed),
        "ftk_triggers": triggers,
        "ftk_num_samples": str(counted.get("num_samples", "")),
        "ftk_num_images": str(counted.get("num_images", "")),
        "ftk_num_class_samples": str(counted.get("num_class_samples", "")),
        "ftk_start_from": counted.get("start_from", ""),
        "ftk_license": license_name(config.card),
        **_model_spec(subject, triggers),
        **_kohya(subject),
    }
    return {name: redact(value) for name, value in found.items() if value}


def _model_spec(subject: Subject, triggers: str) -> dict[str, str]:
    """ModelSpec 1.0.1. Its date would differ from run to run; its hash is what the Hub computes itself."""
    card, (width, height) = subject.config.card, _first_size(subject)
    objective = subject.run.family.load_schedule(subject.model).objective
    kind = "" if subject.is_whole else f"/{subject.run.method.name if not network_of(subject) else 'lora'}"
    return {
        **model_spec(f"{_published(subject)['modelspec.architecture']}{kind}", title(subject)),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.description": card.description or "",
        "modelspec.author": card.author or "",
        "modelspec.license": license_name(card),
        "modelspec.trigger_phrase": triggers,
        "modelspec.prediction_type": "" if objective == "flow" else objective,
    }


def model_spec(architecture: str, title: str) -> dict[str, str]:
    """The keys that ModelSpec says a file must have. Names of tensors are diffusers' modules in every format."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }


def _kohya(subject: Subject) -> dict[str, str]:
    train, (width, height) = subject.config.train, _first_size(subject)
    names = {name: value for name, value in _published(subject).items() if name.startswith("ss_")}
    return {
        **names,
        **network_of(subject),
        "ss_sd_model_name": base_name(subject.config.model, subject.config.card),
        "ss_resolution": f"({width}, {height})",
        "ss_steps": str(subject.step),
        "ss_learning_rate": f"{train.learning_rate:g}",
        "ss_seed": str(train.seed),
    }


def _first_size(subject: Subject) -> tuple[int, int]:
    """(width, height) in px of the first resolution; there is room for one in these formats."""
    return models.sizes_of(subject.run.family, subject.config.data.resolutions_in_use[0])[0]


def network_of(subject: Subject) -> dict[str, str]:
    """What `network` says of a delivery; nothing of what has no rank."""
    rank = getattr(subject.run.settings, "rank", None)
    if rank is None:
        return {}
    # What a LoRA took out of the base weights is delivered as well, as so many more directions.
    double = 2 if subject.run.changes_base else 1
    others = getattr(subject.run.settings, "rank_pattern", {})
    return network([double * each for each in (rank, *others.values())])


def network(ranks: Sequence[int]) -> dict[str, str]:
    """Rank and alpha as the files have them: the strength is in the tensors, so alpha is the rank.

    Where layers have ranks of their own there is no one number: sd-scripts write Dynamic.
    """
    found = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    return {"ss_network_dim": found, "ss_network_alpha": found}


def _published(subject: Subject) -> Mapping[str, str]:
    return models.published_names(subject.run.family, subject.model)


def hub_id(model: ModelConfig, card: CardConfig) -> str | None:
    """The base's id on the Hub, if it is known."""
    if card.base_model is not None:
        return card.base_model
    is_local = locations.local_path(model.path).exists()
    return model.path if not is_local and re.match(HUB_ID, model.path) else None


def base_name(model: ModelConfig, card: CardConfig) -> str:
    """The base's Hub id, or the name of its folder: where on this machine that lies is nobody's business."""
    path = locations.local_path(model.path).absolute()
    return hub_id(model, card) or (path.stem if path.is_file() else path.name)


def title(subject: Subject) -> str:
    """What the delivery is called."""
    return subject.config.card.title or subject.config.run


def license_name(card: CardConfig) -> str:
    """What the licence is called; empty if there is none."""
    return card.license_name or card.license or ""


def counts(subject: Subject) -> dict[str, Any]:
    """What `trained_on` counted when the run was trained; nothing for a run of an earlier ftk."""
    try:
        counted: dict[str, Any] = storage.read_json(subject.run.paths.run / TRAINED_ON)
    except (OSError, ValueError):
        return {}
    return counted


def settings_of(subject: Subject) -> dict[str, Any]:
    """The method's settings, without those that say nothing."""
    plain = subject.run.settings.model_dump(mode="json")
    return {name: value for name, value in plain.items() if value not in (None, {}, [], False, 0)}
