"""`ftk extract`: a LoRA from the difference of two models, such as a full fine-tune or a merged adapter of any method.

The difference D of a layer's two weights becomes B A, the nearest there is of a rank (`low_rank.py`). Energy is the share of
|D|^2 that B A holds, measured on the rounded factors. Tensors are read one at a time: neither model is ever in memory.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

import ftk
from ftk import devices, locations, storage
from ftk.cache.fingerprint import weights_digest
from ftk.configs import load
from ftk.configs.schema import CardConfig, ModelConfig
from ftk.deliver import card, metadata
from ftk.deliver.low_rank import decompose, squared_norm
from ftk.errors import ConfigError, ModelError
from ftk.methods import base as methods
from ftk.methods import lora
from ftk.methods.adapters import targets
from ftk.methods.adapters.targets import TargetPattern, Targets, denoiser_component
from ftk.methods.base import Export
from ftk.models import base as models
from ftk.models.base import DENOISER, Family
from ftk.models.components import loading, model_folder, single_file, weights
from ftk.progress import track

Dtype = Literal["float32", "bfloat16", "float16"]
_FILE = "diffusion_pytorch_model.safetensors"
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


@dataclass(slots=True)
class _Sums:
    """Squared norms, added up: of the base, of the change, and of what the factors leave of it."""

    base: float = 0.0
    change: float = 0.0
    rest: float = 0.0
    ranks: list[int] = field(default_factory=list)

    def add(self, other: "_Sums") -> None:
        self.base += other.base
        self.change += other.change
        self.rest += other.rest
        self.ranks += other.ranks

    def report(self, name: str) -> LayerEnergy:
        return LayerEnergy(
            name=name,
            num_layers=len(self.ranks),
            rank=_span(self.ranks),
            energy=self.energy,
            change=_ratio(self.change, self.base),
        )

    @property
    def energy(self) -> float:
        return max(0.0, 1.0 - self.rest / self.change)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extracted:
    """The factors of each layer that was extracted and their norms, and the norms of all other tensors that differ."""

    factors: dict[str, lora.Factors]
    sums: dict[str, _Sums]
    others: dict[str, _Sums]

    @property
    def total(self) -> _Sums:
        """Of all layers that were extracted."""
        total = _Sums()
        for one in self.sums.values():
            total.add(one)
        return total


def run(config: ExtractConfig) -> ExtractReport:
    """Decompose the difference of two models' denoisers, and write the LoRA.

    Raises:
        ConfigError: a target or a format that does not fit, or `out` holds something.
        ModelError: the models are equal, or of different architectures, or hold what is no number.
    """
    config = replace(config, out=locations.local_path(str(config.out)))
    _check(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ftk-extract-", dir=config.out.parent) as made:
        return _run(config, Path(made))


def _run(config: ExtractConfig, made: Path) -> ExtractReport:
    family = models.get(config.family)
    pairs = ((config.base, config.tuned), (config.tuned, config.base))
    places = [_locate(family, path, other, made) for path, other in pairs]
    before, after = (_Weights(place / family.denoiser_attribute) for place in places)
    _refuse_other_shapes(before, after)
    shapes: Any = family.load_denoiser(places[0], torch.float32, torch.device("meta"))
    chosen = set(targets.select(denoiser_component(family, shapes, _parsed_targets(config.targets), "--targets"), _refusal))
    extracted = _extract(config, before, after, chosen)
    left_out = [*_left_out(extracted.others, shapes), *_other_components(family, places)]
    if not extracted.factors:
        raise ModelError(_nothing(config, left_out))
    files = [*_write(config, family, places[0], shapes, extracted), _commit_card(config, family, extracted.total)]
    return _report(config, files, extracted, left_out)


def _extract(config: ExtractConfig, before: "_Weights", after: "_Weights", chosen: Set[str]) -> _Extracted:
    device, dtype = devices.resolve_device(config.device), getattr(torch, config.dtype)
    found = _Extracted(factors={}, sums={}, others={})
    with track("extract", len(before.shapes), "tensor") as progress:
        for name in before.shapes:
            difference, squared = _difference(before, after, name, device)
            layer, _, kind = name.rpartition(".")
            if difference is not None and kind == "weight" and layer in chosen:
                found.factors[layer], rest = decompose(difference, config.rank, config.energy, dtype)
                found.sums[layer] = _Sums(squared.base, squared.change, rest, [found.factors[layer].rank])
            elif difference is not None:
                found.others[name] = squared
            progress.advance(1)
    return found


class _Weights:
    """A component's tensors by name, read one at a time from its safetensors files.

    Raises:
        ModelError: there are none, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        try:
            for path in weights.weight_files(folder, _FILE):
                opened: Any = safe_open(path, "pt")
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._files[name] = opened
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ModelError(f"{folder}: its weights cannot be read as safetensors: {loading.first_line(error)}") from error

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """In fp32 on the device."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor.to(device).float()


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
    return model_folder.locate(family, model, family.denoiser_components, made)


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


def _refuse_other_shapes(before: _Weights, after: _Weights) -> None:
    """Refuse models whose tensors have other names or shapes: nothing of one could be subtracted from the other."""
    names = sorted(before.shapes.keys() | after.shapes.keys())
    other = [name for name in names if before.shapes.get(name) != after.shapes.get(name)]
    if not other:
        return
    lines = [f"  {name}: {_shape(before, name)} in the base, {_shape(after, name)} in the tuned model" for name in other]
    more = [f"  and {len(other) - _LISTED} more"] if len(other) > _LISTED else []
    raise ModelError(
        f"{before.folder} and {after.folder} are of different architectures: {len(other)} of {len(names)} tensors differ in "
        "name or shape.\n" + "\n".join([*lines[:_LISTED], *more]) + "\nName the model that the other was trained from."
    )


def _shape(weights: _Weights, name: str) -> str:
    return "x".join(map(str, weights.shapes[name])) if name in weights.shapes else "none"


def _difference(before: _Weights, after: _Weights, name: str, device: torch.device) -> tuple[torch.Tensor | None, _Sums]:
    """tuned - base, None where they are equal, and the squared norms of it and of the base."""
    base = before.tensor(name, device)
    difference = after.tensor(name, device) - base
    change = squared_norm(difference)
    if change != change or change == float("inf"):
        raise ModelError(f"{name} holds what is no finite number in {before.folder} or {after.folder}. Nothing was written.")
    return (difference if change else None), _Sums(squared_norm(base), change)


def _write(config: ExtractConfig, family: Family, base: Path, denoiser: Any, extracted: _Extracted) -> list[Path]:
    import peft

    found = extracted.factors
    # By their whole names: a short one can be the end of another layer's.
    ranks = {f"^{re.escape(name)}": one.rank for name, one in found.items()}
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    every_layer = denoiser_component(family, denoiser, TargetPattern(regex=".*"), "--targets")
    settings = peft.LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=targets.as_peft_targets(every_layer, list(found)),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    adapter = lora.Adapter(module=denoiser, factors=found, settings=settings, dora_scales={})
    header = _metadata(config, family, base, extracted.total)
    return lora.write({DENOISER: adapter}, family, Export(directory=config.out, form=config.form, metadata=header))


def _metadata(config: ExtractConfig, family: Family, base: Path, total: _Sums) -> dict[str, str]:
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


def _commit_card(config: ExtractConfig, family: Family, total: _Sums) -> Path:
    """README.md."""
    base, tuned = _name(config, config.base), _name(config, config.tuned)
    front = card.front_matter(
        ModelConfig(family=config.family, path=config.base), CardConfig(), relation="adapter", tags=[config.family, "lora"]
    )
    sections = [
        f"---\n{front}\n---",
        f"# {config.out.absolute().name}",
        f"A LoRA that makes {tuned} of {base} ({config.family}), extracted by singular value decomposition with ftk "
        f"{ftk.__version__}: rank {_span(total.ranks)}, {total.energy:.2%} of the squared change of its layers.",
        card.how_to_load(methods.get("lora"), lora.LoraConfig(), family, base, config.form),
    ]
    storage.commit_bytes(config.out / card.CARD, ("\n\n".join(sections) + "\n").encode())
    return config.out / card.CARD


def _name(config: ExtractConfig, path: str) -> str:
    """A Hub id, or a folder's name."""
    return metadata.base_name(ModelConfig(family=config.family, path=path), CardConfig())


