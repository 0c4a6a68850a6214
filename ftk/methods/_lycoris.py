"""What LoHa and LoKr share: settings, delivery. Names and semantics are LyCORIS' (arXiv 2309.14859), training is PEFT's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.methods import _formats, _peft
from ftk.methods.base import Components
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

_SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factors that take the scale: what a layer adds is linear in each."""


def attach(components: Components, family: Family, config: Any, seed: int, make: Any) -> "dict[str, torch.nn.Parameter]":
    """Inject the adapter; `make` is PEFT's class of settings, which takes those of `shared_settings` and `config.own`."""
    denoiser: Any = components["denoiser"]
    names = _peft.select(denoiser, family, config.targets, _peft.linear_or_convolution)
    for pattern in ("rank_pattern", "alpha_pattern"):
        _peft.check_patterns(getattr(config, pattern), names, pattern)
    _refuse_grouped(denoiser, names)
    by_rank = {} if config.alpha is not None else dict(config.rank_pattern)
    settings = make(
        r=config.rank,
        alpha=config.alpha or config.rank,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        use_effective_conv2d=config.effective_convolution,
        target_modules=_peft.as_peft_targets(denoiser, family, config.targets, names),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern={**by_rank, **config.alpha_pattern},
        **config.own,
    )
    return _peft.attach(denoiser, settings, seed)


def _refuse_grouped(denoiser: Any, names: Sequence[str]) -> None:
    """A grouped convolution's weight has fewer inputs than the formats' readers think."""
    modules = dict(denoiser.named_modules())
    grouped = [name for name in names if getattr(modules[name], "groups", 1) != 1]
    if grouped:
        raise ConfigError(f"method.targets: {grouped[0]} is a grouped convolution, which cannot be carried. Leave it out.")


def delivered(denoiser: Any) -> "dict[str, torch.Tensor]":
    """The tensors by PEFT's names, which are LyCORIS', with the scale in one of them: alpha = rank then.

    ComfyUI ignores alpha where both factors of a LoKr are whole.
    """
    layers = _peft.adapted(denoiser)
    tensors = {}
    for name, tensor in _peft.state(denoiser).items():
        module, _, kind = name.rpartition(".")
        scale = layers[module].scaling[_peft.ADAPTER] if kind in _SCALED else 1.0
        tensors[name] = (tensor.detach().float() * scale).to(tensor.dtype)
    return tensors


def export_peft(denoiser: Any, config: Any, directory: Path, metadata: Mapping[str, str]) -> list[Path]:
    """A PEFT directory."""
    return _peft.export_directory(directory, _settings(denoiser, config), delivered(denoiser), metadata)


def export_diffusers(denoiser: Any, config: Any, directory: Path, metadata: Mapping[str, str]) -> list[Path]:
    """One file with plain names, for `load_lora_adapter(DIR, prefix=None)`."""
    settings = json.dumps(_peft.plain(_settings(denoiser, config).to_dict()), sort_keys=True)
    header = {"lora_adapter_metadata": settings, **metadata}
    return [_peft.commit_tensors(directory / _formats.SINGLE_FILE, delivered(denoiser), header)]


def export_named(denoiser: Any, family: Family, directory: Path, form: str, metadata: Mapping[str, str]) -> list[Path]:
    """One file with the names of `comfyui`, `kohya` or `lycoris`, with `.alpha`."""
    import torch

    stem, layers = _formats.stem(form, family), _peft.adapted(denoiser)
    named: dict[str, torch.Tensor] = {}
    for name, tensor in delivered(denoiser).items():
        module, _, kind = name.rpartition(".")
        named[f"{stem(module)}.{kind}"] = tensor
        named[f"{stem(module)}.alpha"] = torch.tensor(float(layers[module].r[_peft.ADAPTER]))
    return [_peft.commit_tensors(directory / _formats.NAMED_FILES[form], named, metadata)]


def _settings(denoiser: Any, config: Any) -> Any:
    settings = _peft.for_delivery(denoiser.peft_config[_peft.ADAPTER])
    settings.alpha = config.rank
    settings.alpha_pattern = dict(config.rank_pattern)
    return settings
