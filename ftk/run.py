"""A run file resolved once: its configuration, family, method, settings and places. Every stage takes a `Run`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftk import locations
from ftk.configs.load import load
from ftk.configs.schema import GenerateConfig, PromptConfig, RunConfig, SampleConfig, SigmaConfig, negative_key
from ftk.errors import ConfigError
from ftk.methods import base as methods
from ftk.methods.adapters.targets import check_group
from ftk.methods.base import CacheNeeds, HasControls, Method
from ftk.models import base as models
from ftk.models.base import AddsTokens, Family, HasSampleDefaults
from ftk.models.components import model_folder

_ANY_SAMPLING = frozenset({"shift", "minimum", "maximum", "continuous", "stratified", "weighting"})
"""Settings of `train.sigma` that go with any `sampling`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Where the outputs of a run lie.

    Attributes:
        cache: a folder, or a URL that training reads.
        models: folders in the Diffusers layout, of base models that are stored otherwise.
    """

    prepared: Path
    cache: str
    run: Path
    models: Path

    @property
    def checkpoints(self) -> Path:
        """A folder per checkpoint."""
        return self.run / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The newest trained weights, as they are delivered."""
        return self.run / "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPrompt:
    """How the picture of one of `sample.prompts` is drawn: by its own settings, and those of `sample` for the rest.

    Attributes:
        place: what messages call it: `sample.prompts.0`.
        width, height: in px.
    """

    entry: PromptConfig
    place: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int

    @property
    def has_negative(self) -> bool:
        """Whether a negative prompt takes part."""
        return self.guidance_scale > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run file with everything that its names stand for.

    Attributes:
        settings: of the method, an instance of its `Config`; the family holds its own.
        encoders: the text encoders that are trained with the denoiser, by name.
        needs: what the method needs of the cache.
    """

    config: RunConfig
    family: Family
    method: Method
    settings: Any
    paths: Paths
    encoders: tuple[str, ...]
    needs: CacheNeeds

    @property
    def trains_base(self) -> bool:
        """Whether the base weights are what is trained."""
        return methods.trains_base(self.method, self.settings)

    @property
    def changes_base(self) -> bool:
        """Whether the base weights change."""
        return methods.changes_base(self.method, self.settings)

    @property
    def formats(self) -> tuple[str, ...]:
        """The delivery formats of what is trained; the first is the default."""
        return methods.formats(self.method, self.settings)

    @property
    def all_components(self) -> tuple[str, ...]:
        """The folders of the whole model."""
        return (*self.family.latent_components, *self.family.text_components, *self.family.denoiser_components)

    @property
    def trained_components(self) -> tuple[str, ...]:
        """The folders that training reads."""
        tokenizers: tuple[str, ...] = ()
        if self.needs.placeholder_tokens and isinstance(self.family, AddsTokens):
            tokenizers = tuple(self.family.token_encoders.values())
        return (*self.family.denoiser_components, *self.encoders, *tokenizers)

    def locate(self, components: Sequence[str]) -> Path:
        """The local folder with these components of the base model; see `model_folder.locate`."""
        return model_folder.locate(self.family, self.config.model, components, self.paths.models)

    def local_components(self, components: Sequence[str]) -> Path | None:
        """The same if they are on this machine already; see `model_folder.local_components`."""
        return model_folder.local_components(self.family, self.config.model, components, self.paths.models)

    def negative_prompt(self, directory: Path, entry: PromptConfig | None = None) -> str | None:
        """What a prompt's picture is drawn without: its own, else `sample.negative_prompt`, else the family's.

        Args:
            directory: the folder of the base model.
            entry: the prompt; None for what holds for prompts without one of their own.
        """
        if entry is not None and entry.negative_prompt is not None:
            return entry.negative_prompt
        written = self.config.sample.negative_prompt
        return self.family.unconditional(directory) if written is None else written

    def negative_key(self, entry: PromptConfig, directory: Path) -> str:
        """What a cache lists a prompt's negative one under: where texts see references it goes with those of the prompt."""
        negative, rule = self.negative_prompt(directory, entry), self.family.references
        return entry.key(negative) if rule is not None and rule.in_texts and entry.references else negative_key(negative)

    def dropped_text(self, directory: Path) -> str | None:
        """What dropped captions train: `train.caption_dropout_text`, else the family's own, of the model in `directory`."""
        written = self.config.train.caption_dropout_text
        return self.family.unconditional(directory) if written is None else written

    @property
    def sample_size(self) -> tuple[int, int]:
        """(width, height) in px of sample images, unless a prompt has a size of its own.

        Raises:
            ConfigError: the family has no images of this size.
        """
        return self.drawn_size(self.config.data.resolutions_in_use[0], self.config.sample, "sample")

    @property
    def drawn_prompts(self) -> tuple[DrawnPrompt, ...]:
        """`sample.prompts` with all that they are drawn with.

        Raises:
            ConfigError: the family has no images of the size of one, or a prompt has images that nothing reads.
        """
        return tuple(self._drawn(position, entry) for position, entry in enumerate(self.config.sample.entries))

    def _drawn(self, position: int, entry: PromptConfig) -> DrawnPrompt:
        place, settings = f"sample.prompts.{position}", self.config.sample
        self._check_images(entry, place)
        sides = {"width": entry.width or settings.width, "height": entry.height or settings.height}
        is_own = entry.width or entry.height
        resolution = self.config.data.resolutions_in_use[0]
        width, height = self.drawn_size(resolution, settings.model_copy(update=sides), place if is_own else "sample")

        def setting(name: str) -> Any:
            own = getattr(entry, name)
            return getattr(settings, name) if own is None else own

        return DrawnPrompt(
            entry=entry,
            place=place,
            width=width,
            height=height,
            num_inference_steps=setting("num_inference_steps"),
            guidance_scale=setting("guidance_scale"),
            seed=settings.seed + position if entry.seed is None else entry.seed,
        )

    def _check_images(self, entry: PromptConfig, place: str) -> None:
        if entry.references and self.family.references is None:
            raise ConfigError(f"{place}.references: {self.family.name} takes no input images: those are for edit models.")
        if entry.controls and not isinstance(self.method, HasControls):
            raise ConfigError(f"{place}.controls: method {self.method.name} reads no control images. Leave them out.")

    def drawn_size(self, resolution: int | str, settings: SampleConfig | GenerateConfig, where: str) -> tuple[int, int]:
        """(width, height) in px of images that are drawn: as the settings say, or the first size of a resolution.

        Raises:
            ConfigError: the family has no images of this size.
        """
        multiple = self.family.geometry.pixel_multiple
        width, height = models.sizes_of(self.family, resolution)[0]
        if isinstance(resolution, int):
            width = height = resolution // multiple * multiple
        width, height = settings.width or width, settings.height or height
        if width % multiple or height % multiple:
            raise ConfigError(f"{where}: {width} x {height} px; {self.family.name} needs multiples of {multiple} px.")
        return width, height

    def with_config(self, config: RunConfig) -> "Run":
        """The same run under a configuration that differs in no name of a family, a method or their settings."""
        return replace(self, config=config)


