"""Checkpoints in one safetensors file, as ComfyUI, A1111 and sd-scripts keep them, converted by diffusers' own converters.

A component is read alone, converted, and written in the Diffusers layout in the precision that it has in the file.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ftk import storage
from ftk.errors import ModelError
from ftk.models.components import weights
from ftk.models.components.loading import first_line, hide_progress_bars
from ftk.models.components.weights import Tensor

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
SUFFIX = ".safetensors"
VERSION = 1
"""Raised whenever the conversion writes something else."""
_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_NOT_FLOATS = frozenset({"I64", "I32", "BOOL"})
_ADAPTER_ENDS = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".hada_w1_a", ".lokr_w1", ".oft_blocks")
_LISTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a file may hold one component.

    Attributes:
        model_class: the component's class, of diffusers or transformers.
        anchor: a tensor that every such component has; it tells the layout.
        prefixes: what may stand before the component's names in a file, the first of which diffusers' converter reads.
    """

    model_class: str
    anchor: str
    prefixes: tuple[str, ...]


@runtime_checkable
class ReadsSingleFiles(Protocol):
    """A family whose checkpoints in one file diffusers can convert."""

    single_file: Mapping[str, Sequence[Layout]]
    """The components that a file may hold, each with its possible layouts."""

    def single_file_config(self, tensors: Mapping[str, Tensor]) -> str:
        """The Hub id of the model whose configurations go with a checkpoint of these tensors.

        Raises:
            ModelError: the checkpoint is of another family; the message names it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint, of which the header was read.

    Attributes:
        parts: for each component in it, its layout and the prefix of its names in this file.
        default_config: the Hub id of the model whose configurations go with it.
        objective: `epsilon` or `v_prediction` where the file says so.
        is_zero_snr: whether the file says that its noise levels end at pure noise.
    """

    path: Path
    parts: Mapping[str, tuple[Layout, str]]
    default_config: str
    objective: str | None
    is_zero_snr: bool


def is_checkpoint(path: Path) -> bool:
    """Whether `model.path` names a file that is read as a checkpoint."""
    return path.suffix == SUFFIX and path.is_file()


def open_checkpoint(family: Any, path: Path) -> Checkpoint:
    """Read the header of a checkpoint, and find the family's components in it.

    Raises:
        ModelError: it is damaged, of another family, an adapter, or quantised; or the family reads no such files.
    """
    if not isinstance(family, ReadsSingleFiles):
        raise ModelError(f"{path}: {family.name} cannot be read from one file. Set model.path to a Diffusers folder.")
    tensors = weights.header(path)
    parts = {name: part for name, layouts in family.single_file.items() if (part := _find(tensors, layouts))}
    if not parts:
        raise ModelError(_nothing_found(family, path, tensors))
    _refuse_quantised(path, tensors, [prefix for _, prefix in parts.values()])
    metadata = weights.metadata(path)
    named = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    try:
        default_config = family.single_file_config(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return Checkpoint(
        path=path,
        parts=parts,
        default_config=default_config,
        objective="v_prediction" if "v_pred" in tensors else named,
        is_zero_snr="ztsnr" in tensors,
    )


def _find(tensors: Mapping[str, Tensor], layouts: Sequence[Layout]) -> tuple[Layout, str] | None:
    matches = ((layout, prefix) for layout in layouts for prefix in layout.prefixes if prefix + layout.anchor in tensors)
    return next(matches, None)


def _nothing_found(family: Any, path: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.endswith(_ADAPTER_ENDS) for name in tensors):
        return f"{path} is an adapter (LoRA or the like), not a model. Set model.path to the model that it was trained on."
    first_keys = ", ".join(sorted(tensors)[:_LISTED])
    return (
        f"{path} holds none of the parts of a {family.name} model ({', '.join(family.single_file)}) under names that are "
        f"known. Its first tensors are {first_keys or 'none'}. Check model.family, or set model.path to a Diffusers folder."
    )


def _refuse_quantised(path: Path, tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> None:
    for name, tensor in tensors.items():
        if name.startswith(tuple(prefixes)) and tensor.dtype not in _DTYPES | _NOT_FLOATS:
            raise ModelError(
                f"{path}: {name} is stored as {tensor.dtype}: this is a quantised copy of the model, and what was rounded off "
                f"would be missing in training. Use the file in bf16, fp16 or fp32."
            )


def convert(checkpoint: Checkpoint, component: str, config: Path, target: Path) -> None:
    """Write one component of a checkpoint in the Diffusers layout.

    Args:
        config: a model in the Diffusers layout, of which the component's configuration is read.

    Raises:
        ModelError: the configuration does not fit the weights, or some of these are missing.
    """
    layout, prefix = checkpoint.parts[component]
    place = f"{checkpoint.path}: its {component}"
    try:
        module = _converted(layout, _tensors(checkpoint.path, layout, prefix), config, component)
    except NotImplementedError as error:
        # What torch raises for weights without values: diffusers' converters do not complain of missing tensors.
        raise ModelError(
            f"{place} lacks tensors that the configuration {config / component} asks for. Set model.config to a model of the "
            f"same architecture, or download the file again."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{place} cannot be converted with the configuration {config / component}: {first_line(error)}. Set model.config "
            f"to a model of the same architecture."
        ) from error
    module.save_pretrained(target)


def _tensors(path: Path, layout: Layout, prefix: str) -> "dict[str, torch.Tensor]":
    """The component's tensors under the names that diffusers' converter reads."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is not a mapping)
        return {layout.prefixes[0] + name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _converted(layout: Layout, tensors: "dict[str, torch.Tensor]", config: Path, component: str) -> Any:
    """The component, in the widest precision of its tensors."""
    import diffusers
    import torch
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    hide_progress_bars()
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # it warns of every precision but fp32
    dtype = functools.reduce(torch.promote_types, {each.dtype for each in tensors.values() if each.is_floating_point()})
    options = {"config": str(config), "subfolder": component, "torch_dtype": dtype, "local_files_only": True}
    try:
        if model_class := getattr(diffusers, layout.model_class, None):
            return model_class.from_single_file(tensors, **options)
        return create_diffusers_clip_model_from_ldm(getattr(transformers, layout.model_class), tensors, **options)
    finally:
        diffusers.logging.set_verbosity(verbosity)


def write_scheduler(checkpoint: Checkpoint, config: Path, target: Path) -> None:
    """The scheduler's configuration, with the objective and the last noise level that the checkpoint names."""
    for path in config.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    changed: dict[str, Any] = {}
    if checkpoint.objective is not None:
        changed["prediction_type"] = checkpoint.objective
    if checkpoint.is_zero_snr:
        changed["rescale_betas_zero_snr"] = True
    file = target / "scheduler_config.json"
    try:
        settings = storage.read_json(file)
        if not changed or "beta_schedule" not in settings:
            return
        if different := {name: value for name, value in changed.items() if settings.get(name) != value}:
            LOGGER.info("%s is marked with %s, unlike %s: the mark counts", checkpoint.path, different, config)
        file.write_bytes(storage.json_bytes({**settings, **changed}))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{config / 'scheduler_config.json'} cannot be read: {error}") from None


def shaped(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Stand-ins with the shapes alone, for diffusers' functions that tell models apart by them."""
    return {name: SimpleNamespace(shape=tensor.shape) for name, tensor in tensors.items()}
