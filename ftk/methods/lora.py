"""LoRA: W + (alpha / rank) B A, by PEFT (Hu et al. 2021, arXiv 2106.09685).

Initialisation is diffusers' `gaussian`: A normal with standard deviation 1 / rank, B zero, so training starts at the base.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ftk import storage
from ftk.errors import ConfigError
from ftk.methods.base import Components, target_modules
from ftk.models.base import Family

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


class LoraConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="strength is alpha / rank; alpha = rank by default")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field(default="attention", description="a group of the family, or module names")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank


class Lora:
    """The low-rank adapter of linear layers."""

    name = "lora"
    Config: ClassVar[type[BaseModel]] = LoraConfig
    NEEDS = ("denoiser",)
    EXTRA: tuple[str, ...] = ()
    FORMATS = ("diffusers",)

    def attach(self, components: Components, family: Family, config: LoraConfig, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Inject the adapter through diffusers' `add_adapter`."""
        import torch

        denoiser: Any = components["denoiser"]
        targets = target_modules(family, config.targets)
        names = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise ConfigError(f"method.targets: {target!r} is the name of no linear layer of {family.name}.")
        device = next(denoiser.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            denoiser.add_adapter(_peft_config(config, targets, config.alpha or config.rank), adapter_name=ADAPTER)
        return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}

    def state(self, components: Components) -> "dict[str, torch.Tensor]":
        """`MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(components["denoiser"], adapter_name=ADAPTER))

    def load_state(self, components: Components, state: "Mapping[str, torch.Tensor]") -> None:
        """Inverse of `state`."""
        from peft import set_peft_model_state_dict

        outcome = set_peft_model_state_dict(components["denoiser"], dict(state), adapter_name=ADAPTER)
        assert not outcome.unexpected_keys, f"state of another adapter: {outcome.unexpected_keys[:3]}"

    def export(
        self,
        components: Components,
        family: Family,
        config: LoraConfig,
        directory: Path,
        form: str,
        metadata: Mapping[str, str],
    ) -> list[Path]:
        """`diffusers`: `transformer.`-prefixed keys with the scale baked into B, and metadata that says alpha = rank.

        Both readers of the format then agree: diffusers, which reads the metadata, and those that read the tensors alone.
        """
        from safetensors.torch import save

        assert form in self.FORMATS
        prefix = "transformer"
        tensors = {
            f"{prefix}.{name}": (tensor.float() * config.scale).to(tensor.dtype) if ".lora_B." in name else tensor
            for name, tensor in self.state(components).items()
        }
        peft_config = _peft_config(config, target_modules(family, config.targets), config.rank).to_dict()
        plain = {f"{prefix}.{key}": _plain(value) for key, value in peft_config.items()}
        payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(plain, sort_keys=True), **metadata}
        storage.commit_bytes(directory / WEIGHTS_FILE, storage.canonical_safetensors(payload, header))
        return [directory / WEIGHTS_FILE]

    def load_into(self, pipeline: Any, directory: Path) -> None:
        """diffusers' own loader."""
        pipeline.load_lora_weights(directory, weight_name=WEIGHTS_FILE)

    def merge(self, components: Components) -> None:
        """Add (alpha / rank) B A to each adapted weight and remove the adapter."""
        denoiser: Any = components["denoiser"]
        denoiser.fuse_lora()
        denoiser.unload_lora()


def _peft_config(config: LoraConfig, targets: list[str], alpha: float) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


def _plain(value: Any) -> Any:
    """PEFT keeps target modules in a set, whose order changes from process to process."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)


METHOD = Lora()
