"""`ftk extract`: a LoRA from the difference of two models, such as a full fine-tune, or from an adapter of another kind.

The difference D of a layer's two weights becomes B A, the nearest there is of a rank (`low_rank.py`). Energy is the share of
|D|^2 that B A holds, measured on the rounded factors. Tensors are read one at a time: neither model is ever in memory.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import ftk
from ftk import devices, locations, storage
from ftk.cache.fingerprint import weights_digest
from ftk.configs import load
from ftk.configs.schema import CardConfig, ModelConfig
from ftk.deliver import card, metadata
from ftk.deliver.differences import Differences, OfAdapter, OfModels, Sums, Weights
from ftk.deliver.low_rank import decompose
from ftk.errors import ConfigError, ModelError
from ftk.methods import base as methods
from ftk.methods import lora
from ftk.methods.adapters import adapter_files, targets
from ftk.methods.adapters.targets import TargetPattern, Targets, TrainedComponent, denoiser_component
from ftk.methods.base import Export
from ftk.models import base as models
from ftk.models.base import DENOISER, Family, TrainsEncoders
from ftk.models.components import loading, model_folder, single_file
from ftk.progress import ProgressBar, track

Dtype = Literal["float32", "bfloat16", "float16"]
_FILE = "diffusion_pytorch_model.safetensors"
_ENCODER_FILE = "model.safetensors"
_LISTED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """What is extracted from which models.

    Attributes:
        energy: of each layer the lowest rank that keeps this share of its squared change, up to `rank`.
        targets: as a method's, in YAML.
    """

    family: str
    base: str
    tuned: str
    out: Path
    rank: int
    energy: float | None = None
    targets: str = targets.EVERYTHING
    form: str = "diffusers"
    dtype: Dtype = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEnergy:
    """A layer, or all of one kind: the ranks that were taken, and the share of the squared change that is kept."""

    name: str
    num_layers: int
    rank: str
    energy: float
    change: float | None
    """|D| over the norm of the base's weights; None where those are zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Tensors that differ and that the LoRA does not hold; `change` is |D| over their norm in the base, None if unknown."""

    name: str
    num_tensors: int
    reason: str
    change: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """What was written. `energy` is of the layers that were extracted, `left_out_share` the rest's share of all change."""

    directory: str
    format: str
    files: list[str]
    num_bytes: int
    num_layers: int
    rank: str
    energy: float
    groups: list[LayerEnergy]
    worst: list[LayerEnergy]
    left_out_share: float
    left_out: list[LeftOut]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A component that may have changed: its shapes, which of its layers may be extracted, and how it differs."""

    name: str
    module: Any
    layers: Set[str]
    differences: Differences

    @property
    def prefix(self) -> str:
        """What stands before the names of its layers in the report."""
        return "" if self.name == DENOISER else f"{self.name}."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extracted:
    """The factors of each layer of a component that was extracted and their norms, and the norms of all else that differs."""

    part: _Part
    factors: dict[str, lora.Factors]
    sums: dict[str, Sums]
    others: dict[str, Sums]


def run(config: ExtractConfig) -> ExtractReport:
    """Decompose the difference of two models, or what an adapter does to one, and write the LoRA.

    Raises:
        ConfigError: a target or a format that does not fit, or `out` holds something.
        ModelError: the models are equal, or of different architectures, or hold what is no number.
    """
    config = replace(config, out=locations.local_path(str(config.out)))
    _check(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ftk-extract-", dir=config.out.parent) as converted:
        return _run(config, Path(converted))


def _run(config: ExtractConfig, made: Path) -> ExtractReport:
    family = models.get(config.family)
    base, parts, other_components = _compare(config, family, made)
    device, dtype = devices.resolve_device(config.device), getattr(torch, config.dtype)
    with track("extract", sum(len(part.differences.names) for part in parts), "tensor") as progress:
        extracted = [_extract(config, part, device, dtype, progress) for part in parts]
    left_out = sorted(
        (each for one in extracted for each in _left_out(one)), key=lambda each: -(each.change or 0.0)
    ) + other_components  # fmt: skip
    written = [one for one in extracted if one.factors]
    if not written:
        raise ModelError(_nothing(config, left_out))
    total = _total(written)
    files = [*_write(config, family, base, written, total), _commit_card(config, family, written, total)]
    return _report(config, files, extracted, left_out)


def _compare(config: ExtractConfig, family: Family, made: Path) -> tuple[Path, list[_Part], list[LeftOut]]:
    """The folder of the base, the components that can be extracted, and those that differ and cannot."""
    tuned = locations.local_path(config.tuned)
    if not adapter_files.is_adapter(tuned, family.denoiser_attribute):
        pairs = ((config.base, config.tuned), (config.tuned, config.base))
        places = [_locate(family, path, other, made) for path, other in pairs]
        names = [DENOISER, *(name for name in _encoders(family) if _has_weights(places, name))]
        parts = []
        for name in names:
            module = _shapes(family, places[0], name)
            before, after = (_weights(family, place, name, module) for place in places)
            parts.append(_part(config, family, name, module, OfModels(before, after)))
        return places[0], parts, _other_components(family, places, names)
    base = _locate(family, config.base, config.base, made)
    modules = {
        name: _shapes(family, base, name) for name in (DENOISER, *_encoders(family)) if _has_component(family, base, name)
    }
    file = adapter_files.read(tuned, family, modules, "TUNED", loading.pipeline_class(base))
    parts = []
    for name, layers in file.layers.items():
        before = _weights(family, base, name, modules[name])
        parts.append(_part(config, family, name, modules[name], OfAdapter(before, layers, tuned)))
    return base, parts, []


def _encoders(family: Family) -> tuple[str, ...]:
    return family.trainable_encoders if isinstance(family, TrainsEncoders) else ()


def _has_component(family: Family, base: Path, name: str) -> bool:
    return name == DENOISER or _has_weights([base], name)


def _shapes(family: Family, directory: Path, name: str) -> Any:
    """A component on the `meta` device."""
    if name == DENOISER:
        return family.load_denoiser(directory, torch.float32, torch.device("meta"))
    assert isinstance(family, TrainsEncoders)
    return family.load_encoder(directory, name, torch.float32, torch.device("meta"))


def _weights(family: Family, directory: Path, name: str, module: Any) -> Weights:
    if name == DENOISER:
        return Weights(directory / family.denoiser_attribute, _FILE, {})
    assert isinstance(family, TrainsEncoders)
    return Weights(directory / name, _ENCODER_FILE, {family.encoder_key(name, key): key for key in module.state_dict()})


def _part(config: ExtractConfig, family: Family, name: str, module: Any, differences: Differences) -> _Part:
    """Of a text encoder every layer: `--targets` names those of the denoiser."""
    chosen = _parsed_targets(config.targets) if name == DENOISER else targets.EVERYTHING
    component = _component(family, name, module, chosen)
    return _Part(name=name, module=module, layers=set(targets.select(component, _refusal)), differences=differences)


def _component(family: Family, name: str, module: Any, chosen: Targets) -> TrainedComponent:
    if name == DENOISER:
        return denoiser_component(family, module, chosen, "--targets")
    assert isinstance(family, TrainsEncoders)
    return TrainedComponent(
        name=name,
        module=module,
        owner=f"{family.name}'s {name}",
        groups=family.encoder_targets,
        block_classes=(),
        targets=chosen,
        setting="--targets",
    )


def _extract(config: ExtractConfig, part: _Part, device: torch.device, dtype: torch.dtype, progress: ProgressBar) -> _Extracted:
    extracted = _Extracted(part=part, factors={}, sums={}, others={})
    for name in part.differences.names:
        difference, squared = part.differences.difference(name, device)
        layer, _, kind = name.rpartition(".")
        if difference is not None and kind == "weight" and layer in part.layers:
            factors, rest = decompose(difference, config.rank, config.energy, dtype)
            extracted.factors[layer] = factors
            extracted.sums[layer] = Sums(squared.base, squared.change, rest, [factors.rank])
        elif difference is not None:
            extracted.others[name] = squared
        progress.advance(1)
    return extracted


def _total(extracted: Sequence[_Extracted]) -> Sums:
    """Of all layers that were extracted."""
    total = Sums()
    for one in extracted:
        for sums in one.sums.values():
            total.add(sums)
    return total


def _check(config: ExtractConfig) -> None:
    methods.check_format("lora", lora.METHOD.FORMATS, config.form, lora.METHOD.REASONS)
    if config.rank < 1:
        raise ConfigError(f"--rank {config.rank}: a rank is 1 or more.")
    if config.energy is not None and not 0 < config.energy <= 1:
        raise ConfigError(f"--energy {config.energy:g}: a share of the squared change lies above 0 and up to 1, such as 0.95.")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ConfigError(f"--out {config.out} holds something already. Name a new folder.")


def _locate(family: Family, path: str, other: str, made: Path) -> Path:
    """A model's folder; or one with the denoiser alone, as full fine-tuning delivers it.

    A checkpoint in one file is converted below `made`, with the configuration of the other model where that is a folder.
    """
    own = family.denoiser_attribute
    local = locations.local_path(path)
    if (local / own / "config.json").exists() and not (local / "model_index.json").exists():
        return local
    has_config = single_file.is_checkpoint(local) and not single_file.is_checkpoint(locations.local_path(other))
    model = ModelConfig(family=family.name, path=path, config=other if has_config else None)
    components = (*family.denoiser_components, *(name for name in _encoders(family) if _may_have(family, local, name)))
    return model_folder.locate(family, model, components, made)


def _may_have(family: Family, local: Path, name: str) -> bool:
    """Whether a model has a text encoder: a folder or a file may be without; of the Hub's all are whole."""
    if single_file.is_checkpoint(local):
        return name in single_file.open_checkpoint(family, local).parts
    return not local.is_dir() or _has_weights([local], name)


