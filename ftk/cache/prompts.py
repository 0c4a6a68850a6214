"""What sample images are drawn from: the texts and images of `sample.prompts`, as items of the cache."""

from dataclasses import dataclass, field
from pathlib import Path

from ftk.cache import plan
from ftk.cache.plan import ImageItem, TextItem
from ftk.configs.schema import negative_key
from ftk.errors import ConfigError
from ftk.methods.base import HasControls
from ftk.pipeline import prompt_images
from ftk.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The texts by what the cache lists them under, and the items of those prompts that have images."""

    texts: dict[str, TextItem] = field(default_factory=dict)
    references: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)
    controls: dict[str, tuple[ImageItem, ...]] = field(default_factory=dict)

    @property
    def images(self) -> list[ImageItem]:
        """Every image of every prompt."""
        return [item for part in (self.references, self.controls) for items in part.values() for item in items]


def of(run: Run, model: Path) -> Prompts:
    """The prompts of a run and the negative one; nothing where there are no prompts.

    Args:
        model: the folder of the base model.

    Raises:
        ConfigError: an image cannot be read, or the family or method has no use for it.
    """
    prompts, settings = Prompts(), run.config.sample
    for position, entry in enumerate(settings.entries):
        place, key = f"sample.prompts.{position}", entry.key()
        _refuse_unused(run, bool(entry.references), bool(entry.controls), place)
        if entry.references and run.family.references is not None:
            prompts.references[key] = tuple(
                _item(prompt_images.find(path, run.family.references, f"{place}.references.{number}"), f"reference{number}")
                for number, path in enumerate(entry.references)
            )
        if entry.controls:
            controls = tuple(
                _item(prompt_images.find(path, run.sample_size, f"{place}.controls.{number}"), f"control{number}")
                for number, path in enumerate(entry.controls)
            )
            is_latents = run.needs.controls == "latents"
            prompts.controls[key] = controls if is_latents else tuple(map(plan.as_pixels, controls))
        references = _seen_by_texts(run, prompts, key)
        prompts.texts[key] = _text(entry.prompt, references)
    negative = run.negative_prompt(model) if settings.entries else None
    for entry in settings.entries:
        references = _seen_by_texts(run, prompts, entry.key())
        # Where texts do not depend on references all prompts share one negative prompt.
        key = entry.key(negative) if references else negative_key(negative)
        prompts.texts[key] = _text(negative, references)
    return prompts


def _refuse_unused(run: Run, has_references: bool, has_controls: bool, place: str) -> None:
    if has_references and run.family.references is None:
        raise ConfigError(f"{place}.references: {run.family.name} takes no input images: those are for edit models.")
    if has_controls and not isinstance(run.method, HasControls):
        raise ConfigError(f"{place}.controls: method {run.method.name} reads no control images. Leave them out.")


def _seen_by_texts(run: Run, prompts: Prompts, key: str) -> tuple[ImageItem, ...]:
    rule = run.family.references
    return prompts.references.get(key, ()) if rule is not None and rule.in_texts else ()


def _text(caption: str | None, references: tuple[ImageItem, ...]) -> TextItem:
    return TextItem(plan.text_id(caption, [each.id for each in references]), caption, references)


def _item(image: prompt_images.PromptImage, part: str) -> ImageItem:
    return ImageItem(image.id, "", str(image.path), part, image.width, image.height)
