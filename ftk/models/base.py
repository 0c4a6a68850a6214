"""The Family protocol: all that ftk knows about a model architecture. One file in this folder is one family.

A family's file imports no torch at its top: `ftk prepare` reads the geometry of a family and needs no torch for it.

Shape legend: B batch, C latent channels, H W height and width (pixels of images, cells of latents), L text tokens,
D text width.
"""

import importlib
import pkgutil
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ftk import locations
from ftk.configs.schema import ModelConfig
from ftk.errors import ConfigError, EnvironmentFault, ModelError

if TYPE_CHECKING:
    import torch

Objective = Literal["flow", "epsilon", "v"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """How pixels become latent cells and cells become tokens; sides in pixels."""

    channels: int
    factor: int
    patch: int

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.factor * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShift:
    """A shift of sigma to exp(mu) / (exp(mu) + 1 / sigma - 1), where mu grows linearly with an image's tokens.

    It is `base_shift` at `base_tokens` and `max_shift` at `max_tokens`, and goes on beyond both: diffusers' `calculate_shift`.
    """

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float

    def mu(self, tokens: int) -> float:
        """mu for an image of this many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """What the model is trained to predict, and its training table of sigmas: [N], fp32, from 1 (noise) downwards.

    `token_shift` is how sampling shifts sigmas with an image's size; None where the model's scheduler does not.
    """

    objective: Objective
    sigmas: "torch.Tensor"
    token_shift: TokenShift | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """About how many bytes training one sample keeps or works in, weights left out."""

    block_saved: int
    """What the backward pass of one repeated block needs from its forward pass."""
    block_input: int
    """What remains of it where the block is computed again in the backward pass."""
    block_working: int
    """What comes and goes while one block computes, forward or backward, at its highest."""
    outside: int
    """The same for all that is not a repeated block."""


class Family(Protocol):
    """What a model architecture must provide. Latents are normalised: in the denoiser's own space."""

    name: str
    geometry: LatentGeometry
    encoder_version: int
    """Raised whenever `encode_images` or `encode_texts` changes what it returns; part of every fingerprint."""
    max_text_tokens: int
    text_token_bytes: int
    """About how many bytes a cached text token takes in the full-size model: sizes the shards, nothing else."""
    latent_components: tuple[str, ...]
    text_components: tuple[str, ...]
    denoiser_components: tuple[str, ...]
    target_groups: Mapping[str, Sequence[str]]
    """Names for sets of linear layers: `attention`, `attention+mlp`, `all-linear`, `text-kv`. Suffixes, as PEFT reads them."""
    block_class: str
    """Class name of the repeated block: for checkpointing, compiling, offloading and sharding."""

    def check(self, directory: Path) -> None:
        """Raise `ModelError` unless `directory` is a model of this family in the Diffusers layout."""

    def text_options(self) -> dict[str, Any]:
        """What shapes text embeddings besides the weights (the template): part of the fingerprint."""

    def load_vae(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """The VAE alone, frozen, ready for `encode_images` and `decode`: its own encoding may be replaced by a faster one."""

    def normalisation(self, directory: Path) -> dict[str, Any]:
        """The constants that `encode_images` applies, for the record in `cache.json`; no weights are read."""

    def image_flops(self, directory: Path, height: int, width: int) -> float:
        """About how many floating-point operations one image of these sides (px) takes in `encode_images`."""

    def text_flops(self, directory: Path, tokens: int) -> float:
        """About how many floating-point operations one text of so many tokens takes in `encode_texts`."""

    def encode_images(self, vae: Any, pixels_BCHW: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Posterior (mean, std), each [B,C,H/f,W/f] fp32 and normalised, of pixels in [-1, 1].

        An image's result does not depend on the other images of its batch, beyond the rounding of the precision.
        """

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """About how many bytes `encode_images` works in for each image of a batch, weights left out; sides in pixels."""

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Pixels [B,3,H,W] in [-1, 1] of normalised latents."""

    def load_text_encoder(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> Any:
        """Tokenizer and text encoder, frozen; whatever object `encode_texts` takes."""

    def encode_texts(
        self, encoder: Any, captions: Sequence[str], references: Sequence["torch.Tensor"] = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """One dict of unpadded tensors a caption, on the encoder's device. `references`: images of an edit model.

        A caption's result does not depend on the other captions of its batch, beyond the rounding of the precision.
        """

    def text_lengths(self, encoder: Any, captions: Sequence[str]) -> list[int]:
        """How many tokens `encode_texts` will keep of each caption, at most `max_text_tokens`; no model runs."""

    def text_memory(self, encoder: Any, tokens: int) -> int:
        """About how many bytes `encode_texts` works in for each text of a batch padded to `tokens`, weights left out."""

    def load_denoiser(self, directory: Path, dtype: "torch.dtype", device: "torch.device") -> "torch.nn.Module":
        """The denoiser, frozen, in training mode. On the `meta` device: its shapes alone, no weights are read."""

    def load_schedule(self, directory: Path) -> NoiseSchedule:
        """Objective and training sigmas, from the scheduler's configuration."""

    def activations(self, denoiser: Any, image_tokens: int, text_tokens: int, dtype: "torch.dtype") -> Activations:
        """What one sample of so many tokens takes in training, of a denoiser that a method was attached to.

        `denoiser` may be on the `meta` device. Attention keeps no matrix of scores.
        """

    def collate_texts(self, texts: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor | None"]:
        """Pad texts into one batch; the mask is None when nothing was padded (attention without a mask is faster)."""

    def predict(
        self,
        denoiser: Any,
        noisy_BCHW: "torch.Tensor",
        sigma_B: "torch.Tensor",
        texts: Mapping[str, "torch.Tensor | None"],
        references: Sequence["torch.Tensor"] = (),
        residuals: Sequence["torch.Tensor"] | None = None,
    ) -> "torch.Tensor":
        """The model's prediction [B,C,H,W] in fp32. `references` are latents to edit from, `residuals` a ControlNet's."""

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """The diffusers pipeline; `components` replaces parts of it (`text_encoder=None` leaves one out).

        What is given stays where it is; the rest is loaded onto the device.
        """

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """The pipeline's arguments for one cached text item, in place of `prompt`."""

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments for this strength of classifier-free guidance."""

    def tiny(self, directory: Path) -> None:
        """Write a complete small random model in the Diffusers layout: deterministic, no download."""


def available() -> list[str]:
    """Names of all families: the files of this folder."""
    package = importlib.import_module("ftk.models")
    return sorted(item.name.replace("_", "-") for item in pkgutil.iter_modules(package.__path__) if item.name != "base")


def get(name: str) -> Family:
    """The family called `name`; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"model.family: there is no family {name!r}. Valid: {', '.join(available())}")
    family: Family = importlib.import_module(f"ftk.models.{name.replace('-', '_')}").FAMILY
    return family


def locate(model: ModelConfig, components: Sequence[str]) -> Path:
    """The local directory that holds the named components of a model; a Hub id is downloaded, those components only.

    Raises:
        ModelError: neither a local folder nor a Hub id, or a folder that is no model of the family.
        EnvironmentFault: the Hub could not be reached.
    """
    directory = locations.local_path(model.path)
    if not directory.is_dir():
        directory = _download(model, components)
    get(model.family).check(directory)
    missing = [name for name in components if not (directory / name).is_dir()]
    if missing:
        raise ModelError(
            f"model.path {model.path}: no {', '.join(missing)} folder in it. "
            f"Found: {', '.join(sorted(entry.name for entry in directory.iterdir())) or 'nothing'}."
        )
    return directory


def local_components(model: ModelConfig, components: Sequence[str]) -> Path | None:
    """The local directory of a model if it holds all the named components without a download, else None."""
    directory = locations.local_path(model.path)
    return directory if all((directory / name).is_dir() for name in components) else None


def _download(model: ModelConfig, components: Sequence[str]) -> Path:
    if not _HUB_ID.match(model.path):
        raise ModelError(f"model.path {model.path}: no such folder, and it is no Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["model_index.json", *(f"{name}/*" for name in components)]
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.path {model.path}: no such folder here, and no such model on the Hub (or it needs `hf auth login`)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"model.path {model.path}: no such folder here, and the Hub could not be reached to download it "
            f"({type(error).__name__}). Check the spelling or the network."
        ) from None


def resolve_device(name: str) -> "torch.device":
    """`auto` is CUDA when there is one, else the CPU; a device that is asked for by name must be there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("device cuda was asked for, but torch sees no CUDA device. Set the device to auto or cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentFault("device mps was asked for, but torch sees no Metal device. Set the device to auto or cpu.")
    return torch.device(name)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def memory_bytes(device: "torch.device") -> int:
    """Peak memory: what torch allocated on a CUDA device, elsewhere this process's resident set."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