def _parsed_targets(text: str) -> Targets:
    """A group, or in YAML a list of names or {regex: EXPRESSION}.

    Raises:
        ConfigError: it is none of these.
    """
    tree = load.parse_yaml(text, f"--targets {text}")
    return load.validate(lora.LoraConfig, {"targets": tree}, f"--targets {text}").targets


def _refusal(layer: torch.nn.Module) -> str | None:
    """Why a LoRA cannot carry a layer."""
    if getattr(layer, "groups", 1) != 1:
        return "it is a grouped convolution"
    return targets.linear_or_convolution(layer)


def _write(config: ExtractConfig, family: Family, base: Path, extracted: Sequence[_Extracted], total: Sums) -> list[Path]:
    adapters = {one.part.name: _adapter(family, one) for one in extracted}
    header = _metadata(config, family, base, total)
    return lora.write(adapters, family, Export(directory=config.out, form=config.form, metadata=header))


def _adapter(family: Family, extracted: _Extracted) -> lora.Adapter:
    part = extracted.part
    every_layer = _component(family, part.name, part.module, TargetPattern(regex=".*"))
    return lora.of_factors(every_layer, extracted.factors)


def _metadata(config: ExtractConfig, family: Family, base: Path, total: Sums) -> dict[str, str]:
    names = dict(models.published_names(family, base))
    architecture = f"{names.pop('modelspec.architecture')}/lora"
    return {
        "ftk_version": ftk.__version__,
        "ftk_base_model": _name(config, config.base),
        "ftk_family": config.family,
        "ftk_method": "lora",
        "ftk_extracted_from": _name(config, config.tuned),
        "ftk_energy": f"{total.energy:.6f}",
        **metadata.model_spec(architecture, config.out.absolute().name),
        **names,
        **metadata.network(total.ranks),
    }


