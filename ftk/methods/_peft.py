"""What all methods of the PEFT library share: targets, injection, state, the PEFT directory, merging.

An adapter is injected into the denoiser itself, which keeps its class: families, pipelines and FSDP meet the same module.
"""

import contextlib
import copy
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.base import EVERYTHING, TargetPattern, Targets, target_modules
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
Refusal = Callable[["torch.nn.Module"], str | None]
"""Why a method cannot carry a layer; None if it can."""
_ROOT = "base_model.model."
"""What `PeftModel` puts before the names of the model that it wraps."""
_TRAINING_ONLY = ("lora_dropout", "module_dropout", "rank_dropout", "boft_dropout")
"""Settings that change nothing of the weights, and would drop something from the pictures of who loads them."""


# --- targets ------------------------------------------------------------------------------------------------------------


def linear_or_convolution(layer: "torch.nn.Module") -> str | None:
    """The `Refusal` of methods that carry linear layers and convolutions."""
    import torch

    if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
        return None
    return f"it is a {type(layer).__name__}, no linear layer or convolution"


def linear_or_pointwise(layer: "torch.nn.Module") -> str | None:
    """The `Refusal` of methods that rotate the input's channels, which a larger kernel does not see one by one."""
    import torch

    if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1):
        sides = "x".join(map(str, layer.kernel_size))
        return f"it is a {sides} convolution, whose rotated and merged weights would differ; linear layers and 1x1 ones work"
    return linear_or_convolution(layer)


def select(denoiser: Any, family: Family, targets: Targets, refusal: Refusal) -> list[str]:
    """Names of the layers that `targets` means, in the denoiser's order.

    A pattern passes over containers and norms, which hold no layer's weights; `all` also over what cannot be carried.

    Raises:
        ConfigError: a target that names nothing (those near are listed), or a layer that the method cannot carry.
    """
    modules = {name: module for name, module in denoiser.named_modules() if name}
    wanted = target_modules(family, targets)
    if isinstance(wanted, TargetPattern):
        found = [name for name, module in modules.items() if is_layer(module) and re.fullmatch(wanted.regex, name)]
        if targets == EVERYTHING:
            found = [name for name in found if refusal(modules[name]) is None]
        if not found:
            raise ConfigError(
                f"method.targets: the expression {wanted.regex!r} matches no layer of {family.name}. {_some(modules)}"
            )
    else:
        found = _with_suffixes(modules, wanted, family, refusal)
    for name in found:
        reason = refusal(modules[name])
        if reason is not None:
            raise ConfigError(
                f"method.targets: {name} cannot be trained by this method: {reason}. Leave it out of the targets."
            )
    return found


def is_layer(module: "torch.nn.Module") -> bool:
    """Whether a module holds a weight of two dimensions or more itself; an 8-bit linear layer does."""
    import torch

    weight = None if isinstance(module, torch.nn.Linear) else dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(module, torch.nn.Linear) or (weight is not None and weight.ndim > 1)


def _with_suffixes(modules: Mapping[str, Any], suffixes: Sequence[str], family: Family, refusal: Refusal) -> list[str]:
    found: set[str] = set()
    layers = [name for name, module in modules.items() if is_layer(module)]
    for suffix in suffixes:
        matched = [name for name in modules if ("." + name).endswith("." + suffix)]
        # A name that several kinds of module share must not be trained here and passed over there.
        if not any(is_layer(modules[name]) for name in matched):
            near = _near(suffix, layers)
            raise ConfigError(
                f"method.targets: {suffix!r} is the name of no linear layer or convolution of {family.name}.{near}"
            )
        found.update(matched)
    return [name for name in modules if name in found]


