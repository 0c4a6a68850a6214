"""Finds a model's folder, downloads it where it must, and loads its components from safetensors files alone."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import locations, storage
from ftk.configs.schema import HUB_ID, ModelConfig
from ftk.errors import EnvironmentFault, ModelError
from ftk.models.base import Family
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
_HUB_ID = re.compile(HUB_ID)
_LOGGED_FROM_BYTES = 1 << 30
"""Loading a component of this size takes long enough to be announced."""
# What a repository may hold beside the weights that are read: other formats, half-precision copies, weights without EMA.
_NOT_READ = ("*.bin", "*.ckpt", "*.fp16.*", "*.non_ema.*", "*.msgpack", "*.onnx*", "*.pb", "*openvino*", "*flax*")


def locate(family: Family, model: ModelConfig, components: Sequence[str]) -> Path:
    """The local directory that holds the named components of a model; of a Hub id only those components are downloaded.

    Raises:
        ModelError: neither a local folder nor a Hub id, or a folder that is no model of the family.
        EnvironmentFault: the Hub could not be reached.
    """
    directory = locations.local_path(model.path)
    if not directory.is_dir():
        directory = _download(model, components)
    family.check(directory)
    missing = [name for name in components if not (directory / name).is_dir()]
    if missing:
        raise ModelError(
            f"model.path {model.path}: no {', '.join(missing)} folder in it. "
            f"Found: {', '.join(sorted(entry.name for entry in directory.iterdir())) or 'nothing'}."
        )
    return directory


def local_components(model: ModelConfig, components: Sequence[str]) -> Path | None:
    """The local directory of a model if it holds all the named components without a download, else None."""
    directory = locations.local_path(model.path)
    return directory if all((directory / name).is_dir() for name in components) else None


def _download(model: ModelConfig, components: Sequence[str]) -> Path:
    if not _HUB_ID.match(model.path):
        raise ModelError(f"model.path {model.path}: no such folder, and it is no Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["model_index.json", *(f"{name}/*" for name in components)]
    try:
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=patterns, ignore_patterns=list(_NOT_READ))
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


def check_pipeline(directory: Path, family: str, pipeline_class: str) -> None:
    """Raise `ModelError` unless `model_index.json` names this diffusers pipeline."""
    try:
        found = storage.read_json(directory / "model_index.json").get("_class_name")
    except FileNotFoundError:
        listed = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model in the Diffusers layout: it has no model_index.json (found: {listed}). "
            f"Point model.path at a Diffusers folder; `ftk tiny {family} DIR` writes one to try."
        ) from None
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{directory / 'model_index.json'} cannot be read as JSON: {error}") from None
    if found != pipeline_class:
        raise ModelError(f"{directory} holds a {found}, not the {pipeline_class} that family {family} needs.")


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a component's weights: those that `NAME.index.json` lists, else the one file.

    Raises:
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    index = folder / f"{name}.index.json"
    if not index.exists():
        return [folder / name]
    try:
        names = set(storage.read_json(index)["weight_map"].values())
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} cannot be read ({type(error).__name__}: {error})") from None
    return [folder / storage.plain_name(file) for file in sorted(names)]


def load_component(component: Any, directory: Path, name: str, dtype: "torch.dtype") -> Any:
    """The component called `name`, by its class's `from_pretrained`, from safetensors alone: the rest are pickles."""
    num_bytes = sum(path.stat().st_size for path in (directory / name).glob("*.safetensors"))
    if num_bytes > _LOGGED_FROM_BYTES:
        LOGGER.info("loading %s, %s", directory / name, human_bytes(num_bytes))
    hide_progress_bars()
    try:
        for index in (directory / name).glob("*.safetensors.index.json"):
            weight_files(index.parent, index.name.removesuffix(".index.json"))
        return component.from_pretrained(directory / name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory / name} cannot be loaded as {component.__name__}: {first_line(error)}") from error


def outline(model_class: Any, config: Any, dtype: "torch.dtype") -> Any:
    """A diffusers model's shapes alone, frozen, on the `meta` device."""
    import torch

    with torch.device("meta"):
        model = model_class.from_config(config)
    # The `to` of diffusers' models warns of every dtype.
    return torch.nn.Module.to(model, dtype).requires_grad_(False)


def load_pipeline(pipeline_class: Any, directory: Path, device: "torch.device", **arguments: Any) -> Any:
    """A diffusers pipeline without progress bars; what is not among the arguments is loaded onto the device."""
    import torch

    hide_progress_bars()
    try:
        pipeline = pipeline_class.from_pretrained(directory, **arguments)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} cannot be loaded as a pipeline: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in arguments:
            component.to(device)
    return pipeline


def hide_progress_bars() -> None:
    """Loading is said in one line of ours; downloads keep the Hub client's bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
