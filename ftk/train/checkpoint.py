"""Checkpoints: a directory each, atomic, verified before an older one goes.

checkpoints/00000250/   adapter.safetensors (fp32 masters)   optimizer.safetensors   trainer.json   COMPLETE (hashes)
checkpoints/best.json   the step whose validation loss was the lowest; its checkpoint is kept

Large ones, and those of processes that each hold a part of the weights, have numbered files in their place: part P of
process R is adapter-RRRRR-PPP.safetensors. A tensor is what the files have of it, in their order, put together along the first
dimension. So any number of processes reads what any other number wrote. COMPLETE names every file, and is written last.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ftk import storage
from ftk.configs.schema import TrainConfig
from ftk.contracts import RUN_SCHEMA
from ftk.errors import CheckpointError, EnvironmentFault
from ftk.train.memory import DTYPES
from ftk.train.optim import MasterOptimizer
from ftk.train.ranks import Ranks, Rows

LOGGER = logging.getLogger("ftk")
RECEIPT = "COMPLETE"
BEST = "best.json"
LENGTH = "length"
"""Among the settings, of a run whose file gives epochs: those, and the number of steps that they were when it began."""
_WEIGHTS, _OPTIMIZER, _TRAINER = "adapter", "optimizer", "trainer.json"
_FILE_BYTES = 4 << 30
"""About the largest file that is written: each is put together in host memory."""
_FREE = {"checkpoint_every", "keep_last", "keep_every", "log_every", "trackers", "project", "device", "sharding",
         "timeout_seconds", "max_bad_steps", "micro_batch_size", "start_from", "caption_dropout_text"}  # fmt: skip
# What a run starts from counts by its digest, wherever it lies; the text of dropped captions as it is in the cache.
# Which share is held out is part of the order; these only say what is done with it.
_FREE_VALIDATION = {"every", "samples", "sigmas", "patience"}
# Where things are computed changes their rounding alone; 8-bit weights are other weights.
_EXACT_MEMORY = {"base"}
_ORDER = ("order", "order.version", "order.fingerprint")
_DIGESTS = {
    **dict.fromkeys(_ORDER, "samples come in another order"),
    "latents": "images were encoded with another VAE, or other settings of it",
    "texts": "captions were encoded with other text encoders, or other settings of them",
    "denoiser": "the weights of the base model are others",
    "dropped_text": "dropped captions train another text (train.caption_dropout_text)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: where it lies, its step, and what the run's settings were."""

    path: Path
    step: int
    num_samples_seen: int
    optimizer_facts: Any
    settings: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, rows: Mapping[str, Rows] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(fp32 masters, optimizer state), on the CPU.

        Args:
            rows: of the parameters that this process has a part of; the rest is read whole. Nothing else is read.

        Raises:
            CheckpointError: a parameter of `rows` has another size.
        """
        return self._read(_WEIGHTS, rows or {}), self._read(_OPTIMIZER, rows or {})

    def _read(self, kind: str, rows: Mapping[str, Rows]) -> dict[str, torch.Tensor]:
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(safe_open(self.path / name, "pt")) for name in _files_of(kind, self.files)]
            holders: dict[str, list[Any]] = {}
            for file in files:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    holders.setdefault(key, []).append(file)
            return {key: _joined(key, holding, rows.get(_parameter_of(key, rows))) for key, holding in holders.items()}


def exact_settings(config: TrainConfig, others: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one it continues, so that it ends where an uninterrupted one would.

    A longer constant schedule is the same run; a longer cosine is another curve, unless it has a length of its own.
    """
    free = _FREE | (set() if config.schedule.depends_on_run else {"steps"})
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
    ranks: Ranks | None = None,
) -> Path:
    """Commit a checkpoint; its final name appears only when every file is complete and on disk.

    Args:
        ranks: all of them must call where each has a part of what is trained, and each writes its own; else one does.
    """
    ranks = ranks or Ranks()
    path = directory / f"{step:08d}"
    tensors, facts = optimizer.state()
    trainer = {
        "schema_version": RUN_SCHEMA,
        "step": step,
        "num_samples_seen": num_samples_seen,
        "optimizer": facts,
        "settings": dict(settings),
    }
    with _committing_together(path, ranks) as temporary:
        written = {}
        with ranks.unhurried():
            for kind, contents in ((_WEIGHTS, optimizer.weights()), (_OPTIMIZER, tensors)):
                written.update(_write(temporary, kind, _own(contents, optimizer.rows, ranks), ranks))
        everyones = {name: hashed for one in ranks.gather(written) for name, hashed in one.items()}
        if ranks.is_main:
            storage.commit_json(temporary / _TRAINER, trainer)
            storage.commit_json(temporary / RECEIPT, {**everyones, _TRAINER: storage.blake3_file(temporary / _TRAINER)})
    return path


