"""Adapters in files of ftk or of another program, read as the change of each layer of a model.

| written by | a layer `a.b.c` of the denoiser is named | of the first text encoder |
|------------|------------------------------------------|---------------------------|
| diffusers, SimpleTuner | `transformer.a.b.c`, `unet.a.b.c` | `text_encoder.a.b.c` |
| PEFT (a folder) | `base_model.model.a.b.c` | the same, in a folder of its own |
| sd-scripts, musubi-tuner, A1111, LyCORIS in sd-scripts | `lora_unet_a_b_c` | `lora_te_a_b_c`, `lora_te1_a_b_c` |
| ai-toolkit, ComfyUI | `diffusion_model.a.b.c` | `text_encoders.clip_l.transformer.a.b.c` |
| LyCORIS | `lycoris_a_b_c` | |

Names are looked up among the modules of the model, by diffusers' names and by those of the model's first publication. What is
not found so is put through the loader of the model's diffusers pipeline, which knows fused and renamed layers.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftk import storage
from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters import formats, injection, layer_change, peft_directory
from ftk.methods.adapters.layer_change import TENSORS, LayerChange
from ftk.models.base import DENOISER, Family, TrainsEncoders, original_names

_ROOT = "base_model.model."
_PREFIXES = (_ROOT, "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.", "unet.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_ENCODER_PREFIXES = (
    ("text_encoder.", "lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."),
    ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
)
"""Of the first and the second text encoder."""
_KINDS = {
    r"lora_(?:A|down)": "lora_A", r"lora_(?:B|up)": "lora_B", r"lora(?:_linear_layer)?\.down": "lora_A",
    r"lora(?:_linear_layer)?\.up": "lora_B",
}  # fmt: skip
"""Names of LoRA's factors, by PEFT's."""
_OTHERS = r"lora_mid|lora_magnitude_vector|dora_scale|alpha|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
_TENSOR = re.compile(rf"(?P<module>.+)\.(?P<kind>{'|'.join(_KINDS)}|{_OTHERS})(?:\.default)?(?:\.weight)?")
_MUSUBI_MARK = "lokr_factor"
"""A number beside the layers in LoKr files of musubi-tuner, which divides alpha by the longer side of a whole factor."""
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")
_OLD_ENCODER = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.")
"""How diffusers named layers before it had PEFT: of a denoiser's attention, and of a text encoder's."""
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_LISTED = 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What an adapter changes, by component and by layer, in names of the diffusers model.

    Attributes:
        path: what was named.
        files: what was read.
        strength_is_inside: whether ftk wrote it: the strength is in the tensors, and alpha says nothing of the training's.
    """

    path: Path
    files: tuple[Path, ...]
    layers: Mapping[str, Mapping[str, LayerChange]]
    strength_is_inside: bool

    @property
    def kinds(self) -> list[str]:
        """What it consists of: `lora`, `loha`, `lokr`, `dora`; in this order."""
        changes = [change for component in self.layers.values() for change in component.values()]
        kinds = {"dora" if change.magnitude is not None else change.kind for change in changes}
        return sorted(kinds, key=("lora", "loha", "lokr", "dora").index)

    @property
    def digest(self) -> str:
        """Of the files' bytes, wherever they lie."""
        return digest(self.files)


def digest(files: Iterable[Path]) -> str:
    """Of some files' bytes and order."""
    import blake3

    return blake3.blake3(" ".join(storage.blake3_file(path) for path in files).encode()).hexdigest()


def locate(path: Path, setting: str) -> tuple[Path, ...]:
    """The files of an adapter: one that is named, or those of a folder; a PEFT folder's tensors come with its settings.

    Raises:
        ConfigError: there is none, or it is not of safetensors.
    """
    if path.is_file():
        if path.suffix in _PICKLES:
            raise ConfigError(f"{setting} {path} is a pickle, which can run any code: ftk reads .safetensors files alone.")
        return (path,)
    if not path.is_dir():
        raise ConfigError(f"{setting} {path}: no such file or folder. Name a .safetensors file, a run's adapter/ or an export.")
    files = in_folder(path)
    if files:
        return files
    inner = path / "adapter"
    hint = f" Did you mean `{inner}`?" if inner.is_dir() and in_folder(inner) else ""
    several = sorted(each.name for each in path.glob("*.safetensors"))
    if several:
        raise ConfigError(f"{setting} {path} holds several files: {', '.join(several[:5])}. Name one of them.")
    raise ConfigError(f"{setting} {path} holds no adapter: no .safetensors file lies in it.{hint}")