def _commit_card(config: ExtractConfig, family: Family, extracted: Sequence[_Extracted], total: Sums) -> Path:
    """README.md."""
    base, tuned = _name(config, config.base), _name(config, config.tuned)
    front = card.front_matter(
        ModelConfig(family=config.family, path=config.base), CardConfig(), relation="adapter", tags=[config.family, "lora"]
    )
    has_encoders = any(one.part.name != DENOISER for one in extracted)
    settings = lora.LoraConfig(text_encoder=targets.TextEncoderConfig() if has_encoders else None)
    sections = [
        f"---\n{front}\n---",
        f"# {config.out.absolute().name}",
        f"A LoRA that makes {tuned} of {base} ({config.family}), extracted by singular value decomposition with ftk "
        f"{ftk.__version__}: rank {_span(total.ranks)}, {total.energy:.2%} of the squared change of its layers.",
        card.how_to_load(methods.get("lora"), settings, family, base, config.form),
    ]
    storage.commit_bytes(config.out / card.CARD, ("\n\n".join(sections) + "\n").encode())
    return config.out / card.CARD


def _name(config: ExtractConfig, path: str) -> str:
    """A Hub id, or a folder's name."""
    return metadata.base_name(ModelConfig(family=config.family, path=path), CardConfig())


def _left_out(extracted: _Extracted) -> list[LeftOut]:
    """Tensors of a component that differ and are not extracted, added up by kind."""
    modules = dict(extracted.part.module.named_modules())
    groups: dict[tuple[str, str], tuple[int, Sums]] = {}
    for name, squared in extracted.others.items():
        key = (extracted.part.prefix + _kind(name), _reason(name, modules))
        count, total = groups.setdefault(key, (0, Sums()))
        total.add(squared)
        groups[key] = (count + 1, total)
    ordered = sorted(groups.items(), key=lambda item: -item[1][1].change)
    return [
        LeftOut(name=name, num_tensors=count, reason=reason, change=_ratio(total.change, total.base))
        for (name, reason), (count, total) in ordered
    ]


