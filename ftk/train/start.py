"""`train.start_from`: a run that goes on from an adapter in a file, of ftk or of another program."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftk import locations
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import adapter_files, injection, peft_directory
from ftk.methods.adapters.adapter_files import AdapterFile
from ftk.methods.adapters.layer_change import TENSORS, LayerChange
from ftk.methods.adapters.peft_method import PeftMethod
from ftk.methods.base import HasStartFiles, prefix
from ftk.models.base import DENOISER, Model, TrainsEncoders
from ftk.models.components import loading
from ftk.run import Run

LOGGER = logging.getLogger("ftk")
SETTING = "train.start_from"
_LISTED = 3
_NOT_SETTINGS = {"inference_mode", "base_model_name_or_path", "target_modules", "auto_mapping", "revision", "peft_version",
                 "task_type", "init_weights", "rank_pattern", "alpha_pattern", "modules_to_save"}  # fmt: skip
"""What may differ between the settings of two PEFT adapters with the same tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run starts from: the file's name and digest, and fp32 values by the names of the parameters."""

    name: str
    digest: str
    values: Mapping[str, torch.Tensor]


def read(run: Run, directory: Path, model: Model, parameters: Mapping[str, Any]) -> Start | None:
    """What `train.start_from` names, as initial values of what the method has attached; None if it names nothing.

    Args:
        directory: of the base model.
        model: with the method attached; its shapes alone (`meta`) are enough.
        parameters: what is trained, by name.

    Raises:
        ConfigError: there is no such file, or the method or its settings do not go with it; the message has the numbers to set.
        CheckpointError: the file is damaged, or was trained on another base model.
    """
    named = run.config.train.start_from
    if named is None:
        return None
    path = locations.local_path(named)
    _check_initialisation(run)
    if isinstance(run.method, HasStartFiles):
        start_values, start_files = run.method.start_values(model, path)
        return Start(name=path.name, digest=adapter_files.digest(start_files), values=start_values)
    _check_method(run)
    files = adapter_files.locate(path, SETTING)
    kind = adapter_files.kind_of(files)
    whole = _whole(model, files)
    if kind.lower() in (*TENSORS, "dora"):
        modules, pipeline_class = _modules(run, directory, model), loading.pipeline_class(directory)
        file = adapter_files.read(path, run.family, modules, SETTING, pipeline_class, allow_whole=True)
        values = _from_layers(run, model, parameters, file) | whole
    else:
        values = _from_directory(model, parameters, files, kind) | whole
    if len(values) < len(parameters):
        LOGGER.info(
            "%s: %d of %d tensors start from %s; the others start as without it",
            SETTING,
            len(values),
            len(parameters),
            path.name,
        )
    return Start(name=path.name, digest=adapter_files.digest(files), values=values)


def _check_method(run: Run) -> None:
    method = run.method
    if not isinstance(method, PeftMethod):
        way = " Name the trained model as model.path instead." if run.trains_base else " Leave it out."
        raise ConfigError(f"{SETTING}: method {method.name} has no adapter to go on from.{way}")


def _check_initialisation(run: Run) -> None:
    settings = run.settings
    initialisation = getattr(settings, "initialisation", None)
    if initialisation is not None and initialisation != type(settings).model_fields["initialisation"].default:
        raise ConfigError(f"method.initialisation: {initialisation} has no effect with {SETTING}. Leave one of them out.")


