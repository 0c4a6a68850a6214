"""Loads the components of a model in the Diffusers layout, from safetensors files alone."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import ModelError
from ftk.models.components.weights import weight_files
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
_LOGGED_FROM_BYTES = 1 << 30
"""Loading a component of this size takes long enough to be announced."""


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


def pipeline_class(directory: Path) -> type | None:
    """diffusers' class of the pipeline in a folder; None if it does not say, or this diffusers has none of that name."""
    import diffusers

    try:
        name = storage.read_json(directory / "model_index.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    made = getattr(diffusers, name, None) if isinstance(name, str) else None
    return made if isinstance(made, type) and issubclass(made, diffusers.DiffusionPipeline) else None


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