def in_folder(folder: Path) -> tuple[Path, ...]:
    """The files of the adapter in a folder, none if there is none or it is not clear which."""
    if (folder / peft_directory.CONFIG_FILE).exists():
        main: list[Path] = [folder / peft_directory.WEIGHTS_FILE]
    elif (folder / formats.SINGLE_FILE).exists():
        main = [folder / formats.SINGLE_FILE]
    elif words := sorted(folder.glob(f"{formats.WORDS_FILE}*.safetensors")):
        main = words[:1]
    else:
        main = list(folder.glob("*.safetensors"))
        if len(main) != 1:
            return ()
    encoders = sorted(each.parent / peft_directory.WEIGHTS_FILE for each in folder.glob(f"*/{peft_directory.CONFIG_FILE}"))
    return (*main, *encoders)


def is_adapter(path: Path, denoiser: str) -> bool:
    """Whether a path holds an adapter and not a model, of which the denoiser is in a folder of this name."""
    if path.is_dir():
        has_model = (path / "model_index.json").exists() or (path / denoiser / "config.json").exists()
        return not has_model and bool(in_folder(path))
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    file: Any
    try:
        with safe_open(path, "pt") as file:
            return any(_split(name)[1] not in (None, "alpha") for name in file.keys())  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError):
        return False


def read(
    path: Path,
    family: Family,
    modules: Mapping[str, Any],
    setting: str,
    pipeline_class: type | None = None,
    *,
    allow_whole: bool = False,
) -> AdapterFile:
    """The adapter at a path, as the changes of these components' layers.

    Args:
        modules: the components by name, the denoiser first; shapes alone (`meta`) are enough.
        setting: what messages call the place of the path.
        pipeline_class: the model's diffusers pipeline, whose loader is asked about names that are not its modules'.
        allow_whole: pass over the modules that lie whole in a PEFT folder (`whole_modules`), where the caller reads them.

    Raises:
        ConfigError: there is no such file, or it holds whole modules, which cannot be added to a model.
        CheckpointError: a file is damaged, holds what is no LoRA, LoHa, LoKr or DoRA, or is of another base model.
    """
    files = locate(path, setting)
    entries = whole_entries(files)
    if entries and not allow_whole:
        raise ConfigError(
            f"{setting} {path} holds whole modules beside its adapter ({', '.join(entries[:_LISTED])}), which replace those "
            f"of the model and cannot be added. Use it through its own run: `ftk sample`, or `ftk merge`."
        )
    layers: dict[str, dict[str, LayerChange]] = {}
    is_own = False
    for number, file in enumerate(files):
        tensors, header = _tensors(file)
        if entries and not number:
            tensors = parted(tensors, modules[DENOISER], entries)[1]
        is_own |= "ftk_version" in header
        # The folder of a text encoder says whose it is; what lies at the top names its components itself.
        only = file.parent.name if number else None
        names = _Names(family, modules if only is None else {only: _component(modules, only, file)})
        settings = _settings(file, header, family)
        for component, changes in _changes(file, tensors, header, names, settings, pipeline_class).items():
            layers.setdefault(component, {}).update(changes)
    return AdapterFile(path=path, files=files, layers=layers, strength_is_inside=is_own)


def whole_entries(files: Sequence[Path]) -> list[str]:
    """What the settings beside a PEFT folder's tensors list as `modules_to_save`; nothing of any other file.

    Raises:
        CheckpointError: the settings cannot be read.
    """
    settings = files[0].parent / peft_directory.CONFIG_FILE
    if files[0].name != peft_directory.WEIGHTS_FILE or not settings.exists():
        return []
    try:
        return list(json.loads(settings.read_bytes()).get("modules_to_save") or ())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{settings} cannot be read as an adapter's settings: {injection.first_line(error)}.") from error


def parted(tensors: Mapping[str, torch.Tensor], module: Any, entries: Sequence[str]) -> tuple[Tensors, Tensors]:
    """The tensors of the modules that lie whole in a PEFT folder, by their names in the model, and the adapter's own."""
    within = tuple(f"{_ROOT}{each}." for each in injection.modules_of_entries(module, entries))
    whole = {name.removeprefix(_ROOT): tensor for name, tensor in tensors.items() if name.startswith(within)}
    return whole, {name: tensor for name, tensor in tensors.items() if not name.startswith(within)}


