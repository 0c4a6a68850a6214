"""What all methods of the PEFT library are: settings, layers, an injected adapter, its state, its directory, its merging.

An adapter is injected into the denoiser itself, which keeps its class: families, pipelines and FSDP meet the same module. A
text encoder that is trained too gets one of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk.methods import base
from ftk.methods.adapters import injection, peft_directory, targets
from ftk.methods.base import Components, Targets, TextEncoderConfig, TrainedComponent, check_format
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch


class PeftMethodConfig(BaseModel):
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
        return targets.linear_or_convolution(layer)

    def peft_config(self, part: TrainedComponent, names: Sequence[str], config: Any) -> Any:
        """PEFT's settings for the layers called `names`.

        Raises:
            ConfigError: they do not fit one of the layers.
        """
        raise NotImplementedError

    def inject(self, part: TrainedComponent, settings: Any, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject one component's adapter; returns what is trained of it, by its own names."""
        return injection.inject(part.module, settings, seed)

    def needs(self, family: Family, config: Any) -> tuple[str, ...]:
        """The denoiser, and by `text_encoder` the text encoders."""
        return base.needs(family, config)

    def parameter_groups(self, config: Any) -> Sequence[tuple[str, float]]:
        """The text encoders' own learning rate."""
        return base.encoder_rates(config)

    def attach(self, components: Components, family: Family, config: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapters."""
        parts = base.parts(components, family, config)
        chosen = [targets.select(part, self.refusal) for part in parts]
        for pattern in ("rank_pattern", "alpha_pattern"):
            targets.check_patterns(getattr(config, pattern, {}), [name for names in chosen for name in names], pattern)
        parameters: dict[str, torch.nn.Parameter] = {}
        for part, names in zip(parts, chosen, strict=True):
            own = self.inject(part, self.peft_config(part, names, config), config, seed)
            parameters |= {part.prefix + name: parameter for name, parameter in own.items()}
        return parameters

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """PEFT's names, with a text encoder's before its own."""
        tensors: dict[str, torch.Tensor] = {}
        for name, module in components.items():
            tensors |= {base.prefix(name) + key: tensor for key, tensor in injection.state(module).items()}
        return tensors

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        for name, module in components.items():
            injection.load_state(module, base.tensors_of(name, components, state))

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
        return peft_directory.export_directories(directory, components, metadata)

    def load_into(self, pipeline: Any, directory: Path, adapter: str = injection.ADAPTER) -> None:
        """PEFT's settings and tensors, injected under the adapter's name."""
        peft_directory.load_directories(pipeline, directory, adapter)

    def merge(self, components: Components) -> None:
        """Fold the adapters into the weights and remove them."""
        for module in components.values():
            injection.merge(module)

    def usage(self, family: Family, config: Any) -> str:
        """PEFT's loader."""
        line = f'PeftModel.from_pretrained(pipeline.{family.denoiser_components[0]}, "path/to/this/folder")'
        others = peft_directory.usage_of_encoders(self.needs(family, config)) or [peft_directory.IMPORT]
        return "\n".join([others[0], line, *others[1:]])
