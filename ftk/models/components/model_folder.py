"""Finds the base model of a run, downloads it where it must, and gives its folder in the plain Diffusers layout.

What is stored otherwise (a variant such as `*.fp16.safetensors`, a checkpoint in one file) gets such a folder below the
workspace, so that nothing else has to know of it.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ftk import locations, storage
from ftk.configs.schema import HUB_ID, ModelConfig
from ftk.errors import EnvironmentFault, ModelError, did_you_mean
from ftk.models.base import Family
from ftk.models.components import single_file, weights

LOGGER = logging.getLogger("ftk")
_HUB_ID = re.compile(HUB_ID)
_OTHER_FORMATS = ("*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.pb", "*openvino*", "*flax*")
_OTHER_WEIGHTS = (*_OTHER_FORMATS, "*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*")
"""What a repository may hold beside the weights that are read: other formats, half-precision copies, weights without EMA."""
_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
_ROOT_FILES = ("model_index.json", "README.md")


def locate(family: Family, model: ModelConfig, components: Sequence[str], made: Path) -> Path:
    """The local directory that holds the named components of a model; of a Hub id only those components are downloaded.

    Args:
        made: where folders are made for models that are not in the plain Diffusers layout.

    Raises:
        ModelError: neither a local folder, a checkpoint nor a Hub id; or not a model of the family, or not a whole one.
        EnvironmentFault: the Hub could not be reached, or a folder cannot be made.
    """
    path = locations.local_path(model.path)
    if single_file.is_checkpoint(path):
        return _of_single_file(family, model, path, components, made)
    if not path.is_dir():
        _refuse_other_paths(model.path)
    if model.config is not None:
        raise ModelError(f"model.config goes with a checkpoint in one file, and model.path {model.path} is not one.")
    return _of_folder(family, path if path.is_dir() else _download(model, components), model, components, made)


def local_components(family: Family, model: ModelConfig, components: Sequence[str], made: Path) -> Path | None:
    """The local directory of a model if it holds all the named components without a download, else None."""
    path = locations.local_path(model.path)
    if path.is_dir():
        if not all((path / name).is_dir() for name in components):
            return None
        if not all(weights.variants(path / name) for name in components if weights.needs_weights(path / name)):
            return path
        return locate(family, model, components, made)
    if not path.is_file():
        return None
    is_converted = all((_converted_folder(model, path, made) / name).is_dir() for name in components)
    has_config = model.config is not None and locations.local_path(model.config).is_dir()
    return locate(family, model, components, made) if is_converted or has_config else None


def _of_folder(family: Family, directory: Path, model: ModelConfig, components: Sequence[str], made: Path) -> Path:
    """The folder itself, or one of links to it in which the weights of a variant have their plain names."""
    family.check(directory)
    _refuse_missing(model.path, directory, components)
    chosen = {
        name: weights.chosen_variant(directory / name, model.variant) if weights.needs_weights(directory / name) else None
        for name in components
    }
    if model.variant is not None and model.variant not in chosen.values():
        _refuse_unknown_variant(directory, model)
    if not any(chosen.values()):
        return directory
    target = made / f"{_stem(directory)}-{storage.digest([str(directory.resolve()), model.variant], 12)}"
    _link_root(directory, target)
    for name, variant in chosen.items():
        _link(target / name, _plain_files(directory / name, variant))
    return target


def _refuse_missing(path: str, directory: Path, components: Sequence[str]) -> None:
    missing = [name for name in components if not (directory / name).is_dir()]
    if missing:
        raise ModelError(
            f"model.path {path}: no {', '.join(missing)} folder in it. "
            f"Found: {', '.join(sorted(entry.name for entry in directory.iterdir())) or 'nothing'}."
        )


def _refuse_unknown_variant(directory: Path, model: ModelConfig) -> None:
    """Refuse a variant that no component of the model has; most commands read some of the components alone."""
    folders = [entry for entry in sorted(directory.iterdir()) if entry.is_dir()]
    names = sorted({name for folder in folders for name in weights.variants(folder) if name})
    if model.variant not in names:
        raise ModelError(
            f"model.variant: {model.variant}: no weights in {directory} have this variant. "
            f"Variants found: {', '.join(names) or 'none'}.{did_you_mean(str(model.variant), names)}"
        )


def _of_single_file(family: Family, model: ModelConfig, path: Path, components: Sequence[str], made: Path) -> Path:
    """A folder with the components of the checkpoint, converted, and links to those of `model.config` that it lacks."""
    if model.variant is not None:
        raise ModelError(f"model.variant: {model.variant}: {path} is a single file and has no variants. Leave it out.")
    target = _converted_folder(model, path, made)
    if all((target / name).is_dir() for name in components):
        return target
    checkpoint = single_file.open_checkpoint(family, path)
    config = _configuration(family, model, checkpoint, components)
    _link_root(config, target)
    for name in components:
        if name in checkpoint.parts:
            _convert(checkpoint, config, target, name)
        elif name == "scheduler":
            _make(target / name, lambda folder: single_file.write_scheduler(checkpoint, config / "scheduler", folder))
        else:
            _link(target / name, _plain_files(config / name, None))
    return target


def _converted_folder(model: ModelConfig, path: Path, made: Path) -> Path:
    """Where a checkpoint's components go: another file, or another configuration, gives another folder."""
    state, settings = path.stat(), []
    config = locations.local_path(model.config) if model.config is not None else None
    if config is not None and config.is_dir():
        for file in (config / "model_index.json", *sorted(config.glob("*/*.json"))):
            settings.append([str(file.relative_to(config)), file.stat().st_mtime_ns if file.is_file() else 0])
    facts = [single_file.VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns, model.config, model.revision, settings]
    return made / f"{path.stem if storage.is_plain_name(path.stem) else 'model'}-{storage.digest(facts, 12)}"