def refuse_unshared(directory: Path, ranks: Ranks) -> None:
    """All: before anything is trained, that every process sees the folder into which each will write.

    Raises:
        EnvironmentFault: one does not.
    """
    with contextlib.ExitStack() as kept:
        name = ""
        if ranks.is_main:
            mark = kept.enter_context(tempfile.NamedTemporaryFile(prefix=storage.TEMPORARY_PREFIX, dir=directory))
            name = Path(mark.name).name
        _, name = ranks.from_main(None, name)
        blind = [rank for rank, sees in enumerate(ranks.gather((directory / name).exists())) if not sees]
    if blind:
        raise EnvironmentFault(
            f"{directory} of process 0 is not there for process {', '.join(map(str, blind))}: each writes its own part of a "
            f"checkpoint when trained weights are split. Put the workspace on a file system that all machines share, or set "
            f"train.sharding: none."
        )


@contextlib.contextmanager
def _committing_together(path: Path, ranks: Ranks) -> Iterator[Path]:
    """All: a temporary directory that becomes `path` once the main process is done with it, after all others."""
    with storage.committing_directory(path) if ranks.is_main else contextlib.nullcontext(path) as made:
        _, name = ranks.from_main(None, made.name)
        yield path.parent / name
    ranks.wait()


def _own(tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Rows], ranks: Ranks) -> dict[str, torch.Tensor]:
    """What this process writes: its rows of what is split; the main one also what all have alike."""
    own = {}
    for key, tensor in tensors.items():
        is_part = _parameter_of(key, rows) in rows and tensor.ndim > 0
        if ranks.is_main or (is_part and len(tensor)):
            own[key] = tensor
    return own


def _write(directory: Path, kind: str, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, str]:
    """Write one process's files, each put together in host memory; returns their hashes."""
    groups, written = _grouped(tensors), {}
    for number, group in enumerate(groups):
        is_alone = ranks.size == len(groups) == 1
        name = f"{kind}.safetensors" if is_alone else f"{kind}-{ranks.rank:05d}-{number:03d}.safetensors"
        payload = save({key: tensors[key].detach().cpu().contiguous() for key in group})
        storage.commit_bytes(directory / name, payload)
        written[name] = storage.blake3_file(directory / name)
    return written


def _grouped(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names in groups of about `_FILE_BYTES`; at least one group."""
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for key, tensor in tensors.items():
        if num_bytes and num_bytes + tensor.nbytes > _FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(key)
        num_bytes += tensor.nbytes
    return groups


def _files_of(kind: str, files: Sequence[str]) -> list[str]:
    return sorted(name for name in files if name == f"{kind}.safetensors" or name.startswith(f"{kind}-"))


def _parameter_of(key: str, rows: Mapping[str, Rows]) -> str:
    """The parameter that a tensor belongs to: itself, or the one whose state it is."""
    return key if key in rows else key.rpartition("/")[0]


def _joined(key: str, files: Sequence[Any], rows: Rows | None) -> torch.Tensor:
    """A tensor, or some rows of it, from the files that have parts of it, in their order."""
    slices = [file.get_slice(key) for file in files]
    shapes = [one.get_shape() for one in slices]
    if rows is None or not shapes[0]:
        return torch.cat([file.get_tensor(key) for file in files]) if len(files) > 1 else files[0].get_tensor(key)
    total = sum(shape[0] for shape in shapes)
    if total != rows.total:
        raise CheckpointError(f"The checkpoint's {key} has {total} rows, and this run's {rows.total}: it is of another model.")
    found, start = [], 0
    for one, shape in zip(slices, shapes, strict=True):
        first, end = max(rows.first - start, 0), min(rows.end - start, shape[0])
        if first < end:
            found.append(one[first:end])
        start += shape[0]
    return torch.cat(found or [slices[0][0:0]])


def latest(directory: Path, ranks: Ranks | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in the log and passed over.

    Args:
        ranks: all of them must call, and share the reading; without, this process does it alone.
    """
    ranks = ranks or Ranks()
    _, names = ranks.from_main(None, [path.name for path in all_of(directory)] if ranks.is_main else None)
    for name in reversed(names):
        problem = damage(directory / name, ranks)
        if problem is None:
            return _read(directory / name)
        if ranks.is_main:
            LOGGER.warning("checkpoint %s is damaged (%s): the one before it is used", directory / name, problem)
    if names and ranks.is_main:
        LOGGER.warning("%s: no checkpoint is whole; training begins again at its first step", directory)
    return None


def read(path: Path) -> Checkpoint:
    """One checkpoint; `CheckpointError` unless it is whole."""
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} is damaged ({problem}). Use another step.")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    trainer = storage.read_json(path / _TRAINER)
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
        files=tuple(storage.read_json(path / RECEIPT)),
    )


def all_of(directory: Path) -> list[Path]:
    """Every checkpoint's directory, the oldest first; whole or not."""
    # A copy that somebody keeps beside them, under a name of its own, is none of ours.
    return sorted(path for path in directory.glob("[0-9]*") if path.name.isdecimal())


