"""A method that only the tests hold: a small network reads the pixels of a control image and adds to the noisy latents.

It has what no method of ftk has yet: a network of its own beside the model, control images as pixels, its own prediction, and
a pipeline of another kind. The protocol must carry it without a change anywhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import nn

from ftk.errors import CheckpointError, ConfigError
from ftk.methods.adapters.peft_directory import commit_tensors
from ftk.methods.base import CacheNeeds, Export, check_format, empty_control
from ftk.models.base import Conditions, ControlForm, Family, Model
from ftk.models.components import flow_matching

NETWORK = "hint"
FILE = "pixel_hint.safetensors"


class PixelHintConfig(BaseModel):
    """Settings under `method:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(default=4, ge=1, description="channels of the network")


class PixelHint:
    """The base model stays as it is."""

    name = "pixel-hint"
    Config: ClassVar[type[BaseModel]] = PixelHintConfig
    FORMATS = ("diffusers",)
    reads_several = False

    def encoders(self, family: Family, settings: PixelHintConfig) -> tuple[str, ...]:
        """None."""
        return ()

    def cache_needs(self, family: Family, settings: PixelHintConfig) -> CacheNeeds:
        """Control images as pixels."""
        return CacheNeeds(controls="pixels")

    def attach(self, model: Model, settings: PixelHintConfig, seed: int) -> dict[str, nn.Parameter]:
        """The network, which adds nothing at first."""
        first = next(model.denoiser.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(model.family, settings.width)
        model.extras[NETWORK] = network.to(first.device, first.dtype).train()
        return {f"{NETWORK}.{name}": parameter for name, parameter in network.named_parameters()}

    def predict(self, model: Model, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The family's, of latents that the hint was added to."""
        (pixels_BCHW,) = conditions.controls
        return model.family.predict(model, noisy_BCHW + model.extras[NETWORK](pixels_BCHW), sigma_B, conditions)

    def base_refusal(self, settings: PixelHintConfig) -> None:
        """The base model is there."""

    def base_prediction(
        self, model: Model, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """The family's."""
        with torch.no_grad():
            return model.family.predict(model, noisy_BCHW, sigma_B, conditions)

    def export(self, model: Model, settings: PixelHintConfig, export: Export) -> list[Path]:
        """One file."""
        check_format(self.name, self.FORMATS, export.form, {})
        return [commit_tensors(export.directory / FILE, model.extras[NETWORK].state_dict(), export.metadata)]

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """A pipeline around the pipeline."""
        path = directory / FILE
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: `ftk train` or `ftk export` writes it.")
        tensors = load_file(path)
        network = _network(family, len(tensors["0.weight"]))
        network.load_state_dict(tensors)
        denoiser = getattr(pipeline, family.denoiser_attribute)
        return HintedPipeline(pipeline, denoiser, network.to(denoiser.device, denoiser.dtype).eval())

    def merge(self, model: Model) -> None:
        """There is nothing to merge."""
        raise ConfigError(f"{self.name} trains a network beside the model: nothing of it can be merged. Use `ftk export`.")

    def usage(self, family: Family, settings: PixelHintConfig) -> str:
        """A comment, for the model card."""
        return "# the network of path/to/this/folder adds to the noisy latents"

    def dropped_control(self, control: torch.Tensor, form: ControlForm) -> torch.Tensor:
        """Black."""
        return empty_control(control, form)

    def sampling_pipeline(self, model: Model, pipeline: Any) -> Any:
        """The same, with the network as it is now."""
        return HintedPipeline(pipeline, model.denoiser, model.extras[NETWORK])

    def pipeline_controls(self, controls: Sequence[torch.Tensor], strength: float = 1.0) -> dict[str, Any]:
        """One image."""
        (pixels_BCHW,) = controls
        return {"hint": pixels_BCHW, "hint_strength": strength}


class HintedPipeline:
    """A diffusers pipeline whose denoiser is given latents that the hint was added to."""

    def __init__(self, pipeline: Any, denoiser: Any, network: nn.Module) -> None:
        self._pipeline = pipeline
        self._denoiser = denoiser
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, hint: torch.Tensor | None = None, hint_strength: float = 1.0, **options: Any) -> Any:
        if hint is None:
            return self._pipeline(**options)
        with torch.no_grad(), self._adding(hint_strength * self._network(hint)):
            return self._pipeline(**options)

    @contextmanager
    def _adding(self, hint_BCHW: torch.Tensor) -> Iterator[None]:
        def add(_module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if arguments:  # a U-Net
                return (arguments[0] + hint_BCHW, *arguments[1:]), options
            tokens = flow_matching.pack(hint_BCHW)
            hidden = options["hidden_states"].clone()
            hidden[:, : tokens.shape[1]] += tokens
            return arguments, {**options, "hidden_states": hidden}

        handle = self._denoiser.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _network(family: Family, width: int) -> nn.Sequential:
    factor, channels = family.geometry.factor, family.geometry.channels
    last = nn.Conv2d(width, channels, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(3, width, factor, stride=factor), nn.SiLU(), last)


METHOD = PixelHint()