def _convert(checkpoint: single_file.Checkpoint, config: Path, target: Path, name: str) -> None:
    if not (target / name).is_dir():
        LOGGER.info("converting the %s of %s to the Diffusers layout, once, into %s", name, checkpoint.path, target)
    _make(target / name, lambda folder: single_file.convert(checkpoint, name, config, folder))


def _configuration(family: Family, model: ModelConfig, checkpoint: single_file.Checkpoint, components: Sequence[str]) -> Path:
    """A folder in the Diffusers layout with the configurations of what is converted, and with all other components."""
    source = model.config or checkpoint.default_config
    directory = locations.local_path(source)
    if model.config is None or not directory.is_dir():
        converted = [name for name in components if name in checkpoint.parts]
        missing = [name for name in components if name not in checkpoint.parts]
        base = ModelConfig(family=model.family, path=source, revision=model.revision)
        try:
            directory = _download(base, missing, converted)
        except (ModelError, EnvironmentFault) as error:
            raise type(error)(
                f"{checkpoint.path} holds the weights of {', '.join(checkpoint.parts)} alone. Their configurations, and "
                f"what else the model needs, are read from model.config, by default {checkpoint.default_config} on the Hub. "
                f"{str(error).replace('model.path', 'model.config', 1)} Or set model.config to a local folder in the Diffusers "
                f"layout."
            ) from None
    try:
        family.check(directory)
        _refuse_missing(source, directory, components)
    except ModelError as error:
        raise ModelError(f"model.config: {str(error).replace('model.path', 'model.config')}") from None
    return directory


