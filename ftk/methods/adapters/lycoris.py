"""What LoHa and LoKr share: settings, delivery. Names and semantics are LyCORIS' (arXiv 2309.14859), training is PEFT's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftk.errors import ConfigError
from ftk.methods.adapters import formats, injection, peft_directory, peft_method, targets
from ftk.methods.base import DENOISER, Components, TrainedComponent, check_format
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

_SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factors that take the scale: what a layer adds is linear in each."""


class LycorisMethod(peft_method.PeftMethod):
    """A method that adds a product of factors; `config.own` are the settings that only its PEFT class takes."""

    peft_class: str

    def peft_config(self, part: TrainedComponent, names: Sequence[str], config: Any) -> Any:
        """PEFT's settings."""
        import peft

        _refuse_grouped(part, names)
        by_rank = {} if config.alpha is not None else dict(config.rank_pattern)
        return getattr(peft, self.peft_class)(
            r=config.rank,
            alpha=config.alpha or config.rank,
            rank_dropout=config.rank_dropout,
            module_dropout=config.module_dropout,
            use_effective_conv2d=config.effective_convolution,
            target_modules=targets.as_peft_targets(part, names),
            rank_pattern=targets.matching(config.rank_pattern, names),
            alpha_pattern=targets.matching({**by_rank, **config.alpha_pattern}, names),
            **config.own,
        )

    def export(
        self,
        components: Components,
        family: Family,
        config: Any,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """Every format holds the scale in the first factor, with alpha = rank. diffusers' has no text encoders: PEFT's has."""
        check_format(self.name, self.FORMATS, form, self.REASONS)
        if form not in ("diffusers", "peft"):
            return _export_named(components, family, directory, form, metadata)
        files = []
        for name, module in components.items():
            write = _export_diffusers if form == "diffusers" and name == DENOISER else _export_peft
            files += write(module, config, peft_directory.folder(directory, name), metadata)
        return files


def _refuse_grouped(part: TrainedComponent, names: Sequence[str]) -> None:
    """A grouped convolution's weight has fewer inputs than the formats' readers think."""
    modules = dict(part.module.named_modules())
    grouped = [name for name in names if getattr(modules[name], "groups", 1) != 1]
    if grouped:
        raise ConfigError(f"{part.setting}: {grouped[0]} is a grouped convolution, which cannot be carried. Leave it out.")


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
    return peft_directory.export_directory(directory, _settings(model, config), _delivered(model), metadata)


def _export_diffusers(model: Any, config: Any, directory: Path, metadata: Mapping[str, str]) -> list[Path]:
    """One file with plain names, for `load_lora_adapter(DIR, prefix=None)`."""
    settings = json.dumps(peft_directory.plain(_settings(model, config).to_dict()), sort_keys=True)
    header = {"lora_adapter_metadata": settings, **metadata}
    return [peft_directory.commit_tensors(directory / formats.SINGLE_FILE, _delivered(model), header)]


def _export_named(
    components: Components, family: Family, directory: Path, form: str, metadata: Mapping[str, str]
) -> list[Path]:
    """One file with the names of `comfyui`, `kohya` or `lycoris`, with `.alpha`."""
    import torch

    named: dict[str, torch.Tensor] = {}
    for component, model in components.items():
        stem, layers = formats.stem(form, family, component), injection.adapted(model)
        for name, tensor in _delivered(model).items():
            module, _, kind = name.rpartition(".")
            named[f"{stem(module)}.{kind}"] = tensor
            named[f"{stem(module)}.alpha"] = torch.tensor(float(layers[module].r[injection.ADAPTER]))
    return [peft_directory.commit_tensors(directory / formats.NAMED_FILES[form], named, metadata)]


def _settings(model: Any, config: Any) -> Any:
    settings = peft_directory.for_delivery(model.peft_config[injection.ADAPTER])
    settings.alpha = config.rank
    settings.alpha_pattern = dict(settings.rank_pattern)
    return settings
