"""The Method protocol: a way of training. One file in this folder is one method; `adapters/` holds what several share."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from ftk.configs import load
from ftk.configs.schema import MethodConfig
from ftk.errors import ConfigError
from ftk.models.base import DENOISER, Conditions, ControlForm, Family, Model, Texts, TrainsEncoders
from ftk.models.components.placeholders import Placeholders

if TYPE_CHECKING:
    import torch

Tensor = TypeVar("Tensor")
_REASONS = {"a1111": "A1111's own files hold new words, and none are trained here. Use another format."}
"""Why a format cannot be written by methods that say nothing else of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNeeds:
    """What a method needs of the cache besides latents and texts: all that `ftk cache` knows of methods.

    Attributes:
        controls: how control images are stored: as latents of the VAE, or as the pixels that a control network reads.
        placeholder_tokens: new words of the captions, with the number of their vectors and what these start from.
        class_images: whether there must be samples with `role: class`.
    """

    controls: ControlForm = "latents"
    placeholder_tokens: Placeholders = field(default_factory=dict)
    class_images: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Where trained weights are written, in which delivery format, and what their files say of themselves."""

    directory: Path
    form: str
    metadata: Mapping[str, str]


class Method(Protocol):
    """What a way of training must provide. `settings` are an instance of its `Config`.

    Names of a text encoder's parameters and tensors start with the component's: `text_encoder.`.
    """

    name: str
    Config: type[BaseModel]
    FORMATS: tuple[str, ...]
    """Delivery formats that `export` can write; the first is the default."""

    def encoders(self, family: Family, settings: Any) -> tuple[str, ...]:
        """The text encoders that must be in memory while training, since they are trained too.

        Raises:
            ConfigError: the settings ask for one that this family cannot give, or the method does not know the family.
        """

    def cache_needs(self, family: Family, settings: Any) -> CacheNeeds:
        """What the cache must hold for this family and these settings."""

    def attach(self, model: Model, settings: Any, seed: int) -> "dict[str, torch.nn.Parameter]":
        """Add what is trained to the model, with its own networks in `model.extras`; returns the parameters by name.

        Equal seeds give equal initial values.
        """

    def predict(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """The model's prediction with what was attached: `Family.predict`, unless the method has a network of its own."""

    def export(self, model: Model, settings: Any, export: Export) -> list[Path]:
        """Write the weights in a delivery format, each file atomically; returns the files.

        Raises:
            ConfigError: the method cannot honestly become this format; the message gives the reason and what works.
        """

    def load_into(self, family: Family, pipeline: Any, directory: Path) -> Any:
        """Load what `export` wrote in the default format into a fresh diffusers pipeline; returns the pipeline to draw with.

        That is the same one, unless the method's networks need a pipeline of another class.

        Raises:
            CheckpointError: a file is missing or damaged, or was trained on another base model.
        """

    def merge(self, model: Model) -> None:
        """Fold what was trained into the base weights, in place.

        Raises:
            ConfigError: there is nothing in the base weights to fold it into.
        """

    def usage(self, family: Family, settings: Any) -> str:
        """Python lines that load what `export` wrote in the default format: `path/to/this/folder` into `pipeline`."""


@runtime_checkable
class HasParameterGroups(Protocol):
    """A method whose parameters do not all learn at one rate."""

    def parameter_groups(self, settings: Any) -> Sequence[tuple[str, float]]:
        """(regular expression searched in parameter names, factor on the learning rate); the first match counts."""


@runtime_checkable
class HasBaseChanges(Protocol):
    """A method that may write into the base weights: they must be there in full, not as 8-bit codes."""

    def changes_base(self, settings: Any) -> bool:
        """Whether it does so with these settings."""


@runtime_checkable
class HasBaseTraining(Protocol):
    """A method that may train the denoiser's own weights: where those are split over processes, so is all that it trains.

    Its `export` is called by all of them then.
    """

    def trains_base(self, settings: Any) -> bool:
        """Whether it does so with these settings, and adds nothing to the denoiser."""


@runtime_checkable
class HasFormatsBySettings(Protocol):
    """A method that cannot write all of its `FORMATS` with every setting."""

    def formats(self, settings: Any) -> tuple[str, ...]:
        """Those that it can write with these; the first is the default."""


@runtime_checkable
class HasThawedModules(Protocol):
    """A method that trains modules of the denoiser, or a copy of them: it must see them in full, not as 8-bit codes."""

    def thaw(self, model: Model, settings: Any) -> None:
        """Have those require gradients, or copy them, before the base is quantised; `attach` is called later."""