def _component(modules: Mapping[str, Any], name: str, file: Path) -> Any:
    if name not in modules:
        raise CheckpointError(f"{file} was trained on another base model: it adapts a {name}, and this model has none.")
    return modules[name]


def _tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a file in fp32, and its header."""
    file: Any
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Export the adapter again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {injection.first_line(error)}. Fetch or export it again.") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors. Export it again.")
    peft_directory.refuse_not_finite(tensors, path)
    return tensors, header


class _Names:
    """Which module of which component a file means by a name."""

    def __init__(self, family: Family, modules: Mapping[str, Any]) -> None:
        self._plain: dict[str, tuple[str, str]] = {}
        self._flat: dict[str, tuple[str, str]] = {}
        self.modules = modules
        for component, module in modules.items():
            alone = len(modules) == 1 and component != DENOISER
            prefixes, flat_prefixes = _prefixes(family, component)
            for name, aliases in _aliases(family, component, module).items():
                for alias in aliases:
                    for prefix in (*prefixes, *((_ROOT, "") if alone or component == DENOISER else ())):
                        self._plain.setdefault(prefix + alias, (component, name))
                    for prefix in flat_prefixes:
                        self._flat.setdefault(prefix + alias.replace(".", "_"), (component, name))

    def place(self, name: str) -> tuple[str, str] | None:
        """(component, module), None if no layer has this name."""
        return self._plain.get(name) or self._flat.get(name.replace(".", "_"))

    def weight(self, place: tuple[str, str]) -> torch.Size:
        """The shape of a layer's weight."""
        component, name = place
        layer = self.modules[component].get_submodule(name)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        shape: torch.Size = base.weight.shape
        return shape