def _reason(name: str, modules: Mapping[str, Any]) -> str:
    module, _, kind = name.rpartition(".")
    layer = modules.get(module)
    if kind == "bias":
        return "a bias: a LoRA holds none"
    if kind == "weight" and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
        return "a grouped convolution" if getattr(layer, "groups", 1) != 1 else "not among --targets"
    return f"a {type(layer).__name__}'s {kind}: a LoRA holds linear layers and convolutions"


def _other_components(family: Family, places: Sequence[Path], compared: Sequence[str]) -> list[LeftOut]:
    """Others that are here of both models and differ: the VAE, and text encoders that ftk does not train."""
    names = [name for name in (*family.text_components, *family.latent_components) if _has_weights(places, name)]
    different = [name for name in names if name not in compared and len({weights_digest(place / name) for place in places}) > 1]
    reason = "a component that ftk does not train: no LoRA of it could be loaded"
    return [LeftOut(name=name, num_tensors=0, reason=reason, change=None) for name in different]


def _has_weights(places: Sequence[Path], name: str) -> bool:
    return all(next((place / name).glob("*.safetensors"), None) is not None for place in places)


def _nothing(config: ExtractConfig, left_out: Sequence[LeftOut]) -> str:
    start = f"{config.tuned} and {config.base}: there is nothing to extract."
    if not left_out:
        return f"{start} All their tensors are equal. Name the tuned model, and the base that it was trained from."
    lines = "\n".join(f"  {one.name}: {one.reason}" for one in left_out[:_LISTED])
    return f"{start} They differ only in what was not to be extracted:\n{lines}"


def _report(
    config: ExtractConfig, files: Sequence[Path], extracted: Sequence[_Extracted], left_out: list[LeftOut]
) -> ExtractReport:
    layers = {one.part.prefix + name: sums for one in extracted for name, sums in one.sums.items()}
    groups: dict[str, Sums] = {}
    for one in extracted:
        for name, sums in one.sums.items():
            groups.setdefault(one.part.prefix + _kind(name), Sums()).add(sums)
    total = _total(extracted)
    outside = sum(sums.change for one in extracted for sums in one.others.values())
    worst = sorted(layers.items(), key=lambda item: -item[1].rest)
    return ExtractReport(
        directory=str(config.out),
        format=config.form,
        files=[path.relative_to(config.out).as_posix() for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
        num_layers=len(layers),
        rank=_span(total.ranks),
        energy=total.energy,
        groups=[_energy(name, sums) for name, sums in sorted(groups.items(), key=lambda item: -item[1].change)],
        worst=[_energy(name, sums) for name, sums in worst[:_LISTED]],
        left_out_share=outside / (outside + total.change),
        left_out=left_out,
    )


def _energy(name: str, sums: Sums) -> LayerEnergy:
    return LayerEnergy(
        name=name,
        num_layers=len(sums.ranks),
        rank=_span(sums.ranks),
        energy=sums.energy,
        change=_ratio(sums.change, sums.base),
    )


def _kind(name: str) -> str:
    """`attn.to_q` for `transformer_blocks.3.attn.to_q`: what layers of different blocks have in common."""
    return re.sub(r"\w+\.\d+\.", "", name)


def _span(ranks: Sequence[int]) -> str:
    return str(min(ranks)) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _ratio(squared: float, of: float) -> float | None:
    return (squared / of) ** 0.5 if of else None
