"""An adapter of PEFT inside a model: put in, read, set, folded into the weights, taken out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError

if TYPE_CHECKING:
    import torch

ADAPTER = "default"


def inject(model: Any, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
    """Inject the adapter that a `PeftConfig` describes; returns what is trained.

    Raises:
        ConfigError: PEFT refuses it.
    """
    import torch

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, adapter_name=ADAPTER)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigError(f"method: PEFT refuses {config.peft_type.value}: {first_line(error)}") from error
    return trained(model)


def trained(model: Any) -> "dict[str, torch.nn.Parameter]":
    """What requires a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: Any) -> dict[str, Any]:
    """The layers that carry the adapter, by the names that they have in a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def state(model: Any, adapter: str = ADAPTER) -> "dict[str, torch.Tensor]":
    """The adapter's tensors under PEFT's names, and biases that are trained beside it, which PEFT does not find."""
    from peft import get_peft_model_state_dict

    tensors = dict(get_peft_model_state_dict(model, adapter_name=adapter))
    whole = tuple(f"{name}." for name in whole_modules(model, adapter))
    biases = {name: parameter for name, parameter in trained(model).items() if name.endswith(".bias")}
    return tensors | {name: bias for name, bias in biases.items() if f".{adapter}." not in name and not name.startswith(whole)}


def whole_modules(model: Any, adapter: str = ADAPTER) -> list[str]:
    """Names of the modules that are trained whole beside the adapter, which its settings list as `modules_to_save`."""
    return modules_of_entries(model, getattr(model.peft_config[adapter], "modules_to_save", None) or ())


def modules_of_entries(model: Any, entries: Iterable[str]) -> list[str]:
    """The modules that PEFT takes the entries of `modules_to_save` for: those whose names end so, within a word too."""
    ends = tuple(entries)
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(ends)] if ends else []


def whole_state(model: Any, adapter: str = ADAPTER) -> "dict[str, torch.Tensor]":
    """All tensors of the modules that are trained whole, under the names that PEFT gives them in files: their own."""
    return {
        f"{name}.{key}": tensor
        for name in whole_modules(model, adapter)
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def set_state(model: Any, tensors: "Mapping[str, torch.Tensor]", adapter: str = ADAPTER) -> list[str]:
    """Set the adapter's tensors; returns the names that found no place."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter)
    return list(outcome.unexpected_keys)


@contextmanager
def switched_off(models: Iterable[Any]) -> Iterator[None]:
    """Inside, the models compute without their adapters; what requires a gradient is as before afterwards."""
    layers = [layer for model in models for layer in adapted(model).values()]
    parameters = [each for layer in layers for each in layer.parameters() if each.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for each in parameters:
            each.requires_grad_(True)


@contextmanager
def at_strength(models: Iterable[Any], strength: float) -> Iterator[None]:
    """Inside, adapters that have a scale add so many times what they add otherwise."""
    layers = [layer for model in models for layer in adapted(model).values() if ADAPTER in getattr(layer, "scaling", {})]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = strength * scale
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def merge(model: Any) -> None:
    """Fold the adapter into the weights, and remove it.

    Raises:
        ConfigError: PEFT cannot merge this adapter, or the base has 8-bit weights.
    """
    layers = adapted(model)
    refuse_quantised(layers.values(), "merging")
    # Dropout is part of what some adapters compute their weights with.
    is_training = model.training
    model.eval()
    for name, layer in layers.items():
        try:
            layer.merge(adapter_names=[ADAPTER])
        except (NotImplementedError, AttributeError) as error:
            kind = model.peft_config[ADAPTER].peft_type.value
            raise ConfigError(f"{kind} cannot be merged into the base weights ({name}: {first_line(error)}).") from error
    unload(model)
    model.train(is_training)


def unload(model: Any) -> None:
    """Take the adapter out again; weights stay as they are. As `unload_lora` of diffusers, which transformers has not."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    model._hf_peft_config_loaded = False
    model.peft_config = {}


def refuse_quantised(layers: Iterable[Any], what: str) -> None:
    """Refuse layers whose weights are computed from 8-bit codes at each reading: what is written into them is lost.

    Raises:
        ConfigError: there is such a layer.
    """
    for layer in layers:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if "weight" not in dict(base.named_parameters(recurse=False)):
            raise ConfigError(f"{what} needs the base weights in full, and these are 8-bit. Set train.memory.base: full.")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torch's first line says only that loading failed; the second says of what
    return lines["loading state_dict" in lines[0] and len(lines) > 1].strip().rstrip(".")
