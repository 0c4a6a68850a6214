"""Checkpoints: a directory each, atomic, verified before an older one goes.

checkpoints/00000250/   adapter.safetensors (fp32 masters)   optimizer.safetensors   trainer.json   COMPLETE (hashes)
checkpoints/best.json   the step whose validation loss was the lowest; its checkpoint is kept
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ftk import storage
from ftk.configs.schema import TrainConfig
from ftk.contracts import RUN_SCHEMA
from ftk.errors import CheckpointError
from ftk.train.optim import MasterOptimizer

LOGGER = logging.getLogger("ftk")
RECEIPT = "COMPLETE"
BEST = "best.json"
_FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json")
_FREE = {"checkpoint_every", "keep_last", "keep_every", "log_every", "trackers", "project", "device", "sharding",
         "timeout_seconds", "max_bad_steps"}  # fmt: skip
# Which share is held out is part of the order; these only say what is done with it.
_FREE_VALIDATION = {"every", "samples", "sigmas", "patience"}
# Where things are computed changes their rounding alone; 8-bit weights are other weights.
_EXACT_MEMORY = {"base"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: where it lies, its step, and what the run's settings were."""

    path: Path
    step: int
    num_samples_seen: int
    optimizer_facts: Any
    settings: dict[str, Any]

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(fp32 masters, optimizer state), on the CPU."""
        return load_file(self.path / "adapter.safetensors"), load_file(self.path / "optimizer.safetensors")


def exact_settings(config: TrainConfig, others: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one it continues, so that it ends where an uninterrupted one would.

    A longer constant schedule is the same run; a longer cosine is another curve.
    """
    free = _FREE | ({"steps"} if config.schedule.name in ("constant", "piecewise_constant") else set())
    train = config.model_dump(mode="json", exclude=free)
    train["validation"] = {name: value for name, value in train["validation"].items() if name not in _FREE_VALIDATION}
    train["memory"] = {name: value for name, value in train["memory"].items() if name in _EXACT_MEMORY}
    return {"train": train, **others}


def save_checkpoint(
    directory: Path,
    step: int,
    num_samples_seen: int,
    optimizer: MasterOptimizer,
    settings: Mapping[str, Any],
) -> Path:
    """Commit a checkpoint; its final name appears only when every file is complete and on disk."""
    path = directory / f"{step:08d}"
    tensors, facts = optimizer.state()
    trainer = {
        "schema_version": RUN_SCHEMA,
        "step": step,
        "num_samples_seen": num_samples_seen,
        "optimizer": facts,
        "settings": dict(settings),
    }
    files = {"adapter.safetensors": optimizer.weights(), "optimizer.safetensors": tensors}
    with storage.committing_directory(path) as temporary:
        for name, contents in files.items():
            payload = save({key: tensor.detach().cpu().contiguous() for key, tensor in contents.items()})
            storage.commit_bytes(temporary / name, payload)
        storage.commit_json(temporary / "trainer.json", trainer)
        storage.commit_json(temporary / RECEIPT, {name: storage.blake3_file(temporary / name) for name in _FILES})
    return path


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in the log and passed over."""
    paths = all_of(directory)
    for path in reversed(paths):
        problem = damage(path)
        if problem is None:
            return _read(path)
        LOGGER.warning("checkpoint %s is damaged (%s): the one before it is used", path, problem)
    if paths:
        LOGGER.warning("%s: no checkpoint is whole, so the training begins again at its first step", directory)
    return None


def read(path: Path) -> Checkpoint:
    """One checkpoint; `CheckpointError` unless it is whole."""
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} is damaged ({problem}). Use another step.")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    trainer = storage.read_json(path / "trainer.json")
    if trainer.get("schema_version") != RUN_SCHEMA:
        raise CheckpointError(
            f"{path} has schema version {trainer.get('schema_version')}; this ftk reads {RUN_SCHEMA}. "
            f"Start over with --fresh, or use the ftk that wrote it."
        )
    return Checkpoint(
        path=path,
        step=trainer["step"],
        num_samples_seen=trainer["num_samples_seen"],
        optimizer_facts=trainer["optimizer"],
        settings=trainer["settings"],
    )


def all_of(directory: Path) -> list[Path]:
    """Every checkpoint's directory, the oldest first; whole or not."""
    # A copy that somebody keeps beside them, under a name of its own, is none of ours.
    return sorted(path for path in directory.glob("[0-9]*") if path.name.isdecimal())


def prune(directory: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the newest, the best, and multiples of `keep_every`, once the newest is verified to be whole."""
    paths = all_of(directory)
    if not paths or damage(paths[-1]) is not None:
        return
    best = best_step(directory)
    for path in paths[:-keep_last]:
        step = int(path.name)
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path)


def mark_best(directory: Path, step: int, loss: float) -> None:
    """Note the step with the lowest validation loss so far."""
    storage.commit_json(directory / BEST, {"step": step, "loss": loss})


def read_best(directory: Path) -> tuple[int, float] | None:
    """What `mark_best` noted: the step with the lowest validation loss, and that loss."""
    try:
        noted = storage.read_json(directory / BEST)
        return int(noted["step"]), float(noted["loss"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        LOGGER.warning("%s is damaged (%s): the best step is not known until the next measurement", directory / BEST, error)
        return None


def best_step(directory: Path) -> int | None:
    """The step with the lowest validation loss, if any was measured."""
    noted = read_best(directory)
    return None if noted is None else noted[0]


def refuse_changed_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], allow: bool = False) -> None:
    """Raise `CheckpointError` with a table if continuing under `settings` would not be what was begun; or log it."""
    before, now = _flat(checkpoint.settings), _flat(json.loads(json.dumps(settings)))
    changed = [
        f"  {name}: checkpoint {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return
    what = f"{checkpoint.path} (step {checkpoint.step}) was trained with other settings"
    if allow:
        LOGGER.warning("--allow-change: %s, and goes on as another run than it was:\n%s", what, "\n".join(changed))
        return
    raise CheckpointError(
        f"{what}, so resuming would not continue the same run:\n" + "\n".join(changed) + "\n"
        "Put them back, give the run another name, start over with --fresh, or accept the break with --allow-change."
    )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        receipt = storage.read_json(path / RECEIPT)
        wrong = [name for name in _FILES if storage.blake3_file(path / name) != receipt.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} does not have its checksum" if wrong else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