@runtime_checkable
class HasReaders(Protocol):
    """A method whose files for other programs are not loaded as a LoRA's are."""

    def reading(self, family: Family, settings: Any, form: str) -> str | None:
        """Markdown: how a delivery in this format is loaded; None where `usage` says it, or no program reads it."""


@runtime_checkable
class HasTexts(Protocol):
    """A method that changes what the texts say to the denoiser, without their encoder."""

    def texts(self, model: Model, texts: Texts) -> Texts:
        """Collated texts, encoded, as its `predict` has the model read them."""


@runtime_checkable
class HasDataStart(Protocol):
    """A method that may start from what the layers see of the data."""

    def start_batches(self, settings: Any) -> int:
        """How many micro-batches it looks at with these settings; 0: it starts without."""

    def start_from(self, model: Model, predictions: "Iterable[Callable[[], torch.Tensor]]") -> None:
        """Set the initial values, once `attach` has been called. Each prediction passes a micro-batch through the model."""


@runtime_checkable
class HasStartFiles(Protocol):
    """A method that reads what `train.start_from` names by itself: it is no adapter of the denoiser's layers."""

    def start_values(self, model: Model, path: Path) -> "tuple[dict[str, torch.Tensor], Sequence[Path]]":
        """fp32 values by the names of the parameters, and the files that hold them.

        Args:
            model: with the method attached; its shapes alone (`meta`) are enough.

        Raises:
            ConfigError: there is nothing of this method, or the settings do not go with it; the message says what to set.
            CheckpointError: it is damaged, or was trained on another base model.
        """


@runtime_checkable
class HasControls(Protocol):
    """A method that reads control images: its pipelines take one for each image that they draw."""

    reads_several: bool
    """Whether it can read several control images of a sample together (`train.controls: all`), or one at a time alone."""

    def dropped_control(self, control: "torch.Tensor", form: ControlForm) -> "torch.Tensor":
        """What a control image is replaced by where it is dropped (`train.control_dropout`): it stands for no condition.

        Args:
            control: [C,h,w] or [3,H,W], as a sample of `Conditions.controls`; the result has the same shape.
        """

    def sampling_pipeline(self, model: Model, pipeline: Any) -> Any:
        """The pipeline that draws while training: the family's, with the networks in `model.extras`."""

    def pipeline_controls(self, controls: "Sequence[torch.Tensor]", strength: float = 1.0) -> dict[str, Any]:
        """The pipeline's arguments for control images, as `Conditions.controls` has them, in a batch of one.

        Args:
            strength: factor on what the control images add to the model (diffusers' conditioning scale); 0 adds nothing.
        """


@runtime_checkable
class HasStrength(Protocol):
    """A method whose trained part can be made weaker or stronger while the model is in memory."""

    def strength_refusal(self, settings: Any) -> str | None:
        """Why it cannot with these settings; None if it can."""

    def at_strength(self, model: Model, strength: float) -> AbstractContextManager[None]:
        """Inside, what was attached adds so many times what it adds otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedPipeline:
    """diffusers' class of the pipeline that draws with a merged denoiser, and how it is called, in a line for the card."""

    name: str
    usage: str


@runtime_checkable
class HasMergedPipeline(Protocol):
    """A method whose merged denoiser takes more than the base's, so that a pipeline of another class draws with it."""

    def merged_pipeline(self, model: Model, directory: Path) -> MergedPipeline:
        """That pipeline. Where it prepares its inputs in another way than training, the weights are changed for it, in place.

        Args:
            directory: of the base model.

        Raises:
            ConfigError: there is none.
        """


@runtime_checkable
class HasBasePrediction(Protocol):
    """A method beside whose trained part the base model is still there as it was."""

    def base_refusal(self, settings: Any) -> str | None:
        """Why it is not with these settings; None if it is."""

    def base_prediction(
        self, model: Model, noisy_BCHW: "torch.Tensor", sigma_B: "torch.Tensor", conditions: Conditions
    ) -> "torch.Tensor":
        """What the base model predicts, as if nothing had been attached; without a gradient."""


def available() -> list[str]:
    """Names of all methods: the files of this folder."""
    package = importlib.import_module("ftk.methods")
    names = [item.name for item in pkgutil.iter_modules(package.__path__) if not item.ispkg]
    return sorted(name.replace("_", "-") for name in names if name != "base")


