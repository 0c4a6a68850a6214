"""The Family protocol: all that ftk knows about a model architecture. One file in this folder is one family.

`components/` holds the parts that several families share.
A family's file imports no torch at its top: `ftk prepare` reads the geometry of a family and needs no torch for it.

Shape legend: B batch, C latent channels, H W height and width (pixels of images, cells of latents), L text tokens,
D text width.
"""

import importlib
import logging
import pkgutil
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from ftk import locations, storage
from ftk.configs.schema import HUB_ID, ModelConfig
from ftk.errors import ConfigError, EnvironmentFault, ModelError
from ftk.progress import human_bytes

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger("ftk")
Objective = Literal["flow", "epsilon", "v"]
_HUB_ID = re.compile(HUB_ID)
_WORTH_SAYING_BYTES = 1 << 30
_ARCHITECTURE = "modelspec.architecture"
# What a repository may hold beside the weights that are read: other formats, half-precision copies, weights without EMA.
_NOT_READ = ("*.bin", "*.ckpt", "*.fp16.*", "*.non_ema.*", "*.msgpack", "*.onnx*", "*.pb", "*openvino*", "*flax*")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """How pixels become latent cells, `factor` a side to a cell, and cells become tokens, `patch` a side to a token.

    A U-Net has no tokens of its own; there a patch is what its levels halve, so that no side ends in half a cell.
    """

    channels: int
    factor: int
    patch: int

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.factor * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGeometry:
    """Where a sample's pixels come from, in pixels: an image, resized, the bucket cropped from it, and then mirrored."""

    width: int
    height: int
    resize_width: int
    resize_height: int
    crop_x: int
    crop_y: int
    bucket_width: int
    bucket_height: int
    flipped: bool


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
    """What the model is trained to predict, and its training table of sigmas: [N], fp32, falling, from noise downwards.

    A sample at an entry is signal x + sigma n. In flow matching the signal is 1 - sigma and the model's time is sigma itself,
    at any sigma between 0 and 1. Elsewhere both stand in tables of their own, and only the table's sigmas can be trained.

    Attributes:
        token_shift: how sampling shifts sigmas with an image's size; None where the model's scheduler does not.
        signals: [N] fp32: what the image is multiplied by at each entry.
        times: [N] fp32: what the model takes as time at each entry.
    """

    objective: Objective
    sigmas: "torch.Tensor"
    token_shift: TokenShift | None = None
    signals: "torch.Tensor | None" = None
    times: "torch.Tensor | None" = None

    def scales(self, sigma_B: "torch.Tensor", dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
        """What image and noise are multiplied by, each [B], in the working dtype; sigma is rounded to it first."""
        rounded_B = sigma_B.to(dtype)
        if self.signals is None:
            return 1.0 - rounded_B, rounded_B
        return self.signals[self._entry(sigma_B)].to(dtype), rounded_B

    def time(self, sigma_B: "torch.Tensor") -> "torch.Tensor":
        """[B] fp32: what `Family.predict` takes for these sigmas."""
        return sigma_B if self.times is None else self.times[self._entry(sigma_B)]

    def to(self, device: "torch.device") -> "NoiseSchedule":
        """The same with its tables on the device."""
        signals = None if self.signals is None else self.signals.to(device)
        times = None if self.times is None else self.times.to(device)
        return replace(self, sigmas=self.sigmas.to(device), signals=signals, times=times)

    def _entry(self, sigma_B: "torch.Tensor") -> "torch.Tensor":
        """[B]: where in the table each of these sigmas of it stands."""
        import torch

        return torch.searchsorted(-self.sigmas, -sigma_B.contiguous()).clamp(max=len(self.sigmas) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """About how many bytes training one sample keeps or works in, weights left out; of blocks that differ, their mean."""

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
    pads_texts: bool
    """Whether every text takes `max_text_tokens`, padding included: its length then does not say whether it was cut."""
    text_token_bytes: int
    """About how many bytes a cached text token takes in the full-size model: sizes the shards, nothing else."""
    latent_components: tuple[str, ...]
    text_components: tuple[str, ...]
    denoiser_components: tuple[str, ...]
    """The denoiser's own name, as the diffusers pipeline calls it, and what else belongs to it."""
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

    def tokens_cut(self, directory: Path, captions: Sequence[str]) -> list[int]:
        """How many tokens of each caption lie beyond `max_text_tokens`, where it is cut; the tokenizer alone is loaded."""

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

    def collate_texts(
        self, texts: Sequence[Mapping[str, "torch.Tensor"]], geometries: Sequence[SampleGeometry] = ()
    ) -> dict[str, "torch.Tensor | None"]:
        """Pad texts into one batch; the mask is None when nothing was padded (attention without a mask is faster).

        `geometries`, one a text, are for families that are told of sizes and crops; without them, of whole images.
        """

    def predict(
        self,
        denoiser: Any,
        noisy_BCHW: "torch.Tensor",
        time_B: "torch.Tensor",
        texts: Mapping[str, "torch.Tensor | None"],
        references: Sequence["torch.Tensor"] = (),
        residuals: Sequence["torch.Tensor"] | None = None,
    ) -> "torch.Tensor":
        """The model's prediction [B,C,H,W] in fp32, at times that `NoiseSchedule.time` gives: in flow matching, sigma.

        `references` are latents to edit from, `residuals` a ControlNet's.
        """

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


@runtime_checkable
class TrainsEncoders(Protocol):
    """A family whose text encoders can be trained with the denoiser: its text items hold the token ids too."""

    trainable_encoders: tuple[str, ...]
    """The components, as the diffusers pipeline calls them; all are trained together."""
    encoder_targets: Mapping[str, Sequence[str]]
    """`target_groups` of a text encoder."""

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> "torch.nn.Module":
        """One of them, frozen, in training mode. On the `meta` device: its shapes alone, no weights are read."""

    def encode_tokens(
        self, encoders: Mapping[str, Any], texts: Mapping[str, "torch.Tensor | None"]
    ) -> dict[str, "torch.Tensor | None"]:
        """Collated texts as `predict` takes them, encoded from their token ids by these models, by name."""


@runtime_checkable
class HasPublishedNames(Protocol):
    """A family that programs beside ftk know by names of their own."""

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """Metadata by which they know a model: `modelspec.architecture`, and `ss_base_model_version` as sd-scripts write it."""


def available() -> list[str]:
    """Names of all families: the files of this folder."""
    package = importlib.import_module("ftk.models")
    names = [item.name for item in pkgutil.iter_modules(package.__path__) if not item.ispkg]
    return sorted(name.replace("_", "-") for name in names if name != "base")


def get(name: str) -> Family:
    """The family called `name`; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"model.family: there is no family {name!r}. Valid: {', '.join(available())}")
    family: Family = importlib.import_module(f"ftk.models.{name.replace('-', '_')}").FAMILY
    return family


def published_names(family: Family, directory: Path) -> Mapping[str, str]:
    """What other programs call a model; see `HasPublishedNames`. A family that they do not know has its own name."""
    return family.published_names(directory) if isinstance(family, HasPublishedNames) else {_ARCHITECTURE: family.name}


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
        return Path(
            snapshot_download(model.path, revision=model.revision, allow_patterns=patterns, ignore_patterns=list(_NOT_READ))
        )
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.path {model.path}: no such folder here, and no such model on the Hub (or it needs `hf auth login`)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"model.path {model.path}: no such folder here, and the Hub could not be reached to download it "
            f"({type(error).__name__}). Check the spelling or the network."
        ) from None


def check_pipeline(directory: Path, family: str, pipeline_class: str) -> None:
    """Raise `ModelError` unless `model_index.json` names this diffusers pipeline."""
    try:
        found = storage.read_json(directory / "model_index.json").get("_class_name")
    except FileNotFoundError:
        listed = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no model in the Diffusers layout: it has no model_index.json (found: {listed}). "
            f"Point model.path at a Diffusers folder; `ftk tiny {family} DIR` writes one to try."
        ) from None
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{directory / 'model_index.json'} cannot be read as JSON: {error}") from None
    if found != pipeline_class:
        raise ModelError(f"{directory} holds a {found}, not the {pipeline_class} that family {family} needs.")


def load_component(component: Any, directory: Path, name: str, dtype: "torch.dtype") -> Any:
    """The component called `name`, by its class's `from_pretrained`, from safetensors alone: the rest are pickles."""
    num_bytes = sum(path.stat().st_size for path in (directory / name).glob("*.safetensors"))
    if num_bytes > _WORTH_SAYING_BYTES:
        LOGGER.info("loading %s, %s", directory / name, human_bytes(num_bytes))
    hide_progress_bars()
    try:
        return component.from_pretrained(directory / name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory / name} cannot be loaded as {component.__name__}: {first_line(error)}") from error


def outline(model_class: Any, config: Any, dtype: "torch.dtype") -> Any:
    """A diffusers model's shapes alone, frozen, on the `meta` device."""
    import torch

    with torch.device("meta"):
        model = model_class.from_config(config)
    # The `to` of diffusers' models warns of every dtype.
    return torch.nn.Module.to(model, dtype).requires_grad_(False)


def load_pipeline(pipeline_class: Any, directory: Path, device: "torch.device", **arguments: Any) -> Any:
    """A diffusers pipeline without progress bars; what is not among the arguments is loaded onto the device."""
    import torch

    hide_progress_bars()
    try:
        pipeline = pipeline_class.from_pretrained(directory, **arguments)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} cannot be loaded as a pipeline: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in arguments:
            component.to(device)
    return pipeline


def hide_progress_bars() -> None:
    """Loading is said in one line of ours; downloads keep the Hub client's bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_references(family: str, references: Sequence["torch.Tensor"]) -> None:
    """Raise `ModelError` when a text-to-image model is given images to edit."""
    if references:
        raise ModelError(f"{family} takes no reference images: those belong to an edit model.")


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
