"""The Family protocol: what ftk knows about a model architecture. One file in this folder is one family.

`components/` holds the parts that several families share.
A family's file imports no torch at its top: `ftk prepare` reads the geometry of a family and needs no torch for it.

Shape legend: B batch, C latent channels, H W height and width (pixels of images, cells of latents), L text tokens,
D text width.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from ftk.configs import load
from ftk.configs.resolutions import NATIVE, parse_size
from ftk.configs.schema import ModelConfig
from ftk.errors import ConfigError
from ftk.models.components import placeholders
from ftk.models.components.geometry import LatentGeometry, ReferenceRule, nearest_multiple
from ftk.models.components.placeholders import Placeholders
from ftk.models.components.schedule import NoiseSchedule

if TYPE_CHECKING:
    import torch

Texts = Mapping[str, "torch.Tensor | None"]
"""Texts as a family collates them into one batch, by the names of `Family.collate_texts`."""
PutOnDevice = Callable[[Any, "torch.device"], Any]
"""Puts a loaded module where it computes."""
ControlForm = Literal["latents", "pixels"]
"""How control images are stored and read: see `Conditions.controls`."""
DENOISER = "denoiser"
"""The component that every method trains with, whatever the diffusers pipeline calls it."""
_ARCHITECTURE = "modelspec.architecture"


def move(module: Any, device: "torch.device") -> Any:
    """The `PutOnDevice` of a module that fits: all its weights are on the device."""
    return module.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a batch is conditioned on besides noise and time. All samples of a batch have as many references and controls.

    Attributes:
        texts: as `Family.collate_texts` gives them.
        references: [B,C,h,w] normalised latents for each input image of an edit model, of any size.
        controls: for each control image [B,C,h,w] normalised latents, or [B,3,H,W] pixels in [-1, 1], as the method needs.
        geometry_BG: where each sample's pixels come from: the fields of `SampleGeometry` in their order, int64. None: whole
            images of the size of the latents.
    """

    texts: Texts
    references: "tuple[torch.Tensor, ...]" = ()
    controls: "tuple[torch.Tensor, ...]" = ()
    geometry_BG: "torch.Tensor | None" = None

    def map(self, function: "Callable[[torch.Tensor], torch.Tensor]") -> "Conditions":
        """The same with each tensor replaced."""
        return Conditions(
            texts={name: None if tensor is None else function(tensor) for name, tensor in self.texts.items()},
            references=tuple(map(function, self.references)),
            controls=tuple(map(function, self.controls)),
            geometry_BG=None if self.geometry_BG is None else function(self.geometry_BG),
        )


