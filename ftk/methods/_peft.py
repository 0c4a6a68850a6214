"""What all methods of the PEFT library share: targets, injection, state, the PEFT directory, merging.

An adapter is injected into the denoiser itself, which keeps its class: families, pipelines and FSDP meet the same module. A
text encoder that is trained too gets one of its own.
"""

import contextlib
import copy
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods import base
from ftk.methods.base import (
    DENOISER,
    EVERYTHING,
    Components,
    Part,
    TargetPattern,
    Targets,
    TextEncoderConfig,
    check_format,
    target_modules,
)
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_IMPORT = "from peft import PeftModel"
_ROOT = "base_model.model."
"""What `PeftModel` puts before the names of the model that it wraps."""
_TRAINING_ONLY = ("lora_dropout", "module_dropout", "rank_dropout", "boft_dropout")
"""Settings that change nothing of the weights, and would drop something from the pictures of who loads them."""


class AdapterConfig(BaseModel):
    """The settings under `method:` that all adapters have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Targets = Field(default="attention", description="a group of the family, `all`, module names, or {regex: ...}")
    text_encoder: TextEncoderConfig | None = Field(default=None, description="train the text encoders too; {} by defaults")


class PeftMethod:
    """A method whose adapter PEFT makes: what it says of itself, and `peft_config`, are all that it must add."""

    name: str
    Config: ClassVar[type[BaseModel]]
    EXTRA: tuple[str, ...] = ()
    FORMATS: tuple[str, ...] = ("peft",)
    REASONS: ClassVar[Mapping[str, str]] = {}
    """Why a format is none of `FORMATS`, and what works."""

    def refusal(self, layer: "torch.nn.Module") -> str | None:
        """Why the method cannot carry a layer; None if it can. Linear layers and convolutions, if it does not say otherwise."""
        return linear_or_convolution(layer)

    def peft_config(self, part: Part, names: Sequence[str], config: Any) -> Any:
        """PEFT's settings for the layers called `names`.

        Raises:
            ConfigError: they do not fit one of the layers.
        """
        raise NotImplementedError

    def inject(self, part: Part, settings: Any, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject one component's adapter; returns what is trained of it, by its own names."""
        return inject(part.module, settings, seed)

    def needs(self, family: Family, config: Any) -> tuple[str, ...]:
        """The denoiser, and by `text_encoder` the text encoders."""
        return base.needs(family, config)

    def parameter_groups(self, config: Any) -> Sequence[tuple[str, float]]:
        """The text encoders' own learning rate."""
        return base.encoder_rates(config)

    def attach(self, components: Components, family: Family, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapters."""
        parts = base.parts(components, family, config)
        chosen = [select(part, self.refusal) for part in parts]
        for pattern in ("rank_pattern", "alpha_pattern"):
            check_patterns(getattr(config, pattern, {}), [name for names in chosen for name in names], pattern)
        parameters: dict[str, torch.nn.Parameter] = {}
        for part, names in zip(parts, chosen, strict=True):
            own = self.inject(part, self.peft_config(part, names, config), config, seed)
            parameters |= {part.prefix + name: parameter for name, parameter in own.items()}
        return parameters

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """PEFT's names, with a text encoder's before its own."""
        tensors: dict[str, torch.Tensor] = {}
        for name, module in components.items():
            tensors |= {base.prefix(name) + key: tensor for key, tensor in state(module).items()}
        return tensors

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        for name, module in components.items():
            load_state(module, base.tensors_of(name, components, state))

    def export(
        self,
        components: Components,
        family: Family,
        config: Any,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """A PEFT directory, with one of its own in it for each text encoder."""
        check_format(self.name, self.FORMATS, form, self.REASONS)
        return export_directories(directory, components, metadata)

    def load_into(self, pipeline: Any, directory: Path, adapter: str = ADAPTER) -> None:
        """PEFT's settings and tensors, injected under the adapter's name."""
        load_directories(pipeline, directory, adapter)

    def merge(self, components: Components) -> None:
        """Fold the adapters into the weights and remove them."""
        for module in components.values():
            merge(module)

    def usage(self, family: Family, config: Any) -> str:
        """PEFT's loader."""
        line = f'PeftModel.from_pretrained(pipeline.{family.denoiser_components[0]}, "path/to/this/folder")'
        others = usage_of_encoders(self.needs(family, config)) or [_IMPORT]
        return "\n".join([others[0], line, *others[1:]])


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


def select(part: Part, refusal: Callable[["torch.nn.Module"], str | None]) -> list[str]:
    """Names of the layers that the part's targets mean, in the model's order.

    A pattern passes over containers and norms, which hold no layer's weights; `all` also over what cannot be carried.

    Raises:
        ConfigError: a target that names nothing (those near are listed), or a layer that the method cannot carry.
    """
    modules = {name: module for name, module in part.module.named_modules() if name}
    wanted = target_modules(part)
    if isinstance(wanted, TargetPattern):
        found = [name for name, module in modules.items() if is_layer(module) and re.fullmatch(wanted.regex, name)]
        if part.targets == EVERYTHING:
            found = [name for name in found if refusal(modules[name]) is None]
        if not found:
            raise ConfigError(
                f"{part.setting}: the expression {wanted.regex!r} matches no layer of {part.owner}. {_some(modules)}"
            )
    else:
        found = _with_suffixes(part, modules, wanted)
    for name in found:
        reason = refusal(modules[name])
        if reason is not None:
            raise ConfigError(
                f"{part.setting}: {name} cannot be trained by this method: {reason}. Leave it out of the targets."
            )
    return found


def is_layer(module: "torch.nn.Module") -> bool:
    """Whether a module holds a weight of two dimensions or more itself; an 8-bit linear layer does."""
    import torch

    weight = None if isinstance(module, torch.nn.Linear) else dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(module, torch.nn.Linear) or (weight is not None and weight.ndim > 1)


def _with_suffixes(part: Part, modules: Mapping[str, Any], suffixes: Sequence[str]) -> list[str]:
    found: set[str] = set()
    layers = [name for name, module in modules.items() if is_layer(module)]
    for suffix in suffixes:
        matched = [name for name in modules if ("." + name).endswith("." + suffix)]
        # A name that several kinds of module share must not be trained here and passed over there.
        if not any(is_layer(modules[name]) for name in matched):
            near = _near(suffix, layers)
            raise ConfigError(
                f"{part.setting}: {suffix!r} is the name of no linear layer or convolution of {part.owner}.{near}"
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


def as_peft_targets(part: Part, names: Sequence[str]) -> list[str] | str:
    """`names` as PEFT's `target_modules`: the suffixes that they came from, or an expression that matches them alone."""
    wanted = target_modules(part)
    if not isinstance(wanted, TargetPattern):
        return wanted
    # Blocks differ in their number alone: without it a few dozen names remain.
    short = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    everything = [name for name, _ in part.module.named_modules() if name]
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
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"method.{setting}: {key!r} is no regular expression: {error}") from None
        if not matching({key: None}, names):
            near = _near(key, names)
            raise ConfigError(f"method.{setting}: {key!r} is the end of no targeted layer's name.{near}")


def matching(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those patterns that match one of a component's targets: PEFT warns of the others."""
    return {key: value for key, value in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names)}


# --- injection and state ------------------------------------------------------------------------------------------------


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
            raise ConfigError(f"method: PEFT refuses {config.peft_type.value}: {_first_line(error)}") from error
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
    biases = {name: parameter for name, parameter in trained(model).items() if name.endswith(".bias")}
    return tensors | {name: bias for name, bias in biases.items() if f".{adapter}." not in name}


def load_state(model: Any, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Inverse of `state`."""
    outcome = _set(model, tensors)
    assert not outcome, f"state of another adapter: {outcome[:3]}"


def _set(model: Any, tensors: "Mapping[str, torch.Tensor]", adapter: str = ADAPTER) -> list[str]:
    """Set the adapter's tensors; returns the names that found no place."""
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter)
    return list(outcome.unexpected_keys)


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
            raise ConfigError(f"{kind} cannot be merged into the base weights ({name}: {_first_line(error)}).") from error
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


# --- the PEFT directory -------------------------------------------------------------------------------------------------


def export_directories(directory: Path, components: Components, metadata: Mapping[str, str]) -> list[Path]:
    """The adapters as they are, `export_directory` of each: the denoiser's in the folder itself, others in one of their own."""
    files = []
    for name, module in components.items():
        settings = for_delivery(module.peft_config[ADAPTER])
        files += export_directory(folder(directory, name), settings, state(module), metadata)
    return files


def export_directory(
    directory: Path, config: Any, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> list[Path]:
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained(model, DIR)` reads them."""
    settings = plain(config.to_dict()) | {"inference_mode": True, "base_model_name_or_path": metadata.get("ftk_base_model")}
    storage.commit_bytes(directory / CONFIG_FILE, storage.json_bytes(settings))
    named = {_ROOT + name: tensor for name, tensor in tensors.items()}
    return [directory / CONFIG_FILE, commit_tensors(directory / WEIGHTS_FILE, named, metadata)]


def load_directories(pipeline: Any, directory: Path, adapter: str = ADAPTER) -> None:
    """Inject what `export_directories` wrote into a pipeline that has no adapter of this name.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of another base model.
    """
    load_directory(denoiser_of(pipeline), directory, adapter)
    load_encoders(pipeline, directory, adapter)


def load_encoders(pipeline: Any, directory: Path, adapter: str = ADAPTER) -> None:
    """The same for its text encoders alone."""
    for name in sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}")):
        load_directory(encoder_of(pipeline, name, directory), directory / name, adapter)


def load_directory(model: Any, directory: Path, adapter: str = ADAPTER) -> None:
    """Inject what `export_directory` wrote into a model that has no adapter of this name.

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
    check_fits(model, tensors, path)
    is_training = model.training
    with explaining(path):
        model.add_adapter(config, adapter_name=adapter)
        left_over = _set(model, tensors, adapter)
        left_over += sorted(tensors.keys() ^ state(model, adapter).keys())
    if left_over:
        raise CheckpointError(
            f"{path} was trained on another base model: {left_over[0]} is in one of the two alone. Load it into the "
            f"model that it was trained on."
        )
    # New modules come in training mode.
    model.train(is_training)


def usage_of_encoders(components: Sequence[str]) -> list[str]:
    """Python lines that load PEFT directories into the text encoders among these components of `pipeline`."""
    names = [name for name in components if name != DENOISER]
    lines = [f'PeftModel.from_pretrained(pipeline.{name}, "path/to/this/folder/{name}")' for name in names]
    return [_IMPORT, *lines] if lines else []


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


def check_fits(model: Any, tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Refuse an adapter of which a tensor belongs to no layer of this model, be that adapted already or not.

    Raises:
        CheckpointError: it was trained on another base model.
    """
    within = tuple(f"{name}." for name in adapted(model))
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

    return is_layer(module) or isinstance(module, BaseTunerLayer) or bool(dict(module.named_parameters(recurse=False)))


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torch's first line says only that loading failed; the second says of what
    return lines["loading state_dict" in lines[0] and len(lines) > 1].strip().rstrip(".")