def _left_out(others: Mapping[str, _Sums], denoiser: Any) -> list[LeftOut]:
    """Tensors that differ and are not extracted, added up by kind; the largest change first."""
    modules = dict(denoiser.named_modules())
    groups: dict[tuple[str, str], tuple[int, _Sums]] = {}
    for name, squared in others.items():
        key = (_kind(name), _reason(name, modules))
        count, total = groups.setdefault(key, (0, _Sums()))
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


def _other_components(family: Family, places: Sequence[Path]) -> list[LeftOut]:
    """VAE and text encoders that are here of both models and differ."""
    names = [name for name in (*family.text_components, *family.latent_components) if _has_weights(places, name)]
    different = [name for name in names if len({weights_digest(place / name) for place in places}) > 1]
    reason = "another component: ftk extracts the denoiser alone"
    return [LeftOut(name=name, num_tensors=0, reason=reason, change=None) for name in different]


def _has_weights(places: Sequence[Path], name: str) -> bool:
    return all(next((place / name).glob("*.safetensors"), None) is not None for place in places)


def _nothing(config: ExtractConfig, left_out: Sequence[LeftOut]) -> str:
    start = f"{config.tuned} and {config.base}: there is nothing to extract."
    if not left_out:
        return f"{start} All their tensors are equal. Name the tuned model, and the base that it was trained from."
    lines = "\n".join(f"  {one.name}: {one.reason}" for one in left_out[:_LISTED])
    return f"{start} They differ only in what was not to be extracted:\n{lines}"


def _report(config: ExtractConfig, files: Sequence[Path], extracted: _Extracted, left_out: list[LeftOut]) -> ExtractReport:
    groups: dict[str, _Sums] = {}
    for name, one in extracted.sums.items():
        groups.setdefault(_kind(name), _Sums()).add(one)
    total = extracted.total
    outside = sum(one.change for one in extracted.others.values())
    worst = sorted(extracted.sums.items(), key=lambda item: -item[1].rest)
    return ExtractReport(
        directory=str(config.out),
        format=config.form,
        files=[path.name for path in files],
        num_bytes=sum(path.stat().st_size for path in files),
        num_layers=len(extracted.sums),
        rank=_span(total.ranks),
        energy=total.energy,
        groups=[one.report(name) for name, one in sorted(groups.items(), key=lambda item: -item[1].change)],
        worst=[one.report(name) for name, one in worst[:_LISTED]],
        left_out_share=outside / (outside + total.change),
        left_out=left_out,
    )


def _kind(name: str) -> str:
    """`attn.to_q` for `transformer_blocks.3.attn.to_q`: what layers of different blocks have in common."""
    return re.sub(r"\w+\.\d+\.", "", name)


def _span(ranks: Sequence[int]) -> str:
    return str(min(ranks)) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _ratio(squared: float, of: float) -> float | None:
    return (squared / of) ** 0.5 if of else None