def _whole(model: Model, files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """fp32 values of the modules that lie whole in a PEFT folder, by the names of their parameters.

    Raises:
        ConfigError: this run does not train them.
        CheckpointError: they are of another base model.
    """
    entries = adapter_files.whole_entries(files)
    if not entries:
        return {}
    denoiser = model.denoiser
    untrained = set(injection.modules_of_entries(denoiser, entries)) - set(injection.whole_modules(denoiser))
    if untrained:
        raise ConfigError(
            f"{SETTING}: {files[0]} holds whole modules that this run does not train: "
            f"{', '.join(sorted(untrained)[:_LISTED])}. Set method.modules_to_save: [{', '.join(entries)}]."
        )
    tensors, _ = adapter_files.parted(peft_directory.read_tensors(files[0]), denoiser, entries)
    current = injection.whole_state(denoiser)
    wrong = [name for name, tensor in tensors.items() if name not in current or current[name].shape != tensor.shape]
    if wrong or not tensors:
        raise CheckpointError(
            f"{files[0]} was trained on another base model, or another size of this one: of its whole modules "
            f"{', '.join((wrong or entries)[:_LISTED])} is not as here. Use it with the model that it was trained on."
        )
    trained = dict(denoiser.named_parameters())
    return {name: tensor.float() for name, tensor in tensors.items() if name in trained}


def _modules(run: Run, directory: Path, model: Model) -> dict[str, Any]:
    """All components that a file can be for, those that are not trained too: they are named in a message."""
    modules = dict(model.components)
    for name in run.family.trainable_encoders if isinstance(run.family, TrainsEncoders) else ():
        if name not in modules:
            assert isinstance(run.family, TrainsEncoders)
            modules[name] = run.family.load_encoder(directory, name, torch.float32, torch.device("meta"))
    return modules


def _from_layers(run: Run, model: Model, parameters: Mapping[str, Any], file: AdapterFile) -> dict[str, torch.Tensor]:
    _refuse_untrained(file, model)
    values: dict[str, torch.Tensor] = {}
    misfits: dict[str, LayerChange] = {}
    for component, layers in file.layers.items():
        module = model.components[component]
        adapted, places = injection.adapted(module), _places(component, module, parameters)
        for name, change in layers.items():
            scale = adapted[name].scaling.get(injection.ADAPTER, 1.0) if hasattr(adapted[name], "scaling") else 1.0
            at_run = change.at_scale(scale) if file.strength_is_inside and scale else change
            tensors = _tensors(at_run)
            targets = {key.rpartition(".")[2]: place for key, place in places.items() if key.rpartition(".")[0] == name}
            if _fits(tensors, targets, parameters) and abs(at_run.scale - scale) <= 1e-6 * abs(scale):
                values |= {targets[kind]: tensor.reshape(parameters[targets[kind]].shape) for kind, tensor in tensors.items()}
            else:
                misfits[prefix(component) + name] = change
    if misfits:
        raise ConfigError(_numbers(run, file, misfits))
    return values


def _refuse_untrained(file: AdapterFile, model: Model) -> None:
    """What the file changes and the run does not train would be lost."""
    missing = sorted(file.layers.keys() - model.components.keys())
    if missing:
        raise ConfigError(
            f"{SETTING}: {file.path} adapts the {' and the '.join(missing)} too, which this run does not train. Set "
            f"method.text_encoder: {{}}."
        )
    for component, layers in file.layers.items():
        adapted = injection.adapted(model.components[component])
        untrained = [name for name in layers if name not in adapted]
        if untrained:
            setting = "method.targets" if component == DENOISER else "method.text_encoder.targets"
            raise ConfigError(
                f"{SETTING}: {file.path} adapts {len(untrained)} layers that this run does not train: "
                f"{', '.join(untrained[:_LISTED])}{', ...' if untrained[_LISTED:] else ''}. Add them to {setting}."
            )


def _places(component: str, module: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Names of trained parameters by `MODULE.KIND`, as PEFT calls them in files, of one component."""
    start = prefix(component)
    of_encoders = () if start else tuple(name for name in parameters if re.match(r"text_encoder(_\d+)?\.", name))
    return {
        _key(name.removeprefix(start)): name for name in parameters if name.startswith(start) and name not in set(of_encoders)
    }


def _key(name: str) -> str:
    return name.replace(f".{injection.ADAPTER}", "").removesuffix(".weight")


def _tensors(change: LayerChange) -> dict[str, torch.Tensor]:
    magnitude = {} if change.magnitude is None else {"lora_magnitude_vector": change.magnitude}
    return {**change.tensors, **magnitude}


def _fits(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, str], parameters: Mapping[str, Any]) -> bool:
    if tensors.keys() != targets.keys():
        return False
    shapes = [(tensor, parameters[targets[kind]]) for kind, tensor in tensors.items()]
    return all(
        tensor.shape == parameter.shape or (kind == "lora_magnitude_vector" and tensor.numel() == parameter.numel())
        for kind, (tensor, parameter) in zip(tensors, shapes, strict=True)
    )


def _numbers(run: Run, file: AdapterFile, misfits: Mapping[str, LayerChange]) -> str:
    """What the file has, what the run has, and what to set."""
    wanted = {name: _settings_of(change) for name, change in misfits.items()}
    common = Counter(json.dumps(each, sort_keys=True) for each in wanted.values()).most_common(1)[0][0]
    name, first = next((name, each) for name, each in wanted.items() if json.dumps(each, sort_keys=True) == common)
    kind = misfits[name].kind
    start = f"{SETTING}: {file.path} does not fit this run's adapter in {len(misfits)} layers, such as {name}: the file has"
    has = ", ".join(f"{key} {value}" for key, value in first.items())
    if kind != run.method.name:
        return f"{start} a {kind} ({has}), and method.name is {run.method.name}. Set method.name: {kind}."
    if misfits[name].from_original:
        return f"{start} DoRA in ComfyUI's form, which cannot be trained further. Export it as diffusers or peft."
    current = {key: _own_setting(run, key) for key in first}
    differing = {key: value for key, value in first.items() if value != current[key]}
    if file.strength_is_inside:
        differing.pop("alpha", None)
    has_now = ", ".join(f"{key} {value}" for key, value in current.items())
    exceptions = [each for each, settings in wanted.items() if settings != first]
    more = (
        f" {len(exceptions)} layers differ from that, such as {exceptions[0]}: see method.rank_pattern, alpha_pattern."
        if exceptions
        else ""
    )
    settings = ", ".join(f"method.{key}: {str(value).lower()}" for key, value in differing.items())
    return f"{start} {has}, and the run {has_now}. " + (f"Set {settings}.{more}" if settings else f"Name another file.{more}")


def _own_setting(run: Run, key: str) -> Any:
    value = getattr(run.settings, key, None)
    return _number(run.settings.rank) if key == "alpha" and value is None else _number(value)


def _settings_of(change: LayerChange) -> dict[str, Any]:
    """The method's settings with which a layer has such tensors."""
    tensors = change.tensors
    if change.kind == "lora":
        assert change.rank is not None
        return {"rank": change.rank, "alpha": _number(change.alpha), "dora": change.magnitude is not None}
    if change.kind == "loha":
        has_core = {"effective_convolution": True} if "hada_t1" in tensors else {}
        return {"rank": change.rank, "alpha": _number(change.alpha), **has_core}
    whole = tensors.get("lokr_w2")
    rank = max(whole.shape[:2]) if whole is not None else change.rank
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"]
    return {
        "rank": rank,
        "alpha": _number(change.scale * (rank or 1)),
        "decompose_factor": int(first.shape[0]),
        "decompose_both": "lokr_w1" not in tensors,
        **({"effective_convolution": True} if "lokr_t2" in tensors else {}),
    }


def _number(value: Any) -> Any:
    """16 for 16.0, and no digits that are rounding."""
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def _from_directory(model: Model, parameters: Mapping[str, Any], files: Sequence[Path], kind: str) -> dict[str, torch.Tensor]:
    """Of a PEFT folder of a type that does more than add: its tensors are the run's own, name by name."""
    values: dict[str, torch.Tensor] = {}
    entries = adapter_files.whole_entries(files)
    for number, file in enumerate(files):
        component = file.parent.name if number else DENOISER
        if component not in model.components:
            raise ConfigError(
                f"{SETTING}: {file} adapts a {component}, which this run does not train. Set method.text_encoder: {{}}."
            )
        module = model.components[component]
        own_kind = module.peft_config[injection.ADAPTER].peft_type.value
        if own_kind != kind:
            raise ConfigError(
                f"{SETTING}: {file} is of type {kind}, and the method makes {own_kind}. Set method.name accordingly."
            )
        _, adapter = adapter_files.parted(peft_directory.read_tensors(file), module, () if number else entries)
        tensors = {_key(name.removeprefix("base_model.model.")): tensor.float() for name, tensor in adapter.items()}
        peft_directory.check_fits(module, tensors, file)
        places = _places(component, module, parameters)
        wrong = sorted(
            key for key, tensor in tensors.items() if key not in places or parameters[places[key]].shape != tensor.shape
        )
        if wrong:
            raise ConfigError(
                f"{SETTING}: {file} does not fit this run's adapter: {len(wrong)} tensors differ, such as {wrong[0]}. "
                f"{_differing(file, module)}"
            )
        values |= {places[key]: tensor for key, tensor in tensors.items()}
    return values


def _differing(file: Path, module: Any) -> str:
    """Which settings of PEFT the file and the run do not share."""
    try:
        theirs = json.loads((file.parent / peft_directory.CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: the settings beside it cannot be read: {injection.first_line(error)}.") from error
    ours = peft_directory.plain(module.peft_config[injection.ADAPTER].to_dict())
    rows = [
        f"{name} is {theirs[name]} in the file and {ours[name]} in the run"
        for name in sorted(theirs.keys() & ours.keys() - _NOT_SETTINGS)
        if theirs[name] != ours[name]
    ]
    return f"{'; '.join(rows)}: set it as in the file." if rows else "Set method.targets as it was trained with."