def load_run(path: Path, overrides: Sequence[str] = (), workspace: str | None = None) -> Run:
    """Read a run file, apply the overrides, and resolve it; see `ftk.configs.load.load` and `resolve`."""
    return resolve(load(path, overrides, workspace))


def resolve(config: RunConfig) -> Run:
    """Look up what a configuration names. No model is read.

    Raises:
        ConfigError: there is no such family or method, a setting of theirs is wrong, or they do not go together.
    """
    family = models.parse(config.model)
    method, settings = methods.parse(config.method)
    encoders = method.encoders(family, settings)
    check_group(family, encoders, settings)
    _check_controls(config, method)
    _check_preservation(config, method, settings)
    return Run(
        config=_with_family_defaults(config, family),
        family=family,
        method=method,
        settings=settings,
        paths=paths(config),
        encoders=encoders,
        needs=method.cache_needs(family, settings),
    )


def _check_preservation(config: RunConfig, method: Method, settings: Any) -> None:
    """`train.loss.preservation` compares with the base model, which must be there.

    Raises:
        ConfigError: it is not.
    """
    reason = methods.base_refusal(method, settings) if config.train.loss.preservation is not None else None
    if reason is not None:
        raise ConfigError(
            f"train.loss.preservation needs the base model's own prediction, and {reason} Leave it out; class images "
            f"(`role: class`) go with every method."
        )


def _check_controls(config: RunConfig, method: Method) -> None:
    """Control images are for methods that read them, which need as many in each prompt as in a sample.

    Raises:
        ConfigError: a setting has no effect, or a prompt lacks a control image.
    """
    train = config.train
    if not isinstance(method, HasControls):
        for name in ("controls", "control_dropout"):
            if getattr(train, name) != type(train).model_fields[name].default:
                raise ConfigError(
                    f"train.{name} has no effect with method {method.name}, which reads no control images. Leave it out."
                )
        return
    if train.controls == "all" and not method.reads_several:
        raise ConfigError(f"train.controls: method {method.name} reads one control image at a time. Set it to one.")
    for position, entry in enumerate(config.sample.entries):
        if not entry.controls or (train.controls == "one" and len(entry.controls) > 1):
            what = f"{len(entry.controls)} control images" if entry.controls else "no control image"
            raise ConfigError(
                f"sample.prompts.{position}: {entry.prompt!r:.60} has {what}, and method {method.name} draws from "
                f"{'one' if train.controls == 'one' else 'one or several'}: {{prompt: ..., controls: [FILE]}}."
            )


def paths(config: RunConfig) -> Paths:
    """Where a run's outputs lie."""
    workspace = locations.local_path(config.workspace)
    return Paths(
        prepared=workspace / "prepared",
        cache=config.cache.path or str(workspace / "cache"),
        run=workspace / "runs" / config.run,
        models=workspace / "models",
    )


def _with_family_defaults(config: RunConfig, family: Family) -> RunConfig:
    """`train.sigma` and `sample` as the family has them, but for what the run file says itself."""
    sigma = _sigma(config, family)
    changes: dict[str, Any] = {} if sigma is None else {"train": config.train.model_copy(update={"sigma": sigma})}
    if isinstance(family, HasSampleDefaults):
        defaults = {name: value for name, value in family.sample_defaults.items() if name not in config.sample.model_fields_set}
        changes |= {"sample": config.sample.model_copy(update=defaults)} if defaults else {}
    return config.model_copy(update=changes) if changes else config


def _sigma(config: RunConfig, family: Family) -> SigmaConfig | None:
    """None: as written."""
    written = config.train.sigma.model_dump(exclude_unset=True)
    defaults = {name: value for name, value in family.sigma_defaults.items() if name not in written}
    if "sampling" in written:
        # Parameters of the family's own distribution say nothing of another one.
        defaults = {name: value for name, value in defaults.items() if name in _ANY_SAMPLING}
    return SigmaConfig.model_validate({**defaults, **written}) if defaults else None