def noted_length(directory: Path) -> dict[str, Any] | None:
    """`LENGTH` of the newest checkpoint that can be read; None if it has none, or there is no checkpoint."""
    for path in reversed(all_of(directory)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            length = storage.read_json(path / _TRAINER)["settings"].get(LENGTH)
            return None if length is None else {"epochs": float(length["epochs"]), "steps": int(length["steps"])}
    return None


def noted_dtype(directory: Path) -> str | None:
    """The working precision that the newest readable checkpoint names, such as `float16`; None if there is none."""
    for path in reversed(all_of(directory)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            name = storage.read_json(path / _TRAINER)["settings"]["dtype"]
            if name in DTYPES.values():
                return str(name)
    return None


def prune(directory: Path, keep_last: int, keep_every: int | None, ranks: Ranks | None = None) -> None:
    """Remove all but the newest, the best, and multiples of `keep_every`, once the newest is verified to be whole.

    Args:
        ranks: as in `latest`.
    """
    ranks = ranks or Ranks()
    paths = all_of(directory) if ranks.is_main else []
    _, newest = ranks.from_main(None, paths[-1].name if paths else None)
    if newest is None or damage(directory / newest, ranks) is not None:
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


def refuse_changed_settings(
    checkpoint: Checkpoint, settings: Mapping[str, Any], allow: bool = False, data_changes: Sequence[str] = ()
) -> None:
    """Raise `CheckpointError` with a table if continuing under `settings` would not be what was begun; or log it.

    Args:
        data_changes: what is other about the samples, in words: it stands for the settings under `data`.
    """
    before, now = (
        _flat({name: value for name, value in each.items() if name != LENGTH})
        for each in (checkpoint.settings, json.loads(json.dumps(settings)))
    )
    _refuse_other_order(checkpoint, before, now, allow)
    # What an older ftk had no setting for, it did as the default says.
    defaults = _flat({"train": TrainConfig().model_dump(mode="json")})
    before = {name: defaults[name] for name in now if name in defaults} | before
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name) and not name.startswith("data.")]
    if data_changes or len(names) > 1:
        # Where samples or settings are others, so is the order: only alone does it tell anything.
        names = [name for name in names if name not in _ORDER]
    changed = [f"  data: {', '.join(data_changes)}"] * bool(data_changes)
    changed += [f"  {_changed(name, before.get(name), now.get(name))}" for name in names]
    if not changed:
        return
    changes = " and ".join(["on other data"] * bool(data_changes) + ["with other settings"] * bool(names))
    what = f"{checkpoint.path} (step {checkpoint.step}) was trained {changes}"
    if allow:
        LOGGER.warning("--allow-change: %s, and goes on as another run than it was:\n%s", what, "\n".join(changed))
        return
    raise CheckpointError(
        f"{what}, so resuming would not continue the same run:\n" + "\n".join(changed) + "\n"
        "Put them back, give the run another name, start over with --fresh, or accept the break with --allow-change."
    )


def _refuse_other_order(checkpoint: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any], allow: bool) -> None:
    """Raise `CheckpointError`, or log, if the checkpoint was written under other rules for the order of samples."""
    if before.get("order.version") == now.get("order.version"):
        return
    what = (
        f"{checkpoint.path} (step {checkpoint.step}) was written by an ftk with another order of samples: its steps were made "
        f"of micro-batches, so train.micro_batch_size decided which samples share a step, and steps ran on from one epoch into "
        f"the next. Now a step's samples are chosen first, and an epoch begins with a new step"
    )
    if not allow:
        raise CheckpointError(
            f"{what}. The rest of this run would see other samples than it was begun with. Finish it with the ftk that began "
            f"it (environment.json in the run's folder names the version), start over with --fresh, give the run another name, "
            f"or accept the break with --allow-change."
        )
    LOGGER.warning("--allow-change: %s. The run goes on in the new order.", what)


def _changed(name: str, before: Any, now: Any) -> str:
    """A changed setting; what is known by a digest in words."""
    words = _DIGESTS.get(name)
    if words is None and name.startswith("text_encoder") and "." not in name:
        words = f"the weights of the model's {name} are others"
    return f"{name}: checkpoint {before!r}, now {now!r}" if words is None else f"{name}: {words}"


def damage(path: Path, ranks: Ranks | None = None) -> str | None:
    """What is wrong with a checkpoint; None when it is whole.

    Args:
        ranks: as in `latest`.
    """
    ranks = ranks or Ranks()
    with ranks.unhurried():
        problem = _damage(path, ranks)
    return next((problem for problem in ranks.gather(problem) if problem is not None), None)


def _damage(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with this process's share of the files."""
    try:
        receipt = storage.read_json(path / RECEIPT)
        names = sorted(map(storage.plain_name, {_TRAINER, *receipt}))
        lacking = [kind for kind in (_WEIGHTS, _OPTIMIZER) if not _files_of(kind, names)]
        if lacking:
            return f"its {RECEIPT} names no file of the {' and the '.join(lacking)}"
        wrong = [name for name in names[ranks.rank :: ranks.size] if storage.blake3_file(path / name) != receipt.get(name)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} does not have its checksum" if wrong else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
