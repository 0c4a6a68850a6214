"""LoRA: W + (alpha / rank) B A, by PEFT (Hu et al. 2021, arXiv 2106.09685), and its variants.

rsLoRA divides by the root of the rank (arXiv 2312.03732); DoRA trains direction and magnitude apart (arXiv 2402.09353); LoRA+
has B learn faster than A (arXiv 2402.12354).

Initialisation: `gaussian` is diffusers' (A normal with standard deviation 1 / rank, B zero), `default` is PEFT's (A uniform),
`orthogonal` has A and B of orthogonal factors whose product is zero; with `random` B is not zero either, and training starts
away from the base. PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start from factors of W, which they take out of it:
the base is no longer the base, so what is delivered is the difference to the start, s (B A - B0 A0), an adapter of twice the
rank for the original weights. (PEFT's own files would load silently wrong.) EVA (arXiv 2410.07170) sets A to the directions
in which a layer's inputs vary most, over the first batches of the cache.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ftk.errors import ConfigError
from ftk.methods.adapters import eva, formats, injection, peft_directory, peft_method, targets, whole_modules
from ftk.methods.adapters.targets import TrainedComponent
from ftk.methods.base import Export
from ftk.models.base import DENOISER, Family, Model, TrainsEncoders

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = formats.SINGLE_FILE
_KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")
_CHANGES_BASE = ("pissa", "olora")
_PEFT_INITIALISATION: Mapping[str, Any] = {"gaussian": "gaussian", "orthogonal": "orthogonal", "random": False}


class LoraConfig(peft_method.PeftMethodConfig):
    """Settings under `method:`."""

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_pattern: dict[str, int] = Field(default={}, description="other ranks, by the end of a module's name (an expression)")
    alpha_pattern: dict[str, float] = Field(default={}, description="other alphas; the alpha above for layers not named")
    rslora: bool = Field(default=False, description="strength is alpha / sqrt(rank)")
    dora: bool = Field(default=False, description="train each row's direction and magnitude apart")
    initialisation: Literal["gaussian", "default", "orthogonal", "random", "pissa", "olora", "eva"] = "gaussian"
    eva_batches: int = Field(default=32, ge=1, description="micro-batches that EVA looks at before the first step")
    lora_plus: float | None = Field(default=None, ge=1, description="B's learning rate is so many times A's; 16 in the paper")

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.dora and self.initialisation in _CHANGES_BASE:
            raise ValueError(f"`dora` and `initialisation: {self.initialisation}` exclude each other: both start from W's norm")
        if self.initialisation != "eva" and self.eva_batches != type(self).model_fields["eva_batches"].default:
            raise ValueError("`eva_batches` has no effect without `initialisation: eva`")
        for name, low in (("rank_pattern", 1), ("alpha_pattern", 1e-12)):
            if any(value < low for value in getattr(self, name).values()):
                raise ValueError(f"`{name}`: ranks and alphas are above 0")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What one layer adds: B [out,r] A [r,in] (with the kernel's sides after them for a convolution), the scale in B.

    `magnitude` [out] is DoRA's: the length of each row of W + B A.
    """

    A: "torch.Tensor"
    B: "torch.Tensor"
    magnitude: "torch.Tensor | None"

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What the layers of one component, `module`, add to their original weights, by name, and PEFT's settings for it.

    `settings` have alpha = rank everywhere. `dora_scales` are for ComfyUI, of the layers with a magnitude. `whole` are the
    tensors of modules that were trained whole.
    """

    module: Any
    factors: Mapping[str, Factors]
    settings: Any
    dora_scales: "Mapping[str, torch.Tensor]"
    whole: "Mapping[str, torch.Tensor]" = field(default_factory=dict)


class Lora(peft_method.PeftMethod):
    """The low-rank adapter of linear layers and convolutions.

    Its state is `MODULE.lora_A.weight`, `MODULE.lora_B.weight`, and with DoRA `MODULE.lora_magnitude_vector`.
    """

    name = "lora"
    HAS_SCALE = True
    Config: ClassVar[type[BaseModel]] = LoraConfig
    FORMATS: tuple[str, ...] = ("diffusers", "peft", "comfyui", "kohya")
    REASONS: ClassVar[Mapping[str, str]] = {
        "lycoris": "LyCORIS' name for it is LoCon, in kohya's or ComfyUI's format. Write one of those."
    }

    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: LoraConfig) -> Any:
        """PEFT's settings."""
        import peft

        if self.changes_base(settings):
            layers = dict(component.module.named_modules())
            injection.refuse_quantised((layers[name] for name in names), f"method.initialisation: {settings.initialisation}")
        return peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            lora_dropout=settings.dropout,
            # What takes factors out of W starts as `default` does, and is replaced.
            init_lora_weights=_PEFT_INITIALISATION.get(settings.initialisation, True),
            target_modules=targets.as_peft_targets(component, names),
            rank_pattern=targets.matching(settings.rank_pattern, names),
            alpha_pattern=targets.matching(_alphas(settings), names),
            use_rslora=settings.rslora,
            use_dora=settings.dora,
        )

    def inject(
        self, component: TrainedComponent, peft_config: Any, settings: LoraConfig, seed: int
    ) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter, and move what it starts from out of the weights."""
        parameters = injection.inject(component.module, peft_config, seed)
        if settings.dora:
            _check_directions(component.module)
        if self.changes_base(settings):
            for name, layer in injection.adapted(component.module).items():
                _start_from_weight(name, layer, settings.initialisation)
        return parameters

    def parameter_groups(self, settings: LoraConfig) -> Sequence[tuple[str, float]]:
        """LoRA+, and the text encoders' own learning rate; both for their B."""
        encoders = super().parameter_groups(settings)
        if settings.lora_plus is None:
            return encoders
        both = [(rf"{match}.*\.lora_B\.", rate * settings.lora_plus) for match, rate in encoders]
        return (*both, *encoders, (r"\.lora_B\.", settings.lora_plus))

    def changes_base(self, settings: LoraConfig) -> bool:
        """PiSSA and OLoRA take a part out of the weights."""
        return settings.initialisation in _CHANGES_BASE

    def strength_refusal(self, settings: LoraConfig) -> str | None:
        """Neither has DoRA a strength, nor what has taken a part out of the weights."""
        if settings.dora:
            return "only LoRA, LoHa and LoKr have a strength, DoRA has none."
        if self.changes_base(settings):
            return f"method.initialisation: {settings.initialisation} has moved a part of the base weights into the adapter."
        return super().strength_refusal(settings)

    def base_refusal(self, settings: LoraConfig) -> str | None:
        """Nor can what has taken a part out of the weights."""
        if self.changes_base(settings):
            return f"method.initialisation: {settings.initialisation} has moved a part of the base weights into the adapter."
        return super().base_refusal(settings)

    def start_batches(self, settings: LoraConfig) -> int:
        """EVA's."""
        return settings.eva_batches if settings.initialisation == "eva" else 0

    def start_from(self, model: Model, predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
        """EVA."""
        eva.start(model.components.values(), predictions)

    def export(self, model: Model, settings: LoraConfig, export: Export) -> list[Path]:
        """Every format holds the scale in B, with alpha = rank: readers that look at alpha and those that do not agree."""
        self.check_format(export.form, settings)
        adapters = {name: adapter_of(module, settings) for name, module in model.components.items()}
        return write(adapters, model.family, export)

    def load_into(self, family: Family, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> Any:
        """diffusers' own loader, once the file is known to be whole and of this model; PEFT's of `modules_to_save`."""
        if (directory / peft_directory.CONFIG_FILE).exists():
            return super().load_into(family, pipeline, directory, adapter)
        path, denoiser = directory / WEIGHTS_FILE, getattr(pipeline, family.denoiser_attribute)
        by_component: dict[str, dict[str, torch.Tensor]] = {}
        tensors = peft_directory.read_tensors(path)
        for name, tensor in tensors.items():
            component, _, key = name.partition(".")
            by_component.setdefault(component, {})[key] = tensor
        if family.denoiser_attribute not in by_component:
            peft_directory.check_fits(denoiser, tensors, path)
        for component, found in by_component.items():
            if component == family.denoiser_attribute:
                peft_directory.check_fits(denoiser, found, path)
                continue
            encoder = peft_directory.encoder_of(pipeline, component, path)
            peft_directory.check_fits(encoder, _as_in_encoder(family, component, encoder, found), path)
        with peft_directory.explaining(path):
            pipeline.load_lora_weights(directory, weight_name=WEIGHTS_FILE, adapter_name=adapter)
        return pipeline

    def usage(self, family: Family, settings: LoraConfig) -> str:
        """diffusers' loader; PEFT's of `modules_to_save`."""
        if settings.modules_to_save is not None:
            return super().usage(family, settings)
        return 'pipeline.load_lora_weights("path/to/this/folder")'


def _alphas(config: LoraConfig) -> dict[str, float]:
    """Without an alpha of its own, a layer of another rank has alpha = rank too."""
    by_rank = {} if config.alpha is not None else {key: float(rank) for key, rank in config.rank_pattern.items()}
    return {**config.alpha_pattern, **{key: alpha for key, alpha in by_rank.items() if key not in config.alpha_pattern}}


def _start_from_weight(name: str, layer: Any, initialisation: str) -> None:
    """Move a part of rank r from the layer's weight into its adapter, and keep that part: the delivery needs it.

    PiSSA, eq. 2 and 3: the r largest singular values, their roots on either side. OLoRA, algorithm 1: Q[:, :r] and R[:r].
    The rest is computed from the rounded factors, so that the sum is the weight to the precision of the rest.

    Raises:
        ConfigError: the rank is larger than the weight's own.
    """
    import torch

    base = layer.get_base_layer()
    A, B = layer.lora_A[injection.ADAPTER].weight, layer.lora_B[injection.ADAPTER].weight
    layer.register_buffer("initial_A", torch.empty_like(A), persistent=False)
    layer.register_buffer("initial_B", torch.empty_like(B), persistent=False)
    if base.weight.is_meta:
        return
    rank, scale = A.shape[0], layer.scaling[injection.ADAPTER]
    weight_OI = base.weight.detach().float().flatten(1)
    if rank > min(weight_OI.shape):
        raise ConfigError(
            f"method.initialisation: {initialisation} takes rank {rank} of {name}, whose weight is {tuple(weight_OI.shape)}. "
            f"Lower the rank there with rank_pattern."
        )
    if initialisation == "pissa":
        U, S, V = torch.linalg.svd(weight_OI, full_matrices=False)
        roots = (S[:rank] / scale).sqrt()
        left, right = U[:, :rank] * roots, roots[:, None] * V[:rank]
    else:
        Q, R = torch.linalg.qr(weight_OI)
        left, right = Q[:, :rank], R[:rank]
    with torch.no_grad():
        for parameter, initial, value in ((A, layer.initial_A, right), (B, layer.initial_B, left)):
            parameter.copy_(value.reshape(parameter.shape))
            initial.copy_(parameter)
        rest_OI = weight_OI - scale * (B.float().flatten(1) @ A.float().flatten(1))
        base.weight.copy_(rest_OI.reshape(base.weight.shape))


def _delivered(model: Any) -> dict[str, Factors]:
    """What each layer adds to the original weights, by the module's name; scale, and what was taken out, are in it."""
    import torch

    layers, found = injection.adapted(model), {}
    for name, tensors in formats.split(injection.state(model), _KINDS).items():
        layer = layers[name]
        A, B = tensors["lora_A"].detach(), tensors["lora_B"].detach()
        if hasattr(layer, "initial_A"):
            A = torch.cat([A, layer.initial_A.to(A)], 0)
            B = torch.cat([B, -layer.initial_B.to(B)], 1)
        scaled = (B.float() * layer.scaling[injection.ADAPTER]).to(B.dtype)
        found[name] = Factors(A=A, B=scaled, magnitude=tensors.get("lora_magnitude_vector"))
    return found


def _as_in_encoder(
    family: Family, component: str, encoder: Any, tensors: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """Delivered tensors of a text encoder under the names that its modules have here."""
    assert isinstance(family, TrainsEncoders)
    published = {family.encoder_key(component, name): name for name, _ in encoder.named_modules() if name}
    renamed = {}
    for key, tensor in tensors.items():
        module, _, rest = key.partition(".lora_")
        renamed[f"{published.get(module, module)}.lora_{rest}"] = tensor
    return renamed


def adapter_of(module: Any, settings: LoraConfig) -> Adapter:
    """The adapter of one component, with what was taken out of the base and the strength in its factors."""
    factors, layers = _delivered(module), injection.adapted(module)
    double = 2 if METHOD.changes_base(settings) else 1
    peft_config = peft_directory.for_delivery(module.peft_config[injection.ADAPTER])
    peft_config.r = peft_config.lora_alpha = double * settings.rank
    peft_config.rank_pattern = {key: double * rank for key, rank in peft_config.rank_pattern.items()}
    peft_config.alpha_pattern = dict(peft_config.rank_pattern)
    peft_config.use_rslora = False
    peft_config.init_lora_weights = True
    assert {each.rank for each in factors.values()} <= {peft_config.r, *peft_config.rank_pattern.values()}
    scales = {
        name: _dora_scale(layers[name].get_base_layer().weight, layer)
        for name, layer in factors.items()
        if layer.magnitude is not None
    }
    whole = injection.whole_state(module)
    return Adapter(module=module, factors=factors, settings=peft_config, dora_scales=scales, whole=whole)


def of_factors(component: TrainedComponent, factors: Mapping[str, Factors]) -> Adapter:
    """A component's adapter of factors that were computed, not trained; each layer has a rank of its own."""
    import peft

    # By their whole names: a short one can be the end of another layer's.
    ranks = {f"^{re.escape(name)}": each.rank for name, each in factors.items()}
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    peft_config = peft.LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=targets.as_peft_targets(component, list(factors)),
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    return Adapter(module=component.module, factors=factors, settings=peft_config, dora_scales={})


def write(adapters: Mapping[str, Adapter], family: Family, export: Export) -> list[Path]:
    """Write what each component's layers add, by the component's name, in a delivery format of `Lora.FORMATS`."""
    directory, metadata = export.directory, export.metadata
    if export.form in ("comfyui", "kohya"):
        named = _renamed(adapters, export.form, family)
        note = {"ftk_read_by": formats.readers(export.form, _kind(adapters.values()))}
        return [peft_directory.commit_tensors(directory / formats.NAMED_FILES[export.form], named, {**metadata, **note})]
    if export.form == "peft":
        files: list[Path] = []
        tensors: dict[str, torch.Tensor] = {}
        for name, adapter in adapters.items():
            place = peft_directory.folder(directory, name)
            tensors = {**_named(adapter.factors), **adapter.whole}
            files += peft_directory.export_directory(place, adapter.settings, tensors, metadata)
        return files
    settings: dict[str, Any] = {}
    tensors = {}
    for name, adapter in adapters.items():
        component = family.denoiser_attribute if name == DENOISER else name
        settings |= {f"{component}.{key}": value for key, value in peft_directory.plain(adapter.settings.to_dict()).items()}
        for key, tensor in _named(adapter.factors).items():
            tensors[f"{component}.{key if name == DENOISER else _key_in_encoder(family, name, key)}"] = tensor
    header = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True), **metadata}
    return [peft_directory.commit_tensors(directory / WEIGHTS_FILE, tensors, header)]


def _kind(adapters: Iterable[Adapter]) -> str:
    """What a file's readers must know."""
    every = list(adapters)
    return "whole" if any(each.whole for each in every) else "dora" if any(each.dora_scales for each in every) else "lora"


def _key_in_encoder(family: Family, component: str, key: str) -> str:
    """A text encoder's tensor. transformers 5 passes over DoRA's magnitudes unless they are called a `weight`."""
    assert isinstance(family, TrainsEncoders)
    return family.encoder_key(component, key) + (".weight" if key.endswith("lora_magnitude_vector") else "")


def _named(factors: Mapping[str, Factors]) -> "dict[str, torch.Tensor]":
    """PEFT's names."""
    named = {}
    for name, one in factors.items():
        named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"] = one.A, one.B
        if one.magnitude is not None:
            named[f"{name}.lora_magnitude_vector"] = one.magnitude
    return named


def _renamed(adapters: Mapping[str, Adapter], form: str, family: Family) -> "dict[str, torch.Tensor]":
    """Names of ComfyUI or kohya. Of layers with other ranks, too, alpha is the largest: diffusers mixes up several alphas."""
    import torch

    alpha = float(max(layer.rank for adapter in adapters.values() for layer in adapter.factors.values()))
    named: dict[str, torch.Tensor] = {}
    for component, adapter in adapters.items():
        names = family.adapter_names(form, component, adapter.module)
        formats.warn_of_unread(form, names, adapter.factors)
        first, second = names.factors
        for name, layer in adapter.factors.items():
            key = names.module(name)
            named[f"{key}.{first}.weight"] = layer.A
            # Without an alpha a reader takes each layer's rank for it.
            named[f"{key}.{second}.weight"] = layer.B * (layer.rank / alpha) if names.has_alpha else layer.B
            if names.has_alpha:
                named[f"{key}.alpha"] = torch.tensor(alpha)
        for name, scale in adapter.dora_scales.items():
            if form == "kohya":
                raise ConfigError(
                    "lora with dora cannot be written as kohya: sd-scripts have no DoRA. Write comfyui or diffusers."
                )
            named[f"{names.module(name)}.dora_scale"] = scale
        if adapter.whole:
            named |= whole_modules.differences(adapter.module, injection.whole_modules(adapter.module), names)
    return named


def _check_directions(module: "torch.nn.Module") -> None:
    """DoRA divides a row by its length: rows of zeros have gradients that are no numbers from the first step on.

    Raises:
        ConfigError: an adapted layer has such rows.
    """
    layers = injection.adapted(module)
    lengths = {name: layer.lora_magnitude_vector[injection.ADAPTER].weight for name, layer in layers.items()}
    # What is only planned, or filled later, has no values.
    zeros = {name: 0 if one.is_meta else int((one == 0).sum()) for name, one in lengths.items()}
    found = [f"{name} ({count} rows)" for name, count in zeros.items() if count]
    if found:
        raise ConfigError(
            f"method.dora: rows of zeros have no direction, and {len(found)} of {len(layers)} layers have some: "
            f"{', '.join(found[:5])}{', ...' if found[5:] else ''}. Leave them out of `targets`, or train without `dora`."
        )


def _dora_scale(weight: "torch.Tensor", one: Factors) -> "torch.Tensor":
    """[out,1,...] for ComfyUI, which multiplies W + B A by dora_scale / |W|, where DoRA has magnitude / |W + B A|.

    Source: ComfyUI, `weight_decompose` in `comfy/weight_adapter/base.py` (v0.3.77), on the output axis.
    """
    assert one.magnitude is not None
    weight_OI = weight.detach().float().flatten(1)
    sum_OI = weight_OI + one.B.float().flatten(1).to(weight_OI) @ one.A.float().flatten(1).to(weight_OI)
    scale_O = one.magnitude.detach().float().flatten() * weight_OI.norm(dim=1) / sum_OI.norm(dim=1)
    return scale_O.reshape(-1, *[1] * (weight.ndim - 1))


METHOD = Lora()