@dataclass(slots=True, kw_only=True)
class Model:
    """What is in memory of a model: its weights, frozen, and what a method has attached to them.

    Attributes:
        encoders: text encoders that are trained too, by the names of the diffusers pipeline. Captions pass through them.
        extras: networks that a method adds beside the model (a ControlNet, an embedding table), by names of its own.
        directory: where it was loaded from, for what is beside its weights: tokenizers.
    """

    family: "Family"
    schedule: NoiseSchedule
    denoiser: Any
    encoders: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def components(self) -> dict[str, Any]:
        """Every module by name, the denoiser first."""
        return {DENOISER: self.denoiser, **self.encoders, **self.extras}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without what is random in training, such as dropout."""
        modules = list(self.components.values())
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module in modules:
                module.train()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """A named set of layers, as suffixes of module names: `to_q` within the main blocks does not reach that of a refiner.

    Attributes:
        in_blocks: suffixes of layers within blocks, by the blocks' class or, where refiners have blocks of the same class, by
            the name of the list that holds them.
        outside: suffixes of layers that are in no block.
    """

    in_blocks: Mapping[str, Sequence[str]]
    outside: Sequence[str] = ()

    @property
    def suffixes(self) -> list[str]:
        """All of them, each once, in order."""
        return list(dict.fromkeys([*(suffix for each in self.in_blocks.values() for suffix in each), *self.outside]))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterNames:
    """How a delivery format names the tensors of one component's adapter.

    Attributes:
        module: from a module's name in the diffusers model to the name before its tensors.
        factors: what a LoRA's two factors are called, the one next to the input first.
        has_alpha: whether an `.alpha` stands beside them; some readers refuse a file with one.
        is_read: whether the format's main reader has a place for a module; it passes over others without a word.
    """

    module: Callable[[str], str]
    factors: tuple[str, str] = ("lora_A", "lora_B")
    has_alpha: bool = True
    is_read: Callable[[str], bool] = lambda name: True


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


class FamilyConfig(BaseModel):
    """The settings under `model:` that a family adds to `family`, `path` and `revision`; none by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Family(Protocol):
    """What a model architecture must provide. Latents are normalised: in the denoiser's own space.

    An instance holds its settings: `parse` builds it with those of a run file, `get` with the defaults.
    """

    name: str
    Config: type[BaseModel]
    """Settings of the family's own, under `model:`."""
    config: Any
    geometry: LatentGeometry
    encoder_version: int
    """Raised whenever `encode_images` or `encode_texts` changes what it returns; part of every fingerprint."""
    pads_texts: bool
    """Whether every text takes `max_text_tokens`, padding included: its length then does not say whether it was cut."""
    text_token_bytes: int
    """About how many bytes a cached text token takes in the full-size model: sizes the shards, nothing else."""
    latent_components: tuple[str, ...]
    text_components: tuple[str, ...]
    denoiser_components: tuple[str, ...]
    """The folders of the denoiser and of what else training reads."""
    denoiser_attribute: str
    """The denoiser in the diffusers pipeline, its folder, and the prefix of its adapters in diffusers' files."""
    target_groups: Mapping[str, TargetGroup]
    """Names for sets of layers: `attention`, `attention+mlp`, `all-linear`, `text-kv`."""
    block_classes: tuple[str, ...]
    """Class names of the repeated blocks: for checkpointing, compiling, offloading and sharding."""
    sigma_defaults: Mapping[str, Any]
    """Settings under `train.sigma` that hold unless the run file says otherwise."""
    native_sizes: tuple[tuple[int, int], ...]
    """(width, height) in px that the model's makers publish, `resolutions: [native]`; images are drawn at the first unless
    another is asked for. Empty where there is no such list."""
    references: ReferenceRule | None
    """How input images are sized, of a model that edits images; None of one that takes no input image."""

    @property
    def max_text_tokens(self) -> int:
        """Longer texts are cut."""

    def check(self, directory: Path) -> None:
        """Raise `ModelError` unless `directory` is a model of this family in the Diffusers layout."""

    def unconditional(self, directory: Path) -> str | None:
        """The text that its pipeline draws without: the negative prompt where none is given, and what dropped captions train.

        None: no text, whose encoding is zeros.
        """

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

        Args:
            vae: as `load_vae` returns it, or that of the diffusers pipeline.
        """

    def image_memory(self, vae: Any, height: int, width: int) -> int:
        """About how many bytes `encode_images` works in for each image of a batch, weights left out; sides in pixels."""

    def decode(self, vae: Any, latents_BCHW: "torch.Tensor") -> "torch.Tensor":
        """Pixels [B,3,H,W] in [-1, 1] of normalised latents."""

    def load_text_encoder(
        self, directory: Path, dtype: "torch.dtype", device: "torch.device", place: PutOnDevice = move
    ) -> Any:
        """Tokenizer and text encoder, frozen, put onto the device by `place`; whatever object `encode_texts` takes."""

    def encode_texts(
        self, encoder: Any, captions: Sequence[str | None], references: "Sequence[Sequence[torch.Tensor]]" = ()
    ) -> list[dict[str, "torch.Tensor"]]:
        """One dict of unpadded tensors per caption, on the encoder's device.

        A caption's result does not depend on the other captions of its batch, beyond the rounding of the precision.

        Args:
            captions: None among them only of a family whose `unconditional` can be None.
            references: of a family with `references.in_texts`, for each caption its input images: [3,H,W] in [-1, 1].
        """

    def text_lengths(self, encoder: Any, captions: Sequence[str | None]) -> list[int]:
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
        """What one sample takes in training, of a denoiser that a method was attached to.

        `image_tokens` counts the tokens of its references too. `denoiser` may be on the `meta` device. Attention keeps no
        matrix of scores.
        """

    def collate_texts(self, texts: Sequence[Mapping[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor | None"]:
        """Pad texts into one batch; the mask is None when nothing was padded (attention without a mask is faster)."""

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """[B,C,H,W] fp32: the prediction of what `NoiseSchedule.objective` names; in flow matching noise minus image.

        The family turns sigma into its model's time, and its model's sign into this one. Texts pass through `model.encoders`
        where there are any.
        """

    def adapter_names(self, form: str, component: str, module: Any) -> AdapterNames:
        """How a delivery format (`comfyui`, `kohya`, `lycoris`) names an adapter of the denoiser or of a text encoder.

        Args:
            module: that component; its shapes alone (`meta`) are enough.

        Raises:
            ConfigError: no reader of this format knows this model; the message says which format works.
        """

    def pipeline(self, directory: Path, dtype: "torch.dtype", device: "torch.device", **components: Any) -> Any:
        """The diffusers pipeline; `components` replaces parts of it (`text_encoder=None` leaves one out).

        What is given stays where it is; the rest is loaded onto the device.
        """

    def pipeline_texts(self, texts: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
        """The pipeline's arguments for one cached text item, in place of `prompt`."""

    def generation(self, guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments for this strength of guidance, and for the family's own settings."""

    def tiny(self, directory: Path) -> None:
        """Write a complete small random model in the Diffusers layout: deterministic, no download."""


@runtime_checkable
class EncodesTokens(Protocol):
    """A family whose text encoders can be in memory with the denoiser, and gradients pass through them."""

    def load_encoder(self, directory: Path, name: str, dtype: "torch.dtype", device: "torch.device") -> "torch.nn.Module":
        """One of them, frozen, in training mode. On the `meta` device: its shapes alone, no weights are read."""

    def encode_tokens(self, encoders: Mapping[str, Any], texts: Texts) -> dict[str, "torch.Tensor | None"]:
        """Collated texts, encoded from their token ids by these models, by name."""


@runtime_checkable
class TrainsEncoders(EncodesTokens, Protocol):
    """A family whose text encoders can be trained with the denoiser: its text items hold the token ids too."""

    trainable_encoders: tuple[str, ...]
    """The components, as the diffusers pipeline calls them; all are trained together."""
    encoder_targets: Mapping[str, TargetGroup]
    """`target_groups` of a text encoder."""

    def encoder_key(self, component: str, key: str) -> str:
        """How other programs call a tensor or module of a text encoder, which here is called `key`."""


@runtime_checkable
class EditsImages(Protocol):
    """A family that makes an image from input images: its `references` is not None."""

    def pipeline_references(self, references: "Sequence[torch.Tensor]") -> dict[str, Any]:
        """The pipeline's arguments for these input images, each as [1,C,h,w] normalised latents."""


@runtime_checkable
class SharesTexts(Protocol):
    """A family whose texts begin with states that depend on their references alone: those are cached once for all captions."""

    def shared_tokens(self, encoder: Any, references: "Sequence[torch.Tensor]") -> int:
        """How many of the first states of each tensor of `encode_texts` these are; no model runs.

        Args:
            references: of one text, [3,H,W] in [-1, 1] as `encode_texts` is given them.
        """


@runtime_checkable
class AddsTokens(Protocol):
    """A family whose tokenizers and embedding tables can be given new words: `CacheNeeds.placeholder_tokens`.

    `components/placeholders.py` has what they are. Its text items then hold the token ids (`input_ids`, `input_ids_2`), and
    `tokens_cut` takes the new words as a third argument.
    """

    token_encoders: Mapping[str, str]
    """The folder of each text encoder's tokenizer, by the encoder's name in the diffusers pipeline."""
    embedding_keys: Mapping[str, str]
    """What A1111 and ComfyUI call each text encoder's vectors in a file; empty where no other program reads any."""

    def tokenizer_with(self, directory: Path, encoder: str, tokens: Placeholders) -> Any:
        """The tokenizer of a text encoder with new words added; no weights are read.

        Raises:
            ConfigError: it has one of the words already.
        """

    def add_tokens(self, encoder: Any, tokens: Placeholders) -> None:
        """Add new words to what `load_text_encoder` returned.

        Raises:
            ConfigError: a tokenizer has one of them already, or a word starts from more tokens than it has vectors.
        """


@runtime_checkable
class HasTokenStates(Protocol):
    """A family that adds tokens, whose text items have a row for each of them: `embeds` [L,D] beside `input_ids` [L].

    Its pipeline is one that diffusers loads no embeddings into.
    """

    def state_width(self, denoiser: Any) -> int:
        """D: how wide the rows are that this denoiser reads."""

    def teach(
        self, pipeline: Any, tokens: Placeholders, inputs_ND: "torch.Tensor | None", outputs_ND: "torch.Tensor | None"
    ) -> None:
        """Have the prompts of a pipeline read new words.

        Args:
            inputs_ND: the rows of the embedding table; those that the words start from by default.
            outputs_ND: what replaces the text encoder's last states of the new tokens.

        Raises:
            ConfigError: see `add_tokens`.
        """


@runtime_checkable
class HasControlNetworks(Protocol):
    """A family with a ControlNet in diffusers: a copy of a part of the denoiser, which adds to what the denoiser computes."""

    control_form: ControlForm
    """How the network reads control images."""

    def control_classes(self) -> tuple[Any, Any]:
        """diffusers' classes of the network and of the pipeline that draws with one."""

    def make_control_network(self, denoiser: Any, num_blocks: int | None) -> Any:
        """A network with the weights of the denoiser, whose outputs are zero, on the CPU; on `meta` its shapes alone.

        Args:
            num_blocks: how many of the denoiser's blocks are copied; None: as many as is usual.

        Raises:
            ConfigError: it cannot be so many.
        """

    def control_residuals(
        self, model: Model, network: Any, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> Mapping[str, Any]:
        """What the network adds within the denoiser, as arguments of the denoiser; of several control images the sum."""

    def draw_controlled(
        self, pipeline: Any, network: Any, controls: "Sequence[torch.Tensor]", strength: float, options: Mapping[str, Any]
    ) -> Any:
        """Draw with diffusers' pipeline of a network, made from the components of the family's pipeline.

        Args:
            controls: in a batch of one, as `Conditions.controls` has them.
            strength: factor on what the network adds.
            options: the other arguments of the pipeline.
        """


@runtime_checkable
class HasSampleDefaults(Protocol):
    """A family that draws otherwise than most, such as without classifier-free guidance or in few steps."""

    sample_defaults: Mapping[str, Any]
    """Settings under `sample` that hold unless the run file says otherwise."""


@runtime_checkable
class HasPublishedNames(Protocol):
    """A family that programs beside ftk know by names of their own."""

    def published_names(self, directory: Path) -> Mapping[str, str]:
        """Metadata by which they know a model: `modelspec.architecture`, and `ss_base_model_version` as sd-scripts write it."""


@runtime_checkable
class HasOriginalNames(Protocol):
    """A family whose denoiser was first published with other names of its layers than those of diffusers."""

    def original_names(self, denoiser: Any) -> Mapping[str, str]:
        """The published name of each layer that has another one, by its name in diffusers."""


def available() -> list[str]:
    """Names of all families: the files of this folder."""
    package = importlib.import_module("ftk.models")
    names = [item.name for item in pkgutil.iter_modules(package.__path__) if not item.ispkg]
    return sorted(name.replace("_", "-") for name in names if name != "base")


def get(name: str) -> Family:
    """The family called `name` with its default settings; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"model.family: there is no family {name!r}. Valid: {', '.join(available())}")
    family: Family = importlib.import_module(f"ftk.models.{name.replace('-', '_')}").FAMILY
    return family


def parse(config: ModelConfig) -> Family:
    """The family that a run file names, with its own settings under `model:` validated.

    Raises:
        ConfigError: there is no such family, or a setting is wrong; the message names every mistake.
    """
    family = get(config.family)
    fields_of_all = {"model_config": ConfigDict(extra="forbid", frozen=True)}
    # Both models at once, so that a misspelt key is compared with the common settings and with the family's own.
    both = type("Model", (family.Config, ModelConfig), fields_of_all)
    load.validate(both, config.model_dump(exclude_unset=True), f"model {config.family}", prefix="model.")
    made: Family = type(family)(family.Config.model_validate(config.settings))  # type: ignore[call-arg]
    return made


def sizes_of(family: Family, resolution: int | str, where: str = "data.resolutions") -> tuple[tuple[int, int], ...]:
    """(width, height) in px that one of `resolutions` names; of an edge, the square.

    Raises:
        ConfigError: the family has no images of this size, or no published sizes.
    """
    if isinstance(resolution, int):
        return ((resolution, resolution),)
    if resolution != NATIVE:
        size, multiple = parse_size(resolution), family.geometry.pixel_multiple
        nearest = nearest_multiple(size, multiple)
        if nearest != size:
            raise ConfigError(
                f"{where}: {resolution} is not a size of {family.name}, whose images have sides that are multiples of "
                f"{multiple} px. The nearest is {nearest[0]}x{nearest[1]}."
            )
        return (size,)
    if not family.native_sizes:
        raise ConfigError(
            f"{where}: `{NATIVE}` stands for the sizes that a model's makers publish, and {family.name} has none. "
            f"Name edges (1024) or sizes (1024x768)."
        )
    return family.native_sizes


def published_names(family: Family, directory: Path) -> Mapping[str, str]:
    """What other programs call a model; see `HasPublishedNames`. A family that they do not know has its own name."""
    return family.published_names(directory) if isinstance(family, HasPublishedNames) else {_ARCHITECTURE: family.name}


def original_names(family: Family, denoiser: Any) -> Mapping[str, str]:
    """See `HasOriginalNames`; nothing of a family whose names were never others."""
    return family.original_names(denoiser) if isinstance(family, HasOriginalNames) else {}


def check_tokens(family: Family, directory: Path, tokens: Placeholders) -> None:
    """Refuse new words that the tokenizers of a model cannot be given; no weights are read.

    Raises:
        ConfigError: see `AddsTokens`, or the family's tokenizer takes no new words at all.
    """
    if not tokens:
        return
    if not isinstance(family, AddsTokens):
        able = [name for name in available() if isinstance(get(name), AddsTokens)]
        raise ConfigError(
            f"{family.name}: its text encoder cannot be given new words, such as {next(iter(tokens))!r}. Families that can: "
            f"{', '.join(able)}."
        )
    for encoder in family.token_encoders:
        tokenizer = family.tokenizer_with(directory, encoder, tokens)
        for word, placeholder in tokens.items():
            placeholders.start_ids(tokenizer, word, placeholder)


def with_arguments(model: Model, **arguments: Any) -> Model:
    """The same model, whose denoiser is given further arguments: what a network beside it adds within."""
    return replace(model, denoiser=_Given(model.denoiser, arguments))


@dataclass(frozen=True, slots=True)
class _Given:
    """A denoiser that is given further arguments."""

    denoiser: Any
    arguments: Mapping[str, Any]

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.denoiser(*positional, **self.arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)


def encoded(model: Model, texts: Texts) -> Texts:
    """Collated texts as the model's text encoders encode them now; as they are cached where none is trained."""
    if not model.encoders:
        return texts
    assert isinstance(model.family, EncodesTokens)
    return model.family.encode_tokens(model.encoders, texts)


def load_model(family: Family, directory: Path, encoders: Sequence[str], dtype: "torch.dtype", device: "torch.device") -> Model:
    """The denoiser and the text encoders that are trained, frozen, in training mode; on `meta` their shapes alone."""
    loaded: dict[str, Any] = {}
    denoiser = family.load_denoiser(directory, dtype, device)
    for name in encoders:
        assert isinstance(family, EncodesTokens)
        loaded[name] = family.load_encoder(directory, name, dtype, device)
    schedule = family.load_schedule(directory)
    return Model(family=family, schedule=schedule, denoiser=denoiser, encoders=loaded, directory=directory)
