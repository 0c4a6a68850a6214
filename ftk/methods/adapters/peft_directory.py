"""Files of adapters: the PEFT directory of each component, and safetensors that are written whole and read with care."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import CheckpointError
from ftk.methods.adapters import injection, targets
from ftk.methods.base import Export
from ftk.models.base import DENOISER, Family, Model
from ftk.models.components.loading import num_not_finite

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IMPORT = "from peft import PeftModel"
_ROOT = "base_model.model."
"""What `PeftModel` puts before the names of the model that it wraps."""
_TRAINING_ONLY = ("lora_dropout", "module_dropout", "rank_dropout", "boft_dropout")
"""Settings that change nothing of the weights, and would drop something from the pictures of who loads them."""


def export_directories(model: Model, export: Export) -> list[Path]:
    """The adapters as they are, `export_directory` of each: the denoiser's in the folder itself, others in one of their own."""
    files = []
    for name, module in model.components.items():
        settings = for_delivery(module.peft_config[injection.ADAPTER])
        tensors = injection.state(module) | injection.whole_state(module)
        files += export_directory(folder(export.directory, name), settings, tensors, export.metadata)
    return files


def export_directory(
    directory: Path, config: Any, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> list[Path]:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained(model, DIR)` reads them."""
    settings = plain(config.to_dict()) | {"inference_mode": True, "base_model_name_or_path": metadata.get("ftk_base_model")}
    storage.commit_bytes(directory / CONFIG_FILE, storage.json_bytes(settings))
    named = {_ROOT + name: tensor for name, tensor in tensors.items()}
    return [directory / CONFIG_FILE, commit_tensors(directory / WEIGHTS_FILE, named, metadata)]


def load_directories(family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> None:
    """Inject what `export_directories` wrote into a pipeline that has no adapter of this name.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of another base model.
    """
    load_directory(getattr(pipeline, family.denoiser_attribute), directory, adapter)
    load_encoders(pipeline, directory, adapter)


def load_encoders(pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> None:
    """The same for its text encoders alone."""
    for name in sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}")):
        load_directory(encoder_of(pipeline, name, directory), directory / name, adapter)


def load_directory(model: Any, directory: Path, adapter: str = injection.ADAPTER) -> None:
    """Inject what `export_directory` wrote into a model that has no adapter of this name; whole modules replace its own.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of another base model.
    """
    from peft import PeftConfig

    path = directory / WEIGHTS_FILE
    tensors = {name.removeprefix(_ROOT): tensor for name, tensor in read_tensors(path).items()}
    try:
        config = PeftConfig.from_peft_type(**json.loads((directory / CONFIG_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} cannot be read as an adapter's settings: {injection.first_line(error)}"
        ) from error
    check_fits(model, tensors, path)
    whole = _take_whole(model, config, tensors)
    inject_tensors(model, config, tensors, path, adapter)
    with explaining(path):
        for name, parts in whole.items():
            model.get_submodule(name).load_state_dict(parts)
    if whole:
        model.peft_config[adapter].modules_to_save = list(whole)


def inject_tensors(model: Any, config: Any, tensors: "Mapping[str, torch.Tensor]", path: Path, adapter: str) -> None:
    """Inject an adapter of these settings and tensors into a model that has none of its name; `path` is for messages.

    Raises:
        CheckpointError: tensors and settings do not fit each other, or are of another base model.
    """
    is_training = model.training
    with explaining(path):
        model.add_adapter(config, adapter_name=adapter)
        left_over = injection.set_state(model, tensors, adapter)
        left_over += sorted(tensors.keys() ^ injection.state(model, adapter).keys())
    if left_over:
        raise CheckpointError(
            f"{path} was trained on another base model: {left_over[0]} is in one of the two alone. Load it into the "
            f"model that it was trained on."
        )
    # New modules come in training mode.
    model.train(is_training)


def _take_whole(model: Any, config: Any, tensors: "dict[str, torch.Tensor]") -> "dict[str, dict[str, torch.Tensor]]":
    """Take the modules that are whole out of an adapter's settings and tensors; returns the tensors of each.

    PEFT would put wrappers in the modules' place, which diffusers' pipelines and other adapters do not expect.
    """
    entries, config.modules_to_save = getattr(config, "modules_to_save", None) or (), None
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for module in injection.modules_of_entries(model, entries):
        keys = [name for name in tensors if name.startswith(f"{module}.")]
        whole[module] = {name.removeprefix(f"{module}."): tensors.pop(name) for name in keys}
    return whole


def usage_of_encoders(encoders: Sequence[str]) -> list[str]:
    """Python lines that load PEFT directories into these text encoders of `pipeline`."""
    lines = [f'PeftModel.from_pretrained(pipeline.{name}, "path/to/this/folder/{name}")' for name in encoders]
    return [IMPORT, *lines] if lines else []


def folder(directory: Path, component: str) -> Path:
    """Where a component's adapter lies in a PEFT directory."""
    return directory if component == DENOISER else directory / component


def commit_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file: equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    payload = save(_apart(tensors))
    storage.commit_bytes(path, storage.canonical_safetensors(payload, {"format": "pt", **metadata}))
    return path


def _apart(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """On the CPU, contiguous; what several layers share is written for each of them, as safetensors holds nothing twice."""
    plain_tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        plain_tensors[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    return plain_tensors


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """All tensors of a file.

    Raises:
        CheckpointError: it is missing, damaged, or empty, or a value is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: `ftk train` or `ftk export` writes it.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {injection.first_line(error)}. Export it again.") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors. Export it again.")
    refuse_not_finite(tensors, path)
    return tensors


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    file: Any
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: `ftk train` or `ftk export` writes it.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {injection.first_line(error)}. Export it again.") from error


def refuse_not_finite(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Refuse trained weights that hold NaN or infinity: pictures would be black, and a merged model useless.

    Raises:
        CheckpointError: with the tensor's name.
    """
    for name, tensor in tensors.items():
        if count := num_not_finite(tensor):
            raise CheckpointError(
                f"{path}: {count:,} of the {tensor.numel():,} values of {name} are NaN or infinite. The file is damaged, or "
                f"its training broke: use an earlier step, or train again with a lower learning rate."
            )


def check_fits(model: Any, tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Refuse an adapter of which a tensor belongs to no layer of this model, be that adapted already or not.

    Raises:
        CheckpointError: it was trained on another base model.
    """
    within = tuple(f"{name}." for name in injection.adapted(model))
    modules = {name: module for name, module in model.named_modules() if not name.startswith(within)}
    for name in tensors:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        nearest = next((modules[each] for each in above if each in modules), None)
        # A container that is there without the layer is no place for it.
        if nearest is None or not _holds_weights(nearest):
            raise CheckpointError(
                f"{path} was trained on another base model: it holds {name}, and this {type(model).__name__} has no such "
                f"layer. Load it into the model that it was trained on."
            )


def _holds_weights(module: "torch.nn.Module") -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return targets.is_layer(module) or isinstance(module, BaseTunerLayer) or bool(dict(module.named_parameters(recurse=False)))


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what PEFT and diffusers raise on an adapter that does not fit into a `CheckpointError`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this model: {injection.first_line(error)}. Load it into the model that it was trained on."
        ) from error


def encoder_of(pipeline: Any, name: str, directory: Path) -> Any:
    """A text encoder of a diffusers pipeline.

    Raises:
        CheckpointError: it has none of this name.
    """
    encoder = getattr(pipeline, name, None)
    if encoder is None:
        raise CheckpointError(
            f"{directory} was trained on another base model: it adapts a {name}, and this {type(pipeline).__name__} has none. "
            f"Load it into the model that it was trained on."
        )
    return encoder


def for_delivery(config: Any) -> Any:
    """A copy of a `PeftConfig` without what is for training alone."""
    delivered = copy.deepcopy(config)
    for name in _TRAINING_ONLY:
        if hasattr(delivered, name):
            setattr(delivered, name, 0.0)
    return delivered


def plain(value: Any) -> Any:
    """JSON values. PEFT keeps target modules in a set, whose order changes from process to process."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "value"):
        return value.value
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