def _near(suffix: str, layers: Sequence[str]) -> str:
    ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2)}
    ends -= {end for end in ends if end.split(".")[0].isdecimal()}
    close = difflib.get_close_matches(suffix, sorted(ends), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" Some of its layers: {', '.join(sorted(ends)[:8])}."


def _some(modules: Mapping[str, Any]) -> str:
    layers = [name for name, module in modules.items() if is_layer(module)]
    return f"It must match whole names, such as {re.escape(layers[len(layers) // 2])}"


def as_peft_targets(denoiser: Any, family: Family, targets: Targets, names: Sequence[str]) -> list[str] | str:
    """`names` as PEFT's `target_modules`: the suffixes that they came from, or an expression that matches them alone."""
    wanted = target_modules(family, targets)
    if not isinstance(wanted, TargetPattern):
        return wanted
    # Blocks differ in their number alone: without it a few dozen names remain.
    short = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    everything = [name for name, _ in denoiser.named_modules() if name]
    expression = "|".join(short)
    if [name for name in everything if re.fullmatch(expression, name)] == list(names):
        return expression
    return "|".join(map(re.escape, names))


def check_patterns(patterns: Mapping[str, Any], names: Sequence[str], setting: str) -> None:
    """Refuse a key of `rank_pattern` or `alpha_pattern` that matches no target, by PEFT's own rule.

    Raises:
        ConfigError: it is no expression, or matches nothing.
    """
    for key in patterns:
        try:
            rule = re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ConfigError(f"method.{setting}: {key!r} is no regular expression: {error}") from None
        if not any(rule.match(name) for name in names):
            near = _near(key, names)
            raise ConfigError(f"method.{setting}: {key!r} is the end of no targeted layer's name.{near}")


# --- injection and state ------------------------------------------------------------------------------------------------


def attach(denoiser: Any, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
    """Inject the adapter that a `PeftConfig` describes; returns what is trained.

    Raises:
        ConfigError: PEFT refuses it.
    """
    import torch

    device = next(denoiser.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config, adapter_name=ADAPTER)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigError(f"method: PEFT refuses {config.peft_type.value}: {_first_line(error)}") from error
    return trained(denoiser)


def trained(denoiser: Any) -> "dict[str, torch.nn.Parameter]":
    """What requires a gradient, by name."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def adapted(denoiser: Any) -> dict[str, Any]:
    """The layers that carry the adapter, by the names that they have in a plain denoiser."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}


def state(denoiser: Any) -> "dict[str, torch.Tensor]":
    """The adapter's tensors under PEFT's names, and biases that are trained beside it, which PEFT does not find."""
    from peft import get_peft_model_state_dict

    tensors = dict(get_peft_model_state_dict(denoiser, adapter_name=ADAPTER))
    biases = {name: parameter for name, parameter in trained(denoiser).items() if name.endswith(".bias")}
    return tensors | {name: bias for name, bias in biases.items() if f".{ADAPTER}." not in name}


def load_state(denoiser: Any, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Inverse of `state`."""
    outcome = _set(denoiser, tensors)
    assert not outcome, f"state of another adapter: {outcome[:3]}"


def _set(denoiser: Any, tensors: "Mapping[str, torch.Tensor]") -> list[str]:
    """Set the adapter's tensors; returns the names that found no place."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(denoiser, dict(tensors), adapter_name=ADAPTER)
    return list(outcome.unexpected_keys)


def merge(denoiser: Any) -> None:
    """Fold the adapter into the weights, and remove it.

    Raises:
        ConfigError: PEFT cannot merge this adapter, or the base has 8-bit weights.
    """
    layers = adapted(denoiser)
    refuse_quantised(layers.values(), "merging")
    # Dropout is part of what some adapters compute their weights with.
    is_training = denoiser.training
    denoiser.eval()
    for name, layer in layers.items():
        try:
            layer.merge(adapter_names=[ADAPTER])
        except (NotImplementedError, AttributeError) as error:
            kind = denoiser.peft_config[ADAPTER].peft_type.value
            raise ConfigError(f"{kind} cannot be merged into the base weights ({name}: {_first_line(error)}).") from error
    unload(denoiser)
    denoiser.train(is_training)


def unload(denoiser: Any) -> None:
    """Take the adapter out again; weights stay as they are."""
    denoiser.unload_lora()


def refuse_quantised(layers: Iterable[Any], what: str) -> None:
    """Refuse layers whose weights are computed from 8-bit codes at each reading: what is written into them is lost.

    Raises:
        ConfigError: there is such a layer.
    """
    for layer in layers:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if "weight" not in dict(base.named_parameters(recurse=False)):
            raise ConfigError(f"{what} needs the base weights in full, and these are 8-bit. Set train.memory.base: full.")


# --- the PEFT directory -------------------------------------------------------------------------------------------------


def export_directory(
    directory: Path, config: Any, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> list[Path]:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained(denoiser, DIR)` reads them."""
    settings = plain(config.to_dict()) | {"inference_mode": True, "base_model_name_or_path": metadata.get("ftk_base_model")}
    storage.commit_bytes(directory / CONFIG_FILE, storage.json_bytes(settings))
    named = {_ROOT + name: tensor for name, tensor in tensors.items()}
    return [directory / CONFIG_FILE, commit_tensors(directory / WEIGHTS_FILE, named, metadata)]


def load_directory(pipeline: Any, directory: Path) -> None:
    """Inject what `export_directory` wrote into a fresh pipeline's denoiser.

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
            f"{directory / CONFIG_FILE} cannot be read as an adapter's settings: {_first_line(error)}"
        ) from error
    denoiser = denoiser_of(pipeline)
    check_fits(denoiser, tensors, path)
    is_training = denoiser.training
    with explaining(path):
        denoiser.add_adapter(config, adapter_name=ADAPTER)
        left_over = _set(denoiser, tensors)
        left_over += sorted(tensors.keys() ^ state(denoiser).keys())
    if left_over:
        raise CheckpointError(
            f"{path} was trained on another base model: {left_over[0]} is in one of the two alone. Load it into the "
            f"model that it was trained on."
        )
    # New modules come in training mode.
    denoiser.train(is_training)


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
        CheckpointError: it is missing, damaged, or empty.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: `ftk train` or `ftk export` writes it.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}. Export it again.") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors. Export it again.")
    return tensors


def check_fits(denoiser: Any, tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Refuse an adapter of which a tensor belongs to no layer of this denoiser.

    Raises:
        CheckpointError: it was trained on another base model.
    """
    modules = dict(denoiser.named_modules())
    for name in tensors:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        nearest = next((modules[each] for each in above if each in modules), None)
        # A container that is there without the layer is no place for it.
        if nearest is None or not (is_layer(nearest) or dict(nearest.named_parameters(recurse=False))):
            raise CheckpointError(
                f"{path} was trained on another base model: it holds {name}, and this {type(denoiser).__name__} has no such "
                f"layer. Load it into the model that it was trained on."
            )


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what PEFT and diffusers raise on an adapter that does not fit into a `CheckpointError`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this model: {_first_line(error)}. Load it into the model that it was trained on."
        ) from error


def denoiser_of(pipeline: Any) -> Any:
    """The transformer or U-Net of a diffusers pipeline."""
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


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


def usage(family: Family) -> str:
    """Python lines that load a PEFT directory into `pipeline`."""
    component = family.denoiser_components[0]
    return f'from peft import PeftModel\nPeftModel.from_pretrained(pipeline.{component}, "path/to/this/folder")'


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torch's first line says only that loading failed; the second says of what
    return lines["loading state_dict" in lines[0] and len(lines) > 1].strip().rstrip(".")
