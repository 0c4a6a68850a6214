"""Checkpoints: a directory each, atomic, verified before an older one goes.

checkpoints/00000250/   adapter.safetensors (fp32 masters)   optimizer.safetensors   trainer.json   COMPLETE (hashes)
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ftk import storage
from ftk.contracts import RUN_SCHEMA
from ftk.errors import CheckpointError
from ftk.train.optim import MasterOptimizer

LOGGER = logging.getLogger("ftk")
RECEIPT = "COMPLETE"
_FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: where it lies, its step, and what the run's settings were."""

    path: Path
    step: int
    num_samples_seen: int
    settings: dict[str, Any]

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(fp32 masters, optimizer moments), on the CPU."""
        return load_file(self.path / "adapter.safetensors"), load_file(self.path / "optimizer.safetensors")


def save_checkpoint(
    directory: Path,
    step: int,
    num_samples_seen: int,
    optimizer: MasterOptimizer,
    settings: Mapping[str, Any],
) -> Path:
    """Commit a checkpoint; its final name appears only when every file is complete and on disk."""
    path = directory / f"{step:08d}"
    trainer = {
        "schema_version": RUN_SCHEMA,
        "step": step,
        "num_samples_seen": num_samples_seen,
        "settings": dict(settings),
    }
    files = {"adapter.safetensors": optimizer.weights(), "optimizer.safetensors": optimizer.moments()}
    with storage.committing_directory(path) as temporary:
        for name, tensors in files.items():
            payload = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            storage.commit_bytes(temporary / name, payload)
        storage.commit_json(temporary / "trainer.json", trainer)
        storage.commit_json(temporary / RECEIPT, {name: storage.blake3_file(temporary / name) for name in _FILES})
    return path


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in the log and passed over."""
    for path in sorted(directory.glob("[0-9]*"), reverse=True):
        problem = _damage(path)
        if problem is None:
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
                settings=trainer["settings"],
            )
        LOGGER.warning("checkpoint %s is damaged (%s): the one before it is used", path, problem)
    return None


def prune(directory: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints, once the newest is verified to be whole."""
    paths = sorted(directory.glob("[0-9]*"))
    if paths and _damage(paths[-1]) is None:
        for path in paths[:-keep_last]:
            shutil.rmtree(path)


def refuse_changed_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` with a table if continuing under `settings` would not be what was begun."""
    before, now = _flat(checkpoint.settings), _flat(settings)
    changed = [
        f"  {name}: checkpoint {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} (step {checkpoint.step}) was trained with other settings, so resuming would not continue "
            f"the same run:\n" + "\n".join(changed) + "\nPut them back, give the run another name, or start over with --fresh."
        )


def _damage(path: Path) -> str | None:
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