def _prefixes(family: Family, component: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands before the names of a component's modules, with dots and without."""
    if component == DENOISER:
        return (f"{family.denoiser_attribute}.", *_PREFIXES), (*_FLAT_PREFIXES, f"lora_{family.denoiser_attribute}_")
    assert isinstance(family, TrainsEncoders)
    number = family.trainable_encoders.index(component)
    known = _ENCODER_PREFIXES[number] if number < len(_ENCODER_PREFIXES) else ()
    return (
        tuple({f"{component}.": 0, **{each: 0 for each in known if each.endswith(".")}}),
        tuple(each for each in known if each.endswith("_")),
    )


def _aliases(family: Family, component: str, module: Any) -> dict[str, list[str]]:
    """Of each layer all names that it goes by, its own first."""
    wrapped = tuple(f"{name}." for name in injection.adapted(module))
    names = [name for name, layer in module.named_modules() if not name.startswith(wrapped) and _has_matrix(layer)]
    if component == DENOISER:
        published: Mapping[str, str] = original_names(family, module)
        return {name: [name, *([published[name]] if name in published else [])] for name in names}
    assert isinstance(family, TrainsEncoders)
    return {name: list(dict.fromkeys([family.encoder_key(component, name), name])) for name in names}


def _has_matrix(layer: Any) -> bool:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return isinstance(base, torch.nn.Linear | torch.nn.Conv2d)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """PEFT's settings beside a file, as far as they tell the strength of a layer."""

    tree: Mapping[str, Any]

    def scale(self, module: str) -> float | None:
        """alpha / rank of a module, None if there are no settings."""
        if "r" not in self.tree:
            return None
        rank = float(self._of(module, "rank_pattern", self.tree["r"]))
        alpha = float(self._of(module, "alpha_pattern", self.tree.get("lora_alpha", self.tree.get("alpha", rank))))
        return alpha / rank**0.5 if self.tree.get("use_rslora") else alpha / rank

    def _of(self, module: str, pattern: str, default: Any) -> Any:
        """By PEFT's rule: the first key that is the end of the module's name."""
        patterns = self.tree.get(pattern) or {}
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _settings(file: Path, header: Mapping[str, str], family: Family) -> dict[str, _Settings]:
    """By component; under "" those of all.

    Raises:
        CheckpointError: they cannot be read, or are of a type that is not LoRA, LoHa or LoKr.
    """
    try:
        if file.name == peft_directory.WEIGHTS_FILE and (file.parent / peft_directory.CONFIG_FILE).exists():
            tree = json.loads((file.parent / peft_directory.CONFIG_FILE).read_bytes())
            _refuse_type(str(tree["peft_type"]), file)
            return {"": _Settings(tree=tree)}
        tree = json.loads(header.get("lora_adapter_metadata", "{}"))
        if "r" in tree:
            return {"": _Settings(tree=tree)}
        parts: dict[str, dict[str, Any]] = {}
        for key, value in tree.items():
            component, _, name = key.partition(".")
            component = DENOISER if component == family.denoiser_attribute else component
            parts.setdefault(component, {})[name] = value
        return {component: _Settings(tree=part) for component, part in parts.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: the settings beside it cannot be read: {injection.first_line(error)}.") from error


def _refuse_type(kind: str, file: Path) -> None:
    if kind.lower() not in TENSORS:
        raise CheckpointError(
            f"{file} is of type {kind}, which is not a change that is added to weights: LoRA, LoHa, LoKr and DoRA can be read. "
            f"Use it through its own run: `ftk sample`, or `ftk merge` and then `ftk extract`."
        )


def _changes(
    file: Path,
    tensors: Tensors,
    header: Mapping[str, str],
    names: _Names,
    settings: Mapping[str, _Settings],
    pipeline_class: type | None,
) -> dict[str, dict[str, LayerChange]]:
    by_module = _by_module(file, tensors)
    unknown = [name for name in by_module if names.place(name) is None]
    if unknown:
        converted = _converted(tensors, names, pipeline_class)
        by_module = converted if converted is not None else by_module
        unknown = [] if converted is not None else unknown
    if unknown:
        _refuse_base(file, unknown, by_module, names)
    layers: dict[str, dict[str, LayerChange]] = {}
    for name, parts in by_module.items():
        place = names.place(name)
        assert place is not None
        component, module = place
        chosen = settings.get(component) or settings.get("")
        scale = None if chosen is None else chosen.scale(module)
        change = _change(file, name, parts, scale, is_musubi=_MUSUBI_MARK in tensors)
        from_original = "dora_scale" in parts and "ftk_version" in header
        _check_shape(file, name, change, names.weight(place))
        layers.setdefault(component, {})[module] = replace(change, from_original=from_original)
    return layers


def _by_module(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """The tensors of each module by what they are.

    Raises:
        CheckpointError: one is of no kind that is known.
    """
    by_module: dict[str, Tensors] = {}
    unplaced: list[str] = []
    for key, tensor in tensors.items():
        if key == _MUSUBI_MARK:
            continue
        module, kind = _split(key)
        if kind is None:
            unplaced.append(key)
        else:
            by_module.setdefault(module, {})[kind] = tensor
    if unplaced:
        raise CheckpointError(
            f"{file}: {len(unplaced)} of its {len(tensors)} tensors are no part of a LoRA, LoHa, LoKr or DoRA: "
            f"{', '.join(unplaced[:_LISTED])}. Such an adapter cannot be read."
        )
    return by_module


def _split(key: str) -> tuple[str, str | None]:
    """A tensor's module, and what it is of it in PEFT's words."""
    key = _PROCESSOR.sub(lambda match: f".{match[1]}{'.0' if match[1] == 'to_out' else ''}.lora.", key)
    key = _OLD_ENCODER.sub(lambda match: f".self_attn.{match[1]}_proj.lora.", key)
    match = _TENSOR.fullmatch(key)
    if match is None:
        return key, None
    kind = match["kind"]
    return match["module"], next((name for pattern, name in _KINDS.items() if re.fullmatch(pattern, kind)), kind)


def _change(file: Path, name: str, parts: Tensors, settings_scale: float | None, *, is_musubi: bool) -> LayerChange:
    kinds = [kind for kind, members in TENSORS.items() if any(member in parts for member in members)]
    if len(kinds) != 1:
        raise CheckpointError(f"{file}: {name} holds {', '.join(parts)}, which is no whole adapter of a layer.")
    (kind,) = kinds
    tensors = {member: parts[member] for member in TENSORS[kind] if member in parts}
    missing = _missing(kind, tensors)
    if missing:
        raise CheckpointError(f"{file}: {name} has {', '.join(tensors)} and no {missing}. The file is not whole.")
    rank = layer_change.rank_of(kind, tensors)
    if "alpha" in parts:
        # A LoKr of two whole factors has no rank: LyCORIS and ComfyUI pass over its alpha.
        divisor = rank or (max(tensors["lokr_w2"].shape) if is_musubi else None)
        scale = float(parts["alpha"]) / divisor if divisor else 1.0
    else:
        scale = 1.0 if settings_scale is None else settings_scale
    magnitude = parts["lora_magnitude_vector"].flatten() if "lora_magnitude_vector" in parts else parts.get("dora_scale")
    tensors = layer_change.without_core(tensors) if kind == "lora" else tensors
    return LayerChange(kind=kind, tensors=tensors, rank=rank, scale=scale, magnitude=magnitude)


def _missing(kind: str, tensors: Tensors) -> str | None:
    """A tensor without which the others make no change."""
    needed = list(TENSORS[kind][:2] if kind == "lora" else TENSORS[kind][:4] if kind == "loha" else ())
    for factor in ("lokr_w1", "lokr_w2") if kind == "lokr" else ():
        needed += [] if factor in tensors else [f"{factor}_a", f"{factor}_b"]
    return next((name for name in needed if name not in tensors), None)


def _check_shape(file: Path, name: str, change: LayerChange, shape: torch.Size) -> None:
    meta = {key: tensor.to("meta") for key, tensor in change.tensors.items()}
    try:
        replace(change, tensors=meta).delta(shape)
    except ValueError as error:
        raise CheckpointError(
            f"{file} was trained on another base model, or another size of this one: of {name}, {error}."
        ) from error


def _converted(tensors: Tensors, names: _Names, pipeline_class: type | None) -> dict[str, Tensors] | None:
    """The tensors as the loader of the diffusers pipeline renames them; None where it does not make the model's names."""
    convert: Callable[..., Any] | None = getattr(pipeline_class, "lora_state_dict", None)
    # It leaves out DoRA's scales.
    if convert is None or DENOISER not in names.modules or any("dora_scale" in name for name in tensors):
        return None
    try:
        outcome = convert(dict(tensors), **_unet_config(names.modules[DENOISER], pipeline_class))
    except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError, NotImplementedError):
        # It knows no such file either: the caller refuses it.
        return None
    state, alphas = outcome if isinstance(outcome, tuple) else (outcome, None)
    state = {**state, **{key: torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()}}
    by_module: dict[str, Tensors] = {}
    for key, tensor in state.items():
        module, kind = _split(key)
        if kind is None or names.place(module) is None:
            return None
        by_module.setdefault(module, {})[kind] = tensor
    return by_module or None


def _unet_config(denoiser: Any, pipeline_class: type | None) -> dict[str, Any]:
    return {"unet_config": denoiser.config} if hasattr(pipeline_class, "load_lora_into_unet") else {}


def _refuse_base(file: Path, unknown: list[str], by_module: Mapping[str, Tensors], names: _Names) -> None:
    owner = type(names.modules[next(iter(names.modules))]).__name__
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    raise CheckpointError(
        f"{file} was trained on another base model: {len(unknown)} of its {len(by_module)} layers fit nothing in this {owner}: "
        f"{', '.join(unknown[:_LISTED])}{more}. Use it with the model that it was trained on."
    )


def kind_of(files: Sequence[Path]) -> str:
    """PEFT's name of an adapter's type, `DORA`, `WHOLE WEIGHTS`, or `NEW WORDS`; by the names of its tensors alone.

    Raises:
        ConfigError: it cannot be read.
    """
    main: Any
    try:
        settings = files[0].parent / peft_directory.CONFIG_FILE
        if files[0].name == peft_directory.WEIGHTS_FILE and settings.exists():
            tree = json.loads(settings.read_bytes())
            return "DORA" if tree.get("use_dora") else str(tree["peft_type"])
        if files[0].name.startswith(formats.WORDS_FILE):
            return "NEW WORDS"
        with safe_open(files[0], "pt") as main:
            kinds = {_split(name)[1] for name in main.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f"{files[0]} cannot be read as an adapter: {injection.first_line(error)}. Export it again."
        ) from error
    if kinds & {"lora_magnitude_vector", "dora_scale"}:
        return "DORA"
    if kinds == {None}:
        return "WHOLE WEIGHTS"
    return next((kind.upper() for kind in ("lokr", "loha") if kinds & set(TENSORS[kind])), "LORA")
