"""What LoHa and LoKr share: settings, delivery. Names and semantics are LyCORIS' (arXiv 2309.14859), training is PEFT's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.methods.adapters import formats, injection, peft_directory, peft_method, targets, whole_modules
from ftk.methods.adapters.targets import TrainedComponent
from ftk.methods.base import Export
from ftk.models.base import DENOISER, Model

if TYPE_CHECKING:
    import torch

_SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factors that take the scale: what a layer adds is linear in each."""


class LycorisMethod(peft_method.PeftMethod):
    """A method that adds a product of factors; `settings.own` are the settings that only its PEFT class takes."""

    peft_class: str
    HAS_SCALE = True

    def peft_config(self, component: TrainedComponent, names: Sequence[str], settings: Any) -> Any:
        """PEFT's settings."""
        import peft

        _refuse_grouped(component, names)
        by_rank = {} if settings.alpha is not None else dict(settings.rank_pattern)
        return getattr(peft, self.peft_class)(
            r=settings.rank,
            alpha=settings.alpha or settings.rank,
            rank_dropout=settings.rank_dropout,
            module_dropout=settings.module_dropout,
            use_effective_conv2d=settings.effective_convolution,
            target_modules=targets.as_peft_targets(component, names),
            rank_pattern=targets.matching(settings.rank_pattern, names),
            alpha_pattern=targets.matching({**by_rank, **settings.alpha_pattern}, names),
            **settings.own,
        )

    def export(self, model: Model, settings: Any, export: Export) -> list[Path]:
        """Every format holds the scale in the first factor, with alpha = rank. diffusers' has no text encoders: PEFT's has."""
        self.check_format(export.form, settings)
        if export.form not in ("diffusers", "peft"):
            return _export_named(model, export)
        files = []
        for name, module in model.components.items():
            write = _export_diffusers if export.form == "diffusers" and name == DENOISER else _export_peft
            files += write(module, settings, peft_directory.folder(export.directory, name), export.metadata)
        return files


def _refuse_grouped(component: TrainedComponent, names: Sequence[str]) -> None:
    """A grouped convolution's weight has fewer inputs than the formats' readers think."""
    modules = dict(component.module.named_modules())
    grouped = [name for name in names if getattr(modules[name], "groups", 1) != 1]
    if grouped:
        raise ConfigError(f"{component.setting}: {grouped[0]} is a grouped convolution, which cannot be carried. Leave it out.")


def _delivered(model: Any) -> "dict[str, torch.Tensor]":
    """The tensors by PEFT's names, which are LyCORIS', with the scale in one of them: alpha = rank then.

    ComfyUI ignores alpha where both factors of a LoKr are whole.
    """
    layers = injection.adapted(model)
    tensors = {}
    for name, tensor in injection.state(model).items():
        module, _, kind = name.rpartition(".")
        scale = layers[module].scaling[injection.ADAPTER] if kind in _SCALED else 1.0
        tensors[name] = (tensor.detach().float() * scale).to(tensor.dtype)
    return tensors


def _export_peft(model: Any, config: Any, directory: Path, metadata: Mapping[str, str]) -> list[Path]:
    """A PEFT directory."""
    tensors = _delivered(model) | injection.whole_state(model)
    return peft_directory.export_directory(directory, _settings(model, config), tensors, metadata)


def _export_diffusers(model: Any, config: Any, directory: Path, metadata: Mapping[str, str]) -> list[Path]:
    """One file with plain names, for `load_lora_adapter(DIR, prefix=None)`."""
    settings = json.dumps(peft_directory.plain(_settings(model, config).to_dict()), sort_keys=True)
    header = {"lora_adapter_metadata": settings, **metadata}
    return [peft_directory.commit_tensors(directory / formats.SINGLE_FILE, _delivered(model), header)]


def _export_named(model: Model, export: Export) -> list[Path]:
    """One file with the names of `comfyui`, `kohya` or `lycoris`, with `.alpha`."""
    import torch

    named: dict[str, torch.Tensor] = {}
    for component, adapted in model.components.items():
        names, layers = model.family.adapter_names(export.form, component, adapted), injection.adapted(adapted)
        formats.warn_of_unread(export.form, names, layers)
        by_layer: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in _delivered(adapted).items():
            layer, _, kind = name.rpartition(".")
            by_layer.setdefault(layer, {})[kind] = tensor
        for layer, tensors in by_layer.items():
            key, factors = names.module(layer), _as_read(tensors)
            named |= {f"{key}.{kind}": tensor for kind, tensor in factors.items()}
            # LyCORIS and all readers of its names need alpha beside the factors.
            named[f"{key}.alpha"] = torch.tensor(_alpha(factors, layers[layer].r[injection.ADAPTER]))
        named |= whole_modules.differences(adapted, injection.whole_modules(adapted), names)
    kind = "whole" if any(map(injection.whole_modules, model.components.values())) else "lycoris"
    header = {**export.metadata, "ftk_read_by": formats.readers(export.form, kind)}
    return [peft_directory.commit_tensors(export.directory / formats.NAMED_FILES[export.form], named, header)]


def _as_read(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """A layer's factors in the form that every reader takes.

    Of a LoKr the small factor whole, since musubi-tuner passes over others; and without a core of factored kernels: ComfyUI
    multiplies that out into a tensor whose layout `torch.kron` then refuses.
    """
    import torch

    read = dict(tensors)
    if "lokr_w1_a" in read:
        a, b = read.pop("lokr_w1_a"), read.pop("lokr_w1_b")
        read["lokr_w1"] = (a.float() @ b.float()).to(a.dtype)
    if "lokr_t2" in read:
        core, a, b = (read.pop(name).float() for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        whole = torch.einsum("i j h w, i p, j r -> p r h w", core, a, b)
        read["lokr_w2"] = whole.to(tensors["lokr_t2"].dtype)
    return read


def _alpha(factors: "Mapping[str, torch.Tensor]", rank: int) -> float:
    """The alpha that means a strength of 1 to every reader.

    That is the rank. Of a LoKr whose larger factor is whole LyCORIS and ComfyUI pass over alpha, and musubi-tuner divides it by
    the factor's longer side.
    """
    return float(max(factors["lokr_w2"].shape) if "lokr_w2" in factors else rank)


def _settings(model: Any, config: Any) -> Any:
    settings = peft_directory.for_delivery(model.peft_config[injection.ADAPTER])
    settings.alpha = config.rank
    settings.alpha_pattern = dict(settings.rank_pattern)
    return settings