def _download(model: ModelConfig, components: Sequence[str], settings_of: Sequence[str] = ()) -> Path:
    """The local copy of a Hub repository: whole components, and of `settings_of` the configurations alone."""
    _refuse_other_paths(model.path)
    configurations = [f"{name}/{pattern}" for name in settings_of for pattern in _SETTINGS]
    wanted = ["model_index.json", *configurations]
    if model.variant is None:
        directory = _snapshot(model, [*wanted, *(f"{name}/*" for name in components)], _OTHER_WEIGHTS)
    else:
        patterns = (*_SETTINGS, f"*.{model.variant}.safetensors", f"*.{model.variant}-*.safetensors")
        directory = _snapshot(model, [*wanted, *(f"{name}/{each}" for name in components for each in patterns)], _OTHER_FORMATS)
    bare = [name for name in components if weights.needs_weights(directory / name) and not weights.variants(directory / name)]
    if not bare:
        return directory
    # With a variant set these components have plain weights alone; without one, they have some variant alone.
    excluded = _OTHER_FORMATS if model.variant is None else _OTHER_WEIGHTS
    return _snapshot(model, [f"{name}/*" for name in bare], excluded)


def _refuse_other_paths(path: str) -> None:
    """Refuse what is neither here nor a Hub id."""
    local = locations.local_path(path)
    if local.exists():
        raise ModelError(
            f"model.path {path}: neither a folder in the Diffusers layout nor a .safetensors file. Other formats (.ckpt, .pt, "
            f".bin, .gguf) are not read: download the checkpoint as safetensors, or convert it."
        )
    if local.suffix == single_file.SUFFIX:
        names = [entry.name for entry in local.parent.glob(f"*{single_file.SUFFIX}")]
        raise ModelError(f"model.path {path}: no such file.{did_you_mean(local.name, names, str(local.parent))}")
    if not _HUB_ID.match(path):
        raise ModelError(f"model.path {path}: no such folder, and it is not a Hub id (owner/name).")


def _snapshot(model: ModelConfig, wanted: Sequence[str], excluded: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=list(wanted), ignore_patterns=list(excluded))
        )
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.path {model.path}: no such folder here, and no such model on the Hub (or it needs `hf auth login`)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"model.path {model.path}: no such folder here, and the Hub could not be reached to download it "
            f"({type(error).__name__}). Check the spelling or the network."
        ) from None


def _stem(directory: Path) -> str:
    name = directory.resolve().name
    return name if storage.is_plain_name(name) else "model"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _plain_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """A component's files by their names in a folder without variants: of its weights those of one variant alone."""
    offered = weights.variants(folder)
    is_weight = {path for paths in offered.values() for path in paths}
    files = {str(path.relative_to(folder)): path for path in _files(folder) if path not in is_weight}
    if variant is None and None not in offered and weights.needs_weights(folder):
        variant = weights.chosen_variant(folder, None)
    if variant is None:
        return files | {path.name: path for path in offered.get(None, ())}
    return files | weights.plain_names(folder, variant)


def _link_root(directory: Path, target: Path) -> None:
    """Copy the files beside the components: they are small, and some are read by their folder."""
    for name in _ROOT_FILES:
        source, copy = directory / name, target / name
        if source.is_file() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
            storage.commit_bytes(copy, source.read_bytes())


def _link(target: Path, files: Mapping[str, Path]) -> None:
    """A folder of links to these files, by name; one that is there and has other links is replaced."""
    wanted = {name: str(path.absolute()) for name, path in files.items()}
    if target.is_dir():
        links = {str(path.relative_to(target)): str(path.readlink()) for path in target.rglob("*") if path.is_symlink()}
        if links == wanted:
            return
    _make(target, lambda folder: _write_links(folder, wanted), replaces=True)


def _write_links(folder: Path, wanted: Mapping[str, str]) -> None:
    for name, path in wanted.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)


def _make(target: Path, write: Callable[[Path], None], *, replaces: bool = False) -> None:
    """Write a folder whole or not at all; of several processes one writes it and the others wait."""
    if target.is_dir() and not replaces:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(target.parent.parent / f".{target.parent.name}-{target.name}.lock"):
            if replaces or not target.is_dir():
                with storage.committing_directory(target) as temporary:
                    write(temporary)
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: a copy of the base model in the Diffusers layout cannot be written there: {error}. It goes into the "
            f"workspace: choose one with room with --workspace."
        ) from error