def get(name: str) -> Method:
    """The method called `name`; `ConfigError` names the valid ones."""
    if name not in available():
        raise ConfigError(f"method.name: there is no method {name!r}. Valid: {', '.join(available())}")
    method: Method = importlib.import_module(f"ftk.methods.{name.replace('-', '_')}").METHOD
    return method


def parse(config: MethodConfig) -> tuple[Method, Any]:
    """The method that a run file names, and its settings validated by its own model."""
    method = get(config.name)
    return method, load.validate(method.Config, config.settings, f"method {config.name}", prefix="method.")


def parameter_groups(method: Method, settings: Any) -> Sequence[tuple[str, float]]:
    """What the method asks for, or nothing; see `HasParameterGroups`."""
    return method.parameter_groups(settings) if isinstance(method, HasParameterGroups) else ()


def empty_control(control: "torch.Tensor", form: ControlForm) -> "torch.Tensor":
    """The usual `HasControls.dropped_control`: black pixels, which show no edge, pose or depth; or latents of zeros."""
    import torch

    return torch.full_like(control, -1.0) if form == "pixels" else torch.zeros_like(control)


def changes_base(method: Method, settings: Any) -> bool:
    """Whether the base weights themselves change; see `HasBaseChanges`."""
    return isinstance(method, HasBaseChanges) and method.changes_base(settings)


def trains_base(method: Method, settings: Any) -> bool:
    """Whether the base weights are what is trained; see `HasBaseTraining`."""
    return isinstance(method, HasBaseTraining) and method.trains_base(settings)


def formats(method: Method, settings: Any) -> tuple[str, ...]:
    """The delivery formats that can be written with these settings; see `HasFormatsBySettings`."""
    return method.formats(settings) if isinstance(method, HasFormatsBySettings) else method.FORMATS


def start_batches(method: Method, settings: Any) -> int:
    """How many micro-batches the method looks at before it starts; see `HasDataStart`."""
    return method.start_batches(settings) if isinstance(method, HasDataStart) else 0


def strength_refusal(method: Method, settings: Any) -> str | None:
    """Why what is trained has no strength with these settings, or None; see `HasStrength`."""
    if not isinstance(method, HasStrength):
        return f"what method {method.name} trains has no strength."
    return method.strength_refusal(settings)


def base_refusal(method: Method, settings: Any) -> str | None:
    """Why the base model's own prediction is not to be had while training, or None; see `HasBasePrediction`."""
    if isinstance(method, HasBasePrediction):
        return method.base_refusal(settings)
    if changes_base(method, settings):
        return f"method {method.name} changes the base weights themselves, and what they were is not in memory."
    return f"what method {method.name} trains cannot be switched off."


def at_strength(method: Method, model: Model, strength: float | None) -> AbstractContextManager[None]:
    """Inside, the model is as it is with this strength; None: as it is trained."""
    if strength is None or strength == 1:
        return nullcontext()
    assert isinstance(method, HasStrength)
    return method.at_strength(model, strength)


def trained_encoders(family: Family, settings: Any) -> tuple[str, ...]:
    """With `settings.text_encoder` all text encoders that the family can train.

    Raises:
        ConfigError: it can train none.
    """
    if settings.text_encoder is None:
        return ()
    if not isinstance(family, TrainsEncoders):
        raise ConfigError(
            f"method.text_encoder: the text encoder of {family.name} cannot be trained with ftk, its texts are cached as it "
            f"encodes them. Leave it out."
        )
    return family.trainable_encoders


def encoder_rates(settings: Any) -> tuple[tuple[str, float], ...]:
    """`Method.parameter_groups` of text encoders that learn at a rate of their own."""
    if settings.text_encoder is None or settings.text_encoder.rate == 1:
        return ()
    return ((r"^text_encoder(_\d+)?\.", settings.text_encoder.rate),)


def prefix(component: str) -> str:
    """What stands before the names of a component's parameters and tensors."""
    return "" if component == DENOISER else f"{component}."


def check_format(name: str, formats: Sequence[str], form: str, reasons: Mapping[str, str]) -> None:
    """Refuse a delivery format that the method cannot write, with the reason and the way that works.

    Raises:
        ConfigError: always, unless the method writes the format.
    """
    if form in formats:
        return
    writes = ", ".join(formats)
    reasons = {**_REASONS, **reasons}
    if form in reasons:
        raise ConfigError(f"{name} cannot be written as {form}: {reasons[form]} It can be written as: {writes}.")
    raise ConfigError(f"there is no delivery format {form!r} of {name}. Write one of: {writes}.")
