"""Loads the components of a model in the Diffusers layout, from safetensors files alone."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import ModelError
from ftk.models.components import configuration, weights
from ftk.models.components.configuration import checked, first_line, outline, reading
from ftk.models.components.weights import weight_files
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_pipeline",
    "check_vocabulary",
    "checked",
    "first_line",
    "hide_progress_bars",
    "load_component",
    "load_pipeline",
    "num_not_finite",
    "outline",
    "pipeline_class",
    "reading",
]
LOGGER = logging.getLogger("ftk")
_LIBRARIES = ("diffusers", "transformers")
_UNUSED = re.compile(r"(\.position_ids|^logit_scale)$|^(vision_model|visual_projection|text_projection)\.")
"""Tensors of CLIP that published text encoders hold beside what is read."""
_LOGGED_FROM_BYTES = 1 << 30
"""Loading a component of this size takes long enough to be announced."""


def check_pipeline(directory: Path, family: str, pipeline_class: str) -> None:
    """Raise `ModelError` unless `model_index.json` names this diffusers pipeline."""
    path = directory / "model_index.json"
    if not path.exists():
        listed = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model in the Diffusers layout: it has no model_index.json (found: {listed}). "
            f"Point model.path at a Diffusers folder; `ftk tiny {family} DIR` writes one to try."
        )
    class_name = configuration.read(path).get("_class_name")
    if class_name != pipeline_class:
        raise ModelError(f"{directory} holds a {class_name!s:.80}, not the {pipeline_class} that family {family} needs.")


def _component_class(path: Path, name: str, value: Any) -> Any:
    """The class that a pipeline's index names for a component.

    Raises:
        ModelError: diffusers and transformers have no such class.
    """
    import importlib

    if isinstance(value, list) and len(value) == 2 and value[0] in _LIBRARIES and isinstance(value[1], str):
        component_class = getattr(importlib.import_module(value[0]), value[1], None)
        if isinstance(component_class, type):
            return component_class
    raise ModelError(f"{path}: `{name}` is {value!r:.80}. It must name a library (diffusers, transformers) and a class of it.")


def pipeline_class(directory: Path) -> type | None:
    """diffusers' class of the pipeline in a folder; None if it does not say, or this diffusers has none of that name."""
    import diffusers

    try:
        name = storage.read_json(directory / "model_index.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    return pipeline if isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline) else None


def load_component(component: Any, directory: Path, name: str, dtype: "torch.dtype") -> Any:
    """The component called `name`, by its class's `from_pretrained`, from safetensors alone: the rest are pickles.

    Raises:
        ModelError: it is missing or damaged, its configuration is not that of its weights, or one of these is not finite.
    """
    folder = directory / name
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if num_bytes > _LOGGED_FROM_BYTES:
        LOGGER.info("loading %s, %s", folder, human_bytes(num_bytes))
    hide_progress_bars()
    with reading(folder, component.__name__):
        for index in folder.glob("*.safetensors.index.json"):
            weight_files(index.parent, index.name.removesuffix(".index.json"))
    checked(component, folder)
    with reading(folder, component.__name__):
        module, loading_info = component.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _refuse_other_tensors(component, folder, loading_info)
    _refuse_not_finite(module, folder)
    return module


def _refuse_other_tensors(component: Any, folder: Path, found: Any) -> None:
    """Refuse weights that lack a tensor, which would be random, and such as the configuration has no layer for."""
    if missing := sorted(map(str, found["missing_keys"])):
        raise ModelError(
            f"{folder} lacks {len(missing)} of the tensors of a {component.__name__}, such as {missing[0]}. Download the model "
            f"again."
        )
    unexpected = [name for name in map(str, found["unexpected_keys"]) if not _UNUSED.search(name)]
    if unexpected:
        raise ModelError(
            f"{folder / 'config.json'} does not describe the weights beside it: they have {len(unexpected)} tensors for which "
            f"it has no layer, such as {min(unexpected)}. Download the model again."
        )


def _refuse_not_finite(module: "torch.nn.Module", folder: Path) -> None:
    """Refuse weights that hold NaN or infinity, which would only show as a loss or a picture that is none.

    One pass over the weights: about 2 GB/s of bf16 per core, faster than copying them.
    """
    for name, tensor in module.state_dict().items():
        count = num_not_finite(tensor)
        if count:
            files = [path for path in sorted(folder.glob("*.safetensors")) if _holds(path, name)]
            place = files[0] if files else folder
            raise ModelError(
                f"{place}: {count:,} of the {tensor.numel():,} values of {name} are NaN or infinite in "
                f"{str(tensor.dtype).removeprefix('torch.')}. The file is damaged, or its model broke while it was trained: "
                f"download it again, or use another model."
            )


def check_vocabulary(tokenizer: Any, model: Any, folder: Path) -> None:
    """Raise `ModelError` if the tokenizer in `folder` has more tokens than the text encoder has embeddings."""
    largest, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ModelError(
            f"{folder} has a token number {largest:,}, and the text encoder embeds {rows:,} tokens. The two are not of one "
            f"model: download it again."
        )


def _holds(path: Path, name: str) -> bool:
    """Whether a file has a tensor of this name, or of a longer one: transformers shortens names as it loads."""
    return any(f".{each}".endswith(f".{name}") for each in weights.header(path))


def num_not_finite(tensor: "torch.Tensor") -> int:
    """How many values are NaN or infinite. Of most finite tensors only the sum is computed, which is the fastest look at them.

    In another precision than the tensor's own the sum takes ten times as long; where it overflows the values are counted.
    """
    import torch

    if not tensor.is_floating_point() or tensor.is_meta or torch.isfinite(tensor.sum()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def load_pipeline(
    pipeline_class: Any, directory: Path, device: "torch.device", *, dtype: "torch.dtype", **arguments: Any
) -> Any:
    """A diffusers pipeline without progress bars; what is not among the arguments is loaded onto the device."""
    hide_progress_bars()
    path = directory / "model_index.json"
    for name, value in configuration.read(path).items():
        if name in arguments or name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        component_class = _component_class(path, name, value)
        if weights.needs_weights(directory / name):
            arguments[name] = load_component(component_class, directory, name, dtype).eval().to(device)
    with reading(directory, pipeline_class.__name__):
        pipeline = pipeline_class.from_pretrained(directory, dtype=dtype, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hide_progress_bars() -> None:
    """Loading is said in one line of ours; downloads keep the Hub client's bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
